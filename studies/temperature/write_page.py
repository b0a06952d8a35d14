"""Writes RESULTS.md and its figures from results/: the same bytes on every machine.

python studies/temperature/write_page.py            write them
python studies/temperature/write_page.py --check    write nothing; exit 1 when they are not up to date
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "docs")]

from _line_chart import Line, chart  # noqa: E402
from run_stage import collected, study  # noqa: E402

from dts_hf.experiments.families import MOST_UNEQUAL, critical_value, detectable, dunnett, loadings_of  # noqa: E402
from dts_hf.experiments.intervals import Difference  # noqa: E402
from dts_hf.experiments.verdicts import digits_of, verdict  # noqa: E402

LEAST_SEEDS = 3
OF_DTS = "`dts` against what replays it"
#: What a family asks.
WHY = {
    OF_DTS: (
        "With the same numbers for gaps but not at their time (`permuted`, and `blocks` of two steps) it is the timing that",
        "is missing; with the temperatures of another seed's run (`replay`) the feedback; with the `cosine` of the same",
        "mean all but how hot it is on average.", "",
    ),
}  # fmt: skip
#: The kinds whose loss is an endpoint: good at it by construction.
BY_CONSTRUCTION = {("kl", "forward KL, T = 1"), ("reverse_kl", "reverse KL, T = 1")}
CORNERS = tuple(f"{name}, T = {t}" for name in ("forward KL", "reverse KL") for t in (2, 1))
#: Of stage C, as a kind's name has it.
DEEP = ", 20 layers"
TUNED = (", teacher fine-tuned for 1 epoch", ", teacher fine-tuned for 10 epochs")
#: A family of stage C, and the endpoints that do not themselves change with the teacher.
OF_TEACHERS, ANY_TEACHER = "A fine-tuned teacher against the one as it comes", ("ce", "ece", "entropy")
#: What recipe.yaml has, and a kind's name leaves out.
USUAL_LAYERS, USUAL_RATE = 12, 8e-4
NAMES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL"}


class Stage:
    """The collected runs of a stage, by kind and seed.

    Args:
        name: of the stage.
        about: its part of ``study.yaml``.
    """

    def __init__(self, name: str, about: Mapping[str, Any]) -> None:
        self.name, self.about = name, about
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        self.failed: list[str] = []
        found = sorted(collected(name), key=lambda run: (_order(run["settings"]), run["seed"]))
        for run in found:
            kind = name_of(run["settings"])
            if run["failed"]:
                self.failed.append(f"{kind}, seed {run['seed']}: {run['failed']}")
            else:
                self.runs.setdefault(kind, {})[run["seed"]] = run

    @property
    def seeds(self) -> list[int]:
        """Those that every kind has."""
        return sorted(set.intersection(*(set(of_kind) for of_kind in self.runs.values()))) if self.runs else []

    @property
    def is_whole(self) -> bool:
        """Whether every kind has the least number of seeds."""
        return len(self.seeds) >= LEAST_SEEDS

    def scores(self, kind: str, endpoint: str, own: Sequence[int] = ()) -> list[float]:
        """Of every seed that all kinds have, then of those in ``own``; empty where one has no such number."""
        seeds = [*self.seeds, *(seed for seed in own if seed in self.runs[kind] and seed not in self.seeds)]
        values = [self.runs[kind][seed]["scores"].get(endpoint) for seed in seeds]
        return [] if None in values else values

    def families(self, usual: str) -> list[tuple[str, str, list[str]]]:
        """Title, baseline and other kinds of each family of comparisons, of those that have runs.

        Args:
            usual: the baseline of stage A.
        """
        kinds = list(self.runs)
        if self.name == "B":
            constants = [kind for kind in kinds if ", T = " in kind]
            control = next((kind for kind in constants if "learning rate" not in kind), "")
            of_dts = [kind for kind in kinds if kind.endswith(" seed")]
            dts = next((kind for kind in kinds if kind.endswith(", dts")), "")
            policies = [kind for kind in kinds if kind not in constants and ("cosine" in kind or kind not in of_dts)]
            found = [
                ("Policies against the best constant", control, policies),
                (OF_DTS, dts, of_dts),
                ("The constant at other learning rates", control, [kind for kind in constants if kind != control]),
            ]
        elif self.name == "C":
            sides = ("", DEEP, *TUNED)
            found = [(f"T = 2 against T = 1{side}", f"{usual}{side}", [f"{usual[:-1]}2{side}"]) for side in sides]
            found += [(OF_TEACHERS, usual, [f"{usual}{tuned}" for tuned in TUNED])]
        else:
            found = [(f"Against {usual.replace(', T', ' at T')}", usual, [kind for kind in kinds if kind != usual])]
        return [
            (title, base, [kind for kind in others if kind in kinds])
            for title, base, others in found
            if base in kinds and set(others) & set(kinds)
        ]


def name_of(settings: Mapping[str, Any]) -> str:
    """A kind, for people; what all of stage A have alike is left out."""
    if not settings.get("loss.kd_ratio"):
        return "labels alone"
    divergence = NAMES.get(str(settings["loss.divergence.name"]), str(settings["loss.divergence.name"]))
    policy = settings["temperature.name"]
    if policy == "constant":
        layers, rate = settings.get("student.init.layers") or (), settings.get("training.learning_rate", USUAL_RATE)
        depth = f", {len(layers)} layers" if len(layers) not in (0, USUAL_LAYERS) else ""
        beside = f", learning rate {rate:g}" if rate != USUAL_RATE else ""
        epochs = settings.get("teacher.epochs")
        beside += f", teacher fine-tuned for {epochs} epoch{'s' * (epochs > 1)}" if epochs else ""
        return f"{divergence}, T = {float(settings['temperature.value']):g}{depth}{beside}"
    order = settings.get("temperature.gap_source.order")
    of_runs = [
        value for key, value in sorted(settings.items()) if key.startswith("temperature.") and key.endswith(" of")
    ]
    other = f" of {of_runs[0]}" if of_runs else ""
    return f"{divergence}, {policy}{f', gaps {order}' if order else ''}{other}"


def _order(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    value = settings.get("temperature.value") or 0.0
    return (
        not settings.get("loss.kd_ratio"),
        str(settings.get("loss.divergence.name")),
        float(value),
        name_of(settings),
    )


class Family:
    """One endpoint of a family of comparisons; the control of stage B has more seeds than the others.

    Args:
        stage: its runs.
        endpoint: as the scores call it.
        about: its part of ``study.yaml``.
        baseline: the kind that the others are compared with.
        kinds: those.

    Attributes:
        means: of each kind that has the endpoint, the score of every run; empty where one has no such number.
        verdicts: of each kind but the baseline, the difference and what is said of it.
    """

    def __init__(
        self, stage: Stage, endpoint: str, about: Mapping[str, Any], baseline: str, kinds: Sequence[str]
    ) -> None:
        more = stage.about.get("control_seeds", ())
        self.baseline, self.means = baseline, {
            kind: stage.scores(kind, endpoint, more if kind == baseline else ())
            for kind in stage.runs
            if kind in (baseline, *kinds)
        }  # fmt: skip
        if not all(self.means.values()):
            self.means = {}
            return
        base, others = self.means[baseline], {kind: own for kind, own in self.means.items() if kind != baseline}
        self.dunnett = dunnett(base, others)
        self.margin = margin_of(about, statistics.fmean(base))
        self.digits = digits_of(self.margin) + 1
        self.higher = None if about.get("neither") else bool(about.get("higher"))
        loadings = loadings_of(len(base), [len(one) for one in others.values()])
        self.verdicts = {}
        for kind, values in others.items():
            found = pooled_difference(base, values, self.dunnett.sd, self.means)
            self.verdicts[kind] = found, verdict(
                found, self.margin, run_sd=self.dunnett.sd, critical=critical_value(loadings, found.df),
                higher_is_better=self.higher, digits=self.digits,
            )  # fmt: skip


def table(stage: Stage, endpoint: str, about: Mapping[str, Any], baseline: str, kinds: Sequence[str]) -> list[str]:
    """One endpoint of a family of a stage, a line a kind."""
    family = Family(stage, endpoint, about, baseline, kinds)
    if not family.means:
        return []
    digits, higher, means = family.digits, family.higher, family.means
    best = (max if higher else min)(statistics.fmean(values) for values in means.values())
    unit = f", {about['unit']}" if "unit" in about else ""
    lines = [
        f"### {about['name']}{unit}", "",
        "| kind | mean ± sd | difference | 95 % for all together | p | verdict | best with |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]  # fmt: skip
    for kind, values in means.items():
        mean, mark = statistics.fmean(values), " (its own loss)" if (endpoint, kind) in BY_CONSTRUCTION else ""
        shown = f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"
        wins = sum(_is_best(means, kind, place, higher) for place in range(len(stage.seeds)))
        cells = ["", "", "", "the baseline" if kind == baseline else ""]
        if kind != baseline:
            found, said = family.verdicts[kind]
            ends = " to ".join(f"{end:+.{digits}f}" for end in said.interval)
            p = family.dunnett.comparisons[kind].p
            small = f"{p:.3f}" if p >= 0.0005 else "< 0.001"
            cells = [f"{found.mean:+.{digits}f}", ends, small, said.sentence]
        ranked = higher is not None
        near = ", near the best" if ranked and abs(best - mean) <= family.margin else ""
        cells = [f"{kind}{mark}", shown, *cells[:3], f"{cells[3]}{near}", str(wins) if ranked else ""]
        lines.append(f"| {' | '.join(cells)} |")
    if family.dunnett.unequal > MOST_UNEQUAL:
        times = f"{family.dunnett.unequal:.0f} times the smallest"
        lines += ["", f"Caution: the largest spread between seeds is {times}, so pooling it is doubtful."]
    seen = detectable(len(means) - 1, len(stage.seeds), len(means[baseline])) * family.dunnett.sd
    reach = f"on these rows 4 of 5 such studies would see a difference of {seen:.{digits}f}"
    return [*lines, "", f"Margin {family.margin:.2g}; {reach}.", ""]


def pooled_difference(
    base: Sequence[float], values: Sequence[float], sd: float, means: Mapping[str, Sequence[float]]
) -> Difference:
    """Between means of runs, with the standard deviation that all kinds share: Dunnett's interval, as the plan has it."""
    df = sum(len(one) - 1 for one in means.values())
    error = sd * math.sqrt(1 / len(base) + 1 / len(values))
    return Difference(statistics.fmean(values) - statistics.fmean(base), error, df, (len(base), len(values)), 0)


