"""``Head``: how final states become logits, and the way to reach it inside a wrapped model.

Torch alone, so that the loss can use it without knowing Transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dts_hf.distributed.sharding import gathered_tensor
from dts_hf.errors import UserError

#: What ``check_head`` returns in the place of logits: exact in every number format.
PROBE_LOSS = 1024.0


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * (states @ weight.T + bias)), with cap(x) = softcap * tanh(x / softcap) when given.

    Args:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        logit_scale: a constant factor (Cohere multiplies by it, Granite divides by its inverse).
        softcap: the bound of Gemma-like models, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V, the rows of ``weight``."""
        return self.weight.shape[0]

    def cut(self, vocab_size: int) -> Head:
        """The same head for the first ``vocab_size`` ids; the cut rows get a zero gradient."""
        if vocab_size == self.vocab_size:
            return self
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias)

    def take(self, ids: Tensor) -> Head:
        """The same head for some ids ``[K]`` alone, as a copy; gradients flow back to their rows."""
        bias = None if self.bias is None else self.bias.index_select(0, ids)
        return replace(self, weight=self.weight.index_select(0, ids), bias=bias)

    def detached(self) -> Head:
        """The same head, into which no gradient flows."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def in_float32(self) -> Head:
        """The same head in float32."""
        return replace(self, weight=self.weight.float(), bias=None if self.bias is None else self.bias.float())

    def activate(self, raw: Tensor) -> Tensor:
        """Scale and soft-cap raw logits ``[C, V]`` (returns ``raw`` itself where there is nothing to do)."""
        logits = raw if self.logit_scale == 1.0 else raw * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def activate_backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn, in place, a gradient ``[C, V]`` with respect to ``logits`` into one with respect to the raw logits."""
        if self.softcap is not None:
            grad.mul_(1.0 - (logits / self.softcap).square())
        return grad if self.logit_scale == 1.0 else grad.mul_(self.logit_scale)

    def to(self, device: torch.device) -> Head:
        """The same head on ``device``."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

    def __call__(self, states: Tensor) -> Tensor:
        """Dense logits ``[..., V]``: for probes and tests, never for training."""
        return self.activate(torch.nn.functional.linear(states, self.weight, self.bias))


def without_adapters(model: nn.Module) -> Any:
    """The model that peft has put its adapters on, or ``model`` itself where there are none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def is_fake_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is one of torchao's layers that round their weight in every forward; asks torchao for nothing."""
    # Those for MXFP4 and NVFP4 have no quantizer as a module; FSDP2 puts a prefix before the name of the class
    return hasattr(module, "weight_fake_quantizer") or type(module).__name__.endswith("FakeQuantizedLinear")


def output_module(model: nn.Module) -> nn.Module:
    """The module that turns final states into logits.

    Raises:
        UserError: there is none, an adapter sits on it (its delta would be skipped without a word), or it rounds its weight
            (which the loss would not do).
    """
    find, name = getattr(model, "get_output_embeddings", None), type(model).__name__
    module = find() if callable(find) else None
    if module is None or not hasattr(module, "weight"):
        raise UserError(f"{name} has no output embedding with a weight; dts_hf distils causal language models")
    if hasattr(module, "lora_A") or hasattr(module, "modules_to_save"):
        raise UserError(
            f"{name}: an adapter sits on the output layer, which the fused loss would skip. "
            "Leave lm_head out of student.lora.target_modules ('all-linear' does so by itself)"
        )
    if is_fake_quantized(module):
        raise UserError(
            f"{name}: the output layer is a {type(module).__name__}, but the loss multiplies with its weight itself, so an "
            "unquantised one would be trained without a word. Leave it out where the model is prepared: "
            "quantize_(model, config, filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and 'lm_head' not in name)"
        )
    return cast(nn.Module, module)


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # type: ignore[operator, union-attr]


