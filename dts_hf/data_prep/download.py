"""Files from a path, a URL or the Hub: continued where a connection broke, checked, and renamed only when complete."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dts_hf.errors import UserError, nearest
from dts_hf.files import file_sha256, naming, write_json_atomic

TRIES = 5
PAUSE_SECONDS = 1.0
TIMEOUT_SECONDS = 30.0
PIECE = 1 << 16


# ------------------------------------------------------------------------------------------------------------ checksums


def check_checksum(path: Path, expected: str, name: str) -> None:
    """Compare ``path`` with a SHA-256 (64 digits) or the id that git gives to its content (40 digits).

    Raises:
        UserError: it differs; the message names the file and both digests.
    """
    wanted = expected.lower()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", wanted):
        raise UserError(f"--checksum: got '{expected}', expected 64 hexadecimal digits (SHA-256) or 40 (git blob)")
    kind, actual = ("sha256", file_sha256(path)) if len(wanted) == 64 else ("git blob", git_blob(path))
    if actual != wanted:
        raise UserError(
            f"{name}: wrong checksum: {kind} {actual}, expected {wanted}. The file is damaged or another one"
        )


def git_blob(path: Path) -> str:
    """The id that git gives to the content of a file."""
    # sha1 names git's content here, it protects nothing
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ download


class _Broken(Exception):
    """The connection ended before the file did."""


class NotThere(UserError):
    """The server has no such file (404 or 410)."""


def download(url: str, target: Path, checksum: str | None = None) -> Path:
    """Fetch ``url`` to ``target``, which appears only when it is complete and its checksum right.

    What arrived of a broken transfer stays in ``target.part``; the next try, or the next run, asks for the rest
    (HTTP ``Range`` with ``If-Range``, so that another version of the file is never glued to it).

    Raises:
        UserError: the server refuses, the connection breaks ``TRIES`` times in a row without a byte more, or the
            checksum is wrong (then the part is removed).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, shown = target.with_name(target.name + ".part"), public_url(url)
    idle = 0
    with _progress(target.name) as advance:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                _transfer(url, part, advance)
                break
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    kind = NotThere if error.code in (404, 410) else UserError
                    raise kind(f"{shown}: the server answers {error.code} {error.reason}") from None
                reason: object = f"{error.code} {error.reason}"
            except (_Broken, OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
            have = part.stat().st_size if part.exists() else 0
            idle = 0 if have > before else idle + 1
            if idle >= TRIES:
                raise UserError(
                    f"{shown}: the download broke after {have:,} bytes ({reason}). What arrived is kept; run the"
                    " command again to go on"
                ) from None
            time.sleep(PAUSE_SECONDS * idle)
    if checksum is not None:
        try:
            check_checksum(part, checksum, shown)
        except UserError:
            part.unlink()
            raise
        finally:
            _validator_file(part).unlink(missing_ok=True)
    os.replace(part, target)
    _validator_file(part).unlink(missing_ok=True)
    return target


def _transfer(url: str, part: Path, advance: Callable[[int, int | None], None]) -> None:
    have = part.stat().st_size if part.exists() else 0
    validator = _read_validator(part)
    headers = {"User-Agent": "dts_hf data_prep", "Accept-Encoding": "identity"}
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and "Range" in headers:  # nothing after what we have: complete, or not the same file
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
            raise _Broken("the server has no such range") from None
        raise
    with response:
        continued = response.status == 206 and str(response.headers.get("Content-Range", "")).startswith(
            f"bytes {have}-"
        )
        start = have if continued else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        if not continued:
            found = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            # A weak ETag may not be used for ranges (RFC 9110, section 13.1.5).
            _write_validator(part, "" if found.startswith("W/") else found)
        with open(part, "ab" if continued else "wb") as file:
            received = start
            while piece := response.read(PIECE):
                with naming(part):
                    file.write(piece)
                received += len(piece)
                advance(received, total)
    # read(n) does not complain when the connection ends early.
    if total is not None and received < total:
        raise _Broken(f"{received:,} of {total:,} bytes")


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_validator(part: Path) -> str:
    try:
        return str(json.loads(_validator_file(part).read_text(encoding="utf-8"))["validator"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _write_validator(part: Path, validator: str) -> None:
    write_json_atomic(_validator_file(part), {"validator": validator})


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int | None], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def public_url(url: str) -> str:
    """``url`` without user, password, query and fragment: they may carry a token."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# -------------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class SourceFile:
    """A file that a set was made from, as the manifest names it: no folder of this machine."""

    name: str
    sha256: str
    bytes: int


class Source:
    """Where raw files come from.

    Args:
        text: a local file or folder; a URL (of a file, or ending in ``/``: of a folder); the name of a data set on
            the Hub, ``owner/name`` or ``owner/name@revision``.
        cache: folder for downloads.
        revision: branch, tag or commit on the Hub.
        checksum: SHA-256 or git blob id of the (first) file.

    Raises:
        UserError: nothing is there.
    """

    def __init__(self, text: str, cache: Path, revision: str | None = None, checksum: str | None = None) -> None:
        self.text, self.cache, self.checksum = text, cache, checksum
        self.files: list[SourceFile] = []
        self.path = Path(text).expanduser()
        self.revision = revision
        self.kind = "path"
        if re.match(r"https?://", text):
            self.kind = "url"
        elif not self.path.exists():
            self.kind = "hub"
            name, _, at = text.partition("@")
            self.hub_name, self.revision = name, revision or at or None
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
                beside = [p.name for p in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
                raise UserError(
                    f"--source: {text}: no such file or folder, and no Hub name (owner/name)."
                    f"{nearest(self.path.name, beside)}"
                )

    @property
    def is_single_file(self) -> bool:
        return (self.kind == "path" and self.path.is_file()) or (self.kind == "url" and not self.text.endswith("/"))

    @property
    def label(self) -> str:
        """The source as the manifest names it."""
        return {"path": self.path.name, "url": public_url(self.text)}.get(self.kind) or self.hub_name

    def get(self, *names: str) -> Path:
        """The source's file when it is a single one, else the first of ``names`` that it has.

        Raises:
            UserError: it has none of them, it cannot be fetched, or its checksum is wrong.
        """
        path = self.find(*names)
        if path is None:
            there = sorted(p.name for p in self.path.iterdir())[:20] if self.kind == "path" else []
            found = f"; found {', '.join(there)}" if there else ""
            raise UserError(f"--source: {self.text}: there is no {' or '.join(names)} in it{found}")
        return path

    def find(self, *names: str) -> Path | None:
        """As :meth:`get`, but None where the source has none of ``names``."""
        if self.is_single_file:
            return self._noted(self.path if self.kind == "path" else self._download(self.text), None)
        for name in names:
            if self.kind == "path":
                path: Path | None = self.path / name if (self.path / name).is_file() else None
            elif self.kind == "url":
                try:
                    path = self._download(self.text + name)
                except NotThere:
                    path = None
            else:
                path = self._hub(name)
            if path is not None:
                return self._noted(path, name)
        return None

    def _noted(self, path: Path, name: str | None) -> Path:
        shown = name or (path.name if self.kind == "path" else urlsplit(self.text).path.rpartition("/")[2])
        if any(file.name == shown for file in self.files):
            return path
        if self.checksum is not None and not self.files:
            check_checksum(path, self.checksum, str(path) if self.kind == "path" else f"{self.label}: {shown}")
        self.files.append(SourceFile(shown, file_sha256(path), path.stat().st_size))
        return path

    def _download(self, url: str) -> Path:
        name = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rpartition("/")[2]) or "download"
        target = self.cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
        if target.is_file():
            return target
        return download(url, target, None if self.files else self.checksum)

    def _hub(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(self.hub_name, name, repo_type="dataset", revision=self.revision))
        except LocalEntryNotFoundError as error:  # is also an EntryNotFoundError: no network, not "no such file"
            raise self._no_hub(name, error) from None
        except EntryNotFoundError:
            return None
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise self._no_hub(name, error) from None
        # .../snapshots/<commit>/<file>: the commit that a branch name stood for
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
        self.revision = commit[1] if commit else self.revision
        return path

    def _no_hub(self, name: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        return UserError(
            f"--source: {self.text}: no such file or folder here, and {name} cannot be fetched from the Hub: {reason}."
            " Give the raw file with --source PATH or URL"
        )

    def describe(self) -> dict[str, Any]:
        """For the manifest: name, revision, and each file with its sha256."""
        return {
            "name": self.label,
            "revision": self.revision,
            "files": [{"name": f.name, "sha256": f.sha256, "bytes": f.bytes} for f in self.files],
        }
