"""The cache that a recipe names, and whether it is of the recipe's teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from dts_hf.errors import UserError
from dts_hf.models.description import commit_of
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.identity import differences, model_facts, shared_name

if TYPE_CHECKING:
    from dts_hf.recipe.schema import Teacher


def open_cache(teacher: Teacher) -> StateCache:
    """The cache of ``teacher.cache``, which must be of a teacher of that name, type and quantisation.

    Args:
        teacher: the recipe's section.

    Raises:
        UserError: it is unfinished, damaged, or of another teacher.
    """
    cache = StateCache(str(teacher.cache))
    identity = cache.identity
    lines = []
    name, commit = shared_name(teacher.model), commit_of(teacher.model, teacher.revision)
    if name != identity.model:
        lines.append(f"model: '{identity.model}' in the cache, '{name}' here")
    if None not in (commit, identity.commit) and commit != identity.commit:
        lines.append(f"commit: {identity.commit} in the cache, {commit} here")
    lines += differences(identity, {"dtype": teacher.dtype, "quantization": teacher.quantization})
    _refuse(cache, lines)
    return cache


def check_same_model(cache: StateCache, model: nn.Module, teacher: Teacher) -> None:
    """Refuse a loaded teacher that is not the one whose states were cached.

    Args:
        cache: its states.
        model: loaded.
        teacher: the recipe's section.

    Raises:
        UserError: says what differs.
    """
    facts = model_facts(model, teacher.model, teacher.revision, teacher.quantization)
    _refuse(cache, differences(cache.identity, facts))


def _refuse(cache: StateCache, lines: list[str]) -> None:
    if lines:
        raise UserError(
            f"teacher.cache: {cache.folder} is of another teacher: {'; '.join(lines)}. Run dts-hf cache-teacher for this "
            "one, or put the recipe's teacher back"
        )
