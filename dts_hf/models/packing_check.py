"""Whether a model keeps packed rows apart, and by which attention: proved before training, or packing is refused.

Two rows, one behind the other. The gradient of the second one's logits in the embeddings of the first is exactly zero, in
every number format, where nothing passes from one to the other; a convolution or a recurrent state that runs on over the
border leaves a gradient, however little it moves the logits. And the second row gives the logits that it gives alone,
whatever the first one says, but for rounding. On a GPU each kernel that the layers would take is compared there with one
call of SDPA for each row, output and gradients, whether the model has been moved there yet or not.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dts_hf.distributed.processes import process
from dts_hf.errors import UserError
from dts_hf.models import packed_kernels
from dts_hf.models.head import without_adapters
from dts_hf.models.packed_attention import EAGER_NAME, NAME, ask_of, cu_seqlens_mask, packed_attention
from dts_hf.models.packed_kernels import Ask

logger = logging.getLogger(__name__)

ROW = 12  # tokens of each of the two rows that the model gets
#: Rows of the kernels' proof: more than one block of tokens, borders that are no multiples of it, and a row of one token.
LENGTHS, NEAR = (150, 1, 75), 40
_PROBE = "dts_hf_packed_probe"


def check_packing(
    model: nn.Module,
    name: str = "the model",
    device: torch.device | None = None,
    own_mask: bool = True,
    autocast: torch.dtype | None = None,
) -> bool:
    """Prove that ``model`` keeps packed rows apart; call it once after loading when packing is on.

    On a CPU or a GPU a model that uses ``sdpa`` is switched to ``packed_attention`` where that works too, and on a GPU one
    of a family that has no ``sdpa``; other calls of the model see no change. Where a GPU is left with transformers' own mask
    of (sum of T)^2 entries, a warning names the model and the reason. Bloom, MPT, Falcon, Mamba and others read row
    boundaries from nowhere (transformers 5.23): each row would see the rows before it, and nothing would say so.

    Args:
        model: a causal language model; its mode is restored.
        name: the word for it in the error.
        device: where the model will be trained, where that is not where it is now.
        own_mask: whether the batches may carry ``cu_seqlens_mask``; those of a collator of the user's have positions alone.
        autocast: what the model will run in, where that is not the dtype of its weights.

    Returns:
        Whether the model reads ``cu_seqlens_mask``; if not, it reads the boundaries from ``position_ids``.

    Raises:
        UserError: the model mixes packed rows.
    """
    owner = without_adapters(model)
    was_training, before = owner.training, owner.config._attn_implementation
    where = device or owner.device
    owner.eval()
    try:
        ours = _ours(owner, before, where) if own_mask else None
        why = f"its attention is {before}" if own_mask else "its batches carry position_ids alone"
        with _as_trained(owner, where, autocast):
            with torch.no_grad():  # by the model's own attention
                alone = owner(input_ids=_probe(owner)[:, ROW:], use_cache=False).logits.float()
            if ours is not None:
                why = _why_not(owner, ours, alone, where, autocast)
                if not why:
                    return True
                owner.set_attn_implementation(before)
            mixed = _why_mixed(owner, None, alone)
    finally:
        owner.train(was_training)
    if mixed:
        raise UserError(
            f"data.packing: {name} ({type(owner).__name__}) does not keep packed rows apart: a row would be changed by the "
            "rows before it. Set data.packing: false"
        )
    if where.type == "cuda" and before in ("sdpa", "eager", NAME, EAGER_NAME) and process()[0] == 0:
        logger.warning(
            "data.packing: %s (%s) keeps the attention of transformers, with a mask of (tokens of a batch)^2 entries that "
            "makes packing slow on a GPU: %s",
            name, type(owner).__name__, why,
        )  # fmt: skip
    return False


def _ours(owner: Any, before: str, where: torch.device) -> str | None:
    """Which attention of ours can stand in the place of ``before``; None: none of them."""
    if where.type not in ("cpu", "cuda"):
        return None
    if before in ("sdpa", NAME):
        return NAME
    without_sdpa = where.type == "cuda" and not getattr(owner, "_supports_sdpa", True)  # not by the user's choice
    return EAGER_NAME if before == EAGER_NAME or (before == "eager" and without_sdpa) else None


def _as_trained(owner: Any, where: torch.device, autocast: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast where the model stands on the GPU already; on a CPU it is looked at in its own dtype, as ever."""
    if where.type == "cuda" and owner.device.type == "cuda" and autocast is not None:
        return torch.autocast("cuda", dtype=autocast)
    return nullcontext()


