"""A compact cache: written, read and trained on as one of states; measured before it is made, and refused where it loses."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from dts_hf.divergences import build_divergence
from dts_hf.errors import UserError
from dts_hf.loss.compact_rows import CompactRows
from dts_hf.teachers.cached.layout import MANIFEST
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.compact import (
    LEAST_MASS,
    CompactFormat,
    check_mass,
    enough_tokens,
    errors_of,
    pilot,
    stored_errors,
    visited,
)
from dts_hf.teachers.live import LiveTeacher
from dts_hf.temperature import build_policy
from tests.support.cached import cache_of
from tests.support.compact import CompactedTeacher, rebuilt
from tests.support.recorded import policy_of
from tests.support.tiny import TINY_VOCAB, tiny_llama
from tests.support.trainers import encoded, largest_difference, losses, step_gradients, trainer_for

K = 40


def teacher():
    return tiny_llama(seed=1, layers=3)


def form(top_k=K, dtype="float32"):
    return CompactFormat(top_k, TINY_VOCAB, dtype)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return cache_of(
        tmp_path_factory.mktemp("compact") / "c", teacher(), compact=form(), shard_bytes=20000, forced=True
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every token is kept, in fp32."""
    return cache_of(tmp_path_factory.mktemp("compact") / "c", teacher(), compact=form(TINY_VOCAB))


def problem(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(n, TINY_VOCAB, generator=generator), torch.randint(
        0, TINY_VOCAB, (n,), generator=generator
    )


# ---------------------------------------------------------------------------------------------------------- the format


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("top_k", [1, 7, TINY_VOCAB])
def test_a_row_comes_out_of_one_tensor_as_it_went_in(top_k, dtype):
    kind = form(top_k, dtype)
    rows = kind.rows(*problem())
    words = kind.pack(kind.parts(rows))
    assert words.shape == (50, kind.words) and kind.label_bytes == words[0].numel() * words.element_size()
    again = kind.unpack(words)
    assert all(torch.equal(getattr(again, name), getattr(rows, name)) for name in ("ids", "logits", "tail"))


@pytest.mark.parametrize("top_k", [0, TINY_VOCAB + 1, True, 2.5])
def test_a_number_of_tokens_that_is_none_is_refused(top_k):
    with pytest.raises(UserError, match=r"compact: got .* from 1 to the vocabulary of 320"):
        form(top_k)


def test_bfloat16_is_refused_for_kept_logits():
    with pytest.raises(UserError, match="expected one of float16, float32"):
        form(dtype="bfloat16")


# ------------------------------------------------------------------------------------------------------ training on it


def run(folder, with_teacher, **options):
    training = {"max_steps": 20, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05}
    trainer = trainer_for(folder, teacher=with_teacher, options=training, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, {"name": "dts", "rule": "gap"}], ids=str)
