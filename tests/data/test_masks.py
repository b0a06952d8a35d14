"""Which tokens are learned: masks of real chat templates against hand-made tables, and every kind of row."""

from __future__ import annotations

import dataclasses
import random
import string

import pytest

from dts_hf.data.chat_templates import encode_prompt, end_of_turn, end_of_turn_ids, resolve_template
from dts_hf.data.encoding import encode_rows
from dts_hf.data.rows import Row
from dts_hf.errors import UserError
from tests.support.chats import FAMILIES, chat, chat_tokenizer, encoded_rows, marked, spaced_tokenizer
from tests.support.tiny import tiny_tokenizer

ONE = chat(("u", "Q1"), ("a", "A1"))
THREE = chat(("u", "Q1"), ("a", "A1"), ("u", "Q2"), ("a", "A2"), ("u", "Q3"), ("a", "A3"))
SYSTEM = chat(("s", "S"), ("u", "Q1"), ("a", "A1"))
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
USER, ASSISTANT = LLAMA.format("user"), LLAMA.format("assistant")
#: What training sees of each conversation, what is learned between « and »; None: the template refuses it.
TABLE: dict[str, tuple[str, str | None, str | None]] = {
    "chatml": (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»",
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>»\n"
        "<|im_start|>user\nQ3<|im_end|>\n<|im_start|>assistant\n«A3<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»",
    ),
    "smollm2": (
        SMOL + "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»",
        SMOL + "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>»\n"
        "<|im_start|>user\nQ3<|im_end|>\n<|im_start|>assistant\n«A3<|im_end|>»",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«A1<|im_end|>»",
    ),
    "llama3": (
        f"<|begin_of_text|>{USER}Q1<|eot_id|>{ASSISTANT}«A1<|eot_id|>»",
        f"<|begin_of_text|>{USER}Q1<|eot_id|>{ASSISTANT}«A1<|eot_id|>»{USER}Q2<|eot_id|>{ASSISTANT}«A2<|eot_id|>»"
        f"{USER}Q3<|eot_id|>{ASSISTANT}«A3<|eot_id|>»",
        f"<|begin_of_text|>{LLAMA.format('system')}S<|eot_id|>{USER}Q1<|eot_id|>{ASSISTANT}«A1<|eot_id|>»",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n«A1<end_of_turn>»",
        "<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n«A1<end_of_turn>»\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n«A2<end_of_turn>»\n"
        "<start_of_turn>user\nQ3<end_of_turn>\n<start_of_turn>model\n«A3<end_of_turn>»",
        None,
    ),
    "mistral": (
        "<s>[INST] Q1[/INST]« A1</s>»",
        "<s>[INST] Q1[/INST]« A1</s>»[INST] Q2[/INST]« A2</s>»[INST] Q3[/INST]« A3</s>»",
        # A finished conversation loses its system message there; generation sees it, so training does
        "<s>[INST] S\n\nQ1[/INST]«A1</s>»",
    ),
    "phi3": (
        "<|user|>\nQ1<|end|>\n<|assistant|>\n«A1<|end|>»",
        "<|user|>\nQ1<|end|>\n<|assistant|>\n«A1<|end|>»\n<|user|>\nQ2<|end|>\n<|assistant|>\n«A2<|end|>»\n"
        "<|user|>\nQ3<|end|>\n<|assistant|>\n«A3<|end|>»",
        "<|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n«A1<|end|>»",
    ),
    "phi4": (
        "<|im_start|>user<|im_sep|>Q1<|im_end|><|im_start|>assistant<|im_sep|>«A1<|im_end|>»",
        "<|im_start|>user<|im_sep|>Q1<|im_end|><|im_start|>assistant<|im_sep|>«A1<|im_end|>»"
        "<|im_start|>user<|im_sep|>Q2<|im_end|><|im_start|>assistant<|im_sep|>«A2<|im_end|>»"
        "<|im_start|>user<|im_sep|>Q3<|im_end|><|im_start|>assistant<|im_sep|>«A3<|im_end|>»",
        "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q1<|im_end|>"
        "<|im_start|>assistant<|im_sep|>«A1<|im_end|>»",
    ),
    "qwen3": (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nA1<|im_end|>»",
        None,  # its earlier turns lose their thoughts
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nA1<|im_end|>»",
    ),
    "zephyr": (
        "<|user|>\nQ1</s>\n<|assistant|>\n«A1</s>»",
        "<|user|>\nQ1</s>\n<|assistant|>\n«A1</s>»\n<|user|>\nQ2</s>\n<|assistant|>\n«A2</s>»\n"
        "<|user|>\nQ3</s>\n<|assistant|>\n«A3</s>»",
        "<|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\n«A1</s>»",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", TABLE)
def test_masks_of_real_templates_equal_the_table(family):
    for row, expected in zip((ONE, THREE, SYSTEM), TABLE[family], strict=True):
        if expected is None:
            with pytest.raises(UserError, match=r"row 'r': .*(refuses this conversation|renders earlier turns)"):
                marked(family, row)
        else:
            assert marked(family, row) == expected
    # The last turn alone is always sound, and what is read is the prompt that generation begins with
    tokenizer = chat_tokenizer(family)
    dataset = encoded_rows(family, THREE, train_on="last_turn")
    prompt = encode_prompt(THREE, tokenizer, resolve_template("auto", tokenizer), 1900)
    assert len(dataset.spans(0)) == 1 and dataset[0]["input_ids"][: dataset.prompt_lengths[0]] == prompt.ids
    assert tokenizer.decode(dataset[0]["input_ids"][dataset.prompt_lengths[0] :]).count("A3") == 1


@pytest.mark.parametrize(
    ("family", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "</s>"),
     ("phi3", "<|end|>"),
     ("phi4", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("zephyr", "</s>"), ("bare", "<|endoftext|>")],
)  # fmt: skip
def test_end_of_turn_is_the_templates_whatever_eos_is(family, end):
    tokenizer = chat_tokenizer(family)
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer, resolve_template("auto", tokenizer))) == [end]
    eos = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer, resolve_template("alpaca", tokenizer)))
    assert eos == [FAMILIES[family][2]]


WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
}
TOOLS = chat(("u", "Q1"), CALL, ("t", "sunny"), ("a", "A1"), tools=(WEATHER,))


def test_tool_calls_are_learned_and_what_tools_say_is_not():
    assert marked("mistral", TOOLS).split("[/AVAILABLE_TOOLS]")[1] == (
        '[INST] Q1[/INST]«[TOOL_CALLS] [{"name": "weather", "arguments": {}}]</s>»'
        '[TOOL_RESULTS] {"content": sunny}[/TOOL_RESULTS]« A1</s>»'
    )
    asked = chat(("u", "Q1"), CALL, tools=(WEATHER,))
    assert marked("qwen3", asked).split("</tools>")[1] == (
        "<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
        '«<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>»'
    )
    learned = marked("qwen3", TOOLS, train_on="last_turn").split("«")
    assert learned[1:] == ["<think>\n\n</think>\n\nA1<|im_end|>»"] and "sunny" in learned[0]


def test_qwen3_thinking():
    thought = {"role": "assistant", "content": "A1", "reasoning_content": "hm"}
    opening = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    assert marked("qwen3", chat(("u", "Q1"), thought)) == f"{opening}«<think>\nhm\n</think>\n\nA1<|im_end|>»"
    # Without thinking the empty thought is in the prompt of generation, and so in what training only reads
    off = chat(("u", "Q1"), ("a", "A1"), chat_template_kwargs={"enable_thinking": False})
    assert marked("qwen3", off) == f"{opening}<think>\n\n</think>\n\n«A1<|im_end|>»"
    # An earlier thought is gone once an answer follows; the message names the turn and the way out
    twice = chat(("u", "Q1"), thought, ("u", "Q2"), {**thought, "content": "A2"})
    with pytest.raises(
        UserError, match=r"row 'r'.*earlier turns differently: message 2 was .*think.*data.train_on: last_turn"
    ):
        marked("qwen3", twice)
    assert marked("qwen3", twice, train_on="last_turn") == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nhm\n</think>\n\nA2<|im_end|>»"
    )
    # Two steps of one turn keep their thoughts, and both are learned
    steps = chat(("u", "Q1"), {**CALL, "reasoning_content": "look"}, ("t", "sunny"), thought)
    assert marked("qwen3", steps).count("«<think>") == 2


