"""One table of classification runs: mean and standard deviation over training seeds, read from run directories alone.

    python benchmarks/glue_table.py runs/glue/sst2_smollm2/{teacher,sft_1,sft_2,sft_3,kd_1,kd_2,kd_3,dts_1,dts_2,dts_3}

Runs whose recipes differ only in the seed and the folder are one row. Runs whose protocols or validation rows differ are
refused: their scores may not stand in one table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dts_hf.errors import UserError
from dts_hf.runs.directory import RunDirectory


def table(folders: Sequence[str]) -> str:
    """The runs as a markdown table.

    Raises:
        UserError: no finished classification run, or runs that cannot be compared.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any], dict[str, Any]]]] = {}
    comparable: dict[str, str] = {}
    for folder in folders:
        run = RunDirectory.open(folder)
        metrics, recipe = run.read_metrics(), run.read_recipe().model_dump(mode="json")
        if not metrics.get("task") or "student" not in metrics.get("models", {}):
            raise UserError(f"{folder}: holds no scores of a classification task (is the run finished?)")
        comparable.setdefault(_yardstick(run, metrics), folder)
        groups.setdefault(_signature(recipe), []).append((Path(folder), metrics, recipe))
    if not groups:
        raise UserError("no run directories given")
    if len(comparable) > 1:
        raise UserError(
            f"protocol or validation rows differ between {' and '.join(comparable.values())}: not comparable"
        )
    names = next(iter(groups.values()))[0][1]["task"]["metrics"]
    columns = ["runs", "loss", "temperature", "seeds", "parameters", *names, "label CE", "agreement", "minutes each"]
    lines = [columns, ["---"] * 5 + ["---:"] * (len(columns) - 5)]
    lines += [_line(runs, names) for runs in groups.values()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _yardstick(run: RunDirectory, metrics: dict[str, Any]) -> str:
    splits = run.read_data_manifest().get("splits", {})
    held_out = {name: (entry["sha256"], entry["rows"]) for name, entry in splits.items() if name != "train"}
    return json.dumps([metrics["protocol"]["fingerprint"], held_out], sort_keys=True)


def _signature(recipe: dict[str, Any]) -> str:
    """Digest of the recipe without what differs between two seeds of one experiment."""
    training = {key: value for key, value in recipe["training"].items() if key not in ("seed", "data_seed")}
    kept = {**recipe, "training": training, "output": None}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _line(runs: list[tuple[Path, dict[str, Any], dict[str, Any]]], names: Sequence[str]) -> list[str]:
    recipe = runs[0][2]
    kd_ratio, policy = recipe["loss"]["kd_ratio"], recipe["temperature"]
    options = ", ".join(f"{key} {value}" for key, value in policy.items() if key in ("rule", "value", "t_init"))
    softened = kd_ratio > 0 and recipe["task"]["subset"] != "stsb"
    students = [metrics["models"]["student"] for _, metrics, _ in runs]

    def spread(values: Sequence[float | None], scale: float, digits: int) -> str:
        found = [scale * value for value in values if value is not None]
        if len(found) < len(values):
            return "-"
        sd = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
        return f"{statistics.fmean(found):.{digits}f}{sd}"

    def scores(key: str) -> list[float | None]:
        return [entry["sets"]["validation"].get(key, {}).get("mean") for entry in students]

    return [
        ", ".join(path.name for path, _, _ in runs),
        "labels" if kd_ratio == 0 else f"{1 - kd_ratio:g} labels + {kd_ratio:g} teacher",
        f"{policy['name']} ({options})" if softened else "-",
        ", ".join(str(metrics["training"]["seed"]) for _, metrics, _ in runs),
        f"{students[0]['parameters'] / 1e6:.1f} M",
        *(spread(scores(name), 100, 2) for name in names),
        spread(scores("label_ce"), 1, 3),
        spread(scores("teacher_agreement"), 100, 1),
        spread([metrics["training"]["seconds"] / 60 for _, metrics, _ in runs], 1, 1),
    ]


def main() -> None:
    """Print the table of the run directories on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="run directories")
    try:
        print(table(parser.parse_args().runs))
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
