"""What a report says about one run, read once: names in plain words, scores, sizes. Tables, card and page share it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from dts_hf.console import masked
from dts_hf.loss.statistics import BY_TEACHER, KD, OF_TEACHER
from dts_hf.recipe.schema import QUANTIZED_BY
from dts_hf.runs.directory import ONE_TEACHER, RunDirectory
from dts_hf.runs.local_names import with_names

MODELS = ("teacher", "student_before", "student")
MODEL_LABELS = {"teacher": "teacher", "student_before": "student before", "student": "student after"}
UNNAMED = "a model made in memory, without a name"
PACKAGE_PREFIX = "package:"
_LOCAL_SUFFIXES = (".gguf", ".jsonl", ".json", ".gz", ".parquet", ".safetensors")
#: Where people and machines keep files. Other words behind a slash may be anything, such as a token or an address.
_ROOTS = "home|Users|root|tmp|mnt|media|data|scratch|workspace|work|srv|opt|export|lustre|gpfs|nfs"
_PATH_IN_TEXT = re.compile(
    rf"(?<![\w/:.~\\-])(?:file://)?(?:~(?:[A-Za-z_][\w-]*)?/|/(?:{_ROOTS})/|[A-Za-z]:[\\/]Users[\\/])[^\s\"'`<>|()\[\]{{}},;]*"
)


@dataclass(frozen=True)
class Facts:
    """The contents of a run directory. A piece that the run does not have is an empty dict or list."""

    name: str
    recipe: Mapping[str, Any]
    metrics: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    manifest: Mapping[str, Any]
    environment: Mapping[str, Any]
    predictions: Mapping[str, Sequence[Mapping[str, Any]]]

    def section(self, name: str) -> Mapping[str, Any]:
        """One section of the recipe, empty when the run has none."""
        return self.recipe.get(name) or {}

    @property
    def task(self) -> Mapping[str, Any]:
        """The recipe's task (``subset`` names it), empty for a language model that answers instructions."""
        return self.section("task")

    @property
    def learns_from_teacher(self) -> bool:
        """Whether there was a teacher; without a recipe nothing says that there was none."""
        return bool(self.section("teacher") or self.section("teachers")) or not self.recipe

    def model(self, name: str) -> Mapping[str, Any]:
        """The ``metrics.json`` entry of ``teacher``, ``student_before`` or ``student``."""
        return (self.metrics.get("models") or {}).get(name) or {}

    @property
    def models(self) -> list[str]:
        """The models that have scores or predictions, teacher first."""
        several = [f"{ONE_TEACHER}{name}" for name in self.section("teachers")]
        return [name for name in (*several, *MODELS) if self.model(name) or self.predictions.get(name)]

    @property
    def sets(self) -> list[str]:
        """The names of the evaluation sets, in the order of ``metrics.json``."""
        return list(dict.fromkeys(s for name in MODELS for s in self.model(name).get("sets") or {}))

    @property
    def loss_sets(self) -> list[str]:
        """The names of the held-out sets that losses were taken on; one empty name where there is one set."""
        return list((self.model("student").get("teacher_forced") or {}).get("sets") or [""])

    def rows_in(self, set_name: str) -> int | None:
        """How many prompts of ``set_name`` were answered (the smallest count over the models)."""
        counts = [self.model(name).get("sets", {}).get(set_name, {}).get("n") for name in MODELS]
        return min((int(n) for n in counts if n is not None), default=None)


def gather(run: RunDirectory) -> Facts:
    """Read everything that ``run`` has."""
    # A trainer used from Python, without a recipe, also asks for a card.
    recipe = anchored(run, run.read_recipe().model_dump(mode="json")) if run.recipe_path.is_file() else {}
    return Facts(
        name=run.path.resolve().name,
        recipe=recipe,
        metrics=run.read_metrics(),
        log=run.read_log(),
        manifest=anchored(run, recipe, run.read_data_manifest()),
        environment=run.read_environment(),
        predictions={name: run.read_predictions(name) for name in run.predictions_names()},
    )


