"""Attention of packed rows, one layer, forward and backward: a dense mask, a call for each row, torch's kernels, and ours.

    python benchmarks/attention.py              on a GPU, bf16; on a CPU: tiny, does it run?

``dts_hf`` is ``dts_hf.models.packed_attention.packed_attention``, whichever kernel it takes here. Rows have the lengths of
``step_sizes.py``: 65 % of T on average. Making a mask is not in the time of a layer, for all layers of a batch share it: it
has a row of its own. The error is that of the output, relative to a call for each row in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import harness
import render
from harness import Missing, Task
from render import Column

if TYPE_CHECKING:
    from torch import Tensor

LABELS = {
    "dts_hf": "dts_hf's packed attention",
    "varlen": "torch.nn.attention.varlen",
    "flex": "FlexAttention, compiled",
    "rows": "one SDPA call for each row",
    "dense": "SDPA with a dense mask",
    "flex_mask": "making FlexAttention's block mask, once a batch",
    "dense_mask": "making the dense mask, once a batch",
}
NAMES = tuple(LABELS)
COLUMNS = (
    Column("label", "variant", None),
    Column("ms", "ms", 2),
    Column("x_dense", "x dense", 2),
    Column("peak_gb", "peak GB", 2),
    Column("error", "error", -2),
)


@dataclass(frozen=True)
class Shape:
    """Rows of at most ``time`` tokens, and the heads of one layer."""

    rows: int
    time: int
    heads: int
    kv_heads: int
    width: int

    @property
    def lengths(self) -> list[int]:
        return [max(round(self.time * (1 - 0.7 * k / max(self.rows - 1, 1))), 2) for k in range(self.rows)]

    @property
    def title(self) -> str:
        return f"{self.rows} rows of at most {self.time:,} tokens, {self.heads}/{self.kv_heads} heads of {self.width}"


SHAPES = (Shape(32, 512, 9, 3, 64), Shape(16, 512, 12, 12, 64), Shape(8, 1024, 32, 8, 128))
QUICK_SHAPES = (Shape(4, 24, 3, 1, 16), Shape(3, 32, 4, 4, 16))


@dataclass(frozen=True)
class Setting:
    dtype: str
    device: str


@dataclass
class Inputs:
    """``[1, heads, sum of T, width]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor

    def clean(self) -> None:
        self.query.grad = self.key.grad = self.value.grad = None


