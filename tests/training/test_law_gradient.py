"""The law of gradients: what the student gets is the derivative of the loss that is reported.

For every temperature policy found x every divergence found x both temperature scalings, through ``DistillationTrainer``:
central differences in float64, in the student's logits, which are here a parameter. Where a policy or a divergence declares
that it holds something constant (``held``), exactly that held form is differentiated, after a check that it has the
reported value: the policy's answer is recorded and given again, a target that holds the student is given as a teacher of
its own, the weights of a divergence are those of tests/support/reference.py at the point itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dts_hf.divergences import DIVERGENCES, Distributions, Divergence, build_divergence
from dts_hf.loss.logged_sums import LogColumns
from dts_hf.temperature import StepStats, temperature_policies
from dts_hf.training.trainer import DistillationTrainer
from tests.support import reference
from tests.support.daily import share_of, shares
from tests.support.recorded import policy_of
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import arguments

V, SHAPE = 12, (2, 5)
STEP = 3e-5  # of the central differences, along directions of length 1: far inside the distance from a kink
KINK = 1e-3  # log p - log q, where |p - q| would change its sign
BOUND = 1e-6

#: Every policy as it comes, and the options that take another way through the loss; the number of steps it has seen.
CASES: dict[str, tuple[str, dict, int]] = {
    **{name: (name, {}, 8) for name in sorted(temperature_policies())},
    "constant_of_two": ("constant", {"value": 1.5, "teacher_value": 3.0}, 1),
    "dts_paper": ("dts", {"rule": "paper"}, 8),
    "dts_code": ("dts", {"rule": "code"}, 8),
    "dts_decoupled": ("dts", {"decoupled": True}, 8),
    "dts_token": ("dts", {"granularity": "token"}, 8),
    "dts_token_paper": ("dts", {"granularity": "token", "rule": "paper", "t_max": 9.0}, 8),
    "dts_token_code": ("dts", {"granularity": "token", "rule": "code", "t_max": 9.0}, 8),
    "dts_token_decoupled": ("dts", {"granularity": "token", "decoupled": True}, 8),
    "dts_sequence": ("dts", {"granularity": "sequence"}, 8),
    "dts_sequence_decoupled": ("dts", {"granularity": "sequence", "decoupled": True}, 8),
    "dts_auto_measuring": ("dts", {"range": "auto", "support_max": 8, "support_min": 4}, 0),
    "dts_auto_measured": ("dts", {"range": "auto", "support_max": 8, "support_min": 4}, 8),
    "dtkd_with_kd": ("dtkd", {"w_kd": 1 / 3, "tau": 3.0}, 8),
    "adakd_inverse": ("adakd", {"c": -0.5, "t_base": 2.0}, 8),
    "adakd_keep": ("adakd", {"keep": 0.5}, 8),
    "adakd_keep_auto": ("adakd", {"keep": "auto", "keep_step": 0.3, "keep_band": 0.001}, 8),
    "ats_argmax": ("ats", {"target": "argmax", "tau_y": 3.0, "tau_rest": 1.5, "value": 2.0}, 1),
    "cist_product": ("cist", {"factor": "product", "rho_t": 3.0, "rho_s": 2.0}, 8),
    "taid_tempered": ("taid", {"value": 2.0}, 8),
    "pocl_ratio_left_alone": ("pocl", {"schedule_kd_ratio": False}, 8),
    "annealing_phase_two": ("annealing", {"phase_share": 0.1}, 8),
    "ctkd_at_one": ("ctkd", {"t_start": 0.5, "t_end": 1.0}, 8),
}
#: Those under which nothing pushes the scale of the student's logits.
SCALE_FREE = {*reference.SCALE_FREE, "cist"}
HEADS = {
    "scaled": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 0.6}),
    "scaled_in_the_model": (CohereConfig, CohereForCausalLM, {"logit_scale": 1.5}),
    "soft_capped": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 6.0, "head_dim": 6}),
}


# --------------------------------------------------------------------------------------------------------- the harness


def model_of_logits(config_class=LlamaConfig, model_class=LlamaForCausalLM, **options):
    """A model whose final states are a parameter ``states``, behind a head that hands them through."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=V, hidden_size=V, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, **options,
    )  # fmt: skip
    model = model_class(config).double().eval()
    model.states = torch.nn.Parameter(torch.zeros(*SHAPE, V, dtype=torch.float64))
    model.model.layers = torch.nn.ModuleList()  # nobody reads what they compute
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(V))
    model.model.norm.register_forward_hook(lambda _, __, output: model.states[: output.shape[0], : output.shape[1]])
    return model


