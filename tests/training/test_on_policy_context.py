"""Own text, judged by a teacher that reads more than the student (SDFT, OPSD), through ``DistillationTrainer``."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import IterableDataset

from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.samplers import DUMMY_ROW
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.teachers.self_teacher import SelfTeacher
from tests.support import reference
from tests.support.on_policy import Gradients, recording
from tests.support.tiny import tiny_llama
from tests.support.trainers import ROWS, arguments, largest_difference

HINTED = [
    {**row, "hint": "" if k % 5 == 0 else f"It says {row['output']}" + " so" * (k % 4)} for k, row in enumerate(ROWS)
]
TEACHERS = {
    "live": lambda: tiny_llama(seed=1, layers=3),
    "base": lambda: SelfTeacher("base"),
    "ema": lambda: SelfTeacher("ema", ema_rate=0.3),
}
T = 2.0


def told(folder, teacher="live", rows=HINTED, on_policy=None, options=None, **more):
    """A trainer whose teacher reads the hints, before its first step."""
    args = arguments(folder, max_grad_norm=0.0, **{"per_device_train_batch_size": 16, **(options or {})})
    teacher = TEACHERS[teacher]() if isinstance(teacher, str) else teacher
    return recording(args, teacher=teacher, rows=rows, on_policy=on_policy, teacher_prefix_column="hint", **more)


def one_step(*args, **more):
    """It after one step, and the gradient of that step."""
    gradients = Gradients()
    trainer = told(*args, callbacks=[gradients], **more)
    trainer.train()
    return trainer, gradients.found[0]


def teachers_prompts(trainer):
    """By row: what the encoder of the data has put before the last answer on the teacher's side."""
    data = trainer.train_dataset
    return [data.for_teacher[0][k].tolist()[: data.for_teacher[1][k][-2]] for k in range(len(data))]


def as_data(trainer):
    """The step's answers as rows of data, each side put together out of the prompts of the data."""
    (texts,) = trainer.texts
    prompts, order = teachers_prompts(trainer), sorted(texts)
    answers = {k: [label for label in texts[k][1] if label != IGNORE_INDEX] for k in order}
    starts = [len(texts[k][0]) - len(answers[k]) for k in order]
    data = EncodedDataset([f"own{k}" for k in order], [texts[k][0] for k in order], starts)
    read = [prompts[k] + answers[k] for k in order]
    data.for_teacher = (
        [torch.tensor(ids).numpy() for ids in read],
        [[len(prompts[k]), len(ids)] for k, ids in zip(order, read, strict=True)],
    )
    return data


