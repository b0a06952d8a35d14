"""All benchmarks of the device at hand, one after the other: prints every table and keeps the results.

    python benchmarks/run.py                                   what `make bench` runs: of a GPU, if any, else of a CPU
    python benchmarks/run.py --only step,catalogue             results whose names hold one of the words
    python benchmarks/run.py --only loss --json gpu.json       also as one file; what it holds of other results stays
    python benchmarks/run.py --bars                            on a CPU: only what the two limits of a release need
    python benchmarks/run.py --table gpu.json                  runs nothing: JSON in, Markdown out
    python benchmarks/run.py --write docs/performance.md [--table gpu.json]   runs nothing: puts kept tables into the page

Results are kept as ``NAME.json`` in ``benchmarks/results/``, with ``summary.md`` beside them; those of a GPU are called
``cuda_NAME``, and each takes at most about eight minutes. A page has a place for a result between ``<!-- bench:NAME -->``
and ``<!-- /bench:NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bars
import harness
import render

FOLDER = Path(__file__).resolve().parent
#: name of the result -> script and its arguments
CPU = {
    "loss_head": ("loss_head.py",),
    "train_step_fp32": ("train_step.py",),
    "train_step_bf16": ("train_step.py", "--dtype", "bfloat16"),
    "catalogue": ("catalogue.py",),
    "sweep": ("sweep.py",),
}
#: For a GPU alone; on a CPU ``--quick`` shows that they run.
SIZES = {
    "loss_sizes": ("loss_sizes.py",),
    **{f"step_{shape}": ("step_sizes.py", "--shape", shape) for shape in ("gpt2", "135m", "8b")},
    "attention": ("attention.py",),
    "generation": ("generation.py",),
}
_ON_CUDA = ("--device", "cuda", "--limit", "400")
CUDA = {
    **{f"cuda_{name}": (*command, *_ON_CUDA) for name, command in SIZES.items()},
    "cuda_catalogue": (
        *("catalogue.py", "--dtype", "bfloat16", "--rows", "8192", "--hidden", "2048", "--rounds", "2"),
        *_ON_CUDA,
    ),
    "cuda_sweep": (
        *("sweep.py", "--dtype", "bfloat16", "--budget-mb", "256", "--rows", "2048", "8192", "16384", "--times"),
        *_ON_CUDA,
    ),
}
#: What the bars of every release need.
BARS = {
    "loss_head": ("loss_head.py", "--variants", "floor", "dts_hf"),
    "train_step_fp32": ("train_step.py", "--variants", "sft", "packed"),
    "train_step_bf16": ("train_step.py", "--dtype", "bfloat16", "--variants", "sft", "packed"),
}
Reports = dict[str, dict[str, Any]]


def write_atomic(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def run(name: str, command: tuple[str, ...], results: Path) -> dict[str, Any] | None:
    """One benchmark in its own process; its result lies in ``results`` when this returns. None: it has none."""
    began = time.monotonic()
    print(f"\n== {name}: {' '.join(command)}", file=sys.stderr, flush=True)
    whole = [sys.executable, str(FOLDER / command[0]), *command[1:], "--json"]
    done = subprocess.run(whole, stdout=subprocess.PIPE, text=True)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        return None
    report["benchmark"] = name
    report["wall_seconds"] = time.monotonic() - began
    write_atomic(results / f"{name}.json", json.dumps(report, indent=2) + "\n")
    return report


def run_all(commands: dict[str, tuple[str, ...]], common: list[str], found: argparse.Namespace) -> list[str]:
    """Run and print them; returns what failed. A result is on the disk as soon as it is there."""
    failed = []
    for name, command in commands.items():
        report = run(name, (*command, *common), found.results)
        if report is None:
            failed.append(f"{name}: no result; its own message stands above")
            continue
        failed += [f"{name}: {text}" for text in render.failures(report)]
        print(f"\n## {name} ({report['wall_seconds']:.0f} s)\n\n{render.markdown(report)}", flush=True)
        if found.json is not None:
            merged = {**(read([found.json]) if found.json.is_file() else {}), name: report}
            write_atomic(found.json, json.dumps({"reports": merged}, indent=1) + "\n")
    return failed


def kept(results: Path) -> Reports:
    """The results that are there, by name."""
    files = {name: results / f"{name}.json" for name in (*CPU, *SIZES, *CUDA)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def read(files: list[Path]) -> Reports:
    """The results of files that ``--json`` made."""
    reports: Reports = {}
    for file in files:
        reports |= json.loads(file.read_text(encoding="utf-8"))["reports"]
    return reports


def sections(reports: Reports) -> dict[str, str]:
    """The Markdown of every result, and of the bars of either device."""
    texts = {name: render.markdown(report) for name, report in reports.items()}
    texts["bars"] = bars.table(bars.cpu_figures(reports))
    if any(name.startswith("cuda_") for name in reports):
        texts["cuda_bars"] = bars.table(bars.cuda_figures(reports))
    return texts


def fill(page: str, reports: Reports) -> str:
    """Put each report between its markers; places without a report stay as they are."""
    for name, text in sections(reports).items():
        place = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
        page = place.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)  # type: ignore[misc]
    return page


def summary(reports: Reports) -> str:
    return "\n".join(f"## {name}\n\n{text}\n" for name, text in sections(reports).items())


def only_bars(common: list[str]) -> None:
    """Measure and print what the bars of every release need, and nothing else."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:  # threads that wait for each other at every small step: ours suffers, a large matmul does not
        print(f"the machine is busy (load {load:.1f} on {cores} cores): these figures will not hold", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:  # not among the results: too few variants for the page
        results = Path(folder)
        reports = {name: run(name, (*command, *common), results) for name, command in BARS.items()}
    measured = {name: report for name, report in reports.items() if report is not None}
    figures = bars.cpu_figures(measured)
    if "loss_head" in measured:
        where = measured["loss_head"]["environment"]
        print(f"{where['date']}, {where['machine']}, commit {where['commit']}")
    print(bars.table(figures))
    missed = [figure.text for figure in figures if not figure.met]
    if missed or len(measured) < len(BARS):
        raise SystemExit(f"missed: {', '.join(missed)}" if missed else "a benchmark has no result")


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="results whose names hold it (default: all)")
    parser.add_argument("--rounds", type=int, help="timed rounds of every benchmark (default: their own)")
    parser.add_argument("--threads", type=int, help="threads of every worker (default: 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU, if any")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--bars", action="store_true", help="on a CPU: loss head and packed step against their limits")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="where results are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="put the results into this one file too")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="files of --json; run nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="fill the page from the kept results; run nothing")
    found = parser.parse_args(arguments)
    if found.write is not None or found.table is not None:
        return found
    if found.device == "auto":
        found.device = harness.device_at_hand()
    if found.bars and found.device != "cpu":
        parser.error("--bars: for a CPU (--device cpu); a GPU's bars are printed below its results")
    known = CUDA if found.device == "cuda" else {**CPU, **(SIZES if found.quick else {})}
    words = [word for part in found.only or [""] for word in part.split(",")]
    for word in words:
        if not any(word in name for name in known):
            parser.error(f"--only: got {word!r}, expected a part of one of {', '.join(known)}")
    found.commands = {name: known[name] for name in known if any(word in name for word in words)}
    return found


def main(arguments: list[str] | None = None) -> None:
    found = read_arguments(arguments)
    if found.write is not None or found.table is not None:
        reports = {**(kept(found.results) if found.write is not None else {}), **read(found.table or [])}
        if not reports:
            raise SystemExit(f"--write: {found.results} holds no result; run the benchmarks first")
        if found.write is None:
            print(summary(reports))
            return
        write_atomic(found.write, fill(found.write.read_text(encoding="utf-8"), reports))
        print(f"{found.write}: {', '.join(reports)}")
        return
    common = [
        *(["--device", "cpu"] if found.device == "cpu" else []),
        *(["--quick"] if found.quick else []),
        *([f"--rounds={found.rounds}"] if found.rounds else []),
        *([f"--threads={found.threads}"] if found.threads else []),
    ]
    if found.bars:
        only_bars(common)
        return
    found.results.mkdir(parents=True, exist_ok=True)
    failed = run_all(found.commands, common, found)
    reports = kept(found.results)
    figures = bars.cuda_figures(reports) if found.device == "cuda" else bars.cpu_figures(reports)
    print(f"\n## bars\n\n{bars.table(figures)}")
    write_atomic(found.results / "summary.md", summary(reports))
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
