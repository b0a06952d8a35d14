"""Dense ground truth, written from the papers' equations in float64 with autograd, and sharing no code with the package.

One row = one labelled position. Everything is at full size [N, V]; nothing here is meant to be fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(z: Tensor) -> Tensor:
    e = torch.exp(z - z.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, cap: float | None = None
) -> Tensor:
    z = torch.einsum("nh,vh->nv", states, weight)
    if bias is not None:
        z = z + bias
    z = z * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * torch.log(p / q)).sum(-1)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return (q * torch.log(q / p)).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)


def symmetric_kl(p: Tensor, q: Tensor, weight: float) -> Tensor:
    return (1 - weight) * forward_kl(p, q) + weight * reverse_kl(p, q)


def skew_kl(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    return forward_kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse_kl(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    return forward_kl(q, (1 - alpha) * p + alpha * q)


def tvd(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2


def akl_weight(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """w of adaptive KL; all V^2 comparisons: mass of the tokens strictly above each one."""
    above = ((p.unsqueeze(-2) > p.unsqueeze(-1)) * p.unsqueeze(-2)).sum(-1)
    gap = (p - q).abs()
    return (gap * (above < mu)).sum(-1) / gap.sum(-1)


def adaptive_kl(p: Tensor, q: Tensor, mu: float, weight: Tensor | None = None) -> Tensor:
    """``weight`` is w, held constant at its value here when left out."""
    w = akl_weight(p, q, mu).detach() if weight is None else weight
    return w * forward_kl(p, q) + (1 - w) * reverse_kl(p, q)


def alpha_beta(p: Tensor, q: Tensor, alpha: float, beta: float) -> Tensor:
    a, b = alpha, beta
    if a == b == 0:
        return (torch.log(p / q) ** 2).sum(-1) / 2
    if b == 0:
        return (p**a * torch.log(p**a / q**a) - p**a + q**a).sum(-1) / a**2
    if a == 0:
        return (q**b * torch.log(q**b / p**b) - q**b + p**b).sum(-1) / b**2
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return -terms.sum(-1) / (a * b)


def todi_weight(p: Tensor, q: Tensor) -> Tensor:
    return torch.sigmoid(torch.log(p / q))


def todi(p: Tensor, q: Tensor, weight: Tensor | None = None) -> Tensor:
    """``weight`` is w, held constant at its value here when left out."""
    w = todi_weight(p, q).detach() if weight is None else weight
    return (w * p * torch.log(p / q) + (1 - w) * q * torch.log(q / p)).sum(-1)


def dkd_terms(p: Tensor, q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD, row by row."""
    tckd, nckd = [], []
    for p_row, q_row, y in zip(p, q, targets.tolist()):
        b_t, b_s = (torch.stack([x[y], 1 - x[y]]) for x in (p_row, q_row))
        rest = torch.arange(len(p_row)) != y
        tckd.append(forward_kl(b_t, b_s))
        nckd.append(forward_kl(p_row[rest] / (1 - p_row[y]), q_row[rest] / (1 - q_row[y])))
    return (torch.stack(tckd), torch.stack(nckd)) if tckd else (p.sum(-1), p.sum(-1))


def dkd(p: Tensor, q: Tensor, targets: Tensor, alpha: float, beta: float) -> Tensor:
    tckd, nckd = dkd_terms(p, q, targets)
    return alpha * tckd + beta * nckd


def logit_mse(p: Tensor, q: Tensor) -> Tensor:
    z_t, z_s = torch.log(p), torch.log(q)  # logits up to a shift, which centring takes out
    return ((z_s - z_s.mean(-1, keepdim=True) - z_t + z_t.mean(-1, keepdim=True)) ** 2).mean(-1)


def csd_weight(p: Tensor, q: Tensor, weights: str = "teacher") -> Tensor:
    return p if weights == "teacher" else q


def csd(p: Tensor, q: Tensor, weights: str = "teacher", weight: Tensor | None = None) -> Tensor:
    """All pairs, one by one; ``weight`` is w, q held constant at its value here when left out."""
    w = csd_weight(p, q, weights) if weight is None else weight
    w = w.detach() if weight is None and weights == "student" else w
    d = torch.log(q / p)  # u - u_t up to a shift
    pairs = (d.unsqueeze(-1) - d.unsqueeze(-2)) ** 2
    return (w.unsqueeze(-1) * w.unsqueeze(-2) * pairs).sum((-1, -2)) / 2


