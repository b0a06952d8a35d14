"""Students that are trained for a quantised form, and the skip of what needs torchao."""

from __future__ import annotations

import pytest
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
