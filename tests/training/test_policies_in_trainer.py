"""Every policy through the Trainer: accumulation, padding, a checkpoint and a resume change nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch

from dts_hf.temperature import temperature_policies
from dts_hf.training.trainer import DistillationTrainer
from tests.support.recorded import options_of
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import arguments

ROWS = [
    {"id": f"r{i}", "instruction": "Say it" + " again" * (i % 3), "input": "", "output": "yes " * (1 + i % 5) + "no"}
    for i in range(12)
]
# Those whose state is made of more than a gap: it travels from rows through the reduced sums into the checkpoint.
STATEFUL = {
    **{name: (name, {}) for name in ("adakd", "cist", "ctkd", "max_logit", "taid")},
    "adakd_keep": ("adakd", {"keep": 0.4}),
    "adakd_keep_auto": ("adakd", {"keep": "auto", "keep_warmup": 0.0, "keep_band": 0.0, "keep_step": 0.3}),
}


def trained(folder, name, seed=0, resume=None, policy=None, **options):
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, **options}
    trainer = DistillationTrainer(
        tiny_llama(seed=seed),
        tiny_llama(seed=1, layers=3),
        args=arguments(folder, **defaults),
        temperature={"name": name, **options_of(name, defaults["max_steps"]), **(policy or {})},
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", sorted(temperature_policies()))
def test_trains(name, tmp_path):
    trainer = trained(tmp_path, name, max_steps=2)
    logs = [log for log in trainer.state.log_history if "kd_loss" in log]
    assert len(logs) == 2
    assert all(math.isfinite(log["kd_loss"]) and log["temperature"] > 0 for log in logs)
    start = tiny_llama(seed=0).state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("case", STATEFUL)
def test_resume_goes_on_exactly(case, tmp_path):
    name, options = STATEFUL[case]
    straight = trained(tmp_path, name, policy=options, save_strategy="steps", save_steps=2)
    saved = json.loads((tmp_path / "checkpoint-2" / "temperature.json").read_text())
    fresh = trained(tmp_path / "new", name, policy=options, max_steps=1)
    assert saved["name"] == name and saved["state"] != fresh.temperature.state()
    again = trained(
        tmp_path,
        name,
        seed=5,
        resume=str(tmp_path / "checkpoint-2"),
        policy=options,
        save_strategy="steps",
        save_steps=2,
    )
    assert again.temperature.state() == straight.temperature.state()
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, straight.model.state_dict()[key]), key


@pytest.mark.parametrize("case", STATEFUL)
def test_the_state_does_not_depend_on_accumulation(case, tmp_path):
    name, options = STATEFUL[case]
    one = trained(tmp_path / "one", name, policy=options, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    two = trained(tmp_path / "two", name, policy=options, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    state, other = one.temperature.state(), two.temperature.state()
    numbers = {field for field, value in state.items() if value is not None}
    assert numbers == {field for field, value in other.items() if value is not None}
    for field in numbers:
        assert state[field] == pytest.approx(other[field], rel=2e-3, abs=1e-6), field
