"""Streams through the trainer: the numbers of a list of the same rows, nothing lost in silence, and an exact resume."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import DataCollatorForLanguageModeling

from dts_hf.data.samplers import DUMMY_ROW
from dts_hf.data.streams import BLOCK
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from tests.support.launching import WORKERS
from tests.support.streams import FIT, IN_ORDER, LONG, MIXED, Stream, as_function, as_stream, rows_of_steps
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, encoded, losses, plain, trainer_for
from tests.support.warm import run_warm
from tests.workers.stream_worker import SAVED, trainer_of

EVAL = ("eval_loss", "eval_kl", "eval_ce_loss", "eval_teacher_ce", "eval_rows", "eval_labels")


class Shuffled(Stream):
    """Another order in each pass."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        return (self.rows[place] for place in order.tolist())


class OwnShares(Stream):
    """As the documentation of PyTorch has it: the workers share the rows out among themselves."""

    def __iter__(self) -> Any:
        worker = get_worker_info()
        return iter(self.rows if worker is None else self.rows[worker.id :: worker.num_workers])


MAKES = {"torch": Stream, "datasets": as_stream, "function": as_function}


def options(**more: Any) -> dict[str, Any]:
    return {"max_steps": 5, "per_device_train_batch_size": 4, "logging_steps": 1, **more}


def trained(folder: Path, rows: Any, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    trainer = trainer_for(folder, rows=rows, options=settings or options(), **more)
    trainer.train()
    return trainer


# ------------------------------------------------------------------------------------------------- as a list of the rows


@pytest.mark.parametrize("make", MAKES)
def test_raw_rows_are_encoded_on_the_way(tmp_path: Path, make: str) -> None:
    """Over two passes, the last steps of which are incomplete; rows that are too long are the same ones."""
    expected = trained(tmp_path, MIXED, options(max_steps=7, **IN_ORDER), **FIT)
    trainer = trained(tmp_path, MAKES[make](MIXED), options(max_steps=7), **FIT)
    assert losses(trainer) == losses(expected) and len(losses(trainer)) == 7
    assert trainer.temperature.state() == expected.temperature.state()


@pytest.mark.parametrize("make", ["torch", "datasets"])
@pytest.mark.parametrize("packing", [False, True])
def test_tokenised_rows_and_incomplete_accumulation(tmp_path: Path, make: str, packing: bool) -> None:
    """13 rows are 8 in two micro-batches, then 5: the step at the end of a pass is taken, with what there is."""
    settings = options(gradient_accumulation_steps=2, max_steps=4)
    expected = trained(tmp_path, plain(ROWS[:13]), {**settings, **IN_ORDER}, packing=packing)
    trainer = trainer_for(tmp_path, rows=MAKES[make](plain(ROWS[:13])), options=settings, packing=packing)
    seen = rows_of_steps(trainer)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
    one_pass = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12] + [DUMMY_ROW] * 3]
    assert seen == one_pass * 2


def test_drop_last_leaves_the_same_rows_out(tmp_path: Path) -> None:
    settings = options(dataloader_drop_last=True, gradient_accumulation_steps=2, max_steps=4)
    expected = trained(tmp_path, plain(ROWS[:13]), {**settings, **IN_ORDER})
    trainer = trainer_for(tmp_path, rows=Stream(plain(ROWS[:13])), options=settings)
    seen = rows_of_steps(trainer)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
    assert seen[2:4] == [[8, 9, 10, 11], [DUMMY_ROW] * 4] and all(12 not in rows for rows in seen)


def test_more_rows_than_a_block(tmp_path: Path) -> None:
    rows = [{**ROWS[k % 16], "id": str(k)} for k in range(BLOCK + 7)]
    settings = options(per_device_train_batch_size=BLOCK + 3, max_steps=2)
    expected = trained(tmp_path, rows, {**settings, **IN_ORDER})
    trainer = trained(tmp_path, Stream(rows), settings)
    assert losses(trainer) == losses(expected)
    assert trainer.encoding_reports["train_dataset"].rows == BLOCK + 7


