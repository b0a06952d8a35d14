"""What a sweep shows while it is at work, and how often it looks at its runs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dts_hf.experiments import sweep as work
from dts_hf.experiments.estimate import Pace, Size, mean_of, measured
from dts_hf.experiments.progress import Progress, last_of_training, share_done, step_of
from dts_hf.experiments.sweep import Planned, Study, Sweep
from dts_hf.runs.directory import RunDirectory
from tests.support.planted_sweep import planted
from tests.support.recipes import recipe


def terminal(width: int = 120) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, color_system=None), file


def text_of(screen: Any, width: int = 120) -> str:
    console, file = terminal(width)
    console.print(screen)
    return file.getvalue()


def logged(run: Path, *records: dict[str, Any]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def ended(run: Path, steps: int = 10, seconds: float = 20.0, whole: float = 25.0, rows: int = 100) -> None:
    run.mkdir(parents=True, exist_ok=True)
    training = {"steps": steps, "seconds": seconds, "total_seconds": whole}
    (run / "metrics.json").write_text(json.dumps({"format": 1, "models": {}, "training": training}))
    (run / "data_manifest.json").write_text(json.dumps({"splits": {"train": {"kept": rows}}}))


# ------------------------------------------------------------------------------------------------------- what is shown


def test_a_terminal_has_a_table_of_the_runs_at_work(tmp_path: Path) -> None:
    study = planted(tmp_path, 3, seconds=0.6, failing=1)
    sweep, (console, file) = Sweep(study, study.runs, jobs=2, retries=0), terminal()
    seen: list[str] = []
    with Progress(sweep, console) as progress:
        sweep.on_look = lambda: seen.append(text_of(progress.screen()))
        sweep.run()
    rows = [line for text in seen for line in text.splitlines() if "run 1" in line and "2.500" in line]
    assert rows and "0.750" in rows[0], seen[-1]
    assert any("of 4 done, 2 at work" in text for text in seen) and "3 of 4 done, 1 failed" in file.getvalue()


def test_elsewhere_there_is_a_line_when_a_run_begins_or_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = planted(tmp_path, 2)
    sweep = Sweep(study, study.runs)
    with Progress(sweep, Console(file=io.StringIO())):
        sweep.run()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "sweep: 2 of 2 done"
    assert [line.partition(";")[0] for line in lines] == [
        "sweep: 0 of 2 done, 1 at work, 1 left", "sweep: 1 of 2 done, 1 left", "sweep: 1 of 2 done, 1 at work",
        "sweep: 2 of 2 done",
    ]  # fmt: skip
    assert "at work: run 0" in lines[0] and "left" in lines[1].rpartition(";")[2]


def test_names_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    run = Planned("0", "temperature=[red]x\x1b[2J, seed 1", (), tmp_path / "run-0")
    sweep = Sweep(planted(tmp_path, 0), [run])
    sweep.at_work[run], sweep.began[run] = (None, None, ""), time.monotonic()  # type: ignore[assignment]
    shown = text_of(Progress(sweep, Console(file=io.StringIO())).screen())
    assert "[red]x\\x1b[2J" in shown and "\x1b[2J" not in shown


def test_the_last_line_of_training_counts(tmp_path: Path) -> None:
    train, held_out = {"kind": "train", "step": 40, "epoch": 0.5, "loss": 1.0}, {"kind": "eval", "step": 40}
    run = logged(tmp_path / "run", {"kind": "train", "step": 20, "epoch": 0.25}, train, held_out)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 60')  # the process is about to write the rest
    assert last_of_training(run) == train and last_of_training(tmp_path / "none") == {}
    assert step_of(train, Size(steps=160)) == "40 of 160" and step_of(train, Size(epochs=3.0)) == "40 of 240"
    assert step_of({}, Size()) == "" and step_of({"step": 7}, Size()) == "7"
    assert share_done(run, Size(steps=160)) == 0.25 and share_done(run, Size(epochs=2.0)) == 0.25
    assert share_done(run, Size(steps=10)) == 1.0 and share_done(tmp_path / "none", Size()) == 0.0


# --------------------------------------------------------------------------------------------------- how long it takes


def test_a_run_takes_as_long_as_its_rows_and_what_lies_beside_them(tmp_path: Path) -> None:
    ended(tmp_path / "a")  # 10 steps of 8 rows in 20 s: 0.25 s a row, and 5 s beside them
    pace = measured(tmp_path / "a", Size(steps=10, rows=8))
    assert pace == Pace(row=0.25, beside=5.0, rows=100.0, runs=1)
    assert pace.seconds(Size(steps=30, rows=8)) == 65.0 and pace.seconds(Size(epochs=2.0, rows=16)) == 55.0
    ended(tmp_path / "b", seconds=40.0, whole=45.0)
    assert mean_of([pace, measured(tmp_path / "b", Size(steps=10, rows=8)), None]) == Pace(0.375, 5.0, 100.0, 2)
    (tmp_path / "b/metrics.json").write_text("{")
    assert (
        measured(tmp_path / "b", Size()) is None
        and measured(tmp_path / "none", Size()) is None
        and mean_of([]) is None
    )


def test_the_size_of_a_recipe() -> None:
    assert Size.of(recipe()) == Size(steps=4, epochs=3.0, rows=4)
    made = recipe(training={"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3})
    assert Size.of(made) == Size(steps=None, epochs=2.0, rows=12)


def test_what_is_left_goes_by_the_size_of_each_run(tmp_path: Path) -> None:
    sizes = [Size(steps=10, rows=8), Size(steps=20, rows=8), Size(steps=40, rows=8)]
    runs = [
        Planned(str(number), f"run {number}", (), tmp_path / f"run-{number}", size)
        for number, size in enumerate(sizes)
    ]
    sweep = Sweep(Study("recipe.yaml", tmp_path, runs), runs, jobs=2)
    progress = Progress(sweep, Console(file=io.StringIO()))
    assert progress.seconds_left() is None and progress.left() == ""
    ended(runs[0].path)
    sweep.states[runs[0]] = "done"
    sweep.waiting = runs[2:]
    sweep.at_work[runs[1]], sweep.began[runs[1]] = (None, None, ""), time.monotonic() - 15  # type: ignore[assignment]
    # 45 s of which 15 are over, and 85 s, by two at a time
    assert progress.seconds_left() == pytest.approx((30 + 85) / 2, abs=0.5)
    assert "about 5" in progress.left()


def test_without_a_run_that_is_done_the_logs_tell(tmp_path: Path) -> None:
    run = Planned("0", "run 0", (), logged(tmp_path / "run-0", {"kind": "train", "step": 5}), Size(steps=20))
    sweep = Sweep(Study("recipe.yaml", tmp_path, [run]), [run])
    sweep.waiting = []
    sweep.at_work[run], sweep.began[run] = (None, None, ""), time.monotonic() - 10  # type: ignore[assignment]
    assert Progress(sweep, Console(file=io.StringIO())).seconds_left() == pytest.approx(30, abs=0.5)


# ------------------------------------------------------------------------------------------------------ how it looks


class Ended:
    """A process that has done its run at once."""

    def __init__(self, command: list[str], **_: Any) -> None:
        ended(Path(command[-1]))

    def poll(self) -> int:
        return 0

    def wait(self) -> int:
        return 0


class Quick(Study):
    def command(self, run: Planned) -> list[str]:
        return [str(run.path)]


@pytest.mark.parametrize("count", [50, 200])
def test_a_sweep_looks_at_each_run_a_few_times_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    looks = {"metrics": 0, "state": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            looks[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(RunDirectory, "read_metrics", counted("metrics", RunDirectory.read_metrics))
    monkeypatch.setattr(Study, "state", counted("state", Study.state))
    monkeypatch.setattr(work.subprocess, "Popen", Ended)
    monkeypatch.setattr(work, "PAUSE", 0.0)
    runs = [Planned(str(number), f"run {number}", (), tmp_path / f"run-{number}") for number in range(count)]
    study = Quick("recipe.yaml", tmp_path, runs)
    sweep, (console, _) = Sweep(study, runs, jobs=4), terminal()
    with Progress(sweep, console):
        sweep.run()
    assert [*sweep.states.values()] == ["done"] * count
    # Read when it is made, before the start and after the end, and once for its seconds
    assert looks["state"] == 2 * count and looks["metrics"] <= 4 * count
    looks.update(metrics=0, state=0)
    again = Sweep(study, runs)
    with Progress(again, console):
        again.run()
    assert looks["state"] == count and looks["metrics"] <= 2 * count