@pytest.mark.parametrize("packing", [False, True, {"tokens": 160}], ids=["padded", "packed", "packs"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_gradient_is_that_of_the_same_text_as_data_with_kd_ratio_1(tmp_path, teacher, packing):
    small = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    if isinstance(packing, dict):
        small = {"gradient_accumulation_steps": 16}  # so many micro-batches that all packs are in one step
    split, gradient = one_step(tmp_path / "split", teacher, packing=packing, options=small)
    assert len(split.texts[0]) == 16 and split.generated_step
    plain, expected = one_step(
        tmp_path / "plain", teacher, as_data(split), {"fraction": 0.0}, kd_ratio=1.0, packing=bool(packing)
    )
    assert not plain.generated_step and largest_difference(gradient, expected) < 1e-6
    assert max(value.abs().max() for value in gradient.values()) > 1e-4, "what it reads more is what it teaches"


@pytest.mark.parametrize("teacher", TEACHERS)
def test_without_a_text_it_is_the_teacher_that_reads_what_the_student_does(tmp_path, teacher):
    """One that is the student itself then has nothing to teach."""
    silent, gradient = one_step(tmp_path / "a", teacher, [{**row, "hint": ""} for row in HINTED])
    if teacher == "live":
        args, gradients = arguments(tmp_path / "b", max_grad_norm=0.0, per_device_train_batch_size=16), Gradients()
        without = recording(args, callbacks=[gradients])
        without.train()
        assert without.texts == silent.texts and largest_difference(gradient, gradients.found[0]) < 1e-6
    else:
        assert max(value.abs().max() for value in gradient.values()) < 1e-6


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("teacher", ["live", "base"])
def test_loss_and_gradient_are_those_of_the_dense_float64_reference(tmp_path, teacher, packing):
    student = tiny_llama(seed=0).double()
    start, model = copy.deepcopy(student), tiny_llama(seed=1, layers=3).double()
    small = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    trainer, gradient = one_step(
        tmp_path,
        model if teacher == "live" else SelfTeacher(),
        model=student,
        kd_ratio=0.3,
        options=small,
        packing=packing,
    )
    model = model if teacher == "live" else copy.deepcopy(start)
    prompts, z_s, z_t, targets = teachers_prompts(trainer), [], [], []
    for number, (ids, labels) in trainer.texts[0].items():
        answer = [label for label in labels if label != IGNORE_INDEX]
        if not answer:
            continue
        prompt = ids[: len(ids) - len(answer)]
        read = torch.tensor([prompts[number] + answer])
        z_s.append(start(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1])
        z_t.append(model(input_ids=read).logits[0, len(prompts[number]) - 1 : -1].detach())
        targets += answer
    options = {"temperature_student": T, "temperature_teacher": T, "kd_ratio": 1.0, "squared": True}
    loss = reference.distillation_loss(
        torch.cat(z_s), torch.cat(z_t), torch.tensor(targets), "forward_kl", {}, normalizer=len(targets), **options
    )
    loss.backward()
    assert largest_difference(gradient, {name: p.grad for name, p in start.named_parameters()}) < 1e-9
    assert trainer.state.log_history[0]["kd_loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert loss > 1e-3


def test_the_student_answers_without_the_text_and_both_sides_have_the_answer(tmp_path):
    """Also of the last of several turns; and rows that only fill a batch stay as they are."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "Again"}, {"role": "assistant", "content": "no no"}]  # fmt: skip
    trainer = told(tmp_path, rows=[{"messages": talk, "hint": "It is no"}] * 3, train_on="all_turns")
    asked = []
    answer = trainer.rollout.answer
    trainer.rollout.answer = lambda model, prompts, *args, **more: (
        asked.extend(prompts) or answer(model, prompts, *args, **more)
    )
    trainer.train()
    data = trainer.train_dataset
    ((rows,),) = trainer.answered
    assert len(data.spans(0)) == 2 and len(rows) == 3
    for row, prompt in zip(rows, asked, strict=True):
        own, theirs = (
            [label for label in row[name] if label != IGNORE_INDEX] for name in ("labels", "teacher_labels")
        )
        assert own == theirs and row["input_ids"] == prompt + own
        assert prompt == data[0]["input_ids"][: data.spans(0)[-1][0]]
        assert row["teacher_input_ids"] == teachers_prompts(trainer)[0] + own
        assert len(row["teacher_input_ids"]) > len(row["input_ids"])
    filler = {**rows[0], "row_id": DUMMY_ROW}
    (made,) = trainer._answered([[filler]])
    assert made == [filler]


def test_rows_of_a_stream_are_told_too(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from HINTED

    options = {"train_sampling_strategy": "sequential"}
    listed, gradient = one_step(tmp_path / "a", options=options)
    streamed, same = one_step(tmp_path / "b", rows=Stream(), options=options)
    assert streamed.texts == listed.texts and largest_difference(same, gradient) < 1e-6


@pytest.mark.parametrize("weights", ["base", "ema"])
def test_the_student_may_be_an_adapter(tmp_path, weights):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted, gradient = one_step(tmp_path / "a", SelfTeacher(weights), peft_config=lora, packing=True)
    whole, _ = one_step(tmp_path / "b", SelfTeacher(weights))
    assert adapted.texts == whole.texts and all("lora_" in name for name in gradient)
    logs = [trainer.state.log_history[0]["generated_kl"] for trainer in (adapted, whole)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and logs[0] > 1e-4


@pytest.mark.parametrize("teacher", ["live", "ema"])
def test_a_run_that_goes_on_is_one_without_a_break_to_the_bit(tmp_path, teacher):
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    mixed = {"fraction": 0.6, "max_new_tokens": 12, "seed": 13}

    def run(seed, resume=None):
        model = tiny_llama(seed=seed)
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        trainer = told(tmp_path / "run", teacher, HINTED, mixed, options, model=model, temperature={"name": "dts"})
        trainer.train(resume)
        return trainer

    straight = run(0)
    assert {*straight.kinds[:3]} == {*straight.kinds[3:]} == {True, False}, "both kinds before and after the break"
    resumed = run(9, str(tmp_path / "run" / "checkpoint-3"))
    assert resumed.texts == straight.texts[sum(straight.kinds[:3]) :]
    again = resumed.model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in straight.model.state_dict().items())


@pytest.mark.parametrize("teacher", ["live", "shared"])
def test_a_prompt_too_long_for_the_teacher_alone_is_refused_before_the_first_step(tmp_path, teacher):
    rows = [*HINTED, {**HINTED[1], "id": "long", "hint": "so " * 300}]
    limits = {"max_length": 900, "max_prompt_length": 100, "on_policy": {"max_new_tokens": 400}}
    more = {"teacher": "live"}
    if teacher == "shared":
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        more = {"teacher": SelfTeacher(), "peft_config": lora}
    named = r"row 'long' has a prompt of \d{3} tokens.*max_new_tokens = 400.*1,024 positions of the " + (
        "teacher" if teacher == "live" else "student, which teaches itself"
    )
    with pytest.raises(UserError, match=named):
        told(tmp_path, rows=rows, **limits, **more)
    told(tmp_path, **limits, **more)