@pytest.mark.parametrize("make", [Shuffled, lambda rows: as_stream(rows).shuffle(seed=3, buffer_size=8)])
def test_each_pass_has_an_order_of_its_own_and_every_row_once(tmp_path: Path, make: Any) -> None:
    trainer = trainer_for(tmp_path, rows=make(ROWS), options=options(max_steps=8))
    texts: list[list[int]] = []
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        real = inputs["attention_mask"].sum(-1)
        texts.extend(ids[:length].tolist() for ids, length in zip(inputs["input_ids"], real, strict=True))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer.train()
    expected = sorted(encoded()[i]["input_ids"] for i in range(16))
    assert sorted(texts[:16]) == sorted(texts[16:]) == expected and texts[:16] != texts[16:]


def test_a_collator_of_the_users_and_labels_of_its_own(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"]} for row in plain()]
    collator = partial(DataCollatorForLanguageModeling, tiny_tokenizer(pad="own"), mlm=False)
    expected = trained(tmp_path, rows, options(**IN_ORDER), data_collator=collator())
    trainer = trained(tmp_path, as_stream(rows).with_format("torch"), data_collator=collator())
    assert losses(trainer) == losses(expected)

    class Broken:
        def __call__(self, rows: Any) -> Any:
            raise KeyError("pixels")

    with pytest.raises(UserError, match="data_collator: Broken cannot make a batch of the first row: 'pixels'"):
        trainer_for(tmp_path, rows=Stream(plain()), options=options(), data_collator=Broken())


# --------------------------------------------------------------------------------------------------- nothing in silence


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "dts_hf.training.datasets"]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_became_of_the_rows_is_said_at_checkpoints_and_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    """A worker that reads them counts them for the process that trains."""
    settings = options(save_strategy="steps", save_steps=2, dataloader_num_workers=workers)
    trainer = trained(tmp_path, Stream([*MIXED, {**ROWS[0], "output": "so " * 50}]), settings, max_length=70,
                      max_prompt_length=64, long_rows="cut")  # fmt: skip
    report = trainer.encoding_reports["train_dataset"]
    assert (report.rows, report.kept, report.dropped, report.cut) == (17, 17, 0, 4)
    assert said(caplog)[0].startswith("train_dataset, as far as it was read: 17 of 17 rows kept; responses cut: 4; ")
    assert len(said(caplog)) == 1  # and once is enough, as long as there is nothing new
    caplog.clear()
    trainer = trained(tmp_path / "dropped", Stream(MIXED), settings, **FIT)
    report = trainer.encoding_reports["train_dataset"]
    assert (report.rows, report.kept, report.dropped) == (16, 13, 3)
    assert report.dropped_ids == ["row 4", "row 11", "row 12"]
    assert "13 of 16 rows kept; dropped as too long: 3 (row 4, row 11, row 12)" in said(caplog)[0]
    assert report.response_tokens == sum(label != IGNORE_INDEX for row in plain(ROWS[:13]) for label in row["labels"])


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_are_left_out_are_called_by_their_ids(tmp_path: Path, workers: int) -> None:
    """Their place in a shuffled stream leads to another row; an id of any length and script is shown, or its beginning."""
    names = ["Pflaume-é", "x" * 200]
    rows = [{**row, "id": name} for row, name in zip([LONG, LONG], names, strict=True)] + list(MIXED[:3])
    settings = options(max_steps=2, dataloader_num_workers=workers)
    report = trained(tmp_path, Shuffled(rows), settings, **FIT).encoding_reports["train_dataset"]
    assert report.dropped >= 2 and {"Pflaume-é", "x" * 80} <= {*report.dropped_ids}


