"""The finished student, as ``from_pretrained`` reads it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dts_hf.distributed.processes import process
from dts_hf.distributed.sharding import full_state_dict, is_sharded, unsharded_init
from dts_hf.files import check_no_link, flush, flush_tree, write_json_atomic, write_text_atomic
from dts_hf.models.head import without_adapters

#: Template and protocol of a student, in its folder; ``evaluation/student_file.py`` says what it holds.
STUDENT_FILE = "dts_hf.json"


class Carried(NamedTuple):
    """What goes with a student beside its weights.

    Attributes:
        facts: the contents of ``dts_hf.json``; None: no such file.
        turn_ends: ids of the tokens that end an answer, besides the tokenizer's end of sequence.
        chat_template: for a tokenizer that has none of its own.
        card: text of ``README.md``; None: no such file.
    """

    facts: Mapping[str, Any] | None = None
    turn_ends: Sequence[int] = ()
    chat_template: str | None = None
    card: str | None = None


def save_student(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    merge_lora: bool = True,
    carried: Carried = Carried(),  # noqa: B008 (immutable)
) -> nn.Module:
    """Write the student with ``save_pretrained`` (safetensors): LoRA merged into its weights, or the adapter alone.

    Every process calls it, because the weights may be sharded over all of them; the first one writes. ``folder`` is there
    as a whole or not at all, at every moment: one that is there already is renamed, not emptied, once everything is
    written. A kill between two renames leaves it as ``.NAME.old.unfinished``. A link is refused: what lies behind it is not
    ours to replace.

    Args:
        model: the student, as it was trained.
        tokenizer: saved beside it.
        folder: where to.
        merge_lora: merge adapters into the weights; otherwise they are saved alone.
        carried: what goes with it.

    Returns:
        the model as it was saved, on the first process; merging, and making it whole, makes it another one.

    Raises:
        RunError: ``folder`` is a link.
    """
    weights = full_state_dict(model) if is_sharded(model) else None
    if process()[0] != 0:
        return model
    check_no_link(folder)
    if weights is not None:
        model = _unsharded_copy(model, weights)
    if merge_lora and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()  # type: ignore[operator]
    ready_to_generate(model, tokenizer, carried.turn_ends)
    if carried.chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)  # the caller goes on with its own
        tokenizer.chat_template = carried.chat_template
    unfinished, old = (folder.with_name(f".{folder.name}{part}.unfinished") for part in ("", ".old"))
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)  # fails where a link stands
    try:
        model.save_pretrained(unfinished)  # type: ignore[operator]
        save_generation_config(model, unfinished)
        tokenizer.save_pretrained(unfinished)
        if carried.facts is not None:
            write_json_atomic(unfinished / STUDENT_FILE, carried.facts)
        if carried.card is not None:
            write_text_atomic(unfinished / "README.md", carried.card)
        shutil.rmtree(old, ignore_errors=True)
        # Before it has its name: a power cut must not leave the name and lose what it names
        flush_tree(unfinished)
        check_no_link(folder)  # hours may have passed in a large model's save
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(unfinished, folder)
        flush(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return model


def ready_to_generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, turn_ends: Sequence[int] = ()
) -> None:
    """Leave ``model`` as one wants to load it: with a cache, and a generation config that stops where its answers end.

    Args:
        model: as it was trained; its ``config`` and ``generation_config`` are changed.
        tokenizer: names the end of a sequence and padding; None: the model's own stay.
        turn_ends: ids of further tokens that end an answer (``chat_templates.end_of_turn_ids``).
    """
    model = without_adapters(model)
    config: Any = model.config
    for holder in (config, config.get_text_config()):
        holder.use_cache = True  # the Trainer switched it off for training
    generation: Any = getattr(model, "generation_config", None)
    if generation is None:  # a classifier
        return
    before = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    ends = list(dict.fromkeys(end for end in (_id_of(tokenizer, "eos"), *turn_ends, *before) if end is not None))
    tokens = {
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": generation.pad_token_id if (pad := _id_of(tokenizer, "pad")) is None else pad,
        "bos_token_id": generation.bos_token_id,
    }
    generation.update(use_cache=True, **tokens)
    generation._from_model_config = False  # or ``generate`` may make it anew, without the end of a turn
    try:
        generation.validate(strict=True)
    except ValueError:
        # Published configs name sampling values without switching sampling on; transformers reads those and refuses to
        # write them once anything in them has changed, which would be at the end of the training
        model.generation_config = GenerationConfig(use_cache=True, **tokens)  # type: ignore[assignment]


def save_generation_config(model: nn.Module, folder: Path) -> None:
    """Beside an adapter too: PEFT does not write it, nor read it, but the card and ``GenerationConfig`` do."""
    generation = getattr(without_adapters(model), "generation_config", None)
    if generation is not None and (folder / "adapter_config.json").is_file():
        generation.save_pretrained(folder)


@contextmanager
def ready_for_generation(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, turn_ends: Sequence[int] = ()
) -> Iterator[None]:
    """Within it ``model`` is as ``ready_to_generate`` leaves it.

    A checkpoint is saved in the middle of training, which has no use for a cache: afterwards everything is as it was.

    Args:
        model: as it is trained.
        tokenizer: as for ``ready_to_generate``.
        turn_ends: as for ``ready_to_generate``.
    """
    base: Any = without_adapters(model)
    config, generation = base.config, getattr(base, "generation_config", None)
    caches = [
        (holder, holder.use_cache) for holder in (config, config.get_text_config()) if hasattr(holder, "use_cache")
    ]
    if generation is not None:
        base.generation_config = copy.deepcopy(generation)
    try:
        ready_to_generate(model, tokenizer, turn_ends)
        yield
    finally:
        for holder, value in caches:
            holder.use_cache = value
        if generation is not None:
            base.generation_config = generation


def _id_of(tokenizer: PreTrainedTokenizerBase | None, token: str) -> int | None:
    found: int | None = getattr(tokenizer, f"{token}_token_id", None)
    return found


def _unsharded_copy(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A model like ``model``, whose weights are sharded over processes, with the whole ``weights``; good for saving only.

    Its buffers that are no weights (rotary frequencies) are not there.
    """
    base = without_adapters(model)
    # FSDP2 makes a class of its own out of the model's
    kind: Any = next(kind for kind in type(base).__mro__ if not issubclass(kind, FSDPModule))
    with unsharded_init(), torch.device("meta"):
        copied: Any = kind(copy.deepcopy(base.config))
        if model is not base:
            from peft import get_peft_model

            adapters: Any = model.peft_config
            copied = get_peft_model(copied, adapters["default"])
    copied.load_state_dict(weights, assign=True)
    whole = copied.get_base_model() if model is not base else copied
    whole.tie_weights()
    if hasattr(base, "generation_config"):
        whole.generation_config = copy.deepcopy(base.generation_config)
    return copied  # type: ignore[no-any-return]
