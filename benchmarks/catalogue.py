"""What the catalogue costs: the loss head with every divergence and every temperature policy.

    python benchmarks/catalogue.py              N = 1,024, V = 49,152, fp32
    python benchmarks/catalogue.py --quick      tiny sizes, to see that it runs

Each divergence runs under ``constant`` and counts relative to ``forward_kl``; each policy runs with ``forward_kl`` and
counts relative to ``constant``. Policies run as in a training loop, half way through it: ``begin_step``, the loss forward
and backward, ``end_step``. All are found by discovery, with default options, and share one process. ``KL at 1`` is
KL(teacher || student) at T = 1, which no divergence and no policy may change. ``dts`` with ``range: auto`` is left out: it
works in the first step of a run only.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from typing import Any

import harness
import render
from harness import Missing, Task
from loss_head import BATCH, Sizes, make_inputs
from render import Column

#: Option sets beside the defaults.
POLICY_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "dts": [{"granularity": "sequence"}, {"granularity": "token"}, {"decoupled": True}],
    "dtkd": [{"w_kd": 1.0}],
}
BASE_DIVERGENCE, BASE_POLICY = "forward_kl", "constant"
#: name of the variant -> (divergence, policy and its options)
Variants = dict[str, tuple[str, dict[str, Any]]]


def constant(sizes: Sizes) -> dict[str, Any]:
    return {"name": BASE_POLICY, "value": sizes.temperature}


def divergence_variants(sizes: Sizes) -> Variants:
    from dts_hf.divergences import DIVERGENCES

    names = [BASE_DIVERGENCE, *(name for name in DIVERGENCES if name != BASE_DIVERGENCE)]
    return {name: (name, constant(sizes)) for name in names}


def policy_variants(sizes: Sizes) -> Variants:
    from dts_hf.temperature import temperature_policies

    found: Variants = {BASE_POLICY: (BASE_DIVERGENCE, constant(sizes))}
    for name in temperature_policies():
        if name in (BASE_POLICY, "replay"):  # replay costs what constant does, and needs a recorded run
            continue
        for options in ({}, *POLICY_OPTIONS.get(name, [])):
            words = ", ".join(f"{key}: {value}" for key, value in options.items())
            found[f"{name} ({words})" if words else name] = (BASE_DIVERGENCE, {"name": name, **options})
    return found


shared_inputs = functools.cache(make_inputs)


def build(variant: str, options: tuple[Sizes, Variants]) -> Task:
    from dts_hf.errors import UserError
    from dts_hf.loss.distillation_loss import DistillationLoss
    from dts_hf.loss.selection import select_response, sequence_numbers
    from dts_hf.models.head import Head
    from dts_hf.temperature import StepStats, build_temperature

    sizes, variants = options
    divergence, policy_options = variants[variant]
    inputs = shared_inputs(sizes)
    try:
        policy = build_temperature(**policy_options)
        loss_fn = DistillationLoss(divergence, temperature=policy, kd_ratio=sizes.kd_ratio)
    except UserError as error:
        raise Missing(str(error)) from error
    student_head, teacher_head = Head(inputs.student_head), Head(inputs.teacher_head)

    def step() -> dict[str, float]:
        policy.begin_step(0.5)
        rows, targets = select_response(inputs.student, inputs.labels)
        teacher_rows, _ = select_response(inputs.teacher, inputs.labels)
        sequences = sequence_numbers(inputs.labels) if policy.needs_sequence_gap else None
        count = targets.numel()
        output = loss_fn(rows, student_head, teacher_rows, teacher_head, targets, count, sequences)
        output.loss.backward()
        means = {name: (value / count).tolist() for name, value in output.sums.items()}
        learned = {
            "temperature_grad": means.get("temperature_grad", 0.0),
            "observed": tuple(means.get("observed", ())),
        }
        policy.end_step(StepStats(means["ce"], means["teacher_ce"], means["kd"], count, **learned))
        return {"kl": means["kl"]}

    return Task(step, inputs.clean)


def one_table(
    title: str, base: str, variants: Variants, sizes: Sizes, found: argparse.Namespace
) -> tuple[Any, list[str]]:
    options = {"rounds": found.rounds, "threads": found.threads, "device": sizes.device, "processes": [[*variants]]}
    options |= {"limit": found.limit}
    numbers, notes = harness.measure(build, [*variants], (sizes, variants), **options)
    columns = (
        Column("name", title, None),
        Column("seconds", "seconds", 2),
        Column("x_base", f"x {base}", 2),
        Column("peak_gb", "peak GB", 3),
        Column("kl", "KL at 1", 4),
    )
    rows = [
        {
            "name": name,
            **values,
            "x_base": render.ratio(numbers, name, base),
            "peak_gb": render.gigabytes(values),
        }
        for name, values in numbers.items()
    ]
    return render.make_table("", columns, rows), notes


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=1024, help="labelled rows N, a multiple of 8 (default: 1024)")
    parser.add_argument("--vocab", type=int, default=49152, help="V (default: 49152)")
    parser.add_argument("--hidden", type=int, default=576, help="H (default: 576)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="states and heads")
    parser.add_argument("--only", choices=("divergences", "policies"), help="one of the two tables")
    found = parser.parse_args(arguments)
    if found.quick:
        found.rounds, found.rows, found.hidden, found.vocab, found.threads = 1, 32, 32, 512, 1
    if found.rows < BATCH or found.rows % BATCH:
        parser.error(f"--rows: got {found.rows}, expected a multiple of {BATCH}")
    return found


def main(arguments: list[str] | None = None) -> None:
    found = read_arguments(arguments)
    sizes = Sizes(found.rows, found.hidden, found.vocab, found.dtype, device=found.device)
    tables, notes = [], []
    for title, base, variants in (
        ("divergence", BASE_DIVERGENCE, divergence_variants(sizes)),
        ("policy", BASE_POLICY, policy_variants(sizes)),
    ):
        if found.only is None or found.only.startswith(title[:5]):
            table, more = one_table(title, base, variants, sizes, found)
            tables.append(table)
            notes += more
    setting = {**asdict(sizes), "batch": BATCH, "time": sizes.width, "threads": found.threads, "rounds": found.rounds}
    render.show(render.make_report("catalogue", setting, tables, notes), found.json)


if __name__ == "__main__":
    main()
