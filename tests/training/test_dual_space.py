"""``alignment: dual_space`` through ``DistillationTrainer``: the laws of the loss, and maps that are trained and kept."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.head import head_of
from dts_hf.training.projection import PROJECTORS_FILE
from dts_hf.training.trainer import DistillationTrainer
from tests.support import reference
from tests.support.alignment import instruction_rows, relabelled, tokenizer_of
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import arguments, largest_difference, losses, step_gradients, trainer_for

ROWS = instruction_rows(9)
STEP = 1e-6


def dual_trainer(folder, **options):
    """Student and teacher of two byte-level tokenizers and two widths, in float64."""
    tokenizer = tokenizer_of("byte_level", 900)
    defaults = {
        "model": tiny_llama(seed=0).double(), "teacher": tiny_gpt2(vocab=len(tokenizer), hidden=48, seed=1).double(),
        "rows": ROWS, "alignment": "dual_space", "teacher_tokenizer": tokenizer, "temperature": 2.0,
    }  # fmt: skip
    return trainer_for(folder, **{**defaults, **options})


def maps(trainer):
    return dict(trainer.projection.projectors.named_parameters())


def batches_of(trainer, sizes):
    examples = iter(trainer.train_dataset[k] for k in range(len(trainer.train_dataset)))
    return [trainer.data_collator([next(examples) for _ in range(size)]) for size in sizes]


def step(trainer, sizes):
    """The reduced sums of one step of micro-batches, and its gradients, those of the maps among them."""
    trainer.projection.projectors.zero_grad()
    gradients = step_gradients(trainer, batches_of(trainer, sizes))
    gradients |= {name: weight.grad.clone() for name, weight in maps(trainer).items()}
    return trainer.sums.step_meter.reduce(trainer.accelerator), gradients


# --------------------------------------------------------------------------------------------------- the loss, densely


def backbone_states(model, ids):
    return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]


def dense(trainer, temperature, kd_ratio, divergence="forward_kl"):
    """The loss over all rows from full logits, and how many labels are aligned."""
    student_head, teacher_head = head_of(trainer.model).weight, head_of(trainer.teacher.model).weight.detach()
    ours, theirs, ce, count = [], [], 0.0, 0
    for k in range(len(trainer.train_dataset)):
        example = trainer.train_dataset[k]
        row = example["aligned"]
        states = backbone_states(trainer.model, example["input_ids"])
        with torch.no_grad():
            teacher_states = backbone_states(trainer.teacher.model, row.ids.tolist())
        labels = [(place, label) for place, label in enumerate(example["labels"]) if label != IGNORE_INDEX]
        for place, label in labels:
            ce = ce - torch.log(reference.softmax(states[place - 1] @ student_head.T)[label])
        count += len(labels)
        for one, other in zip(row.student.tolist(), row.teacher.tolist(), strict=True):
            (place, label), their_place = labels[one], int(row.labels[other])
            ours.append((states[place - 1], label))
            theirs.append((teacher_states[their_place - 1], int(row.ids[their_place])))
    (h_s, y_s), (h_t, y_t) = ((torch.stack([h for h, _ in side]), [y for _, y in side]) for side in (ours, theirs))
    soft = reference.dual_space_loss(
        (h_s, student_head, torch.tensor(y_s)), (h_t, teacher_head, torch.tensor(y_t)),
        *(maps(trainer)[name] for name in ("to_student", "to_teacher")), divergence, {}, temperature, True, count,
    )  # fmt: skip
    return (1 - kd_ratio) * ce / count + kd_ratio * soft, len(ours), count


@pytest.mark.parametrize(
    ("tie", "kd_ratio", "temperature", "divergence"),
    [(True, 0.5, 2.0, "forward_kl"), (False, 0.7, 0.5, "reverse_kl"), (True, 1.0, 4.0, "tvd")],
)
def test_loss_and_gradients_are_those_of_dense_logits(tmp_path, tie, kd_ratio, temperature, divergence):
    model = tiny_llama(seed=0, tie=tie).double()
    trainer = dual_trainer(tmp_path, model=model, temperature=temperature, kd_ratio=kd_ratio, divergence=divergence)
    (batch,) = batches_of(trainer, [len(ROWS)])
    loss = trainer.compute_loss(model.train(), batch)
    named = {**dict(model.named_parameters()), **maps(trainer)}
    found = dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))
    expected, aligned, count = dense(trainer, temperature, kd_ratio, divergence)
    right = dict(zip(named, torch.autograd.grad(expected, [*named.values()]), strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert largest_difference(found, right) < 1e-8
    totals = trainer.sums.step_meter.reduce(trainer.accelerator)
    assert (totals["aligned"], totals["rows"]) == (aligned, count) and 0 < aligned < count


def test_the_map_to_the_teacher_gets_the_derivative_of_the_reported_loss(tmp_path):
    trainer = dual_trainer(tmp_path)
    (batch,) = batches_of(trainer, [len(ROWS)])
    weight = trainer.projection.projectors.to_teacher
    (gradient,) = torch.autograd.grad(trainer.compute_loss(trainer.model.train(), batch), weight)
    direction = torch.randn_like(weight)
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            weight += sign * STEP * direction
            values.append(trainer.compute_loss(trainer.model, batch).item())
    slope = (values[0] - values[1]) / (2 * STEP)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


def test_temperature_changes_loss_and_gradient_and_not_the_gap(tmp_path):
    found = [step(dual_trainer(tmp_path, temperature=t), [9]) for t in (0.5, 1.0, 4.0)]
    overlap = dual_trainer(tmp_path, alignment="overlap")
    step_gradients(overlap, batches_of(overlap, [9]))
    gap = overlap.sums.step_meter.reduce(overlap.accelerator).step_stats().gap
    for k, (totals, gradients) in enumerate(found):
        assert totals.step_stats().gap == pytest.approx(gap, rel=1e-9)
        for other, other_gradients in found[:k]:
            assert abs(totals["kd"] - other["kd"]) > 1e-2 * other["kd"]
            assert torch.equal(gradients["to_student"], other_gradients["to_student"])  # CE_W is at T = 1
            for name in ("to_teacher", "model.embed_tokens.weight"):
                difference = (gradients[name] - other_gradients[name]).norm()
                assert difference > 1e-2 * other_gradients[name].norm()


@pytest.mark.parametrize("temperature", [{"name": "dts", "granularity": "sequence"}, "ctkd", "adakd"], ids=str)
def test_padded_packed_and_micro_batched_are_one_step(tmp_path, temperature):
    padded, packed = (dual_trainer(tmp_path, packing=packing, temperature=temperature) for packing in (False, True))
    whole, gradients = step(padded, [9])
    for trainer, sizes in ((padded, [2, 3, 4]), (packed, [9]), (packed, [1, 8])):
        totals, found = step(trainer, sizes)
        assert largest_difference(found, gradients) < 1e-9
        names = set(whole) - {"tokens"}
        assert {name: totals[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-9)


# ---------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("same_ids", [True, False])
def test_a_teacher_that_is_the_student_has_nothing_to_teach_in_either_space(tmp_path, same_ids):
    tokenizer, teacher = tiny_tokenizer(), tiny_llama(seed=0).double()
    if not same_ids:
        tokenizer, order = relabelled(tokenizer)
        with torch.no_grad():
            weight = teacher.get_input_embeddings().weight
            weight[torch.tensor(order)] = weight.clone()
    trainer = dual_trainer(tmp_path, teacher=teacher, teacher_tokenizer=tokenizer)
    totals, _ = step(trainer, [9])
    assert totals["aligned"] == totals["rows"] > 0
    assert abs(totals["kd"]) < 1e-9 and abs(totals["kd_teacher_space"]) < 1e-9
    assert totals["projector_ce"] == pytest.approx(totals["ce"], rel=1e-7)


def test_the_start_is_nearer_than_a_random_one(tmp_path):
    """A teacher that is the student behind an invertible map of its states, with noise on its head."""
    teacher = tiny_llama(seed=0, tie=False).double()
    torch.manual_seed(1)
    with torch.no_grad():
        head = teacher.lm_head.weight
        head.copy_(teacher.get_input_embeddings().weight)
        head += 0.05 * torch.randn_like(head)
    options = {"teacher": teacher, "teacher_tokenizer": tiny_tokenizer(), "temperature": 1.0}
    started, drawn = (dual_trainer(tmp_path, **options) for _ in range(2))
    for weight in maps(drawn).values():
        nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
    (first, _), (other, _) = step(started, [9]), step(drawn, [9])
    for name in ("kd", "kd_teacher_space"):
        assert first[name] < 0.5 * other[name]


# ------------------------------------------------------------------------------------------- the maps are trained and kept


def test_the_maps_are_trained_without_decay_and_are_no_part_of_the_student(tmp_path):
    options = {"max_steps": 4, "weight_decay": 0.5, "learning_rate": 0.01}
    trainer = dual_trainer(tmp_path, options=options, eval_dataset=ROWS[:4])
    before = {name: weight.detach().clone() for name, weight in maps(trainer).items()}
    trainer.train()
    group = trainer.optimizer.param_groups[-1]
    assert group["weight_decay"] == 0 and {*map(id, group["params"])} == {*map(id, maps(trainer).values())}
    assert all(not torch.equal(weight, before[name]) for name, weight in maps(trainer).items())
    assert not any("to_student" in name or "to_teacher" in name for name in trainer.model.state_dict())
    trainer.save_model(str(tmp_path / "saved"))
    assert not [path for path in (tmp_path / "saved").iterdir() if path.name == PROJECTORS_FILE]
    line = next(line for line in trainer.state.log_history if "kl" in line)
    assert {"kd_teacher_space", "projector_ce", "aligned_share", "ce_per_byte"} <= {*line}
    assert trainer.evaluate()["eval_projector_ce"] > 0


def test_the_maps_move_as_by_their_own_gradients(tmp_path):
    """SGD: after two steps of two micro-batches each map has moved by the learning rate times both gradients."""
    options = {
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    trainer, seen = dual_trainer(tmp_path, options=options), []
    start = {name: weight.detach().clone() for name, weight in maps(trainer).items()}
    reduce = trainer.projection.reduce

    def remembered():
        reduce()
        seen.append({name: weight.grad.clone() for name, weight in maps(trainer).items()})

    trainer.projection.reduce = remembered
    trainer.train()
    _, first = step(dual_trainer(tmp_path, options=options), [2, 2])
    assert len(seen) == 2
    for name, weight in maps(trainer).items():
        torch.testing.assert_close(seen[0][name], first[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(weight.detach(), start[name] - 0.1 * (seen[0][name] + seen[1][name]))


def test_a_resumed_run_ends_as_one_without_a_break(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3,
               "learning_rate": 0.01}  # fmt: skip
    more = {"temperature": {"name": "dts", "rule": "gap"}}
    straight = dual_trainer(tmp_path / "straight", options=options, **more)
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    saved = load_file(checkpoint / PROJECTORS_FILE)
    assert {*saved} == {"to_student", "to_teacher"} and saved["to_student"].shape == (48, 32)
    resumed = dual_trainer(tmp_path / "resumed", model=tiny_llama(seed=9).double(), options=options, **more)
    resumed.train(str(checkpoint))
    assert losses(resumed)[-4:] == losses(straight)[-4:]
    weights = [{**trainer.model.state_dict(), **maps(trainer)} for trainer in (resumed, straight)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    states = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, straight)]
    for index, of_weight in states[1].items():
        assert all(
            torch.equal(torch.as_tensor(states[0][index][key]), torch.as_tensor(v)) for key, v in of_weight.items()
        )


def test_checkpoints_of_another_alignment_are_refused(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    dual_trainer(tmp_path, alignment="overlap", options=options).train()
    with pytest.raises(UserError, match="alignment"):
        dual_trainer(tmp_path, options=options).train(True)


def test_an_optimizer_of_the_users_is_refused(tmp_path):
    model = tiny_llama(seed=0).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="optimizers"):
        dual_trainer(tmp_path, model=model, optimizers=(optimizer, None))


def test_a_student_of_model_init_begins_with_maps_of_its_own(tmp_path):
    tokenizer = tokenizer_of("byte_level", 900)
    trainer = DistillationTrainer(
        None, tiny_gpt2(vocab=len(tokenizer), hidden=48, seed=1).double(), 2.0, args=arguments(tmp_path), train_dataset=ROWS,
        model_init=lambda: tiny_llama(seed=3).double(), alignment="dual_space", teacher_tokenizer=tokenizer,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    first = {name: weight.detach().clone() for name, weight in maps(trainer).items()}
    trainer.train()
    assert all(not torch.equal(weight, first[name]) for name, weight in maps(trainer).items())
    trainer.call_model_init()
    assert all(torch.equal(weight, first[name]) for name, weight in maps(trainer).items())


@pytest.mark.parametrize("bf16", [False, True])
def test_lower_precision_trains(tmp_path, bf16):
    tokenizer = tokenizer_of("byte_level", 900)
    teacher = tiny_gpt2(vocab=len(tokenizer), hidden=48, seed=1).bfloat16()
    trainer = dual_trainer(
        tmp_path,
        model=tiny_llama(seed=0),
        teacher=teacher,
        options={"max_steps": 3, "bf16": bf16, "learning_rate": 0.01},
    )
    trainer.train()
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in maps(trainer).values())
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_maps_train_beside_an_adapter(tmp_path):
    from peft import LoraConfig

    trainer = dual_trainer(
        tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        options={"max_steps": 2, "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 1},
    )  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in maps(trainer).items()}
    trainer.train()
    assert all(not torch.equal(weight, before[name]) for name, weight in maps(trainer).items())
    assert (tmp_path / "checkpoint-2" / PROJECTORS_FILE).is_file()
