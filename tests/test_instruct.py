"""Answers to held-out instructions: scores, predictions and the fingerprint of the protocol."""

from __future__ import annotations

import json
import statistics

import pytest
from tiny import tiny_llama, tiny_tokenizer

from dts_hf.data import Row
from dts_hf.errors import UserError
from dts_hf.evaluation.instruct import MEASURES, decode_answer, evaluate_instruct, protocol_fingerprint
from dts_hf.evaluation.rouge import best_rouge_l
from dts_hf.generation import GenerationSettings, generate
from dts_hf.prompts import encode_prompt, get_template

TEMPLATE = get_template("alpaca")
SETTINGS = GenerationSettings(max_new_tokens=12, batch_size=4)
ROWS = [
    Row("q-1", "Name three fruits.", "", ("Apples, pears and plums.", "Three fruits")),
    Row("q-2", "Write the sentence in the past tense.", "The boat sails over the lake.", ("The boat sailed.",)),
    Row("q-3", "How many legs do two horses have?", "", ("Eight.",)),
]


def evaluate(rows: list[Row] = ROWS, settings: GenerationSettings = SETTINGS, **options: object):
    options = {"max_prompt_length": 256, "set_name": "held-out", **options}
    return evaluate_instruct(tiny_llama(tie=False), tiny_tokenizer(), rows, TEMPLATE, settings, **options)


def test_greedy_scores_and_predictions() -> None:
    scores, predictions = evaluate(seeds=[10, 20])
    assert scores["n"] == 3 and scores["dropped"] == 0 and scores["prompts_cut"] == 0
    assert scores["seeds"] == [10], "greedy text is generated once"
    assert set(scores) == {"n", "dropped", "prompts_cut", "seeds", *MEASURES}
    assert [row["id"] for row in predictions] == ["q-1", "q-2", "q-3"]
    model, tokenizer = tiny_llama(tie=False), tiny_tokenizer()
    for row, predicted in zip(ROWS, predictions, strict=True):
        ids = encode_prompt(row, tokenizer, TEMPLATE, 256).ids
        answer = generate(model, [ids], SETTINGS, eos_token_ids=[2], pad_token_id=2)[0]
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
    settings = GenerationSettings(max_new_tokens=12, batch_size=2, do_sample=True)
    scores, predictions = evaluate(settings=settings, seeds=[10, 20, 30])
    assert scores["seeds"] == [10, 20, 30] == sorted({row["seed"] for row in predictions})
    assert len(predictions) == 9 and len(scores["rougeL"]["per_seed"]) == 3
    assert scores["mean_tokens"]["sd"] == pytest.approx(statistics.stdev(scores["mean_tokens"]["per_seed"]))
    _, alone = evaluate(rows=ROWS[2:], settings=settings, seeds=[20])
    assert alone[0] == next(row for row in predictions if row["id"] == "q-3" and row["seed"] == 20)
    _, default = evaluate(settings=settings)
    assert default == predictions[:3], "without seeds: the seed of the settings, 10"


def test_prompts_that_are_cut_or_do_not_fit_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    limit = len(encode_prompt(ROWS[1], tokenizer, TEMPLATE, 256).ids) - 3
    rows = [*ROWS, Row("q-4", "Explain this. " * 60, "", ("No.",))]
    scores, predictions = evaluate(rows=rows, max_prompt_length=limit)
    assert (scores["n"], scores["dropped"], scores["prompts_cut"]) == (3, 1, 1)
    cut = predictions[1]["prompt"]
    assert cut.endswith("### Response:\n") and len(cut) < len(TEMPLATE.render(ROWS[1], tokenizer))
    assert predictions[1]["input"] == ROWS[1].input
    with pytest.raises(UserError, match="none of the 1 prompts fits into data"):
        evaluate(rows=ROWS[:1], max_prompt_length=5)
    with pytest.raises(UserError, match="'held-out': no rows"):
        evaluate(rows=[])


def test_an_answer_holds_no_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("\n Eight legs. <|im_end|>", add_special_tokens=False)["input_ids"]
    assert decode_answer(tokenizer, tokens) == "Eight legs."
    assert decode_answer(tokenizer, []) == ""


def test_the_fingerprint_follows_the_protocol_and_nothing_else() -> None:
    def fingerprint(settings: GenerationSettings = SETTINGS, template: str = "alpaca", chat: bool = True, **options):
        options = {"max_prompt_length": 256, "seeds": [10], **options}
        protocol = protocol_fingerprint(tiny_tokenizer(chat=chat), get_template(template), settings, **options)
        json.dumps(protocol, allow_nan=False)
        return protocol["fingerprint"]

    sampling = {"max_new_tokens": 12, "do_sample": True}
    base, sampled = fingerprint(), fingerprint(GenerationSettings(**sampling))
    assert len(base) == 16 and base == fingerprint()
    assert base == fingerprint(GenerationSettings(max_new_tokens=12, batch_size=1, seed=3), seeds=[11, 12])
    assert base == fingerprint(chat=False), "the alpaca text does not use the chat template"
    different = [
        base,
        sampled,
        fingerprint(GenerationSettings(max_new_tokens=13)),
        fingerprint(GenerationSettings(max_new_tokens=12, no_repeat_ngram_size=6)),
        fingerprint(GenerationSettings(**sampling, temperature=0.7)),
        fingerprint(GenerationSettings(**sampling), seeds=[10, 20]),
        fingerprint(template="chat"),
        fingerprint(max_prompt_length=255),
    ]
    assert len(set(different)) == len(different)
