"""What must be true of models before they are trained or asked: finite weights of their own, room for the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError
from dts_hf.models.quantization import stored


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


class NonFiniteWeights(UserError):
    """A model whose files hold NaN or infinity; ``code`` is what the doctor calls it."""

    code = "weights-not-finite"


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a model with a weight that is NaN or infinite: every loss would be, and no message would say why.

    One pass over the weights, without a mask of their size. Sharded ones were checked when they were whole.

    Args:
        model: loaded.
        name: what errors call it.

    Raises:
        NonFiniteWeights: names the first such weight, and how many of its numbers are non-finite.
    """
    if is_sharded(model):
        return
    broken = [(key, kept) for key, weight in model.named_parameters() if not _is_finite(kept := stored(weight))]
    if broken:
        key, kept = broken[0]
        numbers = int(kept.numel() - kept.float().isfinite().sum())  # fp8 has no isfinite
        others = f", and others in {len(broken) - 1:,} more tensors" if len(broken) > 1 else ""
        raise NonFiniteWeights(
            f"{name} has non-finite weights: {numbers:,} of the {kept.numel():,} numbers of {key}{others}. Its files are "
            "broken, or it was saved by a run that diverged"
        )


def _is_finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel() or weight.is_meta or "float4" in str(weight.dtype):
        return True  # a packed float4 has no NaN
    if weight.element_size() == 1:  # fp8 knows no minimum
        weight = weight.float()
    least, most = weight.aminmax()  # a NaN is both
    return bool(least.isfinite() & most.isfinite())


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
