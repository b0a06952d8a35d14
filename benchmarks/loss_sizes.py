"""The loss head at the sizes of real models, for a GPU: ours with several budgets, the peers, the floor, and the errors.

    python benchmarks/loss_sizes.py              on a GPU: N = 8,192 at four sizes, bf16; on a CPU: tiny, does it run?
    python benchmarks/loss_sizes.py --sizes 2048x49152 --variants floor ours_1024

Everything starts from N labelled rows, without padding: CE + forward KL at T + teacher CE, or what a peer has of it,
forward and backward, gradients of the student's states and of its head. States and heads are bf16.

The errors are relative to the same loss in float64 (of a gradient: the norm of the difference over the norm), N = 512,
under autocast as in training: the student's head is fp32, its values fit into bf16, its gradient is fp32.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import harness
import peers
import render
from harness import Task
from loss_head import head_matmuls
from render import Column

if TYPE_CHECKING:
    from torch import Tensor

#: (H, V): SmolLM-135M, LLaMA-like 1B with a small and with Qwen's vocabulary, LLaMA 8B.
SIZES = ((576, 49152), (2048, 49152), (2048, 151936), (4096, 128256))
QUICK_SIZES = ((32, 512), (64, 1024))
ERROR_ROWS = 512
FLOOR = "floor"
COLUMNS = (
    Column("label", "variant", None),
    Column("ms", "ms", 1),
    Column("x_floor", "x floor", 2),
    Column("peak_gb", "peak GB", 2),
    Column("ce", "CE", 4),
    Column("kl", "KL at T", 4),
    Column("ce_error", "error of CE", -2),
    Column("kl_error", "error of KL", -2),
    Column("dh_error", "error of dH", -2),
    Column("dw_error", "error of dW", -2),
)


@dataclass(frozen=True)
class Setting:
    """What all variants of a table share."""

    rows: int
    dtype: str
    device: str
    temperature: float = 3.0
    kd_ratio: float = 0.5


@dataclass
class Rows:
    """States ``[N, H]``, heads ``[V, H]``, targets ``[N]``."""

    h_s: Tensor
    w_s: Tensor
    h_t: Tensor
    w_t: Tensor
    targets: Tensor

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.h_s, self.w_s, self.h_t, self.w_t, self.targets

    def clean(self) -> None:
        self.h_s.grad = self.w_s.grad = None


def make_rows(size: tuple[int, int], setting: Setting) -> Rows:
    """Logits with a standard deviation of about 2; made on the device, the same in every process."""
    import torch

    (hidden, vocab), device = size, setting.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(std).to(getattr(torch, setting.dtype))

    std = 2.0 / math.sqrt(hidden)
    return Rows(
        normal(setting.rows, hidden).requires_grad_(),
        normal(vocab, hidden, std=std).requires_grad_(),
        normal(setting.rows, hidden),
        normal(vocab, hidden, std=std),
        torch.randint(vocab, (setting.rows,), generator=generator, device=device),
    )


def ours(t: float, kd_ratio: float, budget: float | None = None) -> peers.RowLoss:
    """``DistillationLoss`` with the policy ``dts``; ``budget`` in MiB of logits, None: the loss's own."""
    from dts_hf.loss.distillation_loss import DistillationLoss
    from dts_hf.models.head import Head
    from dts_hf.temperature import build_temperature

    policy = build_temperature("dts", rule="gap", t_init=t, t_min=min(1.0, t), t_max=t)
    policy.begin_step(0.0)
    options = {} if budget is None else {"logits_budget_mb": budget}
    module = DistillationLoss(temperature=policy, kd_ratio=kd_ratio, **options)

    def loss_fn(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, targets: Tensor) -> Any:
        output = module(h_s, Head(w_s), h_t, Head(w_t), targets, len(targets))
        sums = output.sums
        return output.loss, sums["ce"] / len(targets), sums["kd"] / (len(targets) * t * t)

    return loss_fn


