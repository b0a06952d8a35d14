"""The model card of a run: what the student is, how it was made, how good it is, how to load and to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from dts_hf.files import read_json
from dts_hf.recipe.schema import QUANTIZED_BY
from dts_hf.reporting.facts import (
    Facts,
    Policy,
    describe_several,
    describe_student,
    describe_teacher,
    divergence,
    format_call,
    format_count,
    format_duration,
    gather,
    hub_id,
    kept_best,
    number,
    paper_link,
    policy_facts,
    publishable,
    share_of,
    short_name,
    teacher_is_reference,
    temperature,
)
from dts_hf.reporting.licences import Inherited, inherited
from dts_hf.reporting.tables import MEASURES, format_counts, markdown_scores, score_lines
from dts_hf.runs.directory import RunDirectory

TEMPLATES = Path(__file__).parent / "templates"
EXAMPLE_QUESTION = "Name three things that float on water."
FIGURES = ("temperature", "losses", "rouge", "scores")
STUDENT_FILE = "dts_hf.json"  # in a student's folder: what it was trained and scored with
AUTO = "auto"  # the prompt template that the tokenizer decides on
VERSIONS_SHOWN = ("dts-hf", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers")


@dataclass(frozen=True)
class Setting:
    """Where a card stands, and what its reader finds beside it.

    Attributes:
        repository: full name on the Hub; None: a run directory of this machine.
        student: folder of the student; it tells whether there is a chat template. None: not written yet.
        origins: licence and languages.
        figures: those of ``FIGURES`` that lie beside the card.
        has_recipe: whether recipe.yaml does.
        end_tokens: that answers end at; none: those of ``generation_config.json`` in the student's folder.
        note: a paragraph under the summary.
        metadata: for the head of the card, in the place of what the run says; ``tags`` and ``datasets`` are added.
    """

    repository: str | None = None
    student: Path | None = None
    origins: Inherited = field(default_factory=Inherited)
    figures: Sequence[str] = ()
    has_recipe: bool = True
    end_tokens: Sequence[int] = ()
    note: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def render_model_card(
    run: RunDirectory, *, repository: str | None = None, origins: Inherited | None = None, student: Path | None = None
) -> str:
    """The card of a run as markdown with YAML metadata that the Hub accepts.

    Names of local folders and files appear without the folders that hold them. Pieces that the run does not have
    (scores, figures, a recipe) are left out, in words.

    Args:
        run: what the card is of.
        repository: where it will stand; None: in the run directory.
        origins: licence and languages; None: what this machine knows of them.
        student: folder of the student; None: ``final/``.
    """
    facts = gather(run)
    figures = [name for name in FIGURES if (run.figures_path / f"{name}.png").is_file()]
    origins = inherited(models_of(facts.recipe)) if origins is None else origins
    where = Setting(repository, student or run.final_path, origins, figures, run.recipe_path.is_file())
    return render_card(facts, where)


def render_card(facts: Facts, where: Setting) -> str:
    """The card of ``facts``, whoever gathered them: a run directory or a trainer."""
    from huggingface_hub import ModelCard

    policy = policy_facts(facts) if softens(facts) else Policy({}, "", None)
    # Markdown, not HTML: escaping would put &lt; into code blocks. No text written by a model enters the card.
    text = rendered(
        "model_card.md.jinja",
        autoescape=False,
        facts=facts,
        title=where.metadata.get("model_name") or (where.repository or facts.name).rpartition("/")[2],
        where=where,
        metadata=card_data(facts, where).to_yaml(),
        scores=markdown_scores(facts),
        counts=format_counts(facts),
        teacher_is_reference=teacher_is_reference(facts),
        settings=settings(facts),
        policy=policy,
        temperature_name=temperature(facts)[0],
        link=paper_link(policy.paper),
        summary=summary(facts),
        measures=list(dict.fromkeys(line.measure for line in score_lines(facts))),
        regression=facts.task.get("subset") == "stsb",
        adapter=is_adapter(facts),
        # PEFT loads the generation config of the base, which may not know the end of a turn
        end_tokens=end_tokens(where) if is_adapter(facts) else [],
        folder="final" if where.has_recipe else ".",
        prompt=example_prompt(facts, where.student),
        question=EXAMPLE_QUESTION,
        protocol=facts.metrics.get("protocol") or {},
        limits=limits(facts, where.origins),
    )
    # Parsed once more: metadata that the Hub would refuse fail here, and not after an upload
    return str(ModelCard(text).content)


def card_of_a_folder(student: Path, repository: str) -> str:
    """A short card for a student whose run is not there; of a folder that no run of ours has made it claims nothing."""
    if not (student / STUDENT_FILE).is_file():
        return _card_of_a_stranger(student, repository)
    nothing = Facts(student.resolve().name, {}, {}, [], {}, {}, {})
    return render_card(nothing, Setting(repository, student, has_recipe=False))


def _card_of_a_stranger(folder: Path, repository: str) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    adapter = (folder / "adapter_config.json").is_file()
    data = ModelCardData(library_name="peft" if adapter else "transformers")
    name = repository.rpartition("/")[2]
    said = f"The folder `{name}`, uploaded with `dts-hf push`. It has no card, so nothing is said here of how it was made."
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{said}\n").content)


def rendered(template: str, *, autoescape: bool, **values: Any) -> str:
    """Fill in a template of this package.

    Args:
        template: file name of the template.
        autoescape: write every value as text of HTML, whatever is in it.
        values: by the names that the template uses; one that is missing is an error, not an empty place.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=autoescape,
    )
    return environment.get_template(template).render(values)


