"""Rows through the trainer: nothing vanishes in silence, tokenised rows of every make, and numbers that count real rows."""

from __future__ import annotations

import dataclasses
import logging
import math

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    default_data_collator,
)

from dts_hf.data.chat_templates import get_template
from dts_hf.data.encoding import EncodedDataset, encode_rows
from dts_hf.data.samplers import PadToMultiple
from dts_hf.data.sources import rows_from_dataset
from dts_hf.data.tokenised import BLOCK, RowForm, TokenisedDataset
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import TINY_VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, encoded, losses, plain, temperatures, trainer_for

LONG = [{"id": f"l{i}", "instruction": "Say it", "input": "", "output": "yes " * 600} for i in range(7)]
NAMES = ("eval_loss", "eval_kl", "eval_ce_loss", "eval_teacher_ce", "eval_rows", "eval_labels")


def padded(rows, side, width=96, pad=7):
    """As ``tokenizer(..., padding="max_length")`` leaves them, with the padding in the labels, too."""
    made = []
    for row in rows:
        fill, shown = width - len(row["input_ids"]), [1] * len(row["input_ids"])
        parts = {"input_ids": ([pad] * fill, row["input_ids"]), "labels": ([pad] * fill, row["labels"]),
                 "attention_mask": ([0] * fill, shown)}  # fmt: skip
        made.append({name: a + b if side == "left" else b + a for name, (a, b) in parts.items()})
    return made


def numbers(values):
    return {name: values[name] for name in NAMES}


def gpt2_trainer(tmp_path, rows, **more):
    """GPT-2: learned positions, so that it shows where a row begins."""
    return trainer_for(tmp_path, tiny_gpt2(seed=0), tiny_gpt2(seed=1, layers=3), rows=rows, eval_dataset=rows, **more)


# --------------------------------------------------------------------------------------------------- nothing vanishes


def test_what_became_of_the_rows_is_kept_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for(
            tmp_path, rows=[*LONG, ROWS[0]], eval_dataset={"whole": ROWS[:3], "cut": [*LONG[:2], ROWS[1]]},
            max_length=64, max_prompt_length=32, long_rows="drop",
        )  # fmt: skip
    reports = trainer.encoding_reports
    assert set(reports) == {"train_dataset", "eval_dataset['whole']", "eval_dataset['cut']"}
    train = reports["train_dataset"]
    assert (train.rows, train.kept, train.dropped) == (8, 1, 7) and train.dropped_ids == ["l0", "l1", "l2", "l3", "l4"]
    said = [record.getMessage() for record in caplog.records if record.name == "dts_hf.training.datasets"]
    assert len(said) == 2  # nothing of the set that is whole
    assert said[0].startswith("train_dataset: 1 of 8 rows kept; dropped as too long: 7 (l0, l1, l2, l3, l4, ...)")
    assert said[1].startswith("eval_dataset['cut']: 1 of 3 rows kept")
    caplog.clear()
    trainer.evaluate(LONG[:1] + ROWS[:1])
    trainer.predict(ROWS[:2])
    assert reports["evaluate"].dropped == 1 and reports["predict"].kept == 2
    trainer.evaluate()
    assert [r.getMessage()[:9] for r in caplog.records if r.name == "dts_hf.training.datasets"] == ["evaluate:"]


def test_rows_encoded_before_bring_their_report(tmp_path, caplog):
    """As on the command line, which has said it then: not a second time."""
    limits = {"max_length": 64, "max_prompt_length": 32}
    with caplog.at_level(logging.WARNING):
        data, report = encode_rows(
            rows_from_dataset([*LONG, ROWS[0]]), tiny_tokenizer(), get_template("chat"), **limits
        )
        trainer = trainer_for(tmp_path, rows=data)
    assert trainer.encoding_reports["train_dataset"] is report and report.dropped == 7
    assert "rows kept" not in caplog.text


def test_cut_rows_and_shortened_inputs_are_said(tmp_path, caplog):
    shortened = {"id": "s", "instruction": "Say it", "input": "a b c " * 60, "output": "no"}
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for(
            tmp_path, rows=[LONG[0], shortened], max_length=64, max_prompt_length=48, long_rows="cut"
        )
    report = trainer.encoding_reports["train_dataset"]
    assert (report.kept, report.cut, report.prompts_cut) == (2, 1, 1)
    assert "responses cut: 1; inputs shortened: 1" in caplog.text


