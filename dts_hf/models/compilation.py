"""``torch.compile`` layer by layer: the layers of a backbone, never the loss, whose chunks and sums no graph should hold.

The layers of a model are the same code with other weights, so all of them share one graph, made once. Compiled as a whole,
as accelerate would do it, a model with our loss in its head breaks into dozens of graphs, which are made again for every
number of labels.
"""

from __future__ import annotations

import contextlib
import weakref
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dts_hf.distributed.sharding import stacked_layers
from dts_hf.errors import UserError
from dts_hf.models.packed_attention import NAME

#: Graphs of one piece of code. All layers of both models are one to torch (transformers wraps all kinds of layers in one
#: function), and each kind has several: trained and held out, a padded batch and one without padding, a batch of one row.
#: Torch's own limit is 8; beyond it the layers would run uncompiled, with a warning that scrolls by.
RECOMPILE_LIMIT = 64

#: Layers that are compiled by us, and not by whoever made the model.
_COMPILED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compile_layers(model: nn.Module, role: str, *, backend: str, mode: str | None = None) -> None:
    """Compile every layer of ``model`` in place, each by itself, when it is first called; lengths are dynamic.

    ``nn.Module.compile`` and not ``torch.compile``: no module is wrapped, so names of weights, checkpoints, adapters and
    hooks are as before. Attention over packed rows stays outside of the graphs: it reads the rows' borders on the host, and
    a graph of it would be made again for every batch.

    Args:
        model: a model of transformers, with or without adapters.
        role: the word for it in the error.
        backend: of ``torch.compile``.
        mode: of ``torch.compile``; None: its default.

    Raises:
        UserError: the model has no stack of layers.
    """
    layers = stacked_layers(model)
    if not layers:
        raise UserError(
            f"training.torch_compile: {role} ({type(model).__name__}) has no stack of layers to compile layer by layer; "
            "leave torch_compile, torch_compile_backend and torch_compile_mode out"
        )
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    for name, attention in list(ALL_ATTENTION_FUNCTIONS.items()):
        if name.startswith(NAME) and not hasattr(attention, "_torchdynamo_disable"):
            AttentionInterface.register(name, torch.compiler.disable(attention))
    for layer in layers:
        layer.compile(backend=backend, mode=mode, dynamic=True)
        _COMPILED.add(layer)


def restore_layers(model: nn.Module) -> None:
    """Undo ``compile_layers``, as if it had never been called; what others have compiled stays compiled."""
    for module in model.modules():
        if module in _COMPILED:
            module._compiled_call_impl = None
            _COMPILED.discard(module)


def without_compiled_layers(model: nn.Module) -> AbstractContextManager[None]:
    """Within it compiled layers run as they are: with a cache that grows, each length would make a graph of its own."""
    if any(module in _COMPILED for module in model.modules()):
        return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return contextlib.nullcontext()
