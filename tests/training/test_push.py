"""What a trainer uploads, over HTTP against a Hub in a thread: the staged student alone, whatever the strategy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainingArguments

from dts_hf.errors import UploadError, UserError
from dts_hf.models.adapters import add_lora
from dts_hf.recipe.schema import Lora
from dts_hf.training.hub_upload import UPLOAD
from dts_hf.training.trainer import DistillationTrainer
from tests.support.fake_hub import TOKEN, FakeHub, Fault, fake_hub
from tests.support.tiny import tiny_llama, tiny_tokenizer

STUDENT = [
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip
ROWS = [{"id": f"r{i}", "instruction": f"Say {i}", "input": "", "output": "yes and no"} for i in range(8)]
HELD_OUT = [
    {"id": f"secret-{i}", "instruction": f"Whisper word {i}", "input": f"context {i}", "output": f"plums of Ruritania {i}"}
    for i in range(3)
]  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, tmp_path_factory.mktemp("home")) as running:
        yield running


def trainer_for(folder: Path, student: Any = None, **options: Any) -> DistillationTrainer:
    values = {
        "use_cpu": True, "report_to": "none", "save_strategy": "steps", "save_steps": 1, "max_steps": 2, "eval_steps": 2,
        "eval_strategy": "steps", "per_device_train_batch_size": 4, "disable_tqdm": True, "push_to_hub": True,
        "hub_token": TOKEN, "hub_always_push": True,
    }  # fmt: skip
    return DistillationTrainer(
        student or tiny_llama(), tiny_llama(seed=1), {"name": "dts", "rule": "gap"},
        args=TrainingArguments(str(folder), **{**values, **options}),
        train_dataset=ROWS, eval_dataset=HELD_OUT, processing_class=tiny_tokenizer(),
    )  # fmt: skip


def metadata(card: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return values


def nothing_private_was_sent(hub: FakeHub, *more: str) -> None:
    sent = hub.bodies
    for word in ("Ruritania", "Whisper", "secret-", TOKEN, "exp_avg", "training_args", *more):
        assert word.encode() not in sent, word


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_every_strategy_uploads_the_student_alone(tmp_path: Path, hub: FakeHub, strategy: str) -> None:
    trainer = trainer_for(tmp_path / "words", hub_strategy=strategy, save_total_limit=1)
    trainer.train()
    expected = [] if strategy == "end" else ["Training in progress, step 1", "Training in progress, step 2"]
    assert [commit.message for commit in hub.commits] == expected
    assert trainer.push_to_hub() == f"{hub.endpoint}/me/words"
    assert hub.files("me/words") == STUDENT and hub.repositories["me/words"].private
    for commit in hub.commits:  # what was there already is not in it
        assert set(commit.added) <= set(STUDENT) and not commit.deleted
    assert len(hub.sent("PUT /lfs/")) == max(len(expected), 1)  # nor are large files sent that the Hub has
    if expected:
        assert "in progress at step 1" in hub.commits[0].added["README.md"].decode()
    assert "in progress" not in hub.text("me/words", "README.md")
    nothing_private_was_sent(hub, str(tmp_path))
    # Nothing is left behind, and the trainer goes on where it was.
    assert trainer.args.output_dir == str(tmp_path / "words") and trainer.args.hub_token == TOKEN
    assert sorted(path.name for path in (tmp_path / "words").iterdir()) == ["checkpoint-2"]


def test_the_card_from_python_is_the_one_of_a_recipe(tmp_path: Path, hub: FakeHub) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: gemma\nlanguage: [en, de]\n---\n# Base\n")
    trainer = trainer_for(tmp_path / "words", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    trainer.train()
    trainer.push_to_hub(tags="mytag", dataset="org/rows", language="fr")
    card = hub.text("me/words", "README.md")
    for words in ("`dts(rule=gap", "`forward_kl`", "0.5 x cross-entropy", "the local folder `base`",
                  "| teacher | a model made",
                  "2 optimizer steps", "held-out KL at T = 1", 'student = "me/words"', "apply_chat_template",
                  "Google's Gemma terms", "One training run"):  # fmt: skip
        assert words in card, words
    values = metadata(card)
    assert {"dts_hf", "knowledge-distillation", "dts", "forward_kl", "mytag"} <= set(values["tags"])
    assert values["license"] == "gemma" and values["language"] == "fr" and values["datasets"] == ["org/rows"]
    results = values["model-index"][0]["results"][0]["metrics"]
    forced = {"kl", "ce", "top1_agreement", "reverse_kl", "ece", "entropy"}
    assert {result["type"] for result in results} == forced and "None" not in card
    assert "recipe.yaml" not in card and "base_model" not in values
    nothing_private_was_sent(hub, str(tmp_path))
    trainer.create_model_card(model_name="other", license="mit")
    written = (tmp_path / "words" / "README.md").read_text()
    assert "# other" in written and metadata(written)["license"] == "mit" and "`dts(rule=gap" in written


def test_save_model_and_a_background_push_upload_the_same(tmp_path: Path, hub: FakeHub) -> None:
    trainer = trainer_for(tmp_path / "words", hub_strategy="end")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))  # uploads as well, as the Trainer's does
    assert hub.files("me/words") == STUDENT and hub.commits[0].message == "Model save"
    trainer.model.lm_head.weight.data += 1  # type: ignore[union-attr, operator]
    assert trainer.push_to_hub(blocking=False).result() == f"{hub.endpoint}/me/words"
    assert len(hub.commits) == 2 and hub.files("me/words") == STUDENT
    nothing_private_was_sent(hub, str(tmp_path))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in written if path.name == "training_args.bin"} == {
        "checkpoint-1", "checkpoint-2", "saved",
    }  # fmt: skip
    args = torch.load(tmp_path / "words" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert args.hub_token is None and args.max_steps == 2
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(("given", "private"), [(None, True), (True, True), (False, False)])
def test_a_repository_is_private_unless_somebody_says_otherwise(
    tmp_path: Path, hub: FakeHub, given: bool | None, private: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_for(tmp_path / "a", hub_private_repo=given)
    trainer_for(tmp_path / "b", push_to_hub=False).push_to_hub(private=given)
    assert [hub.repositories[f"me/{name}"].private for name in "ab"] == [private, private]
    assert f"me/a: the repository is {'private' if private else 'public'}" in capsys.readouterr().err


def test_a_public_repository_that_was_there_is_said(
    tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_for(tmp_path / "a", hub_private_repo=False)
    trainer_for(tmp_path / "a")
    assert "me/a: this repository was there already, and it is PUBLIC" in capsys.readouterr().err


def test_an_adapter_takes_the_place_of_whole_weights(tmp_path: Path, hub: FakeHub) -> None:
    trainer_for(tmp_path / "words").push_to_hub()
    trainer_for(tmp_path / "words", add_lora(tiny_llama(), Lora(r=2))).push_to_hub()
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    # Nothing of the first is left; the configuration of the whole model goes with its weights
    assert set(hub.files("me/words")) == adapter | set(STUDENT) - {"model.safetensors", "config.json"}
    assert metadata(hub.text("me/words", "README.md"))["library_name"] == "peft"


def test_what_lies_where_the_upload_is_made_is_not_uploaded(tmp_path: Path, hub: FakeHub) -> None:
    """Left by a killed process, or a link to somewhere else."""
    trainer, elsewhere = trainer_for(tmp_path / "mine"), tmp_path / "elsewhere"
    saved = tmp_path / "mine" / UPLOAD
    elsewhere.mkdir()
    (elsewhere / "vocab.txt").write_text("plums of Ruritania")
    saved.parent.mkdir(exist_ok=True)
    saved.symlink_to(elsewhere)
    trainer.push_to_hub()
    saved.mkdir()
    (saved / "vocab.txt").write_text("plums of Ruritania")
    trainer.push_to_hub()
    assert hub.files("me/mine") == STUDENT
    assert [path.name for path in elsewhere.iterdir()] == ["vocab.txt"] and not saved.exists()


def test_a_student_in_pieces_is_not_replaced_by_a_checkpoint(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Trainer does under ZeRO-3 where DeepSpeed may not gather the weights."""
    trainer = trainer_for(tmp_path / "words")

    def save_model(output_dir: str | None = None, _internal_call: bool = False) -> None:
        trainer._save(output_dir, state_dict={})

    monkeypatch.setattr(trainer, "save_model", save_model)
    with pytest.raises(UserError, match="stage3_gather_16bit_weights_on_model_save is false"):
        trainer.push_to_hub()
    assert not hub.commits and not list((tmp_path / "words").iterdir())


def test_a_failing_hub_does_not_end_training(tmp_path: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_for(tmp_path / "words")
    hub.faults.append(Fault("/commit/", 403))
    trainer.train()
    assert trainer.state.global_step == 2 and not hub.commits
    assert "step 1: me/words: upload failed: this login may not write there (403)" in capsys.readouterr().err
    with pytest.raises(UploadError, match="may not write there"):
        trainer.push_to_hub()
    hub.faults.clear()
    trainer.push_to_hub()
    assert hub.files("me/words") == STUDENT
    assert sorted(path.name for path in (tmp_path / "words").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_trainer_whose_login_is_refused_says_so_before_training(tmp_path: Path, hub: FakeHub) -> None:
    with pytest.raises(UserError, match=r"training.push_to_hub: words: the Hub does not know this login \(401\)"):
        trainer_for(tmp_path / "words", hub_token="hf_" + "somebodyElses")