def masked_whole(count):
    return [{"input_ids": [5, 6, 7], "labels": [5, IGNORE_INDEX, IGNORE_INDEX]} for _ in range(count)]


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["list", "arrow"])
def test_rows_that_are_masked_whole_are_counted(tmp_path, caplog, make):
    """The label of a row's first token is none: nothing predicts it."""
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for(tmp_path, rows=make([*plain(ROWS[:3]), *masked_whole(6)]))
    report = trainer.encoding_reports["train_dataset"]
    assert (report.rows, report.kept, report.unlabelled) == (9, 9, 6)
    assert report.response_tokens == sum(label != IGNORE_INDEX for row in plain(ROWS[:3]) for label in row["labels"])
    assert "train_dataset: 9 of 9 rows kept; without a label that counts: 6 (3, 4, 5, 6, 7, ...)" in caplog.text


def test_a_set_without_any_label_is_refused(tmp_path):
    with pytest.raises(UserError, match="train_dataset: none of its 4 rows has a label that counts"):
        trainer_for(tmp_path, rows=masked_whole(4))
    with pytest.raises(UserError, match=r"eval_dataset\['b'\]: none of its 2 rows has a label"):
        trainer_for(tmp_path, eval_dataset={"a": plain(ROWS[:2]), "b": masked_whole(2)})
    with pytest.raises(UserError, match="train_dataset: none of its 1 rows has a label"):
        trainer_for(tmp_path, rows=EncodedDataset(["a"], [[5, 6, 7]], [3]))
    with pytest.raises(UserError, match="evaluate: none of its 2 rows"):
        trainer_for(tmp_path).evaluate(masked_whole(2))


# ------------------------------------------------------------------------------------------------- rows of every make


class MapStyle(Dataset):
    """No iterator, no end, and it counts how often each row is read."""

    def __init__(self, rows):
        self.rows, self.read = rows, [0] * len(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read[index % len(self.rows)] += 1
        return self.rows[index % len(self.rows)]


class Endless(Dataset):
    def __getitem__(self, index):
        return plain()[0]


def with_tensors(rows):
    return [{name: torch.tensor(cell) for name, cell in row.items()} for row in rows]


def with_arrays(rows):
    return [{name: np.array(cell, dtype=np.int32) for name, cell in row.items()} for row in rows]


def shuffled_back(rows):
    """Rows behind an index mapping, in several chunks."""
    order = np.random.default_rng(0).permutation(len(rows))
    parts = np.array_split(order, 3)
    made = datasets.concatenate_datasets([datasets.Dataset.from_list([rows[i] for i in part]) for part in parts])
    return made.select(np.argsort(order).tolist())


def int32(rows):
    dataset = datasets.Dataset.from_list(rows)
    feature = datasets.LargeList(datasets.Value("int32"))
    return dataset.cast(datasets.Features(dict.fromkeys(dataset.column_names, feature)))


def transformed(rows):
    return datasets.Dataset.from_dict({"at": list(range(len(rows)))}).with_transform(
        lambda batch: {name: [rows[i][name] for i in batch["at"]] for name in rows[0]}
    )


#: How each kind of rows is made of lists.
MAKES = {
    "tensors": with_tensors, "arrays": with_arrays, "map style": MapStyle, "arrow": datasets.Dataset.from_list,
    "torch format": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "numpy format": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "arrow format": lambda rows: datasets.Dataset.from_list(rows).with_format("arrow"),
    "pandas format": lambda rows: datasets.Dataset.from_list(rows).with_format("pandas"),
    "selected": shuffled_back, "int32": int32, "transform": transformed,
}  # fmt: skip


@pytest.mark.parametrize("make", MAKES)
def test_rows_of_every_make_are_the_same_rows(tmp_path, make):
    """Also with a mask, which hides padding on the left: GPT-2 would see both the padding and other positions."""
    expected = gpt2_trainer(tmp_path, plain())
    expected.train()
    for rows in (plain(), padded(plain(), "left")):
        trainer = gpt2_trainer(tmp_path, MAKES[make](rows))
        trainer.train()
        assert losses(trainer) == losses(expected)
        assert numbers(trainer.evaluate()) == numbers(expected.evaluate())
        assert trainer.encoding_reports == expected.encoding_reports and trainer.tokens_seen == expected.tokens_seen
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, expected.model.state_dict()[name]), name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_tokens_at_the_ends_are_padding(tmp_path, side, packing):
    expected, trainer = (gpt2_trainer(tmp_path, rows, packing=packing) for rows in (plain(), padded(plain(), side)))
    assert numbers(trainer.evaluate()) == numbers(expected.evaluate())
    trainer.train(), expected.train()
    assert losses(trainer) == losses(expected) and trainer.tokens_seen == expected.tokens_seen


