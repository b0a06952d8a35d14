"""Sequence-level KD (Kim and Rush 2016, arXiv 1606.07947): the teacher answers every prompt once, and the answers are kept.

The cache is keyed by everything the text depends on, so a changed prompt, teacher or limit is generated anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts_hf.data import Row
from dts_hf.errors import UserError
from dts_hf.evaluation.instruct import decode_answer
from dts_hf.generation import GenerationSettings, generate, stop_token_ids
from dts_hf.models import ModelSource
from dts_hf.prompts import Template, encode_prompts
from dts_hf.run_directory import write_json_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dts_hf.recipe import Recipe


def answer_rows(
    recipe: Recipe,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Row],
) -> tuple[list[Row | None], dict[str, Any]]:
    """The same rows with the teacher's greedy answer as their only reference.

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
    try:  # before the work, not after it
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot make the folder {folder}: {error.strerror}") from None
    cached = path.is_file()
    if cached:
        answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
    else:
        generated = generate(
            teacher,
            ids,
            settings,
            eos_token_ids=stop_token_ids(teacher, tokenizer),
            pad_token_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
            progress="teacher answers",
        )
        answers = [decode_answer(tokenizer, answer.tokens) for answer in generated]
        write_json_atomic(path, {"teacher": recipe.required_teacher.model, "answers": answers})
    answered: list[Row | None] = [None] * len(rows)
    for index, text in zip(usable, answers, strict=True):
        if text:
            answered[index] = dataclasses.replace(rows[index], references=(text,))
    return answered, {
        "fingerprint": fingerprint,
        "cached": cached,
        "answered": sum(row is not None for row in answered),
    }


def default_cache() -> Path:
    """``$DTS_HF_CACHE``, else ``$XDG_CACHE_HOME/dts_hf``, else ``~/.cache/dts_hf``."""
    if "DTS_HF_CACHE" in os.environ:
        return Path(os.environ["DTS_HF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dts_hf"


def _fingerprint(recipe: Recipe, settings: GenerationSettings, ids: Sequence[Sequence[int]]) -> str:
    """A name for the answers: teacher, precision, limits, batches (bf16 near-ties) and the very tokens of the prompts."""
    teacher = recipe.required_teacher
    source = ModelSource.resolve(teacher.model, "teacher.model")
    files = (
        [Path(source.location) / source.gguf_file]
        if source.gguf_file
        else sorted(Path(source.location).glob("*.safetensors"))
    )
    described = {
        "teacher": [teacher.model, teacher.revision, teacher.dtype, teacher.quantization],
        # A folder's weights may be replaced under the same name: size and time tell.
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "settings": dataclasses.asdict(settings),
        "prompts": hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