def head_of(model: nn.Module) -> Head:
    """Read the ``Head`` of a causal language model: weight, bias, and what the model does to its logits afterwards."""
    module, config = output_module(model), _text_config(model)
    # Not getattr: MiniCPM3 has a property of that name for what it does to its states before the output layer
    divisor, softcap = (vars(config).get(key) for key in ("logits_scaling", "final_logit_softcapping"))
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(divisor or 1.0)
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))
    return Head(weight, bias, scale, None if softcap is None else float(softcap))


@contextmanager
def loss_in_head(model: nn.Module, fn: Callable[[Tensor, Head], Tensor]) -> Iterator[None]:
    """Within this context the output layer of ``model`` returns ``fn(states, head)`` instead of logits.

    Call the *wrapped* model as usual: every wrapper's hooks fire where they belong (DDP synchronises, ZeRO-3 and FSDP2
    gather the head for forward and backward), no logits exist, and the returned "logits" are what ``fn`` returned.
    Whatever the model does to logits afterwards (scale, soft-cap) is switched off, because ``Head`` does it in the loss.

    Args:
        model: the unwrapped model that owns the output layer.
        fn: takes the final states ``[B, T, H]`` and the model's ``Head``: its scale and soft-cap as they were before they
            were switched off, its weights as they are during the forward (gathered, where they are sharded).
    """
    module, config, outside = output_module(model), _text_config(model), head_of(model)

    def forward(states: Tensor) -> Tensor:
        # Not head_of(model) here: inside this context the model says that it neither scales nor caps its logits.
        return fn(states, replace(outside, weight=cast(Tensor, module.weight), bias=getattr(module, "bias", None)))

    neutral = {"final_logit_softcapping": None, "logits_scaling": 1.0}
    saved = {key: vars(config)[key] for key in neutral if vars(config).get(key) is not None}
    owner = without_adapters(model)
    logit_scale = getattr(owner, "logit_scale", None)
    own_forward = vars(module).get("forward")  # a hook of accelerate's is one
    try:
        for key in saved:  # past __setattr__, which holds Gemma 3n to a soft-cap that is a number
            vars(config)[key] = neutral[key]
        if logit_scale is not None:
            owner.logit_scale = 1.0
        module.forward = forward
        yield
    finally:
        vars(module).pop("forward", None)  # the instance attribute: the class's own forward shows again
        if own_forward is not None:
            module.forward = own_forward
        vars(config).update(saved)
        if logit_scale is not None:
            owner.logit_scale = logit_scale


@torch.no_grad()
def check_head(model: nn.Module, *, role: str = "model") -> None:
    """Probe once that what the loss is given in ``loss_in_head`` makes the model's own logits.

    The states and the head that the loss sees must give the logits that the model gives outside, what the loss returns must
    come out of the model untouched, the backbone must end in those states, and no token may see those behind it.

    Raises:
        UserError: the model does something to its logits that ``Head`` cannot represent, is no causal language model, or
            puts virtual tokens before its rows; the message names the model.
    """
    source = getattr(getattr(model, "config", None), "name_or_path", "")
    name = type(model).__name__ + (f" ({source})" if source else "")
    _check_kind(model, f"{role}: {name}")
    module = output_module(model)
    weight = cast(Tensor, module.weight)
    # Two rows that differ in their last token alone
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=weight.device) % weight.shape[0]
    seen = _probe(model, ids, f"{role}: {name}")
    logits = seen.logits
    # A forward that somebody has put under autocast may give its logits in fp32, and its backbone alone is not under it
    low_precision = {logits.dtype, weight.dtype, seen.matmul_dtype} & {torch.bfloat16, torch.float16}
    tolerance = (5e-2 if low_precision else 1e-4) * float(logits.float().abs().max().clamp(min=1.0))
    moved, apart = abs(float(seen.returned) - PROBE_LOSS), float((seen.expected - logits.float()).abs().max())
    if moved or not apart <= tolerance:
        raise UserError(
            f"{role}: {name} changes its logits in a way that dts_hf does not know (largest difference "
            f"{max(moved, apart):.3g}); it knows a weight, a bias, a constant scale and a soft-cap"
        )
    if not float((logits[0, :-1] - logits[1, :-1]).float().abs().max()) <= tolerance:
        raise UserError(
            f"{role}: {name} is not causal: its answer for one token depends on the tokens behind it, which are the labels"
        )
    if not torch.allclose(seen.backbone_states.float(), seen.states.float(), rtol=0.0, atol=tolerance):
        raise UserError(f"{role}: the backbone of {name} does not end in the states its head reads")