def test_raw_and_tokenised_rows_train_the_same(tmp_path):
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length"}
    limits = {"max_length": 128, "max_prompt_length": 64}
    raw, tokenised = (trainer_for(tmp_path, rows=rows, options=options, **limits) for rows in (ROWS, plain()))
    raw.train(), tokenised.train()
    assert losses(raw) == losses(tokenised) and temperatures(raw) == temperatures(tokenised)


def test_rows_are_read_once_before_training_and_an_evaluation_reads_them_once(tmp_path):
    """Beside six of them at most, which are read twice more: are they the same each time?"""
    rows, held_out = MapStyle(plain()), MapStyle(plain(ROWS[:6]))
    trainer = trainer_for(tmp_path, rows=rows, eval_dataset=held_out, options={"per_device_eval_batch_size": 3})
    assert {*rows.read} <= {1, 3} and rows.read.count(3) <= 6 and held_out.read.count(3) <= 6
    before = list(held_out.read)
    trainer.evaluate()
    assert held_out.read == [times + 1 for times in before]
    raw = MapStyle(ROWS)
    trainer_for(tmp_path, rows=raw)
    assert set(raw.read) == {1}
    calls = []

    def count(batch):
        calls.extend(batch["at"])
        return {name: [plain()[i][name] for i in batch["at"]] for name in ("input_ids", "labels")}

    trainer_for(tmp_path, rows=datasets.Dataset.from_dict({"at": list(range(16))}).with_transform(count))
    assert {*calls} == {*range(16)} and len(calls) <= 16 + 2 * 6


def test_checking_arrow_rows_makes_no_python_numbers(tmp_path, monkeypatch):
    """Each token as a Python object costs half a second for a million; the columns are looked at as they lie there."""
    rows = datasets.Dataset.from_list(plain() * 300)  # more than one block
    assert len(rows) > BLOCK

    def read(self, key):
        raise AssertionError("a row was read")

    first = next(iter(rows))
    monkeypatch.setattr(datasets.Dataset, "__iter__", lambda self: iter([first]))
    monkeypatch.setattr(datasets.Dataset, "__getitem__", read)
    trainer = trainer_for(tmp_path, rows=rows)
    assert trainer.encoding_reports["train_dataset"].rows == len(rows)
    assert trainer.train_dataset.lengths == [len(row["input_ids"]) for row in plain()] * 300


GOOD = {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7]}
BAD_ROWS = [
    ("a hole", {"attention_mask": [1, 0, 1]}, "row 1: attention_mask hides tokens between others"),
    ("another mask", {"attention_mask": [1, 2, 1]}, "row 1: attention_mask has 2, expected 0 and 1"),
    ("all hidden", {"attention_mask": [0, 0, 0]}, "row 1 has no token that attention_mask does not hide"),
    ("short mask", {"attention_mask": [1, 1]}, "row 1 has 2 attention_mask for 3 input_ids"),
    ("packed", {"position_ids": [0, 1, 0]}, "row 1: position_ids has 0 where 2 is expected.*packing=True"),
    ("no labels", {"labels": None}, r"row 1 has no labels, but 'input_ids'; expected labels .*DataCollatorForLanguage"),
    ("no ids", {"input_ids": None}, "row 1 has no input_ids, but 'labels'; expected tokens"),
    ("other length", {"labels": [IGNORE_INDEX, 6]}, "row 1 has 2 labels for 3 input_ids, expected as many"),
    ("negative", {"labels": [IGNORE_INDEX, -1, 7]}, "row 1: token id -1 is outside the 320 ids"),
    ("ignored input", {"input_ids": [5, IGNORE_INDEX, 7]}, "row 1: token id -100 is outside"),
    ("outside", {"input_ids": [5, 320, 7]}, "row 1: token id 320 is outside the 320 ids.*added to one of them"),
    ("empty", {"input_ids": [], "labels": []}, "row 1 has no token; leave it out"),
    ("floats", {"input_ids": [5.0, 6.5, 7.0]}, r"row 1: input_ids is an array \[3\] of float64"),
    ("two dimensions", {"input_ids": [[5, 6, 7]]}, r"row 1: input_ids is an array \[1, 3\]"),
    ("a number", {"labels": 5}, "row 1: labels is 5, expected a list of whole numbers"),
]  # fmt: skip
ARROW = {"no labels", "a hole", "packed", "other length", "negative", "outside", "empty", "all hidden"}


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS])
def test_a_bad_row_is_named(tmp_path, change, message, request):
    base = {name: [1, 1, 1] if name == "attention_mask" else [0, 1, 2] for name in change if name not in GOOD}
    rows = [{**GOOD, **base}, {**GOOD, **base, **change}]
    makes = [list, MapStyle]
    if request.node.callspec.id in ARROW:
        makes.append(datasets.Dataset.from_list)
    for make in makes:
        with pytest.raises(UserError, match=f"train_dataset: {message}"):
            trainer_for(tmp_path, rows=make(rows))


