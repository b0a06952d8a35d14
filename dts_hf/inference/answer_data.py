"""``dts-hf generate --for-training``: a model's answers to the rows of a data set, as rows that ``data.train`` takes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dts_hf.console import working
from dts_hf.data.asked import asked_row, unique_ids, with_answer
from dts_hf.data.chat_templates import EncodedPrompt, Template, encode_prompts, end_of_turn_ids, is_dated
from dts_hf.data.rows import Row
from dts_hf.data.sources import public_name, source_files, source_objects
from dts_hf.distributed.processes import join_processes, on_first_process, process
from dts_hf.errors import UserError
from dts_hf.evaluation.subject import find_subject
from dts_hf.files import jsonable
from dts_hf.generation.answer_blocks import AnswerBlocks
from dts_hf.generation.answers import Answer, Answerer, AnswerSettings, write_answers
from dts_hf.generation.shares import rows_are_independent
from dts_hf.inference.speakers import Speaker, load_speaker, template_of
from dts_hf.models.description import describe_model, describe_tokenizer, versions
from dts_hf.teachers.answer_scores import AnswerScorer

FORMAT = 1


@dataclass(frozen=True)
class AnswerDataOptions:
    """What is answered, how, and where the rows go.

    Args:
        data: rows in any form that training takes, with or without responses: file, folder, pattern or Hub data set.
        output: the JSON lines that are written.
        settings: how rows are answered, and which answers are kept.
        scorer: Hub name, folder or run directory of the model that chooses the best answer; None: the one that answers.
        split: of a Hub data set, or of a folder whose files are called after splits.
        rows: answer the first so many; None: all.
        template: name of the prompt template of the model that answers; None: that of the run, or of the folder.
        dtype: of the weights of both models; None: as the run evaluates, for a model float32.
        overwrite: replace other rows in ``output``, or begin anew what was begun with other settings.
    """

    data: str
    output: Path
    settings: AnswerSettings
    scorer: str | None = None
    split: str = "train"
    rows: int | None = None
    template: str | None = None
    dtype: str | None = None
    overwrite: bool = False


class _Read(NamedTuple):
    """How many rows there are, and a digest over all of them in order."""

    rows: int
    digest: str


def write_answer_data(model: str, options: AnswerDataOptions) -> tuple[Mapping[str, Any], bool]:
    """Answer the rows of a data set; launched on several processes (``torchrun``), they share them out.

    The same call goes on behind a kill, and does nothing once all is there. ``docs/sequence_level.md`` says what the file
    and its manifest hold.

    Args:
        model: Hub name, model folder, or run directory (its student).
        options: what is answered, how, and where the rows go.

    Returns:
        the manifest, and whether the file was there already.

    Raises:
        UserError: a row is wrong, the template cannot hold one, an option, a model that cannot be loaded, or rows in
            ``output`` that are of other settings or nobody's. Every process raises it.
    """
    if options.scorer is not None and options.settings.best_of is None:
        raise UserError("--scorer: chooses among the answers to a row; expected --best-of mean with it")
    device = join_processes()
    rank, world = process()
    blocks = AnswerBlocks(options.output, rank, world)
    on_first_process(lambda: _check_paths(options), rank, world)
    read = on_first_process(lambda: _read(options), rank, world)
    known = _identity(options, read)
    blocks.check(known, options.overwrite)  # before minutes of loading

    speaker = _load(model, options, "model", options.template, device)
    limit = speaker.longest_prompt(options.settings.generation.max_new_tokens)
    scorer = None if options.scorer is None else _load(options.scorer, options, "scorer", None, device)
    on_first_process(lambda: _check_template(options, [speaker] if scorer is None else [speaker, scorer]), rank, world)
    identity = on_first_process(lambda: _with_models(known, model, speaker, options.scorer, scorer), rank, world)
    if blocks.check(identity, options.overwrite) == "finished":
        return on_first_process(blocks.read_manifest, rank, world), True
    answerer = Answerer(
        speaker.model,
        speaker.tokenizer,
        end_of_turn_ids(speaker.tokenizer, speaker.template),
        partial(_encode, speaker=speaker, limit=limit),
        partial(_lines, several=options.settings.answers > 1 and options.settings.best_of is None),
        _scorer(scorer or speaker, "--scorer" if scorer else "the model") if options.settings.best_of else None,
    )
    items = _items(options, read)
    made = write_answers(
        blocks,
        identity,
        items,
        read.rows,
        answerer,
        options.settings,
        overwrite=options.overwrite,
        progress="answers",
    )
    return made, False


def _check_paths(options: AnswerDataOptions) -> None:
    """Refuse what cannot hold the rows, or would replace what they are made from."""
    if options.output.suffix != ".jsonl":
        raise UserError(
            f"--output: got {options.output}, expected the name of a file of JSON lines, such as answers.jsonl"
        )
    for file in source_files(options.data, split=options.split) or ():
        if os.path.realpath(file) == os.path.realpath(options.output):
            raise UserError(
                f"--output: {options.output} is a file of --data, whose rows would be lost. Choose another file"
            )
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {options.output.parent}: cannot make this folder: {error.strerror}") from None


def _records(options: AnswerDataOptions) -> Iterator[tuple[Row, Any]]:
    for default_id, where, obj in islice(source_objects(options.data, options.split), options.rows):
        yield asked_row(obj, where, default_id)[0], obj


def _digested(records: Iterator[tuple[Row, Any]], digest: Any) -> Iterator[tuple[Row, Any]]:
    for row, obj in records:
        digest.update(json.dumps([row.id, jsonable(obj)]).encode())
        yield row, obj


def _read(options: AnswerDataOptions) -> _Read:
    """Every row once, before the first answer: what is wrong with one shows in seconds.

    Raises:
        UserError: a row is wrong, or two have one id, or would have.
    """
    digest, count = hashlib.sha256(), 0
    with working("reading the rows"):
        settings = options.settings
        answers = settings.answers if settings.best_of is None else 1
        for _ in unique_ids(_digested(_records(options), digest), options.data, answers):
            count += 1
    return _Read(count, digest.hexdigest())


def _items(options: AnswerDataOptions, read: _Read) -> Iterator[tuple[Row, Any]]:
    """The rows, which must be those that were read before.

    Raises:
        UserError: they have changed meanwhile.
    """
    digest, count = hashlib.sha256(), 0
    for item in _digested(_records(options), digest):
        count += 1
        if count > read.rows:
            break
        yield item
    if (count, digest.hexdigest()) != read:
        raise UserError(
            f"--data: {options.data} was written to while its rows were answered; begin anew with --overwrite"
        )


def _load(model: str, options: AnswerDataOptions, label: str, template: str | None, device: torch.device) -> Speaker:
    subject = find_subject(model)
    named: str | Template = template or template_of(subject)
    dtype = options.dtype or subject.dtype or "float32"
    return load_speaker(label, subject.location, template=named, key=label, dtype=dtype, device=device)


def _check_template(options: AnswerDataOptions, speakers: Sequence[Speaker]) -> None:
    """Word every prompt once.

    Raises:
        UserError: a template cannot hold one.
    """
    for row, _ in _records(options):
        for speaker in speakers:
            speaker.template.render(row, speaker.tokenizer)


def _scorer(speaker: Speaker, name: str) -> AnswerScorer:
    return AnswerScorer(speaker.model, speaker.tokenizer, speaker.template, name)


def _encode(rows: list[Row], speaker: Speaker, limit: int) -> list[EncodedPrompt | None]:
    """Prompts whole or not at all: the row that is written keeps all of its input, so the model must have seen it."""
    prompts = encode_prompts(rows, speaker.tokenizer, speaker.template, limit)
    return [None if prompt is None or prompt.cut else prompt for prompt in prompts]


def _lines(row: Row, obj: Any, answers: Sequence[Answer], several: bool) -> Iterator[Mapping[str, Any]]:
    for answer in answers:
        yield with_answer(obj, row, answer.text, cut=answer.cut, number=answer.number if several else None)


# ------------------------------------------------------------------------------------------------------------ identity


def _identity(options: AnswerDataOptions, read: _Read) -> dict[str, Any]:
    """What the rows depend on, without the models; JSON's values."""
    settings = options.settings.identity()
    return {
        "format": FORMAT,
        "data": {"source": public_name(options.data), "rows": read.rows, "sha256": read.digest},
        "settings": {**settings.pop("generation"), **settings},
    }


def _with_models(
    known: Mapping[str, Any], name: str, speaker: Speaker, scorer_name: str | None, scorer: Speaker | None
) -> dict[str, Any]:
    described = {**known, "model": _described(name, speaker), "versions": versions()}
    if scorer is not None and scorer_name is not None:
        described["scorer"] = _described(scorer_name, scorer)
    return dict(json.loads(json.dumps(described)))


def _described(name: str, speaker: Speaker) -> dict[str, Any]:
    template, tokenizer = speaker.template, speaker.tokenizer
    return {
        "name": public_name(name),
        **describe_model(speaker.model, find_subject(name).location),
        "tokenizer": describe_tokenizer(tokenizer),
        "template": {"name": template.name, "wraps_prompts": template.wraps_prompts},
        "exact": rows_are_independent(speaker.model),
        # A chat template that writes the date asks another question tomorrow
        "day": date.today().isoformat() if template.is_chat and is_dated(tokenizer) else None,
    }
