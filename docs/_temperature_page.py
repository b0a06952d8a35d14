"""docs/temperature.md and its figures, made from the policies themselves: their docstrings, options and behaviour."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from pathlib import Path
from types import ModuleType

from _line_chart import Line, chart
from _simulated_run import Curves, simulate
from torch import Tensor

from dts_hf.registry import split_docstring
from dts_hf.temperature import TemperaturePolicy, build_temperature, temperature_policies
from dts_hf.temperature.parts import auto_range, decoupled, dts_rules, gap_source, granularity, token_selection

#: The modules beside a policy's own whose docstrings belong to its section.
PARTS = {"dts": (dts_rules, granularity, decoupled, auto_range, gap_source), "adakd": (token_selection,)}

HEAD = """\
# Temperature policies

<!-- Made by `python docs/generate.py` from the files in dts_hf/temperature/. Do not edit. -->

A recipe names one under `temperature: {name: ..., option: value}`. In the formulas p is the progress (the share of
optimizer steps done) where no distribution is meant, z_s and z_t are the logits of student and teacher, T_s and T_t
their temperatures, and D is the divergence. kd_loss is T_s T_t D unless another factor is given, and D alone under
`temperature_scaling: none`. The gradient that the student gets is the derivative of the loss that is reported; what a
policy reads from the student's logits and holds constant in it stands under **Held constant**, with the force that this
drops. The other policies hold nothing (tests/training/test_law_gradient.py).

**Cost** counts passes over the vocabulary on top of `constant`. **The figures** are no measurements: every policy, at its
default options, goes through the same invented run (`replay` repeats that of `dts`), in which the gap falls from 2.5 to
0.2 nats and the student's logits come closer to the teacher's. They show the shape, not the size to expect. Which policy
is better is a question for your own runs, with `constant` beside them. To add one: [add_a_policy.md](add_a_policy.md).

| policy | temperature | paper |
|---|---|---|
"""

GUIDE = """\

## Controls

A policy that reacts to training changes three things at once: the level of T, the shape of its schedule, and when T
moves. One control tells one of them apart. RUN is the run directory of a finished run of the policy under test;
`training.logging_steps: 1` there records each step (otherwise a step is replayed by the mean of its log line, with a
warning).

| run beside it | has of RUN | its question |
|---|---|---|
| `{name: constant, value: T}`, T swept | nothing | Is a schedule needed at all? |
| `{name: cosine}`, same t_init and t_min | the curve | What does the gap add, its higher mean T included? |
| `{name: cosine, match_mean_of: RUN}` | the mean T | Is it more than a hotter cosine? |
| `{name: replay, run: RUN}`, another seed or student | T at each step | Must T come from this very run? |
| `{name: dts, gap_source: {replay: RUN, order: permuted}}` | each gap, as often | Does it matter when a gap acts? |
| the same with `order: blocks` | and its neighbours | The same, with noise as correlated as it was. |

With `order: recorded` (the default) the gaps act as they came: `dts` with the gap of another run, its own range or rule.

A permutation keeps the gaps, not the mean T: it plays large gaps late, where the cosine is low and a gap counts. In an
invented run (gap from 8 to 0.3 nats, 20 % noise, [3, 1], 1,000 steps, 8 seeds) the mean T is

| measured | permuted | blocks | cosine | cosine with `match_mean_of` |
|---|---|---|---|---|
| 2.02 | 2.20 | 2.19 | 1.76 | 2.02 (t_init 3.58) |

so put `match_mean_of` beside it before you speak of timing. The former `gap_source: shuffled` drew each gap from the
steps so far: 484 of 1,000 gaps were ever used, 35 % of the draws fell on the first tenth of the run, and the mean T was
2.36, further from `measured` than the plain cosine is. It is refused.

The recorded run must have as many optimizer steps as the one that replays it (`match_mean_of`: any number); another length
is refused before training, because neither the gaps nor the trace would be the same any more. What is replayed is read
once, by the first process, and kept in every checkpoint: a resume goes on exactly when RUN has changed or is gone.

## The options of dts