def test_with_every_token_kept_it_trains_as_the_live_teacher(tmp_path, whole, temperature, packing):
    options = {"temperature": temperature, "packing": packing}
    live, cached = run(tmp_path / "a", teacher(), **options), run(tmp_path / "b", CachedTeacher(whole), **options)
    assert len(losses(live)) == 20
    torch.testing.assert_close(torch.tensor(losses(cached)), torch.tensor(losses(live)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_it_gives_what_is_kept_of_the_live_teacher(tmp_path, cache, divergence, packing):
    """Against a teacher that is compacted on the way, which is held to the dense distribution elsewhere."""
    gradients = []
    for number, with_teacher in enumerate((CachedTeacher(cache), CompactedTeacher(teacher(), K, torch.float32))):
        trainer = trainer_for(
            tmp_path / str(number), teacher=with_teacher, temperature=1.3, divergence=divergence, packing=packing
        )
        batches = [trainer.collate([trainer.train_dataset[row] for row in part]) for part in (range(5), range(5, 16))]
        gradients.append(step_gradients(trainer, batches))
    assert largest_difference(*gradients) < 1e-5


def test_the_files_have_no_states_and_no_head(cache):
    names = {path.name for path in cache.iterdir()}
    assert "head.safetensors" not in names and len(names) > 3
    opened = StateCache(cache)
    assert opened.manifest.compact["top_k"] == K and opened.manifest.compact["knots"][-1] == 4.0
    assert sum(1 for _ in opened.verify()) == len(opened.manifest.shards)
    assert opened.manifest.size < 1.3 * opened.manifest.labels * form().label_bytes + 2000 * len(
        opened.manifest.shards
    )


def test_rows_that_are_missing_are_answered_live_as_they_would_have_been_kept(tmp_path):
    data = encoded()
    half = cache_of(tmp_path / "half", teacher(), data.subset(8), compact=form(), forced=True)
    with pytest.raises(UserError, match="rows are not in the cache"):
        trainer_for(tmp_path / "a", teacher=CachedTeacher(half), temperature=1.0)
    gradients = []
    for number, with_teacher in enumerate(
        (CachedTeacher(half, LiveTeacher(teacher())), CompactedTeacher(teacher(), K, torch.float32))
    ):
        trainer = trainer_for(tmp_path / f"b{number}", teacher=with_teacher, temperature=1.0, train_dataset=data)
        gradients.append(step_gradients(trainer, [trainer.collate([data[row] for row in range(4, 12)])]))
    assert largest_difference(*gradients) < 1e-5


# ------------------------------------------------------------------------------------------------------- what is caught


def test_a_flipped_byte_is_found(tmp_path):
    folder = cache_of(tmp_path / "c", teacher(), compact=form(), forced=True)
    (shard,) = folder.glob("states-*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    opened = StateCache(folder)
    with pytest.raises(UserError, match=shard.name):
        [opened.row(row) for row in range(len(opened))]


def test_rows_of_another_teacher_do_not_pass_the_self_test(tmp_path, cache, monkeypatch):
    """The stored log-probabilities are those of the teacher that ran; what was kept is made to be another one's."""
    other = StateCache(cache_of(tmp_path / "c", tiny_llama(seed=5, layers=3), compact=form(), forced=True))
    monkeypatch.setattr(StateCache, "row", lambda self, row, own=StateCache.row: own(other, row))
    with pytest.raises(UserError, match="self-test failed"):
        trainer_for(tmp_path / "r", teacher=CachedTeacher(cache), temperature=1.0)


def test_the_live_teacher_at_hand_is_compared(tmp_path, cache):
    trainer_for(tmp_path / "same", teacher=CachedTeacher(cache, LiveTeacher(teacher())), temperature=1.0)
    with pytest.raises(UserError, match="scored again"):
        other = LiveTeacher(tiny_llama(seed=5, layers=3))
        trainer_for(tmp_path / "other", teacher=CachedTeacher(cache, other), temperature=1.0)


def test_a_distribution_over_other_tokens_is_refused(tmp_path):
    """The teacher has 64 ids more than the tokenizer, whose probability belongs to nobody where the recipe cuts them."""
    wide, options = tiny_llama(vocab=384, seed=1), {"temperature": 1.0, "vocab_alignment": "truncate_to_tokenizer"}
    with_them = cache_of(tmp_path / "all", wide, compact=CompactFormat(K, 384, "float32"), forced=True)
    with pytest.raises(UserError, match=r"distributions over 384 tokens, .* compared over 320"):
        trainer_for(tmp_path / "a", teacher=CachedTeacher(with_them), **options)
    cut, gradients = cache_of(tmp_path / "cut", wide, compact=form(TINY_VOCAB)), []
    for number, with_teacher in enumerate((CachedTeacher(cut), wide)):
        trainer = trainer_for(tmp_path / f"b{number}", teacher=with_teacher, **options)
        gradients.append(step_gradients(trainer, [trainer.collate([trainer.train_dataset[row] for row in range(8)])]))
    assert largest_difference(*gradients) < 1e-5


def test_bytes_are_the_same_after_a_kill(tmp_path):
    options = {"compact": form(), "shard_bytes": 20000, "forced": True}
    whole = cache_of(tmp_path / "a", teacher(), **options)
    again = cache_of(tmp_path / "b", teacher(), **options)
    shards = sorted(again.glob("states-*"))
    assert len(shards) > 2
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:1000])
    (again / MANIFEST).unlink()
    cache_of(again, teacher(), **options)
    sums = [{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(f.iterdir())} for f in (whole, again)]
    assert sums[0] == sums[1]
    with pytest.raises(UserError, match="another cache"):
        cache_of(again, teacher(), **{**options, "compact": form(K + 1)})


# ----------------------------------------------------------------------------------------------- its error, and the bar


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.4, 2.0, 4.0])
def test_the_error_is_that_of_the_rebuilt_distribution(temperature):
    z, targets = problem()
    rows = form().rows(z, targets)
    p, q = torch.softmax(z.double() / temperature, -1), rebuilt(z.double(), targets, K, temperature)
    (found,) = errors_of(z, rows, [temperature])
    assert found.mass == pytest.approx(float(p.gather(-1, rows.ids.long()).sum(-1).mean()), abs=1e-5)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=5e-3, abs=1e-5)
    assert found.total_variation == pytest.approx(float((p - q).abs().sum(-1).mean() / 2), rel=5e-3, abs=1e-5)
    (stored,) = stored_errors(rows, [temperature])
    assert stored.mass == pytest.approx(found.mass, abs=1e-3)
    assert stored.kl == pytest.approx(found.kl, rel=1e-2, abs=1e-4)


