"""Every row format becomes a ``Row``, everything else is refused with what to do; ``data.columns``."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dts_hf.data.columns import FIELDS
from dts_hf.data.formats import PAIRS, PROMPTS, RESPONSES, parse_row
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_rows, rows_from_dataset
from dts_hf.errors import UserError
from dts_hf.recipe.schema import Source
from tests.support.tiny import tiny_tokenizer
from tests.support.trainers import trainer_for

DATA_PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def row(columns: dict[str, Any] | None = None, /, **obj: Any) -> Row:
    return parse_row(obj, "here", "d", columns)


Q, A = user("Hi"), assistant("Hello.")
SYSTEM = {"role": "system", "content": "Be brief."}
WEATHER = {"name": "weather", "description": "Tell it.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


# ------------------------------------------------------------------------------------------ one question, one response


@pytest.mark.parametrize("names", [(asked, responded) for asked in PROMPTS for responded in RESPONSES])
def test_a_question_and_a_response_whatever_their_names(names: tuple[str, str]) -> None:
    parsed = parse_row(dict(zip(names, ("Why?", "So."), strict=True)), "here", "d")
    kind = "prompt" if names == ("prompt", "completion") else "instruction"
    assert parsed == Row("d", "Why?", "", ("So.",), kind=kind)


def test_forms_of_known_data_sets() -> None:
    assert row(question="6 x 7?", answer="#### 42") == Row("d", "6 x 7?", "", ("#### 42",))  # GSM8K
    dolly = row(instruction="Add.", context="2 and 3", response="5", category="closed_qa")
    assert dolly == Row("d", "Add.", "2 and 3", ("5",))
    assert row(instruction="Add.", context="", response="5").input == ""
    alpaca = row(instruction="Add.", input="2 and 3", output="5", text="Below is an instruction ...")
    assert alpaca == Row("d", "Add.", "2 and 3", ("5",))
    orca = row(id="1", system_prompt="Be brief.", question="Hi", response="Hello.")
    assert (orca.kind, orca.messages, orca.references) == ("messages", (SYSTEM, Q), ("Hello.",))
    assert row(system_prompt="", question="Hi", response="Hello.") == Row("d", "Hi", "", ("Hello.",))
    minillm = row(instruction="Add.", prompt="Below is ...", input="", output="5", topic="maths")
    assert minillm == Row("d", "Add.", "", ("5",))
    metamath = row(type="x", query="6 x 7?", original_question="7 x 6?", response="42")
    assert metamath == Row("d", "6 x 7?", "", ("42",))
    assert row(problem="1 + 1", solution="It is 2.", answer="2", level=1) == Row("d", "1 + 1", "", ("It is 2.",))
    ultrachat = row(prompt="Hi", prompt_id="x", messages=[Q, A])
    assert ultrachat == Row("d", "Hi", "", ("Hello.",), (Q,), "messages")


def test_a_plain_prompt_and_its_completion() -> None:
    assert row(prompt="The sky is", completion=" blue.") == Row("d", "The sky is", "", (" blue.",), kind="prompt")
    assert row(prompt="The sky is", completion=[" blue.", " grey."]).references == (" blue.", " grey.")
    # TRL's unpaired preferences: half of the completions are bad ones
    with pytest.raises(UserError, match=r"here: field 'label': got false: this is a preference set"):
        row(prompt="The sky is", completion=" green.", label=False)
    for label in ("False", "true", "0", 0, 1, 0.0):  # as tables write them
        with pytest.raises(UserError, match=r"label': got .*preference set.* data\.columns: \{label: null\}$"):
            row(prompt="The sky is", completion=" green.", label=label)
    assert row({"label": None}, prompt="The sky is", completion=" blue.", label=0).references == (" blue.",)
    assert row(prompt="The sky is", completion=" blue.", label="weather").references == (" blue.",)


def test_text_is_learned_whole() -> None:
    assert row(text="Once upon a time.", url="x") == Row("d", "", "", ("Once upon a time.",), kind="text")
    with pytest.raises(UserError, match="field 'text' is empty"):
        row(text=" ")


def test_alpacas_system_and_history() -> None:
    parsed = row(
        instruction="And 3?", input="Briefly.", output=["Four.", "4"], system="Count.", history=[["And 1?", "Two."]]
    )
    assert parsed.kind == "messages" and parsed.instruction == "And 3?\n\nBriefly." and parsed.input == ""
    assert [*parsed.messages] == [  # type: ignore[misc]
        {"role": "system", "content": "Count."}, user("And 1?"), assistant("Two."), user("And 3?\n\nBriefly."),
    ]  # fmt: skip
    assert parsed.references == ("Four.", "4") and parsed.answer is None
    assert row(instruction="a", output="b", history=[]) == row(instruction="a", output="b", history=None)
    assert row(instruction="a", output="b", history=json.dumps([["c", "d"]])).messages[0] == user("c")  # type: ignore[index]
    with pytest.raises(UserError, match=r"field 'history', turn 1: got 1 texts, expected \[question, answer\]"):
        row(instruction="a", output="b", history=[["c"]])


def test_tools_beside_an_instruction_make_a_conversation() -> None:
    parsed = row(instruction="Rain?", output="No.", tools=[TOOL])
    assert (parsed.kind, parsed.messages, parsed.tools) == ("messages", (user("Rain?"),), (TOOL,))


def test_thoughts_beside_a_response_are_part_of_the_answer() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        parsed = parse_row({"question": "6 x 7?", "input": "x", "answer": "42", name: "6 x 7 = 42."}, "here", "d")
        assert parsed.kind == "messages" and parsed.messages == (user("6 x 7?\n\nx"),)
        assert parsed.answer == assistant("42", reasoning_content="6 x 7 = 42.")
        assert (parsed.instruction, parsed.input) == ("6 x 7?\n\nx", "")
    talk = row(messages=[Q, A], reasoning="Be nice.")
    assert talk.answer == assistant("Hello.", reasoning_content="Be nice.")
    with pytest.raises(UserError, match=r"field 'reasoning_content': the last message has other thoughts"):
        row(messages=[Q, assistant("x", reasoning_content="y")], reasoning_content="z")


# ------------------------------------------------------------------------------------------ conversations


def test_several_turns_and_what_templates_know() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        user("Rain in Rome?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "dry", "name": "weather", "tool_call_id": "1"},
        assistant("No.", reasoning_content="It is dry."),
    ]
    parsed = row(messages=messages, tools=[TOOL], chat_template_kwargs={"enable_thinking": True})
    assert parsed.kind == "messages" and parsed.instruction == "Rain in Rome?" and parsed.references == ("No.",)
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}  # templates print a None
    assert parsed.messages == (messages[0], messages[1], called, messages[3])
    assert parsed.answer == messages[4] and parsed.conversation == (*parsed.messages, messages[4])
    assert parsed.tools == (TOOL,) and parsed.chat_template_kwargs == {"enable_thinking": True}
    # Nobody needs a message for an answer that is nothing but its text
    assert row(messages=[Q, A]).answer is None


def test_the_response_may_be_a_call() -> None:
    parsed = row(messages=[Q, {"role": "assistant", "tool_calls": [CALL]}])
    assert parsed.references == ("",) and parsed.answer == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_calls_in_other_forms() -> None:
    def call(given: Any) -> Any:
        return row(messages=[Q, {"role": "assistant", "content": None, "tool_calls": given}]).answer["tool_calls"]  # type: ignore[index]

    as_text = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    assert call([as_text]) == [{**CALL, "id": "1"}]  # OpenAI: a template would write the arguments in quotes
    assert call([{"name": "weather", "arguments": {"city": "Rome"}}]) == [CALL]
    assert call(json.dumps([CALL])) == [CALL]
    assert call([{"function": {"name": "now"}}]) == [
        {"type": "function", "function": {"name": "now", "arguments": {}}}
    ]
    # A table fills up with null what another row's call has; JSON has null where somebody wrote it.
    filled = {"function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}, "id": None}
    assert call([filled]) == [CALL]
    written = {"function": {"name": "weather", "arguments": '{"city": "Rome", "unit": null}'}}
    assert call([written])[0]["function"]["arguments"] == {"city": "Rome", "unit": None}


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there", "image": None}, "!"]
    assert row(messages=[user(parts), A]).instruction == "Hi there!"
    for part in ("image", "image_url", "video", "input_audio"):
        with pytest.raises(
            UserError, match=rf"message 1: content, part 2: got type '{part}', but only text is learned"
        ):
            row(messages=[user([{"type": "text", "text": "a"}, {"type": part}]), A])
    with pytest.raises(UserError, match="part 1: got type 'thinking', expected 'text'"):
        row(messages=[Q, assistant([{"type": "thinking", "thinking": "x"}])])


def test_tools_in_other_forms() -> None:
    def tools(given: Any) -> Any:
        return row(messages=[Q, A], tools=given).tools

    assert tools([TOOL]) == tools(json.dumps([TOOL])) == (TOOL,)
    assert tools([WEATHER]) == tools(json.dumps([WEATHER])) == (TOOL,)  # LLaMA-Factory's
    assert tools(None) is tools([]) is tools("") is tools("[]") is None
    filled = {"type": "function", "function": {**WEATHER, "strict": None}}
    assert tools([filled]) == (TOOL,)


def test_nothing_of_a_conversation_is_null() -> None:
    """A data set fills messages up with the keys of others."""
    parsed = row(messages=[{**Q, "tool_calls": None, "name": None}, {**A, "tool_calls": [], "weight": 1}])
    assert parsed == row(messages=[Q, A])
    # Axolotl's, where nothing is learned in any case
    assert row(messages=[{**Q, "training": False}, {**A, "training": True}]) == row(messages=[Q, A])


def test_conversational_prompts_and_completions() -> None:
    parsed = row(prompt=[SYSTEM, Q], completion=[A])
    assert parsed == Row("d", "Hi", "", ("Hello.",), (SYSTEM, Q), "messages", given=2)
    assert row(prompt=[SYSTEM, Q], completion="Hello.") == parsed
    assert row(prompt=[Q], completion=["Hello.", "Hi."]).references == ("Hello.", "Hi.")
    several = row(prompt=[Q], completion=[assistant("One."), user("More."), assistant("Two.")])
    assert several.given == 1 and several.response == "Two." and several.instruction == "More."
    assert several.messages == (Q, assistant("One."), user("More."))
    with_system = row(prompt=[Q], completion=[A], system="Be brief.", tools=[TOOL])
    assert with_system.given == 2 and with_system.messages == (SYSTEM, Q) and with_system.tools == (TOOL,)
    with pytest.raises(UserError, match=r"field 'completion': the last message has the role 'user', expected 'assist"):
        row(prompt=[Q], completion=[A, Q])
    with pytest.raises(UserError, match=r"field 'prompt': got a string, expected messages as in 'completion'"):
        row(prompt="Hi", completion=[A])


def test_sharegpt() -> None:
    talk = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"from": "observation", "value": "dry"},
        {"from": "gpt", "value": "No."},
    ]
    expected = (
        SYSTEM,
        user("Rain?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "dry"},
    )
    parsed = row(conversations=talk, tools=json.dumps([WEATHER]))
    assert parsed == Row("d", "Rain?", "", ("No.",), expected, "messages", tools=(TOOL,))
    assert row(conversations=talk[1:], system="Be brief.").messages == expected
    assert row(conversations=talk, system="Be brief.").messages == expected
    with pytest.raises(UserError, match="field 'system': the conversation begins with another system prompt"):
        row(conversations=talk, system="Be long.")
    assert row(messages=talk).messages == expected  # from and value under another name
    assert row(conversations=json.dumps(talk)).messages == expected
    # role and content, with our names or with theirs
    assert (
        row(conversations=[Q, A]) == row(conversations=[{"role": "human", "content": "Hi"}, A]) == row(messages=[Q, A])
    )


def test_a_list_may_be_written_as_json() -> None:
    """A cell of a CSV file is always text."""
    kwargs = {"chat_template_kwargs": '{"enable_thinking": false}'}
    parsed = row(messages=json.dumps([Q, A]), **kwargs)
    assert parsed.messages == (Q,) and parsed.chat_template_kwargs == {"enable_thinking": False}


# ------------------------------------------------------------------------------------------ docs/data.md


EXAMPLES = re.findall(r"^\| `(\{.*?\})` \| (\w+) \|", DATA_PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_examples_of_the_documentation() -> None:
    page = DATA_PAGE.read_text(encoding="utf-8")
    assert len(EXAMPLES) == 7
    for example, kind in EXAMPLES:
        assert parse_row(json.loads(example), "here", "d").kind == kind
    described = {
        name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`([\w.]+)`", line)
    }
    assert {"context", "system", "system_prompt", "history", "tools", "reasoning", "chat_template_kwargs"} <= described
    assert all(f"`{name}`" in page for name in (*PROMPTS, *RESPONSES))
    sources = yaml.safe_load(page.partition("## A mixture\n\n```yaml\n")[2].partition("```")[0])["data"]["train"]
    assert [Source(**one) for one in sources[1:]][1].columns == {"instruction": "ask", "output": "said"}


def test_what_is_learned_of_them(tmp_path: Path) -> None:
    """All of them together, through the trainer: what goes in around the text, and the targets."""
    trainer = trainer_for(tmp_path, rows=[json.loads(example) for example, _ in EXAMPLES], prompt_template="auto")
    tokenizer, found = tiny_tokenizer(), []
    for row in trainer.train_dataset:
        labels = [label for label in row["labels"] if label >= 0]
        before = row["input_ids"][: len(row["labels"]) - len(labels)]
        found.append((tokenizer.decode(before), tokenizer.decode(labels, skip_special_tokens=True).strip()))
    questions = ["2 and 3", "6 x 7?", "The sky is", "Hi", "Hi", "Hi", ""]
    # Nothing foretells the first token of a text: this tokenizer writes none before it.
    assert [answer for _, answer in found] == ["5", "42", "blue.", "Hello.", "Hello.", "Hello.", "nce upon a time."]
    assert all(question in before for question, (before, _) in zip(questions, found, strict=True))
    assert (found[2][0], found[6][0]) == ("The sky is", "O")  # as they are, without a template
    assert trainer.train().global_step == 1


# ------------------------------------------------------------------------------------------ refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "chosen": ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"preference set .*data\.columns: \{completion: chosen\}$"),
    "chosen of an instruction": ({"instruction": "a", "chosen": "b", "rejected": "c"}, r"\{output: chosen\}$"),
    "chosen of a question": ({"question": "a", "chosen": "b", "rejected": "c"}, r"\{answer: chosen\}$"),
    "chosen conversations": ({"chosen": [Q, A], "rejected": [Q, A]}, r"\{messages: chosen\}$"),
    "chosen beside a conversation": (
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}},
        "Append the chosen response to the conversation",
    ),
    "images": ({"messages": [Q, A], "images": [1]}, r"field 'images': this row has images.*\{images: null\}"),
    "image": ({"text": "a", "image": {"bytes": b""}}, r"field 'images' \(column 'image'\): this row has images"),
    "videos": ({"prompt": "a", "completion": "b", "video": "x.mp4"}, r"field 'videos' \(column 'video'\)"),
    "audio": ({"instruction": "a", "output": "b", "audio": {"path": "x"}}, r"field 'audio': this row has audio"),
    "two pairs": (
        {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
        r"'question', 'prompt' for the prompt and 'answer', 'completion' for the response.*\{question: question, answer:",
    ),
    "two responses": ({"prompt": "a", "answer": "b", "response": "c"}, r"found the columns 'prompt' for the prompt and"),
    "no response": ({"prompt": "a", "gold": "b"}, r"field 'completion' is missing, the response.*\{completion: gold\}"),
    "no prompt": ({"completion": "a"}, r"field 'prompt' is missing, the prompt; found the columns 'completion', expected"),
    "nothing": ({"ask": "a", "reply": "b"}, r"no row format is whole; found the columns 'ask', 'reply', expected \{instr"),
    "nothing at all": ({}, r"found the columns none"),
    "misspelt messages": ({"mesages": [Q, A]}, r"Did you mean 'messages'\?"),
    "misspelt conversation": ({"conversation": [Q, A]}, r"Did you mean 'conversations'\?"),
    "capitals": ({"Question": "a", "Response": "b"}, r"Did you mean 'question'\?.*data\.columns"),
    "system of a finished prompt": (
        {"prompt": "a", "completion": "b", "system": "c"},
        r"field 'system': a finished prompt is continued as.*\{instruction: prompt, output: completion\}.*\{system:",
    ),
    "tools of a finished prompt": ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "field 'tools': a finished prompt"),
    "context of a finished prompt": (
        {"prompt": "a", "completion": "b", "context": "c"},
        r"field 'input' \(column 'context'\): a finished prompt",
    ),
    "context that is no text": (
        {"question": "a", "answer": "b", "context": {"title": ["c"]}},
        r"field 'input' \(column 'context'\) \(data\.columns: \{input: null\} leaves it out\): got an object",
    ),
    "role": ({"messages": [{"role": "function", "content": "x"}, A]}, r"role: got 'function'.*Did you mean 'tool'\?"),
    "gemma": ({"messages": [Q, {"role": "model", "content": "x"}]}, r"message 2: role: got 'model'.*'assistant'\?"),
    "speaker": ({"conversations": [{"from": "humn", "value": "x"}]}, r"message 1: from: got 'humn'.*Did you mean 'human'\?"),
    "speaker list": ({"conversations": [{"from": ["x"], "value": "x"}]}, r"from: got \['x'\], expected one of human"),
    "no value": ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "message 1: value: got null"),
    "call that is no JSON": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "weather()"}]},
        "message 2: value of a function_call: broken JSON: Expecting value at character 1",
    ),
    "ends with the human": (
        {"conversations": [{"from": k, "value": "x"} for k in ("human", "gpt", "human")]},
        "field 'conversations': the last message has the role 'user', expected 'assistant'.*Leave out what is behind",
    ),
    "ends with a tool": ({"messages": [Q, {"role": "tool", "content": "x"}]}, "the last message has the role 'tool'"),
    "empty turn": ({"messages": [Q, assistant(""), Q, A]}, "message 2: content is empty"),
    "weight": ({"messages": [Q, assistant("x", weight=0), Q, A]}, r"message 2: weight: got 0.*data\.train_on: last_turn"),
    "train": ({"messages": [Q, assistant("x", train=False), Q, A]}, "message 2: train: got False"),
    "loss": ({"messages": [Q, assistant("x", loss=False), Q, A]}, "message 2: loss: got False.*leave the key out"),
    "training": ({"messages": [Q, assistant("x", training=False), Q, A]}, "message 2: training: got False"),
    "text with tools": ({"text": "a", "tools": [TOOL]}, r"field 'tools': a text .*Write it into .*\{tools: null\}$"),
    "text with a system prompt": ({"text": "a", "system": "Be brief."}, "field 'system': a text is learned as it stands"),
    "function_call": ({"messages": [Q, {"role": "assistant", "function_call": {}}]}, "function_call: expected tool_calls"),
    "arguments": (
        {"messages": [Q, assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{"}}])]},
        "tool_calls, call 1: arguments: broken JSON",
    ),
    "argument list": (
        {"messages": [Q, assistant(None, tool_calls=[{"function": {"name": "f", "arguments": [1]}}])]},
        "call 1: arguments: got a list, expected an object, or one as JSON",
    ),
    "nameless call": ({"messages": [Q, assistant(None, tool_calls=[{"id": "x"}])]}, "call 1: name: got null"),
    "calls": ({"messages": [Q, assistant(None, tool_calls="f()")]}, "tool_calls: got a string, expected a list of"),
    "tools": ({"messages": [Q, A], "tools": "weather"}, r"field 'tools': got a string, expected a list of tools"),
    "tools as broken JSON": ({"messages": [Q, A], "tools": "[{"}, "field 'tools': broken JSON"),
    "a tool": ({"messages": [Q, A], "tools": ["weather"]}, "field 'tools', tool 1: broken JSON"),
    "a function": ({"messages": [Q, A], "tools": [print]}, r"tool 1: got a function.*get_json_schema"),
    "kwargs": ({"messages": [Q, A], "chat_template_kwargs": [1]}, "field 'chat_template_kwargs': got a list, expected a m"),
    "thoughts": ({"messages": [Q, assistant("x", reasoning_content=3)]}, "reasoning_content: got the int 3"),
    "system": ({"messages": [Q, A], "system": 3}, "field 'system': got the int 3, expected a string"),
    "surrogate in a tool": ({"messages": [Q, A], "tools": '[{"name": "\\ud800"}]'}, "field 'tools', tool 1 holds half of a"),
    "surrogate in a key": ({"messages": [{**Q, "\ud800": 1}, A]}, "message 1 holds half of a surrogate pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    obj, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        parse_row(obj, "f.jsonl: line 3", "d")
    assert str(caught.value).startswith("f.jsonl: line 3: ")


def test_a_chosen_response_is_trained_on_when_it_is_named() -> None:
    preferences = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert row({"completion": "chosen"}, **preferences) == Row("d", "a", "", ("b",), kind="prompt")
    talks = {"chosen": [Q, A], "rejected": [Q, assistant("No.")]}
    assert row({"messages": "chosen"}, **talks) == row(messages=[Q, A])
    # The hint is right for every name of a prompt
    for asked in PROMPTS:
        obj = {asked: "a", "chosen": "b", "rejected": "c"}
        with pytest.raises(UserError) as caught:
            parse_row(obj, "here", "d")
        ours = str(caught.value).rpartition("{")[2].partition(":")[0]
        assert parse_row(obj, "here", "d", {ours: "chosen"}).response == "b"


# ------------------------------------------------------------------------------------------ data.columns


def test_columns_of_other_names() -> None:
    gold = row({"prompt": "question_text", "completion": "gold"}, question_text="a", gold="b", prompt="c", output="d")
    assert gold == Row("d", "a", "", ("b",), kind="prompt")
    assert row({"instruction": "ask", "output": "say", "id": "key"}, ask="a", say="b", key=5).id == "5"
    squad = {"question": "a", "context": "b", "answers": {"text": ["c", "d"], "start": [1, 2]}}
    assert row({"answer": "answers.text.0"}, **squad) == Row("d", "a", "b", ("c",))
    assert row({"output": "answers.text"}, **squad).references == ("c", "d")
    assert row({"answer": "a.b"}, question="a", **{"a.b": "c"}).response == "c"  # a name with a dot in it
    assert row({"messages": "dialogue"}, dialogue=[Q, A]) == row(messages=[Q, A])
    # What is named counts before what is there by itself
    both = {"messages": [Q, A], "question": "a", "answer": "b", "text": "c"}
    assert row({"question": "question", "answer": "answer"}, **both).response == "b"
    assert row({"text": "text"}, **both).kind == "text"
    four = {"prompt": "a", "completion": "b", "question": "c", "answer": "d"}
    assert row({"prompt": "prompt", "completion": "completion"}, **four) == row(prompt="a", completion="b")
    assert row({"question": "question", "answer": "answer"}, **four) == row(question="c", answer="d")


def test_null_leaves_a_column_out() -> None:
    assert row({"images": None}, messages=[Q, A], images=[1]) == row(messages=[Q, A])
    assert row({"images": None}, messages=[Q, A], image=1) == row(messages=[Q, A])
    assert row({"input": None}, question="a", context={"x": 1}, answer="b") == Row("d", "a", "", ("b",))
    assert row({"id": None}, id="x", question="a", answer="b").id == "d"
    assert row({"reasoning_content": None}, question="a", reasoning="x", answer="b").kind == "instruction"
    assert row({"messages": None}, messages=[Q, A], question="a", answer="b").response == "b"


def test_wrong_columns_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"data\.columns: 'promt' is no field of ours.*Did you mean 'prompt'\?"):
        row({"promt": "x"}, x="a", completion="b")
    with pytest.raises(
        UserError,
        match=r"^here: there is no column 'gould', which data\.columns names for 'output'; found the columns 'instr",
    ) as caught:
        row({"output": "gould"}, instruction="a", gold="b")
    assert str(caught.value).endswith("Did you mean 'gold'?")
    with pytest.raises(UserError, match=r"there is no column 'answers\.text\.7'"):
        row({"output": "answers.text.7"}, instruction="a", answers={"text": ["b"]})
    with pytest.raises(UserError, match=r"field 'output' \(column 'gold'\): got the int 5, expected a string"):
        row({"output": "gold"}, instruction="a", gold=5)


def test_every_field_of_a_format_has_a_name_and_a_description() -> None:
    assert {*PROMPTS, *RESPONSES, "messages", "conversations", "text", "tools"} <= FIELDS.keys()
    assert {*PROMPTS} == {asked for asked, _ in PAIRS} and {*RESPONSES} == {responded for _, responded in PAIRS}


def test_rows_of_a_data_set_in_memory() -> None:
    import datasets

    rows = [
        {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": None},
        {"messages": [Q, A], "tools": json.dumps([TOOL])},
    ]
    read = rows_from_dataset(datasets.Dataset.from_list(rows), "train_dataset")
    assert read == [parse_row(obj, "", f"train_dataset-{k}") for k, obj in enumerate(rows, 1)]
    asked = datasets.Dataset.from_list([{"ask": "a", "gold": "b"}])
    assert rows_from_dataset(asked, columns={"question": "ask", "answer": "gold"})[0].response == "b"
    with pytest.raises(UserError, match=r"train_dataset: row 1: there is no column 'asked'"):
        rows_from_dataset(asked, "train_dataset", {"question": "asked"})


def test_rows_of_pandas() -> None:
    """pandas has NaN where there is nothing, and arrays for lists."""
    import numpy as np

    talk = np.array([Q, A], dtype=object)
    assert row(messages=talk, tools=float("nan")) == row(messages=[Q, A])
    assert row(instruction="a", input=float("nan"), output=np.array(["b", "c"])).references == ("b", "c")
    assert row(id=np.int64(3), instruction=np.str_("a"), output="b").id == "3"


# ------------------------------------------------------------------------------------------ real rows


@pytest.mark.shared_data
def test_real_rows_in_every_form(shared_data_dir: Path, tmp_path: Path) -> None:
    """Dolly's rows, and the same ones as other people would have them."""
    plain = load_rows(shared_data_dir / "dolly" / "valid.jsonl", limit=200)
    talks = [
        {"id": row.id, "conversations": [{"from": "human", "value": row.prompt_messages[0]["content"]},
                                         {"from": "gpt", "value": row.response}]}
        for row in plain
    ]  # fmt: skip
    (tmp_path / "talks.json").write_text(json.dumps(talks), encoding="utf-8")
    read = load_rows(tmp_path / "talks.json")
    assert [row.conversation for row in read] == [row.conversation for row in plain]
    assert all(len(row.references) == 1 and row.kind == "messages" for row in read)
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "instruction", "context", "response"])
        writer.writerows([row.id, row.instruction, row.input, row.response] for row in plain)
    assert load_rows(tmp_path / "rows.csv") == [replace(row, references=row.references[:1]) for row in plain]
