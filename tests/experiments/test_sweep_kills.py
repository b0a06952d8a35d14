"""A sweep that is killed again and again, in whole or in part: nothing is repeated or lost, and the table is the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dts_hf.experiments.compare import compare
from dts_hf.experiments.tables import as_csv, markdown
from tests.support.planted_sweep import STEPS, noted, planted, processes_of, send, start, with_scores

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes of a sweep in /proc")
MINUTE = 60
WAYS = ("everything", "the sweep", "a run", "a run, politely", "the sweep, politely")


def kill(way: str, sweep: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> int:
    """How many runs it has killed: each may have been about to write down a step, which is then done again."""
    runs = processes_of(folder)
    if way == "everything":  # as a machine that loses power
        sweep.kill()
        for process in runs:
            send(process, signal.SIGKILL)
    elif way == "the sweep":  # its runs go on, and the next sweep has to leave them in peace
        sweep.kill()
    elif way == "the sweep, politely":
        sweep.terminate()
    elif runs:
        send(chance.choice(runs), signal.SIGKILL if way == "a run" else signal.SIGTERM)
    if way.startswith(("everything", "the sweep")):
        sweep.wait(MINUTE)
    return len(runs)


def wait_for_a_run(sweep: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + MINUTE
    while sweep.poll() is None and not processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_kills_repeat_nothing_lose_nothing_and_leave_the_same_table(
    tmp_path: Path, kills: int, record_property: pytest.RecordProperty
) -> None:
    chance, count, seconds = random.Random(kills), 6 if kills < 10 else 40, 0.4
    study = with_scores(planted(tmp_path / "killed", count, seconds))
    sweep, killed, ways = start(study.folder, count, seconds, retries=2 * kills), 0, []
    for _ in range(kills):
        if sweep.poll() is not None:
            sweep = start(study.folder, count, seconds, retries=2 * kills)
        wait_for_a_run(sweep, study.folder)
        time.sleep(chance.uniform(0, 0.6))
        ways.append(chance.choice(WAYS))
        killed += kill(ways[-1], sweep, study.folder, chance)
    deadline = time.monotonic() + 10 * MINUTE
    while {study.state(run) for run in study.runs} != {"done"} and time.monotonic() < deadline:
        if sweep.poll() is not None:
            sweep = start(study.folder, count, seconds, retries=2 * kills)
        time.sleep(0.2)
    assert sweep.wait(MINUTE) in (0, 75) and {study.state(run) for run in study.runs} == {"done"}

    names = {run.path.name for run in study.runs}
    done, ended = noted(study.folder, "steps"), noted(study.folder, "ends")
    assert {*done} == {*ended} == names and min(done.values()) >= STEPS
    # A kill between a step, or an end, and the file that says so is the one moment at which either comes twice
    assert sum(done.values()) - STEPS * count <= killed and sum(ended.values()) - count <= killed
    undisturbed = with_scores(planted(tmp_path / "undisturbed", count, 0.0))
    for run in undisturbed.runs:
        planted_files = undisturbed.folder / ".planted" / run.path.name
        run.path.symlink_to(planted_files)
    tables = [compare([run.path for run in one.runs], None, None) for one in (study, undisturbed)]
    assert markdown(tables[0]) == markdown(tables[1]) and "temperature.value=2" in markdown(tables[0])
    again = [sum(done.values()) - STEPS * count, sum(ended.values()) - count]
    told = f"{again[0]} of {STEPS * count} steps and {again[1]} of {count} ends came twice; the table is the same"
    record_property("campaign", f"sweep: {len(ways)} kills, {told}")


COMPARE = """
import os, signal, sys
from pathlib import Path
from dts_hf.experiments import tables
from dts_hf.cli.compare import command

folder, output = Path(sys.argv[1]), sys.argv[2]
runs = sorted(path for path in folder.iterdir() if path.name.startswith("run-"))
kill_at = None

def hook(event, arguments):
    global kill_at
    touches = event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(output)
    if kill_at is None or not touches:
        return
    kill_at -= 1
    if kill_at < 0:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
command(runs, output=Path(output))
for number in range(1000):
    child = os.fork()
    if child == 0:
        kill_at = number
        command(runs, output=Path(output), baseline="temperature.value=2")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    files = {path.name: path.read_text() for path in Path(output).iterdir()}
    print(repr((status, files)))
    if status == 0:
        break
"""


def test_a_killed_comparison_leaves_whole_files(tmp_path: Path) -> None:
    """At every moment at which it opens, names or removes a file of its own."""
    study = with_scores(planted(tmp_path, 6))
    for run in study.runs:
        run.path.symlink_to(tmp_path / ".planted" / run.path.name)
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path), str(tmp_path / "table")],
        cwd=Path(__file__).parents[2], env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    seen = [eval(line) for line in done.stdout.splitlines() if line.startswith("(")]
    before, after = (compare([run.path for run in study.runs], name, None) for name in (None, "temperature.value=2"))
    assert markdown(before) != markdown(after)
    whole = {"comparison.md": {markdown(before), markdown(after)}, "comparison.csv": {as_csv(before), as_csv(after)}}
    assert len(seen) >= 8 and all(os.WIFSIGNALED(status) for status, _ in seen[:-1]) and seen[-1][0] == 0
    for _, files in seen:
        assert {*files} >= {*whole}
        assert all(files[name] in texts for name, texts in whole.items())
        # What is half written is hidden
        assert all(name in (*whole, "report.html") or name.startswith(".") for name in files)
        assert files.get("report.html", "</html>").rstrip().endswith("</html>")
    assert {name: seen[-1][1][name] for name in whole} == {
        "comparison.md": markdown(after),
        "comparison.csv": as_csv(after),
    }