def anchored(
    run: RunDirectory, recipe: Mapping[str, Any], values: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """``recipe`` with ``./`` before relative paths that were there where and when the run was started.

    ``models/small`` is a folder there, and a name on the Hub for whoever looks at the run from somewhere else.

    Args:
        run: noted them at its start (``runs.local_names``); of an older one the folder around it is asked.
        recipe: of the run.
        values: instead of the recipe, such as ``data_manifest.json``.
    """
    known = set(run.read_environment().get("local_names") or ())
    output = PurePosixPath(str((recipe.get("output") or {}).get("dir") or "."))
    here = run.path.resolve()
    moved = output.is_absolute() or here.parts[-len(output.parts) :] != output.parts
    root = None if moved else Path(*here.parts[: -len(output.parts)])

    def anchor(value: str) -> str:
        if value in known and not value.startswith((".", "~")):
            return f"./{value}"
        relative = root is not None and "/" in value and not is_local(value) and hub_id(value) is not None
        return f"./{value}" if root is not None and relative and (root / value).exists() else value

    found: Mapping[str, Any] = with_names(recipe if values is None else values, anchor)
    return found


def number(value: object) -> float | None:
    """``value`` as a finite float, or None for anything else (absent, NaN, a string)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


# ---------------------------------------------------------------------------------------------------------- names


def is_local(value: str) -> bool:
    """Whether ``value`` is a path of this machine rather than a name on the Hub (or ``package:NAME/FILE``)."""
    if value.startswith(PACKAGE_PREFIX):
        return False
    return (
        value.startswith((".", "/", "~", "\\"))
        or bool(re.match(r"[A-Za-z]:[\\/]", value))
        or value.endswith(_LOCAL_SUFFIXES)
        or value.count("/") > 1  # a name on the Hub has one at most
        or Path(value).exists()
    )


def short_name(value: str) -> str:
    """A name fit for publication: a local path loses its folders (they may name a person or a machine)."""
    if not is_local(value):
        return value
    path = PureWindowsPath(value) if "\\" in value else PurePosixPath(value)
    return path.name or value


def without_folders(text: str) -> str:
    """``text`` in which paths of a machine, as a sentence names them, lose the folders around their last name."""
    return _PATH_IN_TEXT.sub(lambda found: _last_name(found[0]), text)


def _last_name(path: str) -> str:
    bare = path.rstrip("/\\.,:;!?")
    parts = re.split(r"[\\/]+", bare.removeprefix("file://"))
    # Of somebody's home the last name is that of a person
    nobody = len(parts) < 2 or (parts[0] == "" and len(parts) == 2)
    name = "~" if nobody or (len(parts) == 3 and parts[1] in ("home", "Users")) else parts[-1]
    return name + path[len(bare) :].lstrip("/\\")


def publishable(value: Any) -> Any:
    """JSON-like ``value`` with every path outside the current folder cut to its last name and every token masked."""
    if isinstance(value, Mapping):
        return {
            key: "***" if str(key) in ("hub_token", "push_to_hub_token") and item else publishable(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [publishable(item) for item in value]
    if not isinstance(value, str):
        return value
    # What leaves the machine in a card or a page: home folders carry names of people, and projects those of customers.
    # A path inside of the current folder stays, because who has the run has it too
    if re.match(r"(/|~|\.\.[\\/]|[A-Za-z]:[\\/]|\\\\)", value):
        value = short_name(value)
    return masked(without_folders(value))


def hub_id(value: str | None) -> str | None:
    """``value`` if it can be the name of a repository on the Hub, else None."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not value or is_local(value) or value.startswith(PACKAGE_PREFIX):
        return None
    try:
        validate_repo_id(value)
    except HFValidationError:
        return None
    return value


def describe_model(value: str, revision: str | None = None) -> str:
    """Where a model came from, in words: a Hub name with its revision, a local folder or file, a packaged file."""
    if value.startswith(PACKAGE_PREFIX):
        package, _, file = value.removeprefix(PACKAGE_PREFIX).partition("/")
        return f"the file `{PurePosixPath(file).name}` of the installed Python package `{package}`"
    if is_local(value):
        kind = "file" if value.endswith(_LOCAL_SUFFIXES) else "folder"
        return f"the local {kind} `{short_name(value)}`"
    return f"`{value}`" + (f" at revision `{revision}`" if revision else " (no revision pinned)")


def describe_teacher(facts: Facts) -> str:
    """The teacher, in words, and what it alone reads."""
    column = facts.section("data").get("teacher_prefix_column")
    return _describe_teacher(facts) + (f", which also reads the text of column `{column}`" if column else "")


def _describe_teacher(facts: Facts) -> str:
    if several := facts.section("teachers"):
        column = facts.section("data").get("teacher_column")
        how = f"each row has the one that its column `{column}` names" if column else "each row has all of them"
        if not column and not any(section.get("weight") for section in several.values()):
            how = "each row has one of them"  # of a trainer, which does not tell the column
        return f"{len(several)} teachers ({', '.join(f'`{name}`' for name in several)}); {how}"
    teacher = facts.section("teacher")
    if facts.recipe and not teacher:
        return "none: it learnt from labels alone"
    if teacher.get("kind") == "self":
        return _describe_itself(teacher)
    served = (facts.manifest.get("models") or {}).get("teacher_states") or {}
    if served.get("kind") == "remote":  # what has answered, whatever the recipe calls it
        name = "".join(letter for letter in str(served["model"]) if letter.isprintable() and letter not in "`|<>[]()")
        commit = served.get("commit")
        return f"`{name[:200]}`{f' at revision `{commit}`' if commit else ''} in {served['dtype']}, on another machine"
    return _describe_section(teacher, bool(facts.recipe))


def _describe_itself(teacher: Mapping[str, Any]) -> str:
    if teacher.get("weights") != "ema":
        return "itself, with its first weights"
    steps = "step" if teacher.get("ema_every", 1) == 1 else f"{teacher['ema_every']} steps"
    return (
        f"itself, with a running mean of its weights (the new ones count {teacher.get('ema_rate')} at every {steps})"
    )


def _describe_section(teacher: Mapping[str, Any], has_recipe: bool) -> str:
    if not teacher.get("model"):
        return UNNAMED if has_recipe else "unknown (the run has no recipe)"
    words = describe_model(teacher["model"], teacher.get("revision"))
    kind = teacher.get("quantization")
    if kind in QUANTIZED_BY:
        words += f", quantised to {kind} by {QUANTIZED_BY[kind]}"
    return words


#: Where the states of one of several teachers come from, by its ``kind``.
STATES_FROM = {"cached": "out of a cache", "remote": "on another machine"}


def describe_several(facts: Facts) -> list[tuple[str, str]]:
    """Each of several teachers, in words: what it is, its share of the rows, and what the last line of the log says."""
    trained = [line for line in facts.log if KD.log in line]
    last = trained[-1] if trained else {}
    counts = ((facts.manifest.get("splits") or {}).get("train") or {}).get("teachers") or {}
    found = []
    for name, section in facts.section("teachers").items():
        parts = [_describe_section(section, True)]
        if section.get("kind") in STATES_FROM:
            parts.append(STATES_FROM[section["kind"]])
        if name in counts:
            parts.append(f"{counts[name]:,} training rows")
        if section.get("weight") is not None:
            parts.append(f"weight {section['weight']:g}")
        values = {one: number(last.get(f"{one.log}{OF_TEACHER}{name}")) for one in BY_TEACHER}
        said = [f"{one.log} {value:.3f}" for one, value in values.items() if value is not None]
        if said:
            parts.append(f"at the end of training {', '.join(said)}")
        found.append((f"teacher `{name}`", "; ".join(parts)))
    if found:
        each = facts.section("loss").get("temperature_per_teacher")
        found.append(
            ("state of the temperature", "one for each teacher" if each else "one for the rows of all teachers")
        )
    return found


#: Which layers ``student.init.choose`` has chosen, in words.
CHOSEN = {
    "even": "evenly spaced layers",
    "block_influence": "layers, those that change their states most,",
    "middle_block": "layers, all but one block,",
    "search": "layers that a search has found,",
}


def _describe_init(init: Mapping[str, Any], revision: str | None) -> str:
    """``student.init`` in words: what it was cut out of, and what it keeps."""
    layers, sizes = init.get("layers"), []
    if isinstance(layers, int):
        sizes.append(f"{layers} {CHOSEN.get(init.get('choose', 'even'), 'layers')}")
    elif layers is not None:
        sizes.append(f"layers {layers}")
    sizes += [f"MLPs of {init['mlp']:,} channels"] if init.get("mlp") else []
    sizes += [f"states of {init['hidden']:,} channels"] if init.get("hidden") else []
    sizes += [f"at most {init['parameters']:,} weights"] if init.get("parameters") else []
    kept = " and ".join(sizes) or "all layers"
    origin = init.get("from", "teacher")
    if origin == "config":
        return f"random weights in the teacher's shape ({kept})"
    return f"pruned from {'the teacher' if origin == 'teacher' else describe_model(origin, revision)} ({kept} kept)"


def describe_student(facts: Facts) -> str:
    """Where the student's first weights came from, in words."""
    student = facts.section("student")
    init = student.get("init")
    if init:
        words = _describe_init(init, student.get("revision"))
    elif student.get("model"):
        words = describe_model(student["model"], student.get("revision"))
    elif facts.recipe:
        words = UNNAMED
    else:
        return "unknown (the run has no recipe)"
    lora = student.get("lora")
    if lora:
        end = "merged into the weights" if lora.get("save") == "merged" else "saved as an adapter"
        kind = f"LoRA of rank {lora['r']}" if lora.get("r") else "an adapter"
        words += f", trained with {kind} ({end})"
    if quantize := student.get("quantize"):
        group = quantize.get("group_size") or "the weights of a row"
        words += f", trained for {quantize.get('scheme')} ({group} to a scale)"
    return words


def divergence(facts: Facts) -> tuple[str, dict[str, Any]]:
    """Name and options of the divergence."""
    return _name_and_options(facts.section("loss").get("divergence"))


def temperature(facts: Facts) -> tuple[str, dict[str, Any]]:
    """Name and options of the temperature policy, as the recipe gives them."""
    return _name_and_options(facts.section("temperature"))


def _name_and_options(value: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(value, str):
        return value, {}
    options = dict(value or {})
    return str(options.pop("name", "unknown")), options


def format_call(name: str, options: Mapping[str, Any]) -> str:
    """``dts(rule=gap, t_init=3.0)``."""
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})" if options else name


