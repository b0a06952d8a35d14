"""The answers of one evaluation set on disk while they are made, so that a killed evaluation goes on where it stopped."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dts_hf.errors import UserError
from dts_hf.files import write_jsonl_atomic


class Answer(NamedTuple):
    """Which answer: the seed of its pass and the id of its row."""

    seed: int
    row: str


class AnswerFile:
    """``SET.jsonl`` once all answers are there, and ``SET.jsonl.partial-RANK`` of each process until then.

    A line is written and flushed when its row ends, so a killed process loses the rows that had not ended. Whether
    old answers belong to this evaluation at all is checked by the caller (``OutputFolder``, ``evaluation.json``).

    Args:
        path: the finished file; its folder exists.
        rank: number of this process among those that write.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path, self.rank = Path(path), rank
        self._file: BinaryIO | None = None

    def load(self) -> dict[Answer, dict[str, Any]]:
        """Every answer that is there. A line that a killed process left half-written is not.

        Raises:
            UserError: a line in the middle is broken.
        """
        answers: dict[Answer, dict[str, Any]] = {}
        for path in [self.path, *self._partial_files()]:
            for row in _complete_lines(path):
                answers[Answer(row["seed"], row["id"])] = row
        return answers

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one answer behind those of this process."""
        if self._file is None:
            partial = self.path.with_name(f"{self.path.name}.partial-{self.rank}")
            self._file = partial.open("ab+")
            self._file.seek(0)
            # A killed process may have left half a line after the last newline
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the finished file in the order of ``rows`` and remove the partial ones of all processes."""
        write_jsonl_atomic(self.path, rows)
        for path in self._partial_files():
            path.unlink()

    def _partial_files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.partial-*"))

    def close(self) -> None:
        """Stop writing; ``append`` would go on behind what is there."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    *lines, _half = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["seed"], row["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: no answer of an evaluation ({error}). Remove the file to make it again"
            ) from None
        rows.append(row)
    return rows