class _Probe(NamedTuple):
    """What ``_probe`` has seen of a model.

    Attributes:
        logits: its own, ``[B, T, V]``.
        returned: what it returned for the loss.
        states: those that the loss saw, ``[B, T, H]``.
        expected: the logits that the head makes of them, ``[B, T, V]``, in fp32.
        matmul_dtype: in what the model multiplied where the loss stood.
        backbone_states: those of the backbone alone, ``[B, T, H]``.
    """

    logits: Tensor
    returned: Tensor
    states: Tensor
    expected: Tensor
    matmul_dtype: torch.dtype
    backbone_states: Tensor


def _probe(model: nn.Module, ids: Tensor, name: str) -> _Probe:
    """Run ``model`` on ``ids [B, T]`` three times: as it is, with a loss in its head, and without its head."""
    seen: list[tuple[Tensor, Tensor, torch.dtype]] = []

    def loss(states: Tensor, head: Head) -> Tensor:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        seen.append((states, head(states.to(head.weight.dtype)).float(), dtype))
        return torch.tensor(PROBE_LOSS, device=states.device)

    failing = "cannot answer a few tokens"  # PhiMoE with LoRA on its router, which returns a tuple
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        failing = "cannot compute a loss in the place of its output layer"
        with loss_in_head(model, loss):
            returned = model(input_ids=ids, use_cache=False).logits
        failing = "has a backbone that cannot be called by itself"
        backbone_states = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{name} {failing}: {' '.join(str(error).split())}") from error
    finally:
        model.train(was_training)
    if not seen or returned.numel() != 1:
        raise UserError(f"{name} does not return what its output layer gives")
    return _Probe(logits, returned, *seen[0], backbone_states)


def _check_kind(model: nn.Module, name: str) -> None:
    """Refuse what is no causal language model on the rows as they are."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model; dts_hf distils causal (decoder-only) language models")
    adapters = getattr(model, "peft_config", None)
    for adapter in adapters.values() if isinstance(adapters, dict) else ():
        if getattr(adapter, "is_prompt_learning", False):
            kind = str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower().replace("_", " ")
            raise UserError(
                f"{name} has an adapter for {kind}, which puts virtual tokens before every row, so that its states and the "
                "labels would not be in step. Use LoRA (student.lora), or another adapter of weights"
            )


def backbone_of(model: nn.Module) -> nn.Module:
    """The model without its output layer; its ``last_hidden_state`` is what the head reads.

    Raises:
        UserError: it is not where transformers keeps it.
    """
    owner = without_adapters(model)
    # Llama4ForCausalLM names a prefix that it does not have
    for name in (getattr(owner, "base_model_prefix", ""), "model"):
        if name and isinstance(backbone := getattr(owner, name, None), nn.Module):
            return backbone
    raise UserError(f"{type(owner).__name__} has no backbone apart from its output layer that dts_hf could find")


@contextlib.contextmanager
def gather_head(head: Head | None) -> Iterator[Head | None]:
    """Within it ``head`` with whole weights on every process: gathered once, for any number of chunks.

    Outside of a forward the weights of a sharded model are shares. (The student's head needs none of this: its loss
    runs inside the forward, where the wrapper has gathered it.)
    """
    if head is None:
        yield None
        return
    with gathered_tensor(head.weight) as weight, gathered_tensor(head.bias) as bias:
        yield replace(head, weight=weight, bias=bias)