def test_too_little_is_refused_with_the_number_of_tokens_that_would_do():
    live, data = LiveTeacher(teacher()), encoded()
    examples = [data[row] for row in range(len(data))]
    ask = lambda top_k, value, **more: pilot(  # noqa: E731
        live, examples, form(top_k), build_policy(value), build_divergence("forward_kl"), **more
    )
    with pytest.raises(UserError) as refused:
        ask(8, 2.0)
    message = str(refused.value)
    assert "at T = 2" in message and f"expected {LEAST_MASS} at least" in message and "states, exact" in message
    needed = int(message.split("It would take ")[1].split(maxsplit=1)[0].replace(",", ""))
    assert min(error.mass for error in ask(needed, 2.0)) >= LEAST_MASS
    with pytest.raises(UserError):
        ask(needed // 4, 2.0)
    (forced,) = ask(8, 2.0, forced=True)
    assert forced.mass < LEAST_MASS


def test_a_temperature_that_rose_after_writing_is_refused_before_training(tmp_path):
    folder = cache_of(tmp_path / "c", teacher(), compact=form(60))
    trainer_for(tmp_path / "a", teacher=CachedTeacher(folder), temperature=0.3)
    with pytest.raises(UserError, match=r"probability at T = 4, .*--compact K"):
        trainer_for(
            tmp_path / "b", teacher=CachedTeacher(folder), temperature={"name": "dts", "t_init": 4.0, "t_max": 4.0}
        )


def test_force_reaches_no_further_than_the_temperatures_it_was_given_for(tmp_path, caplog):
    measured = errors_of(*_with_rows(), [1.0, 3.0])
    folder = cache_of(tmp_path / "c", teacher(), compact=form(16), forced=True, errors=measured)
    trainer_for(tmp_path / "a", teacher=CachedTeacher(folder), temperature=3.0)
    assert "(forced)" in caplog.text
    with pytest.raises(UserError, match=r"probability at T = 8, .*expected 0.95 at least"):
        trainer_for(tmp_path / "b", teacher=CachedTeacher(folder), temperature=8.0)


def test_mass_that_is_no_number_is_refused():
    error = errors_of(*_with_rows(), [1.0])[0]._replace(mass=float("nan"))
    with pytest.raises(UserError):
        check_mass([error], "")


def _with_rows():
    z, targets = problem()
    return z, form().rows(z, targets)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("constant", {"value": 1.5, "teacher_value": 3.0}, {3.0}),
        ("dts", {"t_init": 4.0, "t_min": 0.8, "t_max": 5.0}, {4.0, 0.8, 5.0}),
        ("dtkd", {"tau": 2.0, "w_kd": 0.5}, {2.0, 4 * 2 / 3, 4 / 3}),  # a student half and twice as sharp
        ("ctkd", {"t_start": 1.0, "t_end": 3.0}, {1.0, 4.0}),
        ("annealing", {}, set()),
    ],
)
def test_where_a_policy_may_go_is_known_before_training(name, options, expected):
    z, targets = problem()
    rows = CompactRows.of(z, targets, TINY_VOCAB, torch.float32)
    policy = policy_of(name, **options)
    before = json.dumps(policy.state())
    found = visited(policy, rows, targets)
    assert all(any(value == pytest.approx(other, rel=1e-3) for other in found) for value in expected)
    assert found == sorted(found) and json.dumps(policy.state()) == before


def test_the_students_own_temperature_is_none_that_the_teacher_visits():
    z, targets = problem()
    policy = build_policy({"name": "constant", "value": 4.0, "teacher_value": 1.0})
    assert visited(policy, form().rows(z, targets), targets) == [1.0]


def test_a_temperature_made_of_the_teachers_logits_is_measured_row_by_row():
    z, targets = problem()
    found = visited(build_policy({"name": "norm_kd", "t_norm": 1.0}), form().rows(z, targets), targets)
    deviations = z.std(-1)
    assert found[0] <= float(deviations.min()) * 1.01 and found[-1] >= float(deviations.max()) * 0.99


def test_enough_tokens_is_a_power_of_two_that_is_enough_and_half_of_it_is_not():
    z, _ = problem(128)
    needed = enough_tokens(z, 1.5)
    assert needed & (needed - 1) == 0
    mass = lambda top_k: errors_of(z, form(top_k).rows(z, z.argmax(-1)), [1.5])[0].mass  # noqa: E731
    assert mass(needed) >= LEAST_MASS > mass(needed // 2)
