"""The laws of a step, for every family of ``families.py`` and through ``DistillationTrainer``: identity and dense.

``pytest tests/training/test_families.py -s`` prints what was measured; ``docs/models.md`` says what was required.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM, PreTrainedModel, TrainingArguments

from dts_hf.data.collators import PaddedCollator
from dts_hf.divergences import DIVERGENCES
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.head import output_module
from dts_hf.temperature import temperature_policies
from dts_hf.training.trainer import DistillationTrainer
from tests.support import reference
from tests.support.daily import share_of, shares
from tests.support.families import FAMILIES, LAYERS, VOCAB
from tests.support.recorded import record
from tests.support.tiny import tiny_tokenizer

LENGTHS = (5, 11, 8, 9)
TRAINED = {name: family for name, family in FAMILIES.items() if family.trains}
PACKED = {name: family for name, family in TRAINED.items() if family.packs}


@functools.cache
def a_run_of_one_temperature() -> str:
    """A finished run of two steps at T = 2, of student and teacher."""
    return record(
        Path(tempfile.mkdtemp()) / "run",
        {"temperature": [2.0] * 2, "teacher_temperature": [2.0] * 2, "gap": [0.7] * 2},
    )


#: Ways to set up each policy that have T_student = T_teacher where the logits are equal, and the teacher as the target.
#: TAID's target is a mix of teacher and student, which is the teacher where the two are equal: it obeys the law as well.
SAME_TEMPERATURE: dict[str, list[dict[str, Any]]] = {
    "constant": [{"value": 3.0}],  # with a teacher_value the temperatures differ
    "linear": [{}],
    "cosine": [{}, {"match_mean_of": a_run_of_one_temperature}],
    "dts": [
        *({"rule": rule, "granularity": g} for rule in ("paper", "code", "gap") for g in ("batch", "sequence", "token")),
        {"gap_source": {"replay": a_run_of_one_temperature, "order": "permuted"}},
        {"decoupled": True},
        {"decoupled": True, "granularity": "token"},
        {"range": "auto", "support_max": 40.0, "support_min": 10.0},
    ],
    "dtkd": [{}, {"w_kd": 0.5}],
    "ctkd": [{}],
    "adakd": [{}, {"keep": 0.5}],
    "ats": [{"tau_y": 3.0, "tau_rest": 3.0, "value": 3.0}],  # else the label has a temperature of its own
    "cist": [{}, {"factor": "product"}],
    "pocl": [{"schedule_kd_ratio": False}],  # its own kd_ratio would bring the labels in
    "logit_std": [{}],
    "norm_kd": [{}],
    "max_logit": [{}],
    "taid": [{"value": 2.0}],
    "replay": [{"run": a_run_of_one_temperature}],
}  # fmt: skip
#: The others, and why the law does not speak of them.
OTHER_TEMPERATURE = {
    "annealing": "T_teacher is 1 / Phi while T_student is 1",
}


#: Each of them, of every policy.
WAYS = [(policy, options) for policy, variants in SAME_TEMPERATURE.items() for options in variants]


def specification(policy: str, options: dict[str, Any]) -> dict[str, Any]:
    """A temperature of ``SAME_TEMPERATURE``, with the folder of the recorded run where it names one."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(entry) for key, entry in value.items()}
        return value() if callable(value) else value

    return {"name": policy, **filled(options)}


def rows() -> list[dict[str, Any]]:
    """Tokenised rows of different lengths; a prompt of two tokens, and in the last row a hole in the labels."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for length in LENGTHS:
        ids = torch.randint(4, VOCAB, (length,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [IGNORE_INDEX] * 2 + ids[2:]})
    made[-1]["labels"][4] = IGNORE_INDEX
    return made


def trainer_for(folder: Any, student: nn.Module, teacher: nn.Module, **options: Any) -> DistillationTrainer:
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=len(LENGTHS), disable_tqdm=True,
        per_device_eval_batch_size=len(LENGTHS), save_strategy="no", max_steps=1, logging_steps=1, seed=3,
    )  # fmt: skip
    options = {"temperature": 2.0, "train_dataset": rows(), "eval_dataset": rows(), **options}
    return DistillationTrainer(student, teacher, args=args, processing_class=tiny_tokenizer(), **options)


def step(trainer: DistillationTrainer) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training step, formed as ``train`` does it: its loader, its count, its ``training_step``."""
    model: Any = trainer.model
    model.zero_grad()
    trainer.temperature.begin_run(2)
    trainer.temperature.begin_step(0.4)
    batch = next(iter(trainer.get_train_dataloader()))
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    loss = trainer.training_step(model, batch, count)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def sharpen(model: PreTrainedModel, factor: float = 60.0) -> PreTrainedModel:
    """Multiply what comes out of the output layer: a trained model's logits are that far apart, and a soft-cap then acts."""
    with torch.no_grad():
        for parameter in (output_module(model).weight, getattr(output_module(model), "bias", None)):
            if parameter is not None:
                parameter.mul_(factor)
    return model


