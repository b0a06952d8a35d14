"""States that students beside each other share: one forward, the same bits, and nobody waits without an end."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.shared_answers import VARIABLE, SharedAnswers, batch_key, counts, has_students, shared_answers
from tests.support.tiny import tiny_llama
from tests.support.trainers import trainer_for

STEPS = 20


def batch(number: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids = torch.arange(8).reshape(2, 4) + number
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids


class Forward:
    """A teacher that counts, and answers with the batch's number."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.count, self.seconds, self.lock = 0, seconds, threading.Lock()

    def of(self, number: int):
        def compute() -> torch.Tensor:
            with self.lock:
                self.count += 1
            time.sleep(self.seconds)
            return torch.full((3, 2), float(number), dtype=torch.bfloat16)

        return compute


def kept(folder) -> list[str]:
    return [path.name for path in folder.glob("*.safetensors")]


@pytest.mark.parametrize("students", [2, 4])
def test_one_forward_serves_students_side_by_side(tmp_path, students: int) -> None:
    forward, found = Forward(0.01), []

    def train() -> None:
        answers = SharedAnswers(tmp_path, students)
        for number in range(10):
            states = answers.get(*batch(number), forward.of(number))
            found.append((number, states.dtype, states.tolist()))
        barrier.wait()
        answers.close()

    barrier = threading.Barrier(students)
    threads = [threading.Thread(target=train) for _ in range(students)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert forward.count == 10 and counts(tmp_path) == (10, 10 * (students - 1))
    assert sorted(found) == sorted((k, torch.bfloat16, [[float(k)] * 2] * 3) for k in [*range(10)] * students)
    assert not kept(tmp_path) and not list(tmp_path.glob("*.had.*")) and not has_students(tmp_path)


def test_another_batch_is_another_question() -> None:
    inputs, labels = batch(0)
    keys = {
        batch_key(inputs, labels), batch_key(inputs, labels + 1), batch_key({"input_ids": inputs["input_ids"]}, labels),
        batch_key(inputs, labels.reshape(4, 2)), batch_key({**inputs, "input_ids": labels.int()}, labels),
    }  # fmt: skip
    assert len(keys) == 5 and batch_key({**inputs, "more": object()}, labels) is None
    assert batch_key({**inputs, "none": None}, labels) == batch_key(dict(reversed(inputs.items())), labels.clone())


def test_a_student_that_is_alone_keeps_nothing_and_waits_for_a_while(tmp_path) -> None:
    began = time.monotonic()
    answers, forward = SharedAnswers(tmp_path, 2, first_patience=0.2), Forward()
    for number in range(3):
        answers.get(*batch(number), forward.of(number))
    assert forward.count == 3 and not kept(tmp_path) and 0.2 <= time.monotonic() - began < 5


def test_a_late_student_finds_what_is_kept_and_the_disk_has_a_bound(tmp_path) -> None:
    first, second = (SharedAnswers(tmp_path, 2, most_bytes=400) for _ in range(2))
    forward = Forward()
    for number in range(20):
        first.get(*batch(number), forward.of(number))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 600
    there = len(kept(tmp_path))
    assert 0 < there < 20
    for number in range(20):
        assert second.get(*batch(number), forward.of(number)).eq(number).all()
    assert 20 < forward.count <= 40
    first.close()
    second.close()


def test_a_student_that_is_gone_is_not_waited_for(tmp_path) -> None:
    first, second, third = (SharedAnswers(tmp_path, 3) for _ in range(3))
    forward = Forward()
    first.get(*batch(0), forward.of(0))
    third.close()
    second.get(*batch(0), forward.of(0))
    assert forward.count == 1 and not kept(tmp_path)


def test_who_computes_for_too_long_is_not_waited_for(tmp_path) -> None:
    slow, quick = SharedAnswers(tmp_path, 2), SharedAnswers(tmp_path, 2, patience=0.1)
    forward = Forward(2.0)
    thread = threading.Thread(target=slow.get, args=(*batch(0), forward.of(0)))
    thread.start()
    while not forward.count:
        time.sleep(0.01)
    states = quick.get(*batch(0), Forward().of(0))
    assert thread.is_alive() and states.eq(0).all()
    thread.join()


def test_a_forward_that_fails_frees_the_others(tmp_path) -> None:
    first, second = SharedAnswers(tmp_path, 2), SharedAnswers(tmp_path, 2)

    def fails() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        first.get(*batch(0), fails)
    assert second.get(*batch(0), Forward().of(0)).eq(0).all()


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"no states"])
def test_a_damaged_answer_is_computed_again(tmp_path, content: bytes) -> None:
    first, second = SharedAnswers(tmp_path, 2), SharedAnswers(tmp_path, 2)
    forward = Forward()
    first.get(*batch(1), forward.of(1))
    (tmp_path / kept(tmp_path)[0]).write_bytes(content)
    assert second.get(*batch(1), forward.of(1)).eq(1).all() and forward.count == 2


def test_a_process_shares_where_it_is_told_to(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert shared_answers() is None
    monkeypatch.setenv(VARIABLE, f"3:{tmp_path / 'a:b'}")
    answers = shared_answers()
    assert answers is not None and answers.students == 3 and answers.folder == tmp_path / "a:b"


# --------------------------------------------------------------------------------------------------------- in a trainer


def trained(folder, shared: SharedAnswers | None, **options):
    """Weights and logged values after 20 steps, and how many forwards the teacher ran."""
    trainer = trainer_for(folder, options={"max_steps": STEPS}, **options)
    teacher, count = trainer.teacher, []
    assert isinstance(teacher, LiveTeacher)
    teacher.backbone.register_forward_hook(lambda *_: count.append(1))
    teacher.shared = shared
    trainer.train()
    logs = [{k: v for k, v in log.items() if k in ("loss", "kl", "temperature")} for log in trainer.state.log_history]
    return {name: one.clone() for name, one in trainer.model.state_dict().items()}, logs, len(count)


ARMS = (
    {"temperature": {"name": "constant", "value": 2.0}},
    {"temperature": {"name": "dts", "rule": "gap"}, "divergence": "reverse_kl"},
    {"temperature": {"name": "dtkd"}, "divergence": "forward_kl"},
)


def test_students_of_a_shared_teacher_equal_those_trained_alone(tmp_path) -> None:
    """To the last bit; the first runs every forward, the others none."""
    alone = [trained(tmp_path / f"alone-{i}", None, **arm) for i, arm in enumerate(ARMS)]
    students = [SharedAnswers(tmp_path / "shared", len(ARMS)) for _ in ARMS]
    together = [
        trained(tmp_path / f"together-{i}", students[i], teacher=tiny_llama(seed=1, layers=3), **arm)
        for i, arm in enumerate(ARMS)
    ]
    assert [forwards for *_, forwards in alone] == [STEPS] * 3
    assert [forwards for *_, forwards in together] == [STEPS, 0, 0]
    for (weights, logs, _), (others, other_logs, _) in zip(alone, together, strict=True):
        assert logs == other_logs and len(logs) > STEPS
        assert all(torch.equal(one, others[name]) for name, one in weights.items())
    names = [*alone[0][0]]
    assert any(not torch.equal(alone[0][0][name], alone[1][0][name]) for name in names)  # the arms do differ
