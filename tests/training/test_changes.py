"""What changes between the kill of a run and its resume: refused by name, or of no consequence for a single bit of its end.

One run is killed and copied for each change; a refusal comes before training, so most cases take a fraction of a second.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.models.description import (
    describe_for_training,
    describe_model,
    describe_tokenizer,
    knows_weights,
    weights_digest,
)
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.checkpoints import mark_complete, read_complete
from dts_hf.runs.comparison import changed_models
from dts_hf.runs.lock import LOCK
from dts_hf.training.temperature_callback import TemperatureCallback
from tests.support.ends import without_times
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS, trainer_for
from tests.workers.resume_worker import prepare
from tests.workers.resume_worker import recipe as ten_steps


class Killed(BaseException):
    """No code of ours catches it."""


def values(**sections: dict[str, Any]) -> dict[str, Any]:
    training = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, **sections.pop("training", {})}
    return ten_steps("run", training=training, **sections)


def live(folder: Path, resume: bool = True, kill_at: int | None = None, **sections: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if kill_at is not None:
            begin = TemperatureCallback.on_step_begin

            def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step + 1 == kill_at:
                    raise Killed
                begin(self, args, state, control, **kwargs)

            patch.setattr(TemperatureCallback, "on_step_begin", on_step_begin)
        distill(Recipe.from_dict(values(**sections)), resume=resume)


LORA = {"student": {"lora": {"r": 2, "dropout": 0.1}}}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders with a run that died in its fourth step, of a full student and of adapters on it (True)."""
    folders = {}
    for adapters in (False, True):
        folders[adapters] = tmp_path_factory.mktemp("killed")
        prepare(folders[adapters])
        with pytest.raises(Killed):
            live(folders[adapters], resume=False, kill_at=4, **(LORA if adapters else {}))
        assert read_complete(folders[adapters] / "run" / "checkpoint-2")["step"] == 2
    return folders


def end_of(run: Path) -> tuple[dict[str, bytes], list[Any]]:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in log:
        for key in [key for key in record if "per_second" in key or "time" in key or "seconds" in key]:
            del record[key]
    return {path.name: path.read_bytes() for path in sorted((run / "final").iterdir())}, log


@pytest.fixture(scope="module")
def expected(killed: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[Any]]:
    """The end where nothing has changed."""
    folder = tmp_path_factory.mktemp("same") / "work"
    shutil.copytree(killed[False], folder)
    live(folder)
    return end_of(folder / "run")


# ------------------------------------------------------------------------------------------------------------ the changes


