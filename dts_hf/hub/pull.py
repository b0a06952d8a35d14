"""A student comes from the Hub: the files that an upload may have and no others, so neither code nor pickles."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dts_hf.console import say
from dts_hf.errors import RunError, UserError
from dts_hf.files import read_json
from dts_hf.hub.faults import explained, patiently, status_of
from dts_hf.hub.staging import ADAPTER, CARD, METRICS, PROTOCOL, WEIGHTS, is_allowed
from dts_hf.reporting.facts import format_count
from dts_hf.reporting.licences import card_metadata


def pull(repository: str, target: Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a student into ``target`` and return it. A download that broke off goes on where it was.

    Args:
        repository: its name on the Hub.
        target: a folder that does not exist, is empty, or holds what an earlier try has left.
        revision: branch, tag or commit; None: the main branch.
        token: None: the one of ``hf auth login`` or of ``HF_TOKEN``.

    Raises:
        UserError: there is no such repository for this login, it holds no safetensors, or the folder is taken.
        RunError: the Hub or the network failed.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import HFValidationError

    trace = target / ".cache"  # where the client notes what it has
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not trace.is_dir())):
        raise UserError(f"{target}: is there already, expected a folder that does not exist yet")
    api = HfApi(library_name="dts-hf", token=token)
    try:
        found = patiently(lambda: api.model_info(repository, revision=revision), repository)
        offered = [file.rfilename for file in found.siblings or []]
        names = [name for name in offered if is_allowed(name)]
        check_offer(repository, offered, names)
        patiently(
            lambda: snapshot_download(
                repository, revision=found.sha, local_dir=target, allow_patterns=names, token=token
            ),
            repository,
        )
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"{repository}: is no name of a repository: {error}") from None
    except Exception as error:
        kind = UserError if status_of(error) in (401, 403, 404) else RunError
        raise kind(f"{repository}: download failed: {explained(error)}") from error
    shutil.rmtree(trace, ignore_errors=True)
    left = sorted(set(offered) - set(names) - {".gitattributes"})
    if left:
        say(f"{repository}: left there: {', '.join(left[:8])}{' ...' if len(left) > 8 else ''}")
    return target


def check_offer(repository: str, offered: list[str], names: list[str]) -> None:
    """Refuse a repository in which there is no student for us.

    Raises:
        UserError: says what it holds instead.
    """
    from fnmatch import fnmatchcase

    weights = [pattern for pattern in (*WEIGHTS, *ADAPTER) if pattern.endswith(".safetensors")]
    if not any(fnmatchcase(name, pattern) for name in names for pattern in weights):
        pickles = [name for name in offered if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        what = f"only pickles ({pickles[0]}), which can run code" if pickles else "no weights"
        raise UserError(f"{repository}: holds {what}, expected model.safetensors or an adapter")


def described(student: Path) -> Iterator[tuple[str, str]]:
    """What a downloaded student is, as (name, words), as far as its folder tells."""
    card, config, metrics = (
        card_metadata(student / CARD),
        read_json(student / "config.json"),
        read_json(student / METRICS),
    )
    yield "student", str(student)
    if size := number_of_weights(student):
        yield "parameters", format_count(size)
    if config.get("architectures"):
        yield "model", str(config["architectures"][0])
    if (student / "adapter_config.json").is_file():
        yield "adapter of", str(read_json(student / "adapter_config.json").get("base_model_name_or_path"))
    for key in ("license_name", "license", "base_model", "language"):
        if card.get(key):
            yield key, str(card[key])
    protocol: Any = read_json(student / PROTOCOL).get("protocol") or metrics.get("protocol") or {}
    if isinstance(protocol, dict) and protocol.get("fingerprint"):
        yield "protocol", str(protocol["fingerprint"])
    for name, entry in (((metrics.get("models") or {}).get("student") or {}).get("sets") or {}).items():
        mean = (entry.get("rougeL") or {}).get("mean")
        if isinstance(mean, (int, float)):
            yield f"ROUGE-L, {name}", f"{100 * mean:.1f} over {entry.get('n')} prompts"
    if config.get("auto_map"):
        yield "note", "it needs code of its author's, which was not downloaded"


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
