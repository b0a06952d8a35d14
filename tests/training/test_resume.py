"""A run that is killed and resumed ends, bit for bit, where it would have ended: weights, temperature, log, scores."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dts_hf.distill import end_early
from dts_hf.errors import UserError
from dts_hf.files import digest
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.checkpoints import checkpoints, mark_complete, newest_complete, read_complete, rotate, why_incomplete
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.lock import LOCK, lock, unlock
from tests.support.ends import end_of, finish, log_of, refused, without_times
from tests.workers.resume_worker import HAS_DEEPSPEED, Life, prepare, recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    prepare(folder)
    return folder


# --------------------------------------------------------------------------------------- straight against killed


LAUNCHES = [(1, "single"), (2, "ddp"), *([(2, "zero3")] if HAS_DEEPSPEED else [])]


def of_launch(world: int, output: str, **sections: dict[str, Any]) -> dict[str, Any]:
    training = {"gradient_accumulation_steps": 2 // world, **sections.pop("training", {})}
    return recipe(output, training=training, **sections)


@pytest.fixture(scope="module")
def straight(workplace: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """The end of ten steps without a break."""
    ends = {}
    for world, strategy in LAUNCHES:
        output = f"straight-{world}-{strategy}"
        finish(Life(workplace, of_launch(world, output), world, strategy))
        ends[world, strategy] = end_of(workplace / output)
    return ends


@pytest.mark.parametrize(("world", "strategy"), LAUNCHES)
def test_killed_and_resumed_ends_as_if_nothing_was(workplace, straight, world, strategy):
    expected = straight[world, strategy]
    output = f"killed-{world}-{strategy}"
    killed = Life(workplace, of_launch(world, output), world, strategy, kill_at_step=8)
    assert set(killed.wait()) == {-9}
    run = workplace / output
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-5"]
    record = read_complete(run / "checkpoint-5")
    assert (record["step"], record["processes"], record["strategy"]) == (5, world, strategy)
    assert len(log_of(run)) > len(expected["log"]) // 2  # the kill came after log lines that are to be made again
    resumed = Life(workplace, of_launch(world, output), world, strategy, resume=True)
    finish(resumed)
    assert "going on from step 5" in resumed.says()
    found = end_of(run)
    for part, value in expected.items():
        assert found[part] == value, part


@pytest.mark.soak
def test_batches_of_a_number_of_tokens_killed_and_resumed(workplace):
    """On two processes, in the middle of an epoch, after a save in the middle of one."""

    def life(output: str, **how: Any) -> Life:
        values = recipe(output, data={"packing": {"tokens": 60}}, training={"gradient_accumulation_steps": 1})
        return Life(workplace, values, 2, "ddp", **how)

    finish(life("packs-straight"))
    state = json.loads((workplace / "packs-straight" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["epoch"] % 1 > 0
    assert set(life("packs-killed", kill_at_step=8).wait()) == {-9}
    resumed = life("packs-killed", resume=True)
    finish(resumed)
    assert "going on from step 5" in resumed.says()
    found, expected = (end_of(workplace / name) for name in ("packs-killed", "packs-straight"))
    for part, value in expected.items():
        assert found[part] == value, part


def test_what_is_compared_can_differ(straight):
    """Dropout, CTKD and the data position matter: the ends of the launches are not one another's."""
    ends = list(straight.values())
    assert len({end["final"]["model.safetensors"] for end in ends}) == len(ends)
    kinds = [record["kind"] for record in ends[0]["log"]]
    assert (kinds.count("train"), kinds.count("generation"), kinds.count("eval")) == (3, 4, 4)
    assert ends[0]["temperature"]["name"] == "ctkd" and ends[0]["temperature"]["state"]["steps"] == 10


# ------------------------------------------------------------------------------------------------ at random moments

OFTEN = {"save_steps": 2, "save_total_limit": 1}


@pytest.fixture(scope="module")
def often(workplace: Path) -> tuple[dict[str, Any], float]:
    """The end of a run that saves every second step, and how long it took, seconds."""
    life = Life(workplace, recipe("often", training=OFTEN))
    started = time.monotonic()
    finish(life)
    return end_of(workplace / "often"), time.monotonic() - started


