"""The one thing that is asked of a distillation without a teacher, wherever it is asked."""

from __future__ import annotations

from dts_hf.errors import UserError


def check_has_teacher(has_teacher: bool, kd_ratio: float) -> None:
    """Refuse a soft loss that has nobody to learn from.

    Raises:
        UserError: there is no teacher, and ``kd_ratio`` is above 0.
    """
    if not has_teacher and kd_ratio > 0:
        raise UserError(f"teacher: got None with kd_ratio {kd_ratio:g}; labels alone need kd_ratio 0")