`granularity: token` keeps the tokens warm on which the student is behind (`adakd` argues for the opposite), by one sampled
label each; `sequence` does so by example, with less noise. `decoupled: true` where student and teacher differ in confidence
(other families, very different sizes) and you do not need the student's own at T = 1: see
[below](#what-decoupled-costs). `range: auto` where nothing is known of the teacher's logits: it asks for
[tokens on offer](#tokens-on-offer) instead of temperatures.

## Tokens on offer

The effective support, exp of the teacher's mean entropy at T, is how many tokens its targets spread over. On SmolLM2-135M-
Instruct (49,152 tokens, 40 rows of the quickstart):

| T | 1 | 1.26 | 1.59 | 2 | 2.52 | 3.17 |
|---|---|---|---|---|---|---|
| tokens | 4.7 | 16 | 131 | 1,389 | 7,760 | 19,183 |

The two defaults of `dts` contradict each other there. `range: manual` starts at T = 3, where the teacher offers about
17,000 tokens; `range: auto` asks for 50 and 10 tokens, which is [1.44, 1.17], nearly a constant. The first follows the
papers' language-model ranges, the second is our guess; neither was validated, and `auto` was not shown to equal a tuned
range. It exchanges two temperatures for two supports, measured in one step and on the teacher alone (an 8-row first step
puts t_max anywhere from 1.36 to 1.52). `dts-hf doctor` prints the support at t_init and t_min for your teacher and rows,
the log has `effective_support`.

`range: auto` is refused for two classes and for a support that is not below the vocabulary (before training), and for any
support that the teacher does not reach between T = 1/4 and 16 (after the first step, or by the doctor): its end of the
range would be 1/4 or 16, and with both out of reach the run would silently be a constant.

## What decoupled costs

`decoupled: true` makes k_s / T_s = k_t / T_t, and with it most of the teacher's scale leaves the soft loss: the student
comes out less confident at T = 1. Seen in a toy (a student too small for its teacher, fresh data), compared with
`constant` at 2: held-out KL at T = 1 of 1.95 against 1.76 nats with kd_ratio 0.5, and 2.12 against 1.86 with 0.9; the
standard deviation of the student's logits 1.16 against 2.94, the teacher's being 5.7; the same first choices. No language
model was measured. It matters where answers are sampled at T = 1, as the ROUGE-L protocol of the papers does, and not
where they are greedy. Compare with `constant` and `teacher_value`, a fixed T_s and T_t.
"""


def temperature_page() -> str:
    policies = temperature_policies()
    table = "".join(
        f"| [`{name}`](#{name}) | {_cell(kind.formula)} | {kind.paper or ''} |\n" for name, kind in policies.items()
    )
    return HEAD + table + GUIDE + "".join(_section(name, kind) for name, kind in policies.items())


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
        *_background(inspect.getmodule(kind)),
        f"**When to use it.** {kind.use}\n",
        *([f"**Held constant.** {kind.held}\n"] if kind.held else []),
        f"**Cost.** {kind.cost[0].upper()}{kind.cost[1:]}.\n",
        f"**Paper.** {_paper_link(kind.paper)}\n",
    ]
    return "\n".join(parts) + _options(kind, options) + "".join(_part(module) for module in PARTS.get(name, ()))


def _part(module: ModuleType) -> str:
    """What a module says that a policy is built of, under its first words."""
    title = re.split(r"[:,.]", inspect.getdoc(module) or "")[0]
    return "\n".join([f"\n### {title.replace('``', '`')}\n", *_background(module)]).rstrip() + "\n"


def _background(module: ModuleType | None) -> list[str]:
    """What a file says beyond its first sentence, where it says more; tables as they stand there."""
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


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _value(value: object) -> str:
    """As a recipe writes it: YAML for the values that options have."""
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _policy(name: str) -> TemperaturePolicy:
    """At its default options; what repeats a run repeats the figure of ``dts``."""
    if name != "replay":
        return build_temperature(name)
    curves = simulate(build_temperature("dts"), every=1)
    lines = [
        {"kind": "train", "step": step, "temperature": student.item(), "teacher_temperature": teacher.item()}
        for step, (student, teacher) in enumerate(zip(curves.student, curves.teacher, strict=True), start=1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (Path(folder) / "metrics.json").write_text(json.dumps({"training": {"steps": len(lines)}}), encoding="utf-8")
        policy = build_temperature(name, run=folder)
        policy.begin_run()
    return policy


def _figure(name: str) -> str:
    curves = simulate(_policy(name))
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