def test_init_writes_what_the_template_allows(tmp_path):
    import json

    from dts_hf.starter.looking import TeacherLook, look_at_data

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [*THREE.conversation]}), encoding="utf-8")
    for family, sound in (("qwen3", False), ("chatml", True)):
        teacher = TeacherLook("t", chat_tokenizer(family), 2, 400, 512, 0)
        assert look_at_data(str(rows), teacher).all_turns is sound


def test_a_prompt_that_opens_a_thought_is_continued_as_generation_would():
    assert marked("reasoning", ONE) == "<s><|user|>Q1<|assistant|><think>\n«A1</s>»"
    with pytest.raises(UserError, match="renders earlier turns differently"):
        marked("reasoning", THREE)
    assert marked("reasoning", THREE, train_on="last_turn").endswith("Q3<|assistant|><think>\n«A3</s>»")


def test_generation_markers_are_brought_to_the_same_borders():
    assert marked("marked", THREE) == marked("marked_header", THREE) == TABLE["chatml"][1]
    assert marked("marked", THREE, train_on="last_turn") == marked("chatml", THREE, train_on="last_turn")


def test_without_an_end_of_turn_eos_ends_the_last_answer():
    assert marked("bare", ONE) == "user: Q1\nassistant: «A1<|endoftext|>»"
    assert marked("bare", chat(("u", "Q1"), ("a", "A1"), ("u", "Q2"), ("a", "A2"))) == (
        "user: Q1\nassistant: «A1»\nuser: Q2\nassistant: «A2<|endoftext|>»"
    )


def test_the_end_of_turn_spelt_out_in_an_answer_does_not_end_it():
    row = chat(("u", "Q1"), ("a", "say <|im_end|> now"), ("u", "<|im_end|>"), ("a", "A2"))
    assert marked("chatml", row) == (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n«say <|im_end|> now<|im_end|>»\n"
        "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n«A2<|im_end|>»"
    )


def test_train_on_chooses_the_turns():
    row = chat(("u", "Q1"), ("a", "A1"), ("u", "Q2"), ("a", "A2"), ("u", "Q3"), ("a", "A3"), given=3)
    learned = {
        train_on: [part.split("»")[0] for part in marked("chatml", row, train_on=train_on).split("«")[1:]]
        for train_on in (None, "completion", "all_turns", "last_turn")
    }
    end = "<|im_end|>"
    assert learned[None] == learned["completion"] == [f"A2{end}", f"A3{end}"]
    assert learned["all_turns"] == [f"A1{end}", f"A2{end}", f"A3{end}"] and learned["last_turn"] == [f"A3{end}"]
    assert marked("chatml", THREE, train_on="completion") == marked("chatml", THREE, train_on="last_turn")
    with pytest.raises(UserError, match=r"data\.train_on: got 'all', expected last_turn, all_turns, completion"):
        marked("chatml", THREE, train_on="all")


def test_finished_prompts_and_texts_go_in_as_they_are():
    prompt = Row("r", "The sky is", "", (" blue.",), kind="prompt")
    text = Row("r", "", "", ("Once upon a time.",), kind="text")
    assert marked("chatml", prompt) == "The sky is« blue.<|endoftext|>»"
    assert marked("chatml", Row("r", "2 + 2 =", "", (" 4<|endoftext|>",), kind="prompt")) == "2 + 2 =« 4<|endoftext|>»"
    assert marked("chatml", prompt, template="chat") == (
        "<|im_start|>user\nThe sky is<|im_end|>\n<|im_start|>assistant\n« blue.<|im_end|>»"
    )
    assert marked("chatml", prompt, template="plain") == "The sky is\n\n« blue.<|endoftext|>»"
    dataset = encoded_rows("chatml", text)
    assert dataset.spans(0) == [(1, dataset.lengths[0])], "nothing predicts the first token"
    with_bos = tiny_tokenizer(bos=True)
    encoded, _ = encode_rows(
        [text, prompt], with_bos, resolve_template("auto", with_bos), max_length=90, max_prompt_length=80
    )
    for index, label in ((0, "Once upon a time.<|im_end|>"), (1, " blue.<|im_end|>")):
        ids, start = encoded[index]["input_ids"], encoded.prompt_lengths[index]
        assert ids[0] == with_bos.bos_token_id and with_bos.decode(ids[start:]) == label
    auto = resolve_template("auto", with_bos)
    assert (
        encode_prompt(text, with_bos, auto, 50) is None
        and encode_prompt(prompt, with_bos, auto, 50).ids == ids[:start]
    )


