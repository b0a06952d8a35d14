"""Answers to held-out instructions: scores, predictions and the fingerprint of the protocol."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

from dts_hf.data.chat_templates import encode_prompt, end_of_turn_ids, get_template, resolve_template
from dts_hf.data.encoding import encode_rows
from dts_hf.data.rows import Row
from dts_hf.errors import UserError
from dts_hf.evaluation.fingerprint import rows_digest
from dts_hf.evaluation.instruct import MEASURES, evaluate_instruct, generation_settings
from dts_hf.evaluation.protocol import Protocol, custom_protocol
from dts_hf.evaluation.references import note_on_references
from dts_hf.evaluation.text_metrics import best_rouge_l, exact_match, without_thoughts
from dts_hf.generation.engine import Generated, generate
from dts_hf.generation.shares import decode_answer, rows_are_independent, share_out
from dts_hf.training.generated import decoded, padded
from tests.support.chats import chat, chat_tokenizer
from tests.support.tiny import tiny_llama, tiny_tokenizer

TEMPLATE = get_template("alpaca")
GREEDY = custom_protocol(max_new_tokens=12, do_sample=False, no_repeat_ngram_size=0, seeds=[10, 20])
SAMPLED = custom_protocol(max_new_tokens=12, no_repeat_ngram_size=0, seeds=[10, 20, 30])
ROWS = [
    Row("q-1", "Name three fruits.", "", ("Apples, pears and plums.", "Three fruits")),
    Row("q-2", "Write the sentence in the past tense.", "The boat sails over the lake.", ("The boat sailed.",)),
    Row("q-3", "How many legs do two horses have?", "", ("Eight.",)),
]


def evaluate(rows: list[Row] = ROWS, protocol: Protocol = GREEDY, **options: object):
    options = {"batch_size": 4, "set_name": "held-out", **options}
    return evaluate_instruct(tiny_llama(tie=False), tiny_tokenizer(), rows, protocol, **options)


def test_greedy_scores_and_predictions() -> None:
    scores, predictions = evaluate()
    assert scores["n"] == 3 and scores["dropped"] == 0 and scores["prompts_cut"] == 0
    assert scores["seeds"] == [], "nothing is drawn"
    assert set(scores) == {"n", "dropped", "prompts_cut", "rows_sha256", "seeds", *MEASURES}
    assert [row["id"] for row in predictions] == ["q-1", "q-2", "q-3"]
    model, tokenizer = tiny_llama(tie=False), tiny_tokenizer()
    for row, predicted in zip(ROWS, predictions, strict=True):
        ids = encode_prompt(row, tokenizer, TEMPLATE, 256).ids
        answer = generate(model, [ids], generation_settings(GREEDY, 4), eos_token_ids=[2], pad_token_id=2)[0]
        text = decode_answer(tokenizer, answer.tokens)
        words = text.lower().split()
        pairs = list(itertools.pairwise(words))
        assert predicted == {
            "id": row.id,
            "set": "held-out",
            "seed": 10,
            "prompt": TEMPLATE.render(row, tokenizer),
            "instruction": row.instruction,
            "input": row.input,
            "prediction": text,
            "references": list(row.references),
            "rougeL": best_rouge_l(text, row.references),
            "tokens": len(answer.tokens),
            "finished": answer.finished,
            "distinct_1": len(set(words)) / len(words) if words else None,
            "distinct_2": len(set(pairs)) / len(pairs) if pairs else None,
        }
    said = [row["prediction"].lower().split() for row in predictions]
    every_word = [word for words in said for word in words]
    assert scores["distinct_1"]["mean"] == pytest.approx(len(set(every_word)) / len(every_word))
    mean = statistics.fmean(row["rougeL"] for row in predictions)
    assert scores["rougeL"] == {"mean": pytest.approx(mean), "sd": None, "per_seed": [pytest.approx(mean)]}
    assert scores["mean_tokens"]["mean"] == pytest.approx(statistics.fmean(row["tokens"] for row in predictions))
    assert scores["cut_at_limit"]["mean"] == pytest.approx(sum(not row["finished"] for row in predictions) / 3)
    json.dumps([scores, predictions], allow_nan=False)


def test_each_seed_is_a_run_of_sampling_that_rows_and_batches_do_not_change() -> None:
    scores, predictions = evaluate(protocol=SAMPLED, batch_size=2)
    assert scores["seeds"] == [10, 20, 30] == sorted({row["seed"] for row in predictions})
    assert len(predictions) == 9 and len(scores["rougeL"]["per_seed"]) == 3
    assert scores["mean_tokens"]["sd"] == pytest.approx(statistics.stdev(scores["mean_tokens"]["per_seed"]))
    _, alone = evaluate(rows=ROWS[2:], protocol=SAMPLED.changed(seeds=[20]))
    assert alone[0] == next(row for row in predictions if row["id"] == "q-3" and row["seed"] == 20)


def test_prompts_that_are_cut_or_do_not_fit_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    limit = len(encode_prompt(ROWS[1], tokenizer, TEMPLATE, 256).ids) - 3
    rows = [*ROWS, Row("q-4", "Explain this. " * 60, "", ("No.",))]
    scores, predictions = evaluate(rows=rows, protocol=GREEDY.changed(max_prompt_length=limit))
    assert (scores["n"], scores["dropped"], scores["prompts_cut"]) == (3, 1, 1)
    cut = predictions[1]["prompt"]
    assert cut.endswith("### Response:\n") and len(cut) < len(TEMPLATE.render(ROWS[1], tokenizer))
    assert predictions[1]["input"] == ROWS[1].input
    with pytest.raises(UserError, match=r"none of the 1 prompts fits .* max_prompt_length of 5 tokens"):
        evaluate(rows=ROWS[:1], protocol=GREEDY.changed(max_prompt_length=5))
    with pytest.raises(UserError, match="'held-out': no rows"):
        evaluate(rows=[])
    with pytest.raises(UserError, match="2 rows have the id 'q-1'"):
        evaluate(rows=[ROWS[0], *ROWS])
    with pytest.raises(UserError, match=r"the prompt of row 'q-1' has .* max_new_tokens=12 .* 20 positions"):
        evaluate_instruct(tiny_llama(max_positions=20), tokenizer, ROWS, GREEDY)


def test_an_answer_holds_no_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("\n Eight legs. <|im_end|>", add_special_tokens=False)["input_ids"]
    assert decode_answer(tokenizer, tokens) == "Eight legs."
    assert decode_answer(tokenizer, []) == ""
    spelt = tokenizer("<n>One<n> two.<n><|endoftext|> More", add_special_tokens=False)["input_ids"]
    assert decode_answer(tokenizer, spelt) == "One\n two.\n More", "a special token is dropped, as is the last <n>"


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("independent", [True, False])
def test_every_row_is_answered_by_one_process_and_below_fp32_in_the_same_blocks(independent: bool, world: int) -> None:
    lengths = [(7 * i) % 31 for i in range(50)]
    shares = [share_out(lengths, independent, 3, rank, world) for rank in range(world)]
    assert sorted(row for share in shares for block, _ in share for row in block) == list(range(50))
    assert len({len(share) for share in shares}) == 1, "a sharded model is called equally often by all"
    if not independent:
        alone = {tuple(block) for block, whole in share_out(lengths, False, 3, 0, 1)}
        assert {tuple(block) for share in shares for block, whole in share if block} == alone
        assert all(whole for share in shares for _, whole in share)


def test_only_fp32rows_are_independent_of_their_neighbours() -> None:
    assert rows_are_independent(tiny_llama()) and rows_are_independent(object())
    assert not rows_are_independent(tiny_llama().to(torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not rows_are_independent(tiny_llama())
    AcceleratorState._reset_state()  # another test of this process may have made it
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.unwrap_model(accelerator.prepare(tiny_llama()))
    AcceleratorState._reset_state()
    assert not rows_are_independent(wrapped), "its forward runs under autocast"


def test_the_digest_of_rows_follows_questions_and_references() -> None:
    base = rows_digest(ROWS)
    assert base == rows_digest(list(ROWS)) != rows_digest(ROWS[:2])
    assert base != rows_digest([dataclasses.replace(ROWS[0], references=("Kiwis.",)), *ROWS[1:]])
    assert base != rows_digest(ROWS[::-1])


THINKS = {"role": "assistant", "content": "Plum.", "reasoning_content": "Plums grow on trees and are fruits."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def learned(tokenizer: Any, row: Row) -> list[int]:
    """What is learned of ``row``, without the end of turn."""
    template = resolve_template("auto", tokenizer)
    limits = {"max_length": 700, "max_prompt_length": 600}
    encoded, _ = encode_rows([row], tokenizer, template, **limits, train_on="last_turn")
    ((start, stop),) = encoded.spans(0)
    ids = encoded[0]["input_ids"]
    assert encode_prompt(row, tokenizer, template, 600).ids == ids[:start]
    assert ids[stop - 1] in end_of_turn_ids(tokenizer, template)
    return ids[start : stop - 1]


def scored(tokenizer: Any, rows: list[Row], tokens: list[int]) -> Any:
    """The scores of a model that says ``tokens`` to everything."""

    def answer(_model: Any, prompts: Any, _settings: Any, *, on_finished: Any, **_options: Any) -> list[Generated]:
        answers = [Generated(tokens, True) for _ in prompts]
        for place, one in enumerate(answers):
            on_finished(place, one)
        return answers

    protocol = custom_protocol(template="auto", max_prompt_length=600, do_sample=False, max_new_tokens=8)
    return evaluate_instruct(None, tokenizer, rows, protocol, answer=answer)


@pytest.mark.parametrize(
    "row",
    [
        Row("r", "Name a fruit.", "", ("Plum.",)),
        Row("r", "Name a fruit.", "", ("Plum.",), chat_template_kwargs={"enable_thinking": False}),
        chat(("u", "Name a fruit."), THINKS),
        chat(("u", "Weather?"), CALLS),
        chat(("u", "Weather?"), {**CALLS, "content": "I look.", "reasoning_content": "Rome it is."}),
    ],
)
def test_who_says_just_what_was_learned_has_the_best_score(row: Row) -> None:
    """Qwen3 writes thoughts, also empty ones, and calls round the content; ``predict`` has that text as reference."""
    tokenizer = chat_tokenizer("qwen3")
    tokens = learned(tokenizer, row)
    scores, (prediction,) = scored(tokenizer, [row], tokens)
    assert (scores["rougeL"]["mean"], scores["exact_match"]["mean"]) == (1.0, 1.0)
    assert prediction["rougeL"] == 1.0 and "without_reference" not in scores
    if row.answer is None and row.chat_template_kwargs is None:
        assert prediction["prediction"] == "<think>\n\n</think>\n\nPlum."  # as it was said
        assert prediction["references"] == ["Plum."]
    # The labels that compute_metrics gets beside generated answers score the same
    (label,) = decoded(tokenizer, padded([tokens]))
    assert exact_match(label, prediction["references"]) and best_rouge_l(prediction["prediction"], [label]) == 1.0


def test_a_thought_is_no_part_of_the_answer() -> None:
    assert without_thoughts("A <thing>.") == "A <thing>."
    assert without_thoughts("<think>\na\n</think>\n\nPlum. ") == "Plum."
    assert without_thoughts("opened by the prompt</think> Plum.") == "Plum."
    assert without_thoughts("<think>cut at the limit") == ""
    assert not exact_match("<think>\n\n</think>\n\nPear.", ["Plum."])
    assert best_rouge_l("<think>\n\n</think>\n\nPear.", ["<think>\n\n</think>\n\nPlum."]) == 0.0


def test_rows_without_a_reference_text_are_left_out_and_counted() -> None:
    """The template of Zephyr writes no calls: nothing is there to compare with, and silence is not right."""
    tokenizer = chat_tokenizer("zephyr")
    rows = [chat(("u", "Weather?"), CALLS), Row("q", "Name a fruit.", "", ("Plum.",))]
    scores, (first, second) = scored(tokenizer, rows, [])
    assert (scores["n"], scores["without_reference"]) == (2, 1) and (first["rougeL"], second["rougeL"]) == (None, 0.0)
    assert (scores["rougeL"]["mean"], scores["exact_match"]["mean"], scores["empty"]["mean"]) == (0.0, 0.0, 1.0)
    assert note_on_references(scores, "validation") == (
        "validation: 1 of 2 rows have no reference text: left out of ROUGE-L and exact match"
    )
    with pytest.raises(UserError, match="evaluation on 'validation': none of the 1 rows has a reference"):
        scored(tokenizer, rows[:1], [])


def test_what_is_called_counts_in_the_digest() -> None:
    other = {**CALLS, "tool_calls": [{**CALL, "function": {"name": "time", "arguments": {}}}]}
    assert rows_digest([chat(("u", "Weather?"), CALLS)]) != rows_digest([chat(("u", "Weather?"), other)])
