"""``cache_teacher(recipe)``: the teacher runs once over a recipe's rows, and its states are kept (``teacher.kind: cached``).

It goes the way of ``distill`` as far as the rows: the same rows, tokenizers, template and limits, and the teacher's own
answers where ``data.responses`` asks for them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging as transformers_logging

from dts_hf.console import duration, gb, say, working
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.routes import Routing
from dts_hf.distributed.launch import check_launch, limit_waiting
from dts_hf.distributed.processes import on_first_process
from dts_hf.distributed.sharding import place_teacher
from dts_hf.divergences import build_divergence
from dts_hf.errors import UserError
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.models.checks import check_positions
from dts_hf.models.loading import load_teacher, load_tokenizers
from dts_hf.models.quantization import check_quantization
from dts_hf.models.vocabulary import check_tokenizers, plan_for
from dts_hf.recipe.schema import Recipe, Teacher
from dts_hf.task import Data
from dts_hf.task import Rows as TextRows
from dts_hf.teachers.cached.folder import held, own_bytes, remove_cache
from dts_hf.teachers.cached.layout import MANIFEST, Manifest, Plan, bytes_per_label
from dts_hf.teachers.cached.reader import verified
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.cached.writer import BATCH_TOKENS, SHARD_BYTES, Facts, Rows, make_plan, write_cache
from dts_hf.teachers.compact import CompactFormat, ErrorAt, measured_rows, pilot
from dts_hf.teachers.identity import TeacherIdentity, identity_of, rows_facts
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.several import naming_teacher
from dts_hf.temperature import build_temperature

#: What of ``data`` decides how a row is cut and what is learned of it.
LABEL_RULE = ("prompt_template", "train_on", "max_length", "max_prompt_length", "long_rows", "responses")


@dataclass(frozen=True)
class CacheOptions:
    """How a cache is written.

    Attributes:
        dtype: ``float32``, ``bfloat16`` or ``int8``; None: the teacher's own, in which nothing is lost.
        shard_bytes: of a shard; a kill costs a process one of them at most.
        batch_tokens: padded tokens that the teacher is given at once.
        overwrite: replace another cache in the folder, once all else is checked and measured.
        compact: keep so many logits of each label and what the others weigh, in the place of states; ``dtype`` is then that
            of the kept logits, float16 (None) or float32.
        forced: also where ``compact`` keeps too little at the temperatures of the recipe.
    """

    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    batch_tokens: int = BATCH_TOKENS
    overwrite: bool = False
    compact: int | None = None
    forced: bool = False


def folders_of(recipe: Recipe, output: Path | None, teacher: str | None = None) -> dict[str, Path]:
    """Where the recipe's cache is or will be; of several teachers each one's, by the first of its names (else ``""``).

    Args:
        recipe: its ``teacher.cache``, where ``output`` does not say it.
        output: of the command line; of several teachers ``output/NAME``.
        teacher: one of several, whose cache alone is meant.

    Raises:
        UserError: nothing says it, or there is no such teacher.
    """
    names = [recipe.names_of(teacher)[0]] if teacher is not None else recipe.distinct_teachers
    sections = {key.partition(".")[2]: section for key, section in recipe.all_teachers.items()}
    named = {name: sections[name].cache for name in names if name in sections}
    if output is not None:
        return {name: (output / name if len(names) > 1 else output).expanduser() for name in names}
    found = {name: Path(cache).expanduser() for name, cache in named.items() if cache is not None}
    if not found:
        key = f"teachers.{teacher or 'NAME'}.cache" if recipe.teachers else "teacher.cache"
        each = ", in which each teacher has one of its own" if len(names) > 1 else ""
        raise UserError(f"--output: is missing, expected the folder of the cache{each} (or {key} in the recipe)")
    if len({path.resolve() for path in found.values()}) < len(found):
        raise UserError(
            f"teachers: {' and '.join(found)} are of different sections and have the same cache; give each a folder of its "
            "own, or make their sections equal"
        )
    return found


def cache_teacher(
    recipe: Recipe, folder: Path, options: CacheOptions | None = None, teacher: str | None = None
) -> Manifest:
    """Write the states of the recipe's teacher over its training and validation rows; all processes call it.

    A teacher with another tokenizer (``teacher.alignment``) is asked what training asks it: its own labels of the rows as it
    reads them.

    Args:
        recipe: of a language model with a teacher.
        folder: of the cache; what an earlier try has left there is gone on with.
        options: None: the usual ones.
        teacher: which of several; where each row names one, its rows alone are cached.

    Raises:
        UserError: wrong input, before the teacher runs; the folder holds another cache; or a compact one would keep too
            little, which is measured on some rows before anything is written.
        RunError: the teacher gives states that are non-finite.
    """
    options, began = options or CacheOptions(), time.monotonic()
    with naming_teacher("" if teacher is None else teacher):
        return _cached(recipe, teacher, folder, options, began)


def _cached(recipe: Recipe, teacher: str | None, folder: Path, options: CacheOptions, began: float) -> Manifest:
    # 1. What can be refused without loading anything
    alone, own_rows = _alone(recipe, teacher)
    recipe = _with_live_teacher(alone)
    task = LanguageModeling(recipe)
    args = task.training_arguments(folder)
    check_launch(args)
    limit_waiting(args)
    section, rank, world = recipe.required_teacher, args.process_index, args.world_size
    if options.compact is not None and section.alignment is not None:
        raise UserError(
            f"--compact: got {options.compact} with teacher.alignment: {section.alignment}, which asks for the logits of "
            "tokens that a compact cache has not kept, or for states: leave it out"
        )
    check_quantization(section.quantization, args.device)
    transformers_logging.disable_progress_bar()
    stack = ExitStack()
    on_first_process(lambda: stack.enter_context(held(folder)), rank, world)  # before minutes of loading
    with stack:
        return _written(task, own_rows, folder, options, args, began)


def _alone(recipe: Recipe, teacher: str | None) -> tuple[Recipe, Callable[[TextRows], TextRows]]:
    """The recipe with one teacher, and what leaves of its rows those that this one has.

    Raises:
        UserError: there are several and none of them is named, or there is none of that name.
    """
    if not recipe.teachers:
        if teacher is not None:
            raise UserError(f"--teacher: got '{teacher}', but the recipe has no section teachers; leave it out")
        return recipe, lambda rows: rows
    if teacher is None:
        raise UserError(f"--teacher: is missing, expected one of {', '.join(recipe.teachers)}")
    return recipe.with_teacher(teacher), partial(_rows_of, recipe.routing, recipe.names_of(teacher))


def _rows_of(routing: Routing | None, names: Sequence[str], rows: TextRows) -> TextRows:
    """Those of the rows that name a teacher by one of ``names``; without a column all of them.

    Raises:
        UserError: a row names no teacher, or none of the rows names this one.
    """
    if routing is None:
        return rows
    parts = {"data.train": (rows.train, rows.train_parts), "data.validation": (rows.validation, rows.validation_parts)}
    own = []
    for name, (of_part, sources) in parts.items():
        numbers = routing.numbers(of_part, name, [(part.source, part.used) for part in sources])
        own.append([row for row in of_part if routing.names[numbers[row.id]] in names])
    train, validation = own
    if not (train or validation):
        raise UserError(f"no row has the teacher {' or '.join(names)} in its column '{routing.column}'; leave it out")
    return replace(rows, train=train or validation, validation=validation if train else [])


def _written(
    task: LanguageModeling,
    own_rows: Callable[[TextRows], TextRows],
    folder: Path,
    options: CacheOptions,
    args: TrainingArguments,
    began: float,
) -> Manifest:
    """The rows, the teacher and its states; nothing that lies in the folder is touched before all is checked."""
    recipe, rank, world = task.recipe, args.process_index, args.world_size
    section = recipe.required_teacher
    # 2. Rows as they are trained on
    with working("reading and encoding the rows"):
        loaded = own_rows(task.load_rows())
        student_tokenizer, teacher_tokenizer = load_tokenizers(recipe)
    reader = _reader(recipe, student_tokenizer, teacher_tokenizer)
    shared = check_tokenizers(reader, teacher_tokenizer, section.vocab_alignment)
    with working("loading the teacher"):
        teacher, identity = _teacher_of(task, reader, args.device)
    if recipe.data.responses == "teacher":
        model: Any = teacher.model if isinstance(teacher, LiveTeacher) else load_teacher(section)
        loaded = task.answer(model, student_tokenizer, loaded)
    data = task.encode(loaded, student_tokenizer)
    rows = rows_of(data)
    for of in _sets(data):
        if isinstance(teacher, LiveTeacher):
            check_positions(teacher.model, "the teacher", max(of.teacher_lengths), "Lower data.max_length")  # type: ignore[arg-type]
        else:
            teacher.check_rows(of, "data")
    # 3. States
    errors: list[ErrorAt] = []
    form = _compact_format(recipe, options, teacher, student_tokenizer, len(teacher_tokenizer), shared)
    plan = make_plan(rows, identity, options.dtype, options.shard_bytes, options.batch_tokens, form)
    on_first_process(lambda: _say_plan(folder, plan, options.overwrite), rank, world)
    if form is not None:
        errors = on_first_process(lambda: _measured(recipe, teacher, rows, plan, form, options.forced), rank, world)
    facts = Facts(
        label_rule=recipe.data.model_dump(include=set(LABEL_RULE)),
        data={name: of.digest for name, of in zip(("train", "validation"), _sets(data), strict=False)},
        shared_tokens=shared,
        errors=errors,
        forced=options.forced,
    )
    if options.overwrite:
        on_first_process(lambda: remove_cache(folder), rank, world)
    manifest = write_cache(folder, teacher, rows, plan, facts, rank=rank, world=world)
    if rank == 0:
        say(
            f"{folder}: {manifest.labels:,} labels of {manifest.rows:,} rows in {gb(manifest.size)}, teacher "
            f"{manifest.nll:.3f} nats per label, {duration(time.monotonic() - began)}"
        )
    return manifest


def _teacher_of(
    task: LanguageModeling, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[LiveTeacher | RemoteTeacher, TeacherIdentity]:
    """The teacher that is asked, here or behind the recipe's address, and what it is for these rows.

    Args:
        task: of the recipe.
        tokenizer: that encodes the rows.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded, or nobody answers at the address.
    """
    section, template = task.recipe.required_teacher, task.template(tokenizer)
    if isinstance(remote := task.elsewhere.get("teacher"), RemoteTeacher):
        remote.check_tokenizer(tokenizer)
        return remote.to(device), replace(remote.description.identity, **rows_facts(tokenizer, template))
    model = load_teacher(section)
    task.check_head(model, "teacher")
    name = {"name": section.model, "revision": section.revision, "quantization": section.quantization}
    identity = identity_of(model, tokenizer, template, **name)  # type: ignore[arg-type]
    place_teacher(model, "replicated", device)
    return LiveTeacher(model), identity


def _with_live_teacher(recipe: Recipe) -> Recipe:
    """The recipe as if its teacher ran: rows are answered and encoded as without a cache.

    Raises:
        UserError: there is no teacher, or none whose states are those of tokens.
    """
    section = recipe.required_teacher
    if recipe.task is not None:
        raise UserError("task: a classifier has no states of tokens to cache; expected a recipe of a language model")
    if section.kind == "self":
        never = "" if section.weights == "base" else ", and a running mean has others at every step"
        raise UserError(
            f"teacher.kind: self has no states to cache: the student gives them{never}. To cache those of its first "
            "weights, name them: kind: live, with the student's model"
        )
    if section.placement == "sharded":
        raise UserError(
            "teacher.placement: sharded, but each process of cache-teacher runs rows of its own through a whole teacher; "
            "expected replicated, or one whose weights are quantised"
        )
    if section.kind == "remote":
        return recipe
    live: Teacher = section.model_copy(update={"kind": "live", "cache": None, "missing": "error"})
    return recipe.model_copy(update={"teacher": live})


def _reader(
    recipe: Recipe, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The tokenizer of the rows as the teacher reads them."""
    return student if recipe.required_teacher.alignment is None else teacher


