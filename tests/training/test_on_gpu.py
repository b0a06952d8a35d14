"""The main road on a CUDA device, against the CPU: ``pytest -m gpu`` where there is one (see tests/conftest.py)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.distill import distill
from dts_hf.doctor.run import diagnose
from dts_hf.generation.engine import GenerationSettings, generate
from tests.support.classifiers import SST2, classifier, rows_of
from tests.support.recipes import recipe
from tests.support.tiny import TINY_VOCAB, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, losses, trainer_for

pytestmark = pytest.mark.gpu

CARD, CPU = {"use_cpu": False}, {"use_cpu": True}
#: Of the log: what must be the same on both.
SAME = ("loss", "ce_loss", "kd_loss", "kl", "gap", "temperature", "grad_norm")


def trained(folder: Path, where: dict[str, Any], model: Any = None, packing: bool = False, **options: Any) -> Any:
    """Three steps by plain gradient descent: Adam would make much of the last bits of small gradients."""
    given = {"max_steps": 3, "optim": "sgd", "learning_rate": 1e-2, **where, **options}
    trainer = trainer_for(folder, model, packing=packing, eval_dataset=ROWS[:5], options=given)
    trainer.train()
    assert trainer.model.device.type == ("cpu" if trainer.args.use_cpu else "cuda")
    return trainer


def logged(trainer: Any) -> list[list[float]]:
    return [[log[name] for name in SAME] for log in trainer.state.log_history if "kl" in log]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_training_is_that_of_the_cpu(tmp_path: Path, packing: bool, bf16: bool) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    card, cpu = (trained(tmp_path, where, packing=packing, bf16=bf16) for where in (CARD, CPU))
    near: dict[str, Any] = {"rel": 5e-2, "abs": 5e-2} if bf16 else {"rel": 1e-4, "abs": 1e-5}
    assert len(logged(card)) == 3
    for found, expected in zip(logged(card), logged(cpu), strict=True):
        assert found == pytest.approx(expected, **near)
    assert card.evaluate()["eval_loss"] == pytest.approx(cpu.evaluate()["eval_loss"], **near)


def test_an_adamw_run_in_bf16_learns(tmp_path: Path) -> None:
    """With the Trainer's own optimizer, a teacher in bf16, recomputed activations and accumulation."""
    trainer = trainer_for(
        tmp_path, tiny_llama(), tiny_llama(seed=1, layers=3).bfloat16(), temperature=2.0,
        options={**CARD, "bf16": True, "max_steps": 30, "learning_rate": 5e-3, "activation_checkpointing": True,
                 "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]


def test_text_is_that_of_the_cpu() -> None:
    numbers = random.Random(0)
    prompts = [[numbers.randrange(3, TINY_VOCAB) for _ in range(numbers.randint(1, 30))] for _ in range(20)]
    settings = GenerationSettings(max_new_tokens=24, batch_size=8)
    answers = [
        generate(tiny_llama(tie=False).to(place), prompts, settings, eos_token_ids=[2, 20, 21], pad_token_id=2)
        for place in ("cuda", "cpu")
    ]
    assert answers[0] == answers[1]


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    options = {**CARD, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_for(tmp_path, options=options)
    straight.train()
    resumed = trainer_for(tmp_path, tiny_llama(seed=9), options=options)
    resumed.train(str(tmp_path / "checkpoint-2"))
    for name, weight in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    assert losses(resumed) == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.parametrize("second", [False, True], ids=["fp32", "bf16"])
def test_a_second_trainer_takes_the_student_of_the_first(tmp_path: Path, second: bool) -> None:
    student = trained(tmp_path, CARD, bf16=True).model
    new = tiny_llama()
    new.load_state_dict(student.state_dict())
    found, expected = (trained(tmp_path, CARD, model, bf16=second) for model in (student, new))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    taught = [trainer_for(tmp_path, teacher=model, options=CARD, eval_dataset=ROWS[:5]) for model in (student, new)]
    assert taught[0].evaluate()["eval_kl"] == pytest.approx(taught[1].evaluate()["eval_kl"], rel=1e-5)


def test_a_classifier_is_trained_as_on_the_cpu(tmp_path: Path) -> None:
    logs = []
    for where in (CARD, CPU):
        args = TrainingArguments(
            str(tmp_path), **where, max_steps=3, per_device_train_batch_size=8, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        trainer = ClassificationDistillationTrainer(
            classifier(seed=1), classifier(seed=2, layers=3), task=SST2, temperature=2.0, args=args,
            train_dataset=rows_of(SST2, 24), eval_dataset=rows_of(SST2, 9), processing_class=tiny_tokenizer(),
        )  # fmt: skip
        trainer.train()
        assert trainer.model.device.type == ("cpu" if where is CPU else "cuda")
        logs.append([*losses_of(trainer), trainer.evaluate()["eval_loss"]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def losses_of(trainer: Any) -> list[float]:
    return [log["kd_loss"] for log in trainer.state.log_history if "kd_loss" in log]


def of_no_device(**training: Any) -> Any:
    """The recipe of tests/support, which leaves the device to the machine."""
    wanted = recipe(training={"bf16": True, **training})
    del wanted.training["use_cpu"]
    return wanted


def test_a_recipe_takes_the_card_and_says_so(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = distill(of_no_device())
    name = torch.cuda.get_device_name()
    assert f"training on {name}, " in capsys.readouterr().err
    assert run.read_environment()["device"] == name
    metrics = run.read_metrics()
    assert set(metrics["models"]) == {"teacher", "student_before", "student"} and run.report_path.is_file()


def test_the_doctor_examines_the_card(workplace: Path) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(of_no_device().model_dump(mode="json")))
    diagnosis = diagnose("recipe.yaml")
    assert diagnosis.device["name"] == torch.cuda.get_device_name()
    assert diagnosis["steps"].values["steps"] == 3 and diagnosis["memory"].status == "ok"
