"""Batches that are filled to a budget of tokens: best fit, every row once in every epoch, the same number of packs."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from dts_hf.data.samplers import DUMMY_ROW, LengthGroupedSampler, Packs, PackSampler, best_fit, dummy_row


def lengths_of(count: int, seed: int = 0) -> list[int]:
    """Like those of an instruction set: many short rows, a long tail."""
    draw = random.Random(seed)
    return [min(512, max(8, round(draw.lognormvariate(4.6, 0.7)))) for _ in range(count)]


def test_best_fit_by_hand() -> None:
    """6 opens a pack, 5 another; 4 fits into the first alone, 3 and 2 into the second; 1 needs a third."""
    assert best_fit([3, 6, 1, 5, 2, 4], 10) == [[1, 5], [3, 0, 4], [2]]
    assert best_fit([], 10) == [] and best_fit([10, 10], 10) == [[0], [1]]


@pytest.mark.parametrize("tokens", [512, 1024, 8192])
def test_packs_are_full_and_hold_every_row_once(tokens: int) -> None:
    lengths = lengths_of(3000)
    packs = best_fit(lengths, tokens)
    assert sorted(row for pack in packs for row in pack) == list(range(3000))
    filled = sorted(sum(lengths[row] for row in pack) for pack in packs)
    assert filled[-1] <= tokens
    assert len(packs) <= 1 - (-sum(lengths) // tokens)  # no set of packs could be smaller by more than one


def test_each_fits_best() -> None:
    """Against a search through all packs."""
    lengths, packs = lengths_of(400, seed=3), []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        room = [700 - sum(lengths[other] for other in pack) for pack in packs]
        fitting = [place for place, left in enumerate(room) if left >= lengths[row]]
        if fitting:
            packs[min(fitting, key=lambda place: room[place])].append(row)
        else:
            packs.append([row])
    found = [sum(lengths[row] for row in pack) for pack in best_fit(lengths, 700)]
    assert sorted(found) == sorted(sum(lengths[row] for row in pack) for pack in packs)


@pytest.mark.parametrize("multiple", [1, 2, 7])
def test_every_epoch_takes_every_row_once_in_as_many_packs(multiple: int) -> None:
    lengths = lengths_of(500)
    sampler = PackSampler(lengths, 1000, seed=5, multiple=multiple)
    assert len(sampler) % multiple == 0 and len(sampler) - len(sampler.packs) < multiple
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        packs = list(sampler)
        assert len(packs) == len(sampler)
        assert sorted(row for pack in packs for row in pack) == list(range(500))
        assert max(sum(lengths[row] for row in pack) for pack in packs) <= 1000
        assert all(packs[: len(sampler.packs)]) and not any(packs[len(sampler.packs) :])
        orders.append(packs)
    assert all(one != other for one, other in pairwise(orders))
    together = [{frozenset(pack) for pack in packs if len(pack) > 1} for packs in orders]
    assert len(together[0] & together[1]) < len(together[0]) / 2  # most rows meet others in the next epoch


def test_the_order_is_one_of_seed_and_epoch_alone() -> None:
    lengths = lengths_of(200)
    first, again, other = (PackSampler(lengths, 800, seed=seed) for seed in (1, 1, 2))
    for sampler in (first, again, other):
        sampler.set_epoch(3)
    random.seed(9)
    assert list(first) == list(again) == list(again) != list(other)


def test_a_fullest_pack_comes_first_of_all() -> None:
    lengths = [5, 4, 9, 1, 8]
    assert sum(lengths[row] for row in next(iter(PackSampler(lengths, 10)))) == 10


def test_the_rows_of_a_pack_are_a_batch_and_an_empty_one_is_a_dummy_row() -> None:
    rows = [{"input_ids": [k, k], "labels": [k, k], "row_id": k} for k in range(5)]
    packs = Packs(rows, lambda row: dummy_row(row, [-100]))
    assert [row["row_id"] for row in packs.__getitems__([(3, 1)])] == [3, 1]
    (dummy,) = packs.__getitems__([()])
    assert dummy == {"input_ids": [0], "labels": [-100], "row_id": DUMMY_ROW}
    assert len(packs) == 5


def spread(tokens: list[int]) -> float:
    """Standard deviation over mean."""
    mean = sum(tokens) / len(tokens)
    return float((sum((count - mean) ** 2 for count in tokens) / len(tokens)) ** 0.5 / mean)


def test_steps_cost_the_same() -> None:
    """Tokens of a batch, over one epoch of 20,000 rows: 8,192 of them against as many rows (70), shuffled or by length."""
    lengths = lengths_of(20_000)
    budget = [sum(lengths[row] for row in pack) for pack in PackSampler(lengths, 8192, seed=1)]
    rows = round(8192 / (sum(lengths) / len(lengths)))
    shuffled = random.Random(0).sample(range(20_000), 20_000)
    figures = {"budget": spread(budget[:-1]), "budget, with the last pack": spread(budget)}
    for name, order in (("shuffled", shuffled), ("by length", list(LengthGroupedSampler(lengths, rows)))):
        figures[name] = spread(
            [sum(lengths[row] for row in order[k : k + rows]) for k in range(0, 20_000 - rows, rows)]
        )
    print({name: f"{figure:.2%}" for name, figure in figures.items()}, f"{rows} rows, {len(budget)} packs")
    assert sorted(budget)[1] > 0.999 * 8192  # all but one
    assert figures["budget, with the last pack"] < 0.1 < figures["by length"]
    assert figures["shuffled"] > 0.05