def _is_best(means: Mapping[str, Sequence[float]], kind: str, place: int, higher: bool | None) -> bool:
    column = {name: values[place] for name, values in means.items()}
    return column[kind] == (max if higher else min)(column.values())


def margin_of(about: Mapping[str, Any], baseline: float) -> float:
    """The margin as a number; a share is of the baseline's mean."""
    given = about["margin"]
    if isinstance(given, str):
        return float(f"{float(given.removesuffix('%')) / 100 * abs(baseline):.2g}")
    return float(given)


def interaction(stage: Stage, endpoint: str) -> Difference | None:
    """(FKL at 2 - FKL at 1) - (RKL at 2 - RKL at 1), its error from the standard deviation of a run that all kinds share."""
    if any(kind not in stage.runs or not stage.scores(kind, endpoint) for kind in CORNERS):
        return None
    all_values = [stage.scores(kind, endpoint) for kind in stage.runs]
    df = sum(len(values) - 1 for values in all_values)
    pooled = sum(statistics.variance(values) * (len(values) - 1) for values in all_values) / df
    a, b, c, d = (statistics.fmean(stage.scores(kind, endpoint)) for kind in CORNERS)
    seeds = len(stage.seeds)
    se = math.sqrt(4 * pooled / seeds)
    return Difference((a - b) - (c - d), se, df, (seeds, seeds), 0)


