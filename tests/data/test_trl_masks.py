"""The same rows through TRL's ``SFTTrainer``, where it is installed: equal tokens and labels, but for what is named here.

Better than TRL's, and so different:

- It learns what the template writes behind the end of turn (a line break, Phi-3's second end token): nothing generates it.
- Its markers are those of the template: SmolLM3's enclose the header, Qwen2.5's the line break of the header, which
  generation is given.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dts_hf.data.chat_templates import end_of_turn_ids, resolve_template
from dts_hf.data.encoding import encode_rows
from dts_hf.data.rows import Row
from dts_hf.loss.selection import IGNORE_INDEX
from tests.support.chats import chat, chat_tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TURNS = (("u", "Q1"), ("a", "A1"), ("u", "Q2"), ("a", "A2"))
IDENTITY = {"u": "user", "a": "assistant", "s": "system"}


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": IDENTITY[role], "content": text} for role, text in turns]


def theirs(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens and labels as ``SFTTrainer`` prepares them: assistants of ``messages``, completions of prompts, whole texts."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options = SFTConfig(
        "unused", use_cpu=True, report_to=[], bf16=False, max_length=None, assistant_only_loss="messages" in row
    )
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in row)
    arguments = (Dataset.from_list([row]), tokenizer, options, False, None, "train")
    prepared = SFTTrainer._prepare_dataset(trainer, *arguments)[0]
    return prepared["input_ids"], prepared["labels"]


def ours(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    template = resolve_template("auto", tokenizer)
    example = encode_rows([row], tokenizer, template, max_length=2000, max_prompt_length=1900)[0][0]
    return example["input_ids"], example["labels"]


def assert_equal_but_for_the_tail(
    tokenizer: Any, our: tuple[list[int], list[int]], their: tuple[list[int], list[int]]
) -> None:
    ids, labels = our
    assert their[0][: len(ids)] == ids
    ends = end_of_turn_ids(tokenizer, resolve_template("auto", tokenizer))
    line_breaks = [k for k in range(1, len(ids)) if ids[k - 1] in ends and not tokenizer.decode(ids[k]).strip()]
    kept = [IGNORE_INDEX if k in line_breaks else label for k, label in enumerate(their[1][: len(ids)])]
    assert kept[1:] == labels[1:]  # nothing predicts the first token of a row
    tail = their[0][len(ids) :]
    assert not tokenizer.decode(tail).replace(tokenizer.eos_token, "").strip()


@pytest.mark.parametrize(
    "family", ["chatml", "smollm2", "llama3", "gemma", "mistral", "phi3", "phi4", "qwen3", "zephyr"]
)
def test_conversational_prompt_and_completion(family):
    tokenizer = chat_tokenizer(family)
    for turns, given in ((TURNS[:2], 1), (TURNS, 3)):
        row = {"prompt": messages(*turns[:given]), "completion": messages(*turns[given:])}
        assert_equal_but_for_the_tail(tokenizer, ours(tokenizer, chat(*turns, given=given)), theirs(tokenizer, row))


def test_messages_under_generation_markers():
    tokenizer = chat_tokenizer("marked")
    for turns in (TURNS, (("s", "S"), *TURNS), TURNS[:2]):
        our, their = ours(tokenizer, chat(*turns)), theirs(tokenizer, {"messages": messages(*turns)})
        assert_equal_but_for_the_tail(tokenizer, our, their)
    header = chat_tokenizer("marked_header")
    ids, labels = theirs(header, {"messages": messages(*TURNS)})
    learned = header.decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX])
    assert "assistant" in learned, "TRL learns the header that generation is given"
    ids, labels = ours(header, chat(*TURNS))
    learned = header.decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX])
    assert learned == "A1<|im_end|>A2<|im_end|>"


def test_the_header_in_trls_qwen_template_is_only_read():
    import trl

    tokenizer = chat_tokenizer("chatml")
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / "qwen2_5.jinja").read_text(encoding="utf-8")
    rendered = ours(tokenizer, chat(*TURNS))
    tokenizer.chat_template = (folder / "qwen2_5_training.jinja").read_text(encoding="utf-8")
    assert ours(tokenizer, chat(*TURNS)) == rendered
    ids, labels = theirs(tokenizer, {"messages": messages(*TURNS)})
    assert ids[: len(rendered[0])] == rendered[0]
    more = [token for token, label, own in zip(ids, labels, rendered[1], strict=False) if label != own]
    assert tokenizer.decode(more) == "\n\n\n", "two headers and the line break between the turns"


def test_finished_prompts_and_texts():
    tokenizer = chat_tokenizer("chatml")
    row = Row("r", "The sky is", "", (" blue.",), kind="prompt")
    assert_equal_but_for_the_tail(
        tokenizer, ours(tokenizer, row), theirs(tokenizer, {"prompt": "The sky is", "completion": " blue."})
    )
    text = Row("r", "", "", ("Once upon a time.",), kind="text")
    assert_equal_but_for_the_tail(tokenizer, ours(tokenizer, text), theirs(tokenizer, {"text": "Once upon a time."}))


#: Real templates that TRL carries, each with one of its own that marks the assistant.
PAIRS = ["cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5"]


@pytest.mark.parametrize("name", PAIRS)
def test_incremental_rendering_finds_what_trls_markers_enclose(name):
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    family = {"llama3": "llama3", "gemma": "gemma", "gemma3": "gemma", "phi3": "phi3", "phi3_5": "phi3"}.get(
        name, "chatml"
    )
    tokenizer = chat_tokenizer(family)
    if name.startswith("cohere"):
        tokenizer.add_special_tokens(
            {"eos_token": "<|END_OF_TURN_TOKEN|>", "additional_special_tokens": ["<|END_RESPONSE|>"]}
        )
    tokenizer.chat_template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    our = ours(tokenizer, chat(*TURNS))
    tokenizer.chat_template = (folder / f"{name}_training.jinja").read_text(encoding="utf-8")
    assert_equal_but_for_the_tail(tokenizer, our, theirs(tokenizer, {"messages": messages(*TURNS)}))
