"""Several teachers of which some are cached or behind an address: the runs of the same teachers in memory."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from dts_hf.errors import UserError
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.training.trainer import DistillationTrainer
from tests.support.cached import cache_of
from tests.support.compact import CompactedTeacher
from tests.support.launching import WORKERS
from tests.support.served import running, served_tiny
from tests.support.tiny import TINY_VOCAB, tiny_llama, tiny_tokenizer
from tests.support.trainers import arguments, encoded, largest_difference, losses, step_gradients
from tests.support.two_teachers import NAMES, ROUTED, live_pair
from tests.support.warm import run_warm

#: Tiny models, for the noise of fp32 must stay below 1e-6: no Adam, which divides by what is almost nothing.
SGD = {"max_steps": 6, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05}
WAYS: dict[str, dict[str, Any]] = {
    "routed": {"teacher_column": "domain", "temperature_per_teacher": True},
    "weighted": {"teacher_weights": {"math": 0.3, "code": 0.7}, "temperature_per_teacher": True},
}


def own(name: str) -> list[dict[str, Any]]:
    return [row for row in ROUTED if row["domain"] == name]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By the way of sharing out: of each teacher's own rows, or of all rows."""
    folder = tmp_path_factory.mktemp("caches")
    rows = {"routed": own, "weighted": lambda name: ROUTED}
    return {
        way: {name: cache_of(folder / f"{way}-{name}", model, encoded(rows[way](name)), shard_bytes=4000)
              for name, model in live_pair().items()} for way in WAYS
    }  # fmt: skip


def trainer_of(folder: Any, teachers: Any, way: str, rows: Any = ROUTED, **more: Any) -> DistillationTrainer:
    options = {**SGD, **more.pop("options", {})}
    given = {"temperature": {"name": "dts", "rule": "gap"}, **WAYS[way], **more}
    return DistillationTrainer(
        tiny_llama(seed=0), teachers=teachers, args=arguments(folder, **options), train_dataset=rows,
        processing_class=tiny_tokenizer(), **given,
    )  # fmt: skip


def batches(trainer: DistillationTrainer) -> list[Any]:
    return [trainer.collate([trainer.train_dataset[k] for k in range(*part)]) for part in pairwise((0, 5, 16))]


def logged(trainer: DistillationTrainer, key: str) -> torch.Tensor:
    return torch.tensor([line.get(key, -1.0) for line in trainer.state.log_history if "kl" in line])