@pytest.mark.parametrize(("dtype", "vocab_size"), [(np.int8, TINY_VOCAB), (np.int16, 70_000)])
def test_narrow_integers_below_zero_are_no_large_ids(dtype, vocab_size):
    """-100 as eight bits without a sign is 156, an id like any other."""

    def narrow(**change):
        return [{name: np.array(cell, dtype=dtype) for name, cell in {**GOOD, **change}.items()}]

    form = RowForm("train_dataset", vocab_size)
    assert TokenisedDataset(narrow(), form).report.response_tokens == 2
    with pytest.raises(UserError, match="row 0: token id -1 is outside"):
        TokenisedDataset(narrow(input_ids=[5, -1, 7]), form)


def test_the_row_number_of_a_later_block(tmp_path):
    rows = [GOOD] * (BLOCK + 5) + [{**GOOD, "labels": [IGNORE_INDEX, 6, 400]}]
    for made in (rows, datasets.Dataset.from_list(rows)):
        with pytest.raises(UserError, match=f"train_dataset: row {BLOCK + 5}: token id 400"):
            trainer_for(tmp_path, rows=made)


def test_trivial_positions_and_a_position_column_behind_padding(tmp_path):
    rows = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in plain()]
    trainer, expected = gpt2_trainer(tmp_path, rows), gpt2_trainer(tmp_path, plain())
    assert numbers(trainer.evaluate()) == numbers(expected.evaluate())
    left = {"input_ids": [2, 5, 6], "labels": [IGNORE_INDEX, 5, 6], "attention_mask": [0, 1, 1]}
    assert len(gpt2_trainer(tmp_path, [{**left, "position_ids": [1, 0, 1]}]).train_dataset) == 1
    with pytest.raises(UserError, match="row 0: position_ids has 1 where 0 is expected"):
        gpt2_trainer(tmp_path, [{**left, "position_ids": [0, 1, 2]}])


def test_a_mask_that_only_some_rows_have(tmp_path):
    rows = plain()
    mixed = [rows[k] if k % 2 else row for k, row in enumerate(padded(rows, "left"))]
    for made in (mixed, datasets.Dataset.from_list(mixed)):
        assert numbers(gpt2_trainer(tmp_path, made).evaluate()) == numbers(gpt2_trainer(tmp_path, rows).evaluate())


def test_other_things_that_are_no_data_set(tmp_path):
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(plain()), "test": datasets.Dataset.from_list(plain())}
    )
    with pytest.raises(UserError, match=r"train_dataset: got several data sets \(train, test\), expected one of them"):
        trainer_for(tmp_path, rows=both)
    assert set(trainer_for(tmp_path, eval_dataset=both).eval_dataset) == {"train", "test"}
    with pytest.raises(UserError, match="train_dataset: got Endless, which has no length; expected a list"):
        trainer_for(tmp_path, rows=Endless())
    trainer = trainer_for(tmp_path, eval_dataset=both)
    with pytest.raises(
        UserError, match="evaluate: got 'tets', expected rows, or one of the eval_dataset: 'train', 'test'"
    ):
        trainer.evaluate("tets")
    with pytest.raises(UserError, match="predict: got None, expected rows"):
        trainer.predict(None)
    with pytest.raises(UserError, match="train_dataset: got a generator, which can be read once"):
        trainer_for(tmp_path, rows=(row for row in plain()))
    with pytest.raises(UserError, match="train_dataset: there are no rows in it"):
        trainer_for(tmp_path, rows=datasets.Dataset.from_dict({"input_ids": [], "labels": []}))


