"""What a compact teacher cannot serve honestly, refused by name.

It knows each kept token's probability, and of all others their mass, mean logit and variance. Whatever is made of those is
exact or near it: every divergence that weighs a token by its probability, and policies that read the teacher's maximum, mean
and deviation. What asks for single logits of the tail, or for how they go with the student's, would get an answer that is
made up.
"""

from __future__ import annotations

from dts_hf.divergences import Divergence
from dts_hf.divergences.alpha_beta import AlphaBeta
from dts_hf.errors import UserError
from dts_hf.temperature.base import TemperaturePolicy

_INSTEAD = "Cache the teacher's states in full, or use a live teacher"
_POLICIES = {
    "taid": "mixes the teacher's logits with the student's, token by token, and the tail has no single ones",
    "ats": "gives one token another temperature than the rest, so that the tail weighs more than the cache was measured for",
    "adakd": "measures the overlap of two whole distributions, in which the tail counts by the root of its probabilities",
}


def check_served(policy: TemperaturePolicy, divergence: Divergence) -> None:
    """Refuse a policy or a divergence for which rows of a compact cache are not enough.

    Raises:
        UserError: the key, what it asks for, and what to do.
    """
    reason = _POLICIES.get(policy.name)
    if reason is None and policy.reads == "logits":
        reason = "looks at every logit of the teacher"
        if policy.describe().get("range") == "auto":
            reason = "with range 'auto' measures the teacher at 19 temperatures (give t_init and t_min instead)"
    if reason is not None:
        raise UserError(f"temperature: got '{policy.name}' with a compact teacher cache: it {reason}. {_INSTEAD}")
    unweighted = isinstance(divergence, AlphaBeta) and divergence.alpha == divergence.beta == 0.0
    if divergence.name == "logit_mse" or unweighted:
        raise UserError(
            f"loss.divergence: got '{divergence.name}'{' with alpha and beta 0' if unweighted else ''} with a compact "
            "teacher cache: it counts every logit alike, and nearly all of them are in the tail, which has no single ones. "
            f"{_INSTEAD}"
        )
