"""Classification on the road of language models: the loss against the dense reference, labels, batches, whole runs."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

from dts_hf.classification.data import LabelledCollator, encode_labelled
from dts_hf.classification.glue_tasks import TASKS, GlueTask, LabelledRow, get_task, load_labelled, parse_labelled
from dts_hf.classification.models import (
    ClassifierTeacher,
    label_order,
    load_classifier,
    load_task_student,
    permute_outputs,
)
from dts_hf.classification.task import Classification
from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.data.samplers import DUMMY_ROW, PadToMultiple, dummy_row
from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.evaluation.glue_metrics import TASK_METRICS
from dts_hf.models.pruning import prune_layers
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe
from dts_hf.temperature import build_temperature, temperature_policies
from tests.support import reference
from tests.support.classifiers import MNLI, SST2, STSB, classifier, rows_of
from tests.support.recipes import in_full
from tests.support.recorded import options_of
from tests.support.tiny import tiny_llama, tiny_tokenizer


def trainer_of(folder: Path, task: GlueTask = SST2, kind: str = "llama", **options: Any) -> Any:
    training = {
        "use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, **options.pop("training", {}),
    }  # fmt: skip
    given: dict[str, Any] = {
        "model": classifier(kind, task, seed=1),
        "teacher": classifier(kind, task, seed=2),
        "train_dataset": rows_of(task, 8),
        "processing_class": tiny_tokenizer(),
        "args": TrainingArguments(str(folder), **training),
    }
    return ClassificationDistillationTrainer(task=task, **{**given, **options})


def a_batch(trainer: Any, rows: list[int]) -> dict[str, Any]:
    return dict(trainer.data_collator([trainer.train_dataset[index] for index in rows]))


# ------------------------------------------------------------------------------------------------------------ the loss


def dense_gradient(trainer: Any, batch: dict[str, Any], **how: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The float64 reference on the logits of double copies of both models, and its gradient by autograd."""
    student, teacher = trainer.model, trainer.classifier.model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        z_t = teacher.double()(**inputs).logits
    z_s = student.double()(**inputs).logits
    loss = reference.distillation_loss(z_s, z_t, batch["labels"], normalizer=len(batch["labels"]), **how)
    gradient = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    return loss.detach(), [g for g in gradient if g is not None]


