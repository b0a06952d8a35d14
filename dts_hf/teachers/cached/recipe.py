"""Whether a cache, or a server, is of the recipe's teacher."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from torch import nn
from transformers import AutoConfig

from dts_hf.errors import UserError
from dts_hf.models.description import commit_of
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.identity import TeacherIdentity, config_digest, differences, model_facts, shared_name

if TYPE_CHECKING:
    from dts_hf.recipe.schema import Teacher
    from dts_hf.teachers.remote import RemoteTeacher


def open_cache(teacher: Teacher) -> StateCache:
    """The cache of ``teacher.cache``, which must be of a teacher of that name, type and quantisation.

    Args:
        teacher: the recipe's section.

    Raises:
        UserError: it is unfinished, damaged, or of another teacher.
    """
    cache = StateCache(str(teacher.cache))
    identity, name = cache.identity, shared_name(teacher.model)
    lines = [] if name == identity.model else [f"model: '{identity.model}' in the cache, '{name}' here"]
    _refuse(cache, [*lines, *_apart(identity, teacher, "the cache")])
    return cache


def check_server(remote: RemoteTeacher, teacher: Teacher) -> None:
    """Refuse a server of another teacher than the recipe's; of a folder here its configuration is compared, not its name.

    Args:
        remote: met.
        teacher: the recipe's section.

    Raises:
        UserError: says what differs.
    """
    identity, name = remote.description.identity, shared_name(teacher.model)
    same = name == identity.model or _is_folder(teacher.model)
    # What was served out of a folder has the folder's name
    same = same or (identity.commit is None and PurePosixPath(name).name == PurePosixPath(identity.model).name)
    lines = [] if same else [f"model: '{identity.model}' at the server, '{name}' here"]
    _refuse_server(remote, [*lines, *_apart(identity, teacher, "the server")])


def check_same_model(found: StateCache | RemoteTeacher, model: nn.Module, teacher: Teacher) -> None:
    """Refuse a loaded teacher that is not the one whose states were cached, or are served.

    Args:
        found: its states.
        model: loaded.
        teacher: the recipe's section.

    Raises:
        UserError: says what differs.
    """
    facts = model_facts(model, teacher.model, teacher.revision, teacher.quantization)
    if isinstance(found, StateCache):
        _refuse(found, differences(found.identity, facts))
    else:
        _refuse_server(found, differences(found.description.identity, facts, "the server"))


def _apart(identity: TeacherIdentity, teacher: Teacher, whose: str) -> list[str]:
    """What can be compared without loading the recipe's teacher, its name aside."""
    lines, commit = [], commit_of(teacher.model, teacher.revision)
    if None not in (commit, identity.commit) and commit != identity.commit:
        lines.append(f"commit: {identity.commit} in {whose}, {commit} here")
    facts: dict[str, str] = {"dtype": teacher.dtype, "quantization": teacher.quantization}
    if (config := _config_here(teacher)) is not None:
        facts["config"] = config
    return lines + differences(identity, facts, whose)


def _is_folder(name: str) -> bool:
    return (Path(name).expanduser() / "config.json").is_file()


def _config_here(teacher: Teacher) -> str | None:
    """The digest of the configuration in a folder; None: there is none, or it alone does not tell what is loaded."""
    if teacher.quantization != "none" or teacher.trust_remote_code or not _is_folder(teacher.model):
        return None
    try:
        config = AutoConfig.from_pretrained(Path(teacher.model).expanduser())
        plain = config.get_text_config() is config and getattr(config, "quantization_config", None) is None
        return config_digest(config, teacher.dtype) if plain else None
    except (OSError, ValueError, KeyError):  # whoever loads it says so
        return None


def _refuse(cache: StateCache, lines: list[str]) -> None:
    if lines:
        raise UserError(
            f"teacher.cache: {cache.folder} is of another teacher: {'; '.join(lines)}. Run dts-hf cache-teacher for this "
            "one, or put the recipe's teacher back"
        )


def _refuse_server(remote: RemoteTeacher, lines: list[str]) -> None:
    if lines:
        raise UserError(
            f"teacher.url: {remote.url} serves another teacher than the recipe's: {'; '.join(lines)}. Serve this one, or "
            "name the server's in teacher.model, teacher.dtype and teacher.quantization"
        )
