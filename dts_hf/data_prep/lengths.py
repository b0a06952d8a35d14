"""The protocol's length rules: how many tokens a prompt or a reference has, and which lengths stay."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dts_hf.data.chat_templates import get_template
from dts_hf.data.formats import parse_row
from dts_hf.errors import UserError

MAX_PROMPT_TOKENS = 256
# Reference bins of the protocol, in tokens of the first reference: the sets that are reported use the last one.
BINS: dict[str, tuple[int, int | None]] = {"0_2": (0, 2), "3_5": (3, 5), "6_10": (6, 10), "11_": (11, None)}
GPT2 = "openai-community/gpt2"
# SHA-256 of GPT-2's sorted vocabulary, as `Lengths.describe` computes it.
GPT2_VOCABULARY = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"

JsonObject = dict[str, Any]


class Lengths:
    """Token counts for the length rules; ``name`` ``none`` means that they are not applied.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer: Any = None
        if name == "none":
            return
        from transformers import AutoTokenizer

        try:
            # Only counted, never put into a model: no warning about a model's longest sequence.
            self.tokenizer = AutoTokenizer.from_pretrained(name, model_max_length=1 << 60)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--tokenizer: {name} cannot be loaded: {' '.join(str(error).split())[:200]}. Give a folder with GPT-2's"
                " vocab.json and merges.txt, or 'none' to leave the length rules out (the manifest will say so)"
            ) from None

    def __bool__(self) -> bool:
        return self.tokenizer is not None

    def of_texts(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, without special tokens."""
        if not texts:
            return []
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def of_prompts(self, rows: Sequence[JsonObject]) -> list[int]:
        """Number of tokens of each row's Alpaca prompt."""
        template = get_template("alpaca")
        checked = [parse_row(row, str(row["id"]), str(row["id"])) for row in rows]
        return self.of_texts([template.render(row, self.tokenizer) for row in checked])

    def describe(self) -> JsonObject | None:
        """For the manifest: name (a folder's last part), vocabulary, and whether it is GPT-2's."""
        if not self:
            return None
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        digest = hashlib.sha256(vocabulary.encode()).hexdigest()
        return {
            "name": Path(self.name).name if Path(self.name).exists() else self.name,
            "vocabulary_size": len(self.tokenizer),
            "vocabulary_sha256": digest,
            "is_gpt2": digest == GPT2_VOCABULARY,
        }
