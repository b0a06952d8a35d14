"""How likely a model finds responses: the log-probability of the very tokens that training on them would teach."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from dts_hf.data.chat_templates import Template
from dts_hf.data.row_encoder import RowEncoder
from dts_hf.data.rows import Row
from dts_hf.data.targets import TextCutter
from dts_hf.errors import UserError
from dts_hf.generation.answers import Answer
from dts_hf.loss.selection import IGNORE_INDEX, select_response
from dts_hf.models.checks import positions_of
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.self_test import label_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Longest row of a model that names no limit, in tokens.
LONGEST = 1 << 20


class AnswerScorer:
    """Scores the answers to a row. Each is read alone: beside others its last bits would be other ones.

    Args:
        model: causal language model; it is frozen and put into evaluation mode.
        tokenizer: of the model; need not be that of the model that wrote the answers.
        template: how the model is asked.
        name: what errors call it.

    Raises:
        UserError: the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: Template, name: str = "--scorer"
    ) -> None:
        self.teacher, self.name = LiveTeacher(model), name
        self.limit = positions_of(model) or LONGEST
        cutter, end = TextCutter(tokenizer, template, "last_turn"), tokenizer.eos_token_id
        if end is None:
            raise UserError(f"{name}: its tokenizer has no end-of-sequence token (eos_token), which ends an answer")
        self.encoder = RowEncoder(tokenizer, cutter, self.limit, self.limit - 1, int(end))

    def __call__(self, row: Row, answers: Sequence[Answer]) -> list[tuple[float, int]]:
        """Of each answer the sum of the log-probabilities of its tokens, in nats, and how many they are.

        log p(y | x) = sum_t log p(y_t | x, y_<t). The end of turn is one of the tokens, but of an answer that was cut.

        Args:
            row: what was asked.
            answers: to it.

        Raises:
            UserError: the model has too few positions, or its template cannot hold the row.
        """
        rows = [dataclasses.replace(row, references=(one.text,), answer=None, cut=one.cut) for one in answers]
        scores = []
        for encoded in self.encoder.encode(rows):
            if encoded is None or encoded.cut or encoded.prompt_cut:
                raise UserError(
                    f"row '{row.id}': with an answer it is longer than the {self.limit:,} positions of {self.name}. "
                    "Lower --max-new-tokens, choose another scorer, or leave such rows out"
                )
            device = self.teacher.head.weight.device
            ids = torch.tensor([list(encoded.ids)], device=device)
            labels = torch.full_like(ids, IGNORE_INDEX)
            for start, stop in zip(encoded.spans[::2], encoded.spans[1::2], strict=True):
                labels[:, start:stop] = ids[:, start:stop]
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            states = self.teacher.states(batch, labels)
            found = label_logprobs(states, self.teacher.head, select_response(ids[..., None], labels)[1])
            scores.append((float(found.double().sum()), len(found)))
        return scores