def card_data(facts: Facts, where: Setting) -> Any:
    """The metadata block as ``huggingface_hub.ModelCardData``. Only what the run and its models' cards know is stated."""
    from huggingface_hub import ModelCardData

    given = dict(where.metadata)

    policy, loss = temperature(facts)[0], divergence(facts)[0]
    kind = [f"glue-{facts.task['subset']}"] if facts.task else []
    tags = ["dts_hf", *kind, *(["knowledge-distillation", policy, loss] if facts.learns_from_teacher else [])]
    # The Hub draws its tree of models from this and refuses a card with a name that is none, such as a local folder's
    base_model = given.pop("base_model", None) or hub_id(_origin(facts))
    results = eval_results(facts)
    relation = {"base_model_relation": _relation(facts, where.student)} if base_model else {}
    datasets = [name for source in _sources(facts) if (name := hub_id(source.partition(":")[0]))]
    return ModelCardData(
        base_model=base_model,
        library_name="peft" if is_adapter(facts) else "transformers",
        pipeline_tag="text-classification" if facts.task else "text-generation",
        tags=list(dict.fromkeys(tag for tag in (*tags, *given.pop("tags", ())) if tag != "unknown")),
        datasets=list(dict.fromkeys([*datasets, *given.pop("datasets", ())])) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=given.pop("model_name", None) or (where.repository or facts.name).rpartition("/")[2],
        eval_results=results or None,
        **{**relation, **where.origins.metadata(), **given},
    )


def _relation(facts: Facts, student: Path | None) -> str:
    """What the student is to its base model, in the Hub's words."""
    if is_adapter(facts):
        return "adapter"
    config = read_json(student / "config.json") if student is not None else {}
    return "quantized" if config.get("quantization_config") else "finetune"


