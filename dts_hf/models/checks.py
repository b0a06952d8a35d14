"""What must be true of models before they are trained or asked: room for the tokens, weights of their own."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that has weights in common with the student.

    Raises:
        UserError: training would change the teacher, and freezing the teacher the student.
    """
    if student is teacher:
        raise UserError("teacher: is the same object as the student; load the model twice, or copy.deepcopy(model)")
    if is_sharded(student) or is_sharded(teacher):
        return
    ours = {weight.data_ptr() for weight in student.parameters() if weight.numel()} - {0}
    shared = [name for name, weight in teacher.named_parameters() if weight.data_ptr() in ours]
    if shared:
        raise UserError(
            f"teacher: shares {len(shared)} weights with the student, such as {shared[0]}, so training would change the "
            "teacher. Load the model twice, one for each (an adapter also changes the model that it is put on)"
        )


def positions_of(model: nn.Module) -> int | None:
    """Tokens that a row of ``model`` may have; None where its configuration names no limit."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    return positions


def check_positions(model: PreTrainedModel, name: str, tokens: int, advice: str) -> None:
    """Refuse ``tokens`` tokens in one row where ``model`` has fewer positions.

    Learned positions would fail in the middle of the run; rotary ones would get worse without a word.

    Args:
        model: a causal language model; one whose configuration names no limit takes everything.
        name: the word for it in the error.
        tokens: of the longest row.
        advice: what to change.

    Raises:
        UserError: it does not fit.
    """
    positions = positions_of(model)
    if positions is not None and tokens > positions:
        raise UserError(
            f"{name} ({type(model).__name__}) has {positions} positions, but the longest row needs {tokens}. {advice}"
        )
