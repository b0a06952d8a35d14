"""The loss head alone, forward and backward from final states: time and memory of ours, of peers, and of the floor.

    python benchmarks/loss_head.py              the published size: N = 1,024 of 2,048 positions, V = 49,152, fp32
    python benchmarks/loss_head.py --quick      tiny sizes, to see that it runs

``KL at T`` shows that all variants computed the same thing. The sizes of a GPU: loss_sizes.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import harness
import peers
import render
from harness import Task
from render import Column

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 8
FLOOR, OURS, DENSE, GKD, CHUNKED = "floor", "dts_hf", "dense", "trl_gkd", "trl_chunked"
LABELS = {
    FLOOR: "the floor: four matmuls alone",
    OURS: "dts_hf: CE + forward KL, policy dts",
    DENSE: "dense over B x T: CE + forward KL",
    GKD: "TRL GKD's loss: KL alone",
    CHUNKED: "TRL's chunked divergence, labelled rows: KL alone",
}
VARIANTS = tuple(LABELS)
COLUMNS = (
    Column("label", "variant", None),
    Column("seconds", "seconds", 2),
    Column("x_floor", "x floor", 2),
    Column("peak_gb", "peak GB", 3),
    Column("x_trl_gkd", "x TRL GKD", 2),
    Column("kl", "KL at T", 4),
)


@dataclass(frozen=True)
class Sizes:
    """``rows`` = N labelled rows, spread over BATCH sequences, ``time`` positions each (0: twice as many as labels)."""

    rows: int
    hidden: int = 576
    vocab: int = 49152
    dtype: str = "float32"
    temperature: float = 3.0
    kd_ratio: float = 0.5
    device: str = "cpu"
    time: int = 0
    budget_mb: float = 256.0

    @property
    def width(self) -> int:
        """T."""
        return self.time or 2 * self.rows // BATCH


@dataclass
class Inputs:
    """States ``[B, T, H]``, heads ``[V, H]``, unshifted labels ``[B, T]``."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    labels: Tensor

    def clean(self) -> None:
        self.student.grad = self.student_head.grad = None


