"""``data.train_share``: rows that the seed draws, the same for all kinds of runs."""

from __future__ import annotations

import random

import pytest

from dts_hf.data.subset import drawn
from dts_hf.distill import task_of
from dts_hf.errors import UserError
from tests.support.recipes import recipe

IDS = [f"row-{n}" for n in range(1000)]


def test_a_seed_draws_rows_by_their_ids() -> None:
    places = drawn(IDS, 0.9, 1)
    assert len(places) == 900 and places == sorted({*places})
    assert drawn(IDS, 0.9, 1) == places != drawn(IDS, 0.9, 2)
    shuffled = random.Random(0).sample(IDS, len(IDS))
    assert {shuffled[place] for place in drawn(shuffled, 0.9, 1)} == {IDS[place] for place in places}
    assert drawn(IDS, 1.0, 5) == [*range(1000)] and len(drawn(IDS[:3], 0.5, 0)) == 2 and len(drawn(IDS, 1e-9, 0)) == 1


def test_rows_are_drawn_without_favour() -> None:
    """Over 200 seeds each of 50 rows is there in 0.9 of them, within five standard deviations."""
    counts = [0] * 50
    for seed in range(200):
        for place in drawn(IDS[:50], 0.9, seed):
            counts[place] += 1
    assert all(abs(count - 180) < 5 * (200 * 0.9 * 0.1) ** 0.5 for count in counts)


def test_a_recipe_trains_on_the_rows_of_its_seed(workplace) -> None:
    def rows(seed: int, share: float, **data):
        chosen = recipe(data={"train_share": share, **data}, training={"seed": seed})
        return task_of(chosen).load_rows()

    whole, first = rows(1, 1.0), rows(1, 0.5)
    ids = [row.id for row in first.train]
    assert len(ids) == round(len(whole.train) / 2) and {*ids} < {row.id for row in whole.train}
    assert [row.id for row in rows(1, 0.5).train] == ids != [row.id for row in rows(2, 0.5).train]
    assert [row.id for row in first.validation] == [row.id for row in whole.validation]
    assert sum(part.used for part in first.train_parts) == len(ids)
    split = rows(1, 0.5, validation=0.25)
    assert {row.id for row in split.validation} == {row.id for row in rows(2, 1.0, validation=0.25).validation}


@pytest.mark.parametrize("share", [0, 1.5, "half"])
def test_what_is_no_share_is_refused(share) -> None:
    with pytest.raises(UserError, match=r"data\.train_share"):
        recipe(data={"train_share": share})
