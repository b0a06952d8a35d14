"""Runs a stage of the study, whatever of it is done already, and collects what the page is made of.

    python studies/temperature/run_stage.py --stage A --rows data/dolly            # 27 runs; about an hour of one CPU core
    python studies/temperature/run_stage.py --stage A --rows data/dolly --dry-run
    python studies/temperature/run_stage.py --collect                              # runs/temperature -> results/

``--rows`` is a folder with train.jsonl (or train.jsonl.gz) and valid.jsonl, as ``dts-hf prepare dolly`` writes them. Seeds
are the outermost loop, so a stage that is broken off is balanced; the same command goes on with it. Nothing that is
collected holds a row, a path or a weight.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dts_hf.errors import UserError
from dts_hf.experiments.identity import contents, is_replayed, run_id, settings_of
from dts_hf.experiments.sweep import Planned, Study, Sweep, is_done, plan
from dts_hf.runs.directory import RunDirectory

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TEACHER = "teacher"  # folder of the fine-tuned ones, beside the runs of stage C
#: Of a log line, what the page may draw.
COLUMNS = ("step", "loss", "ce_loss", "kd_loss", "kl", "gap", "temperature", "teacher_temperature")
#: Of the teacher on the held-out rows.
OF_TEACHER = ("ce", "entropy", "ece")
#: Of what a run was made with, whatever says where something lies.
PLACES = (
    "data.train", "data.validation", "student.init.from", "student.model", "teacher.model", "teacher.cache", "extends"
)  # fmt: skip


def study() -> dict[str, Any]:
    """``study.yaml``."""
    return dict(yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8")))


def overrides_of(rows: Path) -> list[str]:
    """Where the rows lie.

    Raises:
        UserError: ``rows`` has none.
    """
    train = next((rows / name for name in ("train.jsonl", "train.jsonl.gz") if (rows / name).is_file()), None)
    if train is None or not (rows / "valid.jsonl").is_file():
        raise UserError(
            f"--rows {rows}: expected a folder with train.jsonl and valid.jsonl; dts-hf prepare dolly writes data/dolly"
        )
    places = {"train": train, "validation": rows / "valid.jsonl"}
    return [f"data.{name}={json.dumps(str(place.resolve()))}" for name, place in places.items()]


def planned(stage: Mapping[str, Any], rows: Path, folder: Path, seeds: Sequence[int]) -> Study:
    """The runs of the grids of a stage, seeds outermost."""
    base = overrides_of(rows)
    parts = [plan(HERE / "recipe.yaml", base, folder, grid, {}, seeds) for grid in stage["grids"]]
    runs = [run for seed in range(len(seeds)) for part in parts for run in _of_seed(part, seed, len(seeds))]
    return Study(parts[0].recipe, folder, runs)


def _of_seed(part: Study, number: int, seeds: int) -> Sequence[Planned]:
    size = len(part.runs) // seeds
    return part.runs[number * size : (number + 1) * size]


def best_constant() -> dict[str, Any]:
    """Divergence and T of the kind of stage A with the lowest mean CE on references; ties go to the lower T.

    Raises:
        UserError: stage A is not collected.
    """
    ces: dict[tuple[float, str], list[float]] = {}
    for run in collected("A"):
        settings = run["settings"]
        if settings.get("loss.kd_ratio") and not run["failed"]:
            key = (float(settings["temperature.value"]), str(settings["loss.divergence.name"]))
            ces.setdefault(key, []).append(run["scores"]["ce"])
    if not ces:
        raise UserError("stage B needs the results of stage A; run and collect it first")
    value, divergence = min(ces, key=lambda key: (math.fsum(ces[key]) / len(ces[key]), key))
    return {"loss.divergence": [divergence], "temperature": [value]}


def stage_b(stage: Mapping[str, Any], rows: Path, folder: Path) -> Iterator[Study]:
    """The constant and the policies; then, when those are done, the controls that replay each seed's own run."""
    best = best_constant()
    divergence = {"loss.divergence": best["loss.divergence"]}
    policies = {"grids": [{**divergence, "temperature": stage["policies"]}]}
    yield planned({"grids": [best]}, rows, folder, stage["control_seeds"])
    yield planned(
        {"grids": [{**best, "training.learning_rate": stage["learning_rates"]}]}, rows, folder, stage["seeds"]
    )
    yield planned(policies, rows, folder, stage["seeds"])
    dts = next(policy for policy in stage["policies"] if policy["name"] == "dts")
    own = planned({"grids": [{**divergence, "temperature": [dts]}]}, rows, folder, stage["seeds"]).runs
    runs: list[Planned] = []
    recipe = ""
    for number, seed in enumerate(stage["seeds"]):
        paths = {"OWN": str(own[number].path.resolve()), "OTHER": str(own[(number + 1) % len(own)].path.resolve())}
        controls = [_filled(policy, paths) for policy in stage["beside_dts"]]
        part = planned({"grids": [{**divergence, "temperature": controls}]}, rows, folder, [seed])
        recipe, runs = part.recipe, [*runs, *part.runs]
    yield Study(recipe, folder, runs)


def _filled(value: Any, paths: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(one, paths) for key, one in value.items()}
    return paths.get(value, value) if isinstance(value, str) else value