def edit(path: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """``change`` of the content of a JSON file, or of a JSON value that ``change`` gives back in its place."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(change(content) or content))

    return apply


def put(path: str, key: str, value: Any) -> Callable[[Path], None]:
    return edit(path, lambda content: content.update({key: value}))


def one_bit(name: str) -> Callable[[Path], None]:
    """The least bit of one weight: shapes, header and size of the file stay."""

    def apply(folder: Path) -> None:
        path = folder / name / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-4] ^= 1
        path.write_bytes(content)

    return apply


def both(path: str, change: Callable[[str], Callable[[Path], None]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in ("student", "teacher"):
            change(f"{name}/{path}")(folder)

    return apply


def fewer_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"] = content["model"]["merges"][:-3]


def fewer_tokens(content: dict[str, Any]) -> None:
    first = "".join(content["model"]["merges"].pop())
    content["model"]["vocab"].pop(first)


def lines(path: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = (folder / path).read_text().splitlines()
        (folder / path).write_text("\n".join(change(found)) + "\n")

    return apply


def text(path: str, content: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / path).write_text(content)

    return apply


def other_model(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tiny_gpt2(seed=7, layers={"student": 2, "teacher": 3}[name]).save_pretrained(folder / name)

    return apply


NOTHING: dict[str, Any] = {}
REFUSED: dict[str, tuple[Callable[[Path], None] | None, dict[str, Any], str]] = {
    "teacher, other weights": (other_model("teacher"), NOTHING, r"  teacher\.weights: was \"xxh3:\w+ of [\d,]+ numbers"),
    "teacher, one bit": (one_bit("teacher"), NOTHING, r"  teacher\.weights: was"),
    "teacher, configuration": (put("teacher/config.json", "layer_norm_epsilon", 0.1), NOTHING,
                               r"  teacher\.config\.layer_norm_epsilon: was 1e-05, now 0\.1"),
    "teacher, activation": (put("teacher/config.json", "activation_function", "relu"), NOTHING,
                            r"  teacher\.config\.activation_function: was \"gelu_new\", now \"relu\""),
    "teacher, key nobody knows": (put("teacher/config.json", "attention_bias", True), NOTHING,
                                  r"  teacher\.config\.attention_bias: was not set, now true"),
    "student, one bit": (one_bit("student"), NOTHING, r"  student\.weights: was"),
    "student, dropout": (put("student/config.json", "resid_pdrop", 0.5), NOTHING,
                         r"  student\.config\.resid_pdrop: was 0\.1, now 0\.5"),
    "student, generation": (put("student/generation_config.json", "eos_token_id", 5), NOTHING,
                            r"  student\.generation\.eos_token_id: was 2, now 5"),
    "teacher, end of answers": (put("teacher/generation_config.json", "eos_token_id", 5), NOTHING,
                                r"  teacher\.generation\.eos_token_id: was 2, now 5"),
    "student, generation that is saved": (put("student/generation_config.json", "top_k", 7), NOTHING,
                                          r"  student\.generation\.top_k: was .*, now 7"),
    "tokenizers, end of sequence": (both("tokenizer_config.json", lambda path: put(path, "eos_token", "<|pad|>")), NOTHING,
                                    r"  student_tokenizer\.eos_token: was \"<\|im_end\|> \(2\)\", now \"<\|pad\|> \(3\)\""),
    "tokenizers, cut": (both("tokenizer.json", lambda path: edit(path, fewer_tokens)), NOTHING,
                        r"  student_tokenizer\.vocabulary: was \"xxh3:\w+ of 320 tokens\", now \"xxh3:\w+ of 319 tokens"),
    "tokenizers, merges": (both("tokenizer.json", lambda path: edit(path, fewer_merges)), NOTHING,
                           r"  student_tokenizer\.rules: was"),
    "tokenizer of the teacher alone": (put("teacher/tokenizer_config.json", "pad_token", "<|pad|>"), NOTHING,
                                       r"  teacher_tokenizer\.pad_token: was \"<\|im_end\|> \(2\)\", now"),
    "chat template": (both("chat_template.jinja", lambda path: text(path, "{{ messages[0]['content'] }}")), NOTHING,
                      r"  student_tokenizer\.chat_template: was \"xxh3"),
    "chat template, gone": (lambda folder: (folder / "student" / "chat_template.jinja").unlink(), NOTHING,
                            r"  student_tokenizer\.chat_template: was \"xxh3:\w+\", now null"),
    "rows, one word": (lines("train.jsonl", lambda rows: [rows[0].replace("apples", "plums"), *rows[1:]]), NOTHING,
                       r"rows of 'train' have changed .* \(sha256 was"),
    "rows, another order": (lines("train.jsonl", lambda rows: rows[::-1]), NOTHING, r"rows of 'train' have changed"),
    "rows, fewer": (lines("train.jsonl", lambda rows: rows[:-1]), NOTHING, r"rows of 'train' have changed"),
    "rows, held out": (lines("valid.jsonl", lambda rows: rows[::-1]), NOTHING, r"rows of 'validation' have changed"),
    "recipe, learning rate": (None, {"training": {"learning_rate": 0.1}}, r"  training\.learning_rate: was 0\.01, now 0\.1"),
    "recipe, seed": (None, {"training": {"seed": 5}}, r"  training\.seed: was 42, now 5"),
    "recipe, steps": (None, {"training": {"max_steps": 8}}, r"  training\.max_steps: was 4, now 8"),
    "recipe, batch": (None, {"training": {"per_device_train_batch_size": 3}}, r"step had 4 rows and would have 6"),
    "recipe, loss": (None, {"loss": {"kd_ratio": 0.9}}, r"  loss\.kd_ratio: was 0\.5, now 0\.9"),
    "recipe, temperature": (None, {"temperature": {"ramp": 0.2}}, r"  temperature\.ramp: was 0\.1, now 0\.2"),
    "recipe, template": (None, {"data": {"prompt_template": "alpaca"}}, r"  data\.prompt_template: was \"plain\""),
    "recipe, type": (None, {"teacher": {"dtype": "bfloat16"}}, r"  teacher\.dtype: was \"float32\""),
    "manifest, gone": (lambda folder: (folder / "run" / "data_manifest.json").unlink(), NOTHING,
                       r"data_manifest\.json: missing, and it alone knows .* checkpoint-2 was made with"),
    "manifest, broken": (text("run/data_manifest.json", "{"), NOTHING, r"data_manifest\.json: broken JSON"),
}  # fmt: skip


def refusal(folder: Path, **sections: Any) -> str:
    """What a resume that is refused says; nothing in its run directory has changed by it."""
    run = folder / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}
    with pytest.raises(UserError) as caught:
        live(folder, **sections)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK} == before
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_change_that_acts_is_refused_by_name(killed, tmp_path, name):
    change, sections, named = REFUSED[name]
    folder = tmp_path / "work"
    shutil.copytree(killed[False], folder)
    if change is not None:
        change(folder)
    says = refusal(folder, **sections)
    assert re.search(named, says), says


def test_the_message_says_what_to_do_and_no_more_than_a_person_reads(killed, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(killed[False], folder)
    tiny_llama(seed=1, layers=3).save_pretrained(folder / "teacher")  # another architecture: everything differs
    says = refusal(folder).splitlines()
    assert (
        says[0] == "run: its models are not those that it was started with, so going on would give numbers of neither:"
    )
    assert re.fullmatch(r"  and \d+ more", says[-2]) and len(says) == 15
    assert says[-1] == "Put them back as they were, or choose another output.dir, or start again with --overwrite"


@pytest.mark.parametrize("name", ["frozen weights", "none"])
def test_what_adapters_stand_on_is_in_no_checkpoint_and_compared(killed, tmp_path, name):
    folder = tmp_path / "work"
    shutil.copytree(killed[True], folder)
    if name == "none":
        live(folder, **LORA)
        return
    one_bit("student")(folder)
    assert "  student.frozen_weights: was" in refusal(folder, **LORA)


# ------------------------------------------------------------------------------------------------- changes without effect


def in_shards(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    (folder / "teacher" / "model.safetensors").unlink()
    model.save_pretrained(folder / "teacher", max_shard_size="40KB")
    assert len([*(folder / "teacher").glob("*.safetensors")]) > 1


def saved_again(folder: Path) -> None:
    """The same tensors under another header."""
    for name in ("student", "teacher"):
        path = folder / name / "model.safetensors"
        save_file(load_file(path), path, metadata={"format": "pt", "note": "again"})
        os.utime(path, (1, 1))


def moved(folder: Path) -> None:
    """The run and everything that it is made of lies elsewhere, and its files name the writer."""
    for name in ("student", "teacher"):
        put(f"{name}/config.json", "transformers_version", "4.0.0")(folder)
        put(f"{name}/config.json", "_name_or_path", "elsewhere")(folder)


def sampled(folder: Path) -> None:
    """Published teachers say how they want to be sampled, and nobody here does."""
    put("teacher/generation_config.json", "top_k", 7)(folder)
    put("teacher/generation_config.json", "pad_token_id", 9)(folder)


def without_record(folder: Path) -> None:
    """A run of 0.1.0."""
    edit("run/data_manifest.json", lambda content: content.pop("models") and content)(folder)
    checkpoint = folder / "run" / "checkpoint-2"
    record = {
        key: value for key, value in read_complete(checkpoint).items() if key not in ("models", "files", "format")
    }
    mark_complete(checkpoint, **record)
    assert "models" not in read_complete(checkpoint)


@pytest.mark.parametrize("change", [in_shards, saved_again, moved, sampled, without_record])
def test_a_change_without_effect_ends_in_the_same_bits(killed, expected, tmp_path, capsys, change):
    folder = tmp_path / "work"
    shutil.copytree(killed[False], folder)
    change(folder)
    capsys.readouterr()
    live(folder)
    assert end_of(folder / "run") == expected
    older = "an older version began this run and did not record its models: a change is not noticed"
    assert (older in capsys.readouterr().err) == (change is without_record)


def test_models_and_tokenizers_in_another_folder_are_the_same(killed, expected, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(killed[False], folder)
    for name in ("student", "teacher"):
        (folder / name).rename(folder / f"moved_{name}")
    live(folder, **{name: {"model": str(folder / f"moved_{name}")} for name in ("student", "teacher")})
    assert end_of(folder / "run")[1] == expected[1]


def test_another_folder_is_refused_where_nothing_tells_its_weights(killed, tmp_path):
    """As of weights that were nowhere whole when they were described."""
    folder = tmp_path / "work"
    shutil.copytree(killed[False], folder)
    (folder / "teacher").rename(folder / "moved_teacher")
    elsewhere = {"teacher": {"model": str(folder / "moved_teacher")}}
    edit("run/data_manifest.json", lambda content: content["models"]["teacher"].pop("weights") and content)(folder)
    assert re.search(r"  teacher\.model: was \"teacher\", now \"\S+moved_teacher\"", refusal(folder, **elsewhere))
    with_files = {"files": None, "unpacked_weights": "xxh3:1"}
    for of, known in (
        ({}, False),
        (with_files, False),
        ({**with_files, "files": "x"}, True),
        ({"frozen_weights": "x"}, True),
    ):
        assert knows_weights(of) is known


def test_a_teacher_that_answers_nothing_may_end_answers_as_it_likes(tmp_path):
    prepare(tmp_path)
    alone = {"evaluation": {"models": ["student"]}}
    with pytest.raises(Killed):
        live(tmp_path, resume=False, kill_at=4, **alone)
    put("teacher/generation_config.json", "eos_token_id", 5)(tmp_path)
    live(tmp_path, **alone)
    assert (tmp_path / "run" / "final").is_dir()


def history(run: Path) -> list[dict[str, Any]]:
    return without_times(json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["log_history"])


def test_the_first_scores_are_in_the_history_of_a_run_that_died_before_its_first_checkpoint(tmp_path):
    """As in the log: the state of the Trainer is what callbacks, trackers and the card read."""
    folders = [tmp_path / name for name in ("straight", "died")]
    for folder in folders:
        prepare(folder)
    live(folders[0], resume=False)
    with pytest.raises(Killed):
        live(folders[1], resume=False, kill_at=2)
    assert not [*(folders[1] / "run").glob("checkpoint-*")] and (folders[1] / "run" / "scores.json").is_file()
    live(folders[1])
    straight, died = (history(folder / "run") for folder in folders)
    assert [line for line in straight if line["step"] == 0], straight
    assert died == straight


def test_other_tokens_of_the_same_rows_are_refused_whatever_has_made_them(killed, tmp_path):
    """The rules of tokenizers are not compared between versions of transformers, which write them in other words."""
    folder = tmp_path / "work"
    shutil.copytree(killed[False], folder)
    both("tokenizer.json", lambda path: edit(path, fewer_merges))(folder)
    edit("run/data_manifest.json", lambda content: content["models"].update(transformers="4.0.0"))(folder)
    assert "the rows of 'train' are the same, but not their tokens (of prompts " in refusal(folder)


def test_the_record_of_a_checkpoint_counts_too_where_the_manifest_has_none(killed, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(killed[False], folder)
    edit("run/data_manifest.json", lambda content: content.pop("models") and content)(folder)
    one_bit("teacher")(folder)
    says = refusal(folder)
    assert says.startswith("run/checkpoint-2: its models") and "teacher.weights: was" in says


# ---------------------------------------------------------------------------------------------------------- from the Hub


def test_a_name_on_the_hub_that_has_moved_on_is_refused_with_the_commit_to_set(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository, (first, second, third) = cache / "models--org--teacher", (letter * 40 for letter in "abc")
    prepare(tmp_path)

    def main(commit: str) -> None:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(tmp_path / "teacher", repository / "snapshots" / commit)

    main(first)
    of_hub = {"teacher": {"model": "org/teacher"}}
    with pytest.raises(Killed):
        live(tmp_path, resume=False, kill_at=4, **of_hub)
    manifest = json.loads((tmp_path / "run" / "data_manifest.json").read_text())
    assert manifest["models"]["teacher"]["commit"] == first and manifest["models"]["student"]["commit"] is None
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    main(second)  # of the readme alone
    live(tmp_path, **of_hub)
    end = end_of(tmp_path / "run")
    other_model("teacher")(tmp_path)
    main(third)
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "killed", tmp_path / "run")
    says = refusal(tmp_path, **of_hub)
    assert "teacher.weights: was" in says
    assert f"the Hub's teacher was commit {first}, and is {third}: set teacher.revision to the first" in says
    live(tmp_path, teacher={"model": "org/teacher", "revision": first})
    assert end_of(tmp_path / "run") == end


# ------------------------------------------------------------------------------------------------------------- from Python


def config_of(model: Any, **changes: Any) -> Any:
    for key, value in changes.items():
        setattr(model.config, key, value)
    return model


def frozen(model: Any) -> Any:
    model.get_input_embeddings().requires_grad_(False)
    return model


def lora(alpha: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_a_trainer_refuses_what_it_can_tell_exactly(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, options=options).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    changes = {
        r"teacher\.weights: was": {"teacher": tiny_llama(seed=2, layers=3)},
        r"teacher\.config\.rms_norm_eps: was 1e-06, now 0\.1": {
            "teacher": config_of(tiny_llama(seed=1, layers=3), rms_norm_eps=0.1)
        },
        r"student\.config\.attention_dropout: was 0\.0, now 0\.3": {
            "model": config_of(tiny_llama(seed=0), attention_dropout=0.3)
        },
        r"student_tokenizer\.rules: was": {"processing_class": tiny_tokenizer(bos=True)},
        r"student_tokenizer\.chat_template: was .*, now null": {"processing_class": tiny_tokenizer(chat=False)},
    }
    for named, more in changes.items():
        with pytest.raises(UserError, match=named) as caught:
            trainer_for(tmp_path, options=options, **more).train(checkpoint)
        assert str(caught.value).startswith(f"{checkpoint}: its models are not those")
        assert str(caught.value).endswith("or train from the beginning")
    launches = {
        r"student\.trained_dtypes": {"model": tiny_llama(seed=0).to(torch.bfloat16)},
        r"student\.trained: was": {"model": frozen(tiny_llama(seed=0))},
        r"the tokens of the training rows are others": {"rows": [*ROWS[1:], ROWS[0]]},
    }
    for named, more in launches.items():
        with pytest.raises(UserError, match=named):
            trainer_for(tmp_path, options=options, **more).train(checkpoint)
    with pytest.raises(UserError, match=r"the optimizer was adamw_torch\w* and would be sgd \(training.optim\)"):
        trainer_for(tmp_path, options={**options, "optim": "sgd"}).train(checkpoint)
    # The weights that are trained are the checkpoint's, whatever the student had; and the same trainer goes on
    same = trainer_for(tmp_path, tiny_llama(seed=9), options=options)
    assert same.train(checkpoint).global_step == same.train(checkpoint).global_step == 3


def test_a_trainer_knows_the_models_of_a_run_of_the_command_line(killed, tmp_path, monkeypatch):
    monkeypatch.chdir(killed[False])
    record = read_complete(killed[False] / "run" / "checkpoint-2")["models"]
    manifest = json.loads((killed[False] / "run" / "data_manifest.json").read_text())
    assert record == manifest["models"]
    tokenizer = AutoTokenizer.from_pretrained("student")
    for name, expected in (("teacher", []), ("student", ["teacher.weights", "teacher.config.attn_pdrop"])):
        models = (AutoModelForCausalLM.from_pretrained(of) for of in ("student", name))
        trainer = trainer_for(tmp_path, *models, processing_class=tokenizer)
        changed = [line.split(":")[0].strip() for line in changed_models(record, trainer.describe_models())]
        assert {*expected} <= {*changed} and bool(changed) == bool(expected), changed


def test_a_trainer_compares_an_adapter_and_what_it_stands_on(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path, options=options, peft_config=lora(4)).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match=r"student\.adapter\.default\.lora_alpha: was 4, now 8"):
        trainer_for(tmp_path, options=options, peft_config=lora(8)).train(checkpoint)
    with pytest.raises(UserError, match=r"student\.frozen_weights: was"):
        trainer_for(tmp_path, tiny_llama(seed=9), options=options, peft_config=lora(4)).train(checkpoint)
    assert trainer_for(tmp_path, options=options, peft_config=lora(4)).train(checkpoint).global_step == 2


# --------------------------------------------------------------------------------------------------------------- the record


def test_a_digest_sees_every_bit_name_type_and_shape():
    weight = torch.arange(6, dtype=torch.float32)
    plain = weights_digest([("a", weight)])
    assert plain == weights_digest([("a", weight.clone())]) == weights_digest([("_orig_mod.a", weight)])
    others = [("b", weight), ("a", weight.view(2, 3)), ("a", weight.view(torch.int32)), ("a", -weight)]
    assert len({plain, *(weights_digest([other]) for other in others)}) == 5
    assert weights_digest([("a", weight.view(2, 3).T)]) == weights_digest([("a", weight.view(2, 3).T.contiguous())])
    assert weights_digest([("a", weight.to(torch.bfloat16)), ("empty", weight[:0]), ("one", weight[0])]) is not None
    assert weights_digest([]) is None


def test_weights_that_are_not_here_are_left_out():
    with torch.device("meta"):
        absent = torch.nn.Linear(2, 2)
    assert weights_digest(absent.named_parameters()) is None
    assert describe_for_training(absent, trained=False).keys() == {"config", "adapter", "code"}


def test_a_quantised_teacher_is_known_by_its_files_and_by_what_is_not_packed(tmp_path):
    model = tiny_llama(layers=1)
    model.save_pretrained(tmp_path)
    model.hf_quantizer = object()
    packed = torch.nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    was = describe_model(model, str(tmp_path))
    assert "weights" not in was and was["files"].startswith("xxh3:")
    with torch.no_grad():
        packed += 1  # as another card may round it
    assert describe_model(model, str(tmp_path)) == was
    with torch.no_grad():
        model.model.norm.weight += 1
    (tmp_path / "model.safetensors").write_bytes(b"others")
    now = describe_model(model, str(tmp_path))
    assert {key for key in was if was[key] != now[key]} == {"unpacked_weights", "files"}
    assert describe_model(model, "org/name")["files"] is None  # nobody has loaded it from there


def test_another_version_of_transformers_is_no_change_of_a_model():
    was = {"transformers": "5.0", "teacher": {"config": {"a": 1, "old": 1}, "weights": "x", "commit": "c"},
           "student_tokenizer": {"rules": "r", "vocabulary": "v"}}  # fmt: skip
    now = {"transformers": "5.1", "teacher": {"config": {"a": 1, "new": 1}, "weights": "x", "commit": "d"},
           "student_tokenizer": {"rules": "s", "vocabulary": "v"}}  # fmt: skip
    assert changed_models(was, now) == []
    same = {**now, "transformers": "5.0"}
    assert len(changed_models(was, same)) == 3
    # The rules of a tokenizer are written out by tokenizers; a record of before does not tell its version
    assert len(changed_models({**was, "tokenizers": "0.22"}, {**same, "tokenizers": "0.23"})) == 2
    assert len(changed_models(was, {**same, "tokenizers": "0.23"})) == 3
    now["teacher"] = {"config": {"a": 2}, "weights": "y"}
    assert [line.split(":")[0].strip() for line in changed_models(was, now)] == ["teacher.config.a", "teacher.weights"]


def test_a_tokenizer_is_the_same_after_it_was_used():
    tokenizer = tiny_tokenizer()
    was = describe_tokenizer(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert describe_tokenizer(tokenizer) == was