@pytest.mark.parametrize("case", [pytest.param(n, marks=[] if n < 3 else pytest.mark.soak) for n in range(20)])
def test_killed_at_a_random_moment(workplace, often, case):
    """Twenty of twenty (the last twelve are soak); the odd ones die while a checkpoint is being written or removed."""
    expected, seconds = often
    draw = random.Random(case)
    values = recipe(f"random-{case}", training=OFTEN)
    if case % 2:
        life = Life(workplace, values, kill_at_write=draw.randrange(150))
        assert life.wait() in ([-9], [0])
    else:
        life = Life(workplace, values)
        time.sleep(draw.uniform(0.1, 1.0) * seconds)
        life.kill()
    run = workplace / f"random-{case}"
    print("killed after step", [r["step"] for r in log_of(run)][-1:] if (run / "log.jsonl").is_file() else None)
    before = [(folder.name, why_incomplete(folder)) for folder in checkpoints(run)]
    print(before)
    if case % 4 == 1:  # once more
        Life(workplace, values, resume=True, kill_at_write=draw.randrange(80)).wait()
    resumed = Life(workplace, values, resume=True)
    finish(resumed)
    assert end_of(run) == expected, (before, resumed.says()[-2000:])


@pytest.mark.parametrize("call", ["fsync", "rmtree"])
def test_killed_with_half_a_file_or_half_a_folder(workplace, often, call):
    values = recipe(f"half-{call}", training=OFTEN)
    assert Life(workplace, values, kill_in=call).wait() == [-9]
    run = workplace / f"half-{call}"
    half, whole = {"fsync": ("checkpoint-4", "checkpoint-2"), "rmtree": ("checkpoint-8", "checkpoint-10")}[call]
    assert (run / half).is_dir() and why_incomplete(run / half) is not None
    assert newest_complete(run) == run / whole
    finish(Life(workplace, values, resume=True))
    assert end_of(run) == often[0]


# ------------------------------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    ("world", "strategy", "step"),
    [
        (1, "single", 4),  # answers were due
        (1, "single", 5),  # a checkpoint of its own was due
        (1, "single", 6),  # a log line, the end of the epoch and its evaluation were due
        (1, "single", 10),  # nothing of training is left but its last evaluation
        (2, "ddp", 6),
    ],
)
def test_interrupted_at_any_step_what_was_due_is_made_up_for(workplace, straight, world, strategy, step):
    output = f"asked-{world}-{strategy}-{step}"
    stopped = Life(workplace, of_launch(world, output), world, strategy, signal_at_step=step)
    assert set(stopped.wait()) == {75}, stopped.says()[-2000:]
    run = workplace / output
    assert newest_complete(run) == run / "interrupted" / f"checkpoint-{step}"
    resumed = Life(workplace, of_launch(world, output), world, strategy, resume=True)
    finish(resumed)
    assert f"going on from step {step}" in resumed.says()
    found = end_of(run)
    for part, value in straight[world, strategy].items():
        assert found[part] == value, part


def test_interrupted_where_the_recipe_saves_nothing_that_can_be_resumed(workplace, straight):
    """``save_only_model`` and ``save_strategy: no``: the checkpoint that a signal asks for is whole all the same."""
    for output, training in (("asked-no", {"save_strategy": "no"}), ("asked-only", {"save_only_model": True})):
        values = of_launch(1, output, training=training)
        assert Life(workplace, values, signal_at_step=7).wait() == [75]
        resumed = Life(workplace, values, resume=True)
        finish(resumed)
        assert "going on from step 7" in resumed.says()
        expected = straight[1, "single"]
        assert log_of(workplace / output) == expected["log"]
        final = hashlib.sha256((workplace / output / "final" / "model.safetensors").read_bytes()).hexdigest()
        assert final == expected["final"]["model.safetensors"]
        assert not (workplace / output / "interrupted").exists()


# -------------------------------------------------------------------------------------- what --resume finds and says


def killed_run(workplace: Path, output: str, step: int = 8, world: int = 1, **sections: dict[str, Any]) -> Path:
    values = of_launch(world, output, **sections)
    assert set(Life(workplace, values, world, "ddp" if world > 1 else "single", kill_at_step=step).wait()) == {-9}
    return workplace / output


