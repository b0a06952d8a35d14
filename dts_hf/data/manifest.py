"""The manifest of rows: what was read, told by digests, so that a run can say what it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from dts_hf.data.mixture import Part, is_mixed
from dts_hf.data.rows import Row
from dts_hf.data.sources import Sources, as_sources, public_name, source_files
from dts_hf.files import file_sha256


def manifest(
    sources: Sources, rows: Sequence[Row], *, split: str = "train", parts: Sequence[Part] = ()
) -> dict[str, Any]:
    """Describe where rows come from, for ``data_manifest.json``.

    Args:
        sources: what was given to ``load_mixture``.
        rows: the rows that it returned.
        split: as given to ``load_mixture``.
        parts: what it says of each source.

    Returns:
        ``source`` (a string, or a list for several; of a path outside the current folder the file name alone),
        ``sha256`` and ``rows``; of several sources, or weighted ones, ``mixture``: what each gives. The digest is that of
        the file; of ``sha256sum``'s output lines for several files; of the rows themselves for a Hub data set. Weights
        and columns of a source count in it.
    """
    listed = as_sources(sources)
    digests: list[tuple[str, str]] = []
    for source in listed:
        files = source_files(source.source, split=split if source.split is None else source.split)
        if files is None:
            digests.append((_rows_sha256(rows), source.source))
        else:
            digests += [(file_sha256(file), file.name) for file in files]
        changed = {"weight": source.weight, "columns": source.columns}
        if changed != {"weight": 1, "columns": None}:
            digests.append((_sha256(json.dumps(changed, sort_keys=True)), f"weight and columns of {source.source}"))
    lines = "".join(f"{digest}  {name}\n" for digest, name in digests)
    described: dict[str, Any] = {
        "source": public_name(listed[0].source)
        if len(listed) == 1
        else [public_name(source.source) for source in listed],
        "sha256": digests[0][0] if len(digests) == 1 else _sha256(lines),
        "rows": len(rows),
    }
    if is_mixed(parts):
        described["mixture"] = [part.described() for part in parts]
    return described


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rows_sha256(rows: Iterable[Row]) -> str:
    """Of the list of all of them as JSON, of which one row at a time is in memory."""
    digest = hashlib.sha256(b"[")
    for number, row in enumerate(rows):
        digest.update(((", " if number else "") + json.dumps(_content(row), default=str)).encode())
    digest.update(b"]")
    return digest.hexdigest()


def _content(row: Row) -> list[Any]:
    """What is learned of a row."""
    further = (row.answer, row.given, row.tools, row.chat_template_kwargs, row.cut or None)
    return [
        row.id,
        row.instruction,
        row.input,
        row.references,
        row.messages,
        *(one for one in further if one is not None),
    ]