DTS_RULES = {
    "gap": "the target equals the cosine at gap 0, rises smoothly with the gap (student cross-entropy minus teacher "
    "cross-entropy) and never passes t_init",
    "paper": "the paper's equations as printed; the gap acts only when the student is more than one nat per label "
    "better than the teacher, so an ordinary run is the plain cosine",
    "code": "the authors' released code; the gap raises the temperature once the student is more than one nat per "
    "label worse than the teacher",
}


class Policy(NamedTuple):
    """What a temperature policy says of itself.

    Attributes:
        options: all of them, with their defaults.
        rule: its rule in words.
        paper: its paper's identifier.
        kd_ratio: the weight of the soft loss at the start and at the end of training, where the policy sets it.
    """

    options: dict[str, Any]
    rule: str
    paper: str | None
    kd_ratio: tuple[float, float] | None = None


def policy_facts(facts: Facts) -> Policy:
    """Ask the policy of the recipe; only the recipe's own words remain where it cannot be built here."""
    name, options = temperature(facts)
    try:
        # Imports torch; and the report may be written on a machine that lacks a user's own policy.
        from dts_hf.temperature import build_temperature

        policy = build_temperature(name, **options)
    except (ImportError, ValueError, TypeError):
        return Policy(options, "", None)
    options = {**options, **policy.describe()}
    document = " ".join((type(policy).__doc__ or "").split("\n\n")[0].split()).replace("``", "`")
    rule = DTS_RULES.get(str(options.get("rule")), "") if name == "dts" else document
    if policy.kd_ratio is None:
        return Policy(options, rule, policy.paper)
    # A policy that sets the weight may move it: its two ends are told. The policy is ours alone and thrown away after.
    # No other one is taken through a run that has not begun: what it would replay was never read.
    ratios = []
    for progress in (0.0, 1.0):
        policy.begin_step(progress)
        ratios.append(policy.kd_ratio)
    start, end = ratios
    return Policy(options, rule, policy.paper, None if start is None or end is None else (start, end))