def test_no_run_and_a_finished_one(workplace, straight):
    values = of_launch(1, "new")
    (workplace / "new").mkdir()
    (workplace / "new" / ".recipe.yaml.123.tmp").write_text("killed before anything was there")
    first = Life(workplace, values, resume=True)
    finish(first)
    assert "there is no run to resume, so this one starts from the beginning" in first.says()
    assert end_of(workplace / "new") == straight[1, "single"]
    before = {path: path.stat().st_mtime_ns for path in (workplace / "new").rglob("*")}
    second = Life(workplace, {**values, "output": {**values["output"], "dir": "new"}}, resume=True)
    finish(second)
    assert "this run is finished; nothing is trained again" in second.says()
    assert {path: path.stat().st_mtime_ns for path in (workplace / "new").rglob("*")} == before
    (workplace / "foreign").mkdir()
    (workplace / "foreign" / "thesis.tex").write_text("x")
    assert "holds no run of dts_hf, so it is not resumed" in refused(workplace, of_launch(1, "foreign"))


def test_killed_before_the_first_checkpoint_scores_are_not_made_again(workplace, straight):
    run = killed_run(workplace, "early", step=4)
    kept = json.loads((run / "scores.json").read_text())
    assert set(kept["models"]) == {"teacher", "student_before"}
    resumed = Life(workplace, of_launch(1, "early"), resume=True)
    finish(resumed)
    says = resumed.says()
    assert "there is no complete checkpoint, so the run starts from the beginning" in says
    assert "student before: ROUGE" not in says and "teacher: ROUGE" not in says
    assert end_of(run) == straight[1, "single"]


def test_a_damaged_checkpoint_is_ignored_aloud(workplace, often):
    run = workplace / "damaged"
    values = recipe("damaged", training={**OFTEN, "save_total_limit": 3})
    assert Life(workplace, values, kill_at_step=8).wait() == [-9]
    weights = run / "checkpoint-6" / "model.safetensors"
    whole = weights.stat().st_size
    with weights.open("rb+") as file:
        file.truncate(whole - 100)
    resumed = Life(workplace, values, resume=True)
    finish(resumed)
    said = f"checkpoint-6 is ignored: model.safetensors has {whole - 100:,} of {whole:,} bytes"
    assert said in resumed.says() and "going on from step 4" in resumed.says()
    assert end_of(run)["log"] == often[0]["log"] and weights.stat().st_size == whole
    assert end_of(run)["final"] == often[0]["final"]


def test_another_recipe_or_other_rows_are_refused_and_named(workplace):
    run = killed_run(workplace, "changed")
    says = refused(
        workplace,
        of_launch(
            1,
            "changed",
            training={"learning_rate": 0.1, "max_steps": 20},
            loss={"kd_ratio": 0.9},
            evaluation={"batch_size": 1},
        ),
    )
    assert "evaluation.batch_size: was" in says  # below fp32 what is answered together changes the answers
    assert "training.learning_rate: was 0.01, now 0.1" in says and "loss.kd_ratio: was 0.5, now 0.9" in says
    assert "training.max_steps: was 10, now 20" in says and "a longer one is another run" in says
    says = refused(workplace, of_launch(1, "changed", training={"per_device_train_batch_size": 4}))
    assert "an optimizer step had 4 rows and would have 8" in says
    assert "start the epoch again" in refused(workplace, of_launch(1, "changed", training={"ignore_data_skip": True}))
    rows = (workplace / "train.jsonl").read_text()
    try:
        (workplace / "train.jsonl").write_text(rows.replace("apples", "grapes"))
        assert "the rows of 'train' have changed since this run was started" in refused(
            workplace, of_launch(1, "changed")
        )
    finally:
        (workplace / "train.jsonl").write_text(rows)
    assert newest_complete(run) == run / "checkpoint-5"


def test_what_no_number_depends_on_may_change(workplace, straight):
    run = killed_run(workplace, "allowed")
    (workplace / "moved.jsonl").write_text((workplace / "train.jsonl").read_text())
    values = of_launch(1, "allowed", data={"train": "moved.jsonl"}, training={"save_steps": 4})
    resumed = Life(workplace, values, resume=True)
    finish(resumed)
    says = resumed.says()
    assert "resumed with training.save_steps: 4 (was 5)" in says and "resumed with data.train" in says
    assert [folder.name for folder in checkpoints(run)] == ["checkpoint-8", "checkpoint-10"]
    assert log_of(run) == straight[1, "single"]["log"]
    assert end_of(run)["final"] == straight[1, "single"]["final"]


