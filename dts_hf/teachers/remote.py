"""A teacher on another machine, behind ``dts-hf serve-teacher``: token ids there, final states back."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dts_hf.errors import RunError, UserError
from dts_hf.loss.selection import count_targets
from dts_hf.models.description import describe_tokenizer
from dts_hf.models.head import Head
from dts_hf.teachers.batch_rows import Row, labelled_rows
from dts_hf.teachers.connection import Connection, OtherTeacher, token_of
from dts_hf.teachers.description import Description, decode_head
from dts_hf.teachers.identity import differences
from dts_hf.teachers.self_test import compare_labels, judge
from dts_hf.teachers.wire import (
    HEAD_PATH,
    STATE_DTYPES,
    STATES_PATH,
    TEACHER_HEADER,
    TEACHER_PATH,
    TOKENS_HEADER,
    Answer,
    Question,
    decode_answer,
)

logger = logging.getLogger(__name__)
#: Of a description, bytes.
_LONGEST_DESCRIPTION = 1 << 20
#: Labels of each answer whose log-probability is computed again: any answer may be somebody else's.
_CHECKED = 8


class RemoteTeacher:
    """Asks a server for the states of each batch; the head is here, so every temperature and divergence works.

    What is asked are rows, not batches: packs are cut where positions begin anew, padding is cut off. The server is
    tested when it is met (its label log-probabilities must be those that its states and its head give), and a few labels of
    every answer are tested again.

    Args:
        url: of the server.
        token_env: name of the environment variable with its token; None: it wants none.
        patience: how long a request is tried again before the run ends, seconds.
        first_patience: the same for the first requests, before the training.
        tokenizer: that encodes the rows; None: it is not compared with the server's.

    Raises:
        UserError: nobody answers, or not as ``dts-hf serve-teacher`` does, it fails the self-test, or has another
            tokenizer.
    """

    takes_cu_seqlens = True

    def __init__(
        self, url: str, *, token_env: str | None = None, patience: float = 600.0, first_patience: float = 30.0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:  # fmt: skip
        self.connection = Connection(url, token_of(token_env), patience=first_patience)
        self.url = self.connection.url
        self._random = random.Random(0)  # which labels are tested; not the global one, which belongs to the training
        try:
            self.description = self._describe()
            if tokenizer is not None:
                self.check_tokenizer(tokenizer)
            content: bytes = self.connection.get(HEAD_PATH, self.description.head_bytes, bytes)
            self._head = decode_head(content, self.description.identity, self.url)
            self._self_test()
        except RunError as error:  # nothing is trained yet
            raise UserError(f"teacher.url: {error}") from None
        self.connection.patience = patience

    @property
    def head(self) -> Head:
        """The server's, as it was when it was met."""
        return self._head

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.description.identity.hidden_size

    def to(self, device: torch.device) -> RemoteTeacher:
        """Move the head."""
        bias = None if self._head.bias is None else self._head.bias.to(device)
        self._head = Head(self._head.weight.to(device), bias, self._head.logit_scale, self._head.softcap)
        return self

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer whose ids mean something else to the server.

        Raises:
            UserError: it is another one than the server's.
        """
        ours, identity = describe_tokenizer(tokenizer), self.description.identity
        here = {"tokenizer": ours["vocabulary"], "tokenizer_rules": ours["rules"]}
        if apart := differences(identity, here, self.url):
            raise UserError(f"teacher.url: {self.url} serves {identity.model!r} for other tokens: {'; '.join(apart)}")

    def states(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """Final states ``[N, H]``; see ``Teacher.states``.

        Raises:
            RunError: the server is gone for longer than ``patience``, has another teacher now, or gives what is no answer.
        """
        rows = labelled_rows(batch, labels)
        states = torch.empty(int(count_targets(labels.cpu())), self.hidden_size, dtype=self.dtype)
        at = 0
        for part in self._parts(rows):
            question = Question.of_rows(part)
            answer = self._ask(question)
            self._check(question, answer)
            states[at : at + len(answer.states)] = answer.states
            at += len(answer.states)
        return states.to(labels.device, non_blocking=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return STATE_DTYPES[self.description.identity.dtype]

    def _parts(self, rows: list[Row]) -> Iterator[list[Row]]:
        """``rows`` in questions that the server takes."""
        limits, part, tokens = self.description.limits, [], 0
        for row in rows:
            length = len(row[0])
            if length > min(limits.length, limits.tokens):
                raise RunError(
                    f"{self.url}: a row has {length:,} tokens, but the server takes {min(limits.length, limits.tokens):,} "
                    "at most. Lower data.max_length, or raise the server's --max-length"
                )
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

    def _self_test(self) -> None:
        """Two rows of random ids: no data is needed to find states before the norm, shifted rows, or another head.

        Raises:
            UserError: see ``self_test.judge``.
        """
        limits = self.description.limits
        length = min(17, limits.length)
        if length < 2:
            raise UserError(f"{self.url}: takes rows of {length} token, expected 2 at least")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(min(limits.vocab_size, self._head.vocab_size), (2, length), generator=generator)
        for row in ids:
            question = Question.of_rows([(row, torch.arange(length) > 0)])
            answer = self._ask(question)
            found = compare_labels(answer.label_logprob, answer.states, self._head, row[1:])
            if warning := judge(found, self.description.identity.dtype, self.url):
                logger.warning("%s", warning)

    def _check(self, question: Question, answer: Answer) -> None:
        """The self-test of a few labels of one answer, in the place where the head is."""
        count = question.labels
        some = torch.tensor(sorted(self._random.sample(range(count), min(_CHECKED, count))))
        targets = question.input_ids[question.label_mask.bool()][some].long()
        device = self._head.weight.device
        states = answer.states[some].to(device)
        found = compare_labels(answer.label_logprob[some], states, self._head, targets.to(device))
        try:
            judge(found, self.description.identity.dtype, self.url)
        except UserError as error:
            raise RunError(str(error)) from None