def _why_not(owner: Any, ours: str, alone: Tensor, where: torch.device, autocast: torch.dtype | None) -> str:
    """Switch to ``ours``; why that does not work, or nothing where it does.

    Args:
        owner: the model, switched.
        ours: name of the attention.
        alone: logits of the second of the probe's rows.
        where: the device of training.
        autocast: the dtype there.
    """
    owner.set_attn_implementation(ours)
    why = _why_mixed(owner, cu_seqlens_mask([ROW, ROW]), alone)
    if why or where.type != "cuda":
        return why
    taken = []
    for ask in asked(owner, where, autocast):
        kernel = packed_kernels.choose(ask, packed_kernels.gpu_of(where), packed_kernels.has_flash)
        taken.append(kernel)
        if kernel != "rows" and (failed := why_wrong(kernel, ask, where)):
            return f"the kernel '{kernel}' {failed}"
    logger.info("data.packing: %s: attention of packed rows by %s", type(owner).__name__, ", ".join(sorted({*taken})))
    return ""


def asked(owner: Any, where: torch.device, autocast: torch.dtype | None) -> list[Ask]:
    """What the layers of ``owner`` will ask of their attention on ``where``, each once, in evaluation and in training."""
    asks: dict[Ask, None] = {}
    trained = any(parameter.requires_grad for parameter in owner.parameters())

    def note(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **told: Any) -> tuple[Tensor, Any]:
        ask = ask_of(module, q, k, v, {"dropout": 0.0, "scaling": None, **told})
        dtype = ask.dtype if autocast is None else autocast
        asks[ask._replace(device=where.type, dtype=dtype, gradient=trained)] = None
        return packed_attention(module, q, k, v, mask, **told)

    AttentionInterface.register(_PROBE, note)
    ours, was_training = owner.config._attn_implementation, owner.training
    devices = [owner.device] if owner.device.type == "cuda" else []
    try:
        owner.set_attn_implementation(_PROBE)
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for training in (False, True) if trained else (False,):  # dropout is on in training alone
                owner.train(training)
                positions = torch.arange(ROW, device=owner.device).repeat(2)[None]
                mask = cu_seqlens_mask([ROW, ROW]).to(owner.device)
                owner(input_ids=_probe(owner), position_ids=positions, attention_mask=mask, use_cache=False)
    finally:
        owner.set_attn_implementation(ours)
        owner.train(was_training)
    return list(asks)


def why_wrong(kernel: packed_kernels.Kernel, ask: Ask, device: torch.device) -> str:
    """What is wrong with ``kernel`` for ``ask`` on ``device``, or nothing: it must be ``rows``, and no row may see another.

    With dropout outputs cannot be compared; that no row sees another still can.
    """
    ask = ask._replace(
        window=None if ask.window is None else min(ask.window, NEAR)
    )  # the same question on fewer tokens
    mask, numbers = cu_seqlens_mask(LENGTHS).to(device), torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, heads, sum(LENGTHS), width, generator=numbers)
        .to(device, ask.dtype)
        .requires_grad_(ask.gradient)
        for heads, width in ((ask.heads, ask.width), (ask.key_heads, ask.width), (ask.key_heads, ask.value_width))
    ]
    try:
        given = _with_gradients(kernel, ask, states, mask, slice(None))
        behind = _with_gradients(kernel, ask, states, mask, slice(-LENGTHS[-1], None)) if ask.gradient else []
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel that was built for other cards, or a compiler, raises
        return f"cannot be used: {type(error).__name__}: {_first_line(error)}"
    if any(bool(gradient[:, :, : -LENGTHS[-1]].any()) for gradient in behind[1:]):
        return "lets a row see the one before it"
    if ask.dropout:
        return "" if all(bool(part.isfinite().all()) for part in given) else "gives numbers that are not finite"
    exact = [part.detach().float().requires_grad_(ask.gradient) for part in states]
    row_by_row = _with_gradients("rows", ask._replace(dtype=torch.float32), exact, mask, slice(None))
    bound = max(8 * torch.finfo(ask.dtype).eps, 2e-3)  # the latter for fp32 that is multiplied in TF32
    for part, expected in zip(given, row_by_row, strict=True):
        if not float((part.float() - expected).norm() / expected.norm()) <= bound:
            return "does not give what attention row by row gives"
    return ""