def eval_results(facts: Facts) -> list[Any]:
    """ROUGE-L and exact match of the student, for each evaluation set, as ``model-index`` entries."""
    from huggingface_hub import EvalResult

    protocol = facts.metrics.get("protocol") or {}
    # Beside each score, because the Hub puts scores of many cards into one table
    shown = {key: protocol[key] for key in ("fingerprint", "template", "max_new_tokens") if key in protocol}
    results = [] if facts.sets else _loss_results(facts)
    for set_name in facts.sets:
        source = (facts.manifest.get("splits") or {}).get(set_name, {}).get("source")
        for measure in MEASURES:
            value = measure.value(facts, "student", set_name)
            reported = (facts.metrics.get("task") or {}).get("metrics") or ("rougeL", "exact_match")
            if measure.key not in reported or value is None:
                continue
            names = {"rougeL": "ROUGE-L", "exact_match": "Exact match"}
            results.append(
                EvalResult(
                    task_type="text-classification" if facts.task else "text-generation",
                    # The Hub wants one of its own names here; of a file there is none
                    dataset_type=(hub_id(source.partition(":")[0]) if isinstance(source, str) else None) or set_name,
                    dataset_name=f"{_published(source)} ({set_name})" if source else set_name,
                    dataset_split=set_name,
                    metric_type="rouge" if measure.key == "rougeL" else measure.key,
                    metric_name=names.get(measure.key, measure.label),
                    metric_value=round(value, 4),
                    metric_args={**shown, "n": facts.rows_in(set_name)},
                )
            )
    return results


def _loss_results(facts: Facts) -> list[Any]:
    """Held-out losses: all that a student has that was not evaluated by generation."""
    from huggingface_hub import EvalResult

    losses = facts.model("student").get("teacher_forced") or {}
    return [
        EvalResult(
            task_type="text-generation", dataset_type=name or "held-out", dataset_name=name or "held-out rows",
            metric_type=measure.key, metric_name=measure.label, metric_value=round(value, 4),
            metric_args={"labels": (losses["sets"][name] if name else losses).get("n_tokens")},
        )
        for measure in MEASURES
        for name in (facts.loss_sets if measure.where == "teacher_forced" else ())
        if (value := measure.value(facts, "student", name)) is not None
    ]  # fmt: skip


def softens(facts: Facts) -> bool:
    """Whether a temperature was at work: not without a teacher, and not in STS-B's regression."""
    return facts.learns_from_teacher and not (facts.task and facts.task["subset"] == "stsb")


def is_adapter(facts: Facts) -> bool:
    """Whether ``final/`` holds an adapter instead of whole weights."""
    return (facts.section("student").get("lora") or {}).get("save") == "adapter"


def summary(facts: Facts) -> str:
    """One sentence: what this model is."""
    size = number(facts.model("student").get("parameters"))
    share = share_of(size, number(facts.model("teacher").get("parameters")))
    words = f"A student of {format_count(size)} parameters" if size else "A student"
    if share:
        words += f" ({share:.0f} % of its teacher's)"
    if not facts.recipe:
        return f"{words}, distilled with `dts_hf`. The run directory has no recipe, so its making is not told here."
    if facts.task:
        words += f", a classifier for GLUE's {facts.task['subset']}"
    if not facts.learns_from_teacher:
        return f"{words}, trained on labels alone with `dts_hf`. Its first weights: {describe_student(facts)}."
    words += f", distilled with `dts_hf` from {describe_teacher(facts)}. Its first weights: {describe_student(facts)}."
    if not softens(facts):
        return words
    policy = temperature(facts)[0]
    return f"{words} Divergence `{divergence(facts)[0]}`, temperature policy `{policy}`."


