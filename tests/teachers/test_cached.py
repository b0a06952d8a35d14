"""A cached teacher is the live one: through the trainer, at every temperature, however rows are put into batches."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import time

import pytest
import torch

from dts_hf.data.chat_templates import get_template
from dts_hf.data.encoding import EncodedDataset
from dts_hf.errors import UserError
from dts_hf.teachers.cached.layout import bytes_per_label
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.cached.writer import Facts, Rows, make_plan, write_cache
from dts_hf.teachers.identity import identity_of
from dts_hf.teachers.live import LiveTeacher
from tests.support.cached import cache_of
from tests.support.cached_reading import rows_in_worker
from tests.support.launching import WORKERS
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import (
    ROWS,
    encoded,
    largest_difference,
    losses,
    plain,
    step_gradients,
    temperatures,
    trainer_for,
)
from tests.support.warm import run_warm


def teacher():
    return tiny_llama(seed=1, layers=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_of(tmp_path_factory.mktemp("cache") / "states", teacher(), shard_bytes=4000)


def run(folder, with_teacher, **options):
    training = {"max_steps": 20, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05}
    trainer = trainer_for(folder, teacher=with_teacher, options={**training, **options.pop("options", {})}, **options)
    trainer.train()
    return trainer


POLICIES = {
    "T 0.5": 0.5,
    "T 1": 1.0,
    "T 4": 4.0,
    "dts gap": {"name": "dts", "rule": "gap"},
    "dtkd": "dtkd",
}


@pytest.mark.parametrize("packing", [False, True, {"tokens": 160}], ids=["padded", "packed", "packs"])
@pytest.mark.parametrize("policy", POLICIES)
def test_cached_training_is_live_training(tmp_path, cache, policy, packing):
    """SGD: Adam divides by the root of squared gradients, and turns the noise of fp32 sums into 1e-6 by itself."""
    options = {"temperature": POLICIES[policy], "packing": packing, "eval_dataset": encoded()}
    live, cached = run(tmp_path / "a", teacher(), **options), run(tmp_path / "b", CachedTeacher(cache), **options)
    assert len(losses(live)) == 20
    torch.testing.assert_close(torch.tensor(losses(cached)), torch.tensor(losses(live)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(temperatures(cached)), torch.tensor(temperatures(live)), rtol=1e-6, atol=1e-6
    )
    weights = zip(cached.model.parameters(), live.model.parameters(), strict=True)
    assert max(float((one - other).detach().abs().max()) for one, other in weights) < 1e-6
    one, other = cached.evaluate(), live.evaluate()
    assert one["eval_kl"] == pytest.approx(other["eval_kl"], abs=1e-6)
    assert one["eval_teacher_ce"] == pytest.approx(other["eval_teacher_ce"], abs=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_cached_gradients_are_live_gradients(tmp_path, cache, policy):
    gradients = []
    for number, with_teacher in enumerate((teacher(), CachedTeacher(cache))):
        trainer = trainer_for(tmp_path / str(number), teacher=with_teacher, temperature=POLICIES[policy])
        batches = [trainer.collate([trainer.train_dataset[row] for row in part]) for part in (range(5), range(5, 16))]
        gradients.append(step_gradients(trainer, batches))
    assert largest_difference(*gradients) < 1e-6


def test_two_processes_with_a_cache_are_two_with_the_live_teacher(tmp_path, cache):
    done = run_warm(WORKERS / "cached_worker.py", 2, [tmp_path, cache], strategy="ddp")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "0.json").read_text())
    assert record["world"] == 2
    for packing in ("False", "True"):
        live, cached = record[f"live {packing}"], record[f"cached {packing}"]
        for key in ("losses", "temperatures", "weights"):
            assert len(live["losses"]) == 20
            torch.testing.assert_close(torch.tensor(cached[key]), torch.tensor(live[key]), rtol=1e-6, atol=1e-6)


def test_the_backbone_is_not_in_memory(tmp_path, cache):
    trainer = trainer_for(tmp_path, teacher=CachedTeacher(cache))
    assert trainer.teacher_model is None and trainer.teacher.live is None
    assert trainer.teacher.head.weight.shape == (320, 32)


def test_batches_bring_the_states_of_the_live_teacher(tmp_path, cache):
    """Whatever the order and the size of a batch; as whole numbers, which no Trainer casts."""
    trainer = trainer_for(tmp_path, teacher=CachedTeacher(cache), options={"dataloader_num_workers": 2})
    live = LiveTeacher(teacher())
    seen = 0
    for batch in trainer.get_train_dataloader():
        assert not batch["teacher_states"].is_floating_point() and "teacher_states_missing" not in batch
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        expected = live.states(inputs, batch["labels"])
        torch.testing.assert_close(trainer.teacher.states(batch, batch["labels"]), expected, rtol=0, atol=2e-6)
        seen += len(batch["row_id"])
    assert seen == len(ROWS)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_cache_is_read_by_other_processes(cache, method):
    opened = StateCache(cache)
    expected = [opened.row(number).sum().item() for number in range(4)]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=rows_in_worker, args=(opened, range(4), queue))
    worker.start()
    assert queue.get(timeout=60) == expected
    worker.join()


def test_a_cache_is_sent_without_its_maps(cache):
    opened = StateCache(cache)
    opened.row(0)
    assert len(pickle.dumps(opened)) < 1000 and len(pickle.loads(pickle.dumps(opened))) == len(ROWS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_size_and_error_by_type(tmp_path, dtype):
    model = tiny_llama(seed=1, hidden=256)
    folder = cache_of(tmp_path / "states", model, dtype=dtype)
    opened = StateCache(folder)
    payload = opened.manifest.labels * bytes_per_label(256, dtype)
    files = sum(path.stat().st_size for path in folder.glob("states-*"))
    assert files <= 1.03 * payload + 4096, (files, payload)  # the fixed head of a shard, of tiny rows
    exact = StateCache(cache_of(tmp_path / "exact", model))
    apart = max(float((opened.row(n).float() - exact.row(n)).abs().max()) for n in range(len(ROWS)))
    assert apart <= {"float32": 0.0, "bfloat16": 0.02, "int8": 0.03}[dtype]
    assert (apart > 0) == (dtype != "float32")
    trainer = trainer_for(tmp_path / "run", model=tiny_llama(), teacher=CachedTeacher(opened))
    trainer.train()
    assert torch.isfinite(torch.tensor(losses(trainer))).all()


def test_a_bf16_teacher_is_cached_without_loss(tmp_path):
    model = teacher().bfloat16()
    opened = StateCache(cache_of(tmp_path / "states", model, batch_tokens=10**6))
    assert opened.manifest.dtype == "bfloat16"
    example = encoded()[3]
    ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
    live = LiveTeacher(model).states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)
    torch.testing.assert_close(opened.row(3).float(), live.float(), rtol=0.02, atol=0.02)  # another batch


def test_rows_that_somebody_else_has_tokenised(tmp_path, cache):
    trainer = run(tmp_path, CachedTeacher(cache), train_dataset=plain(), options={"max_steps": 1})
    assert len(losses(trainer)) == 1


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_missing_rows_are_answered_by_the_live_teacher(tmp_path, packing):
    folder = cache_of(tmp_path / "states", teacher(), encoded(ROWS[:9]))
    model = teacher()
    live = run(tmp_path / "a", teacher(), temperature=2.0, packing=packing)
    filled = run(tmp_path / "b", CachedTeacher(folder, LiveTeacher(model)), temperature=2.0, packing=packing)
    torch.testing.assert_close(torch.tensor(losses(filled)), torch.tensor(losses(live)), rtol=1e-6, atol=1e-6)


class Silent(LiveTeacher):
    """Its states are all alike: what a cache of a million labels is made of costs no forward pass."""

    def states(self, batch, labels, positions=None):
        return torch.ones(int((labels[:, 1:] != -100).sum()), 8)


def test_a_million_labels_open_in_a_second(tmp_path):
    """Reading a row maps its shard alone: memory grows by what is read."""
    ids = torch.randint(3, 64, (2500, 401), generator=torch.Generator().manual_seed(0)).tolist()
    data = EncodedDataset([f"row-{number}" for number in range(len(ids))], ids, [1] * len(ids))
    model = tiny_llama(vocab=64, hidden=8, layers=1)
    identity = identity_of(model, tiny_tokenizer(), get_template("plain"), name="t")
    plan = make_plan(Rows(data, data.row_ids), identity, shard_bytes=4 << 20, batch_tokens=1 << 16)
    write_cache(tmp_path, Silent(model), Rows(data, data.row_ids), plan, Facts({}, {}, 320))
    began = time.monotonic()
    teacher = CachedTeacher(tmp_path)
    seconds = time.monotonic() - began
    assert teacher.cache.manifest.labels == 1_000_000 and seconds <= 1.0, seconds
    assert not teacher.cache._open
    teacher.cache.row(0)
    assert len(teacher.cache._open) == 1 < len(teacher.cache.manifest.shards)


def test_a_trainer_does_not_go_on_with_another_cache(tmp_path, cache):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path / "run", teacher=CachedTeacher(cache), options=options).train()
    other = cache_of(tmp_path / "states", tiny_llama(seed=2, layers=3))
    with pytest.raises(UserError, match=r"teacher\.cached_teacher\.weights: was"):
        trainer_for(tmp_path / "run", teacher=CachedTeacher(other), options=options).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )
    again = trainer_for(tmp_path / "run", teacher=CachedTeacher(cache), options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert again.state.global_step == 2


def test_temperatures_of_the_live_teacher_are_compared(tmp_path, cache, caplog):
    """A live teacher at hand scores some rows again, and another one is refused though all checksums are right."""
    CachedTeacher(cache, LiveTeacher(teacher())).check_rows(
        encoded(), "train_dataset", tiny_tokenizer(), None, top=4.0
    )
    with pytest.raises(UserError, match=r"self-test failed: [\d,]+ labels scored again: at T = 1 mean KL"):
        CachedTeacher(cache, LiveTeacher(tiny_llama(seed=2, layers=3))).check_rows(
            encoded(), "train_dataset", tiny_tokenizer(), None
        )
