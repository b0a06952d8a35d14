"""All benchmarks, one after the other: prints every table and keeps the results.

    python benchmarks/run.py                                   what `make bench` runs
    python benchmarks/run.py --only train_step catalogue
    python benchmarks/run.py --device cuda                     the GPU section
    python benchmarks/run.py --write docs/performance.md       runs nothing: puts the kept tables into the page

Results are kept as ``NAME.json`` in ``benchmarks/results/``, with ``summary.md`` beside them. A page has a place for a
result between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
_CUDA_HEAD = ("loss_head.py", "--device", "cuda", "--dtype", "bfloat16", "--hidden", "2048")
#: 32,768 positions, half of them labelled; dense variants that do not fit are left out with a note.
CUDA = {
    "cuda_loss_head_49k": (*_CUDA_HEAD, "--rows", "16384", "--vocab", "49152"),
    "cuda_loss_head_152k": (*_CUDA_HEAD, "--rows", "16384", "--vocab", "151936"),
    "cuda_train_step_bf16": ("train_step.py", "--device", "cuda", "--dtype", "bfloat16"),
    "cuda_sweep": (
        *("sweep.py", "--device", "cuda", "--dtype", "bfloat16", "--budget-mb", "256"),
        *("--rows", "2048", "8192", "16384", "--times"),
    ),
}


#: what is asked of a figure: (text, result, variant, key, at most)
_LIVE, _CACHED = ("packed", "padded"), ("cached_packed", "cached_padded")
BARS = (
    *((f"step fp32, {name} / TRL GKD", "train_step_fp32", name, "x_trl_gkd", 0.55) for name in _LIVE),
    *((f"step fp32, {name} / HF's SFT", "train_step_fp32", name, "x_sft", 1.10) for name in _LIVE),
    *((f"step fp32, {name} / HF's SFT", "train_step_fp32", name, "x_sft", 0.65) for name in _CACHED),
    *(
        (f"step fp32, {name}, peak memory / TRL GKD", "train_step_fp32", name, "memory_x_trl_gkd", 0.35)
        for name in _LIVE
    ),
    *((f"step bf16, {name} / TRL GKD", "train_step_bf16", name, "x_trl_gkd", 0.75) for name in _LIVE),
    *((f"step bf16, {name} / HF's SFT", "train_step_bf16", name, "x_sft", 0.92) for name in _CACHED),
    ("loss head fp32 / the four matmuls", "loss_head", "dts_hf", "x_floor", 1.35),
)


def bars(reports: dict[str, dict[str, Any]]) -> str:
    """The figures that have a limit, as far as they were measured."""

    def rows(result: str, table: int = 0) -> list[dict[str, Any]]:
        found = reports.get(result, {}).get("tables", [])
        return found[table]["rows"] if table < len(found) else []

    lines: list[tuple[str, float, float]] = []
    for text, result, variant, key, limit in BARS:
        lines += [
            (text, row[key], limit) for row in rows(result) if row["name"] == variant and row.get(key) is not None
        ]
    for number, (word, base, limit) in enumerate((("divergence", "forward_kl", 1.4), ("policy", "constant", 1.15))):
        costs = [(row["x_base"], row["name"]) for row in rows("catalogue", number) if row["name"] != base]
        if costs:
            cost, name = max(costs)
            lines.append((f"dearest {word} ({name}) / {base}", cost, limit))
    by_vocab, by_rows = ([row for row in rows("sweep", n) if "peak_x_first" in row] for n in (0, 1))
    if len(by_vocab) > 1:
        growth = max(row["peak_x_first"] / row["size_x_first"] for row in by_vocab[1:])
        lines.append(("loss, growth of peak memory / growth of V", growth, 1.1))
    if len(by_rows) > 1:
        spread = max(row["peak_x_first"] for row in by_rows)
        lines.append((f"loss, growth of peak memory when N grows {by_rows[-1]['size_x_first']:g} x", spread, 1.1))
    table = [f"| {text} | {value:.2f} | {limit:.2f} |" for text, value, limit in lines]
    return "\n".join(["| figure | measured | at most |", "|---|---:|---:|", *table])


def write_atomic(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def run(name: str, command: tuple[str, ...], results: Path) -> dict[str, Any]:
    """One benchmark in its own process; its result lies in ``results`` when this returns.

    Raises:
        SystemExit: it failed; its own message stands above.
    """
    began = time.monotonic()
    print(f"\n== {name}: {' '.join(command)}", file=sys.stderr, flush=True)
    whole = [sys.executable, str(FOLDER / command[0]), *command[1:], "--json"]
    done = subprocess.run(whole, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: failed with exit status {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout)
    report["benchmark"] = name
    report["wall_seconds"] = time.monotonic() - began
    write_atomic(results / f"{name}.json", json.dumps(report, indent=2) + "\n")
    return report


def kept(results: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by name."""
    files = {name: results / f"{name}.json" for name in (*CPU, *CUDA)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def fill(page: str, reports: dict[str, dict[str, Any]]) -> str:
    """Put each report between its markers; places without a report stay as they are."""
    texts = {name: render.markdown(report) for name, report in reports.items()}
    for name, text in {**texts, "bars": bars(reports)}.items():
        place = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
        page = place.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)  # type: ignore[misc]
    return page


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="results whose names begin so (default: all)")
    parser.add_argument("--rounds", type=int, help="timed rounds of every benchmark (default: their own, 5)")
    parser.add_argument("--threads", type=int, help="threads of every worker (default: 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="where results are kept")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="fill the page from the kept results; run nothing")
    found = parser.parse_args(arguments)
    known = CUDA if found.device == "cuda" else CPU
    wanted = {prefix: [name for name in known if name.startswith(prefix)] for prefix in found.only or [""]}
    for prefix, names in wanted.items():
        if not names:
            parser.error(f"--only: got {prefix!r}, expected the beginning of one of {', '.join(known)}")
    found.commands = {name: known[name] for name in known if any(name in names for names in wanted.values())}
    return found


def main(arguments: list[str] | None = None) -> None:
    found = read_arguments(arguments)
    if found.write is not None:
        reports = kept(found.results)
        if not reports:
            raise SystemExit(f"--write: {found.results} holds no result; run the benchmarks first")
        write_atomic(found.write, fill(found.write.read_text(encoding="utf-8"), reports))
        print(f"{found.write}: {', '.join(reports)}")
        return
    found.results.mkdir(parents=True, exist_ok=True)
    common = [
        *(["--quick"] if found.quick else []),
        *([f"--rounds={found.rounds}"] if found.rounds else []),
        *([f"--threads={found.threads}"] if found.threads else []),
    ]
    for name, command in found.commands.items():
        report = run(name, (*command, *common), found.results)
        print(f"\n## {name} ({report['wall_seconds']:.0f} s)\n\n{render.markdown(report)}", flush=True)
    reports = kept(found.results)
    print(f"\n## bars\n\n{bars(reports)}")
    sections = {name: render.markdown(report) for name, report in reports.items()} | {"bars": bars(reports)}
    summary = "\n".join(f"## {name}\n\n{text}\n" for name, text in sections.items())
    write_atomic(found.results / "summary.md", summary)


if __name__ == "__main__":
    main()