def stage_c(stage: Mapping[str, Any], rows: Path, folder: Path, make: bool) -> Iterator[Study]:
    """Students of both depths; then, of the fine-tuned teachers, which are made before that where ``make`` says so."""
    yield planned(stage, rows, folder, stage["seeds"])
    run = folder / TEACHER
    if make and not is_done(run):
        words = ["train", str(HERE / "teacher.yaml"), *overrides_of(rows), "--output", str(run), "--resume"]
        subprocess.run([sys.executable, "-m", "dts_hf", *words], check=True)
    if is_done(run):
        epochs = checkpoints(run)
        teachers = [str(epochs[number - 1].resolve()) for number in stage["teachers"]["epochs"]]
        grid = {**stage["teachers"]["grid"], "teacher.model": teachers}
        yield planned({"grids": [grid]}, rows, folder, stage["seeds"])


def checkpoints(run: Path) -> list[Path]:
    """Those of ``teacher.yaml``: one an epoch, the first first."""
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


# ---------------------------------------------------------------------------------------------------------------- results


def collect(stage: str, part: Study) -> None:
    """Write what the page needs of every run that is done or was given up; one that can go on is neither."""
    (RESULTS / stage).mkdir(parents=True, exist_ok=True)
    replayed = {str(run.path.resolve()): run for run in part.runs}
    for run in part.runs:
        if part.state(run) not in ("done", "failed") or not (run.path / "recipe.yaml").is_file():
            continue
        directory = RunDirectory(run.path)
        found = _result(directory, replayed)
        (RESULTS / stage / f"{run.id}.json").write_text(
            json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8", newline="\n"
        )


def _result(directory: RunDirectory, replayed: Mapping[str, Planned]) -> dict[str, Any]:
    recipe, metrics = directory.read_recipe(), directory.read_metrics()
    settings = settings_of(recipe)
    for key in [key for key, place in settings.items() if place and is_replayed(key)]:
        other = replayed.get(str(Path(settings.pop(key)).resolve()))
        if other is not None:  # of which seed, not where it lies: else every seed were a kind of its own
            settings[f"{key} of"] = "the same seed" if other.label.endswith(f"seed {recipe.seed}") else "another seed"
    if (teacher_folder := Path(str(settings.get("teacher.model")))).parent.name == TEACHER:
        settings["teacher.epochs"] = 1 + checkpoints(teacher_folder.parent).index(teacher_folder)
    student = metrics.get("models", {}).get("student", {})
    scores = dict(student.get("teacher_forced", {}))
    broken = [key for key, value in scores.items() if not _is_number(value)]
    whole = directory.read_log()
    lines = [line for line in whole if line.get("kind") == "train"]
    # The teacher was not scored apart, but every look at the held-out rows has its numbers
    looks = [line for line in whole if line.get("kind") == "eval"][-1:]
    teacher = {name: look[f"eval_teacher_{name}"] for look in looks for name in OF_TEACHER}
    log = [{name: line[name] for name in COLUMNS if line.get(name) is not None} for line in lines]
    return {
        "id": run_id(recipe),
        "seed": recipe.seed,
        "settings": {key: value for key, value in settings.items() if key not in PLACES and value is not None},
        "contents": {
            key: value for key, value in contents(recipe).items() if key in ("data.train", "data.validation")
        },
        "failed": "it has not ended" if not scores else f"its {broken[0]} is no number" if broken else "",
        "scores": {key: value for key, value in scores.items() if _is_number(value)},
        "teacher": {key: value for key, value in teacher.items() if _is_number(value)},
        "steps": metrics.get("training", {}).get("steps", 0),
        "log": log,
    }


def _is_number(value: Any) -> bool:
    """Whether a score is one: what was not finite is null in the files of a run."""
    return value is not None and math.isfinite(value)


def collected(stage: str) -> list[dict[str, Any]]:
    """The results of a stage, by id."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / stage).glob("*.json"))]


# ---------------------------------------------------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = study()["stages"]
    parser.add_argument("--stage", choices=stages, default="A")
    parser.add_argument(
        "--rows", type=Path, default=Path("data/dolly"), help="folder with train.jsonl and valid.jsonl"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/temperature"), help="folder of the run directories")
    parser.add_argument("--dry-run", action="store_true", help="show the runs and what has become of each")
    parser.add_argument("--collect", action="store_true", help="start nothing; write results/ from what has ended")
    args = parser.parse_args(arguments)
    stage, folder = stages[args.stage], args.output / args.stage
    if args.stage == "B":
        parts: Iterator[Study] = stage_b(stage, args.rows, folder)
    elif args.stage == "C":
        parts = stage_c(stage, args.rows, folder, make=not (args.dry_run or args.collect))
    else:
        parts = iter([planned(stage, args.rows, folder, stage["seeds"])])
    runs: list[Planned] = []
    recipe = ""
    for part in parts:
        recipe, runs = part.recipe, [*runs, *part.runs]
        if args.dry_run:
            for run in part.runs:
                print(f"{part.state(run):8} {run.path.name}  {run.label}")
        elif not args.collect:
            known = {path.stem for path in (RESULTS / args.stage).glob("*.json")}
            sweep = Sweep(part, [run for run in part.runs if run.id not in known])  # collected once is done
            sweep.on_change = lambda part=part: print(_progress(part), file=sys.stderr, flush=True)
            sweep.run()
    if not args.dry_run:
        collect(args.stage, Study(recipe, folder, runs))
        print(f"{len(collected(args.stage))} of {len(runs)} runs in {RESULTS / args.stage}; next: write_page.py")
    return 0


def _progress(part: Study) -> str:
    states = [part.state(run) for run in part.runs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(str(error)) from None
