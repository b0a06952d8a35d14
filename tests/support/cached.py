"""A cache of states of a tiny teacher over the rows of ``trainers.ROWS``, and what to compare it with."""

from __future__ import annotations

import json

from dts_hf.data.chat_templates import get_template
from dts_hf.data.encoding import EncodedDataset
from dts_hf.files import json_text, sealed
from dts_hf.teachers.cached.layout import MANIFEST
from dts_hf.teachers.cached.writer import Facts, Rows, make_plan, write_cache
from dts_hf.teachers.compact import ErrorAt
from dts_hf.teachers.identity import identity_of
from dts_hf.teachers.live import LiveTeacher
from tests.support.tiny import tiny_tokenizer
from tests.support.trainers import encoded


def cache_of(
    folder, teacher, data=None, tokenizer=None, template="chat", name="teacher", forced=False, errors=(), **options
):
    """Write a cache of ``data`` (``EncodedDataset``) under ``teacher`` and return its folder."""
    data = encoded() if data is None else data
    tokenizer = tokenizer or tiny_tokenizer()
    rows = Rows(data, data.row_ids if isinstance(data, EncodedDataset) else [str(n) for n in range(len(data))])
    identity = identity_of(teacher, tokenizer, get_template(template), name=name)
    rank, world = options.pop("rank", 0), options.pop("world", 1)
    plan = make_plan(rows, identity, **options)
    if forced and not errors:  # as if warmer temperatures than those of any test had been measured
        errors = [ErrorAt(100.0, 0.5, 0.1, 0.1, 1)]
    facts = Facts({"max_length": 128}, {"train": getattr(data, "digest", None)}, len(tokenizer), errors, forced)
    write_cache(folder, LiveTeacher(teacher), rows, plan, facts, rank=rank, world=world)
    return folder


def edit_manifest(folder, change):
    """Change a manifest as one who knows its checksum: ``change(values)``."""
    path = folder / MANIFEST
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json_text(sealed(values)))