def test_rows_that_teach_nothing_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    masked = [{**row, "labels": [IGNORE_INDEX] * len(row["labels"])} for row in plain()]
    trainer = trained(tmp_path, Stream([*masked[:2], *plain()]), options(max_steps=2, per_device_train_batch_size=2))
    assert caplog.text.count("step 1: none of its rows has a label") == 1 and trainer.state.global_step == 2
    assert trainer.encoding_reports["train_dataset"].unlabelled_ids == ["row 0", "row 1"]
    caplog.clear()
    with pytest.raises(UserError, match="train_dataset: none of the rows of 2 steps has a label"):
        trained(tmp_path, Stream(masked), options(max_steps=2, per_device_train_batch_size=2))
    assert caplog.text.count("none of its rows has a label") == 1
    with pytest.raises(UserError, match="train_dataset: none of its 16 rows has a label that counts"):
        trained(tmp_path, Stream(masked), options(per_device_train_batch_size=16))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_row_is_named_by_its_number(tmp_path: Path, workers: int) -> None:
    settings = options(dataloader_num_workers=workers)
    with pytest.raises(UserError, match=r"^train_dataset: row 3: .*'output'"):
        trained(tmp_path, Stream([*ROWS[:2], {"instruction": "a"}]), settings)
    if workers:
        return
    with pytest.raises(UserError, match=r"^train_dataset: row 2 has 1 labels for 3 input_ids, expected as many$"):
        trained(tmp_path, Stream([*plain()[:2], {"input_ids": [4, 5, 6], "labels": [4]}]), settings)


def test_the_first_row_is_looked_at_before_training(tmp_path: Path) -> None:
    for rows, message in (
        ([{"instruction": "a"}], "train_dataset: row 1: .*'output'"),
        ([{"input_ids": [4, 5, 6], "labels": [4]}], "train_dataset: row 0 has 1 labels for 3 input_ids"),
        ([], "train_dataset: there are no rows in it"),
    ):
        with pytest.raises(UserError, match=message):
            trainer_for(tmp_path, rows=Stream(rows), options=options())
    row = {"input_ids": [5] * 40, "labels": [5] * 40}
    with pytest.raises(UserError, match=r"row 0 has 40 tokens, but the student \(LlamaForCausalLM\) has 32 positions"):
        trainer_for(tmp_path, tiny_llama(max_positions=32), rows=Stream([row]), options=options())


def test_a_stream_with_nothing_left_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_dataset: no row left: all 2 rows are too long"):
        trained(tmp_path, Stream([LONG, LONG]), **FIT)

    class OnceInDisguise(Stream):
        def __iter__(self) -> Any:
            yield from self.rows

    rows = iter(ROWS)
    next(rows)
    with pytest.raises(UserError, match="train_dataset: gave rows once, and none when it was read again"):
        trained(tmp_path, OnceInDisguise(rows))


def test_arguments_that_a_stream_cannot_follow_are_refused(tmp_path: Path) -> None:
    stream = Stream(ROWS)
    for settings, more, message in (
        (
            {"max_steps": -1},
            {},
            r"training.max_steps: got -1, expected a number of steps.*as train_dataset is a stream",
        ),
        ({"train_sampling_strategy": "group_by_length"}, {}, "training.train_sampling_strategy: got group_by_length"),
        ({}, {"packing": {"tokens": 300}}, "an iterable data set has no lengths to pack by"),
    ):
        with pytest.raises(UserError, match=message):
            trainer_for(tmp_path, rows=stream, options=options(**settings), **more)
    with pytest.raises(UserError, match="train_dataset: got a generator, which can be read once"):
        trainer_for(tmp_path, rows=as_function(ROWS)(), options=options())

    class Once(IterableDataset):
        rows = iter(ROWS)

        def __iter__(self) -> Any:
            return self.rows

    with pytest.raises(UserError, match="train_dataset: got an iterable data set that can be read once"):
        trainer_for(tmp_path, rows=Once(), options=options())
    with pytest.raises(UserError, match="train_dataset: the function returned int, expected rows"):
        trainer_for(tmp_path, rows=lambda: 3, options=options())
    with pytest.raises(UserError, match="train_dataset: got the class Once, expected an instance"):
        trainer_for(tmp_path, rows=type("Once", (), {}), options=options())


