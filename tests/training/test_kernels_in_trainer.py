"""Trainers with the loss kernels beside the same training in PyTorch: losses, logs, evaluation and weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

pytest.importorskip("triton", reason="no kernels where Triton is not installed")

from dts_hf.classification.trainer import ClassificationDistillationTrainer
from tests.support.classifiers import SST2, classifier, rows_of
from tests.support.daily import one_in
from tests.support.families import FAMILIES
from tests.support.tiny import TINY_VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning:triton")

#: Few labels: the interpreter takes a tenth of a second for each.
ROWS = [
    {"id": f"r{i}", "instruction": "Say it" + " again" * i, "input": "", "output": "yes" + " no" * (i % 2)}
    for i in range(4)
]
ROW_BYTES = 2 * 4 * TINY_VOCAB
#: Of a log line, where it is there; what depends on the clock is not.
CLOCK = ("runtime", "per_second", "flos", "seconds")


def gemma2(seed: int) -> Any:
    """Tiny, with a soft-cap on its logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(FAMILIES["Gemma 2"].configuration()).float()


def logs_of(trainer: Any) -> list[dict[str, float]]:
    lines = [*trainer.state.log_history, trainer.evaluate()]
    return [
        {name: value for name, value in line.items() if isinstance(value, float) and not any(word in name for word in CLOCK)}
        for line in lines
    ]  # fmt: skip


def assert_same(found: Any, expected: Any) -> None:
    for line, wanted in zip(logs_of(found), logs_of(expected), strict=True):
        assert line == pytest.approx(wanted, rel=2e-5, abs=2e-6)
    weights = dict(found.model.named_parameters())
    for name, weight in expected.model.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)


CASES: dict[str, dict[str, Any]] = {
    "llama, padded": {},
    "llama, packed, in chunks": {"packing": True, "logits_budget_mb": 3.5 * ROW_BYTES / 2**20, "divergence": "jsd"},
    "gpt2, accumulation": {"model": tiny_gpt2, "options": {"gradient_accumulation_steps": 2}, "divergence": "reverse_kl",
                           "temperature": {"name": "logit_std"}},
    "gemma2": {"model": gemma2, "temperature": {"name": "dtkd", "w_kd": 0.5}},
    "a sequence longer than a chunk": {"temperature": {"name": "dts", "granularity": "sequence"}, "packing": True,
                                       "logits_budget_mb": 1.5 * ROW_BYTES / 2**20},
    "a learnt temperature": {"temperature": {"name": "ctkd", "learning_rate": 0.1}, "kd_ratio": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("case", one_in(6, CASES))
def test_kernels_train_as_pytorch_does(case: str, tmp_path: Path) -> None:
    """By plain gradient descent: Adam would make much of the last bits of small gradients."""
    given = {"temperature": {"name": "dts"}, **CASES[case]}
    make = given.pop("model", tiny_llama)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 1e-2}
    options |= given.pop("options", {})
    trained = []
    for kernels in ("triton", "torch"):
        given |= {"eval_dataset": ROWS[:2], "kernels": kernels}
        trainer = trainer_for(tmp_path, make(seed=0), make(seed=1), ROWS, options, **given)
        trainer.train()
        trained.append(trainer)
    assert_same(*trained)


def test_kernels_of_equal_models_have_no_gap_and_no_gradient(tmp_path: Path) -> None:
    model = tiny_llama(seed=0)
    options = {"optim": "sgd", "learning_rate": 1.0, "per_device_train_batch_size": 2}
    trainer = trainer_for(tmp_path, model, copy.deepcopy(model), ROWS, options, kernels="triton", kd_ratio=1.0)
    trainer.train()
    log = next(line for line in trainer.state.log_history if "kl" in line)
    assert log["kl"] == log["gap"] == 0.0 and abs(log["kd_loss"]) < 1e-6 and log["grad_norm"] < 1e-5


@pytest.mark.parametrize("policy", ["dts", "logit_std"])
def test_kernels_train_a_classifier_as_pytorch_does(policy: str, tmp_path: Path) -> None:
    trained = []
    for kernels in ("triton", "torch"):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, optim="sgd", learning_rate=1e-2,
        )  # fmt: skip
        trainer = ClassificationDistillationTrainer(
            classifier(seed=1), classifier(seed=2, layers=3), task=SST2, temperature={"name": policy}, args=args,
            train_dataset=rows_of(SST2, 8), eval_dataset=rows_of(SST2, 4), processing_class=tiny_tokenizer(),
            kernels=kernels,
        )  # fmt: skip
        trainer.train()
        trained.append(trainer)
    assert_same(*trained)