@pytest.mark.parametrize("task", [SST2, MNLI])
@pytest.mark.parametrize(("divergence", "options"), [("forward_kl", {}), ("reverse_kl", {}), ("jsd", {"beta": 0.3})])
def test_loss_and_gradient_are_the_reference(tmp_path: Path, task: GlueTask, divergence: str, options: Any) -> None:
    trainer = trainer_of(tmp_path, task, temperature=3.0, kd_ratio=0.7, divergence={"name": divergence, **options})
    batch = a_batch(trainer, [0, 1, 2, 4, 7])
    trainer.model.train()  # no dropout in these models: the mode only chooses the temperature of training
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = [p.grad.double().clone() for p in trainer.model.parameters() if p.grad is not None]
    expected, gradient = dense_gradient(
        trainer, batch, name=divergence, options=options, temperature_student=3.0, temperature_teacher=3.0,
        kd_ratio=0.7, squared=True,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(found) == len(gradient)
    for ours, theirs in zip(found, gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", sorted(temperature_policies()))
def test_every_policy_trains_a_classifier(tmp_path: Path, name: str) -> None:
    trainer = trainer_of(
        tmp_path, MNLI, temperature=build_temperature(name, **options_of(name, 3)), kd_ratio=0.9, training={"max_steps": 3},
        train_dataset=rows_of(MNLI, 24),
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    logs = [line for line in trainer.state.log_history if "kd_loss" in line]
    assert len(logs) == 3
    for line in logs:
        assert all(math.isfinite(line[key]) for key in ("loss", "grad_norm", "kd_loss", "gap", "temperature"))
        assert line["temperature"] > 0
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("task", [SST2, MNLI])
def test_the_label_of_an_example_has_its_own_temperature(tmp_path: Path, task: GlueTask) -> None:
    trainer = trainer_of(tmp_path, task, temperature={"name": "ats", "tau_y": 4.0, "value": 1.5}, kd_ratio=1.0)
    batch = a_batch(trainer, [0, 1, 2, 4, 7])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        z_s, z_t = (model(**inputs).logits.double() for model in (trainer.model, trainer.classifier.model))
    p = reference.ats_target(z_t, batch["labels"], 4.0, 1.0)
    expected = 1.5**2 * reference.forward_kl(p, reference.softmax(z_s / 1.5)).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_temperature_acts(tmp_path: Path) -> None:
    losses = []
    for value in (1.0, 4.0):
        trainer = trainer_of(tmp_path, temperature=value, kd_ratio=1.0)
        trainer.model.train()
        losses.append(float(trainer.compute_loss(trainer.model, a_batch(trainer, [0, 1, 2]))))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_regression_is_squared_errors(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, STSB, kd_ratio=0.25, temperature={"name": "dts", "rule": "gap"})
    batch = a_batch(trainer, [0, 3, 5, 6])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, t = (model(**inputs).logits[:, 0].double() for model in (trainer.model, trainer.classifier.model))
    y = batch["labels"].double()
    assert float(loss) == pytest.approx(float((0.75 * (s - y) ** 2 + 0.25 * (s - t) ** 2).mean()), rel=1e-5)
    trainer.train()
    line = trainer.state.log_history[0]
    assert {"label_mse", "teacher_mse", "kd_loss"} <= set(line) and "ce_loss" not in line and "kl" not in line
    assert trainer.temperature.name == "constant"


@pytest.mark.parametrize("task", [SST2, STSB])
def test_the_gradient_of_a_step_does_not_depend_on_its_split(tmp_path: Path, task: GlueTask) -> None:
    weights = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        trainer = trainer_of(
            tmp_path, task, kd_ratio=0.5, temperature=2.0,
            training={"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation,
                      "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
                      "train_sampling_strategy": "sequential"},
        )  # fmt: skip
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in classifier("llama", task, seed=1).parameters()])
    step = (weights[0] - start).abs().max()
    assert step > 1e-4
    for other in weights[1:]:
        assert float((other - weights[0]).abs().max() / step) < 1e-4


def test_without_a_teacher_labels_alone_count(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, teacher=None, kd_ratio=0.0, temperature={"name": "dts", "rule": "gap"})
    batch = a_batch(trainer, [0, 1, 2, 5])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    logits = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(logits, batch["labels"])), rel=1e-5)
    trainer.train()
    line = trainer.state.log_history[0]
    assert math.isfinite(line["ce_loss"])
    assert not {"kl", "teacher_ce", "gap", "kd_loss", "temperature", "top1_agreement"} & set(line)
    with pytest.raises(UserError, match=r"teacher: got None with kd_ratio 0\.5"):
        trainer_of(tmp_path, teacher=None, kd_ratio=0.5)


# ------------------------------------------------------------------------------------------------------- batches, rows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_logits_do_not_depend_on_padding(kind: str) -> None:
    model, rows = classifier(kind), [parse_labelled(row, SST2, "r", "r") for row in rows_of(SST2, 7)]
    for pad in ("eos", "own"):
        tokenizer = tiny_tokenizer(pad=pad)
        tokenizer.padding_side = "left"  # our collator does not ask
        model.config.pad_token_id = tokenizer.pad_token_id
        dataset = encode_labelled(rows, tokenizer, max_length=64)
        assert dataset.report.prompts_cut == 0 and len(set(dataset.lengths)) > 2
        collate = LabelledCollator(int(tokenizer.pad_token_id))
        alone = []
        for index in range(len(dataset)):
            batch = collate([dataset[index]])
            alone.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
        batch = collate([dataset[index] for index in range(len(dataset))])
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_pairs_are_told_apart_and_cut_at_the_longer_text() -> None:
    rows = [LabelledRow("a", ("one", "two"), 0), LabelledRow("b", ("onetwo", "x " * 40), 1)]
    plain = tiny_tokenizer()
    dataset = encode_labelled(rows, plain, max_length=20)
    assert plain.decode(dataset[0]["input_ids"]) == "one\ntwo"
    assert dataset.report.prompts_cut == 1 and len(dataset[1]["input_ids"]) == 20
    assert plain.decode(dataset[1]["input_ids"]).startswith("onetwo\nx x")
    for texts in (("x " * 40, "two"), ("x " * 40, "y " * 40)):
        dataset = encode_labelled([LabelledRow("a", texts, 0)], plain, max_length=20)
        words = plain.decode(dataset[0]["input_ids"])
        assert dataset.report.prompts_cut == 1
        assert words.count("\n") == 1 and words.startswith("x x") and words.partition("\n")[2][0] in "ty"
    with_start = tiny_tokenizer(bos=True)  # its template puts a token between the texts
    dataset = encode_labelled(rows, with_start, max_length=20)
    assert with_start.decode(dataset[0]["input_ids"]) == "<|endoftext|>one<|endoftext|>two"
    with pytest.raises(UserError, match=r"task\.max_length: got 2"):
        encode_labelled(rows, with_start, max_length=2)