def settings(facts: Facts) -> list[tuple[str, str]]:
    """Everything that made the student, as (name, value) pairs in markdown."""
    if not facts.recipe:
        return []
    loss, policy = facts.section("loss"), policy_facts(facts)
    scaling = {
        "squared": "squared: the KD loss is multiplied by T² (T_student x T_teacher where they differ)",
        "none": "none: the KD loss is not multiplied by T²",
    }.get(str(loss.get("temperature_scaling")), str(loss.get("temperature_scaling")))
    softened = [
        ("divergence", f"`{format_call(*divergence(facts))}`"),
        ("temperature policy", f"`{format_call(temperature(facts)[0], policy.options)}`"),
        ("rule", policy.rule),
        ("gap", _describe_gap(facts)),
        ("T² factor", scaling),
    ]
    task, tokenizer = facts.task, facts.section("teacher").get("tokenizer")
    hard, soft = "cross-entropy on the labels" if task else "cross-entropy on the hard labels", "KD loss"
    if task.get("subset") == "stsb":
        hard, soft = "squared error to the label", "squared error to the teacher's score"
    rows = [
        ("task", f"GLUE, `{task['subset']}`, texts of at most {task.get('max_length')} tokens" if task else ""),
        ("teacher", describe_teacher(facts)),
        *describe_several(facts),
        ("teacher's tokenizer", f"`{_published(tokenizer)}`" if tokenizer and not task else ""),
        ("student", describe_student(facts)),
        ("parameters", _format_parameters(facts)),
        *(softened if softens(facts) else []),
        ("loss", _describe_loss(facts, hard, soft)),
        *([] if task else _describe_rows(facts)),
        *((f"data, {split}", _describe_split(entry)) for split, entry in (facts.manifest.get("splits") or {}).items()),
        ("training", _describe_training(facts)),
        ("versions", _describe_versions(facts)),
    ]
    return [(name, value) for name, value in rows if value]


def _describe_gap(facts: Facts) -> str:
    """What the gap was measured on, where some of the text was the student's own and the policy has a gap."""
    own_text, options = facts.section("data").get("on_policy"), policy_facts(facts).options
    if not own_text or "gap_source" not in options:
        return ""
    if options["gap_source"] != "measured":
        return "not of the rows that were trained on (`gap_source`)"
    if own_text.get("gap_on") == "teacher_argmax":
        return "measured on the data's rows, and on the student's own text with the teacher's first choices as labels"
    return "measured on the data's rows alone, and held in steps on the student's own text"


def _describe_rows(facts: Facts) -> list[tuple[str, str]]:
    """How instructions and their answers became what the student learnt from."""
    data, answers = facts.section("data"), "those of the data"
    if data.get("responses") == "teacher":
        answers = "the teacher's: it answered every training prompt once (sequence-level distillation)"
    return [
        ("answers learnt from", answers),
        ("the student's own text", _describe_own_text(facts)),
        # What auto became: the rows were encoded with it
        ("prompt template", f"`{facts.manifest.get('template') or data.get('prompt_template')}`"),
        ("limits", f"{data.get('max_length')} tokens a row, {data.get('max_prompt_length')} of them for the prompt"),
    ]


def _describe_own_text(facts: Facts) -> str:
    """How much of the training was on the student's own answers, and how they were drawn; empty without mixed data."""
    chosen = facts.section("data").get("on_policy")
    if not chosen:
        return ""
    lines = [line for line in facts.log if "generated_share" in line]
    shares = {
        name: sum(line.get(name) or 0.0 for line in lines) / len(lines)
        for name in ("generated_share", "replayed_share") if lines
    }  # fmt: skip
    words = (
        f"its answers to {shares.get('generated_share', 0.0):.0%} of the prompts of the run, at most "
        f"{chosen['max_new_tokens']} tokens, sampled at temperature {chosen['temperature']:g} and top_p {chosen['top_p']:g}"
    )
    if chosen.get("adaptive"):
        phi = next((line["on_policy_fraction"] for line in reversed(lines) if "on_policy_fraction" in line), None)
        reached = "" if phi is None else f", to {phi:g} at the end"
        words += f"; the share followed the held-out loss (DistiLLM){reached}"
        words += f", and {shares.get('replayed_share', 0.0):.0%} of the rows were answers of earlier steps"
    return words + ("; generated by vLLM" if chosen.get("backend") == "vllm" else "")


