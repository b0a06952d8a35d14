"""The output folder of ``dts-hf evaluate``: of one evaluation alone, and complete enough to go on after a kill.

evaluation.json  metrics.json  predictions/SET.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dts_hf.distributed.processes import on_first_process, process
from dts_hf.errors import UserError
from dts_hf.files import write_json_atomic
from dts_hf.generation.answer_file import AnswerFile

IDENTITY_FILE = "evaluation.json"


class OutputFolder:
    """Every process calls every method; the first one reads and writes, and what it refuses all refuse.

    An *identity* says what the answers depend on: ``{"protocol", "batch_size", "rows": {set: digest}, "model"}``, the
    model only once it is loaded. Evaluations of equal identity share a folder; sets may be added.

    Args:
        path: of the folder; need not exist.
        overwrite: replace another evaluation in it.
    """

    def __init__(self, path: str | Path, overwrite: bool) -> None:
        self.path, self.overwrite = Path(path), overwrite
        self.rank, self.world = process()

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse a folder of something else; writes nothing, so it can be asked before the model is loaded.

        Raises:
            UserError: the folder holds other files or another evaluation.
        """
        on_first_process(lambda: self._rows_before(identity), self.rank, self.world)

    def open(self, identity: Mapping[str, Any]) -> None:
        """Make the folder, or go on in it where it holds the same evaluation.

        Raises:
            UserError: as ``check``, or the folder cannot be written.
        """
        on_first_process(lambda: self._open(identity), self.rank, self.world)

    def answer_file(self, set_name: str) -> AnswerFile:
        """Where the answers to a set are kept while they are made."""
        return AnswerFile(self.path / "predictions" / f"{set_name.replace('/', '-')}.jsonl", self.rank)

    def finish_set(self, answers: AnswerFile, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Put the finished ``predictions`` in the place of what the processes have written one by one."""
        answers.close()
        if self.world > 1:
            torch.distributed.barrier()  # the first process removes the files of the others: they must be closed
        # Sorted and whole, in place of parts in the order in which rows ended; until this rename the parts are the truth
        if self.rank == 0:
            answers.finish(predictions)

    def earlier_scores(self) -> dict[str, Any]:
        """The scores of the sets that ``metrics.json`` holds already; ``open`` has seen to it that they fit."""
        return on_first_process(self._earlier_scores, self.rank, self.world)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``."""
        if self.rank == 0:
            write_json_atomic(self.path / "metrics.json", metrics)

    def _rows_before(self, identity: Mapping[str, Any]) -> dict[str, str]:
        """The digests of the rows that the evaluation in the folder has, by set."""
        file = self.path / IDENTITY_FILE
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output: {self.path} is a file, expected a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not file.is_file():
            raise UserError(f"--output: {self.path} is not empty and holds no evaluation; choose another folder")
        if self.overwrite or not file.is_file():
            return {}
        # Answers of another protocol, model or row would be taken for these and scored with them: the text of an answer
        # does not tell what it was an answer to
        before = json.loads(file.read_text(encoding="utf-8"))
        different = _differences(before, identity)
        if different:
            raise UserError(
                f"--output: {self.path} holds another evaluation ({', '.join(different)}). Choose another folder, or "
                "replace it with --overwrite"
            )
        return dict(before["rows"])

    def _open(self, identity: Mapping[str, Any]) -> None:
        rows_before = self._rows_before(identity)
        predictions = self.path / "predictions"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.overwrite:
                for old in [self.path / "metrics.json", *predictions.glob("*.jsonl*")]:
                    old.unlink(missing_ok=True)
            # Before the first answer, after the last old one: whatever is killed, the answers are those of this file
            write_json_atomic(self.path / IDENTITY_FILE, {**identity, "rows": {**rows_before, **identity["rows"]}})
            predictions.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: cannot write in {self.path}: {error.strerror}") from None

    def _earlier_scores(self) -> dict[str, Any]:
        file = self.path / "metrics.json"
        if not file.is_file():
            return {}
        (entry,) = json.loads(file.read_text(encoding="utf-8"))["models"].values()
        return dict(entry["sets"])


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How the identities of two evaluations differ, in words. Sets that only one of them has are no difference."""
    # Before the model is loaded only the rest can be compared, which refuses most folders without minutes of loading
    differences = ["another model"] if "model" in now and before["model"] != now["model"] else []
    old, new = before["protocol"], now["protocol"]
    # The fingerprint says that something differs, the other entries say what
    differences += [
        f"{key} {old.get(key)}, now {new[key]}" for key in new if key != "fingerprint" and old.get(key) != new[key]
    ]
    if before["batch_size"] != now["batch_size"]:
        differences.append(
            f"batch_size {before['batch_size']}, now {now['batch_size']}, which changes the text below fp32"
        )
    shared = before["rows"].keys() & now["rows"].keys()
    return differences + [
        f"other rows of {name}" for name in sorted(shared) if before["rows"][name] != now["rows"][name]
    ]
