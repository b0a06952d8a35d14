"""The finished student, as ``from_pretrained`` reads it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from dts_hf.distributed.processes import process
from dts_hf.distributed.sharding import full_state_dict, is_sharded, unsharded_init
from dts_hf.models.head import without_adapters


def save_student(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, merge_lora: bool = True
) -> nn.Module:
    """Write the student with ``save_pretrained`` (safetensors): LoRA merged into its weights, or the adapter alone.

    Every process calls it, because the weights may be sharded over all of them; the first one writes. ``folder`` is there
    as a whole or not at all, at every moment: one that is there already is renamed, not emptied, once everything is
    written. A kill between two renames leaves it as ``.NAME.old.unfinished``. Of a link, the folder behind it is written.

    Args:
        model: the student, as it was trained.
        tokenizer: saved beside it.
        folder: where to.
        merge_lora: merge adapters into the weights; otherwise they are saved alone.

    Returns:
        the model as it was saved, on the first process; merging, and making it whole, makes it another one.
    """
    weights = full_state_dict(model) if is_sharded(model) else None
    if process()[0] != 0:
        return model
    if weights is not None:
        model = _unsharded_copy(model, weights)
    if merge_lora and hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()  # type: ignore[operator]
    config: Any = model.config
    for holder in (config, config.get_text_config()):
        holder.use_cache = True  # the Trainer switched it off for training
    folder = folder.resolve()  # a link cannot be replaced by a folder
    unfinished, old = (folder.with_name(f".{folder.name}{part}.unfinished") for part in ("", ".old"))
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        model.save_pretrained(unfinished)  # type: ignore[operator]
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(old, ignore_errors=True)
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(unfinished, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return model


@contextmanager
def ready_for_generation(model: nn.Module, end_tokens: Iterable[int], pad_token: int | None) -> Iterator[None]:
    """Within it the configuration of ``model`` is one to generate with: a cache, end tokens, padding.

    A checkpoint is saved in the middle of training, which has no use for a cache: afterwards everything is as it was.

    Args:
        model: a language model or a classifier, with adapters or without.
        end_tokens: ids that end an answer, besides those that the model knows.
        pad_token: id that pads prompts, where the model knows none.
    """
    base: Any = without_adapters(model)
    config, generation = getattr(base, "config", None), getattr(base, "generation_config", None)
    wanted: list[tuple[Any, str, Any]] = []
    if config is not None:
        wanted = [(holder, "use_cache", True) for holder in (config, config.get_text_config())]
    if generation is not None:
        known = generation.eos_token_id
        ends = sorted({*(known if isinstance(known, list) else [known]), *end_tokens} - {None})
        wanted += [
            (generation, "use_cache", True),
            (generation, "eos_token_id", ends if len(ends) > 1 else next(iter(ends), None)),
            (generation, "pad_token_id", pad_token if generation.pad_token_id is None else generation.pad_token_id),
        ]
    before = [(holder, name, getattr(holder, name, None)) for holder, name, _ in wanted]
    try:
        for holder, name, value in wanted:
            if hasattr(holder, name):
                setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            if hasattr(holder, name):
                setattr(holder, name, value)


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