def test_no_row_is_evaluated_twice() -> None:
    rows = [parse_labelled(row, SST2, "r", "r") for row in rows_of(SST2, 7)]
    dataset = encode_labelled(rows, tiny_tokenizer(), max_length=64)
    found = list(PadToMultiple(dataset, 4, lambda row: dummy_row(row, -100), longest_first=True))
    assert len(found) == 8 and sorted(row["row_id"] for row in found) == [DUMMY_ROW, *range(7)]
    lengths = [len(row["input_ids"]) for row in found]
    assert lengths == [*sorted(lengths[:7], reverse=True), 1] and found[-1]["labels"] == -100


def test_metrics_are_those_of_the_model_and_of_the_teacher(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, MNLI, eval_dataset=rows_of(MNLI, 11), training={"per_device_eval_batch_size": 4})
    values = trainer.evaluate()
    rows = [parse_labelled(row, MNLI, "r", "r") for row in rows_of(MNLI, 11)]
    dataset = encode_labelled(rows, tiny_tokenizer(), max_length=128)
    batch = LabelledCollator(2)([dataset[index] for index in range(11)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for model, name in ((trainer.model, ""), (trainer.classifier.model, "teacher_")):
        right = model(**inputs).logits.argmax(-1) == batch["labels"]
        assert values[f"eval_{name}accuracy"] == pytest.approx(float(right.float().mean()))
    assert values["eval_rows"] == 11
    assert sorted(trainer.predicted["student"]) == list(range(11))


def test_the_teacher_answers_from_memory() -> None:
    model, calls = classifier(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    teacher = ClassifierTeacher(model)
    rows = [parse_labelled(row, SST2, "r", "r") for row in rows_of(SST2, 6)]
    dataset = encode_labelled(rows, tiny_tokenizer(), max_length=64)

    def batch(*indices: int) -> dict[str, torch.Tensor]:
        made = LabelledCollator(2)([dataset[index] for index in indices])
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    first, second = teacher.logits(batch(0, 1, 2)), teacher.logits(batch(3, 4, 5))
    again = teacher.logits(batch(5, 0, 3))  # other neighbours, other padding
    assert len(calls) == 2 and first is not None and second is not None and again is not None
    assert torch.equal(again, torch.stack([second[2], first[0], second[0]]))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"label": 1}, "field 'sentence' is missing; found the fields 'label'"),
        ({"sentense": "a", "label": 1}, "Did you mean 'sentense'?"),
        ({"sentence": " ", "label": 1}, "field 'sentence': got ' '"),
        ({"sentence": "a"}, "field 'label' is missing, expected 0 negative, 1 positive"),
        ({"sentence": "a", "label": 2}, "field 'label': got 2, expected 0 negative, 1 positive (task sst2)"),
        ({"sentence": "a", "label": "positive"}, "got 'positive'"),
        ({"sentence": "a", "label": True}, "got True"),
        ({"sentence": "a", "label": 0.5}, "got 0.5"),
        ({"sentence": "a", "label": -1}, "test splits are hidden"),
        ([], "expected an object"),
    ],
)
def test_wrong_rows(tmp_path: Path, row: Any, expected: str) -> None:
    good = {"sentence": "fine", "label": 0, "idx": 7}
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as caught:
        load_labelled(str(tmp_path / "train.jsonl.gz"), SST2)
    assert expected in str(caught.value) and "train.jsonl.gz: line 2" in str(caught.value)
    assert [found.id for found in load_labelled(str(tmp_path / "train.jsonl.gz"), SST2, limit=1)] == ["7"]


def test_scores_of_stsb_are_numbers_from_0_to_5() -> None:
    row = {"sentence1": "a", "sentence2": "b", "label": 4.5, "id": "stsb-1"}
    assert parse_labelled(row, STSB, "x", "y") == LabelledRow("stsb-1", ("a", "b"), 4.5)
    for label in (5.1, -0.1, float("nan"), "4"):
        with pytest.raises(UserError, match="a number from 0 to 5"):
            parse_labelled({**row, "label": label}, STSB, "x", "y")


def test_every_task_has_its_metrics_and_real_rows_load(shared_data_dir: Path) -> None:
    assert set(TASKS) | {"mnli_matched", "mnli_mismatched"} == set(TASK_METRICS)
    glue = shared_data_dir / "glue"
    if not glue.is_dir():
        pytest.skip("no GLUE rows")
    for task in TASKS.values():
        folders = [folder for folder in glue.glob(f"{task.subset}*") if folder.is_dir()]
        rows = load_labelled(str(folders[0]), task, split="validation", limit=50)
        assert rows and all(len(row.texts) == len(task.fields) for row in rows)


