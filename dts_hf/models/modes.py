"""In which mode the modules of a model are: training or evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode and every module back into its own mode afterwards.

    Eval mode also switches gradient checkpointing off, and ``use_cache`` is passed with each call: no flag or config
    is touched.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