def tokenizer_of_letters():
    vocabulary = {letter: number for number, letter in enumerate("abcdefghijkl"[:V])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="a", eos_token="b", pad_token="b")


class Setup:
    """A trainer whose student's logits can be set, and the losses that it reports for them."""

    def __init__(self, folder, student=None) -> None:
        self.trainer = DistillationTrainer(
            student or model_of_logits(), model_of_logits(), args=arguments(folder), processing_class=tokenizer_of_letters()
        )  # fmt: skip
        self.student, self.teacher = self.trainer.model, self.trainer.teacher.model
        self.student.train()
        labels = torch.tensor([[-100, 3, 0, 7, 2], [-100, -100, 5, 11, 5]])  # the labels of row 2 are 3, so N = 7
        self.batch = {"input_ids": torch.ones(SHAPE, dtype=torch.int64), "labels": labels}
        self.batch["attention_mask"] = torch.ones_like(labels)
        self.labelled = torch.zeros(*SHAPE, 1, dtype=torch.float64)
        self.labelled[:, :-1, 0] = (labels[:, 1:] != -100).double()
        self.answers = torch.zeros(*SHAPE, V, dtype=torch.float64)
        self.answers[:, :-1].scatter_(-1, labels[:, 1:, None].clamp(min=0), 1.0)

    def use(self, name: str, options: dict, steps: int) -> None:
        """A new policy that has gone through ``steps`` optimizer steps with falling gaps."""
        policy = policy_of(name, **options)
        self.trainer.sums.step_meter.reduce(
            self.trainer.accelerator
        )  # of the last policy, which may have observed more or less
        self.trainer.temperature = self.trainer.loss.temperature = policy
        for k in range(steps):
            self.draw(100 + k, sharpness=1.0 + 0.1 * k)
            policy.begin_step(0.08 * k)
            with torch.no_grad():
                self.loss()
            policy.end_step(self.statistics())
        policy.begin_step(0.08 * steps)

    def statistics(self) -> StepStats:
        totals = self.trainer.sums.step_meter.reduce(self.trainer.accelerator)
        mean = {key: value / totals["rows"] for key, value in totals.items()}
        observed = tuple(value / totals["rows"] for value in totals.vectors.get("observed", ()))
        slope = mean.get("temperature_grad", 0.0)
        return StepStats(mean["ce"], mean["teacher_ce"], mean["kd"], totals["rows"], slope, observed)

    def draw(self, seed: int, sharpness: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        for model, scale in ((self.student, sharpness), (self.teacher, 2.0)):
            model.states.data = scale * torch.randn(*SHAPE, V, generator=generator, dtype=torch.float64)
        self.teacher.states.data += 2.0 * self.answers  # the better one, so that gaps act

    def loss(self) -> Tensor:
        """As the Trainer calls it; the result is what it logs as ``loss`` and what it differentiates."""
        return self.trainer.compute_loss(self.student, dict(self.batch), num_items_in_batch=torch.tensor(5))

    def gradient(self) -> tuple[float, Tensor]:
        self.student.states.grad = None
        loss = self.loss()
        loss.backward()
        return loss.item(), self.student.states.grad.clone()

    @torch.no_grad()
    def slope(self, direction: Tensor) -> float:
        """The central difference of the reported loss along ``direction``."""
        point, ends = self.student.states.data, []
        for sign in (1.0, -1.0):
            self.student.states.data = point + sign * STEP * direction
            ends.append(self.loss().item())
        self.student.states.data = point
        return (ends[0] - ends[1]) / (2 * STEP)

    def directions(self, gradient: Tensor) -> list[Tensor]:
        """Half along the gradient and half at random; and one that scales the logits of each row by another factor."""
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(gradient.shape, generator=generator, dtype=torch.float64) * self.labelled
        centred = self.student.states.data - self.student.states.data.mean(-1, keepdim=True)
        radial = centred * torch.rand(*SHAPE, 1, generator=generator, dtype=torch.float64) * self.labelled
        return [unit(unit(gradient) + unit(noise)), unit(radial)]

    def error(self, gradient: Tensor) -> float:
        """How far the differences are from the gradient, relative to its length."""
        length = gradient.norm().item()
        return max(
            abs(self.slope(direction) - (gradient * direction).sum().item()) / length
            for direction in self.directions(gradient)
        )


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


class HeldWeights(Divergence):
    """A divergence of tests/support/reference.py with weights that stay what they were in the first pass."""

    def __init__(self, real: Divergence) -> None:
        self.real, self.weights, self.turn = real, [], None

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        options = {key: value for key, value in self.real.describe().items() if key != "name"}
        p, q = d.p.prob, d.q.prob
        if self.turn is None:
            weight = reference.HELD_WEIGHTS[self.real.name](p, q, **options)
            self.weights.append(weight)
        else:
            weight = self.weights[next(self.turn)]
        return reference.DIVERGENCES[self.real.name](p, q, **options, weight=weight), torch.zeros_like(q)

    def teacher_grad(self, d: Distributions) -> Tensor:
        return torch.zeros_like(d.p.prob)

    def replay(self) -> None:
        self.turn = itertools.cycle(range(len(self.weights)))


class KinkSpy(Divergence):
    """Tells how near the last pass came to p = q."""

    def __init__(self, real: Divergence) -> None:
        self.real, self.nearest = real, float("inf")

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        self.nearest = min(self.nearest, d.log_ratio().abs().min().item())
        return self.real.value_and_grad(d)

    def teacher_grad(self, d: Distributions) -> Tensor:
        return self.real.teacher_grad(d)


@contextmanager
def held_form(setup: Setup) -> Iterator[None]:
    """Within this context what policy and divergence declare as held is what it was at this point."""
    loss, policy, divergence = setup.trainer.loss, setup.trainer.temperature, setup.trainer.loss.divergence
    teacher = setup.teacher.states.data
    if divergence.held is not None:
        loss.divergence = held = HeldWeights(divergence)
        with torch.no_grad():
            setup.loss()
        held.replay()
    if policy.held is not None:
        answers = []
        policy.forward = lambda *given: answers.append(type(policy).forward(policy, *given)) or answers[-1]
        with torch.no_grad():
            setup.loss()
        (answer,) = answers  # all rows in one block
        if answer.teacher_share is not None:
            setup.teacher.states.data = torch.lerp(setup.student.states.data, teacher, answer.teacher_share)
            answer = answer._replace(teacher_share=None)
        policy.forward = lambda *given: answer
    try:
        yield
    finally:
        policy.__dict__.pop("forward", None)
        loss.divergence, setup.teacher.states.data = divergence, teacher


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    return Setup(tmp_path_factory.mktemp("law"))


def draw_away_from_kinks(setup: Setup, divergence: Divergence) -> None:
    """Draw again while a difference could cross a kink; only ``tvd`` has one (what policies hold has none)."""
    for seed in itertools.count(1):
        setup.draw(seed)
        setup.trainer.loss.divergence = spy = KinkSpy(divergence)
        with torch.no_grad():
            setup.loss()
        setup.trainer.loss.divergence = divergence
        if divergence.name != "tvd" or spy.nearest > KINK:
            return


#: Each as it is by default, and what holds something under another option.
FORMS = [*sorted(DIVERGENCES), {"name": "csd", "weights": "student"}]


def combinations() -> Iterator[tuple[Any, str, float]]:
    for number, form in enumerate(FORMS):
        for scaling in ("squared", "none"):
            yield form, scaling, 0.5 if (number + (scaling == "none")) % 2 else 1.0


def prepare(setup: Setup, divergence: Any, scaling: str, ratio: float) -> None:
    loss = setup.trainer.loss
    loss.divergence, loss.temperature_scaling, loss.kd_ratio = build_divergence(divergence), scaling, ratio
    draw_away_from_kinks(setup, loss.divergence)
    setup.trainer.sums.step_meter.reduce(setup.trainer.accelerator)


# --------------------------------------------------------------------------------------------------------------- tests


def test_every_policy_and_every_held_divergence_is_covered():
    assert {name for name, _, _ in CASES.values()} == set(temperature_policies())
    assert {name for name, kind in DIVERGENCES.items() if kind.held} == set(reference.HELD_WEIGHTS)


@shares
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_derivative_of_the_reported_loss(case, share, setup):
    setup.trainer.loss.divergence = build_divergence("forward_kl")
    setup.use(*CASES[case])
    policy, scale_free = setup.trainer.temperature, False
    for divergence, scaling, ratio in share_of([*combinations()], share, [*CASES].index(case)):
        prepare(setup, divergence, scaling, ratio)
        where = f"{case}, {divergence}, {scaling}, kd_ratio {ratio}"
        reported, gradient = setup.gradient()
        totals = setup.trainer.sums.step_meter.reduce(setup.trainer.accelerator)
        used = ratio if policy.kd_ratio is None else policy.kd_ratio
        logged = LogColumns().means(totals)
        parts = (1 - used) * logged["ce_loss"] + used * logged["kd_loss"]
        assert reported == pytest.approx(parts * totals["rows"] / 5, rel=1e-12), where
        with held_form(setup):
            with torch.no_grad():
                assert setup.loss().item() == pytest.approx(reported, rel=1e-12), where
            assert setup.error(gradient) <= BOUND, where
        if case in SCALE_FREE and used == 1.0:
            scale_free = True
            along = (gradient * setup.student.states.data).sum(-1)  # of each row: nothing pushes its scale
            assert along.abs().max() <= 1e-12 * gradient.norm() * setup.student.states.data.norm(), where
    assert scale_free == (case in SCALE_FREE)


def dense_soft_loss(setup: Setup, case: str, scaling: str) -> Tensor:
    """Of each labelled row ``[N]``, from the equations of tests/support/reference.py: what ``kd_loss`` is the mean of."""
    policy, options, targets = setup.trainer.temperature, CASES[case][1], setup.batch["labels"][:, 1:]
    there = targets != -100
    z_s, z_t = (model.states.detach()[:, :-1][there] for model in (setup.student, setup.teacher))
    weight, p = 1.0, None
    if policy.name == "constant":
        t_s, t_t, factor = (torch.tensor(t) for t in (1.5, 3.0, 4.5))
    elif policy.name == "ats":
        t_s, factor = policy.value, torch.tensor(policy.value**2)
        tokens = z_t.argmax(-1) if policy.target == "argmax" else targets[there]
        p = reference.ats_target(z_t, tokens, policy.tau_y, policy.tau_rest)
    elif policy.name == "cist":
        t_s, t_t, factor = reference.cist(z_s, z_t, *policy.heights(V), options.get("factor", "teacher"))
    else:  # adakd: what is kept counts 1 / keep
        log_s = reference.hellinger(reference.softmax(z_t), reference.softmax(z_s)).log()
        t_s = t_t = torch.exp(-0.5 * torch.tanh(log_s - policy.log_median)).unsqueeze(-1)
        factor, weight = t_s**2, (log_s >= policy.selection.log_threshold) / policy.selection.kept
        assert 0 < weight.count_nonzero() < len(weight)
    p = reference.softmax(z_t / t_t) if p is None else p
    soft = weight * reference.forward_kl(p, reference.softmax(z_s / t_s))
    return soft * factor.reshape(-1) if scaling == "squared" else soft


@pytest.mark.parametrize("scaling", ["squared", "none"])
@pytest.mark.parametrize("case", ["constant_of_two", "ats", "ats_argmax", "cist", "cist_product", "adakd_keep"])
def test_the_reported_loss_is_the_dense_one(case, scaling, setup):
    setup.trainer.loss.divergence = build_divergence("forward_kl")
    setup.use(*CASES[case])
    prepare(setup, "forward_kl", scaling, 1.0)
    expected = dense_soft_loss(setup, case, scaling)
    with torch.no_grad():
        assert setup.loss().item() == pytest.approx(expected.sum().item() / 5, rel=1e-12)
    logged = LogColumns().means(setup.trainer.sums.step_meter.reduce(setup.trainer.accelerator))
    assert logged["kd_loss"] == pytest.approx(expected.mean().item(), rel=1e-12)


@pytest.mark.parametrize(("page", "kinds"), [("temperature", temperature_policies()), ("divergences", DIVERGENCES)])
def test_the_pages_say_what_is_held(page, kinds):
    text = (Path(__file__).resolve().parents[2] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for kind in kinds.values():
        assert kind.held is None or (kind.held in text and "Dropped" in kind.held)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "case", ["constant", "norm_kd", "logit_std", "dtkd_with_kd", "dts_token", "ats", "cist", "cist_product"]
)
def test_the_law_holds_under_a_scaled_and_a_soft_capped_head(head, case, tmp_path):
    config_class, model_class, options = HEADS[head]
    setup = Setup(tmp_path, model_of_logits(config_class, model_class, **options))
    setup.use(*CASES[case])
    for divergence, scaling, ratio in (("forward_kl", "squared", 0.5), ("jsd", "none", 1.0), ("todi", "squared", 1.0)):
        prepare(setup, divergence, scaling, ratio)
        reported, gradient = setup.gradient()
        with held_form(setup):
            assert setup.loss().item() == pytest.approx(reported, rel=1e-12)
            assert setup.error(gradient) <= BOUND, (divergence, scaling)


@pytest.mark.parametrize("case", CASES)
def test_a_policy_declares_what_it_holds_and_nothing_else(case, setup):
    """Without the declared constants the gradient is not the derivative: nobody declares for nothing."""
    setup.use(*CASES[case])
    policy = setup.trainer.temperature
    prepare(setup, "forward_kl", "squared", 1.0)
    gradient = setup.gradient()[1]
    if policy.held is None:
        assert setup.error(gradient) <= BOUND
    else:
        assert setup.error(gradient) > 100 * BOUND and type(policy).held == policy.held


@pytest.mark.parametrize("divergence", FORMS, ids=str)
def test_a_divergence_declares_what_it_holds_and_nothing_else(divergence, setup):
    setup.use("constant", {"value": 1.5}, 1)
    prepare(setup, divergence, "squared", 1.0)
    assert (setup.error(setup.gradient()[1]) > 100 * BOUND) == (build_divergence(divergence).held is not None)


def test_the_trainer_logs_the_number_that_it_differentiates(tmp_path):
    returned = []

    class Spy(DistillationTrainer):
        def compute_loss(self, *given, **named):
            returned.append(super().compute_loss(*given, **named))
            return returned[-1]

    rows = [{"id": f"r{i}", "instruction": "Say it", "input": "", "output": "yes " * (1 + i)} for i in range(8)]
    trainer = Spy(
        tiny_llama(seed=0), tiny_llama(seed=1), args=arguments(tmp_path), temperature="norm_kd", kd_ratio=0.9,
        train_dataset=rows, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    (log,) = (log for log in trainer.state.log_history if "kd_loss" in log)
    (loss,) = returned
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert log["loss"] == pytest.approx(0.1 * log["ce_loss"] + 0.9 * log["kd_loss"], rel=1e-5)