# -------------------------------------------------------------------------------------------------------------- labels


def test_old_mnli_order_is_permuted(tmp_path: Path) -> None:
    old = classifier(task=MNLI, seed=3)
    names = ("contradiction", "Entailment", "neutral")  # older scripts; case does not matter
    old.config.id2label = dict(enumerate(names))
    old.config.label2id = {name: number for number, name in enumerate(names)}
    old.save_pretrained(tmp_path / "old")
    ids = torch.arange(5, 12)[None]
    before = old(input_ids=ids).logits
    loaded = load_classifier(str(tmp_path / "old"), MNLI, key="teacher.model", fresh_head=False)
    torch.testing.assert_close(loaded(input_ids=ids).logits, before[:, [1, 2, 0]])
    assert loaded.config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    with pytest.raises(UserError, match="load_classifier, which reorders"):  # a model handed over as it is
        trainer_of(tmp_path, MNLI, teacher=old)


def test_an_mnli_teacher_without_names_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    nameless = classifier(task=MNLI, seed=3)
    nameless.config.id2label = {number: f"LABEL_{number}" for number in range(3)}
    nameless.config.label2id = {name: number for number, name in nameless.config.id2label.items()}
    nameless.save_pretrained(tmp_path / "nameless")
    with pytest.raises(UserError, match=r"teacher\.model: its labels have no names"):
        load_classifier(str(tmp_path / "nameless"), MNLI, key="teacher.model", fresh_head=False)
    with pytest.raises(UserError, match="the teacher: its labels have no names"):
        trainer_of(tmp_path, MNLI, teacher=nameless)
    trainer_of(tmp_path, MNLI, model=nameless)
    assert load_classifier(str(tmp_path / "nameless"), MNLI, key="student.model").config.id2label[2] == "contradiction"


def test_bert_outputs_are_permuted_with_their_bias() -> None:
    model = classifier("bert", MNLI)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    ids = torch.arange(5, 12)[None]
    before = model(input_ids=ids).logits
    permute_outputs(model, [2, 0, 1], "teacher.model")
    torch.testing.assert_close(model(input_ids=ids).logits, before[:, [2, 0, 1]])


def test_label_names(caplog: pytest.LogCaptureFixture) -> None:
    assert label_order({0: "negative", 1: "positive"}, SST2, "k") is None
    assert label_order({0: "POSITIVE", 1: "NEGATIVE"}, SST2, "k") == [1, 0]
    assert label_order({0: "not-entailment", 1: "entailment"}, TASKS["rte"], "k") == [1, 0]
    assert label_order({0: "LABEL_0"}, STSB, "k") is None
    caplog.clear()
    assert label_order({0: "LABEL_0", 1: "LABEL_1"}, SST2, "teacher.model") is None
    assert "its labels have no names; taken to be 0 negative, 1 positive" in caplog.text
    none = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert label_order({0: "LABEL_0", 1: "LABEL_1"}, SST2, "teacher.model", is_trained=False) is None
    assert label_order(none, MNLI, "student.model") is None  # it learns the order
    with pytest.raises(UserError, match=r"teacher\.model: its labels have no names .* into id2label"):
        label_order(none, MNLI, "teacher.model", is_trained=False)
    with pytest.raises(UserError, match="the model's labels are bad, good"):
        label_order({0: "bad", 1: "good"}, SST2, "teacher.model")
    with pytest.raises(UserError, match=r"teacher\.model: the model has 2 labels .* the task mnli 3 classes"):
        label_order({0: "LABEL_0", 1: "LABEL_1"}, MNLI, "teacher.model")
    with pytest.raises(UserError, match="one score"):
        label_order({0: "a", 1: "b"}, STSB, "student.model")
    with pytest.raises(UserError, match="Did you mean 'sst2'"):
        get_task("sst-2")


def test_a_language_model_gets_a_seeded_head_but_is_no_teacher(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "lm")
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_classifier(str(tmp_path / "lm"), MNLI, key="student.model").score.weight)  # type: ignore[union-attr]
    assert heads[0].shape == (3, 32)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"teacher\.model: .* lack 1 weights .* score\.weight; expected a fine-tuned"):
        load_classifier(str(tmp_path / "lm"), MNLI, key="teacher.model", fresh_head=False)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_pruning_keeps_the_head_and_all_layers_are_the_teacher(kind: str) -> None:
    teacher = classifier(kind, MNLI, layers=4)
    ids = torch.arange(5, 14)[None]
    whole, half = prune_layers(teacher, 4).eval(), prune_layers(teacher, [0, 3]).eval()
    torch.testing.assert_close(whole(input_ids=ids).logits, teacher(input_ids=ids).logits)
    assert half.config.num_hidden_layers == 2 and half.config.id2label == teacher.config.id2label
    assert type(half) is type(teacher)