# --------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("settings", [{"dataloader_num_workers": 3},
                                      {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}])  # fmt: skip
def test_workers_change_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    """One of them reads; and one that lives on over the passes is told which one it is."""
    for make in (Shuffled, OwnShares)[: 2 if settings["dataloader_num_workers"] == 3 else 1]:
        expected = trained(tmp_path, make(ROWS))
        trainer = trained(tmp_path, make(ROWS), options(**settings))
        assert losses(trainer) == losses(expected)
        assert trainer.args.dataloader_num_workers == settings["dataloader_num_workers"]


# ------------------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize(("make", "size"), [("torch", 1), ("datasets", 4), ("function", 32)])
def test_held_out_streams_are_measured_as_lists_are(tmp_path: Path, make: str, size: int) -> None:
    settings = options(per_device_eval_batch_size=size)
    expected = trainer_for(tmp_path, eval_dataset=MIXED, options=settings, **FIT).evaluate()
    trainer = trainer_for(tmp_path, eval_dataset=MAKES[make](MIXED), options=settings, **FIT)
    for _ in range(2):  # read anew each time
        values = trainer.evaluate()
        assert {name: values[name] for name in EVAL} == pytest.approx(
            {name: expected[name] for name in EVAL}, rel=1e-6
        )
        assert values["eval_rows"] == 13
        assert values["eval_samples_per_second"] * values["eval_runtime"] == pytest.approx(13, rel=0.01)
    assert trainer.encoding_reports["eval_dataset"].dropped == 3


def test_held_out_streams_wherever_rows_may_be_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(tmp_path, eval_dataset={"raw": Stream(MIXED), "tokens": as_stream(plain(ROWS[:13]))},
                          options=options(max_steps=4, eval_strategy="steps", eval_steps=2), **FIT)  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_raw_rows" in log]
    assert [log["eval_raw_rows"] for log in logs] == [13, 13]
    assert (
        "eval_dataset['raw'], as far as it was read: 13 of 16 rows kept" in said(caplog)[0] and len(said(caplog)) == 1
    )
    given = trainer.evaluate(Stream(ROWS[:3]))
    assert given["eval_rows"] == trainer.evaluate(ROWS[:3])["eval_rows"] == 3
    predicted = trainer.predict(as_function(ROWS[:5]))
    assert predicted.metrics["test_rows"] == 5
    assert predicted.metrics["test_loss"] == pytest.approx(trainer.predict(ROWS[:5]).metrics["test_loss"], rel=1e-6)
    with pytest.raises(UserError, match="evaluate: no row left: all 1 rows are too long"):
        trainer.evaluate(Stream([LONG]))
    with pytest.raises(
        UserError, match=r"predict: got several data sets \(a\), expected one of them, such as data\['a'\]"
    ):
        trainer.predict({"a": ROWS})


def test_a_held_out_stream_leaves_training_as_it_was(tmp_path: Path) -> None:
    found = []
    for strategy in ("no", "steps"):
        settings = options(eval_strategy=strategy, eval_steps=1)
        found.append(losses(trained(tmp_path, Stream(ROWS), settings, eval_dataset=Stream(ROWS[:3]))))
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------------------------- resume


def log_lines(trainer: Any) -> list[dict[str, Any]]:
    timed = ("runtime", "per_second", "flos", "train_loss")
    return [
        {name: value for name, value in log.items() if not name.endswith(timed)} for log in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    ("make", "steps"),
    [(Shuffled, (2, 4, 6)), (lambda rows: as_stream(rows).shuffle(seed=1, buffer_size=4), (5,))],
    ids=["torch", "datasets"],
)
def test_a_resume_goes_on_in_the_pass_where_it_stood(tmp_path: Path, make: Any, steps: tuple[int, ...]) -> None:
    """Passes of 4 steps: from the middle of the first and of the second, and from the end of one."""
    settings = options(max_steps=7, save_strategy="steps", save_steps=1, eval_strategy="epoch")
    more = {**FIT, "eval_dataset": Stream(ROWS[:3])}
    straight = trained(tmp_path / "run", make(MIXED), settings, **more)
    assert (
        sum("eval_loss" in log for log in straight.state.log_history) == 2
    )  # at the end of each pass, and of the run
    for step in steps:
        again = trainer_for(tmp_path / "run", tiny_llama(seed=5), rows=make(MIXED), options=settings, **more)
        again.train(resume_from_checkpoint=tmp_path / "run" / f"checkpoint-{step}")
        assert log_lines(again) == log_lines(straight), step
        assert all(
            torch.equal(value, straight.model.state_dict()[name]) for name, value in again.model.state_dict().items()
        )


