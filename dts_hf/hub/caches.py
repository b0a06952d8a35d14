"""A cache of a teacher's states goes to the Hub as a data set, and comes back: its own files, and no others.

As on a disk the manifest comes last: a repository without one is unfinished, whatever broke the upload off.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dts_hf.console import gb, say, secrets_in
from dts_hf.errors import UploadError, UserError
from dts_hf.hub.faults import explained, patiently
from dts_hf.hub.pull import download
from dts_hf.hub.push import Destination, check_repository, create_repository, full_name
from dts_hf.teachers.cached.layout import MANIFEST, Manifest
from dts_hf.teachers.cached.manifest_form import HEAD, INDEX, is_shard_name, shard_name
from dts_hf.teachers.cached.reader import verified
from dts_hf.teachers.compact import ErrorAt

CARD = "README.md"
#: Files of a commit: the Hub advises no more than a hundred.
PER_COMMIT = 50


def push_cache(
    folder: Path,
    repository: str | None = None,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Check a finished cache, upload it to a data set repository, and return the address.

    Args:
        folder: the cache.
        repository: ``name`` or ``owner/name``; None: the name of the folder.
        private: of a repository that has to be made.
        revision: branch, made where there is none; None: the main one.
        token: None: the one of ``hf auth login`` or of ``HF_TOKEN``.

    Raises:
        UserError: the cache is unfinished or damaged, or this is no name of a repository.
        UploadError: the Hub or the network failed.
    """
    to = Destination(repository or folder.resolve().name, private, revision, token)
    check_repository(to.repository)
    manifest = verified(folder).manifest
    card = cache_card(manifest)
    for text, name in ((card, CARD), (manifest.text(), MANIFEST)):
        if found := next(secrets_in(text), None):
            raise UserError(f"{folder / name}: line {found[0]} holds {found[1]}, so nothing was uploaded")
    again = f"dts-hf push-cache {folder} --repo {to.repository}{'' if private else ' --public'}"
    try:
        to = replace(to, repository=full_name(to))
        to = replace(to, repository=create_repository(to, "dataset"))
        address = _upload(folder, manifest, card, to)
    except UserError:
        raise
    except Exception as error:  # whatever the client raises: the cache is whole, and another try is one command
        raise UploadError(f"upload failed: {explained(error)}; retry: {again}") from error
    say(f"uploaded to {address}")
    return address


def _upload(folder: Path, manifest: Manifest, card: str, to: Destination) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="dts-hf", token=to.token)
    # Names of our own, whatever the manifest says, which may have come from anywhere
    shards = [shard_name(number) for number in range(len(manifest.shards))]
    rest = [INDEX, MANIFEST] if manifest.form is not None else [HEAD, INDEX, MANIFEST]
    say(f"{to.repository}: uploading {len(shards)} shards, {gb(manifest.size)}")

    def commit(operations: list[CommitOperationAdd | CommitOperationDelete], message: str) -> None:
        patiently(
            lambda: api.create_commit(
                to.repository, operations, commit_message=message, repo_type="dataset", revision=to.revision
            ),
            to.repository,
        )

    def added(name: str) -> CommitOperationAdd:
        return CommitOperationAdd(name, str(folder / name))

    for first in range(0, len(shards), PER_COMMIT):
        part = shards[first : first + PER_COMMIT]
        commit([added(name) for name in part], f"Shards {first} to {first + len(part) - 1}")
    there = patiently(
        lambda: api.list_repo_files(to.repository, repo_type="dataset", revision=to.revision), to.repository
    )
    stale = [name for name in there if is_shard_name(name) and name not in shards]
    last = [CommitOperationAdd(CARD, card.encode()), *map(added, rest)]
    commit([*last, *map(CommitOperationDelete, stale)], "Index, head and manifest")
    return f"{api.endpoint}/datasets/{to.repository}" + (f"/tree/{to.revision}" if to.revision else "")


def pull_cache(repository: str, target: Path, *, revision: str | None = None, token: str | None = None) -> Manifest:
    """Download a cache into ``target``, check all of it, and return its manifest.

    Args:
        repository: name of the data set on the Hub.
        target: a folder that does not exist, is empty, or holds what an earlier try has left.
        revision: branch, tag or commit; None: the main branch.
        token: None: the one of ``hf auth login`` or of ``HF_TOKEN``.

    Raises:
        UserError: there is no such data set for this login, it is no cache of states, or it is not as it was written.
        RunError: the Hub or the network failed.
    """

    def wanted(offered: list[str]) -> list[str]:
        if MANIFEST not in offered:
            raise UserError(f"{repository}: holds no {MANIFEST}, so it is no cache of states, or an unfinished one")
        own = {MANIFEST, INDEX, HEAD, CARD}
        return [name for name in offered if name in own or is_shard_name(name)]

    download(repository, target, "dataset", wanted, revision=revision, token=token)
    return verified(target).manifest


def cache_card(manifest: Manifest) -> str:
    """The card of a cache: what it is, and how it is trained on.

    Args:
        manifest: of the cache.
    """
    identity, form = manifest.identity, manifest.form
    kept = {"states": f"final states after the norm, {identity.hidden_size} numbers a label in {manifest.dtype}"}
    if form is not None:
        kept = {
            "kept logits": f"{form.top_k:,} of {form.vocab_size:,} a label in {form.dtype}, and what the others weigh"
        }
        kept |= {"lost": "; ".join(str(ErrorAt(**error)) for error in (manifest.compact or {})["errors"])}
    rows = {
        "teacher": f"`{identity.model}`" + (f" at `{identity.commit}`" if identity.commit else ""),
        **kept,
        "labels": f"{manifest.labels:,} of {manifest.rows:,} rows",
        "size": gb(manifest.size),
        "vocabulary": f"{identity.vocab_size:,} tokens",
        "teacher's loss": f"{manifest.nll:.4f} nats per label",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    what = "What a teacher's head reads, for every label of some rows. Logits at any temperature follow exactly"
    if form is not None:
        what = (
            "The largest logits of a teacher for every label of some rows. How far that is from all of them is below"
        )
    head = "`head.safetensors` is a part of the teacher's weights: the teacher's licence holds for it.\n"
    return (
        "---\ntags:\n- dts-hf\n- distillation\n- teacher-states\n---\n\n# Cached teacher states\n\n"
        f"{what}. Written by `dts-hf cache-teacher`. The rows themselves are not in it: to train on it they are needed as "
        f"well, and the same tokenizer and template.\n\n| | |\n|---|---|\n{table}\n\n"
        "```yaml\nteacher:\n"
        f"  model: {identity.model}\n  dtype: {identity.dtype}\n  kind: cached\n"
        "  cache: FOLDER  # of dts-hf pull-cache\n```\n\n"
        f"{head if form is None else ''}"
    )
