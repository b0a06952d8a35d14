"""``dts-hf generate``: a model answers prompts, and that is all; ``dts-hf score`` can score what it wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dts_hf.data.asked import asked_row, unique_ids
from dts_hf.data.rows import Row
from dts_hf.data.sources import source_objects
from dts_hf.errors import UserError
from dts_hf.evaluation.references import references_of
from dts_hf.evaluation.subject import find_subject
from dts_hf.files import check_output, write_jsonl_atomic
from dts_hf.generation.engine import GenerationSettings
from dts_hf.inference.speakers import load_speaker, template_of


@dataclass(frozen=True)
class GenerateOptions:
    """What is asked, and how it is answered.

    Args:
        prompts: texts, each a message of the user.
        data: rows in any form that training takes; they may lack the answer.
        output: where the answers go, one JSON object a line; None: they are returned alone.
        max_new_tokens: longest answer, in tokens.
        temperature: of sampling; 0: the most likely token each time.
        top_p: of sampling: the likeliest tokens that together have this probability; 1: all.
        seed: of sampling.
        batch_size: prompts answered at once.
        template: name of the prompt template; None: that of the run, or of the folder.
        dtype: of the weights; None: as the run evaluates, for a model float32.
        rows: answer the first so many; None: all.
        overwrite: replace ``output`` where it is there.
    """

    prompts: tuple[str, ...] = ()
    data: str | None = None
    output: Path | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 10
    batch_size: int = 16
    template: str | None = None
    dtype: str | None = None
    rows: int | None = None
    overwrite: bool = False

    @property
    def settings(self) -> GenerationSettings:
        """For the engine."""
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            do_sample=self.temperature > 0,
            temperature=self.temperature or 1.0,
            top_p=self.top_p,
            seed=self.seed,
        )


def check_options(options: GenerateOptions, for_training: bool, of_rows: Mapping[str, object]) -> None:
    """Refuse options that do not belong together.

    Args:
        options: of the command.
        for_training: its ``--for-training``: what is written are rows to train on.
        of_rows: by name, those that only rows to train on have; what is not given is false.

    Raises:
        UserError: they do not.
    """
    if options.top_p != 1 and not options.temperature:
        raise UserError(
            "--top-p: is of sampling, and without it has no effect; expected a --temperature above 0 with it"
        )
    given = [f"--{name}" for name, value in of_rows.items() if value]
    if not for_training and given:
        raise UserError(f"{given[0]}: is for rows to train on; expected --for-training with it")
    if for_training and (options.prompts or options.data is None or options.output is None):
        raise UserError("--for-training: expected --data FILE, --output FILE.jsonl and no --prompt with it")


def generate_answers(model: str, options: GenerateOptions) -> list[dict[str, Any]]:
    """Answer prompts with a saved model or a run's student.

    Args:
        model: Hub name, model folder, or run directory.
        options: what is asked, how, and where the answers go.

    Returns:
        ``{id, prompt, prediction, tokens, finished}`` for each prompt, in order, with ``references`` where the row has one.

    Raises:
        UserError: nothing is asked, a wrong option, a file that would be replaced, or a model or rows that cannot be read.
    """
    if bool(options.prompts) == (options.data is not None):
        raise UserError("generate: give either --prompt TEXT (once or more) or --data FILE")
    if options.output is not None:
        _check_output(options.output, options.data, options.overwrite)
    settings, asked = options.settings, list(_asked(options))[: options.rows]
    subject = find_subject(model)
    template, dtype = options.template or template_of(subject), options.dtype or subject.dtype or "float32"
    speaker = load_speaker("model", subject.location, template=template, key="model", dtype=dtype)
    rows = [row for row, _ in asked]
    right = references_of(rows, speaker.tokenizer, speaker.template)
    generated = speaker.answer(rows, settings, progress="answers")
    answers: list[dict[str, Any]] = []
    for (row, has_references), references, one in zip(asked, right, generated, strict=True):
        values = {
            "id": row.id, "prompt": row.instruction, "prediction": speaker.text(one.tokens),
            "tokens": len(one.tokens), "finished": one.finished,
        }  # fmt: skip
        answers.append({**values, "references": list(references)} if has_references else values)
    if options.output is not None:
        write_jsonl_atomic(options.output, answers)
    return answers


def _check_output(output: Path, data: str | None, overwrite: bool) -> None:
    """Refuse, before anything is loaded, what cannot hold the answers or should not.

    Raises:
        UserError: a folder, the file of rows itself, a file that is there, or a folder that cannot be made.
    """
    if data is not None and not output.is_dir() and os.path.realpath(output) == os.path.realpath(data):
        raise UserError(f"--output: {output} is the file of --data, whose rows would be lost. Choose another file")
    check_output(output, "answers.jsonl", overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {output.parent}: cannot make this folder: {error.strerror}") from None


def _asked(options: GenerateOptions) -> Iterator[tuple[Row, bool]]:
    """Each row, and whether it has a reference."""
    for number, text in enumerate(options.prompts, start=1):
        if not text.strip():
            raise UserError("--prompt: got an empty text")
        yield Row(f"prompt-{number}", text, "", ("",)), False
    if options.data is None:
        return
    objects = source_objects(options.data)
    yield from unique_ids((asked_row(obj, where, row_id) for row_id, where, obj in objects), options.data)
