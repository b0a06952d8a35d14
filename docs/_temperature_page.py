"""docs/temperature.md and its figures, made from the policies themselves: their docstrings, options and behaviour."""

from __future__ import annotations

import inspect
import re

from _line_chart import Line, chart
from _simulated_run import Curves, simulate
from torch import Tensor

from dts_hf.temperature import TemperaturePolicy, build_temperature, temperature_policies

HEAD = """\
# Temperature policies

<!-- Made by `python docs/generate.py` from the files in dts_hf/temperature/. Do not edit. -->

A recipe names one under `temperature: {name: ..., option: value}`. In the formulas p is the progress (the share of
optimizer steps done) where no distribution is meant, z_s and z_t are the logits of student and teacher, T_s and T_t
their temperatures, and D is the divergence. kd_loss is T_s T_t D unless another factor is given, and D alone under
`temperature_scaling: none`. The gradient that the student gets is the derivative of the loss that is reported; what a
policy reads from the student's logits and holds constant in it stands under **Held constant**, with the force that this
drops. The other policies hold nothing (tests/test_law_gradient.py).

**Cost** counts passes over the vocabulary on top of `constant`. **The figures** are no measurements: every policy, at its
default options, goes through the same invented run, in which the gap falls from 2.5 to 0.2 nats and the student's logits
come closer to the teacher's. They show the shape, not the size to expect. Which policy is better is a question for your
own runs, with `constant` beside them. To add one: [add_a_policy.md](add_a_policy.md).

| policy | temperature | paper |
|---|---|---|
"""


def temperature_page() -> str:
    policies = temperature_policies()
    table = "".join(
        f"| [`{name}`](#{name}) | {_cell(kind.formula)} | {kind.paper or ''} |\n" for name, kind in policies.items()
    )
    return HEAD + table + "".join(_section(name, kind) for name, kind in policies.items())


def figure_name(name: str) -> str:
    return f"temperature_{name}.svg"


def temperature_figures() -> dict[str, str]:
    """File name -> SVG for every policy."""
    return {figure_name(name): _figure(name) for name in temperature_policies()}


def _section(name: str, kind: type[TemperaturePolicy]) -> str:
    about, options = split_docstring(inspect.getdoc(kind) or "")
    parts = [
        f"\n## {name}\n",
        f"![T over a run under {name}](figures/{figure_name(name)})\n",
        f"`{kind.formula}`\n",
        about + "\n",
        *_background(kind),
        f"**When to use it.** {kind.use}\n",
        *([f"**Held constant.** {kind.held}\n"] if kind.held else []),
        f"**Cost.** {kind.cost[0].upper()}{kind.cost[1:]}.\n",
        f"**Paper.** {_paper_link(kind.paper)}\n",
    ]
    return "\n".join(parts) + _options(kind, options)


def _background(kind: type[TemperaturePolicy]) -> list[str]:
    """What the file says beyond its first sentence, where it says more; tables as they stand there."""
    module = inspect.getmodule(kind)
    rest = (inspect.getdoc(module) or "").partition("\n\n")[2].strip() if module else ""
    blocks = [
        f"```text\n{block}\n```" if block.startswith("===") else block.replace("``", "`")
        for block in rest.split("\n\n")
    ]
    return ["\n\n".join(blocks) + "\n"] if rest else []


def _paper_link(paper: str | None) -> str:
    if paper is None:
        return "None."
    number = re.fullmatch(r"arXiv (\d{4}\.\d{5})", paper)
    return f"[{paper}](https://arxiv.org/abs/{number[1]})." if number else f"{paper}."


def _options(kind: type[TemperaturePolicy], described: dict[str, str]) -> str:
    parameters = inspect.signature(kind).parameters
    if not parameters:
        return "\nNo options.\n"
    rows = "".join(
        f"| `{option}` | {_value(parameter.default)} | {_cell(described.get(option, ''))} |\n"
        for option, parameter in parameters.items()
    )
    return f"\n| option | default | meaning |\n|---|---|---|\n{rows}"


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """A class docstring as (markdown of what stands before ``Args:``, option -> meaning)."""
    about, _, args = text.replace("``", "`").partition("\nArgs:\n")
    options: dict[str, str] = {}
    names: list[str] = []
    for line in args.splitlines():
        start = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            options |= dict.fromkeys(names, start[2])
        elif line.strip():
            options |= {name: f"{options[name]} {line.strip()}" for name in names}
    return about.strip(), options


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(value: object) -> str:
    """As a recipe writes it: YAML for the values that options have."""
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _figure(name: str) -> str:
    curves = simulate(build_temperature(name))
    title = f"{name}: {{}} over an invented run, default options"
    if curves.shares is not None:
        return chart(
            [Line("teacher's share t (T stays as it is)", curves.shares)], "t", title.format("teacher's share")
        )
    return chart(_lines(curves), "T", title.format("temperature"))


def _lines(curves: Curves) -> list[Line]:
    if curves.student.shape == curves.teacher.shape and bool((curves.student == curves.teacher).all()):
        return [_line("T", curves.student)]
    return [_line("T_s", curves.student), _line("T_t", curves.teacher)]


def _line(label: str, values: Tensor) -> Line:
    mean = values.mean(-1).tolist()
    if values.shape[-1] == 1:
        return Line(label, mean)
    return Line(label, mean, values.amin(-1).tolist(), values.amax(-1).tolist())