def _describe_loss(facts: Facts, hard: str, soft: str) -> str:
    """The weighted sum that was minimised, with the recipe's weights or the policy's own."""
    ratio = number(facts.section("loss").get("kd_ratio"))
    if not facts.recipe or not facts.learns_from_teacher or ratio is None:
        return hard
    own = policy_facts(facts).kd_ratio if softens(facts) else None
    if own is None:
        return f"{1 - ratio:.3g} x {hard} + {ratio:.3g} x {soft}"
    start, end = own
    words = f"(1 - kd_ratio) x {hard} + kd_ratio x {soft}; kd_ratio set by the policy: "
    return words + (f"{start:.3g}" if start == end else f"{start:.3g} at the start, {end:.3g} at the end")


def limits(facts: Facts, origins: Inherited | None = None) -> list[str]:
    """What the scores do not tell, in plain sentences."""
    found = ["One training run with one seed: another seed gives other numbers, and their spread was not measured."]
    counts = [(name, n) for name in facts.sets if (n := facts.rows_in(name))]
    source = "its teacher" if facts.learns_from_teacher else "the model that gave it its first weights"
    # For people who meet the model without its makers: what a licence or a safety test would need is not known here
    inherits = f"The student inherits the errors and biases of {source} and of its data."
    unknown = f"Its licence follows from that of {source} and from that of the data; `dts_hf` does not set one."
    licence = (origins.sentences() if origins else []) or [unknown]
    protocol = facts.metrics.get("protocol") or {}
    if facts.task:
        rows = ", ".join(f"{n} rows ({name})" for name, n in counts) or "no rows: it was not evaluated"
        chosen = " The rows of validation also chose the weights that are kept, which flatters their scores a little."
        return [*found, f"The scores rest on {rows}.{chosen if kept_best(facts) else ''}", inherits, *licence]
    if counts:
        prompts = ", ".join(f"{n} prompts ({name})" for name, n in counts)
        found.append(f"The scores rest on {prompts}; differences of a few points are within chance at such sizes.")
        sampled = "Answers were sampled, with the seeds named beside the scores; greedy answers score differently."
        greedy = "Answers were generated greedily (always the most probable token); sampled answers score differently."
        found.append(sampled if protocol.get("do_sample") else greedy)
    else:
        found.append("This student was not evaluated by generation.")
    if protocol.get("no_repeat_ngram_size"):
        found.append(
            f"Generation forbade repeated {protocol['no_repeat_ngram_size']}-grams; without that rule the student "
            "may repeat itself more."
        )
    if teacher_is_reference(facts):
        found.append(
            "The reference answers are the teacher's own. ROUGE-L and exact match tell how well the student imitates "
            "the teacher, not whether an answer is true."
        )
    else:
        found.append("ROUGE-L measures shared wording with a reference answer, not whether an answer is true.")
    return [*found, f"{inherits} It was not tested for safety.", *licence]


def example_prompt(facts: Facts, student: Path | None = None) -> str | None:
    """The example question in the prompt template, as a Python string; None for ``chat``, which the tokenizer has."""
    name = facts.section("data").get("prompt_template")
    if name in (None, AUTO) and student is not None:
        name = read_json(student / STUDENT_FILE).get("prompt_template") or name
    if name == AUTO and student is not None and student.is_dir() and not has_chat_template(student):
        name = "alpaca"
    if facts.task or name in (AUTO, "chat"):
        return None
    if name is None:  # a student whose run is not there
        return None if student is None or has_chat_template(student) else repr(EXAMPLE_QUESTION)
    from dts_hf.data.chat_templates import get_template
    from dts_hf.data.rows import Row

    row = Row(id="example", instruction=EXAMPLE_QUESTION, input="", references=("",), messages=None)
    # As a Python literal: quotes and line breaks of the template cannot end the string of the example
    return repr(get_template(name).render(row, cast(Any, None)))  # these templates ask no tokenizer


