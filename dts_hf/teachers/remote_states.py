"""Questions to one server, without the head: what a worker of a data loader needs to ask in its own process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dts_hf.errors import RunError, UserError
from dts_hf.teachers.batch_rows import Row
from dts_hf.teachers.connection import Connection, OtherTeacher
from dts_hf.teachers.description import Description
from dts_hf.teachers.identity import differences
from dts_hf.teachers.wire import (
    STATE_DTYPES,
    STATES_PATH,
    TEACHER_HEADER,
    TEACHER_PATH,
    TOKENS_HEADER,
    Answer,
    Question,
    decode_answer,
)

#: Of a description, bytes.
_LONGEST_DESCRIPTION = 1 << 20


class RemoteStates:
    """Asks for states, in as many questions as the server's limits make of the rows.

    Args:
        connection: to the server.

    Attributes:
        description: what the server said of its teacher when it was met; another teacher's answers are refused.

    Raises:
        UserError: the server is none of ours; see ``Description.from_json``.
        RunError: it does not answer.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection, self.url = connection, connection.url
        self.description = self._describe()

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.description.identity.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return STATE_DTYPES[self.description.identity.dtype]

    def ask(self, rows: Sequence[Row]) -> Answer:
        """States and log-probabilities of the labels of rows, on the CPU; any thread and any process may ask.

        Args:
            rows: see ``batch_rows.labelled_rows``.

        Raises:
            RunError: the server is gone for longer than the connection's patience, has another teacher now, or gives what
                is no answer.
        """
        answers = [Answer(torch.empty(0, self.hidden_size, dtype=self.dtype), torch.empty(0))]
        answers += [self._ask(Question.of_rows(part)) for part in self._parts(rows)]
        return Answer(*(torch.cat(parts) for parts in zip(*answers, strict=True)))

    def check_length(self, tokens: int) -> None:
        """Refuse a row that the server does not take.

        Args:
            tokens: in the row.

        Raises:
            UserError: it takes fewer.
        """
        most = min(self.description.limits.length, self.description.limits.tokens)
        if tokens > most:
            raise UserError(
                f"{self.url}: a row has {tokens:,} tokens, but the server takes {most:,} at most. Lower data.max_length, or "
                "raise --max-length (and --max-tokens) of dts-hf serve-teacher, as far as its model has positions"
            )

    def _parts(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """``rows`` in questions that the server takes."""
        limits, tokens = self.description.limits, 0
        part: list[Row] = []
        for row in rows:
            length = len(row[0])
            self.check_length(length)
            if part and (len(part) == limits.rows or tokens + length > limits.tokens):
                yield part
                part, tokens = [], 0
            part.append(row)
            tokens += length
        if part:
            yield part

    def _ask(self, question: Question) -> Answer:
        identity = self.description.identity
        itemsize = self.dtype.itemsize

        def read(content: bytes) -> tuple[Answer, str]:
            return decode_answer(content, question, identity.dtype, identity.hidden_size)

        known, retries = self.description.teacher_hash, self.connection.retries
        try:
            answer, from_whom = self.connection.post(
                STATES_PATH,
                question.encode(),
                {TOKENS_HEADER: question.token_hash, TEACHER_HEADER: known},
                question.labels * (identity.hidden_size * itemsize + 4) + 4096,
                read,
            )
        except OtherTeacher as error:
            self._check_description(str(error))
            raise
        if from_whom != known:
            self._check_description(f"{self.url}: answered as the teacher {from_whom or 'without a name'}")
            raise RunError(f"{self.url}: an answer bears the name of another teacher than the server's")
        if self.connection.retries != retries:  # it may have been restarted with another one
            self._check_description(f"{self.url}: answers again")
        return answer

    def _describe(self) -> Description:
        def read(content: bytes) -> Any:
            try:
                return json.loads(content)
            except (ValueError, RecursionError):
                raise UserError(
                    f"teacher.url: {self.url} answers with something else than JSON: expected the address of "
                    "'dts-hf serve-teacher'"
                ) from None

        return Description.from_json(self.connection.get(TEACHER_PATH, _LONGEST_DESCRIPTION, read), self.url)

    def _check_description(self, why: str) -> None:
        """Ask once more who is there.

        Raises:
            OtherTeacher: somebody else.
        """
        now = self._describe()
        if now.teacher_hash != self.description.teacher_hash:
            apart = differences(self.description.identity, now.identity, "the teacher that the run began with")
            raise OtherTeacher(
                f"{why}. It has another teacher now ({'; '.join(apart)}). Start it again with the first one and go on with "
                "--resume"
            )
        self.description = Description(self.description.identity, now.limits)