def test_without_a_log_line_before_the_checkpoint_no_line_is_there_twice(workplace):
    values = of_launch(
        1,
        "unlogged",
        training={"save_steps": 4, "logging_steps": 5, "eval_strategy": "no"},
        evaluation={"every_steps": None, "models": ["student"]},
        data={"validation": None},
    )
    assert Life(workplace, values, kill_at_step=8).wait() == [-9]
    assert [record["step"] for record in log_of(workplace / "unlogged")] == [5]
    finish(Life(workplace, values, resume=True))
    assert [record["step"] for record in log_of(workplace / "unlogged")] == [5, 10]


def test_a_run_that_another_process_works_on_is_left_alone(workplace, straight):
    run = killed_run(workplace, "busy")
    assert (run / LOCK).is_file()  # its process is gone
    lock(run)  # by this process
    try:
        says = refused(workplace, of_launch(1, "busy"))
        assert f"another process is working on this run, busy (process {os.getpid()} on" in says
        lock(run)  # it is ours: no reason to refuse
    finally:
        unlock()
    assert not (run / LOCK).exists()
    finish(Life(workplace, of_launch(1, "busy"), resume=True))
    assert end_of(run) == straight[1, "single"]


def test_mixed_precision_of_the_launcher_is_compared(tmp_path):
    from tests.support.trainers import trainer_for

    trainer = trainer_for(tmp_path, options={"max_steps": 1})
    make_checkpoint(tmp_path, "checkpoint-1", **trainer.layout())
    trainer.check_resumable(tmp_path / "checkpoint-1")
    make_checkpoint(tmp_path, "checkpoint-2", **{**trainer.layout(), "mixed_precision": "bf16"})
    with pytest.raises(UserError, match="mixed precision was 'bf16' and would be 'no'"):
        trainer.check_resumable(tmp_path / "checkpoint-2")


def test_a_run_of_a_gpu_does_not_go_on_elsewhere(tmp_path):
    from tests.support.trainers import trainer_for

    trainer = trainer_for(tmp_path, options={"max_steps": 1})
    make_checkpoint(tmp_path, "checkpoint-1", **{**trainer.layout(), "device": "cuda"})
    with pytest.raises(UserError, match=r"the device was cuda and would be cpu \(training.use_cpu decides\)"):
        trainer.check_resumable(tmp_path / "checkpoint-1")
    of_old = trainer.layout()
    del of_old["device"]
    make_checkpoint(tmp_path, "checkpoint-2", **of_old)
    trainer.check_resumable(tmp_path / "checkpoint-2")


def test_a_finished_run_cleans_up(tmp_path):
    made = Recipe.from_dict(recipe(str(tmp_path / "run")), deep=False)
    run = RunDirectory.create(tmp_path / "run")
    run.save_recipe(made)
    make_checkpoint(run.path, "interrupted/checkpoint-7")
    (run.path / "broken_step-3.rank1.json").write_text("{}")
    args: Any = SimpleNamespace(process_index=0, push_to_hub=False)
    end_early(made, args)
    assert [path.name for path in run.path.iterdir()] == ["recipe.yaml"]


def test_adapters_go_on_too(workplace):
    student = {"model": "student", "lora": {"r": 4, "dropout": 0.1, "save": "merged"}}
    finish(Life(workplace, of_launch(1, "lora", student=student)))
    killed_run(workplace, "lora-killed", student={**student, "lora": {**student["lora"], "save": "adapter"}})
    finish(Life(workplace, of_launch(1, "lora-killed", student=student), resume=True))
    found, expected = (log_of(workplace / name) for name in ("lora-killed", "lora"))
    assert found == expected
    found, expected = (json.loads((workplace / name / "metrics.json").read_text()) for name in ("lora-killed", "lora"))
    assert without_times(found) == without_times(expected)  # scores from before training included
    weights = [(workplace / name / "final" / "model.safetensors").read_bytes() for name in ("lora-killed", "lora")]
    assert weights[0] == weights[1] != (workplace / "student" / "model.safetensors").read_bytes()