class Variant(NamedTuple):
    """``weights``: of CE and of KL at T in its loss, from r and T."""

    label: str
    make: Callable[..., peers.RowLoss]
    weights: Callable[[float, float], tuple[float, float]]


def _kl_alone(r: float, t: float) -> tuple[float, float]:  # noqa: ARG001
    return 0.0, 1.0


def _both(r: float, t: float) -> tuple[float, float]:
    return 1 - r, r * t * t


def _budget(mb: int) -> tuple[str, Variant]:
    words = f"{mb} MiB" if mb < 1024 else f"{mb // 1024} GiB"
    return f"ours_{mb}", Variant(f"dts_hf, {words} of logits", functools.partial(ours, budget=mb), _both)


VARIANTS: dict[str, Variant] = {
    "ours": Variant("dts_hf, its own budget", ours, _both),
    **dict(map(_budget, (256, 1024, 4096))),
    "trl_chunked": Variant("TRL's chunked divergence: KL alone", peers.chunked_rows, _kl_alone),
    "trl_gkd": Variant("TRL GKD, dense: KL alone", peers.gkd_rows, _kl_alone),
    "liger_chunked": Variant(
        "Liger's LigerFusedLinearJSDLoss, compiled: CE + KL", peers.liger_chunked_rows, lambda r, t: (1 - r, r)
    ),
    "liger_triton": Variant("Liger's LigerFusedLinearJSD: KL alone", peers.liger_triton_rows, _kl_alone),
    "hf_ce": Variant("HF's cross-entropy of the student alone", peers.cross_entropy_rows, lambda r, t: (1.0, 0.0)),
}  # fmt: skip
NAMES = (FLOOR, *VARIANTS)


def _split(name: str) -> tuple[str, tuple[int, int]]:
    variant, size = name.rsplit(" ", 1)
    hidden, vocab = map(int, size.split("x"))
    return variant, (hidden, vocab)


def _loss_of(variant: str, setting: Setting, compiled: bool) -> peers.RowLoss:
    options = {"compiled": compiled} if variant == "liger_chunked" else {}
    return VARIANTS[variant].make(setting.temperature, setting.kd_ratio, **options)


def build(name: str, setting: Setting) -> Task:
    """Time and memory."""
    variant, size = _split(name)
    rows = make_rows(size, setting)
    if variant == FLOOR:
        h_s, w_s = rows.h_s.detach(), rows.w_s.detach()

        def floor() -> dict[str, Any]:
            head_matmuls(h_s, w_s, rows.h_t, rows.w_t)
            return {}

        return Task(floor)
    loss_fn = _loss_of(variant, setting, compiled=setting.device == "cuda")

    def step() -> dict[str, Any]:
        loss, ce, kl = loss_fn(*rows.all())
        loss.backward()
        return {key: value for key, value in (("ce", ce), ("kl", kl)) if value is not None}

    return Task(step, rows.clean)


# -------------------------------------------------------------------------------------------------------- the errors


