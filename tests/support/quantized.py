"""Students that are trained for a quantised form, and the skip of what needs torchao."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.utils import is_torchao_available

needs_torchao = pytest.mark.skipif(
    not is_torchao_available(), reason="torchao is not installed: pip install 'dts-hf[quantization]'"
)
SCHEMES = ("int4_weight_only", "int8_weight_only", "int8_dynamic_activation_int4_weight")
INT4 = {"scheme": "int4_weight_only", "group_size": 32}


class FakeQuantizedLinear(nn.Linear):
    """What torchao makes of a layer, as far as dts_hf looks at it where torchao is not installed."""

    weight_fake_quantizer = None


class Rounding(nn.Module):
    """Rounds a weight to eighths, straight through for the gradient, while it is ``enabled``."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + ((weight * 8).round() / 8 - weight).detach() if self.enabled else weight


class RoundingLinear(nn.Linear):
    """A layer as torchao makes it, with a quantizer that rounds, where torchao is not installed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight_fake_quantizer(self.weight), self.bias)


def round_layers(model: nn.Module) -> None:
    """Have every linear layer of ``model`` but the output layer round its weight; in place."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.__class__ = RoundingLinear
            layer.weight_fake_quantizer = Rounding()