def test_lora_trains_adapters_and_the_head() -> None:
    from dts_hf.recipe.schema import Init, Lora, Student

    wanted = Student(init=Init.model_validate({"from": "teacher", "layers": 1}), lora=Lora(r=2))
    student = load_task_student(wanted, classifier(), SST2)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trained) and any("score" in name for name in trained)
    assert all("lora" in name or "score" in name for name in trained)


def test_other_tokenizer_is_refused(tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match="different tokenizers"):
        trainer_of(tmp_path, teacher_tokenizer=other)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture()
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama(layers=4).save_pretrained("lm")
    tiny_tokenizer().save_pretrained("lm")
    for name, task in (("sst2", SST2), ("stsb", STSB)):
        for split, count in (("train", 24), ("validation", 9)):
            Path(f"{name}_{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows_of(task, count)), encoding="utf-8"
            )
    return tmp_path


def recipe(subset: str = "sst2", /, **sections: Any) -> Recipe:
    values: dict[str, Any] = {
        "task": {"name": "glue", "subset": subset, "max_length": 48},
        "student": {"model": "lm"},
        "data": {"train": f"{subset}_train.jsonl", "validation": f"{subset}_validation.jsonl"},
        "loss": {"kd_ratio": 0.0},
        "training": {"use_cpu": True, "num_train_epochs": 2, "logging_steps": 2, "per_device_train_batch_size": 8,
                     "learning_rate": 3e-3, "disable_tqdm": True},
        "output": {"dir": "teacher"},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = section if name == "student" else {**values.get(name, {}), **section}
    return Recipe.from_dict(values)


PRUNED = {"init": {"from": "teacher", "layers": 2}}
TEACHER = {"model": "teacher/final", "dtype": "float32"}


def test_a_random_student_has_the_teachers_shape_and_its_weights_from_the_seed(workplace: Path) -> None:
    classifier("llama", SST2, layers=4).save_pretrained("taught")
    tiny_tokenizer().save_pretrained("taught")

    def first_weights(seed: int, folder: str, layers: int) -> dict[str, torch.Tensor]:
        run = distill(recipe(
            student={"init": {"from": "config", "layers": layers}}, teacher={"model": "taught", "dtype": "float32"},
            loss={"kd_ratio": 0.5}, training={"max_steps": 1, "learning_rate": 0.0, "seed": seed}, output={"dir": folder},
        ))  # fmt: skip
        saved = AutoModelForSequenceClassification.from_pretrained(run.final_path)
        assert saved.config.num_hidden_layers == layers
        assert saved.config.id2label == {0: "negative", 1: "positive"}
        return saved.state_dict()

    one, same, other = (
        first_weights(1, "a", layers=2),
        first_weights(1, "b", layers=2),
        first_weights(2, "c", layers=2),
    )
    teacher = AutoModelForSequenceClassification.from_pretrained("taught").state_dict()
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        if weight.dim() > 1:
            assert not torch.equal(weight, other[name]) and not torch.equal(weight, teacher[name])


def test_fine_tune_then_distil(workplace: Path) -> None:
    first = distill(recipe())
    metrics = first.read_metrics()
    assert set(metrics["models"]) == {"student_before", "student"}
    wanted = recipe(
        student=PRUNED, teacher=TEACHER, loss={"kd_ratio": 0.5}, temperature={"name": "dts", "rule": "gap"},
        output={"dir": "student"},
    )  # fmt: skip
    run = distill(wanted)
    assert run.read_recipe() == in_full(wanted)
    metrics = run.read_metrics()
    teacher = metrics["models"]["teacher"]["sets"]["validation"]
    assert teacher["accuracy"] == first.read_metrics()["models"]["student"]["sets"]["validation"]["accuracy"]
    student = metrics["models"]["student"]["sets"]["validation"]
    assert student["n"] == 9 and student["teacher_kl"]["mean"] >= 0
    assert metrics["task"]["headline"] == "accuracy" and len(metrics["protocol"]["fingerprint"]) == 16
    # The best epoch is the student: the logged accuracy of that step, and the final one.
    logged = {r["step"]: r["eval_accuracy"] for r in run.read_log() if r["kind"] == "eval" and r["step"] > 0}
    best = metrics["training"]["best_step"]
    assert logged[best] == max(logged.values()) == student["accuracy"]["mean"]

    saved = AutoModelForSequenceClassification.from_pretrained(run.final_path)
    tokenizer = AutoTokenizer.from_pretrained(run.final_path)
    assert saved.config.id2label == {0: "negative", 1: "positive"} and saved.config.num_hidden_layers == 2
    assert saved.config.label2id == {"negative": 0, "positive": 1}
    for row in run.read_predictions("student"):
        logits = saved(**tokenizer(row["sentence"], return_tensors="pt", return_token_type_ids=False)).logits[0]
        assert logits.tolist() == pytest.approx(row["logits"], abs=2e-4)
        assert row["predicted"] == int(logits.argmax())

    card = run.card_path.read_text(encoding="utf-8")
    assert "AutoModelForSequenceClassification" in card and "ROUGE" not in card and "| accuracy |" in card
    page = run.report_path.read_text(encoding="utf-8")
    assert "accuracy" in page and "ROUGE-L" not in page
    assert sorted(path.name for path in run.figures_path.iterdir()) == [
        "losses.png", "optimizer.png", "scores.png", "temperature.png",
    ]  # fmt: skip
    card = first.card_path.read_text(encoding="utf-8")
    assert "labels alone" in card and "Citation" not in card
    assert "its teacher" not in card and "the model that gave it its first weights" in card


def test_the_best_epoch_is_kept_and_not_the_last(workplace: Path) -> None:
    """A learning rate that destroys the model makes the first scored epoch the best one or ties it."""
    run = distill(recipe(training={"learning_rate": 3.0, "num_train_epochs": 3, "max_grad_norm": 0.0, "seed": 3}))
    logged = {r["step"]: r["eval_accuracy"] for r in run.read_log() if r["kind"] == "eval" and r["step"] > 0}
    metrics = run.read_metrics()
    first_best = min(step for step, value in logged.items() if value == max(logged.values()))
    assert metrics["training"]["best_step"] == first_best
    assert metrics["models"]["student"]["sets"]["validation"]["accuracy"]["mean"] == max(logged.values())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("epoch", "epoch", None)),
        ({"eval_strategy": "steps", "eval_steps": 7}, ("steps", "steps", 7)),
        ({"eval_strategy": "steps"}, ("steps", "steps", 2)),  # logging_steps
        ({"save_strategy": "steps"}, ("steps", "steps", 2)),
        ({"save_strategy": "steps", "save_steps": 3}, ("steps", "steps", 3)),
        ({"save_strategy": "best"}, ("epoch", "best", None)),
        ({"save_strategy": "epoch"}, ("epoch", "epoch", None)),
    ],
)
def test_what_is_scored_is_saved(given: dict[str, Any], expected: tuple[str, str, int | None]) -> None:
    args = Classification(recipe(training=given)).training_arguments("run")
    assert (args.eval_strategy, args.save_strategy) == expected[:2] and args.load_best_model_at_end
    if expected[2] is not None:
        assert args.eval_steps == args.save_steps == expected[2]


