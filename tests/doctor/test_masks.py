"""The coloured mask: a row of each kind, every learned stretch, plain marks where there are no colours."""

from __future__ import annotations

import io

from rich.console import Console

from dts_hf.data.chat_templates import end_of_turn_ids, resolve_template
from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.data.encoding import encode_rows
from dts_hf.data.rows import Row
from dts_hf.doctor.diagnosis import Check, Diagnosis
from dts_hf.doctor.masks import check_labels, picture
from dts_hf.doctor.report import screen
from dts_hf.doctor.tokens import check_template
from tests.support.chats import chat, chat_tokenizer

TOKENIZER = chat_tokenizer("chatml")  # its eos_token does not end a turn
TEMPLATE = resolve_template("auto", TOKENIZER)
ENDS = {*end_of_turn_ids(TOKENIZER, TEMPLATE), TOKENIZER.eos_token_id}
TALK = [
    Row(f"i{k}", "Name a fruit.", "", ("Plums.",)) for k in range(4)
] + [
    Row("talk", "Q2", "", ("A2",), chat(("u", "Q1"), ("a", "A1"), ("u", "Q2"), ("a", "A2")).messages, "messages"),
    Row("prompt", "The sky is", "", (" blue.",), kind="prompt"),
    Row("text", "", "", ("Once upon a time.",), kind="text"),
]  # fmt: skip


def looked_at(collator) -> tuple[Check, Diagnosis]:
    data, _ = encode_rows(TALK, TOKENIZER, TEMPLATE, max_length=200, max_prompt_length=150)
    check = Check("labels")
    check_labels(check, data, collator, ENDS)
    return check, Diagnosis("r.yaml", [check], picture(data, collator, TOKENIZER, ENDS, TALK))


def test_every_kind_is_shown_with_every_learned_stretch():
    for collator in (PaddedCollator(0), PackedCollator()):
        check, diagnosis = looked_at(collator)
        assert not check.problems and check.values["ends"] == check.values["learned_ends"] == 8
        rows = {row.id: row.segments for row in diagnosis.picture}
        assert {"talk", "prompt", "text"} <= set(rows) and any(name.startswith("i") for name in rows)
        kinds = [segment.kind for segment in rows["talk"] if segment.kind != "padding"]
        assert kinds == ["masked", "learned", "end", "masked", "learned", "end"]
        shown = io.StringIO()
        Console(file=shown, width=200).print(screen(diagnosis, colours=False))
        assert "assistant⏎«A1<|im_end|>»⏎<|im_start|>user⏎Q2" in shown.getvalue()
        assert "The sky is« blue.<|endoftext|>»" in shown.getvalue()
        coloured = io.StringIO()
        Console(file=coloured, width=200).print(screen(diagnosis))
        assert "«" not in coloured.getvalue() and "assistant⏎A1<|im_end|>⏎" in coloured.getvalue()


def test_wrong_labels_of_a_collator_are_found():
    def wrong(change):
        def collate(examples):
            batch = PaddedCollator(0)(examples)
            change(batch)
            return batch

        return {problem.code for problem in looked_at(collate)[0].problems}

    assert wrong(lambda b: b["labels"].masked_fill_(b["labels"] == TOKENIZER.eos_token_id, -100)) == {
        "end-token-masked"
    }
    assert wrong(lambda b: b["labels"].copy_(b["input_ids"])) == {"prompt-learned"}
    assert wrong(lambda b: b["labels"].masked_fill_(b["labels"] > 90, -100)) >= {"answer-masked"}


def test_a_row_that_ends_with_a_tool_call_is_looked_at():
    tokenizer = chat_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    row = chat(("u", "Q1"), {"role": "assistant", "content": "", "tool_calls": [call]})
    check = Check("template")
    check_template(
        check, resolve_template("auto", tokenizer), {"student": tokenizer, "teacher": tokenizer}, [row, row]
    )
    assert check.problems == []
