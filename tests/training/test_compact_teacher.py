"""Training on rows of a compact teacher, through ``DistillationTrainer``, against the dense distribution they stand for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from dts_hf.divergences import DIVERGENCES
from dts_hf.errors import UserError
from dts_hf.temperature import temperature_policies
from tests.support import reference
from tests.support.compact import CompactedTeacher, rebuilt
from tests.support.recorded import policy_of
from tests.support.tiny import TINY_VOCAB, tiny_llama
from tests.support.trainers import largest_difference, step_gradients, trainer_for

K, R = 24, 0.7
D = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}}


def models():
    student, teacher = tiny_llama(seed=0).double(), tiny_llama(seed=1, layers=3).double()
    for model in (student, teacher):  # flat enough to have a tail at every temperature
        model.model.norm.weight.data *= 0.5
    return student, teacher


def trainer_of(folder, divergence, temperature, top_k=K, packing=False, **options):
    student, teacher = models()
    compact = CompactedTeacher(teacher, top_k)
    trainer = trainer_for(
        folder, student, compact, divergence={"name": divergence, **D.get(divergence, {})}, temperature=temperature,
        kd_ratio=R, packing=packing, **options,
    )  # fmt: skip
    return trainer, compact


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def dense_gradients(trainer, batch, divergence, temperature, top_k=K):
    """Loss and gradients of (1 - r) CE + r T^2 D, all of it dense, by autograd; from the logits that the teacher gave."""
    student = trainer.model
    student.zero_grad()
    labels = batch["labels"]
    keys = ("input_ids", "position_ids", "attention_mask")
    inputs = {key: batch[key] for key in keys if key in batch}  # packed rows are told apart by their positions
    kept = labels[:, 1:] != -100
    z_s = student(**inputs, use_cache=False).logits[:, :-1][kept]
    targets = labels[:, 1:][kept]
    p = rebuilt(trainer.teacher.asked[0], targets, top_k, temperature)
    soft = reference.DIVERGENCES[divergence](p, reference.softmax(z_s / temperature), **D.get(divergence, {}))
    hard = -torch.log_softmax(z_s, -1).gather(-1, targets[:, None])[:, 0]
    loss = ((1 - R) * hard + R * temperature**2 * soft).mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("divergence", D)
def test_loss_and_gradient_are_those_of_the_rebuilt_distribution(tmp_path, divergence, temperature, packing):
    trainer, _ = trainer_of(tmp_path, divergence, temperature, packing=packing)
    batch = first_batch(trainer)
    gradients = step_gradients(trainer, [dict(batch)])
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count).item()
    expected, dense = dense_gradients(trainer, batch, divergence, temperature)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert largest_difference(gradients, dense) < 1e-6
    whole, _ = dense_gradients(trainer, batch, divergence, temperature, top_k=TINY_VOCAB)
    assert abs(whole - expected) > 1e-4  # something is lost in the tail, so what is compared is not the live loss


@pytest.mark.parametrize(
    ("divergence", "temperature"),
    [*itertools.product(D, [0.5, 1.0, 4.0]), *(("forward_kl", name) for name in ("dts", "dtkd", "norm_kd", "ctkd"))],
)
def test_with_every_token_kept_it_is_the_live_teacher(tmp_path, divergence, temperature):
    compact, _ = trainer_of(tmp_path / "compact", divergence, temperature, top_k=TINY_VOCAB)
    student, teacher = models()
    live = trainer_for(
        tmp_path / "live", student, teacher, divergence={"name": divergence, **D[divergence]},
        temperature=temperature, kd_ratio=R,
    )  # fmt: skip
    batch = first_batch(live)
    one, other = (step_gradients(trainer, [dict(batch)]) for trainer in (compact, live))
    assert largest_difference(one, other) < 1e-6
    sums = [trainer.sums.step_meter.reduce(trainer.accelerator) for trainer in (compact, live)]
    for name, value in sums[1].items():
        assert sums[0][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


#: Per-row temperatures, ones that are made of the teacher's logits, a second term, and one that learns.
POLICIES = {
    "dts_token": ("dts", {"granularity": "token"}),
    "dts_sequence_decoupled": ("dts", {"granularity": "sequence", "decoupled": True}),
    "dtkd_with_kd": ("dtkd", {"w_kd": 0.5, "tau": 2.0}),
    "logit_std": ("logit_std", {}),
    "norm_kd": ("norm_kd", {}),
    "max_logit": ("max_logit", {}),
    "cist": ("cist", {}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_see_what_they_would_see_of_the_live_teacher(tmp_path, name):
    """Temperatures are made of label cross-entropies, maxima, means and deviations, which are all exact."""
    kind, options = POLICIES[name]
    compact, _ = trainer_of(tmp_path / "compact", "forward_kl", {"name": kind, **options})
    student, teacher = models()
    live = trainer_for(tmp_path / "live", student, teacher, temperature={"name": kind, **options}, kd_ratio=R)
    batch, found = first_batch(live), []
    for trainer in (compact, live):
        trainer.temperature.begin_step(0.4)
        step_gradients(trainer, [dict(batch)])
        found.append(trainer.sums.step_meter.reduce(trainer.accelerator))
    names = [
        "temperature",
        "teacher_temperature",
        "temperature_min",
        "temperature_max",
        "teacher_ce",
        "teacher_entropy",
    ]
    for each in [*names, "student_entropy_at_t", "top1_agreement"]:
        assert found[0][each] == pytest.approx(found[1][each], rel=1e-5), each
    assert found[0]["kd"] != pytest.approx(found[1]["kd"], rel=1e-6)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "logit_mse"])
def test_every_divergence_and_a_temperature_that_learns_follow_the_reported_loss(tmp_path, divergence):
    """CTKD's slope by central differences: the tail's logits move with T otherwise than the others."""
    trainer, _ = trainer_of(tmp_path, divergence, "constant")
    batch, step, reported = first_batch(trainer), 1e-5, []
    trainer.model.train()
    for delta in (0.0, step, -step):
        trainer.loss.temperature = policy_of("ctkd", t_start=1.7 + delta, t_end=1.7)
        with torch.no_grad():
            trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1))
        reported.append(trainer.sums.step_meter.reduce(trainer.accelerator))
    slope = (reported[1]["kd"] - reported[2]["kd"]) / (2 * step)
    assert reported[0]["temperature_grad"] == pytest.approx(slope, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("temperature", "divergence", "words"),
    [
        ("taid", "forward_kl", ["'taid'", "mixes"]),
        ("adakd", "forward_kl", ["'adakd'", "overlap"]),
        ("ats", "forward_kl", ["'ats'", "one token"]),
        ({"name": "dts", "range": "auto", "support_max": 8, "support_min": 4}, "forward_kl", ["'auto'", "t_init"]),
        (1.0, "logit_mse", ["'logit_mse'", "every logit alike"]),
        (1.0, {"name": "alpha_beta", "alpha": 0.0, "beta": 0.0}, ["alpha and beta 0"]),
    ],
)
def test_what_needs_single_logits_of_the_tail_is_refused_by_name(tmp_path, temperature, divergence, words):
    student, teacher = models()
    with pytest.raises(UserError) as refused:
        trainer_for(tmp_path, student, CompactedTeacher(teacher, K), temperature=temperature, divergence=divergence)
    assert all(word in str(refused.value) for word in [*words, "Cache the teacher's states"])


def test_the_page_names_what_is_held_constant_in_the_gradient():
    """Of policies and divergences that a compact cache serves; what is held is measured in test_law_gradient.py."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if "the gradient is the derivative" in line]
    kinds = {**temperature_policies(), **DIVERGENCES}
    held = {name for name, kind in kinds.items() if kind.held is not None} - {"taid", "adakd"}  # refused
    assert held and all(f"`{name}`" in line for name in held), held
