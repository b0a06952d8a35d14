"""How time and memory of the loss grow with the vocabulary, the labelled rows and the sequence length.

    python benchmarks/sweep.py              V 8k to 152k, N 256 to 2,048, T 128 to 2,048, fp32
    python benchmarks/sweep.py --quick      tiny sizes, to see that it runs

``peak`` is all that a step adds, ``gradients`` the part of it that it hands over (dW ``[V, H]`` and the gradient of the
states), ``beyond`` the rest: logits of one chunk, copies of rows, scratch. The chunk comes from ``--budget-mb``: peak memory
is flat in N as soon as N rows of logits pass it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import harness
import loss_head
import render
from harness import Task
from loss_head import BATCH, FLOOR, OURS, Inputs, Sizes
from render import Column

VOCABULARIES, ROWS, TIMES = (8192, 49152, 151936), (256, 1024, 2048), (128, 512, 2048)
QUICK_VOCABULARIES, QUICK_ROWS, QUICK_TIMES = (256, 512), (16, 128), (8, 16)
COLUMNS = (
    Column("vocab", "V", 0),
    Column("rows", "N", 0),
    Column("time", "T", 0),
    Column("seconds", "seconds", 2),
    Column("x_floor", "x floor", 2),
    Column("peak_gb", "peak GB", 3),
    Column("gradients_gb", "gradients GB", 3),
    Column("beyond_gb", "beyond GB", 3),
    Column("size_x_first", "size x first", 2),
    Column("peak_x_first", "peak x first", 2),
    Column("beyond_x_first", "beyond x first", 2),
)


@dataclass(frozen=True)
class Point:
    """``axis``: which size grows, ``vocab``, ``rows`` or ``time``."""

    axis: str
    sizes: Sizes

    def name(self, variant: str) -> str:
        return f"{variant} {self.axis} {getattr(self.sizes, self.axis)}"

    @property
    def gradient_bytes(self) -> int:
        states = self.sizes.rows if self.axis != "time" else BATCH * self.sizes.width
        itemsize = {"float32": 4, "bfloat16": 2}[self.sizes.dtype]
        return itemsize * self.sizes.hidden * (self.sizes.vocab + states)


def rows_only(sizes: Sizes) -> Inputs:
    """Inputs in which every position carries a label and is already aligned with it: the loss and nothing before it."""
    inputs = loss_head.make_inputs(replace(sizes, time=sizes.rows // BATCH))
    for name in ("student", "teacher"):
        states = getattr(inputs, name).detach().reshape(sizes.rows, sizes.hidden)
        setattr(inputs, name, states.requires_grad_(name == "student"))
    inputs.labels = inputs.labels.reshape(-1)
    return inputs


def build(name: str, points: dict[str, Point]) -> Task:
    variant, point = name.split(maxsplit=1)[0], points[name]
    if point.axis == "time":
        return loss_head.build(variant, point.sizes)
    sizes, inputs = point.sizes, rows_only(point.sizes)
    heads = (inputs.student_head, inputs.teacher_head)
    if variant == FLOOR:
        states = inputs.student.detach()

        def floor() -> dict[str, float]:
            loss_head.head_matmuls(states, heads[0].detach(), inputs.teacher, heads[1])
            return {}

        return Task(floor)

    from dts_hf.loss.distillation_loss import DistillationLoss
    from dts_hf.models.head import Head
    from dts_hf.temperature import build_temperature

    policy = build_temperature("constant", value=sizes.temperature)
    loss_fn = DistillationLoss(temperature=policy, kd_ratio=sizes.kd_ratio, logits_budget_mb=sizes.budget_mb)

    def step() -> dict[str, float]:
        student, teacher = Head(heads[0]), Head(heads[1])
        output = loss_fn(inputs.student, student, inputs.teacher, teacher, inputs.labels, sizes.rows)
        output.loss.backward()
        return {"kl": output.sums["kd"] / (sizes.rows * sizes.temperature**2)}

    return Task(step, inputs.clean)


def make_table(title: str, points: list[Point], numbers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for point in points:
        if "seconds" not in numbers.get(point.name(OURS), {}):
            continue  # it failed: no row to compare the others with
        ours, sizes = numbers[point.name(OURS)], point.sizes
        row = {
            "name": point.name(OURS),
            "vocab": sizes.vocab,
            "rows": sizes.rows,
            "time": sizes.time or None,
            **ours,
            "x_floor": render.ratio(numbers, point.name(OURS), point.name(FLOOR)),
            "peak_gb": render.gigabytes(ours),
        }
        if "peak_bytes" in ours:
            row["gradients_gb"] = point.gradient_bytes / 1e9
            row["beyond_gb"] = row["peak_gb"] - row["gradients_gb"]
        first = rows[0] if rows else row
        row["size_x_first"] = row[point.axis] / first[point.axis]
        for key in ("peak", "beyond"):
            if f"{key}_gb" in row and first[f"{key}_gb"]:
                row[f"{key}_x_first"] = row[f"{key}_gb"] / first[f"{key}_gb"]
        rows.append(row)
    return render.make_table(title, COLUMNS, rows)


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--budget-mb", type=float, default=64, help="logits of one chunk, MiB (default: 64)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="states and heads")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=VOCABULARIES, help="V; none skips the table")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="N, multiples of 8; none skips the table")
    parser.add_argument("--times", type=int, nargs="*", default=TIMES, help="T; none skips the table")
    found = parser.parse_args(arguments)
    if found.quick:
        found.rounds, found.threads, found.budget_mb = 1, 1, 0.05
        found.vocabularies, found.rows, found.times = QUICK_VOCABULARIES, QUICK_ROWS, QUICK_TIMES
    if not (*found.vocabularies, *found.rows, *found.times):
        parser.error("nothing to sweep: name --vocabularies, --rows or --times")
    if any(rows < BATCH or rows % BATCH for rows in found.rows):
        parser.error(f"--rows: got {found.rows}, expected multiples of {BATCH}")
    return found


def main(arguments: list[str] | None = None) -> None:
    found = read_arguments(arguments)
    hidden, vocab, few, some = (32, 512, 32, 32) if found.quick else (576, 49152, 256, 512)
    base = Sizes(few, hidden, vocab, found.dtype, device=found.device, budget_mb=found.budget_mb)
    vocab_points = [Point("vocab", replace(base, vocab=size)) for size in found.vocabularies]
    row_points = [Point("rows", replace(base, rows=size)) for size in found.rows]
    time_points = [Point("time", replace(base, rows=some, time=size)) for size in found.times]
    tables = {
        "Vocabulary": vocab_points,
        "Labelled rows": row_points,
        "Sequence length, 8 rows of T positions": time_points,
    }
    points = [point for part in tables.values() for point in part]
    by_name = {point.name(variant): point for point in points for variant in (FLOOR, OURS)}
    numbers, notes = harness.measure(
        build,
        [*by_name],
        by_name,
        rounds=found.rounds,
        threads=found.threads,
        device=found.device,
        limit=found.limit,
        processes=[[point.name(variant) for point in points] for variant in (FLOOR, OURS)],
    )
    setting = {"hidden": hidden, "dtype": found.dtype, "budget_mb": found.budget_mb, "device": found.device}
    setting |= {"threads": found.threads, "rounds": found.rounds}
    shown = [make_table(title, part, numbers) for title, part in tables.items() if part]
    render.show(render.make_report("sweep", setting, shown, notes), found.json)


if __name__ == "__main__":
    main()
