"""What a benchmark writes: tables as JSON, and the Markdown that is made of them; machine, versions, commit."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

OUT_OF_MEMORY = "out of memory"


class Column(NamedTuple):
    """One column of a table: key of the row, heading, digits after the point (None: text)."""

    key: str
    heading: str
    digits: int | None


def make_table(title: str, columns: Sequence[Column], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A table as it stands in the JSON; a row may hold more than its columns show."""
    return {"title": title, "columns": [list(column) for column in columns], "rows": rows}


def make_report(
    benchmark: str, setting: dict[str, Any], tables: list[dict[str, Any]], notes: Sequence[str]
) -> dict[str, Any]:
    """What a benchmark writes: its setting, where and with what it ran, tables and notes."""
    return {
        "benchmark": benchmark,
        "setting": setting,
        "environment": environment(setting.get("device", "cpu")),
        "tables": tables,
        "notes": list(dict.fromkeys(notes)),
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds; of one value, and of one that no seed changes, the value itself; NaN: -."""
    if any(map(math.isnan, values)):
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len({*values}) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def over_seeds(runs: Sequence[dict[str, Any]], digits: dict[str, int]) -> list[dict[str, Any]]:
    """One row for each ``arm`` of ``runs``, which it holds: the ``spread`` of every key of ``digits`` over its seeds."""
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        cells = {name: spread([run[name] for run in own], places) for name, places in digits.items()}
        rows.append({"arm": arm, "seeds": len(own), "runs": own, **cells})
    return rows


def finish(report: dict[str, Any], kept: Path | None) -> None:
    """Print ``report``, and keep it as JSON where a place is given."""
    if kept is not None:
        kept.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as it is printed and as it stands in the documents."""
    where, setting = report["environment"], report["setting"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts = [
        f"{where.get('done', 'Measured')} on {where['date']} on {where['machine']}, commit {where['commit']}; {versions}.",
        f"Setting: {', '.join(f'{key} {_plain(value)}' for key, value in setting.items())}.",
    ]
    for table in report["tables"]:
        columns = [Column(*column) for column in table["columns"]]
        lines = [f"| {' | '.join(column.heading for column in columns)} |"]
        lines.append("|" + "|".join("---" if column.digits is None else "---:" for column in columns) + "|")
        lines += [f"| {' | '.join(_cells(row, columns))} |" for row in table["rows"]]
        parts += [*([f"**{table['title']}**"] if table["title"] else []), "\n".join(lines)]
    return "\n\n".join([*parts, *report["notes"]])


def _cells(row: dict[str, Any], columns: Sequence[Column]) -> list[str]:
    """Of a variant that failed, the first number says why there is none."""
    cells = [_cell(row.get(column.key), column.digits) for column in columns]
    numbers = [place for place, column in enumerate(columns) if column.digits is not None]
    if "failed" in row and numbers:
        cells[numbers[0]] = row["failed"]
    return cells


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(value: Any, digits: int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if digits is None or isinstance(value, str):
        return str(value)
    if digits < 0:  # an error: as many digits of it, wherever the point is
        return f"{value:.{-digits - 1}e}"
    small = isinstance(value, float) and 0.0 < abs(value) < 0.1
    return f"{value:,.{max(digits, 4) if small and digits else digits}f}"


def ratio(numbers: dict[str, dict[str, Any]], name: str, to: str, key: str = "seconds") -> float | None:
    """``key`` of one variant over that of another; None where either was not measured."""
    upper, lower = numbers.get(name, {}).get(key), numbers.get(to, {}).get(key)
    return upper / lower if upper is not None and lower else None


def gigabytes(found: dict[str, Any]) -> float | None:
    """Peak memory in 10^9 bytes."""
    return found["peak_bytes"] / 1e9 if "peak_bytes" in found else None


def milliseconds(found: dict[str, Any]) -> float | None:
    return found["seconds"] * 1e3 if "seconds" in found else None


def failures(report: dict[str, Any]) -> list[str]:
    """Rows that failed for another reason than the size of the device's memory."""
    rows = [row for table in report["tables"] for row in table["rows"]]
    return [f"{row['name']}: {row['failed']}" for row in rows if row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY]


def environment(device: str = "cpu") -> dict[str, Any]:
    """Date, machine, commit and versions: without them a table says nothing."""
    versions = {"python": platform.python_version()}
    packages = ("torch", "transformers", "trl", *(("triton", "liger-kernel") if device == "cuda" else ()))
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": device,
        "machine": _machine(device),
        "commit": _commit(),
        "versions": versions,
    }


def processor() -> tuple[str, set[str]]:
    """Name and flags of the CPU; no flags where the system has no /proc/cpuinfo."""
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        fields = {key.strip(): value.strip() for key, value in lines}
        name, flags = fields.get("model name", name), fields.get("flags", "")
    return name, set(flags.split())


def _machine(device: str) -> str:
    if device == "cuda":
        import torch

        about = torch.cuda.get_device_properties(0)
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        return f"one {about.name}, {about.total_memory / 1e9:.0f} GB, {cuda}"
    name, flags = processor()
    shown = "".join(f", {word}" for word in ("avx512f", "avx512_bf16", "amx_bf16") if word in flags)
    return f"{os.cpu_count()} cores of {name}{shown}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../dts_hf")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print it, as JSON or as Markdown.

    Raises:
        SystemExit: a variant failed for another reason than the size of the device's memory.
    """
    print(json.dumps(report, indent=2) if as_json else markdown(report), flush=True)
    if failures(report):
        raise SystemExit("\n".join(["failed:", *failures(report)]))
