"""Callbacks, the flow of a run that they see, and the trackers among them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    DefaultFlowCallback,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
)
from transformers.integrations import integration_utils
from transformers.trainer_callback import ExportableState

from tests.support.hf import ROWS, Recorder, events_of, logged, plain, plain_trainer, trainer_for

# ---------------------------------------------------------------------------------------------------------- the order

FLOWS: dict[str, dict[str, Any]] = {
    "as it is": {"max_steps": 3},
    "logs every 2": {"max_steps": 4, "logging_steps": 2},
    "saves every 2": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    "evaluates every 2": {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2},
    "evaluates epochs": {"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch"},
    "a bit of all": {"max_steps": 5, "logging_steps": 3, "save_strategy": "steps", "save_steps": 4,
                     "eval_strategy": "steps", "eval_steps": 2},
    "accumulates": {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "evaluates first": {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    "evaluates late": {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3},
    "logs the first step": {"max_steps": 3, "logging_steps": 3, "logging_first_step": True},
}  # fmt: skip


@pytest.mark.parametrize("flow", FLOWS)
def test_the_order_of_events(tmp_path: Path, flow: str) -> None:
    """works: events come in the order of transformers' Trainer, for ten ways to log, evaluate, save and accumulate"""
    ours = events_of(lambda recorder: trainer_for(
        tmp_path / "ours", rows=plain(), eval_dataset=plain()[:3], callbacks=[recorder], options=FLOWS[flow]
    ))  # fmt: skip
    assert ours == events_of(lambda recorder: plain_trainer(tmp_path / "theirs", recorder, **FLOWS[flow]))
    assert ours.count("on_step_end") >= 2


def test_a_prediction_is_an_event_of_its_own(tmp_path: Path) -> None:
    """works: on_predict after predict, on_evaluate after evaluate"""
    recorder = Recorder()
    trainer = trainer_for(tmp_path, callbacks=[recorder])
    trainer.predict(ROWS[:3])
    assert recorder.events[-1] == "on_predict" and "on_evaluate" not in recorder.events
    trainer.evaluate(ROWS[:3])
    assert recorder.events[-1] == "on_evaluate"


# ------------------------------------------------------------------------------------------------- adding and removing


@pytest.mark.parametrize("given", [Recorder, Recorder()], ids=["class", "instance"])
def test_add_pop_and_remove(tmp_path: Path, given: Any) -> None:
    """works: add_callback, pop_callback and remove_callback, by class and by instance"""
    trainer = trainer_for(tmp_path)
    trainer.add_callback(given)
    assert sum(isinstance(one, Recorder) for one in trainer.callback_handler.callbacks) == 1
    popped = trainer.pop_callback(given if isinstance(given, type) else type(given))
    assert isinstance(popped, Recorder)
    trainer.add_callback(popped)
    trainer.remove_callback(given)
    assert not any(isinstance(one, Recorder) for one in trainer.callback_handler.callbacks)


def test_the_same_callback_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """works: a second callback of the same class is taken, with transformers' warning"""
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer_callback.logger.warning", lambda text, *_: said.append(str(text)))
    trainer_for(tmp_path, callbacks=[Recorder, Recorder])
    assert any("Recorder" in text for text in said)


@pytest.mark.parametrize("quiet", [True, False])
def test_the_progress_line_is_ours(tmp_path: Path, quiet: bool) -> None:
    """differs: tqdm's bar and the printed dictionaries are replaced by one live line with T, gap and speed"""
    kinds = [type(one) for one in trainer_for(tmp_path, options={"disable_tqdm": quiet}).callback_handler.callbacks]
    assert DefaultFlowCallback in kinds and ProgressCallback not in kinds and PrinterCallback not in kinds


def test_callbacks_of_the_user_come_after_ours(tmp_path: Path) -> None:
    """works: a user's on_step_end sees the temperature of the step that has ended"""
    seen: list[float] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(trainer.temperature.temperature)

    trainer = trainer_for(tmp_path, callbacks=[Look], options={"max_steps": 3})
    trainer.train()
    assert len(seen) == 3 and seen[-1] == trainer.temperature.temperature != seen[0]


# ------------------------------------------------------------------------------------------------------------ control


class Control(TrainerCallback):
    """Sets a flag of the control at a step."""

    def __init__(self, flag: str, step: int) -> None:
        self.flag, self.step = flag, step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if state.global_step == self.step:
            setattr(control, self.flag, True)
        return control


@pytest.mark.parametrize("flag, event", [("should_log", "on_log"), ("should_evaluate", "on_evaluate"),
                                         ("should_save", "on_save")])  # fmt: skip