def of_interaction(stage: Stage, endpoints: Mapping[str, Any]) -> list[str]:
    """Question 1, in words and numbers."""
    lines = ["## Does the best T depend on the direction of the KL?", ""]
    lines += ["| endpoint | (FKL 2 - FKL 1) - (RKL 2 - RKL 1) | 95 % | |", "|---|---:|---:|---|"]
    for endpoint, about in endpoints.items():
        found = interaction(stage, endpoint)
        if found is None:
            continue
        low, high = found.interval()
        base = statistics.fmean(stage.scores("forward KL, T = 1", endpoint))
        digits = digits_of(margin_of(about, base)) + 1
        words = "cannot be told from none" if low <= 0 <= high else "there is one"
        numbers = f"{found.mean:+.{digits}f} | {low:+.{digits}f} to {high:+.{digits}f}"
        name = str(about["name"]).replace("|", r"\|")  # or a KL's bars would end the cell
        lines.append(f"| {name} | {numbers} | {words} |")
    words = in_words(stage, "ce", endpoints["ce"]["name"])
    return [*lines, "", *words, *(["", *elsewhere(stage, endpoints, "ce")] if words else []), ""]


def in_words(stage: Stage, endpoint: str, name: str) -> list[str]:
    """What the interaction on the primary endpoint comes to; less of it is better."""
    found = interaction(stage, endpoint)
    if found is None:
        return []
    low, high = found.interval()
    a, b, c, d = (statistics.fmean(stage.scores(kind, endpoint)) for kind in CORNERS)
    moved = f"From T = 1 to T = 2 the {name} moves by {a - b:+.3f} with forward KL and by {c - d:+.3f} with reverse KL"
    if low <= 0 <= high:
        return [f"{moved}; the two cannot be told apart ({low:+.3f} to {high:+.3f})."]
    way = "more than reverse KL, as" if high < 0 else "less than reverse KL, the other way round than"
    return [
        f"{moved} (95 % of the difference: {low:+.3f} to {high:+.3f}).",
        "So the direction does matter here, and a T of 2 helps forward KL",
        f"{way} arXiv 2606.00306 says of instruction following.",
        "That is about the start of training, a student far from its teacher, and one learning rate. To second order both",
        "KLs pull alike at the same T, so the difference has to shrink as the student comes near.",
    ]