# ---------------------------------------------------------------------------------------------- the user's collators


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_from_the_collator_for_language_models(tmp_path, side):
    """Hugging Face's standard: every token is a label. Missing labels, and labels that are None.

    On the left the first token of a row stands behind padding, which predicts nothing.
    """
    tokenizer = tiny_tokenizer(pad="own")
    tokenizer.padding_side = side
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    bare = [{"input_ids": row["input_ids"]} for row in plain()]
    full = [{**row, "labels": row["input_ids"]} for row in bare]
    more = {"processing_class": tokenizer, "options": {"per_device_eval_batch_size": 3}}
    expected = trainer_for(tmp_path, rows=full, eval_dataset=full, **more)
    for rows in (bare, [{**row, "labels": None} for row in bare], datasets.Dataset.from_list(bare)):
        trainer = trainer_for(tmp_path, rows=rows, eval_dataset=rows, data_collator=collator, **more)
        trainer.train()
        if not losses(expected):
            expected.train()
        assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
        found, right = numbers(trainer.evaluate()), numbers(expected.evaluate())
        assert found == pytest.approx(right, rel=1e-6) and found["eval_rows"] == 16
    with pytest.raises(UserError, match="data_collator: got mlm true"):
        trainer_for(tmp_path, rows=bare, data_collator=Masked(tokenizer))
    with pytest.raises(
        UserError, match="data_collator: DataCollatorForSeq2Seq makes no labels, and the rows have none"
    ):
        trainer_for(tmp_path, rows=bare, data_collator=DataCollatorForSeq2Seq(tokenizer))
    with pytest.raises(UserError, match="DataCollatorForSeq2Seq makes no labels"):
        trainer_for(tmp_path, rows=None, eval_dataset={"a": bare}, data_collator=DataCollatorForSeq2Seq(tokenizer))


class Masked(DataCollatorForLanguageModeling):
    """mlm without a mask token, which a causal tokenizer does not have."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, mlm=False)
        self.mlm = True

    def torch_call(self, examples):
        return default_data_collator([{**example, "labels": example["input_ids"]} for example in examples])


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list, MapStyle], ids=["list", "arrow", "map style"])
def test_a_column_of_text_does_not_reach_the_users_collator(tmp_path, make):
    tokenizer = tiny_tokenizer(pad="own")
    rows = [{**row, "text": "left over"} for row in plain()]
    args = arguments(tmp_path, max_steps=2, per_device_eval_batch_size=3)
    assert args.remove_unused_columns
    trainer = DistillationTrainer(
        tiny_llama(seed=0), tiny_llama(seed=1), {"name": "dts"}, args=args, train_dataset=make(rows),
        eval_dataset=make(rows), processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    trainer.train()
    assert args.remove_unused_columns and trainer.args.remove_unused_columns
    expected = trainer_for(tmp_path, teacher=tiny_llama(seed=1), rows=plain(), eval_dataset=plain(),
                           options={"max_steps": 2, "per_device_eval_batch_size": 3})  # fmt: skip
    expected.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
    assert numbers(trainer.evaluate()) == pytest.approx(numbers(expected.evaluate()), rel=1e-6)


def test_the_users_collator_gets_all_columns_if_they_are_to_stay(tmp_path):
    seen = []

    def collate(rows):
        seen.extend(rows)
        wanted = ("input_ids", "labels", "attention_mask")
        return default_data_collator([{name: row[name] for name in wanted} for row in rows])

    rows = [{**row, "note": [3]} for row in padded(plain(), "right")]
    options = {"remove_unused_columns": False, "per_device_eval_batch_size": 3}
    more = {"options": options, "data_collator": collate, "eval_dataset": rows[:4]}
    trainer_for(tmp_path, rows=rows, **more).evaluate()  # rows of one width: nothing of them is cut off
    assert all(set(row) == {"input_ids", "labels", "attention_mask", "note"} for row in seen)
    with pytest.raises(
        UserError, match="data_collator: function cannot make a batch of the first row: 'attention_mask'"
    ):
        trainer_for(tmp_path, rows=plain(), **{**more, "eval_dataset": None})


def test_a_collator_that_lays_rows_end_to_end(tmp_path):
    options = {"per_device_eval_batch_size": 3}
    trainer = trainer_for(tmp_path, rows=plain(), eval_dataset=plain(), options=options,
                          data_collator=DataCollatorWithFlattening())  # fmt: skip
    expected = trainer_for(tmp_path, rows=plain(), eval_dataset=plain(), options=options)
    assert numbers(trainer.evaluate()) == pytest.approx(numbers(expected.evaluate()), rel=1e-5)
    trainer.train(), expected.train()
    assert trainer.tokens_seen == expected.tokens_seen


@pytest.mark.parametrize("rows", [ROWS, plain()], ids=["raw", "tokenised"])
def test_a_collator_that_does_not_pad_labels_is_refused_before_training(tmp_path, rows):
    """As Hugging Face's for language models does not, where there are some."""
    tokenizer = tiny_tokenizer(pad="own")
    more = {"processing_class": tokenizer, "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=False)}
    shortest, longest = (find(len(row["input_ids"]) for row in plain()) for find in (min, max))
    with pytest.raises(
        UserError, match=rf"cannot make a batch of the shortest and the longest row \({shortest} and {longest} tokens"
    ):
        trainer_for(tmp_path, rows=rows, **more)
    options = {"per_device_train_batch_size": 1}
    assert trainer_for(tmp_path, rows=rows, options=options, **more).train().global_step == 1


def test_rows_are_found_again_by_their_number(tmp_path):
    for rows in (plain(), datasets.Dataset.from_list(plain())):
        trainer = trainer_for(tmp_path, rows=rows)
        (batch,) = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(1), strict=False)]
        for row, number in enumerate(batch["row_id"].tolist()):
            ids = plain()[number]["input_ids"]
            assert batch["input_ids"][row, : len(ids)].tolist() == ids


