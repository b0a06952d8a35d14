"""The generated pages are up to date, their figures are sound, and the example of docs/add_a_policy.md works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from dts_hf.temperature import temperature_policies

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        import generate
    finally:
        sys.path.remove(str(DOCS))
    return generate


@pytest.fixture(scope="module")
def files(generate: ModuleType) -> dict[Path, str]:
    return generate.generated()


def test_pages_and_figures_are_up_to_date(generate: ModuleType, files: dict[Path, str]) -> None:
    wrong = [str(path.relative_to(ROOT)) for path in generate.stale(files)]
    assert not wrong, f"run `python docs/generate.py`: {wrong}"


def test_check_names_what_is_stale_and_writing_mends_it(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs"
    wanted = {docs / "page.md": "new", docs / "figures" / "temperature_a.svg": "<svg/>"}
    monkeypatch.setattr(generate, "DOCS", docs)
    monkeypatch.setattr(generate, "generated", lambda: wanted)
    (docs / "figures").mkdir(parents=True)
    (docs / "page.md").write_text("old")
    gone = docs / "figures" / "temperature_gone.svg"
    gone.write_text("a policy that is no longer there")
    assert generate.main(["--check"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert (docs / "page.md").read_text() == "old"
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0
    assert not gone.exists() and {path.name for path in docs.rglob("*.*")} == {"page.md", "temperature_a.svg"}


@pytest.mark.parametrize("name", sorted(temperature_policies()))
def test_every_policy_has_its_section_and_figure(name: str, files: dict[Path, str]) -> None:
    page = files[DOCS / "temperature.md"]
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert f"figures/temperature_{name}.svg" in section
    for part in ("**When to use it.**", "**Cost.**", "**Paper.**"):
        assert part in section
    rows = re.findall(r"^\| `\w+` \| `.+` \| (.*) \|$", section, re.MULTILINE)
    assert all(rows), "every option says what it means"
    assert rows or "No options." in section

    root = ElementTree.fromstring(files[DOCS / "figures" / f"temperature_{name}.svg"])
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    background = root.find(f"{SVG}rect")
    assert background is not None and background.get("fill") == "#ffffff"  # readable on a dark page too
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert "progress" in words and ("t" if name == "taid" else "T") in words
    curves = [*root.iter(f"{SVG}polyline"), *root.iter(f"{SVG}polygon")]
    assert curves
    for curve in curves:
        for point in (curve.get("points") or "").split():
            x, y = (float(number) for number in point.split(","))
            assert 0 <= x <= width and 0 <= y <= height


def test_figures_show_what_the_policies_do(files: dict[Path, str]) -> None:
    def heights(name: str) -> list[float]:
        root = ElementTree.fromstring(files[DOCS / "figures" / f"temperature_{name}.svg"])
        line = next(root.iter(f"{SVG}polyline"))
        return [-float(point.split(",")[1]) for point in (line.get("points") or "").split()]

    for name in ("pocl", "taid"):
        assert heights(name) == sorted(heights(name)) and heights(name)[0] < heights(name)[-1]
    for name in ("linear", "cosine"):
        assert heights(name) == sorted(heights(name), reverse=True)
    assert len(set(heights("constant"))) == 1 and len(set(heights("ctkd"))) > 20


def test_docstrings_become_options(generate: ModuleType) -> None:  # which has put docs/ where it is imported from
    from _temperature_page import split_docstring

    about, options = split_docstring(
        "First ``x``.\n\nMore.\n\nArgs:\n    a, b: both,\n        go on.\n    c: alone: so.\n\nRaises:\n    UserError: no.\n"
    )
    assert about == "First `x`.\n\nMore."
    assert options == {"a": "both, go on.", "b": "both, go on.", "c": "alone: so."}


def test_the_policy_of_add_a_policy_is_one_file(tmp_path: Path) -> None:
    """Its three blocks in a copy of the package: found by name, used with the loss, and past the contract tests."""
    text = (DOCS / "add_a_policy.md").read_text(encoding="utf-8")
    policy, test, use = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dts_hf", tmp_path / "dts_hf", ignore=ignore)
    for name in ("__init__.py", "temperature/__init__.py", "temperature/test_temperature.py", "support/__init__.py",
                 "support/recorded.py", "support/reference.py", "support/stepping.py"):  # fmt: skip
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "dts_hf" / "temperature" / "confidence.py").write_text(policy, encoding="utf-8")
    (tmp_path / "tests" / "test_confidence.py").write_text(test, encoding="utf-8")
    here = f"import dts_hf\nassert dts_hf.__file__.startswith({str(tmp_path)!r}), dts_hf.__file__\n"
    (tmp_path / "use.py").write_text(here + use, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    commands = (
        ["use.py"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "confidence", "tests"],
    )
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout) or re.search(r"^(\.+)", done.stdout, re.MULTILINE)
    assert passed is not None
    assert (int(passed[1]) if passed[1].isdigit() else len(passed[1])) >= 8, done.stdout  # the contract and its own
