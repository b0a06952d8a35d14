"""One small problem for the loss, every policy it can meet, and a policy that has been through some steps of it."""

from __future__ import annotations

import torch

from dts_hf.loss.distillation_loss import DistillationLoss
from dts_hf.models.head import Head
from dts_hf.temperature import StepStats, temperature_policies
from tests.support.recorded import policy_of

V, N, H_S, H_T = 23, 29, 5, 7
# Every policy as it comes, and those whose options take another way through the loss.
POLICIES = {
    **{name: (name, {}) for name in sorted(temperature_policies())},
    "dts_per_sequence": ("dts", {"granularity": "sequence"}),
    "dts_per_token": ("dts", {"granularity": "token", "decoupled": True}),
    "logit_std_softer": ("logit_std", {"value": 3.0}),
    "norm_kd_softer": ("norm_kd", {"t_norm": 2.0}),
    "dtkd_with_kd": ("dtkd", {"w_kd": 1 / 3, "tau": 3.0}),
    "dtkd_with_kd_at_one": ("dtkd", {"w_kd": 0.5, "tau": 1.0}),
    "adakd_inverse": ("adakd", {"c": -0.5, "t_base": 2.0}),
    "adakd_keep": ("adakd", {"keep": 0.4}),
    "ats_argmax": ("ats", {"target": "argmax", "tau_y": 3.0, "tau_rest": 1.5, "value": 2.0}),
    "cist_product": ("cist", {"factor": "product", "rho_t": 3.0, "rho_s": 2.0}),
    "taid_tempered": ("taid", {"value": 2.0}),
    "annealing_phase_two": ("annealing", {"phase_share": 0.1}),
    "constant_of_two": ("constant", {"value": 1.5, "teacher_value": 3.0}),
    "ctkd_at_one": ("ctkd", {"t_start": 0.5, "t_end": 1.0}),
}


def problem(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "states": make(N, H_S).requires_grad_(),
        "weight": (1.5 * make(V, H_S)).requires_grad_(),
        "bias": (make(V) - 5.0).requires_grad_(),
        "teacher_states": make(N, H_T),
        "teacher_weight": make(V, H_T),
        "targets": torch.randint(0, V, (N,), generator=generator),
    }


def leaves(data):
    return [data[name] for name in ("states", "weight", "bias")]


def fused(loss, data, rows: slice = slice(None), normalizer: float = N):
    head, teacher_head = (
        Head(data["weight"], data["bias"], logit_scale=0.9, softcap=12.0),
        Head(data["teacher_weight"]),
    )
    sequences = torch.arange(N) // 4
    return loss(
        data["states"][rows], head, data["teacher_states"][rows], teacher_head, data["targets"][rows], normalizer,
        sequences=sequences[rows] if loss.temperature.needs_sequence_gap else None,
    )  # fmt: skip


def in_chunks_of(rows: int | None) -> float:
    """The budget, MiB, that gives chunks of so many float64 rows."""
    return 256 if rows is None else (rows + 0.5) * 2 * 8 * V / 2**20


def started(name, options, progress: float = 0.3):
    """A policy that has seen two optimizer steps of this problem, so that what it learns from them is in force."""
    policy, data = policy_of(name, **options), problem(seed=7)
    for k in range(2):
        policy.begin_step(progress * k / 2)
        policy.end_step(step_stats(fused(DistillationLoss(temperature=policy), data).sums))
    policy.begin_step(progress)
    return policy


def step_stats(sums) -> StepStats:
    mean = {name: value / N for name, value in sums.items()}
    observed = tuple(mean["observed"].tolist()) if "observed" in mean else ()
    grad = float(mean.get("temperature_grad", 0.0))
    return StepStats(float(mean["ce"]), float(mean["teacher_ce"]), float(mean["kd"]), N, grad, observed)