def test_a_callback_may_ask_for_it(tmp_path: Path, flag: str, event: str) -> None:
    """works: should_log, should_evaluate and should_save, set by a callback"""

    def events(*callbacks: Any) -> list[str]:
        return events_of(lambda recorder: trainer_for(
            tmp_path, eval_dataset=ROWS[:3], callbacks=[*callbacks, recorder],
            options={"max_steps": 2, "logging_steps": 50},
        ))  # fmt: skip

    assert events(Control(flag, 1)).count(event) == events().count(event) + 1


@pytest.mark.parametrize("flag, steps", [("should_training_stop", 1), ("should_epoch_stop", 3)])
def test_a_callback_may_stop(tmp_path: Path, flag: str, steps: int) -> None:
    """works: should_training_stop ends the run, should_epoch_stop the epoch"""
    trainer = trainer_for(tmp_path, callbacks=[Control(flag, 1)], options={"max_steps": -1, "num_train_epochs": 2})
    trainer.train()
    assert trainer.state.global_step == steps


def test_early_stopping(tmp_path: Path) -> None:
    """works: EarlyStoppingCallback, by any held-out number"""
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
               "load_best_model_at_end": True, "metric_for_best_model": "kl", "learning_rate": 0.0}  # fmt: skip
    trainer = trainer_for(tmp_path, eval_dataset=ROWS[:3], callbacks=[EarlyStoppingCallback(2)], options=options)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_global_step == 1


class Counter(TrainerCallback, ExportableState):
    """Counts steps, over a resume too."""

    def __init__(self, steps: int = 0, by: int = 1) -> None:
        self.steps, self.by = steps, by

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        self.steps += self.by

    def state(self) -> dict[str, Any]:
        return {"args": {"by": self.by}, "attributes": {"steps": self.steps}}


def test_the_state_of_a_callback_is_restored(tmp_path: Path) -> None:
    """works: stateful callbacks go on with restore_callback_states_from_checkpoint"""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2,
               "restore_callback_states_from_checkpoint": True}  # fmt: skip
    trainer_for(tmp_path, callbacks=[Counter(by=5)], options=options).train()
    again = trainer_for(tmp_path, callbacks=[Counter()], options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    counter = next(one for one in again.callback_handler.callbacks if isinstance(one, Counter))
    assert counter.by == 5 and counter.steps == 15


def test_a_callback_that_raises(tmp_path: Path) -> None:
    """works: an exception of a callback comes out as it is, and the model can be used after it"""

    class Broken(TrainerCallback):
        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError("mine")

    trainer = trainer_for(tmp_path, callbacks=[Broken])
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer.train()
    assert trainer.model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 320)


def test_the_model_can_be_used_in_a_callback(tmp_path: Path) -> None:
    """works: the student answers with logits inside callbacks"""
    seen: list[Any] = []

    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(model(torch.tensor([[1, 2, 3]])).logits.shape)

    trainer_for(tmp_path, callbacks=[Ask]).train()
    assert seen == [(1, 3, 320)]


# ---------------------------------------------------------------------------------------------------------- trackers

FACTS = {"temperature": "dts", "temperature_rule": "gap", "kd_ratio": 0.25, "divergence": "jsd", "divergence_beta": 0.3,
         "teacher": "LlamaForCausalLM", "teacher_dtype": "float32"}  # fmt: skip
RUN: dict[str, Any] = {"kd_ratio": 0.25, "divergence": {"name": "jsd", "beta": 0.3}}


def assert_facts(found: Any) -> None:
    assert {name: found.get(name) for name in FACTS} == FACTS
    assert found["learning_rate"] == 1e-3  # and what they had before