def _with_gradients(
    kernel: packed_kernels.Kernel, ask: Ask, states: list[Tensor], mask: Tensor, looked_at: slice
) -> list[Tensor]:
    """Output and, where ``ask`` has one, the gradients of a sum over the tokens that are looked at."""
    with torch.autocast(mask.device.type, enabled=False):  # ``ask.dtype`` is what it would make of them
        output = packed_kernels.attend(kernel, ask, *states, mask)  # type: ignore[call-arg]
    if not ask.gradient:
        return [output]
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    loss = (output.float() * weights)[:, looked_at].sum()
    return [output.detach(), *torch.autograd.grad(loss, states)]


def _probe(model: Any) -> Tensor:
    """Two rows of different tokens, ``[1, 2 * ROW]``."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(7, 7 + 2 * ROW * 5, 5, device=model.device).remainder(vocabulary)[None]


def _why_mixed(model: Any, mask: Tensor | None, alone: Tensor) -> str:
    """Why the second of two packed rows sees the first, or gets other logits than alone; nothing where it does neither."""
    ids = _probe(model)
    others = torch.cat([ids[:, :ROW].flip(1), ids[:, ROW:]], dim=1)
    positions = torch.arange(ROW, device=model.device).repeat(2)[None]
    mask = None if mask is None else mask.to(model.device)
    packed: dict[str, Any] = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
    embedded: list[Tensor] = []

    def mark(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(mark)
    try:
        with torch.enable_grad():
            behind_one = model(input_ids=ids, **packed).logits[:, ROW:].float()
            weights = torch.linspace(-1, 1, behind_one.numel(), device=behind_one.device).view_as(behind_one)
            gradient = torch.autograd.grad((behind_one * weights).sum(), embedded[0])[0]
        handle.remove()
        with torch.no_grad():
            behind_other = model(input_ids=others, **packed).logits[:, ROW:].float()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as error:  # no position_ids, or a mask of its own making
        return _first_line(error) or type(error).__name__
    finally:
        handle.remove()
    if gradient[:, :ROW].any() or not gradient[:, ROW:].any():
        return "a row sees the one before it"
    # What is left to see is no leak but a wrong position, which moves every logit by far more than this.
    bound = _rounding(model) * alone.abs().mean()
    same = all(bool((behind - alone).abs().mean() <= bound) for behind in (behind_one.detach(), behind_other))
    return "" if same else "a packed row does not give the logits that it gives alone"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _rounding(model: Any) -> float:
    """How far, relative to themselves, logits may move because matrices of other shapes are multiplied."""
    formats = [torch.float32]  # many families go down to it inside
    formats += [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    if torch.is_autocast_enabled(model.device.type):
        formats.append(torch.get_autocast_dtype(model.device.type))
    if getattr(model, "is_quantized", False) or torch.get_float32_matmul_precision() != "highest":
        formats.append(torch.bfloat16)  # what the products are made of: TF32 is hardly finer
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or 1
    return min(0.1, 64 * layers * max(torch.finfo(of_weight).eps for of_weight in formats))