def _sets(data: Data) -> list[EncodedDataset]:
    return [data.train, *([] if data.validation is None else [data.validation])]


def rows_of(data: Data) -> Rows:
    """Training rows, then validation rows.

    Args:
        data: encoded.
    """
    sets = _sets(data)
    joined: ConcatDataset[object] = ConcatDataset(sets)
    return Rows(joined, [row_id for of in sets for row_id in of.row_ids])  # type: ignore[arg-type]


def _compact_format(
    recipe: Recipe,
    options: CacheOptions,
    teacher: LiveTeacher | RemoteTeacher,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokens: int,
    shared: int,
) -> CompactFormat | None:
    """What ``options.compact`` keeps, over the ids that ``teacher.vocab_alignment`` compares; None: states are kept.

    Raises:
        UserError: it is no number of tokens, or of another type than kept logits can have.
    """
    if options.compact is None:
        if options.forced:
            raise UserError("--force: belongs to --compact, which may keep too little; states are exact")
        return None
    width = teacher.head.vocab_size  # a student's narrower head is found when it is trained
    mode = recipe.required_teacher.vocab_alignment
    vocabulary = plan_for((width, width), student_tokenizer, teacher_tokens, shared, mode)
    return CompactFormat(options.compact, vocabulary.size, options.dtype or "float16")


