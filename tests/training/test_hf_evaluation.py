"""Held-out rows: losses, generated answers, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, Seq2SeqTrainingArguments

from dts_hf.data.encoding import EncodedDataset
from dts_hf.errors import UserError
from dts_hf.training.generated import padded, questions_of
from dts_hf.training.trainer import DistillationTrainer
from tests.support.hf import ROWS, arguments, encoded, logged, plain, trainer_for  # noqa: F401
from tests.support.tiny import tiny_llama, tiny_tokenizer

HELD_OUT = ROWS[:5]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DistillationTrainer]:
    """One trainer that nobody trains."""
    yield trainer_for(
        tmp_path_factory.mktemp("held_out"), eval_dataset=HELD_OUT, generation={"max_new_tokens": 6},
        options={"per_device_eval_batch_size": 3},
    )  # fmt: skip


def numbers(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    timings = ("runtime", "per_second", "preparation_time", "epoch")
    return {name.removeprefix(prefix): value for name, value in metrics.items() if not name.endswith(timings)}


# ------------------------------------------------------------------------------------------------------------ losses


def test_evaluate_and_predict_give_the_same_numbers(trainer: DistillationTrainer) -> None:
    """works: evaluate and predict; without generation predict has losses and distances alone"""
    output = trainer.predict(HELD_OUT)
    assert output.predictions is None and output.label_ids is None
    expected = numbers(trainer.evaluate(), "eval_")
    assert numbers(output.metrics or {}, "test_") == expected
    assert {"loss", "ce_loss", "kd_loss", "kl", "gap", "teacher_ce", "top1_agreement", "rows", "labels"} <= set(
        expected
    )


@pytest.mark.parametrize("kind", ["raw rows", "tokenised", "encoded", "other rows"])
def test_rows_that_are_given_to_the_call(trainer: DistillationTrainer, kind: str) -> None:
    """works: evaluate(rows) and predict(rows), raw, tokenised or encoded"""
    rows: Any = {
        "raw rows": HELD_OUT,
        "tokenised": plain(HELD_OUT),
        "encoded": encoded(HELD_OUT),
        "other rows": ROWS[5:7],
    }
    values = trainer.evaluate(rows[kind])
    assert values["eval_rows"] == len(rows[kind])
    same = values["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert same is (kind != "other rows")
    assert trainer.predict(rows[kind]).metrics["test_loss"] == pytest.approx(values["eval_loss"])  # type: ignore[index]


@pytest.mark.parametrize("prefix", ["eval", "dev", "a_b"])
def test_the_prefix_of_the_metrics(trainer: DistillationTrainer, prefix: str) -> None:
    """works: metric_key_prefix of evaluate and predict"""
    for values in (trainer.evaluate(metric_key_prefix=prefix), trainer.predict(HELD_OUT, None, prefix).metrics):
        assert values is not None and all(name.startswith(prefix) or name == "epoch" for name in values)


def test_several_held_out_sets(tmp_path: Path) -> None:
    """works: a dictionary of held-out sets, each evaluated by its name, and load_best_model by one of them"""
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
               "load_best_model_at_end": True, "metric_for_best_model": "eval_b_kl", "greater_is_better": True}  # fmt: skip
    trainer = trainer_for(tmp_path, eval_dataset={"a": HELD_OUT, "b": ROWS[5:7]}, options=options)
    trainer.train()
    found = logged(trainer, "eval_b_kl")
    assert trainer.step_of_weights == 1 + found.index(max(found)) < 3  # of the three the one that moved least
    assert trainer.evaluate()["eval_b_kl"] == pytest.approx(max(found), rel=1e-5)
    values = trainer.evaluate()
    assert values["eval_a_rows"] == 5 and values["eval_b_rows"] == 2
    assert trainer.evaluate("b")["eval_loss"] == pytest.approx(values["eval_b_loss"])
    assert trainer.evaluate({"c": ROWS[5:7]})["eval_c_loss"] == pytest.approx(values["eval_b_loss"])


def test_an_unknown_held_out_set(trainer: DistillationTrainer) -> None:
    """refused: evaluate("name") of a set that is not there, and evaluate or predict without rows"""
    with pytest.raises(UserError, match="evaluate: got 'c', expected rows, or one of the eval_dataset"):
        trainer.evaluate("c")
    with pytest.raises(UserError, match="predict: got None, expected rows"):
        trainer.predict(None)


def test_evaluate_without_held_out_rows(tmp_path: Path) -> None:
    """refused: evaluate() without eval_dataset"""
    with pytest.raises(UserError, match="eval_dataset: got None, expected held-out rows"):
        trainer_for(tmp_path).evaluate()


@pytest.mark.parametrize("option", [
    {"per_device_eval_batch_size": 1}, {"per_device_eval_batch_size": 16}, {"dataloader_drop_last": True},
    {"eval_accumulation_steps": 1}, {"eval_use_gather_object": True}, {"dataloader_num_workers": 1},
    {"prediction_loss_only": True}, {"eval_do_concat_batches": False}, {"torch_empty_cache_steps": 1},
], ids=str)  # fmt: skip
def test_how_rows_are_batched_changes_no_number(
    trainer: DistillationTrainer, tmp_path: Path, option: dict[str, Any]
) -> None:
    """works: batch sizes, workers, eval_accumulation_steps, gather_object, prediction_loss_only: the same losses"""
    other = trainer_for(tmp_path, eval_dataset=HELD_OUT, options=option).evaluate()
    ours = trainer.evaluate()
    for name in ("eval_loss", "eval_kl", "eval_ce_loss", "eval_labels", "eval_rows"):
        assert other[name] == pytest.approx(ours[name], rel=1e-5), name


def test_drop_last_drops_no_held_out_row(tmp_path: Path) -> None:
    """differs: dataloader_drop_last leaves out training rows alone; every held-out row counts"""
    options = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4, "per_device_train_batch_size": 5}
    trainer = trainer_for(tmp_path, eval_dataset=HELD_OUT, options=options)
    assert trainer.evaluate()["eval_rows"] == 5
    assert len(trainer.get_train_dataloader()) == len(ROWS) // 5


@pytest.mark.parametrize("kind", ["bf16_full_eval", "fp16_full_eval"])
def test_low_precision_evaluation(tmp_path: Path, kind: str) -> None:
    """works: bf16_full_eval and fp16_full_eval, near the numbers of float32"""
    exact = trainer_for(tmp_path, eval_dataset=HELD_OUT).evaluate()
    lowered = trainer_for(tmp_path, eval_dataset=HELD_OUT, options={kind: True})
    assert lowered.evaluate()["eval_ce_loss"] == pytest.approx(exact["eval_ce_loss"], rel=0.02)
    assert lowered.model.dtype == (torch.bfloat16 if kind.startswith("bf16") else torch.float16)


def test_training_and_held_out_loss_of_the_same_batch(tmp_path: Path) -> None:
    """works: at T = 1 the loss of a training step is that of evaluate on the same rows"""
    trainer = trainer_for(tmp_path, rows=HELD_OUT, eval_dataset=HELD_OUT, temperature=1.0)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(before, rel=1e-5)


def test_the_outputs_of_compute_loss_and_prediction_step(trainer: DistillationTrainer) -> None:
    """differs: return_outputs gives {"loss": loss}, prediction_step (loss, None, None): there are no logits"""
    batch = trainer.collate([trainer.eval_dataset[0]])  # type: ignore[index]
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert outputs == {"loss": loss}
    step = trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=False)
    assert step[1:] == (None, None) and step[0] is not None and step[0].ndim == 0


def test_speed_counts_real_rows(trainer: DistillationTrainer) -> None:
    """differs: eval_samples_per_second counts the rows and not what fills the last batch"""
    values = trainer.evaluate()
    assert values["eval_samples_per_second"] * values["eval_runtime"] == pytest.approx(5, rel=0.02)


# --------------------------------------------------------------------------------------------------- generated answers


def test_predictions_are_generated_answers(trainer: DistillationTrainer) -> None:
    """works: predict(rows, predict_with_generate=True): ids of answers and references, in the order of the rows, for each"""
    output = trainer.predict(HELD_OUT, predict_with_generate=True)
    assert output.predictions.shape == (5, 6) and output.label_ids.shape[0] == 5
    tokenizer = tiny_tokenizer()
    references = [tokenizer.decode([t for t in row if t >= 0]).strip() for row in np.asarray(output.label_ids)]
    assert references == [row["output"].strip() for row in HELD_OUT]
    assert not trainer.predict_with_generate  # for that call alone


LONG = "word " * 600


def test_a_long_answer_leaves_out_no_question(trainer: DistillationTrainer) -> None:
    """works: trainer.generate answers every row, however long the answer of the data is"""
    rows = [HELD_OUT[0], {**HELD_OUT[1], "output": LONG}, HELD_OUT[2]]
    assert trainer.generate(rows) == trainer.generate(HELD_OUT[:3])


def test_rows_whose_answer_would_be_missing(trainer: DistillationTrainer) -> None:
    """refused: generate of a prompt, and predict with answers of a row, that are too long: something stands for each row"""
    rows = [HELD_OUT[0], {**HELD_OUT[1], "instruction": LONG}, HELD_OUT[2]]
    with pytest.raises(UserError, match=r"generate: 1 of 3 rows are too long for max_prompt_length = 256 \(r1\)"):
        trainer.generate(rows)
    for one in (rows, [{**HELD_OUT[1], "output": LONG}]):
        with pytest.raises(
            UserError, match=rf"predict: 1 of {len(one)} rows are too long .* or max_length = 512 \(r1\)"
        ):
            trainer.predict(one, max_new_tokens=2)
    assert trainer.predict(rows).metrics["test_rows"] == 2  # type: ignore[index]


def test_answers_are_those_of_generate(trainer: DistillationTrainer) -> None:
    """works: greedy answers are those of model.generate on the same prompt"""
    output = trainer.predict(HELD_OUT, predict_with_generate=True)
    for place, asked in enumerate(questions_of(encoded(HELD_OUT), "rows")):
        ids = torch.tensor([asked.prompt])
        expected = trainer.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True,
                                          attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()  # fmt: skip
        found = [t for t in np.asarray(output.predictions)[place].tolist() if t >= 0]
        assert found == [token for token in expected if token != tiny_tokenizer().eos_token_id]


@pytest.mark.parametrize("kind", ["raw rows", "tokenised", "encoded"])
def test_generate_gives_texts(trainer: DistillationTrainer, kind: str) -> None:
    """works: trainer.generate(rows) gives texts, of rows of any kind"""
    rows: Any = {"raw rows": HELD_OUT, "tokenised": plain(HELD_OUT), "encoded": encoded(HELD_OUT)}[kind]
    texts = trainer.generate(rows, max_new_tokens=3)
    assert len(texts) == 5 and all(isinstance(text, str) for text in texts)
    assert texts == trainer.generate(rows, max_new_tokens=3, batch_size=2)


@pytest.mark.parametrize("option", [{"max_new_tokens": 2}, {"do_sample": True, "seed": 3, "temperature": 2.0},
                                    {"no_repeat_ngram_size": 2}, {"batch_size": 1}], ids=str)  # fmt: skip
def test_options_of_generation(trainer: DistillationTrainer, option: dict[str, Any]) -> None:
    """works: options of generation for one call: length, sampling with a seed, n-gram rule, batch size"""
    once = trainer.predict(HELD_OUT, **option).predictions  # options are for answers
    assert np.array_equal(once, trainer.predict(HELD_OUT, **option).predictions)
    default = trainer.predict(HELD_OUT, predict_with_generate=True).predictions
    assert once.shape[1] <= option.get("max_new_tokens", 6)
    assert np.array_equal(once, default) is ("batch_size" in option)
    assert trainer.generation.max_new_tokens == 6


@pytest.mark.parametrize("option, says", [
    ({"num_beams": 4}, "generation: 'num_beams' is no option of it, expected max_new_tokens"),
    ({"max_new_token": 4}, "Did you mean 'max_new_tokens'"),
    ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
])  # fmt: skip
def test_options_that_generation_does_not_have(
    trainer: DistillationTrainer, option: dict[str, Any], says: str
) -> None:
    """refused: beams and mistyped options of generation, with the nearest right word"""
    for call in (trainer.generate, trainer.predict):
        with pytest.raises(UserError, match=says):
            call(HELD_OUT, **option)


def test_answers_leave_training_as_it_was(tmp_path: Path) -> None:
    """works: generating in the middle of training changes no loss"""
    losses = []
    for more in ({}, {"predict_with_generate": True, "compute_metrics": lambda found: {"rows": len(found.predictions)},
                      "generation": {"max_new_tokens": 2}}):  # fmt: skip
        options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
        trainer = trainer_for(tmp_path, eval_dataset=HELD_OUT, options=options, **more)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(plain(HELD_OUT))


@pytest.mark.parametrize("rows, says", [
    ([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}], "row 0 has labels from its first token on"),
    (Stream(), "answers are generated for rows with a number; expected a list of rows"),
], ids=["labels alone", "a stream"])  # fmt: skip
def test_rows_without_a_prompt(trainer: DistillationTrainer, rows: Any, says: str) -> None:
    """refused: answers for rows whose every token is a label (there is no prompt), and for streams"""
    with pytest.raises(UserError, match=says):
        trainer.predict(rows, predict_with_generate=True)
    assert trainer.predict(rows).predictions is None  # their losses are there


def test_an_answer_ends_with_its_turn(tmp_path: Path) -> None:
    """works: answers end at the end of turn of the chat template, which is in neither answers nor references"""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # the template ends turns with <|im_end|>, id 2
    student = tiny_llama(seed=0)
    student.generation_config.eos_token_id = student.config.eos_token_id = 0
    trainer = trainer_for(tmp_path, student, processing_class=tokenizer)
    assert trainer.end_token_ids() == [0, 2]
    with torch.no_grad():
        student.lm_head.weight.zero_()  # tied: the end of turn is then as likely as all others; make it the likeliest
        student.lm_head.weight[2] = 1.0
        student.model.norm.weight.fill_(1.0)
    output = trainer.predict(HELD_OUT, max_new_tokens=3)
    assert not {0, 2} & {*np.asarray(output.label_ids).ravel(), *np.asarray(output.predictions).ravel()}


def test_a_row_of_several_turns_is_asked_for_its_last_answer() -> None:
    """works: of several turns the last answer is generated, after everything before it"""
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6, 7], "labels": [-100, 2, -100, -100, 5, 6, -100]}]
    asked = questions_of(rows, "rows")[0]
    assert (asked.prompt, asked.reference) == ([1, 2, 3, 4], [5, 6])
    assert padded([[1], [2, 3]]).tolist() == [[1, -100], [2, 3]]


# ------------------------------------------------------------------------------------------------------ compute_metrics


def exact_match(found: EvalPrediction) -> dict[str, float]:
    tokenizer = tiny_tokenizer()
    texts = [
        [tokenizer.decode([token for token in row if token >= 0]) for row in ids]
        for ids in (found.predictions, found.label_ids)
    ]
    return {"exact_match": float(np.mean([one == other for one, other in zip(*texts, strict=True)]))}


def test_compute_metrics_on_generated_text(tmp_path: Path) -> None:
    """works: compute_metrics of generated answers, in evaluate, predict and the log; best model by it"""
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
               "load_best_model_at_end": True, "metric_for_best_model": "exact_match"}  # fmt: skip
    trainer = trainer_for(
        tmp_path, eval_dataset=HELD_OUT, compute_metrics=exact_match, predict_with_generate=True,
        generation={"max_new_tokens": 4}, options=options,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "eval_exact_match") == [0.0, 0.0] and trainer.state.best_metric == 0.0
    assert trainer.predict(HELD_OUT, metric_key_prefix="dev").metrics["dev_exact_match"] == 0.0  # type: ignore[index]
    same = trainer.predict(HELD_OUT, max_new_tokens=4)
    assert exact_match(EvalPrediction(same.label_ids, same.label_ids)) == {"exact_match": 1.0}


def test_compute_metrics_with_prompts(tmp_path: Path) -> None:
    """works: include_for_metrics=["inputs"] gives compute_metrics the prompts"""
    seen: list[EvalPrediction] = []
    trainer = trainer_for(
        tmp_path, eval_dataset=HELD_OUT, predict_with_generate=True, generation={"max_new_tokens": 2},
        compute_metrics=lambda found: seen.append(found) or {}, options={"include_for_metrics": ["inputs"]},
    )  # fmt: skip
    trainer.evaluate()
    assert "Say it again" in tiny_tokenizer().decode([token for token in seen[0].inputs[1] if token >= 0])


def test_seq2seq_arguments_ask_for_answers(tmp_path: Path) -> None:
    """works: predict_with_generate of Seq2SeqTrainingArguments"""
    args = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", predict_with_generate=True)
    trainer = DistillationTrainer(
        tiny_llama(), tiny_llama(seed=1), args=args, eval_dataset=HELD_OUT, processing_class=tiny_tokenizer(),
        compute_metrics=exact_match, generation={"max_new_tokens": 2},
    )  # fmt: skip
    assert trainer.evaluate()["eval_exact_match"] == 0.0
    assert trainer.evaluate(max_new_tokens=1)["eval_rows"] == 5


@pytest.mark.parametrize("more, says", [
    ({}, "compute_metrics: the loss needs no logits, so it would never be called; expected predict_with_generate=True"),
    ({"predict_with_generate": True, "options": {"batch_eval_metrics": True}}, "args.batch_eval_metrics: got True"),
    ({"predict_with_generate": True, "options": {"include_for_metrics": ["loss"]}}, "args.include_for_metrics: got 'loss'"),
], ids=["logits", "by batch", "losses"])  # fmt: skip
def test_metrics_of_logits(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    """refused: compute_metrics of logits, by batch (batch_eval_metrics), or with losses (include_for_metrics)"""
    with pytest.raises(UserError, match=says):
        trainer_for(tmp_path, compute_metrics=lambda found, compute_result=True: {}, **more)


def test_metrics_that_are_none(tmp_path: Path) -> None:
    """refused: a compute_metrics that returns no dictionary"""
    trainer = trainer_for(tmp_path, eval_dataset=HELD_OUT, predict_with_generate=True, compute_metrics=lambda found: 0.5,
                          generation={"max_new_tokens": 1})  # fmt: skip
    with pytest.raises(UserError, match="compute_metrics: returned float, expected a dictionary"):
        trainer.evaluate()


def test_encoded_rows_keep_their_ids(trainer: DistillationTrainer) -> None:
    """works: sampled answers follow the id of a row, whatever its place"""
    rows: EncodedDataset = encoded(HELD_OUT)
    turned = EncodedDataset(rows.row_ids[::-1], [list(ids) for ids in rows.ids][::-1], rows.prompt_lengths[::-1])
    options = {"do_sample": True, "max_new_tokens": 4}
    assert trainer.generate(rows, **options) == trainer.generate(turned, **options)[::-1]
