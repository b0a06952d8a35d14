"""Who answers: a run's student, its teacher, or any saved model, with the prompt template it was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from dts_hf.console import working
from dts_hf.data.chat_templates import Template, encode_prompts, end_of_turn_ids, resolve_template
from dts_hf.data.rows import Row
from dts_hf.distributed.processes import default_device
from dts_hf.errors import UserError
from dts_hf.evaluation.subject import Subject
from dts_hf.generation.engine import Generated, GenerationSettings, generate, stop_token_ids
from dts_hf.generation.shares import decode_answer
from dts_hf.models.checks import positions_of
from dts_hf.models.loading import load_model, load_tokenizer

#: A prompt of this many tokens and no more, where the model names no limit of its own.
LONGEST_PROMPT = 8192


def template_of(subject: Subject) -> str | Template:
    """The template that a student was trained with; ``auto`` for a foreign model."""
    if subject.student is not None:
        return subject.student.template
    return "auto" if subject.recipe is None else subject.recipe.data.prompt_template


@dataclass
class Speaker:
    """A model that answers, on its device.

    Attributes:
        label: ``student``, ``teacher`` or ``model``.
        model: causal language model.
        tokenizer: of the model.
        template: how a prompt is worded.
    """

    label: str
    model: Any
    tokenizer: Any
    template: Template

    def encode(self, rows: Sequence[Row], max_new_tokens: int) -> list[list[int]]:
        """The tokens of each prompt.

        Raises:
            UserError: a prompt leaves no room for its answer.
        """
        limit = self.longest_prompt(max_new_tokens)
        prompts = encode_prompts(list(rows), self.tokenizer, self.template, limit)
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt is None:
                raise UserError(
                    f"row '{row.id}': its prompt leaves no room for {max_new_tokens} new tokens in the "
                    f"{limit + max_new_tokens} positions of {self.label}"
                )
        return [prompt.ids for prompt in prompts if prompt is not None]

    def longest_prompt(self, max_new_tokens: int) -> int:
        """Tokens that a prompt may have beside an answer of ``max_new_tokens``.

        Raises:
            UserError: none.
        """
        positions = positions_of(self.model) or LONGEST_PROMPT
        if positions <= max_new_tokens:
            raise UserError(
                f"--max-new-tokens: {max_new_tokens} of the {positions} positions of {self.label} are too many"
            )
        return positions - max_new_tokens

    def answer(
        self,
        rows: Sequence[Row],
        settings: GenerationSettings,
        *,
        progress: str | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Generated]:
        """Answer the prompts of ``rows``.

        Args:
            rows: their responses are not looked at; the sampling noise of each follows its id.
            settings: limits and sampling.
            progress: title of the progress bar, or None.
            on_token: called with the place of a row and its next token.

        Raises:
            UserError: a prompt leaves no room for its answer.
        """
        stops = {*stop_token_ids(self.model, self.tokenizer), *end_of_turn_ids(self.tokenizer, self.template)}
        return generate(
            self.model,
            self.encode(rows, settings.max_new_tokens),
            settings,
            eos_token_ids=sorted(stops),
            pad_token_id=self.tokenizer.pad_token_id or 0,  # never attended to: any id does
            row_keys=[row.id for row in rows],
            progress=progress,
            on_token=on_token,
        )

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        return decode_answer(self.tokenizer, tokens)


def load_speaker(
    label: str,
    path: str,
    *,
    template: str | Template,
    key: str,
    dtype: str = "float32",
    tokenizer: str | None = None,
    device: torch.device | None = None,
) -> Speaker:
    """Load a model to answer with, on the GPU where there is one.

    Args:
        label: ``student``, ``teacher`` or ``model``.
        path: Hub name, folder, or GGUF file.
        template: its prompt template, or the name of it; ``auto``: the tokenizer's chat template, else Alpaca.
        key: what the user calls this choice, for messages.
        dtype: of the weights.
        tokenizer: where its tokenizer is; None: where the model is.
        device: where it answers; None: on the GPU where there is one.

    Raises:
        UserError: it cannot be loaded, or knows no such template.
    """
    transformers_logging.disable_progress_bar()  # it would stand between the answers
    with working(f"loading {label} {path}"):
        words = load_tokenizer(tokenizer or path, key=key)
        model: Any = load_model(path, key=key, dtype=dtype)
    found = template if isinstance(template, Template) else resolve_template(template, words, "--template")
    place = device or default_device()
    return Speaker(label, model.to(place).eval(), words, found)
