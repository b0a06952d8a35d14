"""docs/divergences.md, from the words that the classes carry; ``python docs/generate.py`` writes it."""

from __future__ import annotations

import inspect

from dts_hf.divergences import DIVERGENCES, Divergence

#: The order of reading; a divergence that is not named here comes last.
ORDER = ("forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "todi", "eopd",
         "csd", "dkd")  # fmt: skip

HEAD = """# Divergences

<!-- Written by docs/generate.py from the classes in dts_hf/divergences; edit those. -->

What the student is pulled by: `loss.divergence` in a recipe, a name (`reverse_kl`) or a name with options
(`{name: jsd, beta: 0.1}`). Each is a class in [dts_hf/divergences](../dts_hf/divergences); its docstring says more.

p is the teacher, q the student, both at their temperature: q = softmax(u) with u = z_s / T_s, p = softmax(u_t) with
u_t = z_t / T_t. Sums run over the vocabulary (V entries), logarithms are natural. The gradient is the one with respect to
u; the loss multiplies value and gradient by T_s T_t or the policy's own factor (`temperature_scaling: squared`) and
applies 1 / T_s.
"""

NOTES = """## Notes

- **Which one?** Start with `forward_kl` and a small sweep over a fixed T. A T above 1 helps forward KL most
  ([arXiv 2606.00306](https://arxiv.org/abs/2606.00306)); the best fixed T reported for reverse KL is 0.61
  ([AdaKD](https://arxiv.org/abs/2510.11615)). Compare divergences at the T that suits each, not at one T.
- **Values of different divergences are not comparable**, nor is a "KD loss" of another code base that leaves out the
  teacher's entropy. `kl` in the log is forward KL at T = 1 whatever the divergence: compare runs by that.
- **End points are honest.** `jsd` tends to 0 at both ends of beta, so the ends are refused; they are not redefined as a
  KL. `skew_kl` with alpha 0 and `alpha_beta` with an exponent of 0 are true limits.
- **Everything else is differentiated**, the mixtures of `jsd` and the skew divergences too: the gradient is that of the
  formula. A temperature that learns (`ctkd`) follows the reported value, with the weights moving too.
- **The head of `adaptive_kl`** is the shortest run of the teacher's tokens that holds at least `mu`: the token that crosses
  `mu` is in it (in AdaKD's copy of the method it is not), and equal probabilities enter together.
- **`tvd` has a kink** where p = q: its gradient does not fade out as the student comes close. Where p and q differ by
  rounding alone the signs, and so the gradient, are noise of full size: a student that starts as a copy of its teacher is
  moved by it.
- **`alpha_beta` with both exponents 0** is unbounded like the square of a log ratio, and its gradient adds up log ratios
  over the whole vocabulary: in fp16 it overflows where logits are in the thousands, and the loss scaler skips the step.
- **`csd`** is the quadratic part of a KL: T^2 KL(p || q), T^2 KL(q || p) and half of T^2 `csd` agree to second order in
  z_s - z_t. So T says which differences of logits count, and the two KLs differ the less the nearer the student is.
- **`logit_mse`** is no divergence of distributions: it is the squared distance of centred logits, for Annealing-KD.
- **Underflow.** Logarithms of p and q come from the logits, so a probability that is 0 in float32 is handled as what it
  is. Logits of minus infinity are not supported: the loss is then non-finite.
"""


HELD = """## Held constant

The gradient is the derivative of the value that is reported, except where a line says so here
(tests/training/test_law_gradient.py):

"""


def divergences_page() -> str:
    """The whole page."""
    known = [name for name in ORDER if name in DIVERGENCES]
    names = known + [name for name in DIVERGENCES if name not in known]
    table = [
        ["Divergence", "Options", "Formula", "Gradient", "When to use it", "Paper"],
        ["---"] * 6,
        *(_row(DIVERGENCES[name]) for name in names),
    ]
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    held = "".join(f"- **`{name}`**: {DIVERGENCES[name].held}\n" for name in names if DIVERGENCES[name].held)
    return f"{HEAD}\n{rows}\n\n{HELD}{held}\n{NOTES}"


def _row(kind: type[Divergence]) -> list[str]:
    options = ", ".join(
        f"`{option.name}` = {_said(option.default)}" for option in inspect.signature(kind).parameters.values()
    )
    identifier = kind.paper.removeprefix("arXiv ")
    return [
        f"`{kind.name}`<br>{kind.title}",
        options or "none",
        _code(kind.formula),
        _code(kind.gradient),
        kind.use,
        f"[{kind.paper}](https://arxiv.org/abs/{identifier})",
    ]


def _code(formula: str) -> str:
    """In a table a bar ends the cell, even within backquotes."""
    return "`" + formula.replace("|", "\\|") + "`"


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
