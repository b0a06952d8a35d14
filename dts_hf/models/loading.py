"""Tokenizers and models from the Hub, a folder or a GGUF file; the recipe's teacher and student."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from dts_hf.distributed.sharding import unsharded_init
from dts_hf.errors import RunError, UserError, not_readable
from dts_hf.models.adapters import add_lora
from dts_hf.models.checks import check_finite
from dts_hf.models.compilation import restore_layers
from dts_hf.models.fake_quantization import prepare_for_quantization
from dts_hf.models.gguf_files import PACKAGE_PREFIX, find_gguf, load_gguf_tokenizer
from dts_hf.models.head import check_head
from dts_hf.models.quantization import check_quantized, quantized_options
from dts_hf.models.student_init import StudentInit

if TYPE_CHECKING:
    from dts_hf.recipe.schema import Recipe, Student, Teacher


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are: a Hub name or folder, and a GGUF file inside it where there is one."""

    location: str
    gguf_file: str | None = None

    @classmethod
    def resolve(cls, name: str, key: str) -> ModelSource:
        """Understand a Hub name, a folder, or a GGUF file as ``gguf_files.find_gguf`` does.

        Raises:
            UserError: a GGUF file is missing, or what reads it; ``key`` names the recipe's key.
        """
        if not name.startswith(PACKAGE_PREFIX) and not name.endswith(".gguf"):
            return cls(name)
        path = find_gguf(name, key)
        return cls(str(path.parent), path.name)

    @property
    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` has to be told beside the location."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def load_tokenizer(
    name: str, *, key: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it a pad token where it has none (its own end-of-sequence token; nothing is resized).

    Args:
        name: as ``ModelSource.resolve`` understands it.
        key: the recipe's key, for errors.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        UserError: the name is unknown, a file is broken, or the tokenizer has no end-of-sequence token.
        RunError: the machine or the network failed while it was read.
    """
    source = ModelSource.resolve(name, key)
    with loading(name, key):
        if source.gguf_file is not None:
            tokenizer: PreTrainedTokenizerBase = load_gguf_tokenizer(Path(source.location) / source.gguf_file)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                source.location, revision=revision, trust_remote_code=trust_remote_code
            )
        tokenizer("a")  # a vocabulary with a hole in it loads, and fails at its first text
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: the tokenizer of {name!r} has no end-of-sequence token, so a student could never stop"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_tokenizers(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """(student's, teacher's); a student pruned from the teacher shares the teacher's, and without one there is but one.

    Of several teachers each has its own (``tokenizers_of_several``), and the student's stands for both here. A teacher whose
    model is not loaded needs no tokenizer: the student's was compared with it when its states were cached. One with another
    tokenizer reads rows in it, wherever its states come from.

    Raises:
        UserError: see ``load_tokenizer``.
    """
    teacher = student = None
    if recipe.teacher is not None and (recipe.loads_teacher or recipe.teacher.alignment is not None):
        teacher = load_teacher_tokenizer("teacher", recipe.teacher)
    init = recipe.student.init
    own, key = (recipe.student.model, "student.model") if init is None else (init.source, "student.init.from")
    if own is not None:
        student = load_tokenizer(own, key=key, **_from_hub(recipe.student))
    return student or teacher, teacher or student  # type: ignore[return-value]  # the recipe has one of them


def tokenizers_of_several(recipe: Recipe) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizer of each of several teachers whose model is loaded, by name.

    Raises:
        UserError: see ``load_tokenizer``.
    """
    return {
        key.partition(".")[2]: load_teacher_tokenizer(key, section) for key, section in recipe.loaded_teachers.items()
    }


def load_teacher_tokenizer(key: str, teacher: Teacher) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher: its own, or the one that its section names.

    Args:
        key: of the section, for errors.
        teacher: the section.

    Raises:
        UserError: see ``load_tokenizer``.
    """
    named = "tokenizer" if teacher.tokenizer else "model"
    return load_tokenizer(teacher.tokenizer or teacher.model, key=f"{key}.{named}", **_from_hub(teacher))


def _from_hub(section: Student | Teacher) -> dict[str, Any]:
    return {"revision": section.revision, "trust_remote_code": section.trust_remote_code}


def load_model(name: str, *, key: str, dtype: str = "float32", **options: Any) -> PreTrainedModel:
    """Load a causal language model from the Hub, a folder or a GGUF file (dequantised).

    Args:
        name: as ``ModelSource.resolve`` understands it.
        key: the recipe's key, for errors.
        dtype: torch's name of the type of the weights.
        options: ``revision``, ``quantization`` and ``trust_remote_code``, as ``load_weights`` takes them.

    Raises:
        UserError: the name is unknown, the format is not safe (safetensors only), or it cannot be quantised so.
    """
    model, missing = load_weights(AutoModelForCausalLM, name, key=key, dtype=dtype, **options)
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
        auto_class: reads the model.
        name: as ``ModelSource.resolve`` understands it.
        key: the recipe's key, for errors.
        dtype: torch's name of the type of the weights.
        revision: branch, tag or commit on the Hub.
        quantization: as ``teacher.quantization`` has it.
        trust_remote_code: run Python code that comes with the model.
        config: changes to the model's configuration.

    Raises:
        UserError: as ``load_model``, but missing weights are left to the caller.
        RunError: the machine or the network failed while it was read.
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
        options |= quantized_options(quantization, getattr(torch, dtype))
    with loading(name, key), unsharded_init():
        loaded: Any = auto_class.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    model, found = loaded
    if source.gguf_file is not None:
        _clear_quantised_mark(model)
    check_quantized(model, quantization, key)
    check_finite(model, f"{key}: {name!r}")
    return model, sorted(found["missing_keys"])


@contextmanager
def loading(name: str, key: str) -> Iterator[None]:
    """Whatever a loader raises over files of a stranger is one message: of a wrong type in them it raises anything.

    Args:
        name: of the model, as the user gave it.
        key: where.

    Raises:
        UserError: the files are not what they should be.
        RunError: the machine or the network failed meanwhile; the same files may be good.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except BaseException as error:
        # A panic of Rust, in which tokenizers and safetensors are written, is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise not_readable(error, _not_loadable(key, name, error)) from error


def _not_loadable(key: str, name: str, error: BaseException) -> str:
    reason = textwrap.shorten(str(error), 400, placeholder=" ...")
    if isinstance(error, LookupError) or not reason:  # a KeyError is its key alone
        reason = f"{type(error).__name__} {reason}".strip()
    if Path(name).exists():
        return f"{key}: cannot load {name!r}, expected a folder made by save_pretrained, or a .gguf file: {reason}"
    return (
        f"{key}: cannot load {name!r}: expected a folder made by save_pretrained, a .gguf file, 'package:NAME/FILE.gguf', "
        f"or a name that the Hugging Face Hub knows (is this machine online, and the name spelt right?). {reason}"
    )


def _clear_quantised_mark(model: PreTrainedModel) -> None:
    """The dequantised weights are plain tensors; the leftover mark would make ``save_pretrained`` refuse them."""
    marks = ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config"))
    for holder, name in marks:
        if hasattr(holder, name):
            delattr(holder, name)
    setattr(model, "is_quantized", False)  # noqa: B010  (typed as a tensor or module by nn.Module)


def load_teacher(teacher: Teacher, key: str = "teacher") -> PreTrainedModel:
    """The teacher, frozen and in evaluation mode. Its head is the caller's to check (``check_head``).

    Args:
        teacher: what to load.
        key: of its section, for errors.

    Raises:
        UserError: it cannot be loaded.
    """
    options = {**_from_hub(teacher), "quantization": teacher.quantization}
    model = load_model(teacher.model, key=f"{key}.model", dtype=teacher.dtype, **options)
    model.requires_grad_(False).eval()
    return model


def load_several(recipe: Recipe) -> dict[str, PreTrainedModel]:
    """Those of several teachers whose models are loaded, by name; equal sections are one model under several names.

    Raises:
        UserError: one cannot be loaded.
    """
    loaded: list[tuple[Teacher, PreTrainedModel]] = []
    models = {}
    for key, section in recipe.loaded_teachers.items():
        model = next((model for known, model in loaded if known == section), None)
        if model is None:
            loaded.append((section, model := load_teacher(section, key)))
        models[key.partition(".")[2]] = model
    return models


def load_student(
    student: Student, teacher: PreTrainedModel | None, seed: int = 0, made: StudentInit | None = None
) -> nn.Module:
    """The student: loaded, or cut out of another model; with LoRA adapters where the recipe asks for them.

    Args:
        student: the section of the recipe.
        teacher: full; None: there is none.
        seed: of random weights.
        made: knows the rows that decide what is kept, or what was decided; None: no row decides anything.

    Raises:
        UserError: it cannot be loaded or cut, or its logits are not what ``Head`` can represent.
    """
    init = student.init
    if init is not None:
        source = teacher
        if init.source is not None:
            source = load_model(init.source, key="student.init.from", dtype=student.dtype, **_from_hub(student))
        assert source is not None  # the recipe was refused otherwise
        _check_unquantized(source, "student.init.from")
        cut = (made or StudentInit(init, None)).student(source, seed)
        model: nn.Module = cut.to(getattr(torch, student.dtype))
    else:
        model = load_model(str(student.model), key="student.model", dtype=student.dtype, **_from_hub(student))
        if student.lora is None:  # an adapter is trained beside quantised weights
            _check_unquantized(model, "student.model")
    check_head(model, role="student")
    if student.quantize is not None:
        prepare_for_quantization(model, student.quantize, "student.quantize")
    return model if student.lora is None else add_lora(model, student.lora)


def _check_unquantized(model: nn.Module, key: str) -> None:
    """Refuse integers and scales, which can neither be trained nor cut.

    Raises:
        UserError: names ``key``.
    """
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"{key}: the weights of {type(model).__name__} are quantised (quantization_config in its config.json), expected "
            "those that it was quantised from"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without what an earlier trainer has made of it: DDP, autocast with outputs in fp32, compiled layers.

    Accelerate puts autocast into ``model.forward`` itself, marks the model and never wraps a marked one again: the next
    trainer would go on in the precision of the last one, whatever its own arguments say. What a user has compiled stays so.
    """
    from accelerate.utils import extract_model_from_parallel

    restore_layers(model)
    if not {"_is_accelerate_prepared", "_original_forward"} & {*vars(_uncompiled(model))}:
        return model
    model = extract_model_from_parallel(model)
    owner = vars(_uncompiled(model))
    owner.pop("_is_accelerate_prepared", None)
    original = owner.pop("_original_forward", None)
    # Not keep_fp32_wrapper=False of the line above, which takes the decorators of transformers' own forward off, too
    if original is not None:
        del owner["forward"]  # now it is the class's own, unless a hook had another in its place
        if _uncompiled(model).forward != original:
            owner["forward"] = original
    return model


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # of torch.compile's OptimizedModule