def test_rows_that_are_set_after_the_trainer_was_made(tmp_path):
    expected = trainer_for(tmp_path, rows=plain())
    trainer = trainer_for(tmp_path, rows=plain()[:4])
    trainer.train_dataset = padded(plain(), "left")
    expected.train(), trainer.train()
    assert losses(trainer) == losses(expected)
    trainer.train_dataset = [{**GOOD, "labels": [1]}]
    with pytest.raises(UserError, match="train_dataset: row 0 has 1 labels for 3 input_ids"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["non_padding", "all"])
def test_input_tokens_seen(tmp_path, kind, packing):
    """The end token is the padding token here, and is counted all the same."""
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "include_num_input_tokens_seen": kind,
               "train_sampling_strategy": "sequential"}  # fmt: skip
    trainer = trainer_for(tmp_path, rows=plain(), packing=packing, options=options)
    trainer.train()
    lengths = [len(row["input_ids"]) for row in plain()]
    cells = sum(8 * max(lengths[start : start + 8]) for start in (0, 8))
    assert trainer.tokens_seen == sum(lengths)
    assert trainer.state.num_input_tokens_seen == (cells if kind == "all" and not packing else sum(lengths))


def test_input_tokens_seen_leave_fillers_out(tmp_path):
    from dts_hf.training.even_batches import count_cells, count_tokens

    data = encoded(ROWS[:3])
    for packing in (False, True):
        trainer = trainer_for(tmp_path, packing=packing)
        filled = PadToMultiple(data, 5, trainer.without_label)
        batch = trainer.data_collator([filled[index] for index in range(5)])
        alone = trainer.data_collator([data[index] for index in range(3)])
        assert count_tokens(batch) == count_tokens(alone) == sum(data.lengths)
        assert count_cells(batch) == count_cells(alone)


def test_samples_per_second_of_an_evaluation_count_rows(tmp_path):
    trainer = trainer_for(tmp_path, eval_dataset=ROWS[:13], options={"per_device_eval_batch_size": 8})
    loader = trainer.get_eval_dataloader()
    assert len(loader.dataset) == 16 and trainer.num_examples(loader) == 13
    assert trainer.evaluation_loop(loader, "Evaluation").num_samples == 13
    values = trainer.predict(ROWS[:13])
    assert values.predictions is None and values.metrics["test_rows"] == 13
    assert values.metrics["test_loss"] == trainer.evaluate()["eval_loss"]


