"""What a person and a program read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.doctor.report import screen
from dts_hf.doctor.run import diagnose
from tests.support.examined import (
    ANSWERS,
    recipe,
    shown,
)


def test_one_screen(workplace: Path) -> None:
    diagnosis = diagnose(recipe())
    text = shown(diagnosis, 120)
    assert len(text.splitlines()) <= 40
    assert "nothing wrong found" in text and "CE" in text and "zero3 x 8, teacher too" in text
    assert all(len(line) <= 80 for line in shown(diagnosis, 80).splitlines())
    # The picture has the row as the loss sees it
    for row in diagnosis.picture:
        kinds = [segment.kind for segment in row.segments]
        assert kinds[:3] == ["masked", "learned", "end"] and kinds[3:] in ([], ["padding"])
        assert row.segments[0].text.endswith("<|im_start|>assistant\n")
        assert row.segments[1].text in ANSWERS and row.segments[2].text == "<|im_end|>"


def test_colours_tell_what_is_learned(workplace: Path) -> None:
    diagnosis = diagnose(recipe())
    console = Console(
        width=120, file=io.StringIO(), force_terminal=True, color_system="standard", legacy_windows=False
    )
    console.print(screen(diagnosis))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    answer = diagnosis.picture[0].segments[1].text
    assert f"\x1b[32m{answer}" in text


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, ["doctor", *map(str, arguments)])


def test_command_line(workplace: Path) -> None:
    clean = invoke(recipe(), "--json")
    assert clean.exit_code == 0 and clean.stderr == ""
    found = json.loads(clean.stdout)
    assert found["status"] == "ok" and found["errors"] == found["warnings"] == 0 and found["format"] == 1
    assert {"name", "status", "summary", "problems", "values", "skipped", "seconds"} == set(found["checks"][0])
    warned = invoke(recipe(), "training.warmup_steps=40")
    assert warned.exit_code == 0 and "1 warning" in warned.stdout
    wrong = invoke(recipe(), "loss.divergence=logit_mse", "--json")
    assert wrong.exit_code == 1 and json.loads(wrong.stdout)["errors"] == 1
    misspelt = invoke(recipe(), "loss.kd_rate=1")
    assert misspelt.exit_code == 1 and "kd_rate" in misspelt.stdout
