"""Names of tests depend on nothing but their source: pytest's workers must agree on them, on every machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: All that the tests read while they are collected.
FOLDERS = (".github", "benchmarks", "data_prep", "docs", "dts_hf", "recipes", "tests")
#: Apart by more than the second that clocks in file headers count.
SECONDS_APART = 2.5


def collecting(root: Path, tests: str, **surroundings: str) -> subprocess.Popen[str]:
    """A process that collects ``tests`` of the checkout at ``root`` and runs none."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONPATH": os.pathsep.join((str(root), env.get("PYTHONPATH", ""))), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        tests,
    ]
    return subprocess.Popen(
        command, cwd=root, env=env | surroundings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def names(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-3000:]
    return [line for line in out.splitlines() if "::" in line]


def collected_twice(folder: Path, tests: str = "tests") -> tuple[list[str], list[str]]:
    """Names here and now, and in a copy, seconds later, with other hashes, another time zone and another home."""
    copy = folder / "elsewhere"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    (folder / "home").mkdir()
    first = collecting(ROOT, tests, PYTHONHASHSEED="1")
    time.sleep(SECONDS_APART)
    second = collecting(
        copy, tests, PYTHONHASHSEED="2", TZ="Pacific/Auckland", HOME=str(folder / "home"), COLUMNS="61"
    )
    return names(first), names(second)


@pytest.mark.soak  # all is collected twice; workers that disagree on a name say so themselves
def test_names_do_not_depend_on_time_folder_or_hashes(tmp_path: Path) -> None:
    here, elsewhere = collected_twice(tmp_path)
    assert len(here) > 1000 and len(set(here)) == len(here)
    assert here == elsewhere, sorted(set(here) ^ set(elsewhere))[:10]
    places = {str(ROOT), str(tmp_path), tempfile.gettempdir() + "/", os.path.dirname(sys.executable)}
    of_this_machine = [name for name in here if any(place in name for place in places)]
    addresses = [name for name in here if re.search(r"\b0x[0-9a-f]{6,}|<[\w.]+ (object )?at ", name)]
    assert not of_this_machine and not addresses


def test_no_test_module_is_imported() -> None:
    """What several tests share stands in tests/support, and the cases of a worker beside its test, in a module of cases."""
    pattern = re.compile(r"^\s*(from tests\.(\w+\.)*test_\w+ import|import tests\.(\w+\.)*test_)", re.MULTILINE)
    importing = [path.name for path in (ROOT / "tests").rglob("*.py") if pattern.search(path.read_text("utf-8"))]
    assert not importing