def test_auto_is_the_chat_template_or_alpaca():
    assert resolve_template("auto", tiny_tokenizer()).name == "chat"
    assert resolve_template("auto", tiny_tokenizer(chat=False)).name == "alpaca"
    with pytest.raises(UserError, match=r"--template: got 'aut', expected one of auto, alpaca, chat, plain"):
        resolve_template("aut", tiny_tokenizer(), "--template")


def test_text_templates_refuse_what_they_would_lose():
    row = chat(("u", "Q1"), {"role": "assistant", "content": "A1", "reasoning_content": "hm"}, tools=(WEATHER,))
    with pytest.raises(UserError, match="row 'r': the template 'alpaca' has no place for reasoning_content, tools"):
        marked("chatml", row, template="alpaca")


@pytest.mark.parametrize("code", ["{{ 1 // 0 }}", "{% include 'x' %}", "{{ messages[0].nothing.more }}"])
def test_a_template_that_fails_in_any_way_is_named(code):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = code
    with pytest.raises(UserError, match="row 'r': the tokenizer's chat template refuses this conversation"):
        encode_rows([ONE], tokenizer, resolve_template("auto", tokenizer), max_length=90, max_prompt_length=80)


def test_long_conversations_are_dropped_or_cut_from_the_right():
    length = encoded_rows("chatml", THREE).lengths[0]
    with pytest.raises(UserError, match="no row left"):
        encoded_rows("chatml", THREE, max_length=length - 1, max_prompt_length=length - 2)
    cut = encoded_rows("chatml", THREE, max_length=length - 1, max_prompt_length=length - 2, long_rows="cut")
    assert len(cut.spans(0)) == 3 and cut.report.cut == 1 and cut.lengths == [length - 1]
    first = cut.spans(0)[0]
    one = encoded_rows("chatml", THREE, ONE, max_length=first[1], max_prompt_length=first[0], long_rows="cut")
    assert one.spans(0) == one.spans(1) == [first] and (one.report.kept, one.report.cut) == (2, 1)
    # Nothing that is learned is left
    with pytest.raises(UserError, match="no row left"):
        encoded_rows("chatml", THREE, max_length=first[0], max_prompt_length=first[0] - 1, long_rows="cut")
    # A prompt ends where the first learned token begins
    with pytest.raises(UserError, match="no row left"):
        encoded_rows("chatml", THREE, max_length=900, max_prompt_length=first[0] - 1)


