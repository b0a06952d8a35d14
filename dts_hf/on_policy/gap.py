"""The gap in training on the student's own text: what a temperature that follows it can be told there.

On text y ~ q the mean of student CE - teacher CE is -KL(q || p), which is never positive: not how far the student is behind
on given answers, but how far it is from its teacher, with the other sign. A rule that follows the gap would move T the wrong
way. So it is held there (``gap_on: data``), or measured against the teacher's first choices (``teacher_argmax``).
"""

from __future__ import annotations

import logging

from dts_hf.divergences import Divergence
from dts_hf.errors import UserError
from dts_hf.on_policy.settings import OnPolicySettings
from dts_hf.temperature import TemperaturePolicy

logger = logging.getLogger(__name__)


def check_gap(policy: TemperaturePolicy, divergence: Divergence, settings: OnPolicySettings) -> None:
    """Say what the policy is told of steps on the student's own text, and refuse what cannot be.

    Raises:
        UserError: pseudo-labels would change the loss; or a range that is solved on the rows of the data has none.
    """
    if settings.gap_on == "teacher_argmax":
        if divergence.reads_targets:
            raise UserError(
                f"on_policy.gap_on: got 'teacher_argmax', but the divergence '{divergence.name}' reads the token of the "
                "text itself; expected gap_on 'data', or another divergence"
            )
        logger.info("temperature: on the student's own text the teacher's first choices are the labels of the gap")
        return
    if policy.any_text:
        return
    logger.info("temperature: steps on the student's own text are not told to '%s', which holds there", policy.name)
    if settings.first_fraction < 1 or settings.end_fraction not in (None, 1):
        return
    if policy.describe().get("range") == "auto":
        raise UserError(
            "on_policy.gap_on: got 'data' with fraction 1 and temperature.range 'auto', which is solved on the data's rows; "
            "expected gap_on 'teacher_argmax', a fraction below 1, or range 'manual'"
        )
    logger.warning(
        "on_policy: every step is on the student's own text, so '%s' follows its schedule alone; gap_on 'teacher_argmax' or "
        "temperature.gap_source held_out give it a gap", policy.name,
    )  # fmt: skip
