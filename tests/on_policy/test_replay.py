"""The replay buffer by itself: what stays, what is drawn, and that a checkpoint holds it bit for bit."""

import json

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.head import Head
from dts_hf.on_policy.replay import ONLY, ReplayBuffer, ReplayRow, most_bytes, share_of_capacity
from dts_hf.teachers.several import Share


def row(number, labels=3, prompt=2, **more):
    ids = torch.arange(prompt + labels, dtype=torch.int32) + 10 * number
    targets = torch.cat([torch.full((prompt,), IGNORE_INDEX, dtype=torch.int32), ids[prompt:]])
    return ReplayRow(ids, targets, row_id=number, **more)


def head(width=4):
    return Head(torch.zeros(7, width))


def filled(capacity, rows, **options):
    buffer = ReplayBuffer(capacity, **options)
    return buffer, [buffer.add(one) for one in rows]


def test_the_oldest_goes_first():
    buffer, numbers = filled(3, [row(number) for number in range(5)])
    assert numbers == [0, 1, 2, 3, 4]
    assert [buffer[number].row_id for number in sorted(set(buffer.draw(9, seed=0, step=0)))] == [2, 3, 4]
    assert len(buffer) == 3 and buffer.is_full


def test_a_row_without_a_label_is_not_kept():
    buffer, numbers = filled(4, [row(0), row(1, labels=0), row(2)])
    assert numbers == [0, None, 1] and len(buffer) == 2
    only_first = row(3)
    only_first.labels[:] = IGNORE_INDEX
    only_first.labels[0] = 5  # nothing predicts the first token
    assert buffer.add(only_first) is None


def test_an_empty_buffer_has_nothing_to_draw():
    with pytest.raises(ValueError, match="empty"):
        ReplayBuffer(3).draw(1, seed=0, step=0)


def test_capacity_one():
    buffer, _ = filled(1, [row(0), row(1)])
    assert buffer.draw(3, seed=0, step=0) == [1, 1, 1] and buffer.is_full


def test_draws_are_functions_of_seed_step_and_rank():
    buffer, _ = filled(50, [row(number) for number in range(50)])
    first = buffer.draw(20, seed=1, step=2, rank=0)
    assert first == buffer.draw(20, seed=1, step=2, rank=0)
    assert len(set(first)) == 20
    others = [buffer.draw(20, seed=s, step=k, rank=r) for s, k, r in ((2, 2, 0), (1, 3, 0), (1, 2, 1))]
    assert all(first != other for other in others)
    everything = buffer.draw(120, seed=1, step=2)
    assert sorted(everything[:50]) == list(range(50)) and everything[50:100] == everything[:50]


def test_draws_are_even():
    """Chi-square of 20 rows over 4,000 draws of one: below the 99.9 % point of 19 degrees of freedom."""
    buffer, _ = filled(20, [row(number) for number in range(20)])
    drawn = [buffer.draw(1, seed=5, step=step)[0] for step in range(4_000)]
    chi = sum((drawn.count(number) - 200) ** 2 / 200 for number in range(20))
    assert chi < 43.8


def test_states_come_back_in_the_order_of_the_batch():
    rows = [row(0, labels=2), row(1, labels=0), row(2, labels=3)]
    buffer, numbers = filled(5, rows)
    states = torch.randn(5, 4, dtype=torch.bfloat16)
    buffer.keep_states(numbers, [Share(states, head())], [2, 0, 3])
    kept = [numbers[0], numbers[2]]
    assert torch.equal(buffer[numbers[2]].states[ONLY], states[2:])
    (share,) = buffer.shares(kept[::-1], [Share(None, head())], torch.device("cpu"))
    assert share.rows is None and torch.equal(share.states, torch.cat([states[2:], states[:2]]))
    assert share.states.dtype == torch.bfloat16


def test_kept_states_do_not_hold_those_of_the_batch():
    buffer, numbers = filled(1, [row(0), row(1)])
    buffer.keep_states(numbers, [Share(torch.randn(6, 4), head())], [3, 3])  # the first is gone already
    assert buffer[1].states[ONLY].untyped_storage().nbytes() == 3 * 4 * 4


def test_several_teachers_keep_each_its_rows():
    rows = [row(0, labels=1, teacher=0), row(1, labels=2, teacher=1), row(2, labels=2, teacher=0)]
    buffer, numbers = filled(5, rows)
    first, second = torch.randn(3, 4), torch.randn(2, 6)
    shares = [
        Share(first, head(), torch.tensor([0, 3, 4]), 1.0, "a"),
        Share(second, head(6), torch.tensor([1, 2]), 1.0, "b"),
        Share(first[:0], head(), torch.tensor([], dtype=torch.int64), 1.0, "c"),
    ]
    buffer.keep_states(numbers, shares, [1, 2, 2])
    assert [sorted(buffer[number].states) for number in numbers] == [["a"], ["b"], ["a"]]
    a, b, c = buffer.shares([2, 1, 2], shares, torch.device("cpu"))
    assert a.rows.tolist() == [0, 1, 4, 5] and b.rows.tolist() == [2, 3]
    assert torch.equal(a.states, first[1:].repeat(2, 1)) and torch.equal(b.states, second)
    assert len(c.states) == len(c.rows) == 0 and [s.teacher for s in (a, b, c)] == ["a", "b", "c"]


