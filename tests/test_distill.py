"""The straight line end to end on tiny models: the run directory, its files, and what a user does with them next."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dts_hf.data.encoding import EncodedDataset
from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.evaluation.evaluate import evaluate
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.files import file_sha256
from dts_hf.language_modeling.scorer import weights_as
from dts_hf.runs.directory import RunDirectory
from dts_hf.task import Data, Rows, Task
from dts_hf.training.trainer import DistillationTrainer
from tests.support.recipes import in_full, recipe, write_rows
from tests.support.tiny import tiny_llama, tiny_tokenizer


def test_a_recipe_that_names_no_device_trains_where_it_can_and_says_so(workplace, capsys):
    """Bit for bit as with ``use_cpu: true``, in bf16 too, which transformers refuses on a CPU that nobody has named."""
    named, unnamed = recipe(training={"bf16": True}, output={"dir": "named"}), recipe(training={"bf16": True})
    assert unnamed.training.pop("use_cpu") is True
    runs = [distill(wanted) for wanted in (named, unnamed)]
    weights = [AutoModelForCausalLM.from_pretrained(run.final_path).state_dict() for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [run.read_environment()["device"] for run in runs] == ["CPU", "CPU"]
    assert len(re.findall(r"^training on the CPU \(\d+ threads\); ", capsys.readouterr().err, re.MULTILINE)) == 2


def test_the_run_directory_holds_exactly_this(workplace):
    wanted = recipe()
    run = distill(wanted)
    files = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "data_manifest.json",
        "environment.json",
        "figures/losses.png",
        "figures/optimizer.png",
        "figures/rouge.png",
        "figures/temperature.png",
        "final.json",
        "final/chat_template.jinja",
        "final/config.json",
        "final/dts_hf.json",
        "final/generation_config.json",
        "final/model.safetensors",
        "final/tokenizer.json",
        "final/tokenizer_config.json",
        "log.jsonl",
        "metrics.json",
        "predictions/student.jsonl",
        "predictions/student_before.jsonl",
        "predictions/teacher.jsonl",
        "recipe.yaml",
        "report.html",
        "scores.json",
    ]
    assert run.read_recipe() == in_full(wanted)
    kinds = [record["kind"] for record in run.read_log()]
    assert kinds.count("train") == 2 and kinds.count("generation") == 3  # before, at step 2, at the end
    metrics = run.read_metrics()
    assert set(metrics["models"]) == {"teacher", "student_before", "student"}
    for name, entry in metrics["models"].items():
        assert entry["sets"]["validation"]["n"] == 5
        forced = {"ce", "kl", "reverse_kl", "top1_agreement", "ece", "entropy", "n_tokens"}
        assert forced == set(entry["teacher_forced"]), name
    before, after = (metrics["models"][name]["teacher_forced"]["kl"] for name in ("student_before", "student"))
    assert after != before
    assert metrics["training"]["steps"] == 4 and metrics["training"]["tokens"] > 0
    manifest = run.read_data_manifest()
    assert manifest["splits"]["train"]["rows"] == 12 and len(manifest["splits"]["train"]["sha256"]) == 64
    assert len(run.read_predictions("student")) == 5


def test_the_student_loads_generates_and_has_its_cache_back(workplace):
    run = distill(recipe(evaluation={"models": []}))
    student = AutoModelForCausalLM.from_pretrained(run.final_path)
    tokenizer = AutoTokenizer.from_pretrained(run.final_path)
    assert student.config.num_hidden_layers == 2 and student.config.use_cache is True
    ids = tokenizer("Name a fruit", return_tensors="pt")
    with_cache = student.generate(**ids, max_new_tokens=6, do_sample=False)
    without = student.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


def test_same_recipe_same_student(workplace):
    weights = []
    for name in ("one", "two"):
        torch.manual_seed(len(name) * 7)  # whatever the caller did before
        run = distill(recipe(output={"dir": name, "report": False}))
        weights.append(AutoModelForCausalLM.from_pretrained(run.final_path).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_generation_during_training_changes_nothing(workplace):
    weights = []
    for name, every in (("with", 1), ("without", None)):
        run = distill(
            recipe(output={"dir": name, "report": False}, evaluation={"every_steps": every, "dtype": "bfloat16"})
        )
        weights.append(AutoModelForCausalLM.from_pretrained(run.final_path).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_teacher_answers_are_made_once_and_trained_on(workplace):
    first = distill(recipe(data={"responses": "teacher", "teacher_max_new_tokens": 8}, output={"dir": "a"}))
    again = distill(recipe(data={"responses": "teacher", "teacher_max_new_tokens": 8}, output={"dir": "b"}))
    answers = [run.read_data_manifest()["teacher_answers"] for run in (first, again)]
    assert [answer["cached"] for answer in answers] == [False, True]
    assert answers[0]["fingerprint"] == answers[1]["fingerprint"]
    teacher = first.read_predictions("teacher")
    assert all(row["references"] == [row["prediction"]] or not row["finished"] for row in teacher)
    assert all("pears" not in row["references"][0] for row in teacher)
    other = distill(recipe(data={"responses": "teacher", "teacher_max_new_tokens": 6}, output={"dir": "c"}))
    assert other.read_data_manifest()["teacher_answers"]["fingerprint"] != answers[0]["fingerprint"]


def test_rows_that_are_left_out_are_said_once(workplace, capsys, caplog):
    for name in ("train", "valid"):
        with (workplace / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"id": f"long-{name}", "instruction": "Name " * 200, "output": "no"}) + "\n")
    quiet = {"output": {"report": False}, "evaluation": {"models": []}}
    distill(recipe(**quiet))
    said = "".join(capsys.readouterr()) + caplog.text
    for name, count in (("train", 13), ("validation", 6)):
        assert said.count(f"{name}: {count - 1} of {count} rows kept; dropped as too long: 1 (long-") == 1, said
    answered = {"responses": "teacher", "teacher_max_new_tokens": 4}
    distill(recipe(data=answered, **{**quiet, "output": {"dir": "answers", "report": False}}))
    said = "".join(capsys.readouterr())
    (out,) = re.findall(r"data\.responses: teacher: left out (\d+) rows that it did not answer", said)
    kept = [int(count) for count in re.findall(r"(?:train|validation): (\d+) of \1 rows kept", said)]
    assert int(out) >= 2 and len(kept) == 2 and sum(kept) == 13 + 6 - int(out), said


def test_teacher_answers_leave_a_conversation_as_it_was(workplace):
    """The messages of a row are its prompt: the teacher's answer must not take the place of the user's question."""
    talk = [{"role": "user", "content": "Name a fruit"}, {"role": "assistant", "content": "a pear"}]
    (workplace / "train.jsonl").write_text(json.dumps({"id": "talk", "messages": talk}) + "\n")
    (workplace / "valid.jsonl").write_text(json.dumps({"id": "talk", "messages": talk}) + "\n")
    run = distill(
        recipe(data={"responses": "teacher", "teacher_max_new_tokens": 8}, output={"dir": "t", "report": False})
    )
    (row,) = run.read_predictions("teacher")
    assert "Name a fruit" in row["prompt"] and row["references"] != ["a pear"]


def test_lora_adapter_alone_is_small_and_loads_on_its_base(workplace):
    tiny_llama(seed=3, layers=2).save_pretrained("student")
    tiny_tokenizer().save_pretrained("student")
    lora = {"r": 4, "save": "adapter"}
    run = distill(recipe(student={"model": "student", "lora": lora}, output={"dir": "run", "report": False}))
    assert (run.final_path / "adapter_model.safetensors").is_file() and not (
        run.final_path / "model.safetensors"
    ).exists()


def test_lora_merged_is_a_plain_model(workplace):
    student = {"init": {"from": "teacher", "layers": [0, 3]}, "lora": {"r": 4, "save": "merged"}}
    run = distill(recipe(student=student, output={"dir": "run", "report": False}))
    assert AutoModelForCausalLM.from_pretrained(run.final_path).config.num_hidden_layers == 2
    assert not (run.final_path / "adapter_model.safetensors").exists()


def test_without_a_teacher_it_is_fine_tuning_with_the_same_report(workplace):
    run = distill(recipe(student={"model": "teacher", "init": None}, teacher=None, loss={"kd_ratio": 0.0}))
    metrics = run.read_metrics()
    assert set(metrics["models"]) == {"student_before", "student"}
    before, after = (metrics["models"][name]["teacher_forced"] for name in ("student_before", "student"))
    assert set(after) == {"ce", "ece", "entropy", "n_tokens"} and after["ce"] < before["ce"]
    card = (run.path / "README.md").read_text(encoding="utf-8")
    assert "trained on labels alone" in card and "knowledge-distillation" not in card and "emperature" not in card
    report = (run.path / "report.html").read_text(encoding="utf-8")
    assert "held-out KL" not in report and "the teacher it learnt from" not in report


def test_evaluate_repeats_the_runs_own_score(workplace):
    run = distill(recipe(output={"dir": "run", "report": False}))
    found = evaluate(str(run.path), EvaluationOptions(rows=5))
    assert found["models"]["student"]["sets"] == run.read_metrics()["models"]["student"]["sets"]
    assert found["protocol"] == run.read_metrics()["protocol"]
    assert (found["protocol"]["dtype"], found["protocol"]["batch_size"]) == ("float32", None)
    with pytest.raises(UserError, match="--data"):
        evaluate("teacher")


def test_evaluation_sets_are_answered_at_the_end_under_a_named_protocol(workplace):
    write_rows(workplace / "other.jsonl", 80, 4)
    wanted = recipe(
        evaluation={"protocol": "minillm", "sets": ["other.jsonl"], "set_rows": 3, "max_new_tokens": 6, "rows": 2},
        output={"dir": "run", "report": False},
    )
    run = distill(wanted)
    metrics = run.read_metrics()
    assert metrics["protocol"]["name"] == "minillm, template=chat, max_prompt_length=64, max_new_tokens=6"
    assert metrics["protocol"]["no_repeat_ngram_size"] == 6
    scored = {name: {key: e["n"] for key, e in entry["sets"].items()} for name, entry in metrics["models"].items()}
    both = {"validation": 2, "other": 3}
    assert scored == {"teacher": both, "student_before": {"validation": 2}, "student": both}
    (source,) = run.read_data_manifest()["evaluation_sets"].items()
    assert source == ("other", {"source": "other.jsonl", "sha256": file_sha256("other.jsonl"), "rows": 3})
    student = run.read_predictions("student")
    assert len(student) == 5 * 5 and {row["seed"] for row in student} == {10, 20, 30, 40, 50}
    found = evaluate(str(run.path), EvaluationOptions(["other.jsonl"], rows=3))
    assert found["models"]["student"]["sets"]["other"] == metrics["models"]["student"]["sets"]["other"]
    assert run.read_recipe() == in_full(wanted)


def test_a_set_with_the_name_of_the_validation_rows_is_refused_before_anything(workplace):
    (workplace / "held_out").mkdir()
    write_rows(workplace / "held_out" / "validation.jsonl", 80, 2)
    with pytest.raises(UserError, match=r"evaluation.sets: 'validation' is the name of .* rename the file"):
        distill(recipe(evaluation={"sets": ["held_out/validation.jsonl"]}))
    assert not (workplace / "run").exists()


def test_metrics_say_in_what_each_model_answered(workplace):
    """bf16 autocast is around the student's forward once the trainer has taken it, and never around the teacher's."""
    wanted = recipe(
        teacher={"model": "teacher", "dtype": "bfloat16"},
        training={"bf16": True, "max_steps": 1},
        evaluation={"rows": 2, "max_new_tokens": 2, "every_steps": None},
        output={"dir": "run", "report": False},
    )
    metrics = distill(wanted).read_metrics()
    assert metrics["models"]["teacher"]["dtype"] == "bfloat16"
    assert metrics["models"]["student"]["dtype"] == metrics["protocol"]["dtype"] == "bfloat16 autocast"
    assert metrics["protocol"]["batch_size"] == 32


def test_bf16_weights_come_back_bit_for_bit():
    model = tiny_llama(seed=1, tie=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with weights_as(model, "bfloat16"):
        assert model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_open_refuses_what_is_no_run(workplace):
    with pytest.raises(UserError):
        RunDirectory.open("teacher")


# ----------------------------------------------------------------------------------- controls that replay a finished run


QUICK = {"training": {"logging_steps": 1}, "evaluation": {"models": [], "every_steps": None}}


@pytest.fixture()
def recorded(workplace):
    temperature = {"name": "dts", "rule": "gap", "decoupled": True, "momentum": 0.5}
    run = distill(recipe(temperature=temperature, output={"dir": "runs/dts", "report": False}, **QUICK))
    return train_lines(run)


def train_lines(run):
    return [line for line in run.read_log() if line["kind"] == "train"]


def test_a_finished_run_is_replayed_in_every_way(recorded):
    def again(folder, **temperature):
        output = {"dir": f"runs/{folder}", "report": folder == "replay"}
        run = distill(recipe(temperature=temperature, output=output, **QUICK))
        assert run.read_recipe().temperature.model_dump().items() >= temperature.items()
        return [line["temperature"] for line in train_lines(run)]

    wanted = [line["temperature"] for line in recorded]
    assert len(set(wanted)) == 4
    assert again("replay", name="replay", run="runs/dts") == pytest.approx(wanted, rel=1e-6)
    card = Path("runs/replay/README.md").read_text(encoding="utf-8")
    assert "replay(run=./runs/dts)" in card
    gaps = {"replay": "runs/dts", "order": "permuted"}
    permuted = again("permuted", name="dts", momentum=0.5, gap_source=gaps, seed=1)
    assert permuted[0] == 3.0 and permuted != pytest.approx(wanted, rel=1e-3)
    matched = again("matched", name="cosine", match_mean_of="runs/dts")
    assert fmean(matched) == pytest.approx(fmean(wanted), rel=1e-6) and matched != pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"temperature": {"name": "replay", "run": "runs/dst"}},
            "temperature.run: runs/dst: no such folder.*Did you mean 'dts'",
        ),
        ({"training": {"max_steps": 5}}, "runs/dts has 4 optimizer steps and this run 5"),
        ({"training": {"max_steps": -1, "num_train_epochs": 1}}, "4 optimizer steps and this run 3"),
    ],
)
def test_a_run_that_cannot_be_replayed_is_refused_before_anything_is_written(recorded, workplace, change, words):
    sections = {"temperature": {"name": "replay", "run": "runs/dts"}, "training": {}, **change}
    sections["training"] = QUICK["training"] | sections["training"]
    wanted = recipe(evaluation=QUICK["evaluation"], **sections)
    with pytest.raises(UserError, match=words):
        distill(wanted)
    assert not [*workplace.glob("run/*")]


def test_a_run_may_replay_the_one_that_it_replaces(recorded):
    output = {"dir": "runs/dts", "overwrite": True, "report": False}
    run = distill(recipe(temperature={"name": "replay", "run": "runs/dts"}, output=output, **QUICK))
    before, after = ([line["temperature"] for line in lines] for lines in (recorded, train_lines(run)))
    assert after == pytest.approx(before, rel=1e-6)


def test_two_fixed_temperatures_by_recipe(workplace):
    temperature = {"name": "constant", "value": 2.0, "teacher_value": 3.0}
    run = distill(recipe(temperature=temperature, output={"dir": "run", "report": False}, **QUICK))
    assert {(line["temperature"], line["teacher_temperature"]) for line in train_lines(run)} == {(2.0, 3.0)}


def test_a_resume_goes_on_when_the_replayed_run_is_gone(recorded, workplace):
    training = QUICK["training"] | {"save_strategy": "steps", "save_steps": 2}
    wanted = recipe(
        temperature={"name": "replay", "run": "runs/dts"},
        training=training,
        evaluation=QUICK["evaluation"],
        output={"dir": "run", "report": False},
    )
    whole = train_lines(distill(wanted))
    shutil.rmtree("runs/dts")
    for name in ("metrics.json", "final", "checkpoint-4"):  # as if killed between steps 2 and 4
        path = workplace / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    names = ("step", "loss", "temperature", "teacher_temperature", "gap")
    again = train_lines(distill(wanted, resume=True))
    assert [[line[name] for name in names] for line in again] == [[line[name] for name in names] for line in whole]
    with pytest.raises(UserError, match=r"temperature.run: runs/dts: no such folder"):
        distill(wanted.model_copy(update={"output": wanted.output.model_copy(update={"dir": "new"})}))


# ------------------------------------------------------------------------------------------ a kind of task of one's own


class CountingScorer:
    """Notes what it is asked to score."""

    def __init__(self, run):
        self.run, self.asked = run, []

    def callbacks(self):
        return []

    def score(self, name, model):
        self.asked.append((name, sum(weight.sum().item() for weight in model.parameters())))

    def finish(self, training):
        self.run.write_metrics({"format": 1, "models": dict(self.asked), "training": training})


class Counting(Task[DistillationTrainer]):
    """Rows are numbers, to be counted up from; no file holds them, and nothing is generated."""

    def load_rows(self):
        return Rows(train=range(3, 11))

    def encode(self, rows, tokenizer):
        return Data(EncodedDataset([str(n) for n in rows.train], [[n, n + 1, n + 2] for n in rows.train], [1] * 8))

    def load_teacher(self):
        return tiny_llama(seed=0)

    def load_student(self, teacher, seed, made=None):
        return tiny_llama(seed=seed, layers=1)

    def make_trainer(self, args, models, data):
        tokenizer = models.tokenizer
        return DistillationTrainer(models.student, models.teacher, 2.0, args=args, train_dataset=data.train,
                                   processing_class=tokenizer)  # fmt: skip

    def manifest(self, rows, data):
        return {"splits": {"train": {"rows": len(rows.train)}}}

    def notes(self, rows, data):
        return [f"{len(data.train)} numbers"]

    def make_scorer(self, run, trainer, models, rows, data, kept):
        return CountingScorer(run)


def test_another_kind_of_task_takes_the_same_line(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["dts_hf.distill"], "task_of", Counting)
    run = distill(recipe(output={"report": False}))
    assert "8 numbers" in capsys.readouterr().err
    manifest = run.read_data_manifest()
    assert manifest.pop("models")["teacher"]["weights"].startswith("xxh3:")
    assert manifest == {"splits": {"train": {"rows": 8}}}
    metrics = run.read_metrics()
    assert list(metrics["models"]) == ["teacher", "student_before", "student"] and metrics["training"]["steps"] == 4
    assert metrics["models"]["student"] != metrics["models"]["student_before"]
    assert AutoModelForCausalLM.from_pretrained(run.final_path).config.num_hidden_layers == 1
    assert [line["step"] for line in run.read_log()] == [2, 4]