def end_tokens(where: Setting) -> list[int]:
    """The tokens that end an answer of the student; none where nobody knows them."""
    if where.end_tokens or where.student is None:
        return list(where.end_tokens)
    found = read_json(where.student / "generation_config.json").get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def has_chat_template(student: Path) -> bool:
    """Whether a student's folder says how a conversation is written."""
    if (student / "chat_template.jinja").is_file() or (student / "chat_template.json").is_file():
        return True
    return bool(read_json(student / "tokenizer_config.json").get("chat_template"))


def models_of(recipe: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """First weights and teachers of a recipe, each with its revision."""
    several = recipe.get("teachers") or {}
    teachers = [recipe.get("teacher") or {}, *several.values()]
    teachers = [teacher for teacher in teachers if teacher.get("kind") != "self"]  # it has no name
    named = [_first_weights(recipe), *((teacher.get("model"), teacher.get("revision")) for teacher in teachers)]
    found = [(name, revision) for name, revision in named if name]
    return list(dict.fromkeys(found)) if several else found


def _first_weights(recipe: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The model that gave the student its first weights, with its revision; None: they were random, or nobody knows."""
    student, teacher = recipe.get("student") or {}, recipe.get("teacher") or {}
    origin = (student.get("init") or {}).get("from", "teacher") if student.get("init") else None
    if origin == "teacher":
        return teacher.get("model"), teacher.get("revision")
    name = student.get("model") if origin is None else origin
    return (None, None) if origin == "config" else (name, student.get("revision"))


# -------------------------------------------------------------------------------------------------------- helpers


def _origin(facts: Facts) -> str | None:
    return _first_weights(facts.recipe)[0]


def _sources(facts: Facts) -> list[str]:
    train = facts.section("data").get("train") or []
    listed = train if isinstance(train, list) else [train]
    return [one["source"] if isinstance(one, dict) else one for one in listed]


def _published(source: Any) -> str:
    return ", ".join(map(short_name, source)) if isinstance(source, list) else short_name(str(source))


def _format_parameters(facts: Facts) -> str:
    student, teacher = (number(facts.model(name).get("parameters")) for name in ("student", "teacher"))
    words = f"student {format_count(student)}" if student else ""
    if teacher:
        words += f"{', ' if words else ''}teacher {format_count(teacher)}"
    return words


def _describe_split(entry: dict[str, Any]) -> str:
    words = f"`{_published(entry.get('source', 'unknown'))}`"
    if entry.get("kept") is not None:
        words += f", {entry['kept']} of {entry.get('rows', '?')} rows used"
    for key in ("dropped", "cut"):
        if entry.get(key):
            words += f", {entry[key]} {key}"
    if entry.get("response_tokens"):
        words += f", {format_count(entry['response_tokens'])} answer tokens"
    if entry.get("sha256"):
        words += f", sha256 `{entry['sha256']}`"
    return words


def _describe_training(facts: Facts) -> str:
    done, given = facts.metrics.get("training") or {}, publishable(dict(facts.section("training")))
    named = ("learning_rate", "num_train_epochs", "max_steps", "seed")
    parts = [
        f"{done['steps']} optimizer steps" if done.get("steps") else "",
        f"{format_count(done['tokens'])} tokens" if done.get("tokens") else "",
        format_duration(done["seconds"]) if done.get("seconds") else "",
        f"peak memory {done['peak_memory_gb']:.1f} GB" if number(done.get("peak_memory_gb")) else "",
        *(f"`{key}={given[key]}`" for key in named if key in given),
    ]
    return ", ".join(filter(None, parts))


def _describe_versions(facts: Facts) -> str:
    packages = facts.environment.get("packages") or {}
    quantizer = QUANTIZED_BY.get(str(facts.section("teacher").get("quantization")))
    shown = [f"{name} {packages[name]}" for name in (*VERSIONS_SHOWN, quantizer) if name in packages]
    if facts.environment.get("python"):
        shown.insert(0, f"Python {facts.environment['python']}")
    if facts.environment.get("git_commit"):
        shown.append(f"git commit of the working folder `{facts.environment['git_commit']}`")
    return ", ".join(shown)