def eopd(
    p: Tensor, q: Tensor, entropy: float = 0.8, weight: float = 1.0, mode: str = "add", at_one: Tensor | None = None
) -> Tensor:
    """``at_one`` is the teacher at T = 1; p itself when left out."""
    sure = p if at_one is None else at_one
    unsure = (-(sure * torch.log(sure)).sum(-1) > entropy).to(p.dtype)
    beside = 1 - unsure if mode == "switch" else 1
    return beside * reverse_kl(p, q) + unsure * weight * forward_kl(p, q)


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "tvd": tvd,
    "alpha_beta": alpha_beta,
    "dkd": dkd,
    "todi": todi,
    "logit_mse": logit_mse,
    "csd": csd,
    "eopd": eopd,
}

#: The weights that a divergence holds constant, by its options.
HELD_WEIGHTS = {"adaptive_kl": akl_weight, "todi": todi_weight, "csd": csd_weight}


def divergence(
    name: str, p: Tensor, q: Tensor, targets: Tensor, options: dict[str, float], at_one: Tensor | None = None
) -> Tensor:
    """``at_one`` is the teacher at T = 1, where p is not."""
    more = {"at_one": at_one} if name == "eopd" else {}
    return DIVERGENCES[name](p, q, *([targets] if name == "dkd" else []), **options, **more)


def distillation_loss(
    z_s: Tensor,
    z_t: Tensor,
    targets: Tensor,
    name: str,
    options: dict[str, float],
    temperature_student: Tensor | float,
    temperature_teacher: Tensor | float,
    kd_ratio: float,
    squared: bool,
    normalizer: float,
) -> Tensor:
    """sum over rows of (1 - r) CE + r T_s T_t D(softmax(z_t / T_t), softmax(z_s / T_s)), over the normalizer."""
    ce = -torch.log(softmax(z_s)[torch.arange(len(targets)), targets])
    t_s, t_t = (
        torch.as_tensor(temperature_student, dtype=z_s.dtype),
        torch.as_tensor(temperature_teacher, dtype=z_s.dtype),
    )
    d = divergence(name, softmax(z_t / t_t), softmax(z_s / t_s), targets, options, softmax(z_t))
    factor = (t_s * t_t).reshape(-1) if squared else torch.ones((), dtype=z_s.dtype)
    return ((1 - kd_ratio) * ce + kd_ratio * factor * d).sum() / normalizer


