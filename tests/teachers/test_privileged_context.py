"""What the teacher alone reads, through ``DistillationTrainer``: positions differ, labels do not."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import IterableDataset
from transformers import DataCollatorForSeq2Seq

from dts_hf.errors import UserError
from dts_hf.loss.selection import select_response
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.self_teacher import SelfTeacher
from dts_hf.training.trainer import DistillationTrainer
from tests.support import reference
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, arguments, largest_difference, losses, plain, step_gradients

HINTED = [
    {**row, "hint": "" if k % 5 == 0 else f"It says {row['output']}" + " so" * (k % 4)} for k, row in enumerate(ROWS)
]
T = 2.0


def hinted(folder, teacher=None, rows=HINTED, model=None, options=None, **more):
    given = {"temperature": T, "train_dataset": rows, "processing_class": tiny_tokenizer(), **more}
    model = tiny_llama(seed=0).double() if model is None else model
    teacher = tiny_llama(seed=1, layers=3).double() if teacher is None else teacher
    return DistillationTrainer(
        model, teacher, args=arguments(folder, **(options or {})), teacher_prefix_column="hint", **given
    )


def batches(trainer, size=4):
    rows = [trainer.train_dataset[k] for k in range(len(trainer.train_dataset))]
    return [trainer.collate(rows[k : k + size]) for k in range(0, len(rows), size)]


def dense(trainer, model):
    """Loss and gradient over all rows, each by itself in its own context: dense float64 logits and autograd."""
    student, total, count = trainer.model, 0.0, 0
    for k in range(len(trainer.train_dataset)):
        row = trainer.train_dataset[k]
        own = [place for place, label in enumerate(row["labels"]) if label != -100 and place]
        longer = [place for place, label in enumerate(row["teacher_labels"]) if label != -100 and place]
        targets = torch.tensor([row["labels"][place] for place in own])
        z = student(input_ids=torch.tensor([row["input_ids"]])).logits[0, [place - 1 for place in own]]
        with torch.no_grad():
            z_t = model(input_ids=torch.tensor([row["teacher_input_ids"]])).logits[0, [place - 1 for place in longer]]
        ce = -torch.log(reference.softmax(z)).gather(1, targets[:, None]).squeeze(1)
        kd = T * T * reference.forward_kl(reference.softmax(z_t / T), reference.softmax(z / T))
        total, count = total + (0.5 * ce + 0.5 * kd).sum(), count + len(targets)
    loss = total / count
    names = [name for name, _ in student.named_parameters()]
    return loss, dict(zip(names, torch.autograd.grad(loss, [*student.parameters()]), strict=True))


@pytest.mark.parametrize("kind", ["live", "other family", "base", "ema"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_that_of_a_teacher_with_a_longer_context(tmp_path, kind, packing):
    teacher = {
        "live": tiny_llama(seed=1, layers=3).double(),
        "other family": tiny_gpt2(seed=2, hidden=48).double(),
        "base": SelfTeacher("base"),
        "ema": SelfTeacher("ema"),
    }[kind]
    trainer = hinted(tmp_path, teacher, packing=packing)
    model = trainer.teacher.model
    loss, expected = dense(trainer, model)
    (batch,) = batches(trainer, 16)
    assert batch["teacher_input_ids"].shape[1] > batch["input_ids"].shape[1]
    for size in (16, 3):
        assert largest_difference(step_gradients(trainer, batches(trainer, size)), expected) < 1e-9
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(loss.item(), rel=1e-12)


def test_order_of_rows_and_columns_changes_nothing(tmp_path):
    straight = hinted(tmp_path / "a")
    expected = step_gradients(straight, batches(straight, 16))
    order = torch.randperm(len(HINTED), generator=torch.Generator().manual_seed(3)).tolist()
    turned = [dict(reversed(HINTED[k].items())) for k in order]
    for packing in (False, True):
        trainer = hinted(tmp_path / "b", rows=turned, packing=packing)
        assert largest_difference(step_gradients(trainer, batches(trainer, 5)), expected) < 1e-9


def test_the_text_acts_and_reaches_the_teacher_alone(tmp_path):
    seen = []

    class Watching(LiveTeacher):
        def states(self, batch, labels, positions=None):
            seen.append(batch["input_ids"])
            return super().states(batch, labels, positions)

    trainer = hinted(tmp_path / "a", Watching(tiny_llama(seed=1, layers=3).double()))
    (batch,) = batches(trainer, 16)
    read = []
    hook = trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs), with_kwargs=True
    )
    with_text = trainer.compute_loss(trainer.model, batch)
    hook.remove()
    assert torch.equal(seen[0], batch["teacher_input_ids"]) and torch.equal(read[0]["input_ids"], batch["input_ids"])
    assert not [name for name in read[0] if name.startswith("teacher")] and len(seen) == 1
    silent = hinted(tmp_path / "b", rows=[{**row, "hint": ""} for row in HINTED])
    without = DistillationTrainer(
        tiny_llama(seed=0).double(), tiny_llama(seed=1, layers=3).double(), args=arguments(tmp_path / "c"),
        train_dataset=ROWS, temperature=T, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    plain_loss = without.compute_loss(without.model, batches(without, 16)[0]).item()
    assert silent.compute_loss(silent.model, batches(silent, 16)[0]).item() == pytest.approx(plain_loss, rel=1e-12)
    assert abs(with_text.item() - plain_loss) > 1e-3


def test_a_student_with_an_adapter_learns_what_it_says_with_the_text(tmp_path):
    """Rows without a text teach nothing before the first step; those with one do."""
    lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), "kd_ratio": 1.0}
    for rows, teaches in ((HINTED, True), ([{**row, "hint": ""} for row in HINTED], False)):
        trainer = hinted(tmp_path / "a", SelfTeacher(), rows, tiny_llama(seed=0), **lora)
        loss = trainer.compute_loss(trainer.model, batches(trainer, 16)[0]).item()
        assert (loss > 1e-3) if teaches else (abs(loss) < 1e-6)


def test_it_trains_and_evaluates_packed_to_a_budget_and_from_a_stream(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from HINTED

    options = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    listed = hinted(tmp_path / "a", SelfTeacher("ema"), options=options, eval_dataset=HINTED[:5])
    listed.train()
    streamed = hinted(tmp_path / "b", SelfTeacher("ema"), Stream(), options=options)
    streamed.train()
    assert losses(listed) == pytest.approx(losses(streamed), rel=1e-9) and len(losses(listed)) == 3
    assert listed.evaluate()["eval_kl"] > 0
    packed = hinted(tmp_path / "c", packing={"tokens": 200}, options={"max_steps": 2})
    packed.train()
    assert len(losses(packed)) == 2


def test_a_text_that_makes_rows_too_long_is_told(tmp_path, caplog):
    rows = [*HINTED, {**ROWS[0], "id": "long", "hint": "so " * 300}]
    trainer = hinted(tmp_path, rows=rows, max_length=300, max_prompt_length=100)
    report = trainer.encoding_reports["train_dataset"]
    assert report.teacher_too_long == 1 and report.dropped_ids == ["long"]
    assert "only behind the teacher's text: 1" in caplog.text


def test_what_does_not_go_with_it_is_refused_by_name(tmp_path):
    class Own:
        head = None

        def states(self, batch, labels):
            return None

        def to(self, device):
            return self

    own = tiny_llama(seed=1)
    Own.head = LiveTeacher(own).head
    for said, more in (
        ("teacher_prefix_column.*Own", {"teacher": Own()}),
        ("data_collator", {"data_collator": DataCollatorForSeq2Seq(tiny_tokenizer())}),
        ("columns: got 'teacher_prefix'", {"columns": {"teacher_prefix": "hint"}}),
        ("train_dataset.*teacher_prefix_column", {"rows": plain()}),
        ("no column 'hint'", {"rows": ROWS}),
        ("eval_dataset.*no column 'hint'", {"eval_dataset": ROWS}),
    ):
        with pytest.raises(UserError, match=said):
            hinted(tmp_path, model=tiny_llama(seed=0), **{"teacher": tiny_llama(seed=1), **more})


def test_labels_are_aligned_by_what_they_are_and_not_by_place(tmp_path):
    trainer = hinted(tmp_path)
    (batch,) = batches(trainer, 16)
    ours = select_response(batch["labels"].unsqueeze(-1), batch["labels"])[1]
    theirs = select_response(batch["teacher_labels"].unsqueeze(-1), batch["teacher_labels"])[1]
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="labels"):
        trainer.compute_loss(trainer.model, {**batch, "teacher_labels": batch["teacher_labels"].roll(1, 0)[:-1]})
