"""A teacher with another tokenizer, through ``DistillationTrainer``: what is the same is compared, the rest is labels."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dts_hf.alignment import batch as keys
from dts_hf.data.collators import PackedCollator
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.training.trainer import NOT_FOR_MODELS, DistillationTrainer
from tests.support import reference
from tests.support.alignment import instruction_rows, relabelled, tokenizer_of
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import arguments, largest_difference, step_gradients, trainer_for

ROWS = instruction_rows(9)
SAME = {"alignment": "overlap", "teacher_tokenizer": tiny_tokenizer(), "processing_class": tiny_tokenizer()}


def double(**options):
    return {"model": tiny_llama(seed=0, **options).double(), "teacher": tiny_llama(seed=1, layers=3).double()}


def aligned_trainer(folder, **options):
    """Student and teacher of two byte-level tokenizers, in float64."""
    teacher = tokenizer_of("byte_level", 900)
    defaults = {
        "model": tiny_llama(seed=0).double(), "teacher": tiny_gpt2(vocab=len(teacher), seed=1).double(), "rows": ROWS,
        "alignment": "overlap", "teacher_tokenizer": teacher,
    }  # fmt: skip
    return trainer_for(folder, **{**defaults, **options})


def batches_of(trainer, sizes):
    """The rows in order, in batches of these sizes."""
    examples = iter(trainer.train_dataset[k] for k in range(len(trainer.train_dataset)))
    return [trainer.data_collator([next(examples) for _ in range(size)]) for size in sizes]


def step(trainer, batches):
    """The loss and the gradients of one step of these micro-batches, and its reduced sums."""
    gradients = step_gradients(trainer, batches)
    return trainer.sums.step_meter.reduce(trainer.accelerator), gradients


# --------------------------------------------------------------------------------------- one tokenizer on both sides


@pytest.mark.parametrize(
    "temperature", [2.0, "dts", {"name": "dts", "granularity": "token"}, {"name": "dts", "granularity": "sequence"}, "ctkd",
                    "adakd", "pocl", "taid"], ids=str,
)  # fmt: skip
def test_one_tokenizer_on_both_sides_is_ordinary_distillation(tmp_path, temperature):
    found = []
    for options in ({}, SAME):
        trainer = trainer_for(tmp_path, rows=ROWS, temperature=copy.deepcopy(temperature), **double(), **options)
        found.append(step(trainer, batches_of(trainer, [4, 5])))
    (plain, plain_gradients), (overlap, gradients) = found
    assert largest_difference(gradients, plain_gradients) < 1e-6
    assert {name: overlap[name] for name in plain} == pytest.approx(dict(plain), rel=1e-6, abs=1e-9)
    assert overlap.step_stats().observed == pytest.approx(plain.step_stats().observed, rel=1e-6)
    assert overlap.step_stats().gap == pytest.approx(plain.step_stats().gap, rel=1e-6)
    assert overlap["aligned"] == overlap["rows"]


def test_a_whole_run_with_one_tokenizer_is_ordinary_distillation(tmp_path):
    lines = []
    for options in ({}, SAME):
        trainer = trainer_for(
            tmp_path, rows=ROWS, options={"max_steps": 4, "learning_rate": 0.01}, eval_dataset=ROWS[:5], **double(),
            **options,
        )  # fmt: skip
        trainer.train()
        held_out = trainer.evaluate()
        logged = [line for line in trainer.state.log_history if "kl" in line] + [held_out]
        lines.append(
            [{k: v for k, v in line.items() if "per_second" not in k and "runtime" not in k} for line in logged]
        )
    for plain, overlap in zip(*lines, strict=True):
        plain.pop("eval_teacher_ece", None)  # the one number that is not measured where labels may be others
        assert {name: overlap[name] for name in plain} == pytest.approx(plain, rel=1e-6, abs=1e-9)
        share = overlap.get("aligned_share", overlap.get("eval_aligned_share"))
        assert share == 1.0
        for who in ("common_mass", "teacher_common_mass"):
            assert overlap.get(who, overlap.get(f"eval_{who}")) == pytest.approx(1.0)


# --------------------------------------------------------------------------------------------------- dense ground truth


def bytes_of(tokenizer, token):
    """Of a byte-level tokenizer's token, by the library's own table."""
    characters = {character: byte for byte, character in bytes_to_unicode().items()}
    return bytes(characters[character] for character in tokenizer.convert_ids_to_tokens(token))


def answer_of(tokenizer, ids, labels):
    """(bytes before it, its bytes or None at the end, id, place) of each label, one by one."""
    said, found = b"", []
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label == IGNORE_INDEX:
            continue
        content = None if token == tokenizer.eos_token_id else bytes_of(tokenizer, token)
        found.append((said, content, token, place))
        said += content or b""
    return found


def dense(trainer, temperature, kd_ratio):
    """The loss of all rows one by one, over full logits: bytes by the library's table, pairs by comparing all with all."""
    ours, theirs = trainer.pair.tokenizer, trainer.pair.teacher_tokenizer
    special = [{*tokenizer.all_special_ids, *(1, 3)} for tokenizer in (ours, theirs)]
    spelt = [
        {bytes_of(tokenizer, token): token for token in range(len(tokenizer)) if token not in out}
        for tokenizer, out in zip((ours, theirs), special, strict=True)
    ]
    common = [(token, spelt[1][content]) for content, token in spelt[0].items() if content in spelt[1]]
    common += [(ours.eos_token_id, theirs.eos_token_id)]
    student_ids, teacher_ids = (torch.tensor(side) for side in zip(*common, strict=True))
    ce, kd, count, gap, aligned, length = 0.0, 0.0, 0, 0.0, 0, 0
    for k in range(len(trainer.train_dataset)):
        example = trainer.train_dataset[k]
        row = example["aligned"]
        z_s = trainer.model(torch.tensor([example["input_ids"]])).logits[0]
        with torch.no_grad():
            z_t = trainer.teacher.model(torch.tensor([row.ids.tolist()])).logits[0]
        student = answer_of(ours, example["input_ids"], example["labels"])
        teacher = answer_of(theirs, row.ids.tolist(), row.teacher_labels.tolist())
        for _, _, token, place in student:
            own = -torch.log(reference.softmax(z_s[place - 1])[token])
            ce, gap, count = ce + own, gap + own.item(), count + 1
        gap -= sum(-math.log(reference.softmax(z_t[place - 1])[token]) for _, _, token, place in teacher)
        length += sum(len(content or b"") for _, content, _, _ in student)
        for before, content, one, place in student:
            for other_before, other_content, other, other_place in teacher:
                if (before, content) == (other_before, other_content) and (one, other) in common:
                    p = reference.softmax(z_t[other_place - 1][teacher_ids] / temperature)
                    q = reference.softmax(z_s[place - 1][student_ids] / temperature)
                    kd, aligned = kd + temperature**2 * reference.forward_kl(p, q), aligned + 1
    return ((1 - kd_ratio) * ce + kd_ratio * kd) / count, {
        "kd": float(kd.detach()), "rows": count, "aligned": aligned, "gap": gap / count, "answer_bytes": length
    }  # fmt: skip