def _measured(
    recipe: Recipe, teacher: LiveTeacher | RemoteTeacher, rows: Rows, plan: Plan, form: CompactFormat, forced: bool
) -> list[ErrorAt]:
    """Say what a compact cache loses at the temperatures that the recipe's policy may visit.

    Raises:
        UserError: see ``compact.pilot``.
    """
    temperature, loss = recipe.temperature, recipe.loss
    policy = build_temperature(temperature.name, **temperature.options)
    examples = [rows.examples[number] for number in measured_rows(len(plan.counts), sum(plan.counts))]
    errors = pilot(teacher, examples, form, policy, build_divergence(loss.divergence.model_dump()), forced)
    say(f"{form.top_k:,} of {form.vocab_size:,} tokens and the tail, over {errors[0].labels:,} labels:")
    for error in errors:
        say(f"  {error}")
    return errors


def _say_plan(folder: Path, plan: Plan, overwrite: bool) -> None:
    """Rows, labels and bytes of the cache that is to be made.

    Raises:
        UserError: the disk has no room for it.
    """
    labels, each = sum(plan.counts), plan.label_bytes
    head = 0 if plan.compact is not None else plan.identity.vocab_size * bytes_per_label(
        plan.identity.hidden_size + 1, plan.identity.dtype)  # fmt: skip
    # Of a row 32 bytes in its shard and 56 in the index; of a file its header
    needed = labels * (each + 4) + 88 * len(plan.counts) + head + 4096 * (len(plan.ranges()) + 3)
    there = next(place for place in [folder, *folder.absolute().parents] if place.exists())
    kept = own_bytes(folder)  # of this plan and gone on with, or to be removed
    if needed - kept > (free := shutil.disk_usage(there).free):
        raise UserError(f"--output: the cache takes {gb(needed)}, and {gb(free)} are free at {there}")
    complete = "; complete already" if not overwrite and (folder / MANIFEST).is_file() else ""
    what = plan.dtype if plan.compact is None else f"{plan.compact.top_k:,} logits ({plan.dtype}) and their tail"
    say(
        f"{folder}: {labels:,} labels of {len(plan.counts):,} rows, {each:,} bytes each in {what}, "
        f"{gb(needed)} in {len(plan.ranges()):,} shards{complete}"
    )