class Values(dict[str, Any]):
    def update(self, *values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(*values)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A wandb of which only the configuration is there."""
    fake: Any = ModuleType("wandb")
    fake.run, fake.config, fake.logged = None, Values(), []
    fake.init = lambda **_: setattr(
        fake, "run", SimpleNamespace(id="1", name="n", summary={}, _label=lambda **_: None)
    )
    fake.log = fake.logged.append
    fake.finish = lambda: None
    inner: Any = ModuleType("wandb.sdk.lib.config_util")
    inner.ConfigError = KeyError
    for name, module in {"wandb": fake, "wandb.sdk": ModuleType("wandb.sdk"), "wandb.sdk.lib": ModuleType("wandb.sdk.lib"),
                         "wandb.sdk.lib.config_util": inner}.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)
    return fake


def test_wandb_knows_the_distillation(tmp_path: Path, wandb: Any) -> None:
    """works: wandb.config has policy, its options, divergence, kd_ratio and teacher; the log has T, gap and KL"""
    trainer = trainer_for(tmp_path, options={"report_to": "wandb"}, **RUN)
    trainer.train()
    assert_facts(wandb.config)
    assert any("train/gap" in line and "train/temperature" in line for line in wandb.logged)
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"kd_ratio", "teacher", "divergence"} & set(saved)
    arguments = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert type(arguments).__name__ == "TrainingArguments" and "kd_ratio" not in arguments.to_dict()


def test_a_tracker_that_is_added_later_knows_it_too(tmp_path: Path, wandb: Any) -> None:
    """works: add_callback(WandbCallback()); afterwards the callback is as it was"""
    tracker = integration_utils.WandbCallback()
    trainer = trainer_for(tmp_path, **RUN)
    trainer.add_callback(tracker)
    trainer.train()
    assert_facts(wandb.config)
    assert "on_train_begin" not in vars(tracker)


def test_mlflow_knows_the_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """works: MLflow's parameters have policy, divergence, kd_ratio and teacher"""
    params: dict[str, Any] = {}
    fake: Any = ModuleType("mlflow")
    fake.__version__ = "2.7.0"
    fake.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100))
    fake.is_tracking_uri_set = lambda: True
    fake.get_tracking_uri = lambda: "file"
    fake.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id="1"))
    fake.log_params = params.update
    fake.log_metrics = lambda **_: None
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setattr(integration_utils, "is_mlflow_available", lambda: True)
    trainer_for(tmp_path, options={"report_to": "mlflow"}, **RUN).train()
    assert_facts(params)


def test_tensorboard_knows_the_distillation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """works: TensorBoard's text "args" has policy, divergence, kd_ratio and teacher"""
    texts: dict[str, str] = {}
    writer: Any = SimpleNamespace(
        add_text=texts.__setitem__, add_scalar=lambda *_: None, flush=lambda: None, close=lambda: None
    )
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        module: Any = ModuleType(name)
        module.SummaryWriter = lambda log_dir: writer
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    trainer_for(tmp_path, options={"report_to": "tensorboard"}, **RUN).train()
    assert_facts(json.loads(texts["args"]))


def test_callbacks_know_the_distillation(tmp_path: Path) -> None:
    """works: args.distillation in every callback has policy, divergence, kd_ratio, teacher and parameters"""
    seen: list[dict[str, Any]] = []

    class Look(TrainerCallback):
        def on_init_end(self, args: Any, *_: Any, **kwargs: Any) -> None:
            seen.append(args.distillation)

        on_step_end = on_init_end

    trainer = trainer_for(tmp_path, callbacks=[Look], **RUN)
    trainer.train()
    assert len(seen) == 2 and {name: seen[1][name] for name in FACTS} == FACTS
    assert seen[1] == trainer.facts and seen[1]["student_parameters"] == trainer.model.num_parameters()
    alone = trainer_for(tmp_path, kd_ratio=0.5).facts
    assert alone["divergence"] == "forward_kl" and "divergence_beta" not in alone


# --------------------------------------------------------------------------------------------------------------- logs


def test_train_metrics_and_log_files(tmp_path: Path) -> None:
    """works: log_metrics, save_metrics and save_state"""
    trainer = trainer_for(tmp_path)
    metrics = trainer.train().metrics
    assert {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"} <= set(
        metrics
    )
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    assert json.loads((tmp_path / "train_results.json").read_text())["train_loss"] == metrics["train_loss"]
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize("kind", ["all", "non_padding", "no"])
def test_tokens_seen(tmp_path: Path, kind: str) -> None:
    """works: include_num_input_tokens_seen; dummy rows are not counted"""
    rows = plain()
    trainer = trainer_for(tmp_path, rows=rows, options={"include_num_input_tokens_seen": kind, "max_steps": 2})
    trainer.train()
    real = sum(len(row["input_ids"]) for row in rows)
    seen = trainer.state.num_input_tokens_seen
    assert {"no": seen == 0, "non_padding": seen == real, "all": seen > real}[kind]


@pytest.mark.parametrize("strategy, lines", [("steps", 4), ("epoch", 2), ("no", 0)])
def test_logging_strategies(tmp_path: Path, strategy: str, lines: int) -> None:
    """works: logging_strategy steps, epoch and no"""
    options = {"logging_strategy": strategy, "max_steps": -1, "num_train_epochs": 2}
    trainer = trainer_for(tmp_path, options=options)
    trainer.train()
    assert len(logged(trainer, "loss")) == len(logged(trainer, "gap")) == lines
