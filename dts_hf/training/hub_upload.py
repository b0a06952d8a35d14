"""The trainer's uploads: what it saves is staged (``hub.staging``) and sent from there, never its output directory.

Logs, checkpoints and answers to held-out rows lie there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from dts_hf.console import say
from dts_hf.errors import UploadError, UserError
from dts_hf.hub.faults import explained
from dts_hf.hub.push import STAGED, Destination, create_repository, end_tokens, upload
from dts_hf.hub.staging import Staged, stage

#: Folder of ``args.output_dir`` in which the model is saved before it is staged.
UPLOAD = ".dts_hf-hub-saved"


class HubUploads:
    """Uploads of one trainer, one after the other, in the order in which they were asked for.

    Args:
        args: of the trainer: whose token, how private, which branch.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hub")

    def destination(
        self, repository: str, token: str | None, private: bool | None, revision: str | None
    ) -> Destination:
        """Where the next upload goes.

        Args:
            repository: its name.
            token: None: the one of ``args``, else of this machine.
            private: None: as ``args`` say, and True where they say nothing.
            revision: None: as ``args`` say, else the main branch.
        """
        private = self.args.hub_private_repo if private is None else private
        return Destination(
            repository,
            True if private is None else private,
            revision or self.args.hub_revision,
            token or self.args.hub_token,
        )

    def open(self, repository: str, token: str | None, private: bool | None) -> str:
        """Make or find the repository and return its full name.

        Raises:
            UserError: the Hub refuses, or cannot be asked.
        """
        try:
            return create_repository(self.destination(repository, token, private, None))
        except Exception as error:
            raise UserError(f"training.push_to_hub: {repository}: {explained(error)}") from error

    def stage(self, saved: Path, card: str, template: str) -> Staged:
        """A staged copy of a saved model, in a folder of its own beside it, which the upload removes.

        Args:
            saved: what ``save_model`` or a checkpoint left.
            card: text of README.md.
            template: prompt template, whose end of turn generation stops at; empty: nothing is generated.
        """
        folder = Path(tempfile.mkdtemp(prefix=STAGED, dir=saved.parent))
        try:
            return stage(saved, folder, card=card, end_tokens=end_tokens(saved, template) if template else [])
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def start(self, ready: Staged, to: Destination, message: str) -> Future[str]:
        """Upload in the background; the result is the address, or an ``UploadError``."""

        def work() -> str:
            try:
                return upload(ready, to, message)
            except Exception as error:
                raise UploadError(f"{to.repository}: upload failed: {explained(error)}") from error
            finally:
                shutil.rmtree(ready.folder, ignore_errors=True)

        return self._worker.submit(work)

    def push_checkpoint(
        self, checkpoint: Path, to: Destination, card: str, template: str, message: str
    ) -> Future[str] | None:
        """Upload the student of a checkpoint in the background. Whatever goes wrong is said, and training goes on.

        Args:
            checkpoint: its optimizer states and counters stay here; of sharded weights there is nothing to upload.
            to: with the repository's full name.
            card: text of README.md.
            template: see ``stage``.
            message: of the commit.
        """
        try:
            future = self.start(self.stage(checkpoint, card, template), to, message)
        except (UserError, OSError) as error:
            say(f"{message}: not uploaded, training goes on: {error}")
            return None
        future.add_done_callback(lambda done: _say_failure(done, message))
        return future


def _say_failure(done: Future[str], message: str) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        say(f"{message}: {error}; training goes on")


def remove_all_of(folder: Path) -> None:
    """Remove it or fail: what is left there would be staged. Of a link the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def card_metadata(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``Trainer.create_model_card`` as metadata of our card; those that are None are left out.

    Args:
        options: ``language``, ``license``, ``tags``, ``model_name``, ``finetuned_from``, ``dataset`` and the others.
    """
    names = {"finetuned_from": "base_model", "dataset": "datasets", "dataset_tags": "datasets"}
    values: dict[str, Any] = {}
    for key, value in options.items():
        name = names.get(key, key)
        if value is None or key in ("dataset_args", "tasks"):
            continue
        if name in ("tags", "datasets"):
            values[name] = [*values.get(name, []), *([value] if isinstance(value, str) else value)]
        else:
            values[name] = value
    return values