def elsewhere(stage: Stage, endpoints: Mapping[str, Any], primary: str) -> list[str]:
    """Whether the other endpoints say what the primary one says."""
    said: dict[str, list[str]] = {"the same way round": [], "the other way round": [], "cannot be told from none": []}
    ways = {}
    for endpoint, about in endpoints.items():
        if about.get("neither") or (found := interaction(stage, endpoint)) is None:
            continue
        low, high = found.interval()
        ways[endpoint] = 0 if low <= 0 <= high else 1 if (low > 0) == bool(about.get("higher")) else -1
    for endpoint, way in ways.items():
        if endpoint != primary:
            place = (
                "cannot be told from none"
                if not way
                else f"the {'same' if way == ways[primary] else 'other'} way round"
            )
            said[place].append(str(endpoints[endpoint]["name"]))
    lines = [
        f"By {' and '.join(names)}: {place} (intervals above)."
        for place, names in said.items()
        if names and ways[primary]
    ]
    if "kl" in ways or "reverse_kl" in ways:
        lines += [
            "Both KLs lean: KL(teacher || student) is what forward KL trains on at T = 1 and KL(student || teacher) what",
            "reverse KL does, so that leaving T = 1 costs each of them its own.",
        ]
    return lines


def in_short(family: Family, about: Mapping[str, Any]) -> list[str]:
    """Which kinds are better than the baseline on the primary endpoint, which worse, and of which it cannot be said."""
    if not family.means:
        return []
    words = {"better": "better", "worse": "worse", "equivalent": "equivalent", "undecided": "cannot be told apart"}
    groups: dict[str, list[str]] = {word: [] for word in words}
    for kind, (_, said) in family.verdicts.items():
        groups[said.word].append(kind.partition(", ")[2])
    lines = [f"- {words[word]}: {'; '.join(kinds) or 'none'}" for word, kinds in groups.items()]
    return [f"By the {about['name']}, beside {family.baseline}:", "", *lines, ""]


