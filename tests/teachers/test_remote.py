"""A teacher behind HTTP gives what the same teacher gives in the process, and nothing else is learned from."""

from __future__ import annotations

import pytest
import torch

from dts_hf.models.packed_attention import cu_seqlens_mask
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from tests.support.served import batch_of, running, served_tiny
from tests.support.tiny import tiny_llama
from tests.support.trainers import trainer_for

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19]]


@pytest.fixture(scope="module")
def url():
    with running(served_tiny()) as url:
        yield url


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], {
        name: value.clone() for name, value in trainer.model.state_dict().items()
    }


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["padded", "packed"])
def test_fifty_steps_with_a_remote_teacher_are_those_with_a_local_one(tmp_path, url, options) -> None:
    told = {"options": {"max_steps": 50}, **options}
    local, weights = losses(trainer_for(tmp_path / "local", **told))
    remote, far_weights = losses(trainer_for(tmp_path / "remote", teacher=RemoteTeacher(url), **told))
    assert len(local) == 50
    assert remote == pytest.approx(local, rel=1e-6)
    assert max(float((weights[name] - far_weights[name]).abs().max()) for name in weights) < 1e-5


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_on_either_side_is_cut_off(url, left) -> None:
    batch, labels = batch_of(ROWS, left=left)
    teacher = LiveTeacher(tiny_llama(seed=1, layers=3))
    alone = [teacher.states(*batch_of([row])) for row in ROWS]
    torch.testing.assert_close(RemoteTeacher(url).states(batch, labels), torch.cat(alone), rtol=0, atol=1e-5)


def test_packs_are_cut_by_positions_or_by_boundaries(url) -> None:
    teacher, remote = LiveTeacher(tiny_llama(seed=1, layers=3)), RemoteTeacher(url)
    expected = torch.cat([teacher.states(*batch_of([row])) for row in ROWS])
    ids = torch.tensor([[i for row in ROWS for i in row]])
    labels = torch.tensor([[label for row in ROWS for label in (-100, -100, *row[2:])]])
    positions = torch.tensor([[k for row in ROWS for k in range(len(row))]])
    for told in ({"position_ids": positions}, {"attention_mask": cu_seqlens_mask([len(row) for row in ROWS])}):
        torch.testing.assert_close(remote.states({"input_ids": ids, **told}, labels), expected, rtol=0, atol=1e-5)