def test_a_resume_from_the_end_of_a_pass_does_not_end_it_twice(tmp_path: Path) -> None:
    settings = options(max_steps=6, save_strategy="epoch", eval_strategy="epoch", gradient_accumulation_steps=2)
    more = {"eval_dataset": ROWS[:3]}
    straight = trained(tmp_path, Stream(plain()), settings, **more)
    place = json.loads((tmp_path / "checkpoint-2" / "progress.json").read_text())["stream"]
    assert (place["pass"], place["steps"]) == (1, 0)
    again = trainer_for(tmp_path, tiny_llama(seed=5), rows=Stream(plain()), options=settings, **more)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert log_lines(again) == log_lines(straight)


def test_a_resume_with_other_rows_is_refused(tmp_path: Path) -> None:
    settings = options(max_steps=2, save_strategy="steps", save_steps=1)
    trained(tmp_path, Stream(ROWS), settings)
    again = trainer_for(tmp_path, rows=Stream(ROWS[::-1]), options=settings)
    with pytest.raises(UserError, match="train_dataset begins with another row than when it was written"):
        again.train(resume_from_checkpoint=tmp_path / "checkpoint-1")


# ----------------------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_share_a_stream_out_as_one_takes_it(tmp_path: Path) -> None:
    """Each row once; weights, losses, temperature and held-out numbers are those of the list; a resume is exact."""
    done = run_warm(WORKERS / "stream_worker.py", 2, [tmp_path], "ddp", timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"result.{rank}.json").read_text()) for rank in (0, 1))
    for name in ("list", "torch", "datasets", "function", "tokens", "workers", "resumed"):
        one, other, expected = first[name], second[name], first["list"]
        assert one["weights"] == other["weights"] == pytest.approx(expected["weights"], rel=1e-7), name
        assert one["losses"] == expected["losses"] and one["temperature"] == expected["temperature"], name
        assert one["held_out"] == pytest.approx(expected["held_out"], rel=1e-6), name
        assert one["held_out"][2] == 13, name
    rows = [
        sorted(row for of_rank in (first, second) for step in of_rank["torch"]["rows"][:2] for row in step if row >= 0)
    ]
    assert rows == [[0, 1, 2, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15]]  # 13 rows in two steps of eight, each once
    assert first["report"] == second["report"] == [16, 13, 3]
    for result in (first, second):
        assert "its first row is another one on each process" in result["unseeded"]
        assert result["wrong"].startswith("train_dataset: row 14: ")
    # One process goes on from their third step, with as many rows in a step
    alone = trainer_of(
        tmp_path / "torch",
        Stream(MIXED),
        Stream(MIXED),
        seed=5,
        strategy="single",
        per_device_train_batch_size=4,
        **SAVED,
    )
    alone.train(resume_from_checkpoint=tmp_path / "torch" / "checkpoint-3")
    assert losses(alone) == pytest.approx(first["list"]["losses"], rel=1e-5)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_sharded_students_take_a_stream_as_a_list(tmp_path: Path, strategy: str) -> None:
    """Every process runs as many forwards as the others, or this never ends."""
    done = run_warm(WORKERS / "stream_worker.py", 2, [tmp_path, strategy], strategy, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.0.json").read_text())
    for name in ("losses", "temperature", "held_out"):
        assert result["torch"][name] == pytest.approx(result["list"][name], rel=1e-6), name
