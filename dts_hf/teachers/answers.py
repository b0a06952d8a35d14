"""Sequence-level KD (Kim and Rush 2016, arXiv 1606.07947): the teacher answers every prompt once, and the answers are kept.

The cache is keyed by everything the text depends on, so a changed prompt, teacher or limit is generated anew. Each answer
is written down as it ends, so a run that was killed goes on behind the last one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts_hf.data.cache import default_cache
from dts_hf.data.chat_templates import Template, encode_prompts, end_of_turn_ids
from dts_hf.data.rows import Row
from dts_hf.distributed.processes import gathered, on_first_process, process
from dts_hf.errors import UserError
from dts_hf.files import write_json_atomic
from dts_hf.generation.answer_file import AnswerFile
from dts_hf.generation.engine import Generated, GenerationSettings, generate
from dts_hf.generation.shares import answer_share, decode_answer
from dts_hf.models.description import commit_of
from dts_hf.models.loading import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dts_hf.recipe.schema import Recipe


def answer_rows(
    recipe: Recipe,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
) -> tuple[list[Row | None], dict[str, Any]]:
    """The same rows with the teacher's greedy answer as their only reference.

    Every process calls it; each answers a share of the prompts, as in ``evaluate_instruct``, and the first one keeps the
    cache.

    Args:
        recipe: names teacher, limits and the folder of the cache.
        teacher: answers the prompts.
        tokenizer: of the teacher, which is the student's as well.
        template: turns a row into a prompt.
        rows: their own references are not looked at.

    Returns:
        the rows in order, None where the prompt does not fit or the teacher said nothing, and
        ``{"fingerprint", "cached", "answered"}`` for the data manifest.
    """
    prompts = encode_prompts(list(rows), tokenizer, template, recipe.data.max_prompt_length)
    usable = [index for index, prompt in enumerate(prompts) if prompt is not None]
    ids = [prompt.ids for prompt in prompts if prompt is not None]
    settings = GenerationSettings(
        max_new_tokens=recipe.data.teacher_max_new_tokens, batch_size=recipe.evaluation.batch_size
    )
    fingerprint = _fingerprint(recipe, settings, ids)
    folder = Path(recipe.data.cache_dir) if recipe.data.cache_dir else default_cache() / "teacher_answers"
    path = folder / f"{fingerprint}.json"
    rank, world = process()
    # Also where the first process alone sees the folder: what it reads, all learn
    answers = on_first_process(lambda: _read(path), rank, world)
    cached = answers is not None
    if answers is None:
        # Of this run alone: another one with the same teacher may be answering the same prompts right now
        run = hashlib.sha256(str(Path(recipe.output.dir).resolve()).encode()).hexdigest()[:8]
        unfinished = AnswerFile(folder / f"{fingerprint}-{run}.jsonl", rank)
        answers = _generate(teacher, ids, settings, tokenizer, end_of_turn_ids(tokenizer, template), unfinished)
        content = {"teacher": recipe.required_teacher.model, "answers": answers}
        on_first_process(lambda: write_json_atomic(path, content), rank, world)
        on_first_process(unfinished.remove_partial, rank, world)
    answered: list[Row | None] = [None] * len(rows)
    for index, text in zip(usable, answers, strict=True):
        if text:  # to learn from an empty answer would be to learn to say nothing
            answered[index] = dataclasses.replace(rows[index], references=(text,), answer=None)
    count = sum(row is not None for row in answered)
    return answered, {"fingerprint": fingerprint, "cached": cached, "answered": count}


def _read(path: Path) -> list[str] | None:
    """The answers kept in ``path``, None where there are none yet; then its folder is made, before the work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot make the folder {path.parent}: {error.strerror}") from None
    return json.loads(path.read_text(encoding="utf-8"))["answers"] if path.is_file() else None


def _generate(
    teacher: PreTrainedModel,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    tokenizer: PreTrainedTokenizerBase,
    turn_ends: Sequence[int],
    unfinished: AnswerFile,
) -> list[str]:
    """The answer to every prompt, on every process; those in ``unfinished`` are not made again."""
    rank, world = process()
    unfinished.path.parent.mkdir(parents=True, exist_ok=True)  # each machine may have its own
    kept = on_first_process(unfinished.load, rank, world)
    known = {int(answer.row): str(line["text"]) for answer, line in kept.items()}
    new: dict[int, str] = {}

    def finished(place: int, answer: Generated) -> None:
        new[place] = text = decode_answer(tokenizer, answer.tokens)
        unfinished.append({"seed": 0, "id": str(place), "text": text})

    answer_share(
        teacher,
        tokenizer,
        prompts,
        settings,
        turn_ends=turn_ends,
        known=known,
        on_finished=finished,
        rank=rank,
        world=world,
        progress="teacher answers",
        answer=generate,
    )
    unfinished.close()
    # An answer that was made again, below fp32, replaces the one that was there
    texts = {place: text for part in (known, *gathered(new, world)) for place, text in part.items()}
    return [texts[place] for place in range(len(prompts))]


def _fingerprint(recipe: Recipe, settings: GenerationSettings, ids: Sequence[Sequence[int]]) -> str:
    """A name for the answers: teacher, precision, limits, batches (bf16 near-ties) and the very tokens of the prompts."""
    teacher = recipe.required_teacher
    source = ModelSource.resolve(teacher.model, "teacher.model")
    commit = commit_of(teacher.model, teacher.revision)  # a branch on the Hub moves on
    files = (
        [Path(source.location) / source.gguf_file]
        if source.gguf_file
        else sorted(Path(source.location).glob("*.safetensors"))
    )
    described = {
        "teacher": [teacher.model, teacher.revision, teacher.dtype, teacher.quantization, *filter(None, [commit])],
        # A folder's weights may be replaced under the same name: size and time tell.
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "settings": dataclasses.asdict(settings),
        "prompts": hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
