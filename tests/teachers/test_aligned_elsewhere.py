"""A teacher with another tokenizer whose states are cached, or come from a server, is the live one."""

from __future__ import annotations

import copy

import pytest
import torch

from dts_hf.errors import UserError
from dts_hf.teachers.cached.reader import StateCache
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.compact import CompactFormat
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from tests.support.alignment import aligned_rows, instruction_rows, relabelled, tokenizer_of
from tests.support.cached import cache_of
from tests.support.served import running, served_tiny, with_forward
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import losses, temperatures, trainer_for

#: One more that WordPiece does not know, of which the teacher is asked nothing.
ROWS = [*instruction_rows(9), {"id": "unknown", "instruction": "Say", "input": "", "output": "ŧŧ"}]
SGD = {"max_steps": 20, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.05}
POLICIES = {"T 4": 4.0, "step": {"name": "dts", "rule": "gap"}, "token": {"name": "dts", "granularity": "token"}}


def other(kind="byte_level"):
    return tokenizer_of(kind, 900)


def teacher_of(tokenizer, seed=1):
    return tiny_llama(vocab=len(tokenizer), hidden=48, layers=3, seed=seed)


def cached(folder, tokenizer=None, rows=ROWS, **options):
    """A cache of the teacher with this tokenizer over ``rows``."""
    tokenizer = tokenizer or other()
    data = aligned_rows(tiny_tokenizer(), tokenizer, rows)
    return cache_of(folder, teacher_of(tokenizer), data, tokenizer, **options)


def run(folder, teacher, tokenizer=None, *, train=True, **options):
    """A trainer after its steps (``train``), with a teacher of this tokenizer."""
    training = {**SGD, **options.pop("options", {})}
    given = {"rows": ROWS, "alignment": "overlap", "teacher_tokenizer": tokenizer or other(), **options}
    trainer = trainer_for(folder, teacher=teacher, options=training, **given)
    if train:
        trainer.train()
    return trainer


def assert_same_run(found, live):
    assert len(losses(live)) == live.args.max_steps
    for read in (losses, temperatures):
        torch.testing.assert_close(torch.tensor(read(found)), torch.tensor(read(live)), rtol=1e-6, atol=1e-6)
    weights = zip(found.model.parameters(), live.model.parameters(), strict=True)
    assert max(float((one - other).detach().abs().max()) for one, other in weights) < 1e-6
    one, two = found.evaluate(), live.evaluate()
    names = ("eval_loss", "eval_kl", "eval_teacher_ce", "eval_aligned_share", "eval_teacher_common_mass")
    assert {name: one[name] for name in names} == pytest.approx({name: two[name] for name in names}, rel=1e-6)
    assert 0 < two["eval_aligned_share"] < 1


CASES = [
    ("overlap", "step", False, "byte_level"),
    ("overlap", "token", True, "byte_level"),
    ("overlap", "T 4", {"tokens": 160}, "word_piece"),
    ("dual_space", "step", False, "word_piece"),
    ("dual_space", "token", True, "byte_level"),
]


@pytest.mark.parametrize(("alignment", "policy", "packing", "kind"), CASES)
def test_cached_and_remote_training_is_live_training(tmp_path, alignment, policy, packing, kind):
    tokenizer, made = other(kind), []
    told = {"alignment": alignment, "packing": packing, "eval_dataset": ROWS[:5]}

    def trained(name, teacher):
        made.append(run(tmp_path / name, teacher, tokenizer, temperature=copy.deepcopy(POLICIES[policy]), **told))

    trained("live", teacher_of(tokenizer))
    trained("cached", CachedTeacher(cached(tmp_path / "states", tokenizer, shard_bytes=6000)))
    with running(served_tiny(teacher_of(tokenizer), tokenizer=tokenizer)) as url:
        trained("remote", RemoteTeacher(url))
        for found in made[1:]:
            assert_same_run(found, made[0])


def test_one_tokenizer_on_both_sides_is_ordinary_cached_distillation(tmp_path):
    """One cache serves both: the teacher reads the student's own rows."""
    data, tokenizer = aligned_rows(tiny_tokenizer(), tiny_tokenizer(), ROWS), tiny_tokenizer()
    cache = cache_of(tmp_path / "states", tiny_llama(seed=1, layers=3), data, tokenizer)
    told = {"rows": ROWS, "options": SGD, "temperature": {"name": "dts", "rule": "gap"}}
    plain, overlap = (
        trainer_for(tmp_path / str(len(options)), teacher=CachedTeacher(cache), **told, **options)
        for options in ({}, {"alignment": "overlap", "teacher_tokenizer": tokenizer})
    )
    for trainer in (plain, overlap):
        trainer.train()
    torch.testing.assert_close(torch.tensor(losses(overlap)), torch.tensor(losses(plain)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(temperatures(overlap)), torch.tensor(temperatures(plain)), rtol=1e-6, atol=1e-6
    )
    lines = [line for line in overlap.state.log_history if "kl" in line]
    assert all(line["aligned_share"] == 1.0 for line in lines)


def test_a_run_goes_on_from_its_checkpoint_and_with_no_other_cache(tmp_path):
    cache = cached(tmp_path / "states")
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path / "run", CachedTeacher(cache), options=options)
    again = run(tmp_path / "run", CachedTeacher(cache), options=options, train=False)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    weights = [trainer.model.state_dict() for trainer in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses(again)[-2:] == losses(whole)[-2:]
    tokenizer = other()
    data = aligned_rows(tiny_tokenizer(), tokenizer, ROWS)
    strange = cache_of(tmp_path / "strange", teacher_of(tokenizer, seed=2), data, tokenizer)
    with pytest.raises(UserError, match=r"teacher\.cached_teacher\.weights: was"):
        run(tmp_path / "run", CachedTeacher(strange), options=options, train=False).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
        )


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_missing_rows_are_refused_by_name_or_answered(tmp_path, packing):
    cache = cached(tmp_path / "states", rows=ROWS[:7])
    with pytest.raises(UserError, match=r"train_dataset: 3 of 10 rows are not in the cache .*'r7', 'r8', 'unknown'"):
        run(tmp_path / "refused", CachedTeacher(cache))
    filled = run(
        tmp_path / "filled", CachedTeacher(cache, LiveTeacher(teacher_of(other()))), packing=packing,
        eval_dataset=ROWS[:5],
    )  # fmt: skip
    assert_same_run(filled, run(tmp_path / "live", teacher_of(other()), packing=packing, eval_dataset=ROWS[:5]))


