"""The straight line of ``dts-hf doctor``: ``diagnose(path)`` goes the way of ``distill`` and looks at each thing it meets.

recipe -> rows -> tokenizers -> labels -> memory -> models -> loss -> three steps -> disk. A check that fails is a line of
the result; those after it are made as far as they can be. Nothing is written outside a temporary folder.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.prompt_templates import get_template
from dts_hf.data.rows import Row
from dts_hf.data.samplers import total_steps
from dts_hf.data.sources import load_many, load_rows
from dts_hf.distill import check_context_length, encode, make_trainer
from dts_hf.distributed.sharding import place_teacher
from dts_hf.doctor.diagnosis import Check, Diagnosis, Skipped, need
from dts_hf.doctor.effect import Sample, check_effect, check_schedule
from dts_hf.doctor.models import check_chat_form, check_step_size, check_teacher, check_weights, take_sample
from dts_hf.doctor.resources import (
    Fits,
    PeakMemory,
    check_memory,
    check_output,
    device_of,
    duration,
    shapes_from_configs,
    tokens_per_row,
    workload_of,
)
from dts_hf.doctor.shapes import ModelShape
from dts_hf.doctor.steps import check_steps
from dts_hf.doctor.tokens import (
    check_labels,
    check_limits,
    check_rows,
    check_special_tokens,
    check_template,
    check_tokenizers,
    picture,
    spaced_indices,
)
from dts_hf.errors import UserError
from dts_hf.evaluation.scorer import load_sets
from dts_hf.models.head import head_of
from dts_hf.models.loading import load_model, load_student, load_tokenizers
from dts_hf.models.vocabulary import align_vocabularies
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.runs.memory import resident_bytes
from dts_hf.teachers.answers import answer_rows
from dts_hf.temperature import build_temperature

Shapes = tuple[ModelShape, "ModelShape | None"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from dts_hf.training.trainer import DistillationTrainer

#: So many rows are tokenised at most; they are spread over the whole file.
LOOKED_AT = 5000
#: Rows of the sample on which teacher and student are compared (fewer where the teacher has to write them first, and then
#: so many tokens of each answer at most), and labels of it that the effect test uses.
SAMPLE_ROWS = 16
ANSWERED_ROWS = 4
ANSWER_TOKENS = 32
EFFECT_LABELS = 128
#: What three steps in a temporary folder need, whatever the recipe says.
TRIAL = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "steps",
    "logging_steps": 1,
}
#: What a machine without the right device refuses.
PRECISION = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "optim", "torch_compile")
#: The doctor is one process: how the real run is spread does not concern its steps.
OF_MANY_PROCESSES = ("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config")


def diagnose(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    devices: int | None = None,
    on_check: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Examine the recipe at ``path``.

    Args:
        overrides: as for ``load_recipe``.
        devices: devices that the memory estimate is for; None: those of this machine.
        on_check: called with the name of each check as it begins.

    Raises:
        UserError: started as one of several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError("dts-hf doctor is one process: start it without accelerate or torchrun, and give --devices")
    started = time.monotonic()
    diagnosis = Diagnosis(str(path), on_check=on_check)
    recipe: Recipe | None = None
    with diagnosis.check("recipe") as check:
        recipe = load_recipe(path, overrides)
        check.summary = describe_recipe(recipe)
        if recipe.teacher is not None:
            build_temperature(recipe.temperature.name, **recipe.temperature.options).begin_run()
    if recipe is not None:
        with tempfile.TemporaryDirectory(prefix="dts_hf-doctor-") as folder, quiet():
            if recipe.task is None:
                examine(diagnosis, recipe, Path(folder), devices)
            else:
                from dts_hf.doctor.task import examine_task

                examine_task(diagnosis, recipe, Path(folder), devices)
    diagnosis.seconds = time.monotonic() - started
    return diagnosis


def examine(diagnosis: Diagnosis, recipe: Recipe, folder: Path, devices: int | None) -> None:
    """A recipe for a language model."""
    before = resident_bytes()
    recipe, args = arguments(diagnosis, recipe, folder)
    template = get_template(recipe.data.prompt_template)

    train: list[Row] | None = None
    validation: list[Row] = []
    sets: dict[str, list[Row]] = {}
    with diagnosis.check("rows") as check:
        train = load_many(recipe.data.train, split=recipe.data.train_split, limit=recipe.data.max_train_rows)
        if recipe.data.validation is not None:
            limit = recipe.data.max_validation_rows
            validation = load_rows(recipe.data.validation, split=recipe.data.validation_split, limit=limit)
        sets = load_sets(recipe.evaluation.sets, recipe.evaluation.set_rows)
        check_rows(check, train, validation)
    with diagnosis.check("tokenizers") as check:
        tokenizer = teacher_tokenizer = None
        tokenizer, teacher_tokenizer = load_tokenizers(recipe)
        check_tokenizers(check, tokenizer, teacher_tokenizer)

    data: EncodedDataset | None = None
    kept: list[Row] = []
    rows_trained_on: int | None = None
    with diagnosis.check("data") as check:
        rows = need(train, "rows")
        looked_at = [rows[index] for index in spaced_indices(LOOKED_AT, len(rows))]
        data, report = encode(recipe, looked_at, need(tokenizer, "a tokenizer"), template, "data.train")
        check_limits(check, report, data, len(rows))
        kept_ids = set(data.row_ids)
        kept = [row for row in looked_at if row.id in kept_ids]
        rows_trained_on = round(len(rows) * len(kept) / len(looked_at))
    with diagnosis.check("template") as check:
        chosen = [kept[index] for index in spaced_indices(SAMPLE_ROWS, len(kept))]
        check_template(check, template, need(tokenizer, "a tokenizer"), need(teacher_tokenizer, "a tokenizer"), chosen)

    beside = max(0, resident_bytes() - before)  # rows and tokenizers: a vocabulary of 262,144 takes 0.3 GB
    fits = Fits(loads=True, trains=True)
    shapes: Shapes | None = None
    with contextlib.suppress(Exception):  # loading the model says it better
        shapes = shapes_from_configs(recipe)
    if shapes is not None and args is not None and data is not None:
        with diagnosis.check("memory") as check:
            work = workload_of(recipe, args, shapes[0], data, beside=beside)
            fits = check_memory(check, diagnosis, recipe, shapes, work, devices)

    teacher: PreTrainedModel | None = None
    student: nn.Module | None = None
    seed = 42 if args is None else args.seed
    set_seed(seed)
    if recipe.teacher is not None:
        with diagnosis.check("teacher") as check:
            teacher = load_checked_teacher(check, recipe, args, fits.loads)
    with diagnosis.check("student") as check:
        if not fits.loads:
            raise Skipped("not loaded: too little memory")
        if recipe.student.init is not None:
            need(teacher, "the teacher that it is cut from")
        found = load_student(recipe.student, teacher)
        cut = recipe.student.init is not None  # it has the teacher's head, which was looked at
        student = found if check_weights(check, "student", found, causal=not cut) else None
        if student is not None and args is not None:
            check_step_size(check, student, args.learning_rate)
    with diagnosis.check("special-tokens") as check:
        configs = {
            who: (model.config.get_text_config(), getattr(model, "generation_config", None))  # type: ignore[operator, union-attr]
            for who, model in (("student", student), ("teacher", teacher))
            if model is not None
        }
        check_special_tokens(
            check, need(tokenizer, "a tokenizer"), need(teacher_tokenizer, "a tokenizer"), configs, data
        )
    with diagnosis.check("vocabulary") as check:
        same = diagnosis["tokenizers"].status != "error"
        check_vocabulary(check, recipe, student, teacher, tokenizer, teacher_tokenizer, same)
    with diagnosis.check("positions") as check:
        models = [model for model in (teacher, student) if model is not None]
        need(models or None, "a model")
        answered = [*validation[: recipe.evaluation.rows], *(row for of_set in sets.values() for row in of_set)]
        check_context_length(recipe, models, need(tokenizer, "a tokenizer"), template, answered)
        longest = max(need(data, "tokenised rows").lengths)
        check.summary = f"{longest} tokens of the longest row and {recipe.evaluation.max_new_tokens} of an answer fit"

    if shapes is None and student is not None:
        with diagnosis.check("memory") as check:
            real, encoded = need(args, "training arguments"), need(data, "tokenised rows")
            shapes = (ModelShape.from_model(student), None if teacher is None else ModelShape.from_model(teacher))
            work = workload_of(recipe, real, shapes[0], encoded, student, beside)
            fits = check_memory(check, diagnosis, recipe, shapes, work, devices)

    # The loss on real rows, then three steps. With sequence-level KD the teacher answers the rows of the sample itself.
    written = recipe.data.responses == "teacher"
    sample_rows = spaced_indices(ANSWERED_ROWS if written else SAMPLE_ROWS, 0 if data is None else len(data))
    if written:
        with diagnosis.check("answers") as check:
            asked = [need(kept or None, "tokenised rows")[index] for index in sample_rows]
            began = time.monotonic()
            limit = min(recipe.data.teacher_max_new_tokens, ANSWER_TOKENS)
            scratch = trial_recipe(recipe, folder)
            shortened = scratch.data.model_copy(update={"teacher_max_new_tokens": limit})
            scratch = scratch.model_copy(update={"data": shortened})
            answered_rows, _ = answer_rows(
                scratch, need(teacher, "the teacher"), need(tokenizer, "a tokenizer"), template, asked
            )  # type: ignore[arg-type]
            seconds = time.monotonic() - began
            own = {row.id: row for row in answered_rows if row is not None}
            prompts = len(train or ()) + len(validation)
            # A larger batch takes as long as this one at best, and as much longer as it is larger at worst.
            shortest = seconds * math.ceil(prompts / max(recipe.evaluation.batch_size, len(asked)))
            longest_time = seconds * prompts / len(asked) * recipe.data.teacher_max_new_tokens / limit
            check.summary = (
                f"the teacher answered {len(own)} of {len(asked)} prompts; all {prompts:,} take {duration(shortest)} to "
                f"{duration(longest_time)}, once"
            )
            check.values = {"asked": len(asked), "answered": len(own), "seconds": seconds}
            if len(own) < len(asked) / 2:
                check.warn(
                    "few-answers", f"the teacher says nothing to {len(asked) - len(own)} of {len(asked)} prompts"
                )
            kept = [own.get(row.id, row) for row in kept]
            data, _ = encode(recipe, kept, need(tokenizer, "a tokenizer"), template, "data.train")
            sample_rows = [index for index, name in enumerate(data.row_ids) if name in own] or sample_rows[:1]

    trainer: DistillationTrainer | None = None
    sample: Sample | None = None
    world = devices_of(diagnosis, devices)
    steps = steps_of_run(args, rows_trained_on, world)
    with diagnosis.check("labels") as check:
        encoded, words = need(data, "tokenised rows"), need(tokenizer, "a tokenizer")
        if fits.loads and "error" not in (diagnosis["tokenizers"].status, diagnosis["vocabulary"].status):
            with contextlib.suppress(Skipped):  # the collator can be looked at without models
                trial = trial_recipe(recipe, folder, max_steps=need(steps, "training arguments"))
                trainer = make_trainer(
                    trial, trial_arguments(trial, folder), need(student, "the student"), teacher,
                    words, need(teacher_tokenizer, "a tokenizer"), encoded, None,
                )  # fmt: skip
        collator = PaddedCollator(int(words.pad_token_id)) if trainer is None else trainer.data_collator
        check_labels(check, encoded, collator, int(words.eos_token_id))
        diagnosis.picture = picture(encoded, collator, words)
    with diagnosis.check("cross-entropy") as check:
        built = need(trainer, "a trainer")
        sample = take_sample(built, need(data, "tokenised rows"), sample_rows)
        check_teacher(check, built.eval_loss, sample, built.vocab_size, cut=recipe.student.init is not None)
        chat = need(teacher_tokenizer, "a tokenizer")
        if chat.chat_template and template.name != "chat" and "teacher_ce" in check.values:
            by_id = {row.id: row for row in kept}
            chosen = [by_id[built.train_dataset.row_ids[index]] for index in sample_rows]  # type: ignore[union-attr]
            check_chat_form(check, built, recipe, chat, chosen, check.values["teacher_ce"])
    with diagnosis.check("effect") as check:
        loss = need(trainer, "a trainer").loss
        check_effect(check, loss, need(sample, "a sample of rows").first(EFFECT_LABELS), use_of_teacher(recipe))
    with diagnosis.check("temperature") as check:
        loss = need(trainer, "a trainer").loss
        check_schedule(check, loss, need(sample, "a sample of rows").first(EFFECT_LABELS), need(steps, "rows"))
    sample = None  # it holds the student's head in fp32, a copy that the run will not have
    with diagnosis.check("steps") as check:
        if not fits.trains:
            raise Skipped("three steps on one device do not fit into its memory")
        three_steps(check, diagnosis, trainer, data, before, steps, world)
    with diagnosis.check("output") as check:
        real = need(args, "training arguments")
        shape = None if shapes is None else shapes[0]
        needs = None if shape is None or data is None else workload_of(recipe, real, shape, data, student)
        check_output(check, recipe, real, shape, needs, steps or 1, world)


# ------------------------------------------------------------------------------------------------------------- pieces


def describe_recipe(recipe: Recipe) -> str:
    """Teacher, student and loss in one line."""
    student = short(recipe.student.model or "")
    if recipe.student.init is not None:
        layers = recipe.student.init.layers
        student = f"{layers if isinstance(layers, int) else len(layers)} of its layers"
    task = "" if recipe.task is None else f"{recipe.task.name}/{recipe.task.subset}: "
    if recipe.teacher is None:
        return f"{task}{student}, from labels alone"
    loss = f"{recipe.loss.divergence.name}, kd_ratio {recipe.loss.kd_ratio:g}, temperature {recipe.temperature.name}"
    return f"{task}{short(recipe.teacher.model)} → {student}; {loss}"


def short(name: str) -> str:
    """The end of a long path."""
    name = name.removeprefix("package:")
    return name if len(name) <= 45 else f"…{name[-44:]}"


def trial_recipe(recipe: Recipe, folder: Path, max_steps: int | None = None) -> Recipe:
    """The recipe for the doctor's own steps: everything is written below ``folder``.

    Args:
        max_steps: of the real run, so that learning rate and temperature begin as they will.
    """
    training = {name: value for name, value in recipe.training.items() if name not in OF_MANY_PROCESSES} | TRIAL
    if max_steps is not None:
        training["max_steps"] = max_steps
    teacher = recipe.teacher and recipe.teacher.model_copy(update={"placement": "replicated"})  # one process
    return recipe.model_copy(
        update={
            "teacher": teacher,
            "training": training,
            "output": recipe.output.model_copy(update={"dir": str(folder / "run")}),
            "data": recipe.data.model_copy(update={"cache_dir": str(folder / "cache")}),
        }
    )


def arguments(diagnosis: Diagnosis, recipe: Recipe, folder: Path) -> tuple[Recipe, TrainingArguments | None]:
    """``TrainingArguments`` of the real run, for one process.

    Where they are refused, which is reported, the recipe is tried again in fp32 and on the CPU where there is nothing
    else, so that the other checks can be made.

    Returns:
        the recipe that the other checks are to use, and its arguments; None where nothing can be done.
    """
    args: TrainingArguments | None = None
    training = {name: value for name, value in recipe.training.items() if name not in OF_MANY_PROCESSES}
    plain = {name: value for name, value in training.items() if name not in PRECISION} | TRIAL
    plain["use_cpu"] = not torch.accelerator.is_available()
    with diagnosis.check("training") as check:
        for attempt in (training, plain):
            recipe = recipe.model_copy(update={"training": attempt})
            try:
                args = one_device(training_arguments(recipe, folder))
                break
            except UserError as error:
                if attempt is training:
                    check.error("refused", str(error), "Is this the machine that the recipe is meant for?")
        if args is not None:
            diagnosis.device = device_of(args)
            check_training(check, recipe, args, diagnosis.device["name"])
    return recipe, args


def check_training(check: Check, recipe: Recipe, args: TrainingArguments, device: str) -> None:
    """Precision, batch and learning rate in words; a warm-up that never ends."""
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else f"{recipe.student.dtype} weights"
    accumulated = f" x {args.gradient_accumulation_steps}" if args.gradient_accumulation_steps > 1 else ""
    check.summary = (
        f"on {device}, {precision}, {args.per_device_train_batch_size}{accumulated} rows a step, learning rate "
        f"{args.learning_rate:g} ({getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)})"
    )
    highest = highest_rate(str(getattr(args.optim, "value", args.optim)))
    if args.learning_rate > highest:
        check.warn(
            "learning-rate-too-high",
            f"training.learning_rate is {args.learning_rate:g}; with {getattr(args.optim, 'value', args.optim)} rates above "
            f"{highest:g} destroy what the student knows",
            f"training.learning_rate: {'0.01 to 0.1' if highest >= 1 else '1e-5 to 1e-3'}, the smaller the larger the model",
        )
    if args.max_steps > 0 and args.warmup_steps >= max(args.max_steps, 2):
        check.warn(
            "warmup-too-long",
            f"training.warmup_steps is {args.warmup_steps:g} of {args.max_steps} steps: the learning rate never gets to "
            "its value",
            "Fewer warmup_steps",
        )


def highest_rate(optimizer: str) -> float:
    """The learning rate above which no language model is trained.

    Adam and its kin divide by the gradient's size, so the rate is what every weight moves by in a step, and weights are
    about 0.02 to 0.1 large. SGD's step is as large as the (clipped) gradient makes it.
    """
    return 1.0 if optimizer.startswith("sgd") else 1e-2


def trial_arguments(trial: Recipe, folder: Path) -> TrainingArguments:
    return one_device(training_arguments(trial, folder / "run"))


def one_device(args: TrainingArguments) -> TrainingArguments:
    """A machine with many GPUs runs one process per GPU; the doctor takes the first GPU alone."""
    args.n_gpu  # noqa: B018  (sets the device up, and with it the count)
    args._n_gpu = min(args._n_gpu, 1)
    return args


def devices_of(diagnosis: Diagnosis, devices: int | None) -> int:
    """How many devices the run is for: those that were named, or those of this machine."""
    return devices or diagnosis.device.get("count", 1)


def steps_of_run(args: TrainingArguments | None, rows: int | None, devices: int) -> int | None:
    return None if args is None or rows is None else total_steps(args, rows, devices)


def use_of_teacher(recipe: Recipe) -> str | None:
    """What the teacher does beside the loss; None: nothing."""
    if recipe.data.responses == "teacher":
        return "the teacher writes the answers, and they are learned like labels"
    if recipe.student.init is not None:
        return "the teacher gives the student its first weights, and no more"
    return None


def load_checked_teacher(
    check: Check, recipe: Recipe, args: TrainingArguments | None, loads: bool
) -> PreTrainedModel | None:
    """The teacher, or None where its weights are of no use."""
    if not loads:
        raise Skipped("not loaded: too little memory")
    wanted = recipe.required_teacher
    model = load_model(
        wanted.model, key="teacher.model", dtype=wanted.dtype, revision=wanted.revision,
        quantization=wanted.quantization, trust_remote_code=wanted.trust_remote_code,
    )  # fmt: skip
    model.requires_grad_(False).eval()
    if args is not None:
        place_teacher(model, "replicated", args.device)
    return model if check_weights(check, "teacher", model) else None


def check_vocabulary(
    check: Check, recipe: Recipe, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizer: Any, same: bool
) -> None:
    """Widths of both heads beside the tokenizer's entries, and what the loss will see of them.

    Args:
        same: the two tokenizers mean the same by every id; else the heads cannot be compared.
    """
    entries = len(need(tokenizer, "a tokenizer"))
    models = {who: model for who, model in (("student", student), ("teacher", teacher)) if model is not None}
    need(models or None, "a model")
    widths = {who: head_of(model).vocab_size for who, model in models.items()}
    check.values = {"tokenizer": entries, **widths}
    shown = " and ".join(f"{width:,} ({who})" for who, width in widths.items())
    check.summary = f"heads of {shown} ids for a tokenizer of {entries:,}"
    for who, model in models.items():
        rows = model.get_input_embeddings().weight.shape[0]
        own = len(tokenizer if who == "student" else teacher_tokenizer)
        if own > min(rows, widths[who]):
            check.error(
                "token-without-row",
                f"the {who}'s tokenizer has {own:,} entries, but its model {min(rows, widths[who]):,} rows: tokens were "
                "added and the model was not resized",
                "Use the model's own tokenizer, or model.resize_token_embeddings before training it",
            )
    if len(models) < 2 or not same:
        return
    mode = "strict" if recipe.teacher is None else recipe.teacher.vocab_alignment
    plan = align_vocabularies(student, teacher, tokenizer, teacher_tokenizer, mode)
    check.values["compared"] = plan.size
    if plan.note:
        check.summary += f"; {plan.note}"
    elif min(widths.values()) > entries:
        check.summary += f"; {plan.size - entries:,} rows of padding in both, which the loss sees"


def three_steps(
    check: Check,
    diagnosis: Diagnosis,
    trainer: DistillationTrainer | None,
    data: EncodedDataset | None,
    before: int,
    steps: int | None,
    devices: int = 1,
) -> None:
    built, rows = need(trainer, "a trainer"), need(data, "tokenised rows")
    args = built.args
    per_step = tokens_per_row([rows]) * args.per_device_train_batch_size * args.gradient_accumulation_steps
    peak = PeakMemory(args.device, before)
    check_steps(check, diagnosis, built, peak, steps=need(steps, "rows"), tokens_per_step=per_step, devices=devices)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries keep their progress bars and warnings to themselves: what matters is a line of the result."""
    ours, level = logging.getLogger("dts_hf"), transformers_logging.get_verbosity()
    our_level = ours.level
    ours.setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    hub_level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.setLevel(our_level)
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        transformers_logging.enable_progress_bar()