def test_teachers_that_have_every_row():
    buffer, numbers = filled(5, [row(0), row(1)])
    shares = [Share(torch.randn(6, 4), head(), None, weight, name) for name, weight in (("a", 0.25), ("b", 0.75))]
    buffer.keep_states(numbers, shares, [3, 3])
    for again, share in zip(buffer.shares(numbers, shares, torch.device("cpu")), shares, strict=True):
        assert torch.equal(again.states, share.states) and again.rows is None
        assert (again.weight, again.teacher) == (share.weight, share.teacher)


def test_states_of_other_rows_are_refused():
    buffer, numbers = filled(5, [row(0), row(1)])
    with pytest.raises(ValueError, match="5 states for 6 labels"):
        buffer.keep_states(numbers, [Share(torch.randn(5, 4), head())], [3, 3])
    with pytest.raises(ValueError, match="3 rows with labels for 2 rows"):
        buffer.keep_states(numbers, [Share(torch.randn(6, 4), head())], [3, 3, 0])


def test_states_need_not_be_kept():
    buffer, numbers = filled(5, [row(0), row(1)], keeps_states=False)
    buffer.keep_states(numbers, [Share(torch.randn(6, 4), head())], [3, 3])
    assert not any(buffer[number].states for number in numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_checkpoint_holds_it_bit_for_bit(tmp_path, dtype):
    buffer, numbers = filled(4, [row(number, labels=number % 3, prompt=1 + number) for number in range(6)])
    live = [number for number in numbers if number in (0, 1, 2, 3)]
    counts = [number % 3 for number in range(6)]
    shares = [Share(torch.randn(6, width).to(dtype), head(width), None, 0.5, f"t{width}") for width in (4, 6)]
    buffer.keep_states(numbers, shares, counts)
    buffer.save(tmp_path, rank=1)
    other = ReplayBuffer(4)
    other.load(tmp_path, rank=1)
    assert len(other) == len(buffer) == 4 and other.nbytes == buffer.nbytes
    for number in live:
        one, two = buffer[number], other[number]
        assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.labels, two.labels)
        assert (one.row_id, one.teacher) == (two.row_id, two.teacher)
        assert one.states.keys() == two.states.keys() == {"t4", "t6"}
        for name, states in one.states.items():
            assert two.states[name].dtype == dtype and torch.equal(states, two.states[name])
    assert other.draw(4, seed=3, step=9) == buffer.draw(4, seed=3, step=9)
    assert other.add(row(7)) == buffer.add(row(7)) == 4


def test_an_empty_buffer_goes_through_a_checkpoint(tmp_path):
    ReplayBuffer(4).save(tmp_path, rank=0)
    other, _ = filled(4, [row(0)])
    other.load(tmp_path, rank=0)
    assert len(other) == 0 and other.add(row(0)) == 0


def test_checkpoints_that_cannot_be_read(tmp_path):
    buffer, _ = filled(4, [row(0), row(1)])
    with pytest.raises(UserError, match="holds no replay buffer of process 0"):
        buffer.load(tmp_path, rank=0)
    buffer.save(tmp_path, rank=0)
    with pytest.raises(UserError, match=r"holds 2 rows, and this process keeps 1 .*capacity"):
        ReplayBuffer(1).load(tmp_path, rank=0)
    path = tmp_path / "replay_0.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "format": 7}))
    with pytest.raises(UserError, match="format 7, expected 1"):
        buffer.load(tmp_path, rank=0)
    path.write_text(json.dumps(told))
    (tmp_path / "replay_0.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be read"):
        buffer.load(tmp_path, rank=0)
    assert len(buffer) == 2  # and nothing is lost of what was there


def test_its_memory_is_below_what_is_stated():
    buffer, numbers = filled(4, [row(number) for number in range(6)])
    buffer.keep_states(numbers, [Share(torch.randn(18, 4), head())], [3] * 6)
    bound = most_bytes(4, tokens=5, labels=3, bytes_of_label=4 * 4)
    assert buffer.nbytes == bound == 4 * (8 * 5 + 3 * 16)
    buffer.clear()
    assert buffer.nbytes == 0 and buffer.add(row(0)) == 0


def test_processes_share_the_capacity():
    assert [share_of_capacity(1000, world) for world in (1, 2, 3)] == [1000, 500, 334]
    assert share_of_capacity(1, 4) == 1