def test_the_number_of_processes_may_change_where_the_numbers_do_not(workplace):
    from safetensors.torch import load_file

    plain = {"student": {"model": None, "init": {"from": "teacher", "layers": 2}}}  # no dropout

    def values(world: int, output: str) -> dict[str, Any]:
        training = {"per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 1, "optim": "sgd",
                    "learning_rate": 0.3}  # fmt: skip
        # The last step of an epoch has two rows
        return recipe(output, training=training, data={"max_train_rows": 22}, **plain)

    finish(Life(workplace, values(2, "two"), 2, "ddp"))
    for first, then in ((2, 1), (1, 2)):
        output = f"from-{first}-to-{then}"
        strategies = {1: "single", 2: "ddp"}
        life = Life(workplace, values(first, output), first, strategies[first], kill_at_step=8)
        assert set(life.wait()) == {-9}
        finish(Life(workplace, values(then, output), then, strategies[then], resume=True))
        weights, expected = (load_file(workplace / run / "final" / "model.safetensors") for run in (output, "two"))
        assert all((weights[key] - expected[key]).norm() <= 1e-5 * expected[key].norm() for key in expected)
        for found, wanted in zip(log_of(workplace / output), log_of(workplace / "two"), strict=True):
            assert found.keys() == wanted.keys() and found["kind"] == wanted["kind"]
            assert {k: v for k, v in found.items() if not isinstance(v, str)} == pytest.approx(
                {k: v for k, v in wanted.items() if not isinstance(v, str)}, rel=1e-5, abs=1e-6
            )


def test_the_number_of_processes_may_not_change_otherwise(workplace):
    run = killed_run(workplace, "dropout", world=2)
    says = refused(workplace, of_launch(1, "dropout"))
    assert "batches are made of 4 rows of similar length, and would be of 2" in says
    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    says = refused(workplace, of_launch(1, "dropout", training=whole))
    assert "each process draws its own random numbers for Dropout" in says
    record = read_complete(run / "checkpoint-5")
    mark_complete(run / "checkpoint-5", **{**record, "strategy": "zero3"})
    says = refused(workplace, of_launch(2, "dropout"), 2, "ddp")
    assert "written by zero3 on 2 processes" in says and "ddp cannot read the files of zero3" in says