def figure(stage: Stage, endpoint: str, about: Mapping[str, Any]) -> str | None:
    """The endpoint over log T, a line for each direction of the KL, bands from the lowest to the highest seed."""
    lines, grid = [], ("0.5", "1", "2", "4")
    for name in ("forward KL", "reverse KL"):
        kinds = [f"{name}, T = {t}" for t in grid]
        curves = [stage.scores(kind, endpoint) if kind in stage.runs else [] for kind in kinds]
        if not all(curves):
            return None
        lines.append(Line(name, *([measure(curve) for curve in curves] for measure in (statistics.fmean, min, max))))
    title = f"{about['name']} by temperature"
    return chart(lines, "", title, marks=grid, x_label="T; bands: lowest to highest seed", of_bands="")


def page() -> dict[Path, str]:
    """RESULTS.md and its figures."""
    about = study()
    endpoints, files = about["endpoints"], {}
    text = [
        "# Does temperature matter for a language model? Results", "",
        "<!-- Written by write_page.py from results/; edit that. -->", "",
        "What was fixed before the first run: [PREREG.md](PREREG.md). Runs are short, and these are 144 held-out rows:",
        "every statement is about them and about the start of training.", "",
        "Changed after the first run, on the same day: for the second question this page first had intervals with the",
        "spread of each pair of kinds alone (2 degrees of freedom), and has Dunnett's now, as the plan says; and it called",
        "calibration errors better or worse, which the plan does not. What the other endpoints say of the first question",
        "was added when the results were known; its numbers are as they were.", "",
        "Stage B: a twentieth of the run's 39 gaps was one step by the program, so that its first four runs of `blocks`",
        "were those of `permuted` to the last bit. They are replaced by runs with the two steps of the plan.", "",
    ]  # fmt: skip
    for name, of_stage in about["stages"].items():
        stage = Stage(name, of_stage)
        text += [f"# Stage {name}", "", of_stage["question"], ""]
        if not stage.runs:
            text += ["**Not run.**", ""]
            continue
        runs = sum(len(of_kind) for of_kind in stage.runs.values())
        seeds = ", ".join(map(str, stage.seeds)) or "none"
        text += [f"{runs} runs of {len(stage.runs)} kinds; seeds that every kind has: {seeds}.", ""]
        text += [f"Failed: {line}." for line in stage.failed] + ([""] if stage.failed else [])
        if not stage.is_whole:
            text += [f"**Not enough**: fewer than {LEAST_SEEDS} seeds of some kind are no result.", ""]
            continue
        text += of_interaction(stage, endpoints) if name == "A" else mean_temperatures(stage)
        for title, baseline, kinds in stage.families(about["baseline"]):
            text += [f"## {title}", ""]
            text += (
                in_short(Family(stage, "ce", endpoints["ce"], baseline, kinds), endpoints["ce"]) if name != "A" else []
            )
            own = _of_teacher(stage, [baseline, *kinds])
            text += [f"Intervals are Dunnett's, over seeds, on these rows. {own}".rstrip(), ""]
            for endpoint, of_endpoint in endpoints.items():
                if title == OF_TEACHERS and endpoint not in ANY_TEACHER:
                    continue
                text += table(stage, endpoint, of_endpoint, baseline, kinds)
                if name == "A" and (drawn := figure(stage, endpoint, of_endpoint)) is not None:
                    files[HERE / "figures" / f"{endpoint}.svg"] = drawn
                    text += [f"![{of_endpoint['name']} over T](figures/{endpoint}.svg)", ""]
    fine_tuning = of_fine_tuning(Stage("C", about["stages"]["C"]), endpoints["ce"], about["baseline"])
    text += revisit(Stage("A", about["stages"]["A"]), fine_tuning)
    files[HERE / "RESULTS.md"] = "\n".join(text).rstrip() + "\n"
    return files


