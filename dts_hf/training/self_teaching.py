"""What a trainer does for a student that teaches itself, and for a teacher that reads more than the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from dts_hf.errors import UserError
from dts_hf.models.description import describe_for_training
from dts_hf.teachers.base import Teacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.self_teacher import CopyTeacher, RunningMean, SharedTeacher, TeacherOfItself

#: Of a checkpoint: the running mean.
EMA_WEIGHTS = "ema.safetensors"


class FollowCallback(TrainerCallback):
    """The running mean follows after every optimizer step, before anything is logged, scored or saved.

    Args:
        mean: of the teacher.
        student: gives the student as it is trained, without its wrapper.
    """

    def __init__(self, mean: RunningMean, student: Callable[[], nn.Module]) -> None:
        self.mean, self.student = mean, student

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # a second train(), or a retry with a smaller batch, is a new run
            self.mean.begin(self.student())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.mean.follow(self.student(), state.global_step)


def columns_with_prefix(
    columns: Mapping[str, str | None] | None, prefix: str | None, teacher: Teacher, data_collator: Any
) -> Mapping[str, str | None] | None:
    """``data.columns`` with the one of the text that a teacher alone reads.

    Args:
        columns: our names of columns, and theirs.
        prefix: ``teacher_prefix_column``.
        teacher: must be able to read other rows than the student.
        data_collator: of the user; None: there is none.

    Raises:
        UserError: teacher, collator or columns do not go with it.
    """
    if "teacher_prefix" in (columns or {}):
        raise UserError("columns: got 'teacher_prefix', but teacher_prefix_column is the argument for that")
    if prefix is None:
        return columns
    if not isinstance(teacher, (LiveTeacher, SharedTeacher)):
        raise UserError(
            f"teacher_prefix_column: got {prefix!r} with {type(teacher).__name__}, expected one teacher that is a model of "
            "this process, or SelfTeacher: others know the student's rows alone"
        )
    if data_collator is not None:
        raise UserError(
            f"teacher_prefix_column: got {prefix!r} and a data_collator, which knows nothing of a row for the teacher; "
            "leave one of them out"
        )
    return {**(columns or {}), "teacher_prefix": prefix}


def mean_of(teacher: Teacher) -> RunningMean | None:
    """The running mean that ``teacher`` is; None where it is something else."""
    return teacher.mean if isinstance(teacher, TeacherOfItself) else None


def objective_of_teacher(teacher: Teacher) -> dict[str, Any]:
    """Which weights of the student ``teacher`` has, in flat words: a run that goes on must have the same."""
    facts = teacher.spec.facts if isinstance(teacher, TeacherOfItself) else {}
    return {
        "self_teacher": facts.get("weights"),
        "ema_rate": facts.get("ema_rate"),
        "ema_every": facts.get("ema_every"),
    }


def record_of(teacher: TeacherOfItself) -> dict[str, Any]:
    """What a resume compares of it: of a frozen copy its weights, too; a running mean comes out of the checkpoint."""
    copied = isinstance(teacher, CopyTeacher) and teacher.mean is None
    weights = describe_for_training(teacher.model, trained=False) if copied else {}
    return {"kind": "self", **{name: value for name, value in weights.items() if name == "weights"}}


def saved_mean(teacher: Teacher) -> dict[str, dict[str, Tensor]]:
    """The running mean as a file of a checkpoint; nothing where there is none."""
    mean = mean_of(teacher)
    return {} if mean is None else {EMA_WEIGHTS: mean.tensors()}


def load_mean(teacher: Teacher, folder: Path) -> None:
    """Put the running mean of a checkpoint back, bit for bit.

    Raises:
        UserError: it has none, or one of another student.
    """
    mean = mean_of(teacher)
    if mean is None:
        return
    path = folder / EMA_WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: holds no {EMA_WEIGHTS}, so it was written without a running mean of the weights")
    mean.load(load_file(path), str(path))


def check_launch_of_self(teacher: Teacher, strategy: str, sharded: bool) -> None:
    """Refuse a launch under which a student cannot teach itself.

    Args:
        teacher: of any kind.
        strategy: as ``launch.strategy_of`` calls it.
        sharded: ``teacher_placement``.

    Raises:
        UserError: names what does not go together.
    """
    if not isinstance(teacher, TeacherOfItself):
        return
    if sharded:
        raise UserError("teacher_placement: got 'sharded', but a student that teaches itself is where the student is")
    if isinstance(teacher, SharedTeacher) and strategy in ("zero3", "fsdp2"):
        raise UserError(
            f"teacher: kind self with an adapter shares the student's model, whose weights {strategy} spreads over the "
            "processes; expected DDP, ZeRO-1 or ZeRO-2, or no adapter"
        )