def test_a_classifier_goes_on_too_with_its_best_epoch(workplace):
    rows = [{"id": f"g{i}", "sentence": "good" if i % 3 else "bad", "label": int(i % 3 > 0)} for i in range(24)]
    (workplace / "glue.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def values(output: str) -> dict[str, Any]:
        made = recipe(output)
        made["data"] = {"train": "glue.jsonl", "validation": "glue.jsonl"}
        made["task"] = {"name": "glue", "subset": "sst2", "max_length": 16}
        made["teacher"] = None
        made["loss"] = {"kd_ratio": 0.0}
        made["evaluation"] = {}
        made["temperature"] = {"name": "constant"}
        made["training"] |= {"save_strategy": "epoch", "max_steps": 18, "logging_steps": 4, "save_total_limit": 1}
        for key in ("save_steps", "eval_strategy"):
            del made["training"][key]
        return made

    finish(Life(workplace, values("glue")))
    expected = end_of(workplace / "glue")
    for step, signalled in ((15, False), (8, True), (6, True)):
        output = f"glue-{step}"
        if signalled:
            assert Life(workplace, values(output), signal_at_step=step).wait() == [75]
        else:
            assert Life(workplace, values(output), kill_at_step=step).wait() == [-9]
        resumed = Life(workplace, values(output), resume=True)
        finish(resumed)
        found = end_of(workplace / output)
        for part, value in expected.items():
            assert found[part] == value, part
    # The best epoch is not the last one, and the folder has another name since
    moved = values("glue-renamed")
    moved["training"]["save_total_limit"] = 3
    assert Life(workplace, moved, kill_at_end=True).wait() == [-9]
    (workplace / "glue-renamed").rename(workplace / "glue-moved")
    moved["output"]["dir"] = "glue-moved"
    finish(Life(workplace, moved, resume=True))
    found = end_of(workplace / "glue-moved")
    assert expected["metrics"]["training"]["best_step"] < 18
    assert found["metrics"] == expected["metrics"] and found["final"] == expected["final"]


def test_a_halved_budget_and_a_sum_that_is_no_number_survive(tmp_path):
    from tests.support.trainers import trainer_for

    trainer = trainer_for(tmp_path, options={"max_steps": 1})
    trainer.train()
    trainer.loss.logits_budget_mb /= 2  # memory ran out
    trainer.sums.mean_log.totals, trainer._tr_loss = {"ce": math.nan, "rows": 2.0}, trainer._tr_loss * math.nan
    trainer.save_progress(tmp_path / "checkpoint-1")
    mark_complete(tmp_path / "checkpoint-1", step=1, resumable=True, **trainer.layout())
    other = trainer_for(tmp_path, options={"max_steps": 1})
    other.load_progress(tmp_path / "checkpoint-1")
    assert other.loss.logits_budget_mb == trainer.loss.logits_budget_mb == 128
    assert math.isnan(other.sums.mean_log.totals["ce"]) and other.sums.mean_log.totals["rows"] == 2.0
    third = trainer_for(tmp_path, options={"max_steps": 1}, logits_budget_mb=8)
    third.load_progress(tmp_path / "checkpoint-1")
    assert third.loss.logits_budget_mb == 8  # asked for since


# ------------------------------------------------------------------------------------------------- the folders alone


def make_checkpoint(run: Path, name: str, whole: bool = True, **values: Any) -> Path:
    folder = run / name
    (folder / "global_step").mkdir(parents=True)
    (folder / "weights").write_text("x" * 100)
    (folder / "global_step" / "shard").write_text("y" * 10)
    if not whole:
        (folder / "rank_0.json").write_text("{}")  # what ours begin with
    else:
        mark_complete(folder, step=int(name.rpartition("-")[2]), **{"resumable": True, **values})
    return folder


def test_whole_checkpoints_are_told_from_others(tmp_path):
    folder = make_checkpoint(tmp_path, "checkpoint-5")
    files = {name: {"size": (folder / name).stat().st_size, "digest": digest(folder / name)}
             for name in ("global_step/shard", "weights")}  # fmt: skip
    assert read_complete(folder) == {"format": 2, "step": 5, "resumable": True, "files": files}
    assert why_incomplete(folder) is None and newest_complete(tmp_path) == folder
    (folder / "more").write_text("not listed")
    assert why_incomplete(folder) is None
    (folder / "global_step" / "shard").write_text("y")
    assert why_incomplete(folder) == "global_step/shard has 1 of 10 bytes"
    (folder / "global_step" / "shard").unlink()
    assert why_incomplete(folder) == "global_step/shard is missing"
    for text in ("", "[]", '{"format": 2, "files": {}}', '{"format": 1}', "\x00"):
        (folder / "complete.json").write_text(text)
        assert why_incomplete(folder) == "its complete.json is damaged"
    assert "has no complete.json" in str(why_incomplete(make_checkpoint(tmp_path, "checkpoint-7", whole=False)))
    assert "no such folder" in str(why_incomplete(tmp_path / "checkpoint-8"))
    assert newest_complete(tmp_path) is None


def test_the_newest_is_the_newest_step_wherever_it_is(tmp_path):
    assert newest_complete(tmp_path) is None and checkpoints(tmp_path / "nowhere") == []
    for name in ("checkpoint-9", "checkpoint-10", "interrupted/checkpoint-11", "checkpoint-tmp", "my-checkpoint-99"):
        (make_checkpoint(tmp_path, name) if name[-1].isdigit() else (tmp_path / name)).mkdir(exist_ok=True)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert newest_complete(tmp_path) == tmp_path / "interrupted" / "checkpoint-11"
    own = make_checkpoint(tmp_path, "checkpoint-11")
    assert newest_complete(tmp_path) == own
    weights_alone = make_checkpoint(tmp_path, "checkpoint-12", resumable=False)
    assert newest_complete(tmp_path) == own and why_incomplete(weights_alone) is None


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, None, [2, 3, 4, 6, 8]),
        (2, None, [4, 6, 8]),
        (1, None, [6, 8]),
        (1, 2, [2, 6, 8]),
        (2, 2, [2, 6, 8]),
        (3, 2, [2, 4, 6, 8]),
        (9, None, [2, 4, 6, 8]),
    ],
)
def test_rotation_counts_whole_ones_up_to_this_step(tmp_path, limit, keep, left):
    """3 is what a kill left; 8 is of a life that went further and is not counted."""
    for step in (2, 4, 6, 8):
        make_checkpoint(tmp_path, f"checkpoint-{step}")
    make_checkpoint(tmp_path, "checkpoint-3", whole=False)
    for step in (5, 6, 7):
        make_checkpoint(tmp_path, f"interrupted/checkpoint-{step}")
    rotate(tmp_path, 6, limit, keep=[tmp_path / f"checkpoint-{keep}" if keep else None])
    assert sorted(int(f.name.split("-")[1]) for f in tmp_path.glob("checkpoint-*")) == left
    assert sorted(f.name for f in (tmp_path / "interrupted").iterdir()) == ["checkpoint-6", "checkpoint-7"]