def test_any_conversation_is_learned_exactly_where_the_assistant_speaks():
    draw = random.Random(0)
    words = ["<|im_end|>", "<|im_start|>assistant\n", " ", "\n", "ab", "A1", "«".encode().decode(), "é"]
    for family in ("chatml", "llama3", "phi4", "zephyr", "marked_header"):
        tokenizer = chat_tokenizer(family)
        end = tokenizer.decode(end_of_turn_ids(tokenizer, resolve_template("auto", tokenizer)))
        for _ in range(15):
            turns = [
                (role, "".join(draw.choices([*words, *string.ascii_letters], k=draw.randint(1, 6))) + "x")
                for _ in range(draw.randint(1, 3)) for role in "ua"
            ]  # fmt: skip
            dataset = encoded_rows(family, chat(*turns))
            ids = dataset[0]["input_ids"]
            learned = [tokenizer.decode(ids[start:stop]) for start, stop in dataset.spans(0)]
            said = [text.strip() if family == "llama3" else text for role, text in turns if role == "a"]
            assert learned == [text + end for text in said]


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("family", ["mistral", "zephyr", "chatml"])
def test_a_tokenizer_that_begins_texts_with_a_space_adds_none_inside(family, scheme):
    tokenizer = spaced_tokenizer(family, scheme)
    template = resolve_template("auto", tokenizer)
    talk = chat(("u", "the sky"), ("a", "is blue"), ("u", "the answer"), ("a", "blue"))
    prompt = Row("p", "the sky is", "", (" blue",), kind="prompt")
    dataset, _ = encode_rows([talk, prompt], tokenizer, template, max_length=200, max_prompt_length=150)
    ids = dataset[0]["input_ids"]
    text = str(tokenizer.apply_chat_template(list(talk.conversation), tokenize=False))
    assert tokenizer(text, add_special_tokens=False)["input_ids"][: len(ids)] == ids
    learned = [tokenizer.convert_ids_to_tokens(ids[start:stop]) for start, stop in dataset.spans(0)]
    end = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer, template))
    before = "▁" if family == "mistral" else ""
    assert ["".join(part) for part in learned] == [before + "is▁blue" + end[0], before + "blue" + end[0]]
    start = dataset.spans(0)[0][0]
    first = chat(("u", "the sky"), ("a", "is blue"))
    assert encode_prompt(first, tokenizer, template, 150).ids == ids[:start], (
        "generation begins with these very tokens"
    )
    start = dataset.spans(1)[0][0]
    tokens = tokenizer.convert_ids_to_tokens(dataset[1]["input_ids"])
    assert "".join(tokens[:start]) == "▁the▁sky▁is" and "".join(tokens[start:]) == "▁blue" + tokenizer.eos_token


def test_a_huge_row_is_not_tokenised_whole(monkeypatch):
    tokenizer, sizes = tiny_tokenizer(), []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__",
        lambda self, text=None, **options: sizes.extend(map(len, [text] if isinstance(text, str) else text))
        or call(self, text, **options),
    )  # fmt: skip
    huge = "ab " * 1_000_000
    rows = [Row("a", huge, "", ("x",)), Row("b", "Q", "", (huge,)), Row("c", "Q", huge, ("x",)), Row("d", "Q", "", ("x",)),
            Row("e", "", "", (huge,), kind="text")]  # fmt: skip
    limits = {"max_length": 60, "max_prompt_length": 40}
    dataset, report = encode_rows(rows, tokenizer, resolve_template("auto", tokenizer), **limits)
    assert dataset.row_ids == ["c", "d"] and (report.dropped, report.prompts_cut) == (3, 1)
    dataset, report = encode_rows(rows, tokenizer, resolve_template("auto", tokenizer), long_rows="cut", **limits)
    assert dataset.row_ids == ["b", "c", "d", "e"] and (report.dropped, report.cut) == (1, 2)
    assert max(sizes) < 2_000


@pytest.mark.parametrize("behind", ["", "\n", " \n\n"])
@pytest.mark.parametrize(
    "family", ["chatml", "smollm2", "llama3"]
)  # eos_token is another token in the first and the last
def test_an_end_that_the_response_spells_out_is_there_once(family: str, behind: str) -> None:
    tokenizer = chat_tokenizer(family)
    end = end_of_turn(tokenizer, resolve_template("auto", tokenizer))
    spelt = f"Plum.{end}{behind}"
    for row, template in (
        (Row("r", "Name a fruit.", "", (spelt,)), "auto"),
        (chat(("u", "Name a fruit."), ("a", spelt)), "auto"),
        (Row("r", "The fruit is", "", (spelt,), kind="prompt"), "auto"),
        (Row("r", "", "", (f"A fruit: {spelt}",), kind="text"), "auto"),
        (Row("r", "Name a fruit.", "", (f"Plum.{tokenizer.eos_token}{behind}",)), "alpaca"),
    ):
        shown = marked(family, row, template=template)
        last = tokenizer.eos_token if template == "alpaca" else end
        assert shown.count("»") == 1 and shown.partition("»")[0].endswith(f"Plum.{last}"), shown
        assert shown.partition("«")[2].count(last) == 1
        plain = dataclasses.replace(row, references=("Plum.",))
        if row.kind in ("instruction", "messages"):
            assert shown == marked(family, plain, template=template)
