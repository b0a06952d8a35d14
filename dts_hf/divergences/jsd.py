"""Jensen-Shannon divergence with a weight."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from dts_hf.divergences.base import Distributions, Divergence, centred_, check_option, dot
from dts_hf.registry import Between


class JSD(Divergence):
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    As in GKD (arXiv 2306.13649).

    Gradient (1 - beta) q_j (log(q_j / m_j) - KL(q || m)). It tends to 0 at both ends of beta, so the ends are refused
    rather than redefined as a KL: ask for ``forward_kl`` or ``reverse_kl`` by name. beta = 0.5 is the symmetric JSD.

    Args:
        beta: the teacher's weight, between 0 and 1, ends excluded.
    """

    name = "jsd"
    title = "Generalised Jensen-Shannon"
    paper = "arXiv 2306.13649"
    formula = "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q"
    gradient = "(1 - beta) q (log(q / m) - KL(q || m))"
    use = "Bounded, so no token can dominate; the usual choice on text that the student wrote."

    def __init__(self, beta: Annotated[float, Between(0.0, 1.0, "none")] = 0.5) -> None:
        hint = "the divergence is 0 there; for the KL limits use 'forward_kl' or 'reverse_kl'"
        self.beta = check_option(self, "beta", beta, hint=hint)

    def value_and_grad(self, d: Distributions) -> tuple[Tensor, Tensor]:
        log_m = d.mixture(self.beta).log_()
        teacher_kl = dot(d.p.prob, d.p.logits - log_m) - d.p.log_norm.squeeze(-1)
        # d / d log q_j, m included: (1 - beta) q_j (log(q_j / m_j) + 1) - (beta p_j + (1 - beta) q_j) / m_j (1 - beta) q_j.
        # The second fraction is 1, so the last terms cancel: (1 - beta) q_j log(q_j / m_j) is left, to be centred. Row
        # constants leave with that, so the student's log norm is needed in the value alone.
        weighted = log_m.neg_().add_(d.q.logits).mul_(d.q.prob)
        student_kl = weighted.sum(-1) - d.q.log_norm.squeeze(-1)
        value = self.beta * teacher_kl + (1.0 - self.beta) * student_kl
        return value, centred_(weighted, d.q.prob).mul_(1.0 - self.beta)

    def teacher_grad(self, d: Distributions) -> Tensor:
        # The same with p and q, beta and 1 - beta exchanged: m stays what it is.
        weighted = d.mixture(self.beta).log_().neg_().add_(d.p.logits).mul_(d.p.prob)
        return centred_(weighted, d.p.prob).mul_(self.beta)
