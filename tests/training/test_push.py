"""What goes to the Hub: the finished student, its tokenizer and its card, privately; from every door the same files."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.models.adapters import add_lora
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Lora
from dts_hf.training.hub_upload import UPLOAD
from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_llama, tiny_tokenizer

TOKEN = "hf_" + "OfMyOwnAndOfNobodyElse0"
STUDENT = [
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip
HELD_OUT = [
    {
        "id": f"secret-{i}",
        "instruction": f"Whisper word {i}",
        "input": f"context {i}",
        "output": f"plums of Ruritania {i}",
    }
    for i in range(3)
]
ROWS = [{"id": f"r{i}", "instruction": f"Say {i}", "input": "", "output": "yes and no"} for i in range(8)]


class Hub:
    """Hugging Face's client without a network: keeps what it is asked for."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.tokens: list[Any] = []

    def create_repo(self, name: str, *, token: Any = None, private: bool | None = None, exist_ok: bool = False) -> Any:
        self.created.append({"name": name, "private": private})
        self.tokens.append(token)
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def upload_folder(
        self, *, repo_id: str, folder_path: str, commit_message: str, token: Any, run_as_future: bool, **_: Any
    ) -> Any:
        folder = Path(folder_path)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.commits.append((f"{repo_id}: {commit_message}", files))
        self.tokens.append(token)
        if run_as_future:
            future: Future[str] = Future()
            future.set_result("url")
            return future
        return "url"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    import transformers.trainer

    client = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: client)
    return client


def files(hub: Hub) -> list[str]:
    """The names in the only commit."""
    assert len(hub.commits) == 1, [message for message, _ in hub.commits]
    return sorted(hub.commits[0][1])


def trainer_for(folder: Path, student: Any = None, **options: Any) -> DistillationTrainer:
    values = {
        "use_cpu": True, "report_to": "none", "save_strategy": "steps", "save_steps": 1, "max_steps": 2,
        "per_device_train_batch_size": 4, "disable_tqdm": True, "push_to_hub": True, "hub_token": TOKEN,
    }  # fmt: skip
    return DistillationTrainer(
        student or tiny_llama(), tiny_llama(seed=1), args=TrainingArguments(str(folder), **{**values, **options}),
        train_dataset=ROWS, eval_dataset=HELD_OUT, processing_class=tiny_tokenizer(),
    )  # fmt: skip


def test_the_trainer_pushes_the_student_alone(tmp_path: Path, hub: Hub) -> None:
    trainer = trainer_for(tmp_path / "words", save_total_limit=1)
    trainer.train()
    assert not hub.commits  # checkpoints stay here
    assert trainer.push_to_hub() == "url"
    assert files(hub) == STUDENT and hub.commits[0][0] == "me/words: End of training"
    assert hub.created == [{"name": "words", "private": True}] and set(hub.tokens) == {TOKEN}
    # Nothing is left behind, and the trainer goes on where it was.
    assert trainer.args.output_dir == str(tmp_path / "words") and trainer.args.hub_token == TOKEN
    assert sorted(path.name for path in (tmp_path / "words").iterdir()) == ["checkpoint-2"]
    assert "# words" in hub.commits[0][1]["README.md"].decode()


def test_a_finished_folder_is_pushed_in_place_of_the_model(tmp_path: Path, hub: Hub) -> None:
    trainer = trainer_for(tmp_path / "words")
    tiny_llama(seed=5).save_pretrained(tmp_path / "final")
    trainer.push_to_hub(finished=tmp_path / "final")
    saved = (tmp_path / "final" / "model.safetensors").read_bytes()
    assert hub.commits[0][1]["model.safetensors"] == saved and "tokenizer.json" not in files(hub)
    trainer.push_to_hub()  # only that once
    assert hub.commits[1][1]["model.safetensors"] != saved


def test_nobodys_token_is_written(tmp_path: Path, hub: Hub) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))  # uploads as well, as the Trainer's does
    trainer.push_to_hub(blocking=False).result()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in written if path.name == "training_args.bin"} == {
        "checkpoint-1", "checkpoint-2", "saved",
    }  # fmt: skip
    args = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert args.hub_token is None and args.max_steps == 2
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert [sorted(commit) for _, commit in hub.commits] == [STUDENT, STUDENT]


@pytest.mark.parametrize(("given", "private"), [(None, True), (True, True), (False, False)])
def test_a_repository_is_private_unless_somebody_says_otherwise(
    tmp_path: Path, hub: Hub, given: bool | None, private: bool
) -> None:
    trainer_for(tmp_path / "a", hub_private_repo=given)
    trainer_for(tmp_path / "b", push_to_hub=False).push_to_hub(private=given)
    assert [made["private"] for made in hub.created] == [private, private]