def paper_link(paper: str | None) -> str | None:
    """Address of the paper, where its identifier tells one."""
    found = re.search(r"\b\d{4}\.\d{4,5}\b", paper or "")
    if found:
        return f"https://arxiv.org/abs/{found.group()}"
    found = re.search(r"https?://[^\s)>\]]+", paper or "")
    return found.group() if found else None


# --------------------------------------------------------------------------------------------------------- scores


def teacher_is_reference(facts: Facts) -> bool:
    """Whether the teacher's answers are themselves the references (then its ROUGE-L says nothing about quality)."""
    # Not all of them: below fp32 a near-tie may fall otherwise in another batch
    rows = facts.predictions.get("teacher") or []
    same = sum(
        row.get("prediction", "").strip() in {str(r).strip() for r in row.get("references", ())} for row in rows
    )
    return bool(rows) and same >= 0.9 * len(rows)


def kept_best(facts: Facts) -> bool:
    """Whether a task kept the weights that scored best on its validation rows, rather than the last ones."""
    return str((facts.metrics.get("protocol") or {}).get("checkpoint", "")).startswith("best")


def interval(facts: Facts, model: str, set_name: str) -> float | None:
    """Half width of the 95 % interval of mean ROUGE-L over prompts (normal approximation), in points.

    A prompt that was answered under several seeds counts once, by its mean.
    """
    by_prompt: dict[str, list[float]] = {}
    for row in facts.predictions.get(model) or []:
        score = number(row.get("rougeL"))
        if row.get("set", set_name) == set_name and score is not None:
            by_prompt.setdefault(str(row.get("id")), []).append(points(score))
    # Prompts are the independent draws, not answers: five samples of one prompt say little more than one about others
    means = [sum(scores) / len(scores) for scores in by_prompt.values()]
    if len(means) < 2:
        return None
    mean = sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    return 1.96 * math.sqrt(variance / len(means))


def points(score: float) -> float:
    """A ROUGE-L of one row (a fraction) in points, 0 to 100."""
    return 100.0 * score


def share_of(part: float | None, whole: float | None) -> float | None:
    """``part / whole`` in percent, None when either is unknown or ``whole`` is 0."""
    return 100.0 * part / whole if part is not None and whole else None


def format_count(value: float | None) -> str:
    """``81.9 M`` for 81900000."""
    if value is None:
        return "-"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f} {letter}"
    return f"{value:.0f}"


def format_duration(seconds: float | None) -> str:
    """``1 h 05 min``, ``5 min 12 s`` or ``42 s``."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