def mean_temperatures(stage: Stage) -> list[str]:
    """Of each kind, over all steps: those of kinds that are to be alike in it have to be."""
    lines = ["| kind | mean T over the steps, of each seed |", "|---|---|"]
    for kind, of_kind in stage.runs.items():
        traces = [[line["temperature"] for line in run["log"] if "temperature" in line] for run in of_kind.values()]
        lines.append(f"| {kind} | {', '.join(f'{statistics.fmean(trace):.3f}' for trace in traces if trace)} |")
    return [*lines, ""]


def _of_teacher(stage: Stage, kinds: Sequence[str]) -> str:
    of_kinds = [next(iter(stage.runs[kind].values()))["teacher"].get("ce") for kind in kinds]
    found = [f"{ce:.3f}" for ce in dict.fromkeys(of_kinds) if ce is not None]
    if len(found) > 1:
        return f"The teachers' own CE on the references, in this order: {', '.join(found)}."
    return f"The teacher's own CE on the references is {found[0]}." if found else ""


def of_fine_tuning(stage: Stage, about: Mapping[str, Any], usual: str) -> str:
    """What stage C says of the fifth finding: on the primary endpoint, each fine-tuned teacher against the other."""
    if not stage.is_whole or any(f"{usual}{tuned}" not in stage.runs for tuned in TUNED):
        return "cannot say: not run"
    family = Family(stage, "ce", about, usual, [f"{usual}{tuned}" for tuned in TUNED])
    said = [f"{tuned.rpartition('for ')[2]}: {family.verdicts[f'{usual}{tuned}'][1].sentence}" for tuned in TUNED]
    return f"{about['name']} of the student, {'; '.join(said)} (stage C; one teacher of each)"


def revisit(stage: Stage, fine_tuning: str) -> list[str]:
    """The findings of the Unified Revisit beside what was measured here."""
    flat = "cannot say: one optimizer was run"
    shared = "cannot say: not run"
    if stage.is_whole:
        shared = "cannot say: no method beside plain KL was run; above stands which T of plain KL are near the best"
    rows = [
        ("F1", "a shared fixed T with KL is the most robust simple choice", shared),
        ("F2", "AdamW is flatter in T than SGD; with SGD small T early, large T later", flat),
        (
            "F3", "T of 10 and more can help with a strongly relational teacher and long training",
            "cannot say: runs are short, T ends at 4",
        ),
        ("F4", "fine-grained labels want a higher T, coarse ones a lower", "cannot say: one vocabulary"),
        ("F5", "light fine-tuning of the teacher helps, heavy hurts", fine_tuning),
        ("F6", "pretrained students gain less than random ones, but gain",
         "cannot say: all students are cut from their teacher"),
    ]  # fmt: skip
    lines = [
        "# The findings of the Unified Revisit beside ours", "",
        "arXiv 2603.02430 is about image classification only; its findings are given in our words, from a digest.", "",
        "| | finding, image classification only | ours |", "|---|---|---|",
    ]  # fmt: skip
    return [*lines, *(f"| {name} | {finding} | {ours} |" for name, finding, ours in rows), ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not up to date")
    check = parser.parse_args(arguments).check
    files = page()
    wrong = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in wrong:
        print(f"{'not up to date' if check else 'written'}: {path.relative_to(HERE.parents[1])}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path], encoding="utf-8", newline="\n")
    return 1 if check and wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
