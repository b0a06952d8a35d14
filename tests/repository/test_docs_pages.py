"""The hand-written pages: messages of the troubleshooting page exist, the notebook runs, tables name what there is."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def texts(node: ast.AST) -> Iterator[str]:
    """Every string of a module as a message is made of it: parts joined, ``{}`` for what is filled in."""
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in child.values)
        elif isinstance(child, ast.BinOp) and isinstance(child.op, ast.Add):
            yield "{}".join(texts(child.left)) + "{}".join(texts(child.right))
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


@pytest.fixture(scope="module")
def messages() -> list[str]:
    sources = sorted((ROOT / "dts_hf").rglob("*.py"))
    return [text for path in sources for text in texts(ast.parse(path.read_text(encoding="utf-8")))]


def symptoms() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


@pytest.mark.parametrize("symptom", symptoms())
def test_messages_of_the_troubleshooting_page_are_in_the_code(symptom: str, messages: list[str]) -> None:
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in symptom.split("...")), re.DOTALL)
    assert any(pattern.search(message) for message in messages)


def test_there_are_many() -> None:
    assert len(symptoms()) >= 40


def test_the_install_page_quotes_messages(messages: list[str]) -> None:
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    for extra in re.findall(r"dts-hf\[(\w+)\]'\"", page):
        assert any(f"pip install 'dts-hf[{extra}]'" in message for message in messages), extra


def test_the_install_page_names_every_extra() -> None:
    """Those of people who use the package; of those who work on it CONTRIBUTING.md speaks."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (section,) = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE)) - {"test", "lint", "docs", "benchmark", "dev"}
    page = (DOCS / "install.md").read_text(encoding="utf-8")
    assert len(extras) >= 5 and extras <= set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))


def test_there_is_one_way_to_install_it() -> None:
    """From the repository; of an index neither page may speak before the package is on it."""
    said = {re.findall(r"^pip install .*dts-hf.*$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)[0]
            for name in ("README.md", "docs/install.md")}  # fmt: skip
    repository = re.search(
        r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert repository and said == {f"pip install 'dts-hf[gguf] @ git+{repository[1]}'"}
    for path in (ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "examples").iterdir()):
        assert not path.is_file() or "pip install dts-hf" not in path.read_text(encoding="utf-8"), path


def test_the_start_page_leads_to_every_page() -> None:
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w/]+\.md)", page))
    assert {path.name for path in DOCS.glob("*.md")} - {"index.md"} <= linked


def code_cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code cells, one after the other in one process; the student learns, and the figure shows it."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(), 1):
        exec(compile(cell, f"{NOTEBOOK.name}, cell {number}", "exec"), scope)
    assert scope["after"]["eval_kl"] < 0.2 * scope["before"]["eval_kl"]
    temperatures = [line["temperature"] for line in scope["log"]]
    assert temperatures[0] > 2.9 and temperatures[-1] < 1.3 and len(scope["figure"].axes) == 2
    assert "teacher:" in capsys.readouterr().out


def test_the_notebook_carries_its_figure_and_no_path_of_a_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert '"image/png"' in text and "/home/" not in text and "/tmp/" not in text


def test_arguments_of_the_trl_page_exist() -> None:
    """What stands in our column of the tables and looks like a key or an argument is one."""
    from dts_hf import DistillationTrainer
    from dts_hf.recipe.schema import recipe_json_schema

    ours = set(inspect.signature(DistillationTrainer.__init__).parameters)
    schema = json.dumps(recipe_json_schema())
    page = (DOCS / "from_trl.md").read_text(encoding="utf-8")
    column = " ".join(re.findall(r"^\|[^|]*\|((?:\\\||[^|])*)\|", page, re.MULTILINE))
    used = set(re.findall(r"`([a-z_]+)=", column))
    keys = set(re.findall(r"`(?:student|teacher|data|loss|evaluation)\.([a-z_]+)", column))
    assert {"temperature", "kd_ratio", "divergence"} <= used and len(keys) > 8
    missing = {name for name in (used - ours) | keys if f'"{name}"' not in schema}
    assert not missing
