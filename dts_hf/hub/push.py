"""A student goes to the Hub: the login looked at, the repository made (private), a staged folder uploaded.

``push`` does all of it for a run directory or a folder; the trainer uses the same pieces for its own uploads.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dts_hf.console import say
from dts_hf.errors import UploadError, UserError
from dts_hf.files import read_json
from dts_hf.hub.faults import explained, patiently
from dts_hf.hub.staging import CARD, FIGURES, PROTOCOL, REPLACED, Staged, inside, stage
from dts_hf.reporting.facts import anchored, without_folders
from dts_hf.reporting.licences import inherited
from dts_hf.reporting.model_card import card_of_a_folder, models_of, render_model_card
from dts_hf.runs.damage import refuse_damaged
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.lock import in_use

#: Prefix of folders that live as long as an upload; what a killed process leaves of them, the next run removes.
STAGED = ".dts_hf-hub-"


@dataclass(frozen=True)
class Destination:
    """Where a student goes.

    Attributes:
        repository: ``name`` or ``owner/name``.
        private: of a repository that has to be made.
        revision: branch; None: the main one.
        token: None: the one of ``hf auth login`` or of ``HF_TOKEN``.
    """

    repository: str
    private: bool = True
    revision: str | None = None
    token: str | None = None


def push(
    source: Path,
    repository: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a run directory's student with its card, or a student's folder, and return the address.

    Args:
        source: a finished run, or a folder as ``save_pretrained`` leaves it.
        repository: None: the recipe's ``training.hub_model_id``, else the name of the folder.
        private: of a repository that has to be made; None: the recipe's ``training.hub_private_repo``, else True.
        revision: branch, made where there is none; None: the main one.
        token: None: the one of ``hf auth login`` or of ``HF_TOKEN``.

    Raises:
        UserError: there is nothing to upload, or a text holds an access token.
        UploadError: the Hub or the network failed.
    """
    to = destination(source, repository, private=private, revision=revision, token=token)
    retry = retry_command(source, to)
    try:
        to = replace(to, repository=full_name(to))
        # Staged first: what is refused has not made a repository
        with staged_source(source, to.repository, online=True) as ready:
            to = replace(to, repository=create_repository(to))
            address = upload(ready, to, "Upload student")
    except UserError:
        raise
    except Exception as error:  # whatever the client raises: the student is whole, and another try is one command
        raise UploadError(f"upload failed: {explained(error)}; retry: {retry}") from error
    say(f"uploaded to {address}")
    return address


def retry_command(source: Path, to: Destination) -> str:
    """The command that does the same upload: what the run says itself is left out."""
    usual = destination(source)
    words = ["dts-hf push", str(source)]
    if to.repository != usual.repository:
        words.append(f"--repo {to.repository}")
    if usual.private and not to.private:
        words.append("--public")
    if to.revision != usual.revision:
        words.append(f"--revision {to.revision}")
    return " ".join(words)