# ------------------------------------------------------------------------------------------------------------ identity


@pytest.mark.parametrize("sharp", [False, True], ids=["plain", "sharp"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_copy_of_the_teacher_has_neither_kl_nor_gap(tmp_path: Any, name: str, sharp: bool) -> None:
    teacher = TRAINED[name].build()
    teacher = sharpen(teacher) if sharp else teacher
    found = trainer_for(tmp_path, copy.deepcopy(teacher), teacher).evaluate()
    print(
        f"identity | {name} | {'sharp' if sharp else 'plain'} | KL {found['eval_kl']:.1e} | gap {found['eval_gap']:.1e}"
    )
    assert abs(found["eval_kl"]) <= 1e-6 and abs(found["eval_gap"]) <= 1e-6
    assert found["eval_teacher_ce"] > 0.5  # it says something: the labels are not all foreseen


@shares
@pytest.mark.parametrize("name", TRAINED)
def test_a_copy_of_the_teacher_has_no_kd_gradient(tmp_path: Any, name: str, share: int) -> None:
    """For every policy. kd_ratio 1: what is left of the gradient is measured against that of the labels alone."""
    family = TRAINED[name]
    teacher = family.build(dtype=torch.float64)
    student = copy.deepcopy(teacher)
    labels_alone = norm(step(trainer_for(tmp_path, student, teacher, kd_ratio=0.0))[1])
    worst = 0.0
    for policy, options in share_of(WAYS, share, [*TRAINED].index(name)):
        trainer = trainer_for(tmp_path, student, teacher, kd_ratio=1.0, temperature=specification(policy, options))
        _, gradients = step(trainer)
        left = norm(gradients) / labels_alone
        worst = max(worst, left)
        assert left <= 1e-10, (policy, options, left)
    print(f"identity | {name} | largest KD gradient over that of the labels {worst:.1e}")


@shares
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_divergence_has_a_gradient_at_the_teacher(tmp_path: Any, divergence: str, share: int) -> None:
    teacher = FAMILIES["Gemma 2"].build(dtype=torch.float64)
    student = copy.deepcopy(teacher)
    labels_alone = norm(step(trainer_for(tmp_path, student, teacher, kd_ratio=0.0))[1])
    for policy, options in share_of(WAYS, share, [*DIVERGENCES].index(divergence)):
        temperature = specification(policy, options)
        trainer = trainer_for(
            tmp_path, student, teacher, kd_ratio=1.0, temperature=temperature, divergence=divergence
        )  # fmt: skip
        loss, gradients = step(trainer)
        assert abs(loss.item()) <= 1e-10 and norm(gradients) / labels_alone <= 1e-10, (policy, options)


def test_the_law_of_identity_speaks_of_every_policy() -> None:
    assert not set(SAME_TEMPERATURE) & set(OTHER_TEMPERATURE)
    assert set(SAME_TEMPERATURE) | set(OTHER_TEMPERATURE) == set(temperature_policies())


def norm(gradients: dict[str, Tensor]) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


# --------------------------------------------------------------------------------------------------------------- dense


def dense(student: PreTrainedModel, teacher: PreTrainedModel, t: float, kd_ratio: float) -> Tensor:
    """The loss of the same rows, each alone in its batch: logits of the whole models, and autograd."""
    z_s, z_t, targets = [], [], []
    for row in rows():
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row["labels"])[1:]
        mask = labels != IGNORE_INDEX
        z_s.append(student(input_ids=ids, use_cache=False).logits[0, :-1][mask])
        with torch.no_grad():
            z_t.append(teacher(input_ids=ids, use_cache=False).logits[0, :-1][mask])
        targets.append(labels[mask])
    wide = [torch.cat(z).double() for z in (z_s, z_t)]
    every = torch.cat(targets)
    return reference.distillation_loss(*wide, every, "forward_kl", {}, t, t, kd_ratio, True, len(every))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_equals_dense_autograd(tmp_path: Any, name: str, packing: bool) -> None:
    """Loss, and the gradient of every parameter, measured against the largest entry of all of them."""
    if packing and name not in PACKED:
        pytest.skip("refused: tests/models/test_packed_attention.py")
    family = TRAINED[name]
    student, teacher = family.build(0, torch.float64), family.build(1, torch.float64)
    trainer = trainer_for(
        tmp_path, student, teacher, kd_ratio=0.4, packing=packing, logits_budget_mb=0.05,
        temperature={"name": "dts", "t_init": 2.5, "t_max": 3.0},
    )  # fmt: skip
    loss, gradients = step(trainer)
    student.zero_grad()
    student.train()
    expected = dense(student, teacher, trainer.temperature.temperature, 0.4)
    expected.backward()
    wanted = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys() and len(wanted) > LAYERS
    size = max(float(grad.abs().max()) for grad in wanted.values())
    apart = max(float((gradients[key] - grad).abs().max()) for key, grad in wanted.items()) / size
    difference = abs(loss.item() / expected.item() - 1.0)
    bound = 1e-9 if family.inside == "float64" else 1e-6
    print(f"dense | {name} | {'packed' if packing else 'padded'} | loss {difference:.1e} | gradient {apart:.1e}")
    assert difference <= bound and apart <= bound


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.trains])
def test_a_refused_family_is_refused_as_the_page_says(tmp_path: Any, name: str, role: str) -> None:
    models: dict[str, nn.Module] = {"student": FAMILIES["LLaMA"].build(), "teacher": FAMILIES["LLaMA"].build(1)}
    models[role] = FAMILIES[name].build()
    with pytest.raises(UserError, match=f"^{role}: {FAMILIES[name].class_name} {FAMILIES[name].note}"):
        trainer_for(tmp_path, models["student"], models["teacher"])