def test_the_template_of_missing_rows_is_compared_with_the_teachers(tmp_path):
    """``auto`` is the student's chat template, and Alpaca's for a teacher that has none."""
    tokenizer = tokenizer_of("byte_level", 900, chat=False)
    cache = cached(tmp_path / "states", tokenizer, ROWS[:7], template="alpaca")
    with pytest.raises(UserError, match="3 of 10 rows are not in the cache") as error:
        run(tmp_path / "run", CachedTeacher(cache), tokenizer)
    assert "prompt template" not in str(error.value)


def test_a_cache_serves_every_student_of_which_the_teacher_reads_the_same(tmp_path):
    """Rows are known by the teacher's tokens and labels: a student that ends its turns otherwise has others."""
    cache, student = cached(tmp_path / "states"), tokenizer_of("byte_level", 500)

    def trained(name, teacher, tokenizer):
        model = tiny_llama(vocab=len(tokenizer), seed=0)
        return run(tmp_path / name, teacher, model=model, processing_class=tokenizer, eval_dataset=ROWS[:5])

    assert_same_run(trained("cached", CachedTeacher(cache), student), trained("live", teacher_of(other()), student))
    ends_otherwise, _ = relabelled(tokenizer_of("byte_level", 500, chat=False))
    words = r"train_dataset: 10 of 10 rows are not in the cache .* depend on the student's tokenizer and template"
    with pytest.raises(UserError, match=words):
        trained("refused", CachedTeacher(cache), ends_otherwise)


def test_rows_in_other_tokens_are_refused_by_the_digest_of_the_tokenizer(tmp_path):
    """A cache of the student's own tokens, and a server of another teacher."""
    cache = cached(tmp_path / "states", tiny_tokenizer())
    words = (
        "the teacher .teacher_tokenizer. has another tokenizer than the rows that were cached: tokenizer's vocabulary"
    )
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", CachedTeacher(cache))
    with running(served_tiny()) as url, pytest.raises(UserError, match="serves 'some/teacher' for other tokens"):
        run(tmp_path / "run", RemoteTeacher(url))


def test_damage_is_refused_by_name(tmp_path):
    cache = cached(tmp_path / "states")
    path, states = cache / "states-00000.safetensors", StateCache(cache).row(0).numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(states)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"states-00000.safetensors: row 0 of the cache is not as it was written"):
        run(tmp_path / "run", CachedTeacher(cache))


@pytest.mark.parametrize("alignment", ["overlap", "dual_space"])
def test_a_compact_cache_is_refused(tmp_path, alignment):
    tokenizer = other()
    cache = cached(tmp_path / "states", compact=CompactFormat(64, len(tokenizer), "float32"), forced=True)
    with pytest.raises(
        UserError, match=rf"alignment: got '{alignment}'.* compact cache .* expected a cache of states"
    ):
        run(tmp_path / "run", CachedTeacher(cache), alignment=alignment)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_row_is_asked_twice_of_a_server_with_a_cache(tmp_path, workers):
    tokenizer, asked = other(), []
    labels = sum(len(row.labels) for row in aligned_rows(tiny_tokenizer(), tokenizer, ROWS).aligned)
    served = served_tiny(teacher_of(tokenizer), tokenizer=tokenizer)
    options = {"max_steps": 9, "dataloader_num_workers": workers}  # three epochs
    with running(with_forward(served, lambda one, own: (asked.append(one.labels), own(one))[1])) as url:
        remote = RemoteTeacher(url, cache=tmp_path / "kept")
        asked.clear()
        kept = run(tmp_path / "kept-run", remote, options=options, eval_dataset=ROWS[:5])
        if workers == 0:
            assert sum(asked) == labels
        assert_same_run(kept, run(tmp_path / "live", teacher_of(tokenizer), options=options, eval_dataset=ROWS[:5]))


def test_a_server_must_take_the_rows_as_the_teacher_reads_them(tmp_path):
    tokenizer = other()
    data = aligned_rows(tiny_tokenizer(), tokenizer, ROWS)
    longest = max(data.teacher_lengths)
    assert longest != max(data.lengths)
    served, words = (
        served_tiny(teacher_of(tokenizer), tokenizer=tokenizer, max_length=longest - 1),
        f"{longest} tokens",
    )
    with running(served) as url, pytest.raises(UserError, match=f"train_dataset: .*a row has {words}"):
        run(tmp_path, RemoteTeacher(url))