def test_nothing_scored_or_nothing_saved_keeps_the_last_weights() -> None:
    for given in ({"eval_strategy": "no"}, {"save_strategy": "no"}):
        assert not Classification(recipe(training=given)).training_arguments("run").load_best_model_at_end


def last_scores(run: Any) -> dict[int, float]:
    return {r["step"]: r["eval_accuracy"] for r in run.read_log() if r["kind"] == "eval" and r["step"] > 0}


HARSH = {"learning_rate": 0.1, "max_steps": 5, "max_grad_norm": 0.0, "seed": 5, "eval_strategy": "steps"}


def test_scored_by_steps_the_best_step_is_kept(workplace: Path) -> None:
    run = distill(recipe(training={**HARSH, "eval_steps": 2}))
    logged, metrics = last_scores(run), run.read_metrics()
    assert sorted(logged) == [2, 4, 5]
    best = metrics["training"]["best_step"]
    assert best == min(step for step, value in logged.items() if value == max(logged.values()))
    assert metrics["training"]["best_epoch"] == pytest.approx(best / 3, abs=0.01)  # 24 rows by 8: three steps
    assert metrics["models"]["student"]["sets"]["validation"]["accuracy"]["mean"] == logged[best]
    assert metrics["protocol"]["checkpoint"] == "best evaluation by accuracy"
    # The log has a step once, with what the model was then; not the weights that were put back at the end.
    steps = [r["step"] for r in run.read_log() if r["kind"] == "eval"]
    assert steps == [0, 2, 4, 5]
    assert "chose the weights that are kept" in run.card_path.read_text(encoding="utf-8")


