"""The known evaluation sets: where their prepared files lie, what their manifests say, how to prepare them.

``dts-hf prepare NAME`` writes ``<data folder>/<set>/{train,valid,test}.jsonl`` and, last of all,
``manifest.json``: a set without a manifest is not prepared. The data folder is ``$DTS_HF_DATA``, else ``./data``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dts_hf.data.row_files import count_rows, row_file_stem
from dts_hf.errors import UserError, nearest
from dts_hf.files import file_sha256

MANIFEST = "manifest.json"
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class KnownSet:
    """A set that ``dts-hf prepare`` writes.

    Attributes:
        name: canonical name, and its folder below the data folder.
        about: one line for ``dts-hf list sets``.
        prepare: what ``dts-hf prepare`` calls it.
        rows: split -> rows of the published protocol (``reference`` counts; a GLUE split counts GLUE's own rows).
        split: the split that scores are reported on.
        options: what that command needs besides ``--output``.
    """

    name: str
    about: str
    prepare: str
    rows: Mapping[str, int]
    split: str = "test"
    options: str = ""

    @property
    def command(self) -> str:
        """The command that prepares this set."""
        return " ".join(filter(None, ("dts-hf prepare", self.prepare, self.options)))


def _glue(task: str, about: str, train: int, **validation: int) -> KnownSet:
    return KnownSet(
        f"glue/{task}", about, "glue", {"train": train, **validation}, next(iter(validation)), f"--tasks {task}"
    )


KNOWN_SETS: dict[str, KnownSet] = {
    known.name: known
    for known in (
        KnownSet("dolly", "Dolly (DollyEval)", "dolly", {"train": 11_435, "valid": 1_000, "test": 500}),
        KnownSet("self_instruct", "Self-Instruct (SelfInst)", "self_instruct", {"test": 242}),
        KnownSet("vicuna", "Vicuna questions (VicunaEval)", "vicuna", {"test": 80}),
        KnownSet("s_ni", "Super-NaturalInstructions [11, inf) (S-NI)", "s_ni", {"test": 1_694}),
        KnownSet("unni", "Unnatural Instructions [11, inf) (UnNI)", "unni", {"test": 10_000}),
        _glue("cola", "acceptability: Matthews", 8_551, validation=1_043),
        _glue("sst2", "sentiment: accuracy", 67_349, validation=872),
        _glue("mrpc", "paraphrase: F1, accuracy", 3_668, validation=408),
        _glue("stsb", "similarity: Pearson, Spearman", 5_749, validation=1_500),
        _glue("qqp", "same question: F1, accuracy", 363_846, validation=40_430),
        _glue("mnli", "entailment: accuracy", 392_702, validation_matched=9_815, validation_mismatched=9_832),
        _glue("qnli", "answer in sentence: accuracy", 104_743, validation=5_463),
        _glue("rte", "entailment: accuracy", 2_490, validation=277),
        _glue("wnli", "pronouns: accuracy", 635, validation=71),
    )
}
INSTRUCTION_SETS = ("dolly", "self_instruct", "vicuna", "s_ni", "unni")
# Names that papers and other repositories use for the same sets.
ALIASES = {
    "selfinst": "self_instruct",
    "self_inst": "self_instruct",
    "dolly_eval": "dolly",
    "vicuna_eval": "vicuna",
    "sinst": "s_ni",
    "sni": "s_ni",
    "super_natural_instructions": "s_ni",
    "uinst": "unni",
    "un_ni": "unni",
    "unnatural_instructions": "unni",
}


@dataclass(frozen=True)
class PreparedSet:
    """Rows that are ready to be answered.

    Attributes:
        name: canonical name of the set, or the stem of a file given by path.
        path: a row file that ``dts_hf.data.sources.load_rows`` reads.
        rows: number of rows in it.
        manifest: what ``dts-hf prepare`` recorded; for a file given by path only ``source``, ``sha256`` and ``rows``.
    """

    name: str
    path: Path
    rows: int
    manifest: dict[str, Any] = field(repr=False)


def data_folder(data_dir: str | Path | None = None) -> Path:
    """``data_dir``, else ``$DTS_HF_DATA``, else ``./data``."""
    return Path(data_dir or os.environ.get("DTS_HF_DATA") or "data").expanduser()


def canonical_name(name: str) -> str | None:
    """The canonical name for ``name`` (any case, ``-`` for ``_``, a paper's name), or None when it is no known set."""
    plain = name.strip().lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    return plain if plain in KNOWN_SETS else None


def resolve_set(
    name_or_path: str | Path, data_dir: str | Path | None = None, split: str | None = None, *, key: str = "sets"
) -> PreparedSet:
    """Find the rows of a set.

    Args:
        name_or_path: a known set (``dolly``, ``s_ni``, ``glue/sst2``), or a row file
            (``.jsonl``, ``.jsonl.gz``, ``.parquet``).
        data_dir: folder with the prepared sets; see ``data_folder``.
        split: ``train``, ``valid``, ``test`` ...; default: the one that scores are reported on. Not used for a file.
        key: what the user calls this choice, for messages.

    Raises:
        UserError: no such set or file; the set is not prepared (the message says the command); a prepared file is
            missing or was changed since.
    """
    name = canonical_name(str(name_or_path))
    if name is None:
        return _row_file(str(name_or_path), key)
    known, folder = KNOWN_SETS[name], data_folder(data_dir) / name
    manifest = read_manifest(folder)
    if not manifest:
        raise UserError(
            f"{name}: this set is not prepared: there is no {folder / MANIFEST}. Prepare it with\n  {known.command}\n"
            "or say where it is with DTS_HF_DATA=FOLDER"
        )
    split = split or known.split
    try:
        entry = manifest["files"][split]
        # The name alone: a manifest is data, and must not point out of its folder
        path, rows, digest = folder / Path(entry["file"]).name, int(entry["rows"]), entry["sha256"]
    except (KeyError, TypeError, ValueError):
        splits = list(_entries(manifest))
        hint = nearest(split, splits)
        raise UserError(
            f"{folder / MANIFEST}: no split '{split}' of {name}; found {', '.join(splits) or 'none'}.{hint}"
        ) from None
    if not path.is_file():
        raise UserError(f"{path}: this file of the prepared set {name} is missing. Prepare it again: {known.command}")
    # A set is compared with published numbers: one row more or less, and the comparison is worth nothing
    if (actual := file_sha256(path)) != digest:
        raise UserError(
            f"{path}: the file was changed since it was prepared: sha256 {actual}, expected {digest}."
            f" Prepare it again: {known.command}"
        )
    return PreparedSet(name, path, rows, manifest)


def list_sets(data_dir: str | Path | None = None) -> list[dict[str, str]]:
    """One row for each known set.

    Returns:
        ``name``, ``about``, ``rows`` by split (of the prepared files, else as published), ``state``, and ``where``:
        the folder of a prepared set, else the command that prepares it.
    """
    rows = []
    for known in KNOWN_SETS.values():
        folder = data_folder(data_dir) / known.name
        manifest: dict[str, Any] = {}
        state = "not prepared"
        try:
            if manifest := read_manifest(folder):
                state = _state(folder, manifest)
        except UserError as error:  # a broken set does not hide the others from a list
            state = f"broken: {error}"
        counts = {split: entry.get("rows") for split, entry in _entries(manifest).items()} if manifest else known.rows
        listed = ", ".join(f"{split} {count:,}" for split, count in counts.items() if isinstance(count, int))
        where = str(folder) if manifest else known.command
        rows.append({"name": known.name, "about": known.about, "rows": listed, "state": state, "where": where})
    return rows


def _entries(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The entries {file, rows, bytes, sha256} by split; what is no such entry is left out."""
    files = manifest.get("files")
    listed = files.items() if isinstance(files, Mapping) else ()
    return {str(split): entry for split, entry in listed if isinstance(entry, Mapping)}


def _state(folder: Path, manifest: Mapping[str, Any]) -> str:
    entries = _entries(manifest)
    if not entries:
        return f"broken: {MANIFEST} names no files"
    for entry in entries.values():
        path = folder / Path(str(entry.get("file"))).name
        if not path.is_file() or path.stat().st_size != entry.get("bytes"):
            return f"broken: {path.name} is missing or was changed"
    return "prepared" if manifest.get("counts_as_expected", True) else "prepared, other counts than published"


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """``manifest.json`` of a prepared set; empty when the folder has none.

    Raises:
        UserError: the file is not a JSON object.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: broken JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object, the manifest that dts-hf prepare writes")
    return values


def _row_file(text: str, key: str) -> PreparedSet:
    path = Path(os.path.expanduser(text))
    if not path.name.endswith(ROW_SUFFIXES):
        hint = nearest(text, [*KNOWN_SETS, *ALIASES])
        known = ", ".join(INSTRUCTION_SETS)
        raise UserError(f"{key}: got '{text}', expected {known} or a file ending in {', '.join(ROW_SUFFIXES)}.{hint}")
    if not os.path.isfile(path):
        beside = [file.name for file in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise UserError(f"{key}: {text}: no such file.{nearest(path.name, beside)}")
    rows = count_rows(path)
    return PreparedSet(
        row_file_stem(path), path, rows, {"source": path.name, "sha256": file_sha256(path), "rows": rows}
    )