def dual_space_loss(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    to_student: Tensor,
    to_teacher: Tensor,
    name: str,
    options: dict[str, float],
    temperature: float,
    squared: bool,
    normalizer: float,
    held: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """KD in the student's space + CE of the projected teacher + KD in the teacher's space; DSKD.

    A model is (states, weight of its head, targets). ``held``: the projected teacher's logits that are the target in the
    student's space, and the student's head behind the projector, both of which get no gradient; None: as they are here.
    """
    (h_s, w_s, y_s), (h_t, w_t, y_t) = student, teacher
    target, head = ((h_t @ to_student @ w_s.T).detach(), w_s.detach()) if held is None else held
    soft = (name, options, temperature, temperature)
    here = distillation_loss(h_s @ w_s.T, target, y_s, *soft, 1.0, squared, normalizer)
    there = distillation_loss(h_s @ to_teacher @ w_t.T, h_t @ w_t.T, y_t, *soft, 1.0, squared, normalizer)
    projected = softmax(h_t @ to_student @ head.T)[torch.arange(len(y_s)), y_s]
    return here + there - torch.log(projected).sum() / normalizer


def logit_std(z_s: Tensor, z_t: Tensor, value: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """z-scores over the vocabulary, divided by ``value`` (arXiv 2403.01427): T_s, T_t and the factor, with their graph."""
    return value * z_s.std(-1, keepdim=True), value * z_t.std(-1, keepdim=True), torch.tensor(value**2).to(z_s)


def norm_kd(z_s: Tensor, z_t: Tensor, t_norm: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """arXiv 2308.00520, as the port that comes with BiLD."""
    t_t = t_norm * z_t.std(-1, keepdim=True)
    return t_norm * z_s.std(-1, keepdim=True), t_t, t_t**2


def max_logit(z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """arXiv 2503.09030, with one T per token from the teacher's largest z-score."""
    t = ((z_t - z_t.mean(-1, keepdim=True)) / z_t.std(-1, keepdim=True)).max(-1, keepdim=True).values
    return t * z_s.std(-1, keepdim=True), t * z_t.std(-1, keepdim=True), t**2


#: Policies whose T_s is made of z_s and differentiated.
SCALE_FREE = {"logit_std": logit_std, "norm_kd": norm_kd, "max_logit": max_logit}


def height(z: Tensor) -> Tensor:
    """[N, 1], max - mean."""
    return z.max(-1, keepdim=True).values - z.mean(-1, keepdim=True)


def cist(
    z_s: Tensor, z_t: Tensor, rho_t: float, rho_s: float, factor: str = "teacher"
) -> tuple[Tensor, Tensor, Tensor]:
    """arXiv 2605.20357, our reading, with its graph: T_s, T_t and the factor."""
    t_s, t_t = height(z_s) / rho_s, height(z_t) / rho_t
    return t_s, t_t, t_s * t_t if factor == "product" else t_t * height(z_t) / rho_s


def ats_target(z_t: Tensor, tokens: Tensor, tau_y: float, tau_rest: float) -> Tensor:
    """softmax of centred logits, each divided by its own tau (arXiv 2210.04427)."""
    tau = torch.full_like(z_t, tau_rest)
    for row, token in enumerate(tokens.tolist()):
        tau[row, token] = tau_y
    return softmax((z_t - z_t.mean(-1, keepdim=True)) / tau)


def dts_trajectory(
    rule: str, progresses: list[float], gaps: list[float], t_init: float, t_min: float, t_max: float, momentum: float
) -> list[float]:
    """Temperatures in force at each step (DTS Eq. 4-8); ``gaps[k]`` is measured during step k and acts at step k + 1."""
    out = [t_init]
    for k in range(1, len(progresses)):
        s = (1 + math.cos(math.pi * progresses[k])) / 2
        gap = gaps[k - 1]
        if rule == "gap":
            a = gap / (1 + gap) if gap > 0 else 0.0
            target = t_init * (s + (1 - s) * a)
        elif rule == "paper":
            a = gap / (gap + 1 + 1e-8)
            target = t_init * s * (a if a > 1 else 1.0)
        else:
            a = -gap / (-gap + 1 + 1e-4)
            a = 1.35 if a > 2 else a
            target = t_init * s * (a if a > 1 else 1.0)
        target = t_max if target > t_max else t_min if target < t_min else target
        out.append(momentum * out[-1] + (1 - momentum) * target)
    return out


def dts_row_temperatures(
    rule: str,
    progresses: list[float],
    row_gaps: list[float],
    t_init: float,
    t_min: float,
    t_max: float,
    momentum: float,
) -> list[float]:
    """Temperatures of the rows in the last of the steps at ``progresses``: DTS with the momentum on its schedule."""
    smooth = 1.0
    for progress in progresses[1:]:
        smooth = momentum * smooth + (1 - momentum) * (1 + math.cos(math.pi * progress)) / 2
    out = []
    for gap in row_gaps:
        target = t_init * smooth
        if rule == "gap" and gap > 0:
            target = t_init * (smooth + (1 - smooth) * gap / (1 + gap))
        elif rule == "paper" and gap / (gap + 1 + 1e-8) > 1:
            target *= gap / (gap + 1 + 1e-8)
        elif rule == "code" and -gap / (-gap + 1 + 1e-4) > 1:
            alpha = -gap / (-gap + 1 + 1e-4)
            target *= 1.35 if alpha > 2 else alpha
        out.append(t_max if target > t_max else t_min if target < t_min else target)
    return out


def sharpness_ratio(z_s: Tensor, z_t: Tensor) -> Tensor:
    """[N], k_s / k_t with k = max - mean over the vocabulary, held in [1/4, 4]."""
    k_s, k_t = ((z - z.mean(-1, keepdim=True)).max(-1).values for z in (z_s, z_t))
    return torch.clamp(k_s / k_t, 0.25, 4.0)


def hellinger(p: Tensor, q: Tensor) -> Tensor:
    """sqrt(sum (sqrt p - sqrt q)^2) / sqrt 2 (AdaKD, Eq. 4): 0 for equal distributions, 1 for disjoint ones."""
    return (p.sqrt() - q.sqrt()).square().sum(-1).sqrt() / math.sqrt(2)


def taid_shares(
    progresses: list[float], losses: list[float], t_start: float, alpha: float, beta: float
) -> list[float]:
    """The teacher's share in force at each step (TAID, Algorithm 1); ``losses[k]`` is measured during step k."""
    out, momentum = [t_start + (1 - t_start) * progresses[0]], 0.0
    for k in range(1, len(progresses)):
        step = 0.0
        if k > 1:  # the first change of the loss is known after two steps
            change = max((losses[k - 2] - losses[k - 1]) / (losses[k - 2] + 1e-15), -10.0)
            momentum = beta * momentum + (1 - beta) * change
            step = alpha / (1 + math.exp(-momentum)) * (1 - out[-1])
        out.append(min(1.0, max(t_start + (1 - t_start) * progresses[k], out[-1] + step)))
    return out


def adam(gradients: list[float], rates: list[float], betas: tuple[float, float]) -> list[float]:
    """The parameter after each step of Adam that ADDS its update (ascent), from 0, with a rate for each step."""
    x, m, v, out = 0.0, 0.0, 0.0, []
    for k, (g, rate) in enumerate(zip(gradients, rates), 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        x += rate * (m / (1 - betas[0] ** k)) / ((v / (1 - betas[1] ** k)) ** 0.5 + 1e-8)
        out.append(x)
    return out