# ------------------------------------------------------------------------------------------- the router's auxiliary loss

#: Families whose own training loss has one, if ``output_router_logits`` says so.
ROUTED = ("Mixtral", "Qwen3-MoE", "OLMoE", "gpt-oss", "Jamba")
AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def batch_of(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("name", ROUTED)
def test_the_routers_loss_is_added_as_the_model_does(tmp_path: Any, name: str) -> None:
    """kd_ratio 0: transformers' own loss of the same padded batch, value and gradients; logged; left out on request."""
    student = FAMILIES[name].build(**AUX)
    trainer = trainer_for(tmp_path, student, FAMILIES[name].build(1), kd_ratio=0.0)
    loss, gradients = step(trainer)
    student.zero_grad()
    inputs = {key: value for key, value in batch_of(trainer).items() if key != "row_id"}
    output = student(**inputs)
    output.loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-6)
    wanted = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys()
    assert (
        max(float((gradients[key] - wanted[key]).norm() / wanted[key].norm().clamp(min=1e-6)) for key in wanted) < 1e-4
    )

    sums = trainer.sums.step_meter.reduce(trainer.accelerator)
    assert sums["aux"] / sums["rows"] == pytest.approx(output.aux_loss.item(), rel=1e-5)
    without, _ = step(trainer_for(tmp_path, student, FAMILIES[name].build(1), kd_ratio=0.0, router_aux_loss="none"))
    assert loss.item() - without.item() == pytest.approx(0.5 * output.aux_loss.item(), rel=1e-4)


def test_the_routers_loss_is_logged_and_stays_out_of_held_out_losses(tmp_path: Any) -> None:
    family, seen = FAMILIES["Mixtral"], {}
    for coefficient in (0.5, 0.0):
        student = family.build(output_router_logits=True, router_aux_loss_coef=coefficient)
        trainer = trainer_for(tmp_path, student, family.build(1))
        held_out = trainer.evaluate()
        trainer.train()
        assert "eval_aux_loss" not in held_out
        seen[coefficient] = held_out["eval_loss"], trainer.state.log_history
    assert seen[0.5][0] == seen[0.0][0]
    first = next(entry for entry in seen[0.5][1] if "aux_loss" in entry)
    parts = 0.5 * first["ce_loss"] + 0.5 * first["kd_loss"]
    assert first["loss"] == pytest.approx(parts + 0.5 * first["aux_loss"], rel=1e-4)


