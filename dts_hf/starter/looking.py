"""What the starter looks at: the teacher's configuration and tokenizer, and the rows as the teacher's tokens."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from dts_hf.console import quiet, working
from dts_hf.data.chat_templates import encode_prompts, resolve_template
from dts_hf.data.held_out_split import split_off
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_rows
from dts_hf.data.targets import all_turns_are_sound
from dts_hf.errors import UserError
from dts_hf.models.loading import ModelSource, load_tokenizer, loading
from dts_hf.training.model_shape import ModelShape

#: So many rows are tokenised at most, spread over all of them.
LOOKED_AT = 2000
#: What a file of held-out rows beside ``train.jsonl`` is called.
HELD_OUT_NAMES = ("validation", "valid", "val", "dev", "eval")
#: Held-out rows: this share, and so many at least and at most.
HELD_OUT_SHARE, LEAST_HELD_OUT, MOST_HELD_OUT = 0.05, 8, 500
#: A model without a limit of its own is given this one.
POSITIONS = 4096


@dataclass(frozen=True)
class TeacherLook:
    """What its files say of the teacher, without its weights.

    Attributes:
        name: as the user gave it.
        tokenizer: its own.
        layers, vocabulary, positions, parameters: of the model; parameters are 0 where the files do not tell.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    layers: int
    vocabulary: int
    positions: int
    parameters: int

    @property
    def has_chat_template(self) -> bool:
        """Whether it was trained on conversations."""
        return bool(self.tokenizer.chat_template)


@dataclass(frozen=True)
class DataLook:
    """What the rows are, in the teacher's tokens.

    Attributes:
        source: as the user gave it.
        rows: how many.
        kinds: how many of each kind.
        held_out: a file of held-out rows that lies beside it, or None.
        share: of the rows that can be held out, where there is no such file; None: they have too few prompts.
        share_rows: how many rows that are.
        unfit: rows that were looked at whose prompt is longer than the teacher's positions; they are not in what follows.
        prompts, responses, totals: tokens of the other rows that were looked at, sorted. A text has no prompt.
        all_turns: every turn can be learned; otherwise the chat template writes earlier ones anew, as Qwen3's does.
    """

    source: str
    rows: int
    kinds: dict[str, int]
    held_out: str | None
    share: float | None
    share_rows: int
    unfit: int
    prompts: Sequence[int]
    responses: Sequence[int]
    totals: Sequence[int]
    all_turns: bool = True


def look_at_teacher(name: str) -> TeacherLook:
    """Read configuration and tokenizer of the teacher.

    Raises:
        UserError: it cannot be read, or is no language model with layers.
    """
    with working(f"looking at {name}"):
        tokenizer = load_tokenizer(name, key="--teacher")
        config = read_config(name, "--teacher")
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"--teacher: {name}: its configuration names no layers, expected a causal language model")
    parameters = 0
    with contextlib.suppress(Exception), quiet():  # an architecture that the estimator does not know
        parameters = ModelShape.from_config(config).parameters
    positions = getattr(text, "max_position_embeddings", None) or POSITIONS
    return TeacherLook(name, tokenizer, layers, int(text.vocab_size), int(positions), parameters)


def read_config(name: str, key: str) -> Any:
    """The configuration of a model, without its weights.

    Raises:
        UserError: there is no such model, or it cannot be read.
        RunError: the machine or the network failed meanwhile.
    """
    source = ModelSource.resolve(name, key)
    with loading(name, key):
        return AutoConfig.from_pretrained(source.location, **source.options)


def look_at_data(source: str, teacher: TeacherLook) -> DataLook:
    """Read the rows, and measure them in the teacher's tokens.

    Raises:
        UserError: there are none, or one is wrong.
    """
    with working(f"looking at {source}"):
        rows = load_rows(source)
        tokenizer = teacher.tokenizer
        template = resolve_template("auto", tokenizer)
        sample = rows[:: max(1, len(rows) // LOOKED_AT)][:LOOKED_AT]
        encoded = encode_prompts(sample, tokenizer, template, teacher.positions)
        lengths = (
            0 if row.kind == "text" else prompt and len(prompt.ids)
            for row, prompt in zip(sample, encoded, strict=True)
        )
        kept = [(row, length) for row, length in zip(sample, lengths, strict=True) if length is not None]
        if not kept:
            raise UserError(
                f"--data: {source}: every prompt is longer than the {teacher.positions} positions of the teacher"
            )
        all_turns = all_turns_are_sound((row for row, _ in kept), tokenizer, template)
        texts = [row.response for row, _ in kept]
        written = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    responses = [len(ids) + 2 for ids in written]  # the end of a turn, and what a template writes behind it
    prompts = [length for _, length in kept]
    totals = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    kinds = dict(Counter(_kind(row) for row in rows).most_common())
    share, share_rows = _share_to_hold_out(rows)
    return DataLook(
        source,
        len(rows),
        kinds,
        held_out_beside(source),
        share,
        share_rows,
        len(sample) - len(kept),
        *(sorted(prompts), sorted(responses), sorted(totals)),
        all_turns,
    )


def _share_to_hold_out(rows: Sequence[Row]) -> tuple[float | None, int]:
    """Which share of ``rows`` to hold out, and how many rows that is; None where most of them would go with it."""
    wanted = min(max(HELD_OUT_SHARE * len(rows), LEAST_HELD_OUT), MOST_HELD_OUT, len(rows) / 4)
    share = max(round(wanted / len(rows), 4), 0.0001)
    try:
        _, held_out = split_off(
            rows, share
        )  # rows with one prompt stay together: only the split knows how many it takes
    except UserError:
        return None, 0
    return (share, len(held_out)) if 2 * len(held_out) <= len(rows) else (None, 0)


def _kind(row: Row) -> str:
    return "messages" if row.messages is not None and row.kind == "instruction" else row.kind


def held_out_beside(source: str) -> str | None:
    """The file of held-out rows beside ``train.jsonl`` or ``NAME_train.jsonl``, where there is one."""
    path = Path(source)
    if not path.is_file() or "train" not in path.name:
        return None
    beside = (path.with_name(path.name.replace("train", name)) for name in HELD_OUT_NAMES)
    found = next((file for file in beside if file.is_file()), None)
    if found is None:
        return None
    return f"./{found}" if source.startswith("./") and not found.is_absolute() else str(found)


def percentile(lengths: Sequence[int], share: float) -> int:
    """The length that ``share`` of the sorted ``lengths`` do not exceed."""
    return lengths[min(len(lengths) - 1, int(share * len(lengths)))]
