"""Whether the setting of the row was reproduced, which is said before anything is said about DTS.

    python recipes/dts_row/gates.py runs/dts_row/teacher_sft runs/dts_row/row

Prints *pass*, *fail* or *not measured* for each gate, what may be said then, and the commands that are left: the matched
cosine of each finished run of the rule gap, and the comparison. Exit status 0 when all gates pass, else 1.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dts_hf.errors import UserError
from dts_hf.runs.directory import RunDirectory

#: ROUGE-L of MiniLLM's Table 1 (arXiv 2306.08543), as we recall it: check it there before it is quoted.
TEACHER, KD = 29.2, 25.4
SET, ROWS, PROTOCOL = "dolly", 500, "minillm"
MATCHED = "runs/dts_row/matched_cosine"
REPRODUCED = "The setting is reproduced; what DTS adds to it is for the comparison to say."
NOT_REPRODUCED = (
    "The setting is not reproduced: these runs are the same protocol with other models, and no row of the paper."
)


@dataclass(frozen=True)
class Gate:
    """A mean ROUGE-L that has to be near a published one.

    Attributes:
        name: of the models.
        published: their score.
        within: the largest difference that passes.
        seeds: of training, at least.
    """

    name: str
    published: float
    within: float
    seeds: int

    def judged(self, scores: Sequence[float]) -> tuple[bool, str]:
        """Whether it passes, and a line that says so.

        Args:
            scores: of each training seed, in points.
        """
        begin = f"{self.name}, ROUGE-L on {SET}, published {self.published} (recalled), within {self.within}: "
        if len(scores) < self.seeds:
            return False, f"{begin}not measured ({len(scores)} of {self.seeds} seeds under the protocol {PROTOCOL})"
        mean = statistics.fmean(scores)
        passes = round(abs(mean - self.published), 9) <= self.within
        return passes, f"{begin}{'pass' if passes else 'fail'} ({mean:.2f} over {len(scores)} seeds)"


GATES = (Gate("the teacher", TEACHER, 0.6, 1), Gate("plain KD", KD, 1.0, 5))


def score_of(run: RunDirectory) -> float | None:
    """ROUGE-L of the finished student on the whole set under the protocol, in points; None: it was not measured."""
    metrics = run.read_metrics()
    scores = metrics.get("models", {}).get("student", {}).get("sets", {}).get(SET)
    if not scores or scores["n"] != ROWS or metrics["protocol"].get("name") != PROTOCOL:
        return None
    return 100.0 * float(scores["rougeL"]["mean"])


def runs_of(folder: Path) -> list[RunDirectory]:
    """The run directories in a sweep's folder, by name."""
    return [RunDirectory(path.parent) for path in sorted(folder.glob("*/recipe.yaml"))]


def next_commands(runs: Sequence[RunDirectory], folder: Path) -> list[str]:
    """The matched cosine of each finished run of the rule gap that has none, then the comparison."""
    commands, controls = [], []
    for run in runs:
        recipe = run.read_recipe()
        options = recipe.temperature.options
        if recipe.temperature.name != "dts" or options.get("rule") != "gap" or not run.read_metrics():
            continue
        control = RunDirectory(Path(MATCHED) / f"seed_{recipe.seed}")
        controls.append(control)
        if not control.read_metrics():
            given = [f"temperature.match_mean_of={run.path}", f"training.seed={recipe.seed}"]
            command = ["dts-hf", "train", "recipes/dts_row/matched_cosine.yaml", *given, "--output", str(control.path)]
            commands.append(shlex.join([*command, "--resume"]))
    paths = " ".join(shlex.quote(str(folder)) + "/*/" for folder in (folder, *([Path(MATCHED)] if controls else [])))
    return [*commands, f"dts-hf compare {paths} --baseline temperature=constant --output runs/dts_row/comparison"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="run directory of teacher_sft.yaml")
    parser.add_argument("row", type=Path, help="folder of dts-hf sweep recipes/dts_row/row.yaml")
    args = parser.parse_args(arguments)
    runs = runs_of(args.row)
    plain = [run for run in runs if run.read_recipe().temperature.model_dump() == {"name": "constant", "value": 1.0}]
    measured = [
        [score for run in some if (score := score_of(run)) is not None]
        for some in ([RunDirectory(args.teacher)], plain)
    ]
    judged = [gate.judged(scores) for gate, scores in zip(GATES, measured, strict=True)]
    passed = all(passes for passes, _ in judged)
    for _, line in judged:
        print(line)
    print(REPRODUCED if passed else NOT_REPRODUCED)
    print("\nWhat is left:", *next_commands(runs, args.row), sep="\n  ")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(str(error)) from None