def assert_same_run(one: DistillationTrainer, other: DistillationTrainer, names: Any = NAMES) -> None:
    assert len(losses(one)) == SGD["max_steps"]
    for key in (
        "loss",
        *(f"{column}/{name}" for column in ("temperature", "teacher_ce", "kd_loss") for name in names),
    ):
        torch.testing.assert_close(logged(one, key), logged(other, key), rtol=1e-6, atol=1e-6)
    weights = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in weights) < 1e-6


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("way", WAYS)
def test_two_caches_are_the_two_live_teachers(tmp_path, caches, way, divergence, packing):
    options = {"divergence": divergence, "packing": packing, "eval_dataset": ROUTED[:6]}
    live = trainer_of(tmp_path / "live", live_pair(), way, **options)
    cached = trainer_of(tmp_path / "cached", {n: CachedTeacher(c) for n, c in caches[way].items()}, way, **options)
    assert not cached.teacher_models
    gradients = [step_gradients(trainer, batches(trainer)) for trainer in (cached, live)]
    assert largest_difference(*gradients) < 1e-6
    cached.train()
    live.train()
    assert_same_run(cached, live)
    one, other = cached.evaluate(), live.evaluate()
    for key in ("eval_kl", *(f"eval_teacher_ce/{name}" for name in NAMES)):
        assert one[key] == pytest.approx(other[key], abs=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("workers", [0, 2])
def test_one_is_cached_and_the_other_is_live_or_elsewhere(tmp_path, caches, way, workers):
    live, options = live_pair(), {"options": {"dataloader_num_workers": workers}}
    expected = trainer_of(tmp_path / "a", live, way)
    beside = trainer_of(
        tmp_path / "b", {"math": live["math"], "code": CachedTeacher(caches[way]["code"])}, way, **options
    )
    with running(served_tiny(live["math"])) as url:
        remote = trainer_of(
            tmp_path / "c", {"math": RemoteTeacher(url), "code": CachedTeacher(caches[way]["code"])}, way, **options
        )
        for trainer in (expected, beside, remote):
            trainer.train()
    assert_same_run(beside, expected)
    assert_same_run(remote, expected)
    assert remote.facts["teacher_math_states"] == "remote" and remote.facts["teacher_code_states"] == "cached"


def test_a_server_is_asked_for_the_rows_that_name_its_teacher_alone(tmp_path, caches):
    asked = []
    served = served_tiny(live_pair()["math"])
    forward = served.forward
    object.__setattr__(served, "forward", lambda question: asked.append(question.labels) or forward(question))
    with running(served) as url:
        remote = RemoteTeacher(url)
        asked.clear()  # of the self-test
        trainer = trainer_of(tmp_path, {"math": remote, "code": CachedTeacher(caches["routed"]["code"])}, "routed",
                             options={"max_steps": 4, "num_train_epochs": 1})  # fmt: skip
        trainer.train()
    assert sum(asked) == sum(encoded(own("math")).target_counts)


def test_two_names_of_one_cache_are_one_teacher_that_is_read_once(tmp_path, caches):
    folder = caches["weighted"]["math"]
    teachers = {name: CachedTeacher(folder) for name in NAMES}
    twice = trainer_of(tmp_path / "a", teachers, "routed", temperature_per_teacher=False)
    assert len(twice.teacher.distinct) == 1
    batch = twice.collate([twice.train_dataset[k] for k in range(4)])
    assert [key for key in batch if key.startswith("teacher_states")] == ["teacher_states/math"]
    alone = trainer_of(tmp_path / "b", {"math": live_pair()["math"]}, "routed", default_teacher="math",
                       rows=[{**row, "domain": "math"} for row in ROUTED], temperature_per_teacher=False)  # fmt: skip
    twice.train()
    alone.train()
    torch.testing.assert_close(torch.tensor(losses(twice)), torch.tensor(losses(alone)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_permuted_rows_change_nothing(tmp_path, caches, way):
    found = []
    for number, rows in enumerate((ROUTED, ROUTED[::-1])):
        trainer = trainer_of(tmp_path / str(number), {n: CachedTeacher(c) for n, c in caches[way].items()}, way, rows)
        found.append(step_gradients(trainer, [trainer.collate([trainer.train_dataset[k] for k in range(16)])]))
    assert largest_difference(*found) < 1e-5


def test_every_teacher_has_its_own_temperature_in_the_gradient(tmp_path, caches):
    """The effect of a policy of one teacher alone: other states of its temperature are another loss and gradient."""
    found = []
    for number, moved in enumerate((1.0, 1.5)):
        teachers = {n: CachedTeacher(c) for n, c in caches["routed"].items()}
        trainer = trainer_of(tmp_path / str(number), teachers, "routed", temperature=2.0)
        trainer.temperature.of_teacher("code").value = 2.0 * moved
        found.append(step_gradients(trainer, batches(trainer)))
    assert largest_difference(*found) > 1e-3


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("way", WAYS)
def test_missing_rows_are_refused_with_teacher_and_cache(tmp_path, caches, way):
    few = cache_of(tmp_path / "few", live_pair()["code"], encoded((own("code") if way == "routed" else ROUTED)[:3]))
    missing = len(own("code") if way == "routed" else ROUTED) - 3
    teachers = {"math": CachedTeacher(caches[way]["math"]), "code": CachedTeacher(few)}
    with pytest.raises(
        UserError, match=rf"^teachers\.code: train_dataset: {missing} of {missing + 3} rows are not in the cache .*few"
    ) as refused:
        trainer_of(tmp_path / "run", teachers, way)
    assert "teachers.code.missing: live" in str(refused.value)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_live_teacher_fills_what_its_own_cache_lacks(tmp_path, caches, way, packing):
    live = live_pair()
    few = cache_of(tmp_path / "few", live["code"], encoded((own("code") if way == "routed" else ROUTED)[:3]))
    seen: list[int] = []
    live["code"].get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )
    teachers = {"math": CachedTeacher(caches[way]["math"]), "code": CachedTeacher(few, LiveTeacher(live["code"]))}
    filled = trainer_of(tmp_path / "a", teachers, way, packing=packing)
    expected = trainer_of(tmp_path / "b", live_pair(), way, packing=packing)
    seen.clear()  # of the self-test and of the check of packing
    filled.train()
    if way == "routed" and not packing:  # of 24 rows in 6 steps of 4 those that name it alone
        assert 0 < sum(seen) < 16
    expected.train()
    assert_same_run(filled, expected)


def test_a_cache_of_another_teacher_than_its_head_is_refused_by_its_name(tmp_path, caches):
    swapped = CachedTeacher(caches["routed"]["code"])
    swapped._head = LiveTeacher(tiny_llama(seed=9, hidden=48)).head
    with pytest.raises(UserError, match=r"^teachers\.code: .*the self-test failed"):
        trainer_of(tmp_path, {"math": live_pair()["math"], "code": swapped}, "routed")


def test_a_collator_of_the_users_brings_no_states(tmp_path, caches):
    with pytest.raises(UserError, match="data_collator: got one beside a cached teacher"):
        trainer_of(tmp_path, {"math": live_pair()["math"], "code": CachedTeacher(caches["routed"]["code"])}, "routed",
                   data_collator=lambda rows: {})  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ others


@pytest.mark.parametrize("way", WAYS)
def test_a_compact_cache_beside_a_cache_of_states(tmp_path, caches, way):
    from dts_hf.teachers.compact import CompactFormat

    data = encoded(own("code") if way == "routed" else ROUTED)
    whole = cache_of(
        tmp_path / "compact", live_pair()["code"], data, compact=CompactFormat(TINY_VOCAB, TINY_VOCAB, "float32")
    )
    states = CachedTeacher(caches[way]["math"])
    compact = trainer_of(tmp_path / "a", {"math": states, "code": CachedTeacher(whole)}, way)
    kept = CompactedTeacher(live_pair()["code"], TINY_VOCAB, torch.float32)
    expected = trainer_of(tmp_path / "b", {"math": live_pair()["math"], "code": kept}, way)
    compact.train()
    expected.train()
    assert_same_run(compact, expected)
    with pytest.raises(UserError, match=r"^teachers\.code: temperature: got 'taid' with a compact teacher cache"):
        trainer_of(tmp_path / "c", {"math": states, "code": CachedTeacher(whole)}, way, temperature="taid")


def test_resumed_it_ends_bit_for_bit_and_refuses_another_cache_by_name(tmp_path, caches):
    options = {"save_strategy": "steps", "save_steps": 3}

    def run(folder: str, **changed: Any) -> DistillationTrainer:
        teachers = {n: CachedTeacher(changed.get(n, c)) for n, c in caches["routed"].items()}
        return trainer_of(tmp_path / folder, teachers, "routed", options=options)

    straight, resumed = run("a"), run("b")
    straight.train()
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed.train(resume_from_checkpoint=checkpoint)
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.temperature.state() == straight.temperature.state()
    other = cache_of(tmp_path / "other", tiny_llama(seed=5, layers=3), encoded(own("code")))
    with pytest.raises(UserError, match=r"teachers\.code\.cached_teacher\.weights: was") as refused:
        run("c", code=other).train(resume_from_checkpoint=checkpoint)
    assert "teachers.math" not in str(refused.value)


def test_two_processes_with_caches_are_two_with_the_live_teachers(tmp_path, caches):
    folders = [str(caches[way][name]) for way in WAYS for name in NAMES]
    done = run_warm(WORKERS / "several_cached_worker.py", 2, [tmp_path, *folders], strategy="ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "0.json").read_text())
    assert record["world"] == 2
    for way in WAYS:
        live, cached = record[f"{way} live"], record[f"{way} cached"]
        assert len(live["losses"]) == SGD["max_steps"]
        for key in ("losses", "temperatures", "weights"):
            torch.testing.assert_close(torch.tensor(cached[key]), torch.tensor(live[key]), rtol=1e-6, atol=1e-6)


def test_trackers_and_the_card_name_a_cached_teacher(tmp_path, caches):
    trainer = trainer_of(tmp_path, {n: CachedTeacher(c) for n, c in caches["routed"].items()}, "routed",
                         options={"max_steps": 1})  # fmt: skip
    trainer.train()
    assert trainer.facts["teacher_math_states"] == "cached" and trainer.facts["teacher_math"] == "teacher"
    assert {"teachers.math", "teachers.code"} <= {*trainer.describe_models()}
    card = trainer.card(None)
    assert "teacher `math`" in card and "`teacher`" in card
    assert isinstance(trainer.teacher.by_name["math"].head.weight, torch.Tensor | nn.Parameter)
