"""Several teachers through ``DistillationTrainer``: each row has one of them, or all of them have every row."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from dts_hf.data.routes import TEACHER
from dts_hf.errors import UserError
from dts_hf.loss.selection import select_response
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.several import SeveralTeachers, own_rows, teacher_of_token
from dts_hf.temperature import StepStats, build_policy
from dts_hf.training.trainer import DistillationTrainer
from tests.support import reference
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
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
from tests.support.trainers import arguments as training_arguments

NAMES = ("math", "code")
ROUTED = [{**row, "domain": NAMES[k % 3 == 0]} for k, row in enumerate(ROWS)]
POLICIES: list[Any] = [4.0, {"name": "dts"}, {"name": "ctkd"}, {"name": "dtkd"}]


def teacher(seed: int, **options: Any) -> torch.nn.Module:
    return tiny_llama(seed=seed, **options).double()


def several(tmp_path, teachers, rows=ROUTED, model=None, **more):
    options: dict[str, Any] = {"teacher_column": "domain"} if "teacher_weights" not in more else {}
    model = tiny_llama(seed=0).double() if model is None else model
    given = {
        "temperature": {"name": "dts"},
        "train_dataset": rows,
        "processing_class": tiny_tokenizer(),
        **options,
        **more,
    }
    args = training_arguments(tmp_path, **given.pop("options", {}))
    return DistillationTrainer(model, teachers=teachers, args=args, **given)


def batches(trainer, size=4):
    rows = [trainer.train_dataset[k] for k in range(len(trainer.train_dataset))]
    return [trainer.collate(rows[k : k + size]) for k in range(0, len(rows), size)]


# ----------------------------------------------------------------------------------------- two names for one checkpoint


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("packing", [False, True])
def test_two_names_for_one_model_are_one_teacher(tmp_path, policy, packing):
    one, options = teacher(1, layers=3), {"max_steps": 4, "logging_steps": 1}
    common: dict[str, Any] = {"temperature": policy, "packing": packing, "options": options}
    alone = trainer_for(tmp_path / "a", tiny_llama(seed=0).double(), one, **common)
    named = several(tmp_path / "b", {"math": one, "code": one}, **common)
    assert largest_difference(step_gradients(named, batches(named)), step_gradients(alone, batches(alone))) < 1e-10
    alone.train()
    named.train()
    torch.testing.assert_close(losses(named), losses(alone), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(temperatures(named), temperatures(alone), rtol=1e-6, atol=1e-9)
    assert len(named.teacher.distinct) == 1  # one backbone in memory


def test_one_folder_under_two_names_is_loaded_once(tmp_path):
    tiny_llama(seed=1).save_pretrained(tmp_path / "t")
    tiny_tokenizer().save_pretrained(tmp_path / "t")
    trainer = several(tmp_path, {"math": str(tmp_path / "t"), "code": str(tmp_path / "t")}, model=tiny_llama(seed=0))
    ((only, names),) = trainer.teacher.distinct
    assert names == ["math", "code"] and trainer.pair.live == [(only, "the teacher 'math' and 'code'")]


# ----------------------------------------------------------------------------------------------------- dense references


def dense(trainer, batch, target_of):
    """The gradient of the summed loss over its labels, from dense float64 logits, whole rows and autograd."""
    student = trainer.model
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    rows, targets = select_response(student(**inputs).logits, labels)
    lines = torch.arange(len(labels)).unsqueeze(1).expand_as(labels).reshape(-1, 1)
    line = select_response(lines.reshape(*labels.shape, 1), labels)[0].squeeze(-1)
    with torch.no_grad():
        teachers = {
            name: select_response(one.model(**inputs).logits, labels)[0]
            for name, one in trainer.teacher.by_name.items()
        }
    q = reference.softmax(rows / T)
    ce = -torch.log(reference.softmax(rows)).gather(1, targets[:, None]).squeeze(1)
    kd = T * T * target_of(teachers, q, line)
    loss = (0.5 * ce + 0.5 * kd).sum() / len(targets)
    return loss, dict(zip([n for n, _ in student.named_parameters()],
                          torch.autograd.grad(loss, list(student.parameters())), strict=True))  # fmt: skip


T = 2.0


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_rows_of_two_teachers_are_those_of_a_dense_loss(tmp_path, name):
    teachers = {"math": teacher(1, layers=3), "code": tiny_gpt2(seed=2, hidden=48).double()}
    trainer = several(tmp_path, teachers, temperature=T, divergence=name)
    (batch,) = batches(trainer, 16)
    numbers = batch[TEACHER]

    def target_of(logits, q, line):
        p = {key: reference.softmax(z / T) for key, z in logits.items()}
        chosen = torch.stack([p[key] for key in NAMES])[numbers[line], torch.arange(len(line))]
        return getattr(reference, name)(chosen, q)

    loss, expected = dense(trainer, batch, target_of)
    assert {*numbers.tolist()} == {0, 1}
    assert largest_difference(step_gradients(trainer, [batch]), expected) < 1e-9
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_weights_are_a_mixture_of_probabilities_or_of_logits(tmp_path, name):
    """The gradient is that of ONE divergence: from the mixture for forward KL, from the mean of logits for reverse KL."""
    teachers, weights = {"a": teacher(1, layers=3), "b": teacher(2)}, {"a": 0.3, "b": 0.7}
    trainer = several(tmp_path, teachers, teacher_weights=weights, temperature=T, divergence=name)
    (batch,) = batches(trainer, 16)

    def target_of(logits, q, line):
        if name == "forward_kl":
            p = sum(weights[key] * reference.softmax(z / T) for key, z in logits.items())
        else:
            p = reference.softmax(sum(weights[key] * z for key, z in logits.items()) / T)
        return getattr(reference, name)(p, q)

    expected = dense(trainer, batch, target_of)[1]
    assert largest_difference(step_gradients(trainer, [batch]), expected) < 1e-9


def test_the_sum_of_losses_is_no_jsd_of_a_mixture(tmp_path):
    """What docs/several_teachers.md says of JSD: it has no such identity."""
    teachers, weights = {"a": teacher(1, layers=3), "b": teacher(2)}, {"a": 0.3, "b": 0.7}
    trainer = several(
        tmp_path, teachers, teacher_weights=weights, temperature=T, divergence={"name": "jsd", "beta": 0.5}
    )
    (batch,) = batches(trainer, 16)
    found = step_gradients(trainer, [batch])

    def mixture(logits, q, line):
        return reference.jsd(sum(weights[key] * reference.softmax(z / T) for key, z in logits.items()), q, 0.5)

    def summed(logits, q, line):
        return sum(weights[key] * reference.jsd(reference.softmax(z / T), q, 0.5) for key, z in logits.items())

    assert largest_difference(found, dense(trainer, batch, summed)[1]) < 1e-9
    assert largest_difference(found, dense(trainer, batch, mixture)[1]) > 1e-3


# ------------------------------------------------------------------------------------------------------ order and splits


def gradients_of(tmp_path, rows, size, **more):
    teachers = {"math": teacher(1, layers=3), "code": teacher(2)}
    trainer = several(tmp_path, teachers, rows, temperature={"name": "dts", "granularity": "sequence"}, **more)
    return step_gradients(trainer, batches(trainer, size))


def test_neither_order_nor_split_nor_packing_of_the_rows_changes_the_gradient(tmp_path):
    """One denominator of the whole step: a mean per teacher, or per group of a micro-batch, would differ each time."""
    straight = gradients_of(tmp_path, ROUTED, 16)
    order = torch.randperm(len(ROUTED), generator=torch.Generator().manual_seed(3)).tolist()
    grouped = sorted(ROUTED, key=lambda row: row["domain"])
    for rows, size, more in (
        ([ROUTED[k] for k in order], 16, {}),
        (ROUTED, 3, {}),
        (grouped, 4, {}),  # batches of one teacher alone
        (ROUTED, 5, {"packing": True}),
        ([ROUTED[k] for k in order], 1, {"packing": True}),
    ):
        assert largest_difference(gradients_of(tmp_path, rows, size, **more), straight) < 1e-9


def test_each_teacher_reads_its_own_rows_alone(tmp_path):
    read = Counter()

    class Counting:
        def __init__(self, inner, name):
            self.inner, self.name = inner, name

        head = property(lambda self: self.inner.head)

        def states(self, batch, labels):
            read[self.name] += int((labels[:, 1:] != -100).sum())
            return self.inner.states(batch, labels)

        def to(self, device):
            return self

    models = {"math": LiveTeacher(teacher(1)), "code": LiveTeacher(teacher(2))}
    trainer = several(tmp_path, {name: Counting(one, name) for name, one in models.items()}, temperature=T)
    direct = several(tmp_path, models, temperature=T)
    assert (
        largest_difference(step_gradients(trainer, batches(trainer)), step_gradients(direct, batches(direct))) < 1e-9
    )
    data = encoded()
    for number, name in enumerate(NAMES):
        own = [k for k, row in enumerate(ROUTED) if row["domain"] == name]
        assert read[name] == sum(data.target_counts[k] for k in own) and number in (0, 1)


def test_the_part_of_a_batch_that_a_teacher_reads():
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, 7, 8], [-100, 9, -100, -100]])
    batch = {"input_ids": torch.arange(12).reshape(3, 4), "position_ids": torch.arange(4).unsqueeze(0)}
    mine = teacher_of_token(labels, None, torch.tensor([1, 0, 1])) == 1
    part, own = own_rows(batch, labels, mine)
    assert part["input_ids"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]] and len(own) == 2
    assert part["position_ids"] is batch["position_ids"]
    packed = {"input_ids": torch.arange(6).unsqueeze(0), "position_ids": torch.tensor([[0, 1, 0, 0, 1, 2]])}
    labels = torch.tensor([[-100, 1, -100, -100, 2, 3]])
    mine = teacher_of_token(labels, packed["position_ids"], torch.tensor([0, 1, 0])) == 0
    part, own = own_rows(packed, labels, mine)
    assert part["input_ids"].tolist() == [[0, 1, 3, 4, 5]] and own.tolist() == [[-100, 1, -100, 2, 3]]
    with pytest.raises(UserError, match="3 rows came as 1 lines"):
        teacher_of_token(labels, torch.zeros(1, 6).long(), torch.tensor([0, 1, 0]))


# ------------------------------------------------------------------------------------------------------------- kinds of rows


@pytest.mark.parametrize(
    "kind", ["text", "arrow text", "tokens", "arrow tokens", "own collator", "own collator, arrow"]
)
def test_rows_of_every_kind_find_their_teacher(tmp_path, kind):
    rows: Any = [{**row, "domain": of["domain"]} for row, of in zip(plain(), ROUTED, strict=True)]
    more: dict[str, Any] = {}
    if "text" in kind:
        rows = ROUTED
    if "arrow" in kind:
        rows = Dataset.from_list(rows)
    if "collator" in kind:
        more["data_collator"] = DataCollatorWithFlattening(return_position_ids=True, return_seq_idx=False)
    teachers = {"math": teacher(1, layers=3), "code": teacher(2)}
    trainer = several(tmp_path, teachers, rows, temperature=T, **more)
    straight = several(tmp_path, teachers, temperature=T)
    assert (
        largest_difference(step_gradients(trainer, batches(trainer)), step_gradients(straight, batches(straight)))
        < 1e-9
    )


def wrong_rows(**cells):
    return [
        *ROUTED[:6],
        {key: cell for key, cell in {**ROUTED[6], **cells}.items() if cell != "left out"},
        *ROUTED[7:],
    ]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (
            {"domain": "maths"},
            "train_dataset: row 'r6': got 'maths' .* expected one of math, code. Did you mean 'math'",
        ),
        ({"domain": None}, "train_dataset: row 'r6': no teacher in its column 'domain' .* data.default_teacher"),
        ({"domain": "left out"}, "train_dataset: row 'r6': no teacher in its column 'domain'"),
        ({"domain": ""}, "row 'r6': no teacher"),
        ({"domain": 3}, "row 'r6': got 3"),
    ],
    ids=str,
)
def test_a_row_without_a_teacher_is_refused_before_training(tmp_path, cells, said):
    teachers = {"math": teacher(1), "code": teacher(2)}
    with pytest.raises(UserError, match=said):
        several(tmp_path, teachers, wrong_rows(**cells))
    tokens = [{**row, "domain": of.get("domain")} for row, of in zip(plain(), wrong_rows(**cells), strict=True)]
    with pytest.raises(UserError, match=r"train_dataset: row 6.*domain"):
        several(tmp_path, teachers, tokens)
    with pytest.raises(UserError, match="eval_dataset: row 'r6'"):
        several(tmp_path, teachers, eval_dataset=wrong_rows(**cells))
    if cells["domain"] in (None, "left out", ""):
        trainer = several(tmp_path, teachers, wrong_rows(**cells), default_teacher="code")
        assert trainer.train_dataset[6][TEACHER] == 1
    else:  # a default is not for words that are misspelt
        with pytest.raises(UserError, match="row 'r6'"):
            several(tmp_path, teachers, wrong_rows(**cells), default_teacher="code")


def refused(match, tmp_path, **arguments):
    with pytest.raises(UserError, match=match):
        several(tmp_path, arguments.pop("teachers", {"a": teacher(1), "b": teacher(2)}), **arguments)


def test_what_does_not_fit_together_is_refused_by_name(tmp_path):
    refused("teachers: given beside teacher", tmp_path, teacher=teacher(3))
    refused(r"teacher_weights: they add up to 0.9, expected 1", tmp_path, teacher_weights={"a": 0.4, "b": 0.5})
    refused("teacher_weights: expected a weight for each of a, b", tmp_path, teacher_weights={"a": 1.0})
    refused("teacher_weights: got -1 for a", tmp_path, teacher_weights={"a": -1, "b": 2})
    refused("got weights beside a column", tmp_path, teacher_weights={"a": 0.5, "b": 0.5}, teacher_column="x")
    refused("teachers: got the name 'a/b'", tmp_path, teachers={"a/b": teacher(1)})
    refused("teachers: got none", tmp_path, teachers={})
    refused("default_teacher: got 'c'", tmp_path, default_teacher="c")
    refused("^teachers.b.vocab_alignment: strict", tmp_path, teachers={"a": teacher(1), "b": teacher(2, vocab=400)})
    refused("a stream cannot be routed", tmp_path, rows=lambda: iter(ROUTED), options={"max_steps": 1})
    refused("tokens without their text", tmp_path, rows=encoded())
    with pytest.raises(UserError, match="teacher_column: got 'x' without teachers"):
        trainer_for(tmp_path, teacher_column="x")
    with pytest.raises(UserError, match="temperature_per_teacher: got True without teachers"):
        trainer_for(tmp_path, temperature_per_teacher=True)


# ------------------------------------------------------------------------------------------- a state for each teacher


def trained(tmp_path, rows=ROUTED, each=True, **more):
    teachers = {"math": teacher(1, layers=3), "code": tiny_gpt2(seed=2).double()}
    options = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, **more.pop("options", {})}
    return several(tmp_path, teachers, rows, temperature_per_teacher=each, options=options, **more)


def test_each_teacher_has_a_gap_of_its_own(tmp_path):
    """What the policy of one teacher becomes is what it would be in a run of its rows alone, with these gaps."""
    trainer = trained(tmp_path, temperature={"name": "dts", "rule": "gap", "momentum": 0.5})
    trainer.train()
    log = [line for line in trainer.state.log_history if "kl" in line]
    for name in NAMES:
        alone = build_policy({"name": "dts", "rule": "gap", "momentum": 0.5})
        alone.begin_run(6)
        for step, line in enumerate(log):
            alone.begin_step(step / 6)
            assert line[f"temperature/{name}"] == pytest.approx(alone.temperature, rel=1e-6)
            alone.end_step(
                StepStats(line[f"ce_loss/{name}"], line[f"teacher_ce/{name}"], line[f"kd_loss/{name}"],
                          line[f"labels/{name}"])
            )  # fmt: skip
    apart = [line["temperature/math"] - line["temperature/code"] for line in log]
    assert max(map(abs, apart)) > 1e-4
    for line in log:  # the line of all rows is their mean by labels
        counts = [line[f"labels/{name}"] for name in NAMES]
        for key in ("ce_loss", "kd_loss", "teacher_ce", "teacher_entropy", "temperature"):
            mean = sum(n * line[f"{key}/{name}"] for n, name in zip(counts, NAMES, strict=True)) / sum(counts)
            assert line[key] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("policy", [{"name": "dts", "rule": "gap"}, {"name": "ctkd"}, {"name": "taid"}], ids=str)
@pytest.mark.parametrize("each", [True, False])
def test_resumed_it_ends_bit_for_bit_as_without_a_break(tmp_path, policy, each):
    def run(folder):
        return trained(
            tmp_path / folder, temperature=policy, each=each, options={"save_strategy": "steps", "save_steps": 3}
        )

    straight, resumed = run("a"), run("b")
    straight.train()
    checkpoint = tmp_path / "a" / "checkpoint-3"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert resumed.temperature.state() == straight.temperature.state()
    assert ({*straight.temperature.state()} == {*NAMES}) == each
    keys = [key for key in straight.state.log_history[-2] if "/" in key]
    assert keys and all(straight.state.log_history[-2][k] == resumed.state.log_history[-2][k] for k in keys)
    other = trained(tmp_path / "c", temperature=policy, each=not each)
    with pytest.raises(UserError, match="was the checkpoint written with"):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_a_step_without_a_row_of_a_teacher_leaves_its_state_alone(tmp_path):
    rows = sorted(ROUTED, key=lambda row: row["domain"])  # five of code, then math alone
    options = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, "max_steps": 4}
    trainer = trained(tmp_path, rows, temperature={"name": "dts", "rule": "gap"}, options=options)
    trainer.train()
    log = [line for line in trainer.state.log_history if "kl" in line]
    counts = [line["labels/code"] for line in log]
    assert counts[0] > 0 and counts[-1] == 0 and log[0]["labels/math"] == 0
    assert "ce_loss/code" not in log[-1] and "ce_loss/math" not in log[0]
    assert all(math.isfinite(value) for line in log for value in line.values())


def test_held_out_rows_are_scored_by_their_own_teachers(tmp_path):
    trainer = trained(tmp_path, eval_dataset=ROUTED[:5])
    values = trainer.evaluate()
    counts = [values[f"eval_labels/{name}"] for name in NAMES]
    assert sum(counts) == values["eval_labels"] and min(counts) > 0
    for name, one in zip(NAMES, ("math", "code"), strict=True):
        own = several(tmp_path, {one: trainer.teacher.by_name[one].model}, [r for r in ROUTED if r["domain"] == one],
                      eval_dataset=[row for row in ROUTED[:5] if row["domain"] == one])  # fmt: skip
        alone = own.evaluate()
        assert alone["eval_kl"] == pytest.approx(values[f"eval_kd_loss/{name}"], rel=1e-9)  # at T = 1, forward KL


def test_trackers_and_the_card_name_every_teacher(tmp_path):
    trainer = trained(tmp_path, options={"max_steps": 1})
    trainer.train()
    assert trainer.facts["teacher"] == "math, code" and trainer.facts["temperature_per_teacher"] is True
    assert trainer.facts["teacher_math_dtype"] == "float64"
    card = trainer.card(None)
    assert "teacher `math`" in card and "teacher `code`" in card and "one for each teacher" in card
    assert "teacher_entropy" in card
    assert {"teachers.math", "teachers.code"} <= {*trainer.describe_models()}
    assert isinstance(trainer.teacher, SeveralTeachers)