def destination(
    source: Path,
    repository: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Destination:
    """Where ``source`` goes.

    Args:
        source: as for ``push``.
        repository: the same.
        private: the same.
        revision: the same.
        token: the same.

    Raises:
        UserError: this is nothing that can be uploaded, or no name of a repository.
    """
    training: Mapping[str, Any] = {}
    if run := run_of(source):
        training = run.read_recipe().training
    elif not source.is_dir():
        RunDirectory.open(source)  # says that there is none, and the nearest name
    name = repository or training.get("hub_model_id") or name_of(source)
    check_repository(name)
    if private is None:
        private = training.get("hub_private_repo") is not False
    return Destination(name, private, revision or training.get("hub_revision"), token)


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        UserError: it is none.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--repo: got '{name}', expected owner/name: {error}") from None


def name_of(source: Path) -> str:
    """The name of a run, and of the student in it."""
    path = source.resolve()
    return path.parent.name if path.name == "final" else path.name


def run_of(source: Path) -> RunDirectory | None:
    """The run that ``source`` is, or whose ``final/`` it is; None: a student without its run, such as a downloaded one."""
    run = RunDirectory(source.parent if source.name == "final" else source)
    is_run = run.recipe_path.is_file() and (run.final_path.is_dir() or not (run.path / "config.json").is_file())
    return run if is_run else None


@contextmanager
def staged_source(source: Path, repository: str, *, online: bool) -> Iterator[Staged]:
    """What ``push`` uploads, in a folder that is there as long as the context.

    Args:
        source: as for ``push``.
        repository: for the card.
        online: ask the Hub for the licence of teacher and student where this machine does not know it.

    Raises:
        UserError: see ``stage``; the run is not finished, or a file of the student is not as the run has written it.
    """
    refuse_damaged(source)
    run = run_of(source)
    student = source if run is None else run.final_path
    if run is not None and not student.is_dir():
        raise UserError(
            f"{source}: this run is not finished, it has no {student.name}/. Go on with it: dts-hf train --resume"
        )
    with temporary_folder(student.parent if run is not None else None) as folder:
        if run is None:
            yield _stage_folder(student, folder, repository)
            return
        recipe = anchored(run, run.read_recipe().model_dump(mode="json"))
        origins = inherited(models_of(recipe), online=online)
        for warning in origins.warnings:
            say(warning)
        card = render_model_card(run, repository=repository, origins=origins, student=student)
        figures = [run.path / name for name in FIGURES if (run.path / name).is_file()]
        template = str((recipe.get("data") or {}).get("prompt_template") or "auto")
        yield stage(
            student, folder, card=card, recipe=recipe, metrics=run.read_metrics(), figures=figures,
            end_tokens=[] if recipe.get("task") else end_tokens(student, template),
        )  # fmt: skip


def _stage_folder(student: Path, folder: Path, repository: str) -> Staged:
    """A student without its run: its own card where it has one."""
    card = student / CARD
    if card.is_file():
        given = inside(student, CARD).read_text(encoding="utf-8", errors="replace")
        if (text := without_folders(given)) != given:
            say(f"{card}: paths of this machine in it lose their folders")
    else:
        text = card_of_a_folder(student, repository)
    return stage(student, folder, card=text, end_tokens=end_tokens(student, template_of(student)))


def template_of(student: Path) -> str:
    """The prompt template that a student's folder names; ``auto`` where it names none."""
    try:
        found = read_json(student / PROTOCOL).get("prompt_template") or "auto"
    except (OSError, UserError):  # a broken file: ``stage`` says so
        return "auto"
    return found if isinstance(found, str) else "auto"


def end_tokens(student: Path, template: str) -> list[int]:
    """The ids at which answers end under ``template``; none where the folder has no tokenizer for text."""
    from transformers import AutoTokenizer

    from dts_hf.data.chat_templates import end_of_turn_ids, resolve_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(student, local_files_only=True, trust_remote_code=False)
        return end_of_turn_ids(tokenizer, resolve_template(template, tokenizer))
    except (OSError, ValueError, KeyError):  # a classifier's, one with its own code, or none: nothing is added then
        return []


# ---------------------------------------------------------------------------------------------------------- the wire


def check_login(to: Destination) -> str:
    """Whether this machine may write to ``to`` as far as its login tells, before hours of training are spent.

    Returns:
        Whose login it is.

    Raises:
        UserError: there is none, it is wrong, it may only read, or the Hub cannot be asked.
    """
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():  # without a token the client would speak of that first
        raise UserError("training.push_to_hub: this machine is offline (HF_HUB_OFFLINE is set)")
    try:
        who = patiently(lambda: HfApi(library_name="dts-hf").whoami(token=to.token), "login")
    except Exception as error:
        raise UserError(f"training.push_to_hub: {explained(error)}") from error
    if (who.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"training.push_to_hub: the token of {who.get('name')} may only read; make one that may write at "
            "huggingface.co/settings/tokens and run 'hf auth login'"
        )
    owner, _, name = to.repository.rpartition("/")
    owners = [str(who.get("name")), *(str(org.get("name")) for org in who.get("orgs") or [])]
    if owner and name and owner not in owners:
        # A collaborator may write to somebody else's repository: whether it may be made is asked when it is
        say(f"{to.repository}: {who.get('name')} is no member of {owner}; the upload may be refused")
    return str(who.get("name"))


def full_name(to: Destination) -> str:
    """The repository with its owner, who is the login's own where none is named."""
    from huggingface_hub import HfApi

    if "/" in to.repository:
        return to.repository
    who = patiently(lambda: HfApi(library_name="dts-hf").whoami(token=to.token), "login")
    return f"{who['name']}/{to.repository}"


def create_repository(to: Destination, kind: str = "model") -> str:
    """Make the repository, private unless asked otherwise, or find it as it is; say which, and return its full name.

    Args:
        to: with its name.
        kind: ``model`` or ``dataset``.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="dts-hf", token=to.token)
    made = patiently(
        lambda: api.create_repo(to.repository, private=to.private, exist_ok=True, repo_type=kind), to.repository
    )
    name = str(made.repo_id)
    if to.revision is not None:
        patiently(lambda: api.create_branch(name, branch=str(to.revision), exist_ok=True, repo_type=kind), name)
    found = patiently(lambda: api.repo_info(name, repo_type=kind), name)
    if found.private is False and to.private:
        say(f"{name}: this repository was there already, and it is PUBLIC")
    else:
        say(f"{name}: the repository is {'public' if found.private is False else 'private'}")
    return name


def upload(ready: Staged, to: Destination, message: str) -> str:
    """Upload a staged folder in one commit and return the address of the repository.

    Large files that the Hub has already, by their sha256, are not sent again. What an earlier upload has
    left and is not among these goes, so that nobody loads a mixture of two students.

    Args:
        ready: what ``stage`` made.
        to: with the repository's full name.
        message: of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="dts-hf", token=to.token)
    say(f"{to.repository}: uploading {len(ready.files)} files, {ready.size}")
    patiently(
        lambda: api.upload_folder(
            repo_id=to.repository,
            folder_path=ready.folder,
            commit_message=message,
            revision=to.revision,
            delete_patterns=list(REPLACED),
        ),
        to.repository,
    )
    return f"{api.endpoint}/{to.repository}" + (f"/tree/{to.revision}" if to.revision else "")


@contextmanager
def temporary_folder(beside: Path | None) -> Iterator[Path]:
    """A new, empty folder on the disk of ``beside``, so that weights can be linked; it is gone when the context ends."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=STAGED, dir=beside))
    except OSError:  # read-only
        folder = Path(tempfile.mkdtemp(prefix=STAGED))
    try:
        with in_use(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
