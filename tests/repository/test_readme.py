"""What the documents promise: the Python example runs, the recipe loads, the commands, targets and links exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "data_prep", "recipes")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MODEL_NAME = re.compile(r'"(HuggingFaceTB/[\w.-]+)"')


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def labelled(language: str) -> Iterator[object]:
    for document in DOCUMENTS:
        for number, block in enumerate(blocks(document, language), 1):
            yield pytest.param(block, id=f"{document.relative_to(ROOT)}-{number}")


def test_python_example_trains_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    names = MODEL_NAME.findall(example)
    assert len(set(names)) == 2, "the example names a student and a teacher"
    for number, name in enumerate(names):  # models of the same names in folders, so that the text runs as it stands
        folder = tmp_path / name
        tiny_llama(layers=1 + number, seed=number).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)

    trainer = scope["trainer"]
    log = trainer.state.log_history[0]  # type: ignore[attr-defined]
    assert log["kd_loss"] > 0 and log["temperature"] == 3.0
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (names[0], "runs/from_python/final"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_python_example_is_ten_statements_at_most() -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 12, "ten lines and the two imports"


@pytest.mark.parametrize("block", list(labelled("yaml")))
def test_recipe_example_loads(block: str, tmp_path: Path) -> None:
    from dts_hf.recipe.loading import load_recipe

    if not {"student", "teacher", "data", "output"} <= set(yaml.safe_load(block)):
        pytest.skip("a part of a recipe")
    path = tmp_path / "recipe.yaml"
    path.write_text(block, encoding="utf-8")
    load_recipe(path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_targets_exist(document: Path) -> None:
    from typer.main import get_command

    from dts_hf.cli.app import app

    text = document.read_text(encoding="utf-8")
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"(?:^|`)dts-hf (\w[\w-]*)", text, re.MULTILINE))
    assert used <= commands, f"no such command: {sorted(used - commands)}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    made = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))
    assert made <= targets, f"no such make target: {sorted(made - targets)}"


def test_readme_lists_every_policy_and_divergence() -> None:
    from dts_hf.divergences import DIVERGENCES
    from dts_hf.temperature import temperature_policies
    from dts_hf.temperature.parts.dts_rules import RULES

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (*temperature_policies(), *DIVERGENCES, *(f"rule: {rule}" for rule in RULES)):
        assert re.search(rf"\b{re.escape(name)}\b", text), f"README.md does not name '{name}'"


def test_how_many_policies_and_divergences_there_are() -> None:
    """The pages that compare toolkits say how many; a new one makes them wrong without a word."""
    from dts_hf.divergences import DIVERGENCES
    from dts_hf.temperature import temperature_policies

    readme, peers = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "peers.md"))
    policies, divergences = len(temperature_policies()), len(DIVERGENCES)
    for text, pattern, count in (
        (readme, r"^\| divergences \| (\d+)", divergences),
        (peers, r"^\| divergences \| (\d+)", divergences),
        (readme, r"^\| temperature \| (\d+) policies", policies),
        (readme, r"and (\d+) others\), not a", policies - 1),
        (peers, r"\| a policy: (\d+) of them", policies),
    ):
        assert [int(found) for found in re.findall(pattern, text, re.MULTILINE)] == [count], pattern


def anchors(document: Path) -> set[str]:
    """What ``#...`` may follow a link to ``document``: its headings, as GitHub and the site make links of them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title)).strip().lower().replace(" ", "-")
        for title in titles
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_headings(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)]+)\)", document.read_text(encoding="utf-8"))
    pages = [(name, (document.parent / name) if name else document, anchor) for name, anchor in links]
    assert not [
        f"{name}#{anchor}" for name, page, anchor in pages if page.suffix == ".md" and anchor not in anchors(page)
    ]


def test_policy_of_the_architecture_document_works() -> None:
    import math
    from typing import ClassVar

    from dts_hf.temperature.base import TemperaturePolicy, check_number

    (example,) = blocks(ROOT / "docs" / "architecture.md", "python")
    scope = {"ClassVar": ClassVar, "TemperaturePolicy": TemperaturePolicy, "check_number": check_number, "math": math}
    exec(compile(example, "architecture.md", "exec"), scope)
    policy = scope["Half"](t_init=4.0)  # type: ignore[operator]
    policy.begin_step(0.5)
    assert policy.temperature == 3.0
    policy.load_state(policy.state())
