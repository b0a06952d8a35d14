"""A teacher on another machine, behind ``dts-hf serve-teacher``: token ids there, final states back."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dts_hf.errors import RunError, UserError
from dts_hf.loss.selection import response_positions
from dts_hf.models.description import describe_tokenizer
from dts_hf.models.head import Head
from dts_hf.teachers.asked_ahead import TICKET, AskedAhead
from dts_hf.teachers.batch_rows import labelled_rows
from dts_hf.teachers.cached.teacher import LOGPROBS, STATES
from dts_hf.teachers.connection import Connection, token_of
from dts_hf.teachers.description import Description, decode_head
from dts_hf.teachers.identity import differences
from dts_hf.teachers.kept_answers import KeptAnswers
from dts_hf.teachers.remote_states import RemoteStates
from dts_hf.teachers.self_test import compare_labels, judge
from dts_hf.teachers.wire import HEAD_PATH, Answer

logger = logging.getLogger(__name__)
#: How long a server is looked for before the training, seconds.
FIRST_PATIENCE = 30.0
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
        first_patience: the same for the first requests, before the training; None: 30.
        cache: folder in which answers are kept as training goes, and looked for before a row is asked; None: nowhere.
        tokenizer: that encodes the rows; None: it is not compared with the server's.

    Raises:
        UserError: nobody answers, or not as ``dts-hf serve-teacher`` does, it fails the self-test, or has another
            tokenizer; or the folder has answers of another teacher.
    """

    takes_cu_seqlens = True

    def __init__(
        self, url: str, *, token_env: str | None = None, patience: float = 600.0, first_patience: float | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None, cache: str | Path | None = None,
    ) -> None:  # fmt: skip
        connection = Connection(
            url, token_of(token_env), patience=FIRST_PATIENCE if first_patience is None else first_patience
        )
        self.url = connection.url
        self._random = random.Random(0)  # which labels are tested; not the global one, which belongs to the training
        try:
            self.asking: RemoteStates | KeptAnswers = RemoteStates(connection)
            if tokenizer is not None:
                self.check_tokenizer(tokenizer)
            content: bytes = connection.get(HEAD_PATH, self.description.head_bytes, bytes)
            self._head = decode_head(content, self.description.identity, self.url)
            self._self_test()
            if cache is not None:
                self.asking = KeptAnswers(self.asking, cache)
        except RunError as error:  # nothing is trained yet
            raise UserError(f"teacher.url: {error}") from None
        connection.patience = patience
        #: For a collator: asks for the rows of a batch before the batch is needed.
        self.of_rows = AskedAhead(self.asking)

    @property
    def description(self) -> Description:
        """What the server said of its teacher when it was met."""
        return self.asking.description

    @property
    def head(self) -> Head:
        """The server's, as it was when it was met."""
        return self._head

    def to(self, device: torch.device) -> RemoteTeacher:
        """Move the head."""
        self._head = self._head.to(device)
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

    def check_rows(self, dataset: Any, name: str) -> None:
        """Refuse rows that the server does not take.

        Args:
            dataset: encoded rows, which know their lengths.
            name: what errors call it.

        Raises:
            UserError: one is too long.
        """
        if lengths := getattr(dataset, "teacher_lengths", None) or getattr(dataset, "lengths", None):
            try:
                self.asking.check_length(max(lengths))
            except UserError as error:
                raise UserError(f"{name}: {error}") from None

    def record(self) -> dict[str, Any]:
        """What a resume compares: the identity, without the address, which may be another one tomorrow."""
        return {"kind": "remote", **self.description.identity.as_json()}

    def states(self, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """Final states ``[N, H]``; see ``Teacher.states``.

        Raises:
            RunError: see ``RemoteStates.ask``, or an answer fails the self-test.
        """
        batch = dict(batch)
        bits, logprobs, ticket = (batch.pop(key, None) for key in (STATES, LOGPROBS, TICKET))
        if bits is not None and logprobs is not None:  # a worker has asked
            answer = Answer(bits.view(self.asking.dtype), logprobs.view(torch.float32))
        else:
            known = None if ticket is None else self.of_rows.fetch(int(ticket))
            answer = self.asking.ask(labelled_rows(batch, labels)) if known is None else known
        states = answer.states.to(labels.device, non_blocking=True)
        targets = batch["input_ids"].reshape(-1)[response_positions(labels) + 1]
        self._check(Answer(states, answer.label_logprob), targets)
        return states

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
            answer = self.asking.ask([(row, torch.arange(length) > 0)])
            found = compare_labels(answer.label_logprob, answer.states, self._head, row[1:])
            if warning := judge(found, self.description.identity.dtype, self.url):
                logger.warning("%s", warning)

    def _check(self, answer: Answer, targets: Tensor) -> None:
        """The self-test of a few labels of one answer, in the place where the head is.

        Args:
            answer: of one batch.
            targets: ``[N]``, the tokens whose log-probabilities are in it.
        """
        if len(targets) != len(answer.states):
            raise RunError(f"{self.url}: got {len(answer.states):,} states for {len(targets):,} labels")
        if not len(targets):
            return
        some = torch.tensor(sorted(self._random.sample(range(len(targets)), min(_CHECKED, len(targets)))))
        device = self._head.weight.device
        stored = answer.label_logprob[some.to(answer.label_logprob.device)]
        states, ids = (tensor[some.to(tensor.device)].to(device) for tensor in (answer.states, targets))
        try:
            judge(compare_labels(stored, states, self._head, ids), self.description.identity.dtype, self.url)
        except UserError as error:
            kept = f". Remove {self.asking.folder} as well: it may hold more of them" if isinstance(
                self.asking, KeptAnswers) else ""  # fmt: skip
            raise RunError(f"{error}{kept}") from None