def test_workers_that_stay_evaluate_the_set_that_was_asked_for(tmp_path):
    options = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    sets = {"a": ROWS[:3], "b": ROWS[3:8]}
    trainer, expected = (trainer_for(tmp_path, eval_dataset=sets, options=more) for more in (options, {}))
    for _ in range(2):
        found, right = trainer.evaluate(), expected.evaluate()
        assert {name: found[name] for name in right if name.endswith(("_loss", "_rows"))} == {
            name: right[name] for name in right if name.endswith(("_loss", "_rows"))
        }
    assert found["eval_a_rows"] == 3 and found["eval_b_rows"] == 5
    assert trainer.evaluate(ROWS[:2])["eval_rows"] == 2
    loaders = [*trainer._eval_dataloaders.values(), trainer.callback_handler.eval_dataloader]
    assert len({id(loader) for loader in loaders}) == 3  # those of the trainer's own sets are used again
    for loader in loaders:  # left to the garbage collector each takes five seconds
        loader._iterator._shutdown_workers()


def test_the_trainers_own_set_is_not_prepared_again(tmp_path, caplog):
    trainer = trainer_for(tmp_path, eval_dataset=[*plain(ROWS[:3]), *masked_whole(1)])
    caplog.clear()
    trainer.evaluate(), trainer.evaluate()
    assert set(trainer.encoding_reports) == {"train_dataset", "eval_dataset"} and "rows kept" not in caplog.text


# ------------------------------------------------------------------------------------------------------- construction


def test_a_tokenizer_without_padding_token_pads_with_its_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    both = (tokenizer, tiny_tokenizer())
    trainer, expected = (trainer_for(tmp_path, eval_dataset=ROWS[:5], processing_class=one) for one in both)
    trainer.train(), expected.train()
    assert losses(trainer) == losses(expected) and tokenizer.pad_token_id is None
    assert numbers(trainer.evaluate()) == numbers(expected.evaluate())


def test_students_that_are_made_or_wrapped_elsewhere(tmp_path):
    more = {"args": arguments(tmp_path), "train_dataset": ROWS, "processing_class": tiny_tokenizer()}
    with pytest.raises(UserError, match="model: got None, expected the student"):
        DistillationTrainer(None, tiny_llama(), **more)
    with pytest.raises(UserError, match=r"peft_config: got object, expected one of peft's"):
        DistillationTrainer(tiny_llama(), tiny_llama(), peft_config=object(), **more)


def test_added_tokens_are_no_padding(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>", "<call>"])
    student = tiny_llama(vocab=TINY_VOCAB + 2)
    advice = (
        r"the teacher does not know the tokens from id 320 on .*'<tool>', '<call>'.*resize_token_embeddings\(322\)"
    )
    for known in (None, tiny_tokenizer()):
        with pytest.raises(UserError, match=advice) as error:
            trainer_for(tmp_path, student, processing_class=tokenizer, teacher_tokenizer=known)
        assert "padding" not in str(error.value) and "truncate_to_tokenizer" not in str(error.value)
    with pytest.raises(UserError, match=r"train_dataset: row 1 \(id 'r1'\): token id 320 .*add it to both, or leave"):
        trainer_for(tmp_path, student, processing_class=tokenizer, vocab_alignment="intersect",
                    rows=[ROWS[0], {**ROWS[1], "instruction": "<tool> it"}])  # fmt: skip


def test_what_is_saved_after_training_may_generate(tmp_path):
    student = tiny_llama(seed=0)
    assert student.config.use_cache
    trainer = trainer_for(tmp_path, student, options={"activation_checkpointing": True})
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert tiny_llama().config.from_pretrained(tmp_path / "final").use_cache


def test_a_report_of_nothing_lost(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for(tmp_path, eval_dataset=plain(), max_length=128, max_prompt_length=64)
    assert not [record for record in caplog.records if record.name.startswith("dts_hf")]
    raw, tokenised = trainer.encoding_reports["train_dataset"], trainer.encoding_reports["eval_dataset"]
    assert raw.template == "chat" and dataclasses.replace(raw, template="") == tokenised
    assert raw.is_whole and math.isfinite(raw.response_tokens)
    assert isinstance(trainer.eval_dataset, TokenisedDataset)
