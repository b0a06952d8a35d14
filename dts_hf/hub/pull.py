"""A student comes from the Hub: the files that an upload may have and no others, so neither code nor pickles."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dts_hf.console import say
from dts_hf.errors import RunError, UserError
from dts_hf.files import naming, read_json
from dts_hf.hub.faults import explained, patiently, status_of
from dts_hf.hub.staging import CARD, METRICS, PROTOCOL, has_weights, is_allowed
from dts_hf.reporting.facts import format_count
from dts_hf.reporting.licences import card_metadata

#: In a folder that a download is filling: what there is came from us, and the next try may go on.
UNFINISHED = ".dts_hf-pull"


def pull(repository: str, target: Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a student into ``target`` and return it. A download that broke off goes on where it was.

    Args:
        repository: its name on the Hub.
        target: a folder that does not exist, is empty, or holds what an earlier try has left.
        revision: branch, tag or commit; None: the main branch.
        token: None: the one of ``hf auth login`` or of ``HF_TOKEN``.

    Raises:
        UserError: there is no such repository for this login, it holds no safetensors, or the folder holds anything that
            no earlier try of the same download has left.
        RunError: the Hub or the network failed.
    """

    def wanted(offered: list[str]) -> list[str]:
        names = [name for name in offered if is_allowed(name)]
        check_offer(repository, offered, names)
        return names

    download(repository, target, "model", wanted, revision=revision, token=token)
    return target


def download(
    repository: str,
    target: Path,
    kind: str,
    wanted: Callable[[list[str]], list[str]],
    *,
    revision: str | None = None,
    token: str | None = None,
) -> None:
    """Download some files of a repository into a folder; a download that broke off goes on where it was.

    Args:
        repository: its name on the Hub.
        target: as for ``pull``.
        kind: ``model`` or ``dataset``.
        wanted: chooses among the names of its files, or refuses them.
        revision: branch, tag or commit; None: the main branch.
        token: None: the one of ``hf auth login`` or of ``HF_TOKEN``.

    Raises:
        UserError: see ``pull``.
        RunError: the Hub or the network failed.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import HFValidationError

    check_free(target, repository)
    api = HfApi(library_name="dts-hf", token=token)
    try:
        found: Any = patiently(lambda: api.repo_info(repository, revision=revision, repo_type=kind), repository)
        offered = [file.rfilename for file in found.siblings or []]
        names = wanted(offered)
        target.mkdir(parents=True, exist_ok=True)
        with naming(target / UNFINISHED):
            (target / UNFINISHED).write_text(repository, encoding="utf-8")
        patiently(
            lambda: snapshot_download(
                repository, repo_type=kind, revision=found.sha, local_dir=target, allow_patterns=names, token=token
            ),
            repository,
        )
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"{repository}: is no name of a repository: {error}") from None
    except Exception as error:
        raised = UserError if status_of(error) in (401, 403, 404) else RunError
        raise raised(f"{repository}: download failed: {explained(error)}") from error
    _clean_up(target)
    left = sorted(set(offered) - set(names) - {".gitattributes"})
    if left:
        say(f"{repository}: left there: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}")


def check_free(target: Path, repository: str) -> None:
    """Refuse a folder in which a download would replace files of somebody's.

    Raises:
        UserError: it is a file, or holds something that no earlier try of the same download has left.
    """
    if target.is_dir():
        marker = target / UNFINISHED
        if not any(target.iterdir()) or (marker.is_file() and marker.read_text(encoding="utf-8") == repository):
            return
    if target.exists():
        raise UserError(f"{target}: is there already, expected a folder that does not exist yet")


def _clean_up(target: Path) -> None:
    """Remove what a download needs to go on. The client's own folder of that name, in a home, has more in it: that stays."""
    cache = target / ".cache" / "huggingface"
    for name in ("download", "trees"):
        shutil.rmtree(cache / name, ignore_errors=True)
    for name in (".gitignore", "CACHEDIR.TAG"):
        (cache / name).unlink(missing_ok=True)
    for folder in (cache, cache.parent):
        with contextlib.suppress(OSError):  # not there, or not empty
            folder.rmdir()
    (target / UNFINISHED).unlink(missing_ok=True)


def check_offer(repository: str, offered: list[str], names: list[str]) -> None:
    """Refuse a repository in which there is no student for us.

    Raises:
        UserError: says what it holds instead.
    """
    if not has_weights(names):
        pickles = [name for name in offered if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        what = f"only pickles ({pickles[0]}), which can run code" if pickles else "no weights"
        raise UserError(f"{repository}: holds {what}, expected model.safetensors or an adapter")


def described(student: Path) -> Iterator[tuple[str, str]]:
    """What a downloaded student is, as (name, words), as far as its folder tells."""
    card = card_metadata(student / CARD)
    config, metrics, adapter, facts = (
        _told(student / name) for name in ("config.json", METRICS, "adapter_config.json", PROTOCOL)
    )
    yield "student", str(student)
    if size := number_of_weights(student):
        yield "parameters", format_count(size)
    if (kinds := config.get("architectures")) and isinstance(kinds, list):
        yield "model", str(kinds[0])
    if (student / "adapter_config.json").is_file():
        yield "adapter of", str(adapter.get("base_model_name_or_path"))
    for key in ("license_name", "license", "base_model", "language"):
        if card.get(key):
            yield key, str(card[key])
    protocol = _at(facts, "protocol") or _at(metrics, "protocol")
    if protocol.get("fingerprint"):
        yield "protocol", str(protocol["fingerprint"])
    sets = _at(metrics, "models", "student", "sets")
    for name in sets:
        mean = _at(sets, name, "rougeL").get("mean")
        if isinstance(mean, (int, float)):
            yield f"ROUGE-L, {name}", f"{100 * mean:.1f} over {_at(sets, name).get('n')} prompts"
    if config.get("auto_map"):
        yield "note", "it needs code of its author's, which was not downloaded"


def _told(path: Path) -> dict[str, Any]:
    """What a file of strangers says; nothing where it is broken: the download is there, whatever it is."""
    try:
        return read_json(path)
    except UserError as error:
        say(str(error))
        return {}


def _at(values: Any, *keys: str) -> dict[str, Any]:
    """The object under ``keys``, empty where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def number_of_weights(student: Path) -> int:
    """Counted from the heads of the safetensors files; 0 where one cannot be read."""
    import math

    from safetensors import SafetensorError, safe_open

    total = 0
    for path in student.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except SafetensorError:
            return 0
    return total