@pytest.mark.parametrize(("tie", "kd_ratio", "temperature"), [(True, 0.5, 2.0), (False, 0.7, 1.0), (True, 1.0, 4.0)])
def test_loss_and_gradients_are_those_of_dense_logits(tmp_path, tie, kd_ratio, temperature):
    model = tiny_llama(seed=0, tie=tie).double()
    trainer = aligned_trainer(tmp_path, model=model, temperature=temperature, kd_ratio=kd_ratio)
    (batch,) = batches_of(trainer, [len(ROWS)])
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected, sums = dense(trainer, temperature, kd_ratio)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert largest_difference(gradients, {name: p.grad for name, p in model.named_parameters()}) < 1e-9
    totals = trainer.sums.step_meter.reduce(trainer.accelerator)
    assert totals.step_stats().gap == pytest.approx(sums.pop("gap"), rel=1e-9)
    assert {name: totals[name] for name in sums} == pytest.approx(sums, rel=1e-9)
    assert 0 < sums["aligned"] < sums["rows"]


def test_a_head_with_a_soft_cap_keeps_it(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager", eos_token_id=2,
        pad_token_id=2, bos_token_id=0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).double().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.7)
    trainer = aligned_trainer(tmp_path, model=model, temperature=2.0)
    (batch,) = batches_of(trainer, [len(ROWS)])
    expected, _ = dense(trainer, 2.0, 0.5)
    assert trainer.compute_loss(model.train(), batch).item() == pytest.approx(expected.item(), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------- laws


def test_temperature_changes_loss_and_gradient(tmp_path):
    found = []
    for temperature in (0.5, 1.0, 4.0):
        trainer = aligned_trainer(tmp_path, temperature=temperature)
        totals, gradients = step(trainer, batches_of(trainer, [9]))
        found.append((totals["kd"], totals["ce"], torch.cat([g.flatten() for g in gradients.values()])))
    for (kd, ce, gradient), (other, other_ce, other_gradient) in pairwise(found):
        assert ce == other_ce and abs(kd - other) > 1e-3 * kd
        assert float((gradient - other_gradient).norm() / gradient.norm()) > 1e-3


def test_padded_packed_and_micro_batched_are_one_step(tmp_path):
    padded, packed = (
        aligned_trainer(tmp_path, packing=packing, temperature={"name": "dts", "granularity": "sequence"})
        for packing in (False, True)
    )
    whole, gradients = step(padded, batches_of(padded, [9]))
    assert isinstance(packed.data_collator, PackedCollator)
    for trainer, sizes in ((padded, [2, 3, 4]), (packed, [9]), (packed, [1, 8])):
        totals, found = step(trainer, batches_of(trainer, sizes))
        assert largest_difference(found, gradients) < 1e-9
        names = set(whole) - {"tokens"}
        assert {name: totals[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-9)


def test_a_teacher_that_is_the_student_under_other_ids_has_nothing_to_teach(tmp_path):
    tokenizer = tiny_tokenizer()
    other, order = relabelled(tokenizer)
    student, teacher = tiny_llama(seed=0).double(), tiny_llama(seed=0).double()
    with torch.no_grad():
        weight = teacher.get_input_embeddings().weight
        weight[torch.tensor(order)] = weight.clone()
    trainer = aligned_trainer(tmp_path, model=student, teacher=teacher, teacher_tokenizer=other, temperature=2.0)
    totals, _ = step(trainer, batches_of(trainer, [9]))
    assert totals["aligned"] == totals["rows"] and abs(totals["kd"]) < 1e-12
    assert totals["teacher_ce"] == pytest.approx(totals["ce"], rel=1e-12)


def test_uncommon_ids_are_left_to_the_labels(tmp_path):
    """The soft loss alone gives the logits of ids that only the student has no gradient."""
    model = tiny_llama(seed=0, tie=False).double()
    trainer = aligned_trainer(tmp_path, model=model, kd_ratio=1.0, temperature=2.0)
    _, gradients = step(trainer, batches_of(trainer, [9]))
    rows, common = gradients["lm_head.weight"].abs().sum(1), trainer.common.common
    alone = torch.ones(len(rows), dtype=torch.bool)
    alone[torch.from_numpy(common.student)] = False
    assert 0 < int(alone.sum()) < len(rows) and not rows[alone].any() and rows[~alone].all()


def test_the_student_sees_nothing_of_the_teachers_side(tmp_path):
    trainer = aligned_trainer(tmp_path)
    (batch,) = batches_of(trainer, [3])
    assert {*keys.KEYS} & {*batch} and {*keys.KEYS} <= NOT_FOR_MODELS
    seen = []
    hook = trainer.model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append({*kwargs}), with_kwargs=True)
    trainer.compute_loss(trainer.model, batch)
    hook.remove()
    assert seen == [{"input_ids", "attention_mask", "use_cache"}]


def test_a_batch_in_which_nothing_is_the_same_teaches_its_labels(tmp_path):
    rows = [{"id": "a", "instruction": "Say", "output": "ŧ"}, {"id": "b", "instruction": "Say", "output": "no"}]
    teacher = tokenizer_of("word_piece", 900)
    trainer = aligned_trainer(
        tmp_path, rows=rows, teacher=tiny_gpt2(vocab=len(teacher)).double(), teacher_tokenizer=teacher, temperature=2.0
    )
    totals, gradients = step(trainer, batches_of(trainer, [1]))
    assert totals["aligned"] == totals["kd"] == totals["answer_bytes"] == 0 and totals["rows"] > 0
    assert totals["teacher_ce"] == pytest.approx(totals["ce"]) and totals.step_stats().gap == pytest.approx(0.0)
    assert all(gradient.isfinite().all() for gradient in gradients.values()) and any(
        g.any() for g in gradients.values()
    )
    trainer.train()


def test_a_step_in_which_nothing_is_the_same_leaves_the_gap_where_it_was(tmp_path):
    rows = [{"id": "a", "instruction": "Say", "output": "no"}, {"id": "b", "instruction": "Say", "output": "ŧ"}]
    teacher = tokenizer_of("word_piece", 900)
    given = {"teacher": tiny_gpt2(vocab=len(teacher)).double(), "teacher_tokenizer": teacher}
    options = {"max_steps": 2, "per_device_train_batch_size": 1, "seed": 3}
    trainer = aligned_trainer(
        tmp_path, rows=rows, temperature={"name": "dts", "rule": "gap"}, options=options,
        **given,
    )  # fmt: skip
    told = []
    end_step = trainer.temperature.end_step
    trainer.temperature.end_step = lambda stats: (told.append(stats.gap), end_step(stats))
    trainer.train()
    assert [line["aligned_share"] > 0 for line in trainer.state.log_history if "kl" in line].count(True) == 1
    assert len(told) == 1 and told[0] != 0


def test_rows_of_which_nothing_is_the_same_are_refused_unless_labels_alone_count(tmp_path):
    rows = [{"id": f"r{k}", "instruction": "Say", "output": "ŧ" * (k + 1)} for k in range(4)]
    teacher = tokenizer_of("word_piece", 900)

    def trainer(kd_ratio):
        given = {"teacher": tiny_gpt2(vocab=len(teacher)).double(), "teacher_tokenizer": teacher}
        return aligned_trainer(tmp_path, rows=rows, kd_ratio=kd_ratio, options={"max_steps": 1}, **given)

    with pytest.raises(UserError, match="no label of the training rows is the same for the teacher"):
        trainer(1.0).train()
    trainer(0.0).train()


@pytest.mark.parametrize("wrong", ["/a/folder", 3])
def test_a_tokenizer_that_is_none_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=r"teacher_tokenizer: got .*expected a tokenizer"):
        aligned_trainer(tmp_path, teacher_tokenizer=wrong)


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    whole = aligned_trainer(tmp_path, options=options)
    whole.train()
    again = aligned_trainer(tmp_path, options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    weights = [trainer.model.state_dict() for trainer in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = [[line["loss"] for line in one.state.log_history if "kl" in line] for one in (whole, again)]
    assert lines[0][-2:] == lines[1][-2:]


def test_generated_answers_are_the_students(tmp_path):
    trainer = aligned_trainer(
        tmp_path, model=tiny_llama(seed=0), teacher=tiny_gpt2(vocab=708), predict_with_generate=True
    )
    metrics = trainer.predict(ROWS[:3], max_new_tokens=4).metrics
    assert 0 < metrics["test_aligned_share"] < 1 and len(trainer.generate(ROWS[:2], max_new_tokens=4)) == 2


# ------------------------------------------------------------------------------------------------- what does not fit


def test_what_does_not_go_together_is_refused_by_name(tmp_path):
    tokenizer = tokenizer_of("byte_level", 900)
    tokens = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    for options, message in (
        ({"alignment": "overlapp"}, "overlap"),
        ({"teacher_tokenizer": None}, "teacher_tokenizer"),
        ({"vocab_alignment": "intersect"}, "vocab_alignment"),
        ({"rows": tokens}, "text of rows"),
        ({"data_collator": lambda rows: rows}, "data_collator"),
        ({"teacher": tiny_gpt2(vocab=50)}, "50"),
        ({"teacher": None, "kd_ratio": 0.0}, "the teacher is None"),
    ):
        with pytest.raises(UserError, match=message):
            if "teacher" in options and options["teacher"] is None:
                DistillationTrainer(
                    tiny_llama(), None, args=arguments(tmp_path), kd_ratio=0.0, train_dataset=ROWS, alignment="overlap",
                    processing_class=tiny_tokenizer(), teacher_tokenizer=tokenizer,
                )  # fmt: skip
            aligned_trainer(tmp_path, **options)
    with pytest.raises(UserError, match="beside teachers"):
        DistillationTrainer(
            tiny_llama(), teachers={"a": tiny_llama()}, args=arguments(tmp_path), train_dataset=ROWS, alignment="overlap",
            processing_class=tiny_tokenizer(), teacher_weights={"a": 1.0},
        )  # fmt: skip