def test_neither_padding_nor_dummy_rows_nor_packing_move_the_routers_loss(tmp_path: Any) -> None:
    student = FAMILIES["Mixtral"].build(dtype=torch.float64, **AUX)
    teacher = FAMILIES["Mixtral"].build(1, torch.float64)
    trainer = trainer_for(tmp_path, student, teacher)
    examples = [trainer.train_dataset[index] for index in range(len(LENGTHS))]
    dummy = trainer.without_label(examples[0])
    packer = trainer_for(tmp_path, student, teacher, packing=True).data_collator
    padder = trainer.data_collator
    batches = {
        "plain": padder(examples),
        "padded wider": PaddedCollator(3, pad_to_multiple_of=32)(examples),
        "with dummy rows": padder([*examples, dummy, dummy]),
        "packed": packer(examples),
        "packed with dummy rows": packer([*examples, dummy, dummy]),
    }
    losses = {}
    for kind, batch in batches.items():
        student.train()
        count = trainer._get_num_items_in_batch([batch], trainer.args.device)
        losses[kind] = trainer.compute_loss(student, dict(batch), num_items_in_batch=count).item()
    assert all(loss == pytest.approx(losses["plain"], rel=1e-6) for loss in losses.values()), losses


def test_micro_batches_share_the_routers_loss_by_their_labels(tmp_path: Any) -> None:
    """Two micro-batches of the same rows: each has the loss of the whole, so half of it each, and not twice as much."""
    student, teacher = (
        FAMILIES["Mixtral"].build(dtype=torch.float64, **AUX),
        FAMILIES["Mixtral"].build(1, torch.float64),
    )
    trainer = trainer_for(tmp_path, student, teacher)
    batch = batch_of(trainer)
    student.train()
    once = trainer._get_num_items_in_batch([batch], trainer.args.device)
    whole = trainer.compute_loss(student, dict(batch), num_items_in_batch=once).item()
    halves = [trainer.compute_loss(student, dict(batch), num_items_in_batch=2 * once).item() for _ in range(2)]
    assert sum(halves) == pytest.approx(whole, rel=1e-9)


def test_a_routers_loss_without_a_graph_is_refused(tmp_path: Any) -> None:
    student = FAMILIES["Mixtral"].build(**AUX)
    student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    student.enable_input_require_grads()
    with pytest.raises(UserError, match="router_aux_loss: nothing is left of the graph"):
        step(trainer_for(tmp_path, student, FAMILIES["Mixtral"].build(1)))
    student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    step(trainer_for(tmp_path, student, FAMILIES["Mixtral"].build(1)))


@pytest.mark.parametrize("name", ["DeepSeek-V3", "LLaMA"])
def test_a_model_that_asks_for_a_routers_loss_and_adds_none_gets_none(tmp_path: Any, name: str) -> None:
    student = FAMILIES[name].build()
    student.config.output_router_logits = True
    trainer = trainer_for(tmp_path, student, FAMILIES[name].build(1), kd_ratio=0.0)
    loss, _ = step(trainer)
    inputs = {key: value for key, value in batch_of(trainer).items() if key != "row_id"}
    assert trainer.router is None and loss.item() == pytest.approx(student(**inputs).loss.item(), rel=1e-6)


def test_a_routers_loss_that_is_not_known_is_refused(tmp_path: Any) -> None:
    class Doubled(MixtralForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.aux_loss = None if output.aux_loss is None else 2 * output.aux_loss
            return output

    student, teacher = Doubled(FAMILIES["Mixtral"].configuration(**AUX)), FAMILIES["Mixtral"].build(1)
    with pytest.raises(UserError, match=r"router_aux_loss: Doubled .* expected router_aux_loss 'none'"):
        trainer_for(tmp_path, student, teacher)
    assert trainer_for(tmp_path, student, teacher, router_aux_loss="none").router is None
    with pytest.raises(UserError, match="router_aux_loss: got 'off', expected 'model' or 'none'"):
        trainer_for(tmp_path, FAMILIES["LLaMA"].build(), FAMILIES["LLaMA"].build(1), router_aux_loss="off")
