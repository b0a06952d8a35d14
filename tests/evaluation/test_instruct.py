"""Answers to held-out instructions: scores, predictions and the fingerprint of the protocol."""

from __future__ import annotations

import dataclasses
import json
import statistics

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

from dts_hf.data.chat_templates import encode_prompt, get_template
from dts_hf.data.rows import Row
from dts_hf.errors import UserError
from dts_hf.evaluation.fingerprint import rows_digest
from dts_hf.evaluation.instruct import MEASURES, evaluate_instruct, generation_settings
from dts_hf.evaluation.protocol import Protocol, custom_protocol
from dts_hf.evaluation.text_metrics import best_rouge_l
from dts_hf.generation.engine import generate
from dts_hf.generation.shares import decode_answer, rows_are_independent, share_out
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
        }
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