def reference(rows: Rows, weights: tuple[float, float], t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE ``[]``, KL at T ``[]``, dH ``[N, H]`` and dW ``[V, H]`` of a weighted sum of the two, in float64."""
    import torch.nn.functional as F

    h, w = (leaf.detach().double().requires_grad_() for leaf in (rows.h_s, rows.w_s))
    z_s, z_t = h @ w.t(), rows.h_t.double() @ rows.w_t.double().t()
    ce = F.cross_entropy(z_s, rows.targets)
    log_q, log_p = F.log_softmax(z_s / t, -1), F.log_softmax(z_t / t, -1)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    (weights[0] * ce + weights[1] * kl).backward()
    assert h.grad is not None and w.grad is not None
    return ce.detach(), kl.detach(), h.grad, w.grad


def build_errors(name: str, setting: Setting) -> Task:
    """Errors instead of time: one step, compared with ``reference``."""
    import torch

    variant, size = _split(name)
    rows = make_rows(size, setting)
    rows.w_s = rows.w_s.detach().float().requires_grad_()
    loss_fn = _loss_of(variant, setting, compiled=False)  # Liger's: another size would be compiled for this alone
    t = setting.temperature
    weights = VARIANTS[variant].weights(setting.kd_ratio, t)

    def step() -> dict[str, Any]:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == "bfloat16"):
            loss, ce, kl = loss_fn(*rows.all())
        loss.backward()
        assert rows.h_s.grad is not None and rows.w_s.grad is not None
        true_ce, true_kl, dh, dw = reference(rows, weights, t)
        found = {
            "dh_error": (rows.h_s.grad.double() - dh).norm() / dh.norm(),
            "dw_error": (rows.w_s.grad.double() - dw).norm() / dw.norm(),
        }
        for key, value, exact in (("ce_error", ce, true_ce), ("kl_error", kl, true_kl)):
            if value is not None:
                found[key] = (value.double() - exact).abs() / exact
        return {"seconds": 0.0, **found}

    return Task(step, rows.clean, timed_inside=True)


# --------------------------------------------------------------------------------------------------------- the report


def table(size: str, numbers: dict[str, dict[str, Any]], errors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    hidden, vocab = map(int, size.split("x"))
    rows = []
    for name, found in numbers.items():
        variant, of = name.rsplit(" ", 1)
        if of != size:
            continue
        wrong = {key: value for key, value in errors.get(name, {}).items() if key.endswith("_error")}
        rows.append(
            {
                "name": variant,
                "label": "the floor: four matmuls" if variant == FLOOR else VARIANTS[variant].label,
                **found,
                **wrong,
                "ms": render.milliseconds(found),
                "x_floor": render.ratio(numbers, name, f"{FLOOR} {size}"),
                "peak_gb": render.gigabytes(found),
            }
        )
    return render.make_table(f"H {hidden:,}, V {vocab:,}", COLUMNS, rows)


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, default=8192, help="labelled rows N (default: 8192)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="states and heads")
    parser.add_argument("--sizes", nargs="+", metavar="HxV", help="default: the four of the page")
    parser.add_argument("--variants", nargs="+", choices=NAMES, default=NAMES, help="default: all of them")
    found = parser.parse_args(arguments)
    found.quick = found.quick or (found.device == "cpu" and not found.sizes)
    sizes = QUICK_SIZES if found.quick else SIZES
    found.sizes = found.sizes or [f"{hidden}x{vocab}" for hidden, vocab in sizes]
    if found.quick:
        found.rounds, found.rows, found.threads = 1, 64, 1
    return found


def main(arguments: list[str] | None = None) -> None:
    found = read_arguments(arguments)
    setting = Setting(found.rows, found.dtype, found.device)
    groups = [[f"{variant} {size}" for size in found.sizes] for variant in found.variants]
    if found.quick:
        groups = [[name for group in groups for name in group]]
    names = [f"{variant} {size}" for size in found.sizes for variant in found.variants]
    common = {"threads": found.threads, "device": found.device, "processes": groups}
    clock = harness.Clock(found.limit)
    numbers, notes = harness.measure(build, names, setting, rounds=found.rounds, limit=clock.left(), **common)
    small = replace(setting, rows=min(ERROR_ROWS, found.rows))
    asked = [name for name in names if not name.startswith(FLOOR) and "seconds" in numbers.get(name, {})]
    common["processes"] = [asked]  # one after the other in one process: nothing is timed
    wrong = harness.measure(build_errors, asked, small, rounds=1, limit=clock.left(), **common) if asked else None
    errors = wrong.numbers if wrong else {}
    notes += [f"errors of {name}: {found['failed']}" for name, found in errors.items() if "failed" in found]
    if found.device == "cpu" and "liger_chunked" in found.variants:
        notes.append("Liger's loss ran without torch.compile here.")
    shown = {**asdict(setting), "error_rows": small.rows, "threads": found.threads, "rounds": found.rounds}
    tables = [table(size, numbers, errors) for size in found.sizes]
    render.show(render.make_report("loss_sizes", shown, tables, notes), found.json)


if __name__ == "__main__":
    main()