def test_one_tag_is_one_tag(tmp_path: Path, hub: Hub) -> None:
    trainer = trainer_for(tmp_path, hub_model_id="me/small")
    trainer.push_to_hub(tags="mytag")
    card = hub.commits[0][1]["README.md"].decode()
    tags = yaml.safe_load(card.split("---")[1])["tags"]
    assert {"mytag", "dts_hf", "knowledge-distillation", "constant"} <= set(tags) and not set("mytag") & set(tags)
    trainer.push_to_hub(tags=["one", "two"])
    assert {"one", "two"} <= set(yaml.safe_load(hub.commits[1][1]["README.md"].decode().split("---")[1])["tags"])


def test_an_adapter_is_pushed_alone_too(tmp_path: Path, hub: Hub) -> None:
    trainer_for(tmp_path, add_lora(tiny_llama(), Lora(r=2))).push_to_hub()
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert set(files(hub)) == adapter | set(STUDENT) - {"config.json", "generation_config.json", "model.safetensors"}


def test_what_lies_where_the_upload_is_made_is_not_uploaded(tmp_path: Path, hub: Hub) -> None:
    """Left by a killed process, or a link to somewhere else."""
    trainer, elsewhere = trainer_for(tmp_path / "mine"), tmp_path / "elsewhere"
    staged = tmp_path / "mine" / UPLOAD
    elsewhere.mkdir()
    (elsewhere / "answers.jsonl").write_text("plums of Ruritania")
    staged.parent.mkdir(exist_ok=True)
    staged.symlink_to(elsewhere)
    trainer.push_to_hub()
    staged.mkdir()
    (staged / "answers.jsonl").write_text("plums of Ruritania")
    trainer.push_to_hub()
    assert [sorted(commit) for _, commit in hub.commits] == [STUDENT, STUDENT]
    assert [path.name for path in elsewhere.iterdir()] == ["answers.jsonl"] and not staged.exists()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_checkpoints_are_not_for_the_hub(tmp_path: Path, hub: Hub, strategy: str) -> None:
    with pytest.raises(UserError, match=f"hub_strategy: got '{strategy}', expected 'end'"):
        trainer_for(tmp_path, hub_strategy=strategy)
    assert not hub.created


def test_a_student_in_pieces_is_not_replaced_by_a_checkpoint(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Trainer does under ZeRO-3 where DeepSpeed may not gather the weights."""
    trainer = trainer_for(tmp_path)

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        trainer._save(output_dir, state_dict={})

    monkeypatch.setattr(trainer, "save_model", save_model)
    with pytest.raises(UserError, match="stage3_gather_16bit_weights_on_model_save is false"):
        trainer.push_to_hub()
    assert not hub.commits and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- from a recipe


def recipe(folder: Path, **training: Any) -> Path:
    teacher = tiny_llama(layers=3)
    teacher.save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    for name, rows in (("train", ROWS), ("valid", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "student": {"init": {"from": "teacher", "layers": 2}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "train.jsonl", "validation": "valid.jsonl", "prompt_template": "chat"},
        "training": {"use_cpu": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no",
                     "per_device_train_batch_size": 4, "disable_tqdm": True, "push_to_hub": True, **training},
        "evaluation": {"max_new_tokens": 4, "every_steps": 1},
        "output": {"dir": "runs/mine"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("door", ["command", "python"])
def test_a_recipe_pushes_the_student_alone(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    """With checkpoints, scores and answers in the run directory, and no word of a held-out row in the card."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path = recipe(tmp_path)
    if door == "command":
        result = CliRunner().invoke(cli.app, ["train", str(path)])
        assert result.exit_code == 0, result.output
    else:
        distill(load_recipe(path))
    run = tmp_path / "runs" / "mine"
    assert (run / "checkpoint-2").is_dir() and (run / "predictions" / "student.jsonl").is_file()
    assert not list(run.glob(".hub*"))
    assert files(hub) == STUDENT and hub.created == [{"name": "mine", "private": True}]
    uploaded = hub.commits[0][1]
    for name in STUDENT[1:]:
        assert uploaded[name] == (run / "final" / name).read_bytes()
    card = uploaded["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    answers = [
        json.loads(line) for path in (run / "predictions").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len(answers) == 3 * len(HELD_OUT)
    told = {row[name] for row in HELD_OUT for name in row} | {
        a["prediction"] for a in answers if len(a["prediction"]) > 3
    }
    assert not [text for text in told if text in card]
    assert str(tmp_path) not in card
    assert not [p for p in run.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


def test_a_recipe_says_by_name_that_checkpoints_are_not_for_the_hub(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["train", str(recipe(tmp_path, hub_strategy="all_checkpoints"))])
    assert result.exit_code == 2 and "hub_strategy: got 'all_checkpoints'" in result.output
    assert not hub.created and not (tmp_path / "runs").exists()


def test_a_recipe_may_be_public(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    distill(load_recipe(recipe(tmp_path, hub_private_repo=False, hub_model_id="me/open", save_strategy="no")))
    assert hub.created == [{"name": "me/open", "private": False}] and files(hub) == STUDENT