def make_inputs(shape: Shape, setting: Setting) -> Inputs:
    import torch

    generator = torch.Generator(setting.device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (1, heads, sum(shape.lengths), shape.width)
        return torch.randn(size, generator=generator, device=setting.device).to(getattr(torch, setting.dtype))

    query, key, value = (normal(n).requires_grad_() for n in (shape.heads, shape.kv_heads, shape.kv_heads))
    return Inputs(query, key, value, normal(shape.heads))


def _grouped(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers' ``sdpa``: keys and values repeated for the heads that share them."""
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (inputs.key, inputs.value))
    return inputs.query, key, value


def _number_of_row(shape: Shape, device: str) -> Tensor:
    import torch

    return torch.arange(shape.rows, device=device).repeat_interleave(torch.tensor(shape.lengths, device=device))


def dense_mask(shape: Shape, device: str) -> Tensor:
    """bool ``[1, 1, sum of T, sum of T]``."""
    import torch

    row, place = _number_of_row(shape, device), torch.arange(sum(shape.lengths), device=device)
    return ((row[:, None] == row) & (place[:, None] >= place))[None, None]


def flex_mask(shape: Shape, device: str) -> Any:
    """What a user of FlexAttention would write."""
    from torch.nn.attention.flex_attention import create_block_mask

    row, tokens = _number_of_row(shape, device), sum(shape.lengths)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (row[query] == row[key])

    return create_block_mask(sees, None, None, tokens, tokens, device=device)


# ---------------------------------------------------- the variants: () -> output [1, heads, sum of T, width], of inputs


def by_rows(inputs: Inputs, shape: Shape, setting: Setting) -> Callable[[], Tensor]:  # noqa: ARG001
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def run() -> Tensor:
        parts = [states.split(shape.lengths, dim=2) for states in _grouped(inputs)]
        return torch.cat([sdpa(*row, is_causal=True) for row in zip(*parts, strict=True)], dim=2)

    return run


def by_dense(inputs: Inputs, shape: Shape, setting: Setting) -> Callable[[], Tensor]:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    mask = dense_mask(shape, setting.device)
    return lambda: sdpa(*_grouped(inputs), attn_mask=mask)


def by_varlen(inputs: Inputs, shape: Shape, setting: Setting) -> Callable[[], Tensor]:
    import inspect

    import torch

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Missing("varlen_attn needs torch >= 2.10") from None
    if setting.device == "cpu":
        raise Missing("varlen_attn needs a GPU")
    borders = torch.tensor([0, *accumulate(shape.lengths)], device=setting.device, dtype=torch.int32)
    longest, options = max(shape.lengths), inspect.signature(varlen_attn).parameters
    # The options grew from release to release: keys are repeated and the whole causal row is asked for where it must be.
    grouped = "enable_gqa" in options
    causal = {"window_size": (-1, 0)} if "window_size" in options else {"is_causal": True}
    more = {**causal, **({"enable_gqa": True} if grouped else {})}

    def run() -> Tensor:
        states = (inputs.query, inputs.key, inputs.value) if grouped else _grouped(inputs)
        q, k, v = (part[0].transpose(0, 1) for part in states)
        return varlen_attn(q, k, v, borders, borders, longest, longest, **more).transpose(0, 1)[None]  # type: ignore[union-attr]

    return run


def by_flex(inputs: Inputs, shape: Shape, setting: Setting) -> Callable[[], Tensor]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    if setting.device == "cpu":
        raise Missing("FlexAttention has no backward pass on a CPU")
    mask = flex_mask(shape, setting.device)
    function: Any = torch.compile(flex_attention)
    return lambda: function(*_grouped(inputs), block_mask=mask)


def by_ours(inputs: Inputs, shape: Shape, setting: Setting) -> Callable[[], Tensor]:
    from torch import nn

    from dts_hf.models.packed_attention import cu_seqlens_mask, packed_attention

    mask, module = cu_seqlens_mask(shape.lengths).to(setting.device), nn.Module()
    module.num_key_value_groups = shape.heads // shape.kv_heads  # type: ignore[assignment]
    return lambda: packed_attention(module, inputs.query, inputs.key, inputs.value, mask)[0].transpose(1, 2)


WAYS = {"dts_hf": by_ours, "varlen": by_varlen, "flex": by_flex, "rows": by_rows, "dense": by_dense}
MASKS = {"flex_mask": flex_mask, "dense_mask": dense_mask}


def build(name: str, options: tuple[Setting, dict[str, Shape]]) -> Task:
    import torch

    setting, shapes = options
    variant, shape = name.split(" ", 1)[0], shapes[name.split(" ", 1)[1]]
    if variant in MASKS:

        def make() -> dict[str, Any]:
            MASKS[variant](shape, setting.device)
            return {}

        return Task(make)
    inputs = make_inputs(shape, setting)
    run = WAYS[variant](inputs, shape, setting)
    exact = Inputs(*(states.detach().float() for states in (inputs.query, inputs.key, inputs.value, inputs.grad)))
    with torch.no_grad():
        true = by_rows(exact, shape, setting)()
        error = float((run().float() - true).norm() / true.norm())

    def step() -> dict[str, Any]:
        run().backward(inputs.grad)
        return {"error": error}

    return Task(step, inputs.clean)


def read_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=NAMES, help="default: all of them")
    found = parser.parse_args(given)
    found.quick = found.quick or found.device == "cpu"
    if found.quick:
        found.rounds, found.threads = 1, 1
    return found


def main(given: list[str] | None = None) -> None:
    found = read_arguments(given)
    setting = Setting(found.dtype, found.device)
    shapes = {str(number): shape for number, shape in enumerate(QUICK_SHAPES if found.quick else SHAPES)}
    names = [f"{variant} {number}" for number in shapes for variant in found.variants]
    groups = [[f"{variant} {number}" for number in shapes] for variant in found.variants]
    if found.device == "cpu":
        groups = [names]
    common = {"rounds": found.rounds, "threads": found.threads, "device": found.device, "limit": found.limit}
    numbers, notes = harness.measure(build, names, (setting, shapes), processes=groups, **common)
    tables = []
    for number, shape in shapes.items():
        rows = [
            {
                "name": name.split(" ")[0],
                "label": LABELS[name.split(" ")[0]],
                **values,
                "ms": render.milliseconds(values),
                "x_dense": render.ratio(numbers, name, f"dense {number}"),
                "peak_gb": render.gigabytes(values),
            }
            for name, values in numbers.items()
            if name.endswith(f" {number}")
        ]
        tables.append(render.make_table(shape.title, COLUMNS, rows))
    shown = {**asdict(setting), "rounds": found.rounds}
    render.show(render.make_report("attention", shown, tables, notes), found.json)


if __name__ == "__main__":
    main()
