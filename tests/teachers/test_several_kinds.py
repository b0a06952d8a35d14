"""Several teachers of other kinds than models: what they answer with, and which are refused."""

from __future__ import annotations

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.training.trainer import DistillationTrainer
from tests.support.compact import CompactedTeacher
from tests.support.tiny import TINY_VOCAB, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, largest_difference, losses, step_gradients, temperatures, trainer_for
from tests.support.trainers import arguments as training_arguments

ROUTED = [{**row, "domain": ("live", "other")[k % 3 == 0]} for k, row in enumerate(ROWS)]


def teacher() -> torch.nn.Module:
    return tiny_llama(seed=1, layers=3).double()


def trainer_of(folder, teachers, temperature=4.0, per_teacher=False, **options):
    return DistillationTrainer(
        tiny_llama(seed=0).double(), teachers=teachers, teacher_column="domain", temperature=temperature,
        args=training_arguments(folder, **options), train_dataset=ROUTED, processing_class=tiny_tokenizer(),
        temperature_per_teacher=per_teacher,
    )  # fmt: skip


@pytest.mark.parametrize("policy", [4.0, {"name": "dts"}], ids=str)
@pytest.mark.parametrize("names", [("other",), ("live", "other")], ids="+".join)
def test_compact_rows_of_one_beside_the_states_of_another_are_one_teacher(tmp_path, policy, names):
    """With every token kept; where both names are compact, its rows are shared out between the two."""
    model, compact = teacher(), CompactedTeacher(teacher(), TINY_VOCAB)
    teachers = {name: compact if name in names else model for name in ("live", "other")}
    options = {"max_steps": 4, "logging_steps": 1}
    several = trainer_of(tmp_path / "several", teachers, policy, **options)
    alone = trainer_for(
        tmp_path / "one", tiny_llama(seed=0).double(), model, temperature=policy, train_dataset=ROUTED,
        processing_class=tiny_tokenizer(), options=options,
    )  # fmt: skip
    batches = [
        [trainer.collate([trainer.train_dataset[k] for k in range(first, first + 4)]) for first in (0, 4, 8)]
        for trainer in (several, alone)
    ]
    assert largest_difference(step_gradients(several, batches[0]), step_gradients(alone, batches[1])) < 1e-6
    several.train()
    alone.train()
    torch.testing.assert_close(losses(several), losses(alone), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(temperatures(several), temperatures(alone), rtol=1e-5, atol=1e-6)


def test_each_teacher_may_have_a_temperature_of_its_own_beside_compact_rows(tmp_path):
    teachers = {"live": teacher(), "other": CompactedTeacher(tiny_llama(seed=2).double(), 24)}
    trainer = trainer_of(tmp_path, teachers, {"name": "dts", "rule": "gap"}, True, max_steps=2, logging_steps=1)
    trainer.train()
    line = [line for line in trainer.state.log_history if "temperature/live" in line][-1]
    assert line["temperature/live"] != line["temperature/other"]


def test_compact_rows_of_one_refuse_what_needs_every_logit(tmp_path):
    compact = CompactedTeacher(teacher(), 24)
    with pytest.raises(UserError, match="got 'logit_mse' with a compact"):
        DistillationTrainer(
            tiny_llama(seed=0).double(), teachers={"live": teacher(), "other": compact}, teacher_column="domain",
            divergence="logit_mse", args=training_arguments(tmp_path), train_dataset=ROUTED,
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
