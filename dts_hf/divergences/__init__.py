"""Divergences between teacher and student, one family a file. ``build_divergence`` finds them by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dts_hf.divergences.base import Distribution, Distributions, Divergence, dot
from dts_hf.divergences.jsd import JSD
from dts_hf.divergences.kl import ForwardKL, ReverseKL
from dts_hf.registry import build, classes_beside

__all__ = [
    "DIVERGENCES",
    "JSD",
    "Distribution",
    "Distributions",
    "Divergence",
    "ForwardKL",
    "ReverseKL",
    "build_divergence",
    "dot",
]

#: Every divergence in this folder by its name: a new one is a new file here, and nothing else is edited.
DIVERGENCES: dict[str, type[Divergence]] = classes_beside(__name__, __path__, Divergence)


def build_divergence(spec: str | Mapping[str, Any] | Divergence) -> Divergence:
    """Build a divergence from a name or ``{"name": "jsd", "beta": 0.5}``.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    if isinstance(spec, Divergence):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    return build(DIVERGENCES, name, options, name_key="loss.divergence", key="loss.divergence")