def test_best_is_said_only_of_weights_that_were_put_back(workplace: Path) -> None:
    run = distill(recipe(training={**HARSH, "eval_delay": 100}))
    metrics = run.read_metrics()
    assert metrics["protocol"]["checkpoint"] == "end of training"
    assert "best_step" not in metrics["training"] and "best_epoch" not in metrics["training"]
    assert "chose the weights" not in run.card_path.read_text(encoding="utf-8")
    assert metrics["models"]["student"]["sets"]["validation"]["accuracy"]["mean"] == last_scores(run)[5]


@pytest.mark.parametrize(("rate", "seed"), [(0.1, 3), (0.5, 5)])  # the best step is not saved; none is, or another one
def test_a_best_step_that_was_not_saved_is_not_claimed(workplace: Path, rate: float, seed: int) -> None:
    training = {**HARSH, "eval_steps": 1, "save_steps": 2, "learning_rate": rate, "seed": seed}
    run = distill(recipe(training=training, output={"report": False}))
    logged, metrics = last_scores(run), run.read_metrics()
    first_best = min(step for step, value in logged.items() if value == max(logged.values()))
    kept = metrics["training"].get("best_step")
    words = {None: "end of training", first_best: "best evaluation by accuracy"}
    assert metrics["protocol"]["checkpoint"] == words.get(kept, "best saved evaluation by accuracy")
    score = metrics["models"]["student"]["sets"]["validation"]["accuracy"]["mean"]
    assert score == logged[5 if kept is None else kept]


@pytest.mark.parametrize("wanted", [["teacher"], ["teacher", "student"], ["student"]])
def test_only_the_models_that_were_asked_for_are_scored(workplace: Path, wanted: list[str]) -> None:
    classifier().save_pretrained("taught")
    tiny_tokenizer().save_pretrained("taught")
    run = distill(recipe(
        student=PRUNED | {"init": {"from": "teacher", "layers": 1}}, teacher={"model": "taught", "dtype": "float32"},
        loss={"kd_ratio": 0.5}, evaluation={"models": wanted}, training={"max_steps": 1},
        output={"report": False},
    ))  # fmt: skip
    metrics = run.read_metrics()
    assert sorted(metrics["models"]) == sorted(wanted) == sorted(run.predictions_names())
    for name in wanted:
        found = metrics["models"][name]["sets"]["validation"]
        right = [row["predicted"] == row["label"] for row in run.read_predictions(name)]
        assert found["n"] == len(right) == 9 and found["accuracy"]["mean"] == pytest.approx(sum(right) / 9)


