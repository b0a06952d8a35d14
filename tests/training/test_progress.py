"""What a person sees of long work: a line now and then off a terminal, and the time left whatever the width."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress, ProgressSample
from transformers import TrainingArguments

from dts_hf import console
from dts_hf.console import Work, working
from dts_hf.training.callbacks import ProgressCallback, _columns
from dts_hf.training.resumable_trainer import ResumableTrainer

STATE = SimpleNamespace(is_world_process_zero=True, max_steps=200, global_step=0)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.05)


def test_silent_work_says_what_it_does(often: None, capsys: pytest.CaptureFixture[str]) -> None:
    with working("encoding rows", total=40) as work:
        work.advance(10)
        time.sleep(0.13)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("encoding rows: 10 of 40 (25%), 0.") for line in lines)
    assert lines[0].endswith(" left")
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "it ends with the work"


def test_short_work_and_other_processes_say_nothing(
    often: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with working("loading"):
        pass
    monkeypatch.setenv("RANK", "1")
    with working("loading"):
        time.sleep(0.12)
    assert capsys.readouterr().err == ""


def test_of_pieces_within_each_other_the_innermost_is_told(often: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A student's layers are chosen while the models are loaded."""
    with working("loading"):
        with working("choosing"):
            time.sleep(0.18)
        inside = capsys.readouterr().err.splitlines()
        time.sleep(0.13)
    after = capsys.readouterr().err.splitlines()
    assert inside and all(line.startswith("choosing") for line in inside)
    assert after and all(line.startswith("loading") for line in after)


def test_work_of_unknown_size() -> None:
    work = Work("loading the teacher")
    work.began -= 95
    assert str(work) == "loading the teacher, 95 s so far"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_time_left_is_never_cut(width: int) -> None:
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    progress = Progress(*_columns(screen), console=screen)
    text = "loss 12.345  kl 10.123  gap +1.23  T 3.00  1,234,567 tok/s"
    progress.add_task(text, total=200_000, completed=100_123)
    progress.tasks[0].start_time = time.monotonic() - 7_000
    progress.tasks[0]._progress.extend(ProgressSample(float(second), 14.0) for second in range(9))
    screen.print(progress.get_renderable())
    shown = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(shown) == 1 and "100123/200000" in shown[0]
    assert shown[0].rstrip().endswith(" left 1:58:55") and len(shown[0].rstrip()) <= width
    assert "loss 12.345" in shown[0]


def test_steps_and_held_out_batches_are_told_off_a_terminal(
    often: None, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    args = TrainingArguments(str(tmp_path), disable_tqdm=False, use_cpu=True, report_to="none")
    callback, state = ProgressCallback(), SimpleNamespace(**vars(STATE))
    callback.on_train_begin(args, state, None)
    state.global_step = 3
    callback.on_step_end(args, state, None)
    assert capsys.readouterr().err == "", "not yet"
    time.sleep(0.06)
    callback.on_step_end(args, state, None)
    time.sleep(0.06)
    callback.on_prediction_step(args, state, None)
    callback.on_train_end(args, state, None)
    step, batch = capsys.readouterr().err.splitlines()
    assert step.startswith("step 3/200, 0.1 s so far, about ") and step.endswith(" left")
    assert batch.startswith("step 3/200: held-out rows, batch 1, ")


def test_tied_weights_are_not_missed_in_a_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    from collections import namedtuple

    result = namedtuple("result", "missing_keys unexpected_keys")
    tied: list[str] = []
    model = SimpleNamespace(
        _tied_weights_keys={"lm_head.weight": "model.embed_tokens.weight"},
        _keys_to_ignore_on_save=None,
        tie_weights=lambda: tied.append("tied"),
    )
    trainer: Any = object.__new__(ResumableTrainer)
    trainer.model = model
    said: list[str] = []
    import transformers.trainer as trainer_module

    warn, trainer_module.logger.warning = trainer_module.logger.warning, said.append
    try:
        trainer._issue_warnings_after_load(result(["lm_head.weight"], []))
        assert (said, tied) == ([], ["tied"])
        trainer._issue_warnings_after_load(result(["lm_head.weight", "model.norm.weight"], []))
    finally:
        trainer_module.logger.warning = warn
    assert len(said) == 1 and "model.norm.weight" in said[0] and "lm_head" not in said[0]
