"""``data.responses: teacher``: the rows of a recipe with its teacher's answers, which are made once and kept in the cache.

The road is that of ``dts-hf generate --for-training`` (``generation/answers.py``). The file is named after everything that
the text depends on, so a changed prompt, teacher or limit is answered anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts_hf.data.cache import default_cache
from dts_hf.data.chat_templates import Template, encode_prompts, end_of_turn_ids
from dts_hf.data.formats import CUT
from dts_hf.data.rows import Row
from dts_hf.distributed.processes import on_first_process, process
from dts_hf.errors import UserError
from dts_hf.files import file_sha256, read_jsonl, read_sealed
from dts_hf.generation.answer_blocks import AnswerBlocks
from dts_hf.generation.answers import Answer, Answerer, AnswerSettings, write_answers
from dts_hf.generation.engine import GenerationSettings
from dts_hf.models.description import READ_TO_ANSWER, describe_model, describe_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dts_hf.recipe.schema import Recipe

FORMAT = 2
#: Prompts that are encoded together for the name of the file.
BLOCK = 1000


def answer_rows(
    recipe: Recipe,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
) -> tuple[list[Row | None], dict[str, Any]]:
    """The same rows with the teacher's greedy answer as their only reference.

    Every process calls it; each answers a share of the prompts, and the first one keeps the cache.

    Args:
        recipe: names teacher, limits, filters and the folder of the cache.
        teacher: answers the prompts.
        tokenizer: of the teacher, which is the student's as well.
        template: turns a row into a prompt.
        rows: their own references are not looked at.

    Returns:
        the rows in order, None where the prompt does not fit or no answer was kept, and
        ``{"fingerprint", "cached", "answered", "counts"}`` for the data manifest.

    Raises:
        UserError: the folder of the cache cannot be made.
    """
    settings = answer_settings(recipe)
    encode = partial(
        encode_prompts, tokenizer=tokenizer, template=template, max_prompt_length=recipe.data.max_prompt_length
    )
    rank, world = process()

    def find() -> tuple[dict[str, Any], dict[str, Any]]:
        identity = _identity(recipe, teacher, tokenizer, template, settings, rows)
        path = _file(recipe, identity)
        _make_folder(path.parent)
        return identity, _finished(path, identity)

    identity, manifest = on_first_process(find, rank, world)
    path, cached = _file(recipe, identity), bool(manifest)
    if not cached:
        # Of this run alone: another one with the same teacher may be answering the same prompts right now
        run = hashlib.sha256(str(Path(recipe.output.dir).resolve()).encode()).hexdigest()[:8]
        folder = path.with_name(f"{path.stem}-{run}.unfinished")
        blocks = AnswerBlocks(path, rank, world, folder=folder, key="data.cache_dir", private=True)
        answerer = Answerer(teacher, tokenizer, end_of_turn_ids(tokenizer, template), encode, _lines)
        items = ((row, place) for place, row in enumerate(rows))
        manifest = dict(
            write_answers(
                blocks, identity, items, len(rows), answerer, settings, overwrite=True, progress="teacher answers"
            )
        )
    answered = _with_answers(rows, on_first_process(lambda: list(read_jsonl(path)), rank, world))
    return answered, _about(path, cached, answered, manifest)


def kept_answers(
    recipe: Recipe,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
) -> tuple[list[Row | None], dict[str, Any]] | None:
    """What ``answer_rows`` would return, where the cache has it already; None: somebody would have to answer first.

    Args:
        recipe: see ``answer_rows``.
        teacher: is not run.
        tokenizer: see there.
        template: see there.
        rows: see there.
    """
    identity = _identity(recipe, teacher, tokenizer, template, answer_settings(recipe), rows)
    path = _file(recipe, identity)
    if not (manifest := _finished(path, identity)):
        return None
    answered = _with_answers(rows, read_jsonl(path))
    return answered, _about(path, True, answered, manifest)


def _with_answers(rows: Sequence[Row], lines: Iterable[Mapping[str, Any]]) -> list[Row | None]:
    answered: list[Row | None] = [None] * len(rows)
    for line in lines:
        cut = line["finish_reason"] == CUT
        answered[line["place"]] = dataclasses.replace(
            rows[line["place"]], references=(line["text"],), answer=None, cut=cut
        )
    return answered


def _about(path: Path, cached: bool, answered: Sequence[Row | None], manifest: Mapping[str, Any]) -> dict[str, Any]:
    count = sum(row is not None for row in answered)
    return {"fingerprint": path.stem, "cached": cached, "answered": count, "counts": manifest["counts"]}


def answer_settings(recipe: Recipe) -> AnswerSettings:
    """How the teacher of ``recipe`` answers its rows, and which answers are kept."""
    data = recipe.data
    generation = GenerationSettings(
        max_new_tokens=data.teacher_max_new_tokens, batch_size=recipe.evaluation.batch_size
    )
    return AnswerSettings(generation, cut=data.cut_answers, max_repetition=data.max_repetition)


def _lines(_row: Row, place: int, answers: Sequence[Answer]) -> Iterator[Mapping[str, Any]]:
    for answer in answers:
        yield {"place": place, "text": answer.text, "finish_reason": CUT if answer.cut else "stop"}


def _file(recipe: Recipe, identity: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(recipe.data.cache_dir) if recipe.data.cache_dir else default_cache() / "teacher_answers"
    return folder / f"{name}.jsonl"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot make the folder {folder}: {error.strerror}") from None


def _finished(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of answers that are all there, as they were written; else empty: they are made again."""
    manifest = read_sealed(AnswerBlocks(path).manifest_path)
    whole = manifest.get("identity") == identity and isinstance(manifest.get("counts"), dict)
    return manifest if whole and path.is_file() and manifest.get("sha256") == file_sha256(path) else {}


def _identity(
    recipe: Recipe,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: AnswerSettings,
    rows: Sequence[Row],
) -> dict[str, Any]:
    """All that the answers depend on: teacher, tokenizer, limits, filters and the very tokens of the prompts."""
    asked = recipe.required_teacher
    prompts = hashlib.sha256()
    for start in range(0, len(rows), BLOCK):
        encoded = encode_prompts(list(rows[start : start + BLOCK]), tokenizer, template, recipe.data.max_prompt_length)
        prompts.update(json.dumps([None if prompt is None else prompt.ids for prompt in encoded]).encode())
    identity = {
        "format": FORMAT,
        "teacher": describe_model(teacher, asked.model, asked.revision, READ_TO_ANSWER),
        "tokenizer": describe_tokenizer(tokenizer),
        "turn_ends": end_of_turn_ids(tokenizer, template),
        "settings": settings.identity(),
        "prompts": prompts.hexdigest(),
    }
    return dict(json.loads(json.dumps(identity)))