def test_scores_name_their_rows(workplace: Path) -> None:
    digests = []
    for count, name in ((None, "one"), (None, "two"), (5, "three")):
        wanted = recipe(
            data={"max_validation_rows": count}, training={"max_steps": 1}, output={"dir": name, "report": False}
        )
        digests.append(distill(wanted).read_metrics()["models"]["student"]["sets"]["validation"]["rows_sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_regression_run(workplace: Path) -> None:
    distill(recipe("stsb"))
    run = distill(recipe("stsb", student=PRUNED, teacher=TEACHER, loss={"kd_ratio": 0.5}, output={"dir": "student"}))
    scores = run.read_metrics()["models"]["student"]["sets"]["validation"]
    assert {"pearson", "spearmanr", "label_mse"} <= set(scores) and "label_ce" not in scores
    saved = AutoModelForSequenceClassification.from_pretrained(run.final_path)
    assert saved.config.num_labels == 1 and saved.config.problem_type == "regression"
    assert run.report_path.is_file() and "divergence" not in run.card_path.read_text(encoding="utf-8").lower()


def test_same_recipe_same_student_and_other_seed_other_student(workplace: Path) -> None:
    weights = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        torch.manual_seed(len(name))  # whatever the caller did before
        run = distill(recipe(training={"seed": seed}, output={"dir": name, "report": False}))
        weights.append(AutoModelForSequenceClassification.from_pretrained(run.final_path).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_the_table_of_seeds(workplace: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    try:
        from glue_table import table  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    for name, seed in (("a_1", 1), ("a_2", 2)):
        distill(recipe(training={"seed": seed, "num_train_epochs": 1}, output={"dir": name, "report": False}))
    distill(recipe(training={"num_train_epochs": 1, "learning_rate": 1e-3}, output={"dir": "b", "report": False}))
    lines = table(["a_1", "a_2", "b"]).splitlines()
    assert len(lines) == 4 and "a_1, a_2" in lines[2] and "1, 2" in lines[2] and "±" in lines[2]
    found = [
        json.loads(Path(name, "metrics.json").read_text())["models"]["student"]["sets"] for name in ("a_1", "a_2")
    ]
    scores = [100 * sets["validation"]["accuracy"]["mean"] for sets in found]
    assert f"| {sum(scores) / 2:.2f} ± {abs(scores[0] - scores[1]) / 2**0.5:.2f} |" in lines[2]
    distill(recipe(output={"dir": "c", "report": False}, data={"max_validation_rows": 5}))
    with pytest.raises(UserError, match="not comparable"):
        table(["a_1", "c"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"loss": {"kd_ratio": 0.5}}, "teacher: is missing, expected a mapping with model"),
        ({"student": PRUNED}, "there is no teacher; give student.model"),
        ({"data": {"packing": True}}, "data.packing: belongs to generated answers"),
        ({"evaluation": {"every_steps": 5}}, "evaluation.every_steps: belongs to generated answers"),
        ({"evaluation": {"sets": ["x.jsonl"]}}, "evaluation.sets: belongs to generated answers"),
        ({"evaluation": {"protocol": "minillm"}}, "evaluation.protocol: belongs to generated answers"),
        ({"task": {"subset": "sst-2"}}, "Did you mean \"sst2\"?"),
        ({"task": {"mismatched": "x.jsonl"}}, "mismatched is a validation set of mnli"),
    ],
)  # fmt: skip
def test_wrong_recipes(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(**change)
    assert expected.replace('"', "'") in str(caught.value).replace('"', "'")


def test_wrong_labels_leave_no_run_directory(workplace: Path) -> None:
    with pytest.raises(UserError, match=r"stsb_train\.jsonl: line 1: field 'sentence' is missing"):
        distill(recipe(data={"train": "stsb_train.jsonl"}))
    assert not Path("teacher").exists()


def test_the_recipes_of_a_task_differ_in_what_they_say() -> None:
    folder = Path(__file__).resolve().parents[2] / "recipes" / "glue"
    for subset in TASKS:
        kinds = {path.stem: load_recipe(path) for path in sorted((folder / subset).glob("*.yaml"))}
        wanted = {"teacher", "sft", "kd"} | ({"dts"} if subset != "stsb" else set())
        assert set(kinds) == wanted, subset
        assert all(found.task is not None and found.task.subset == subset for found in kinds.values())
        assert kinds["teacher"].teacher is None and kinds["sft"].loss.kd_ratio == 0 < kinds["kd"].loss.kd_ratio
        assert kinds["sft"].training == kinds["kd"].training and kinds["sft"].data == kinds["kd"].data
        if "dts" in kinds:
            same = {"temperature", "output"}
            assert kinds["dts"].model_dump(exclude=same) == kinds["kd"].model_dump(exclude=same)


def test_shortened_rows_are_said_and_raw_rows_are_evaluated_and_predicted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, eval_dataset={"a": rows_of(SST2, 5)}, max_length=6)
    report = trainer.encoding_reports["train_dataset"]
    assert report.prompts_cut == 8 == report.rows and report.prompt_tokens == sum(trainer.train_dataset.lengths) == 48
    assert "train_dataset: 8 of 8 rows kept; inputs shortened: 8" in caplog.text
    own, given = trainer.evaluate(), trainer.evaluate(rows_of(SST2, 5))
    output = trainer.predict(rows_of(SST2, 5))
    predicted = output.metrics
    for name in ("loss", "accuracy", "rows", "labels"):
        assert own[f"eval_a_{name}"] == given[f"eval_{name}"] == predicted[f"test_{name}"]
    assert own["eval_a_rows"] == own["eval_a_labels"] == 5
    assert output.predictions.tolist() == [trainer.predicted["student"][row] for row in range(5)]
    assert output.label_ids.tolist() == [row["label"] for row in rows_of(SST2, 5)]


def test_a_classifier_needs_a_padding_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="processing_class: has no padding token"):
        trainer_of(tmp_path, processing_class=tokenizer)


def test_the_card_from_python_is_that_of_a_classifier(tmp_path):
    from huggingface_hub import ModelCard

    for task, metric in ((SST2, "accuracy"), (STSB, "pearson")):
        trainer = trainer_of(tmp_path / task.subset, task, eval_dataset=rows_of(task, 8))
        trainer.train()
        assert "This student was not evaluated" in trainer.card(None)
        trainer.evaluate()
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / task.subset / "README.md")
        assert card.data.pipeline_tag == "text-classification" and f"glue-{task.subset}" in card.data.tags
        assert metric in {result.metric_type for result in card.data.eval_results}
        assert "AutoModelForSequenceClassification" in card.content and "None" not in card.content