def make_inputs(sizes: Sizes) -> Inputs:
    """Random states and heads whose logits have a standard deviation of about 2, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, sizes.dtype)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(sizes.device, dtype)

    std = 2.0 / math.sqrt(sizes.hidden)
    labels = torch.randint(sizes.vocab, (BATCH, sizes.width), generator=generator)
    labels[:, : sizes.width - sizes.rows // BATCH] = peers.IGNORE_INDEX
    return Inputs(
        normal(BATCH, sizes.width, sizes.hidden).requires_grad_(),
        normal(sizes.vocab, sizes.hidden, std=std).requires_grad_(),
        normal(BATCH, sizes.width, sizes.hidden),
        normal(sizes.vocab, sizes.hidden, std=std),
        labels.to(sizes.device),
    )


# ------------------------------------------------------------------------------------------------------- the variants


def head_matmuls(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> None:
    """Both logits, dH and dW of the rows, in chunks: the arithmetic that no exact method avoids."""
    import torch

    chunk = 4096 if h_s.is_cuda else 256
    rows, vocab = h_s.shape[0], w_s.shape[0]
    d_states, d_weight = torch.empty_like(h_s), torch.zeros_like(w_s)
    logits = h_s.new_empty(min(chunk, rows), vocab)
    for start in range(0, rows, chunk):
        span = slice(start, min(start + chunk, rows))
        part = logits[: span.stop - start]
        torch.mm(h_t[span], w_t.t(), out=part)
        torch.mm(h_s[span], w_s.t(), out=part)
        torch.mm(part, w_s, out=d_states[span])
        d_weight.addmm_(part.t(), h_s[span])


def floor_step(inputs: Inputs, sizes: Sizes) -> Callable[[], dict[str, float]]:
    keep = (inputs.labels != peers.IGNORE_INDEX).reshape(-1)
    h_s = inputs.student.detach().reshape(-1, sizes.hidden)[keep]
    h_t = inputs.teacher.reshape(-1, sizes.hidden)[keep]

    def step() -> dict[str, float]:
        head_matmuls(h_s, inputs.student_head.detach(), h_t, inputs.teacher_head)
        return {}

    return step


def ours_step(
    inputs: Inputs, sizes: Sizes, divergence: Any = "forward_kl", policy: Any = None
) -> Callable[[], dict[str, float]]:
    """What the trainer runs: select the labelled rows, then the fused loss with every statistic that it logs."""
    from dts_hf.loss.distillation_loss import DistillationLoss
    from dts_hf.loss.selection import select_response
    from dts_hf.models.head import Head
    from dts_hf.temperature import build_temperature

    t = sizes.temperature
    if policy is None:
        policy = build_temperature("dts", rule="gap", t_init=t, t_min=min(1.0, t), t_max=t)
    policy.begin_step(0.0)
    options = {"kd_ratio": sizes.kd_ratio, "logits_budget_mb": sizes.budget_mb}
    loss_fn = DistillationLoss(divergence, temperature=policy, **options)
    student_head, teacher_head = Head(inputs.student_head), Head(inputs.teacher_head)

    def step() -> dict[str, float]:
        rows, targets = select_response(inputs.student, inputs.labels)
        teacher_rows, _ = select_response(inputs.teacher, inputs.labels)
        output = loss_fn(rows, student_head, teacher_rows, teacher_head, targets, targets.numel())
        output.loss.backward()
        return {"kl": output.sums["kd"] / (targets.numel() * t * t)}

    return step


def dense_step(inputs: Inputs, sizes: Sizes) -> Callable[[], dict[str, float]]:
    import torch
    import torch.nn.functional as F

    def step() -> dict[str, float]:
        student = F.linear(inputs.student, inputs.student_head)
        with torch.no_grad():
            teacher = F.linear(inputs.teacher, inputs.teacher_head)
        loss, kl = peers.dense_loss(student, teacher, inputs.labels, sizes.temperature, sizes.kd_ratio)
        loss.backward()
        return {"kl": kl}

    return step


def gkd_step(inputs: Inputs, sizes: Sizes) -> Callable[[], dict[str, float]]:
    import torch
    import torch.nn.functional as F

    loss_fn = peers.gkd_loss()

    def step() -> dict[str, float]:
        student = F.linear(inputs.student, inputs.student_head)
        with torch.no_grad():
            teacher = F.linear(inputs.teacher, inputs.teacher_head)
        loss, kl = loss_fn(student, teacher, inputs.labels, sizes.temperature)
        loss.backward()
        return {"kl": kl}

    return step


def chunked_step(inputs: Inputs, sizes: Sizes) -> Callable[[], dict[str, float]]:
    loss_fn = peers.chunked_loss()

    def step() -> dict[str, float]:
        states_and_heads = (inputs.student, inputs.student_head, inputs.teacher, inputs.teacher_head)
        loss, kl = loss_fn(*states_and_heads, inputs.labels, sizes.temperature)
        loss.backward()
        return {"kl": kl}

    return step


STEPS: dict[str, Callable[[Inputs, Sizes], Callable[[], dict[str, float]]]] = {
    FLOOR: floor_step,
    OURS: ours_step,
    DENSE: dense_step,
    GKD: gkd_step,
    CHUNKED: chunked_step,
}


def build(variant: str, sizes: Sizes) -> Task:
    inputs = make_inputs(sizes)
    return Task(STEPS[variant](inputs, sizes), inputs.clean)


# --------------------------------------------------------------------------------------------------------- the report


def run(
    sizes: Sizes,
    rounds: int,
    threads: int,
    variants: Sequence[str] = VARIANTS,
    one_process: bool = False,
    limit: float | None = None,
) -> dict[str, Any]:
    processes = [list(variants)] if one_process else None
    options = {"rounds": rounds, "threads": threads, "device": sizes.device, "processes": processes, "limit": limit}
    numbers, notes = harness.measure(build, variants, sizes, **options)
    rows = [
        {
            "name": name,
            "label": LABELS[name],
            **found,
            "x_floor": render.ratio(numbers, name, FLOOR),
            "peak_gb": render.gigabytes(found),
            "x_trl_gkd": render.ratio(numbers, name, GKD),
        }
        for name, found in numbers.items()
    ]
    setting = {**asdict(sizes), "batch": BATCH, "time": sizes.width, "threads": threads, "rounds": rounds}
    return render.make_report("loss_head", setting, [render.make_table("", COLUMNS, rows)], notes)


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1024, help="labelled rows N, a multiple of 8 (default: 1024)")
    parser.add_argument("--hidden", type=int, default=576, help="H (default: 576)")
    parser.add_argument("--vocab", type=int, default=49152, help="V (default: 49152)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="states and heads")
    parser.add_argument("--temperature", type=float, default=3.0, help="T in force, for every variant (default: 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all of them")
    found = parser.parse_args(arguments)
    if found.quick:
        found.rounds, found.rows, found.hidden, found.vocab, found.threads = 1, 32, 32, 512, 1
    if found.rows < BATCH or found.rows % BATCH:
        parser.error(f"--rows: got {found.rows}, expected a multiple of {BATCH}")
    return found


def main(arguments: list[str] | None = None) -> None:
    found = read_arguments(arguments)
    sizes = Sizes(found.rows, found.hidden, found.vocab, found.dtype, found.temperature, device=found.device)
    done = run(sizes, found.rounds, found.threads, found.variants, one_process=found.quick, limit=found.limit)
    render.show(done, found.json)


if __name__ == "__main__":
    main()
