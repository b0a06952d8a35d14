"""Checkpoints are read as data and in the form that they have: what lies in a run directory runs no code.

Most files of a checkpoint are read with torch's ``weights_only``, which builds tensors and plain values and nothing else.
Those who read the other files ask for more: DeepSpeed calls ``torch.load(weights_only=False)`` for each of its own, and
``torch.distributed.checkpoint`` (FSDP2 with ``SHARDED_STATE_DICT``) unpickles its ``.metadata`` and whatever it has stored
that is no tensor. Inside ``data_only`` they do not get it.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle  # for its Unpickler, whose classes are all named below
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME

from dts_hf.errors import RunError, UserError, chain

_FORCED, _FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
#: What DeepSpeed's files hold besides tensors and plain values. None of them does anything when it is made.
_OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
#: How torch's unpickler and ours name what they refuse.
_ASKED_FOR = re.compile(r"GLOBAL ([\w.]+)")
#: Pickled weights as transformers and peft would read them, and what stands there instead.
_WHOLE = ("model.safetensors", "model.safetensors.index.json")
_SAFE = {
    "pytorch_model.bin": _WHOLE,
    "pytorch_model.bin.index.json": _WHOLE,
    "adapter_model.bin": ("adapter_model.safetensors",),
}
_METADATA = "torch.distributed.checkpoint.metadata"
#: What ``.metadata`` is made of, besides the types of tensors (``torch.float32``).
_OF_METADATA = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}  # fmt: skip


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles ``.metadata`` of ``torch.distributed.checkpoint``: its own classes, and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        """The class that a pickle asks for.

        Raises:
            UnpicklingError: it is none of ``torch.distributed.checkpoint``'s.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _OF_METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


class _PickleOfMetadata(ModuleType):
    """Stands for the module ``pickle`` where metadata are read."""

    def __init__(self) -> None:
        super().__init__("pickle")
        self.__dict__.update({name: value for name, value in vars(pickle).items() if not name.startswith("__")})
        self.load = lambda file: MetadataUnpickler(file).load()
        self.loads = lambda text: MetadataUnpickler(io.BytesIO(text)).load()


@contextlib.contextmanager
def data_only(checkpoint: str | Path) -> Iterator[None]:
    """Within it nothing that is read runs code, whoever reads it: torch, DeepSpeed or ``torch.distributed.checkpoint``.

    Args:
        checkpoint: the folder that is read, for the message.

    Raises:
        UserError: a file of it holds something else than data.
        RunError: ``torch.distributed.checkpoint`` cannot read it for another reason.
    """
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.api import CheckpointException

    kept = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
    os.environ[_FORCED] = "1"  # torch's own switch: stronger than the weights_only that a caller gives
    unpickler, filesystem.pickle = filesystem.pickle, _PickleOfMetadata()  # type: ignore[attr-defined]
    try:
        with torch.serialization.safe_globals(_known_to_deepspeed()):
            yield
    except pickle.UnpicklingError as error:
        raise _refusal(checkpoint, str(error)) from None
    except CheckpointException as error:  # no Exception, but a BaseException
        causes = "; ".join(str(failure[0]) for failure in error.failures.values())
        if _ASKED_FOR.search(causes):
            raise _refusal(checkpoint, causes) from None
        raise RunError(f"{checkpoint} cannot be read: {causes}") from error
    finally:
        filesystem.pickle = unpickler  # type: ignore[attr-defined]
        del os.environ[_FORCED]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def refuse_pickled_weights(checkpoint: str | Path) -> None:
    """Refuse a checkpoint whose weights, or those of an adapter in it, are there as a pickle alone.

    DeepSpeed and FSDP2 have files of their own, which ``data_only`` reads.

    Args:
        checkpoint: the folder that is read.

    Raises:
        UserError: names the file.
    """
    for pickled in sorted(Path(checkpoint).rglob("*")):
        if (safe := _SAFE.get(pickled.name)) and not any((pickled.parent / name).is_file() for name in safe):
            raise UserError(
                f"{pickled}: weights as a pickle, which could run code; it was not read. dts_hf writes {safe[0]}: put that "
                "file back from a copy, or resume from a checkpoint that dts_hf wrote, and that nobody else could change"
            )


def asks_for_code(error: BaseException) -> bool:
    """Whether a pickle was refused for what it asked for, and not because it is none."""
    return any(isinstance(link, pickle.UnpicklingError) and _ASKED_FOR.search(str(link)) for link in chain(error))


def _known_to_deepspeed() -> list[Any]:
    """Classes of DeepSpeed's files; where it reads any, it is imported. What another version lacks would be refused."""
    modules = ((sys.modules.get(module), names) for module, names in _OF_DEEPSPEED.items())
    return [getattr(module, name) for module, names in modules for name in names if hasattr(module, name)]


def _refusal(checkpoint: str | Path, said: str) -> UserError:
    name = _ASKED_FOR.search(said)
    what = f"asks for {name[1]}, which is none of the types of a checkpoint" if name else "is no pickle of plain data"
    return UserError(
        f"{checkpoint}: a file in it {what}, so it could run code: it was not read. Resume from a checkpoint that dts_hf "
        "wrote, and that nobody else could change"
    )


@contextlib.contextmanager
def in_form_of(checkpoint: str | Path, accelerator: Any) -> Iterator[None]:
    """Within it accelerate reads FSDP2's weights and optimizer whole or in pieces, as ``checkpoint`` has them.

    The configuration (``fsdp_state_dict_type``) tells how checkpoints are *written*; it may have changed since.

    Args:
        checkpoint: the folder that is read.
        accelerator: of the Trainer; without FSDP nothing happens.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    whole = (Path(checkpoint) / f"{FSDP_MODEL_NAME}.bin").is_file()
    names = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    kept = {name: getattr(plugin, name) for name in names}
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # else those of the other form would stay
    plugin.set_state_dict_type("FULL_STATE_DICT" if whole else "SHARDED_STATE_DICT")
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(plugin, name, value)