def verify_cache(folder: Path, recipe: Recipe, teacher: str | None = None) -> Manifest:
    """Read all of a cache and compare it with what was written; and make the self-test on rows of the recipe.

    Args:
        folder: the cache.
        recipe: whose rows it is of.
        teacher: which of several it is of.

    Raises:
        UserError: names the first file that is not as it was written; the states are not those that the head reads; or a row
            of the recipe is not in the cache.
    """
    with naming_teacher("" if teacher is None else teacher):
        return _verified(folder, recipe, teacher)


def _verified(folder: Path, recipe: Recipe, which: str | None) -> Manifest:
    recipe, own_rows = _alone(recipe, which)
    cache = verified(folder)
    if recipe.data.responses == "teacher":
        say("the rows of this recipe are the teacher's own answers, so no label is tested without it")
        return cache.manifest
    task, teacher = LanguageModeling(_with_live_teacher(recipe)), CachedTeacher(cache)
    tokenizer, teacher_tokenizer = load_tokenizers(recipe)
    reader = _reader(recipe, tokenizer, teacher_tokenizer)
    teacher.check_tokenizer(reader, "the student" if reader is tokenizer else "the teacher")
    data = task.encode(own_rows(task.load_rows()), tokenizer)
    for name, of in zip(("data.train", "data.validation"), _sets(data), strict=False):
        teacher.check_rows(of, name, reader, task.template(reader))
    return cache.manifest
