"""Bad input through the real command: exit code 2, one message that says what and where, and nothing left behind.

Each case is the good recipe below with one thing wrong. The words are what a person needs to find and mend it: the key
or the file, the value, and what was expected. Models are tiny and random, and the very recipe is trained once unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """\
student: {init: {from: teacher, layers: 1}}
teacher: {model: models/teacher, dtype: float32}
data: {train: train.jsonl, validation: valid.jsonl, prompt_template: plain, max_length: 64, max_prompt_length: 40}
temperature: {name: dts}
training: {max_steps: 1, use_cpu: true, per_device_train_batch_size: 2}
evaluation: {rows: 1, max_new_tokens: 2}
output: {dir: runs/x, report: false}
"""
ROWS = "".join(
    json.dumps({"id": f"r{k}", "instruction": f"Name {k} trees.", "input": "", "output": "An oak."}) + "\n"
    for k in range(4)
)
LONG_NAME = "x" * 300
LONG_ROW = json.dumps({"instruction": "Name a tree. " * 60, "output": "An oak."}) + "\n"


class Case(NamedTuple):
    """One mistake: overrides of the good recipe, or another recipe text, or other files; and what must be said."""

    wrong: str
    overrides: str = ""  # separated by spaces, as on the command line
    says: tuple[str, ...] = ()
    recipe: str = RECIPE
    files: dict[str, str] = {}  # noqa: RUF012  # never changed


def rows(text: str) -> dict[str, str]:
    return {"train.jsonl": text}


RECIPE_CASES = [
    Case("unknown key", "loss.kd_ration=0.5", ("loss.kd_ration", "unknown key", "Did you mean 'kd_ratio'?")),
    Case("unknown section", "traning.seed=1", ("traning", "unknown key", "Did you mean 'training'?")),
    Case("key in the wrong section", "loss.packing=true", ("loss.packing", "Did you mean 'data.packing'?")),
    Case("unknown field", "data.columns={anwser: x}", ("data.columns", "'anwser'", "Did you mean 'answer'?")),
    Case("weight", "data.train=[{source: a, weight: -1}]", ("data.train.0.weight", "got -1", "a number above 0")),
    Case("wrong type", "data.max_length=long", ("data.max_length", '"long"', "a whole number")),
    Case("number as text", "loss.kd_ratio='0.5'", ("loss.kd_ratio", "a number between 0 and 1")),
    Case("kd_ratio too large", "loss.kd_ratio=1.5", ("loss.kd_ratio", "got 1.5", "between 0 and 1")),
    Case("not a number", "loss.kd_ratio=.nan", ("loss.kd_ratio", "a number between 0 and 1")),
    Case("missing section", "", ("teacher", "is missing", "model"), RECIPE.replace("teacher: {", "# ")),
    Case("null for a section", "data=null", ("data", "got null", "expected a mapping")),
    Case(
        "no teacher to imitate",
        "teacher=null student.init=null student.model=m",
        ("teacher: is missing", "kd_ratio: 0"),
    ),
    Case(
        "no teacher to answer",
        "teacher=null student.init=null student.model=m loss.kd_ratio=0 data.responses=teacher",
        ("data.responses: teacher", "no teacher"),
    ),
    Case("neither model nor init", "student.init=null", ("student", "exactly one of 'model' and 'init'", "neither")),
    Case("both model and init", "student.model=models/teacher", ("student", "exactly one", "both")),
    Case("no room for a response", "data.max_prompt_length=64", ("data", "max_prompt_length is 64", "less than")),
    Case(
        "unknown template", "data.prompt_template=alpca", ("data.prompt_template", "alpca", "Did you mean 'alpaca'?")
    ),
    Case(
        "evaluation without rows", "data.validation=null evaluation.every_steps=1", ("every_steps", "data.validation")
    ),
    Case("T_min of 0", "temperature.t_min=0", ("temperature.t_min", "got 0", "above 0")),
    Case("T_init above T_max", "temperature.t_init=9 temperature.t_max=3", ("temperature.t_init", "got 9", "to 3")),
    Case("unknown policy", "temperature=dst", ("temperature", "'dst'", "Did you mean 'dts'?")),
    Case("unknown policy option", "temperature.momentun=0.5", ("temperature.momentun", "Did you mean 'momentum'?")),
    Case("unknown rule", "temperature.rule=gaps", ("temperature.rule", "'gaps'", "Did you mean 'gap'?")),
    Case("unknown divergence", "loss.divergence=reverse-kl", ("loss.divergence", "Did you mean 'reverse_kl'?")),
    Case("jsd with beta 1", "loss.divergence={name: jsd, beta: 1}", ("divergence.beta", "got 1", "'forward_kl'")),
    Case("divergence option", "loss.divergence={name: jsd, beat: 0.5}", ("divergence.beat", "Did you mean 'beta'?")),
    Case("unknown training key", "training.learnin_rate=1e-4", ("training.learnin_rate", "'learning_rate'?")),
    Case("old training key", "training.evaluation_strategy=no", ("training.evaluation_strategy", "eval_strategy")),
    Case("bad training value", "training.learning_rate=fast", ("training.learning_rate", '"fast"', "a number")),
    Case("negative batch", "training.per_device_train_batch_size=-1", ("per_device_train_batch_size", "at least 1")),
    Case("unknown scheduler", "training.lr_scheduler_type=cosin", ("training.lr_scheduler_type", "'cosine'?")),
    Case("run directory in training", "training.output_dir=x", ("training.output_dir", "output.dir")),
    Case("a token in the recipe", "training.hub_token=abc", ("training.hub_token", "hf auth login")),
    Case(
        "training combination", "training.save_strategy=best", ("training", "save_strategy", "metric_for_best_model")
    ),
    Case("override without a value", "loss.kd_ratio", ("override 'loss.kd_ratio'", "expected key=value")),
    Case("override with broken YAML", "loss.kd_ratio=[", ("override", "broken YAML")),
    Case("broken YAML", "", ("recipe.yaml: line 2, column", "broken YAML"), "student: {\nteacher: ]\n"),
    Case("tab in YAML", "", ("recipe.yaml: line 2", "broken YAML"), "student:\n\tmodel: x\n"),
    Case("key twice", "", ("recipe.yaml: line 8", '"teacher" appears twice'), RECIPE + "teacher: {model: x}\n"),
    Case("empty recipe", "", ("recipe.yaml", "empty", "student, teacher, data and output"), "# nothing\n"),
    Case("a list as recipe", "", ("recipe.yaml", "expected a mapping of sections"), "- student\n"),
    Case(
        "extends in a circle",
        "",
        ("extends", "itself", "other.yaml"),
        "extends: other.yaml\n",
        {"other.yaml": "extends: recipe.yaml\n"},
    ),
    Case(
        "extends a missing file",
        "",
        ("recipe.yaml: extends", "no such recipe", "bse.yaml", "Did you mean 'base.yaml'?"),
        "extends: bse.yaml\n",
        {"base.yaml": RECIPE},
    ),
]

DATA_CASES = [
    Case(
        "missing data file", "data.train=trian.jsonl", ("trian.jsonl", "no such file", "Did you mean 'train.jsonl'?")
    ),
    Case("missing validation file", "data.validation=nope/v.jsonl", ("nope/v.jsonl", "no such file", "folder nope")),
    Case("pattern without a file", "data.train=part-*.jsonl", ("part-*.jsonl", "no file matches")),
    Case("wrong kind of file", "data.train=recipe.yaml", ("recipe.yaml", "expected a file ending in", ".jsonl")),
    Case("unknown data set, offline", "data.train=nobody/no_such_rows", ("nobody/no_such_rows", "Hub", ".jsonl")),
    Case("empty data file", "", ("train.jsonl", "no rows", "instruction"), files=rows("")),
    Case("broken JSON", "", ("train.jsonl: line 5", "broken JSON"), files=rows(ROWS + '{"instruction": "x",\n')),
    Case(
        "column that is not there",
        "data.columns={output: otput}",
        ("train.jsonl: line 1", "'otput'", "data.columns", "'output'", "Did you mean 'output'?"),
    ),
    Case(
        "preference set",
        "",
        ("train.jsonl: line 1", "preference set", "data.columns: {completion: chosen}"),
        files=rows('{"prompt": "a", "chosen": "b", "rejected": "c"}\n'),
    ),
    Case(
        "images",
        "",
        ("train.jsonl: line 1", "field 'images'", "data.columns: {images: null}"),
        files=rows('{"prompt": "a", "completion": "b", "images": ["x.png"]}\n'),
    ),
    Case(
        "weight that leaves no row",
        "data.train={source: train.jsonl, weight: 0.01}",
        ("train.jsonl", "weight of 0.01"),
    ),
    Case("one JSON list", "", ("train.jsonl", "JSON list", "one object a line"), files=rows('[{"instruction": 1}]')),
    Case("a number as row", "", ("train.jsonl: line 1", "expected an object"), files=rows("5\n")),
    Case(
        "missing field",
        "",
        ("train.jsonl: line 1", "'output' is missing", "data.columns, such as {output: reply}"),
        files=rows('{"instruction": "x", "reply": "y"}\n'),
    ),
    Case(
        "empty response",
        "",
        ("train.jsonl: line 5", "'output' is empty"),
        files=rows(ROWS + '{"instruction": "x", "output": " "}\n'),
    ),
    Case("id twice", "", ("train.jsonl: line 5", "'r0'", "line 1", "unique"), files=rows(ROWS + ROWS)),
    Case(
        "conversation without an answer",
        "",
        ("train.jsonl: line 1", "role 'user'", "expected 'assistant'"),
        files=rows('{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}\n'),
    ),
    Case(
        "conversation in a text template",
        "",
        ("train-1", "'plain'", "data.prompt_template: chat"),
        files=rows(
            '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"},'
            ' {"role": "assistant", "content": "y"}]}\n'
        ),
    ),
    Case(
        "every prompt too long",
        "",
        ("data.train: no row left", "data.max_prompt_length = 40"),
        files=rows(LONG_ROW * 3),
    ),
    Case(
        "every response too long",
        "",
        ("no row left", "data.max_length = 64"),
        files=rows(json.dumps({"instruction": "x", "output": "An oak. " * 60}) + "\n"),
    ),
    Case(
        "every held-out prompt too long",
        "",
        ("data.validation: no row left", "max_prompt_length"),
        files={"valid.jsonl": LONG_ROW * 2},
    ),
    Case(
        "chat template that is not there",
        "data.prompt_template=chat teacher.model=models/no_chat",
        ("data.prompt_template", "no chat template", "'alpaca' or 'plain'"),
    ),
]

MODEL_CASES = [
    Case("unknown teacher, offline", "teacher.model=nobody/no-model", ("teacher.model", "nobody/no-model", "spelt")),
    Case(
        "unknown student, offline",
        "student.init=null student.model=nobody/small",
        ("student.model", "nobody/small", "spelt"),
    ),
    Case("folder without a model", "teacher.model=models", ("teacher.model", "'models'", "save_pretrained")),
    Case("folder without weights", "teacher.model=models/no_weights", ("teacher.model", "no_weights", "safetensors")),
    Case("broken weights", "teacher.model=models/broken", ("teacher.model", "models/broken")),
    Case("weights of another shape", "teacher.model=models/misshapen", ("teacher.model", "models/misshapen")),
    Case(
        "weights missing in the file",
        "teacher.model=models/gaps",
        ("teacher.model", "models/gaps", "2 weights", "q_proj"),
    ),
    Case("broken config", "teacher.model=models/bad_config", ("teacher.model", "models/bad_config", "config.json")),
    Case("unknown architecture", "teacher.model=models/lama", ("teacher.model", "models/lama", "model type `lama`")),
    Case("no language model", "teacher.model=models/vit", ("teacher.model", "models/vit", "ViTConfig")),
    Case("code of its own", "teacher.model=models/remote", ("teacher.model", "models/remote", "trust_remote_code")),
    Case("no such tokenizer", "teacher.tokenizer=nobody/words", ("teacher.tokenizer", "nobody/words")),
    Case("package not installed", "teacher.model=package:no_llm/m.gguf", ("teacher.model", "'no_llm'", "pip install")),
    Case("no such GGUF file", "teacher.model=models/m.gguf", ("teacher.model", "no file 'm.gguf'", "'n.gguf'")),
    Case("broken GGUF file", "teacher.model=models/n.gguf", ("teacher.model", "models/n.gguf")),
    Case(
        "quantisation without bitsandbytes",
        "teacher.quantization=4bit student.init=null student.model=models/padded",
        ("teacher.quantization", "'4bit'", "pip install"),
    ),
    Case(
        "a student cut out of packed weights", "teacher.quantization=int8", ("student.init", "'int8'", "student.model")
    ),
    Case(
        "other tokenizer",
        "student.init=null student.model=models/other_words",
        ("different tokenizers", "id 40", "choose a student of the teacher's family"),
    ),
    Case(
        "padded widths in strict mode",
        "student.init=null student.model=models/padded",
        ("teacher.vocab_alignment", "336", "320", "truncate_to_tokenizer"),
    ),
    Case(
        "tokenizer larger than the models",
        "teacher.model=models/narrow",
        ("token id", "outside the 270 ids"),
    ),
    Case(
        "an adapter without a base",
        "student.lora={save: adapter}",
        ("student", "lora.save", "'init'", "'merged'"),
    ),
    Case(
        "a teacher that says nothing",
        "teacher.model=models/mute data.responses=teacher",
        ("data.responses", "answered none"),
    ),
    Case(
        "cache folder is a file",
        "data.responses=teacher data.cache_dir=train.jsonl",
        ("data.cache_dir", "train.jsonl", "File exists"),
    ),
    Case("too many layers", "student.init.layers=3", ("student.init.layers", "got 3", "from 1 to 2")),
    Case("no layers", "student.init.layers=0", ("student.init.layers", "got 0", "at least 1")),
    Case("unordered layers", "student.init.layers=[1,0]", ("student.init.layers", "[1, 0]", "ascending order")),
    Case("layer out of range", "student.init.layers=[0,2]", ("student.init.layers", "[0, 2]", "from 0 to 1")),
    Case(
        "unknown LoRA layer",
        "student.lora={target_modules: [q_prj]}",
        ("student.lora.target_modules", "q_prj", "q_proj", "'all-linear'"),
    ),
    Case(
        "LoRA on the head",
        "student.lora={target_modules: [lm_head]}",
        ("output layer", "lm_head", "student.lora.target_modules"),
    ),
    Case(
        "packing with a model that ignores it",
        "data.packing=true teacher.model=models/bloom",
        ("data.packing", "BloomForCausalLM", "data.packing: false"),
    ),
    Case(
        "rows longer than the positions",
        "teacher.model=models/short",
        ("student", "16 positions", "data.max_length"),
        files=rows(ROWS.replace("An oak.", "An oak. A pear tree and a plum tree.")),
    ),
    Case(
        "answers longer than the positions",
        "teacher.model=models/gpt2 evaluation.max_new_tokens=100",
        ("evaluation.max_new_tokens", "100", "64 positions"),
    ),
]

TRAINING_CASES = [
    Case("no checkpoint to resume from", "training.resume_from_checkpoint=nope", ("resume_from_checkpoint", "nope")),
    Case("negative seed", "training.seed=-1", ("training.seed", "got -1", "between 0 and")),
    Case("no such DeepSpeed file", "training.deepspeed=zero9.json", ("training", "deepspeed")),
    Case("unknown reporter", "training.report_to=wandbb", ("training.report_to", "'wandbb'", "Did you mean 'wandb'?")),
    Case("reporter not installed", "training.report_to=clearml", ("training", "ClearML")),
    Case(
        "options that the optimizer refuses",
        "training.optim=sgd training.optim_args=momentum=-5",
        ("training.optim_args: got 'momentum=-5', which SGD refuses: Invalid momentum value: -5",),
    ),
    Case(
        "options of another optimizer",
        "training.optim=rmsprop training.optim_args=alpha=-3",
        ("training.optim_args: got 'alpha=-3', which RMSprop refuses: Invalid alpha value: -3",),
    ),
    Case(
        "a schedule that ends above its beginning",
        "training.lr_scheduler_type=polynomial training.learning_rate=0.0",
        ("training.lr_scheduler_type: polynomial refuses: lr_end (1e-07) must be smaller than initial lr (0.0)",),
    ),
    Case("optimizer not installed", "training.optim=adamw_bnb_8bit", ("training", "bitsandbytes")),
    Case(
        "evaluation steps without rows",
        "data.validation=null training.eval_strategy=steps training.eval_steps=1",
        ("training", "eval_strategy"),
    ),
    Case("label smoothing", "training.label_smoothing_factor=0.1", ("training.label_smoothing_factor",)),
    Case("Hub upload, offline", "training.push_to_hub=true", ("training", "offline")),
]

OUTPUT_CASES = [
    Case("name of 300 letters", f"output.dir={LONG_NAME}", ("output.dir: the name", "has 300 bytes", "takes 255")),
    Case("name of 300 letters on the way", f"output.dir=new/{LONG_NAME}/run", ("output.dir: the name", "300 bytes")),
    Case("path of 6,000 letters", f"output.dir={'abc/' * 1500}", ("output.dir:", "too many for a path")),
    Case("output is a file", "output.dir=train.jsonl", ("output.dir", "train.jsonl", "is a file")),
    Case("output below a file", "output.dir=train.jsonl/run", ("output.dir", "train.jsonl is a file")),
    Case("output not writable", "output.dir=/proc/run", ("output.dir", "cannot write in")),
    Case("output holds something else", "output.dir=models", ("output.dir", "models is not empty")),
    Case(
        "overwrite of something else",
        "output.dir=models output.overwrite=true",
        ("output.dir", "no run", "overwritten"),
    ),
    Case("empty output name", "output.dir=''", ("output.dir", "not empty")),
]


# ------------------------------------------------------------------------------------------------------------- the world


def other_words(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same words, of which two have changed places (ids 40 and 41)."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    first, second = (next(word for word, index in vocabulary.items() if index == wanted) for wanted in (40, 41))
    vocabulary[first], vocabulary[second] = 41, 40
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models: ``teacher`` is good, each other one has one fault."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer()
    bloom = BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)
    kinds: dict[str, Any] = {
        "teacher": tiny_llama(),
        "padded": tiny_llama(vocab=336),
        "narrow": tiny_llama(vocab=270),
        "gpt2": tiny_gpt2(max_positions=64),
        "short": tiny_gpt2(max_positions=16),
        "bloom": BloomForCausalLM(bloom),
        "mute": tiny_llama(tie=False),
    }
    torch.nn.init.zeros_(kinds["mute"].lm_head.weight)  # then every token is the first one, which is no text
    for name, model in kinds.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in (
        "other_words",
        "no_chat",
        "no_weights",
        "broken",
        "misshapen",
        "gaps",
        "bad_config",
        "lama",
        "vit",
        "remote",
    ):
        shutil.copytree(folder / "teacher", folder / name)
    other_words(tokenizer).save_pretrained(folder / "other_words")
    (folder / "no_chat" / "chat_template.jinja").unlink()
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "broken" / "model.safetensors").write_bytes(b"no weights at all" * 9)
    (folder / "bad_config" / "config.json").write_text('{"model_type": "llama",')
    config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "misshapen" / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    (folder / "lama" / "config.json").write_text('{"model_type": "lama"}')
    (folder / "vit" / "config.json").write_text('{"model_type": "vit"}')
    code = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "remote" / "config.json").write_text(json.dumps(code))
    (folder / "remote" / "own.py").write_text("raise SystemExit('code of a stranger')\n")
    state = {key: value for key, value in kinds["teacher"].state_dict().items() if "q_proj" not in key}
    kinds["teacher"].save_pretrained(folder / "gaps", state_dict=state)
    (folder / "n.gguf").write_bytes(b"GGUF" + bytes(60))
    return folder


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of one command: good recipe, good rows, models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models").symlink_to(models)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text(ROWS)
    return tmp_path


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not {"models", "cache"} & set(path.parts)}


def run(*arguments: str) -> Any:
    """Run the command in this process, and leave torch as it was."""
    with torch.random.fork_rng(devices=[]):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def split(overrides: str) -> list[str]:
    """Split at the spaces that stand before ``key=``; values may hold spaces."""
    words: list[str] = []
    for word in overrides.split():
        if words and "=" not in word.split("{")[0].split("[")[0]:
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def check(case: Case, place: Path) -> None:
    (place / "recipe.yaml").write_text(case.recipe)
    for name, text in case.files.items():
        (place / name).write_text(text)
    before = tree(place)
    result = run("train", "recipe.yaml", *split(case.overrides))
    refused(result.exit_code, result.stdout, result.stderr, case.says)
    assert tree(place) == before, "something was left behind"


def refused(code: int, stdout: str, stderr: str, says: tuple[str, ...]) -> None:
    assert code == 2, f"exit code {code}: {stderr}"
    assert stdout == ""
    assert "Traceback" not in stderr and stderr.count("Error: ") == 1, stderr
    message = stderr[stderr.index("Error: ") :]
    assert not [words for words in says if words not in message], message
    assert len(message) < 700, "nobody reads this"


# ------------------------------------------------------------------------------------------------------------- the tests


def test_the_recipe_without_a_mistake_trains(place: Path) -> None:
    """Otherwise every case below could fail for a reason of its own."""
    result = run("train", "recipe.yaml")
    assert result.exit_code == 0, result.output
    assert (place / "runs" / "x" / "final" / "model.safetensors").is_file()
    assert (place / "runs" / "x" / "metrics.json").is_file()


@pytest.mark.parametrize("case", RECIPE_CASES, ids=lambda case: case.wrong)
def test_recipe(case: Case, place: Path) -> None:
    check(case, place)


@pytest.mark.parametrize("case", DATA_CASES, ids=lambda case: case.wrong)
def test_data(case: Case, place: Path) -> None:
    check(case, place)


@pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: case.wrong)
def test_models(case: Case, place: Path) -> None:
    check(case, place)


@pytest.mark.parametrize("case", TRAINING_CASES, ids=lambda case: case.wrong)
def test_training(case: Case, place: Path) -> None:
    check(case, place)


@pytest.mark.parametrize("case", OUTPUT_CASES, ids=lambda case: case.wrong)
def test_output(case: Case, place: Path) -> None:
    check(case, place)


def test_every_problem_of_a_recipe_is_said_at_once(place: Path) -> None:
    result = run("train", "recipe.yaml", "loss.kd_ratio=7", "data.trian=x", "temperature=dst")
    refused(result.exit_code, result.stdout, result.stderr, ("loss.kd_ratio", "data.trian", "temperature"))
    assert len(result.stderr.splitlines()) == 3


def test_missing_recipe(place: Path) -> None:
    result = run("train", "recpie.yaml")
    refused(result.exit_code, result.stdout, result.stderr, ("recpie.yaml", "no such", "Did you mean 'recipe.yaml'?"))


def test_an_earlier_run_is_not_replaced_unasked(place: Path) -> None:
    (place / "runs" / "x").mkdir(parents=True)
    (place / "runs" / "x" / "recipe.yaml").write_text("# mine\n")
    check(Case("not empty", says=("output.dir", "is not empty", "--overwrite")), place)


OTHER_COMMANDS = [
    ("evaluate models/teacher", ("models/teacher", "--data FILE")),
    ("evaluate nobody/no-model --data valid.jsonl", ("nobody/no-model", "spelt")),
    ("evaluate models/teacher --data nope.jsonl", ("nope.jsonl", "no such file")),
    (
        "evaluate models/teacher --data valid.jsonl --template chats",
        ("--template: got 'chats'", "Did you mean 'chat'?"),
    ),
    ("evaluate models/teacher --data valid.jsonl --output valid.jsonl", ("--output", "valid.jsonl")),
    ("evaluate models/teacher --data valid.jsonl --output models", ("--output", "models", "holds no evaluation")),
    ("evaluate models/teacher --data valid.jsonl --protocol minilm", ("minilm", "Did you mean 'minillm'?")),
    ("evaluate models/teacher --data valid.jsonl --seeds 1,x", ("--seeds", "1,x", "whole numbers")),
    ("evaluate models/teacher --data valid.jsonl --seeds 1,-1", ("seeds: got [1, -1]", "from 0, each once")),
    ("evaluate models/teacher --data valid.jsonl --backend vllm", ("vllm", "n-gram rule", "no_ngram")),
    ("evaluate models/teacher --sets doly", ("--sets: got 'doly'", "dolly")),
    ("evaluate models/teacher --sets glue/sst2", ("--sets", "'glue/sst2' is a GLUE set", "subset: sst2")),
    ("evaluate models/gpt2 --data valid.jsonl --template plain --max-new-tokens 100", ("row 'r0'", "64 positions")),
    ("evaluate unfinished", ("unfinished", "holds no student")),
    ("train models", ("models", "cannot read this recipe", "directory")),
    ("train recipe.yaml --output train.jsonl", ("output.dir", "is a file")),
    ("score nope.jsonl", ("nope.jsonl", "no such file")),
    ("compare models unfinished --output train.jsonl", ("--output", "train.jsonl is a file, expected a folder")),
    ("sweep recipe.yaml --set temperature=1,2 --slurm models", ("--slurm", "models is a folder; expected a file")),
    *(
        (f"sweep recipe.yaml --set temperature=1,2 {options}", (options.split()[0], options.split()[1], "one of them"))
        for options in ("--print-commands --slurm a.sh", "--dry-run --print-commands", "--dry-run --slurm a.sh")
    ),
    ("cache-teacher recipe.yaml --output states --teacher math", ("--teacher", "'math'", "no section teachers")),
    ("score train.jsonl", ("train.jsonl, line 1", "no field 'prediction'")),
    ("report models", ("models", "recipe.yaml")),
    ("report nope", ("nope", "no such run directory")),
    *(
        # A folder is there, root may write in it, and no file can be made: after the work it would be too late to say so
        (f"{command} /proc/x{end}", (f"{command.rpartition(' ')[2]}: cannot write in /proc (",))
        for command, end in (
            ("advise recipe.yaml --write", ".yaml"),
            ("advise recipe.yaml --output", ""),
            ("cache-teacher recipe.yaml --output", ""),
            ("compare models unfinished --output", ""),
            ("generate models/teacher --prompt hi --output", ".jsonl"),
            ("init --teacher models/teacher --data train.jsonl --output", ".yaml"),
            ("prepare dolly --source train.jsonl --output", ""),
            ("prepare quickstart --output", ""),
            ("prepare recipes --output", ""),
            ("sweep recipe.yaml --set temperature=1,2 --output", "/y"),
            ("sweep recipe.yaml --set temperature=1,2 --slurm", ".sh"),
            ("export models/teacher --quantized --output", ""),
        )
    ),
    *(
        (command.replace("LONG", LONG_NAME), ("x" * 300,))
        for command in (
            "train LONG",
            "train recipe.yaml --output LONG",
            "train recipe.yaml --resume --output LONG",
            "train recipe.yaml teacher.model=LONG",
            "train recipe.yaml teacher.tokenizer=LONG",
            "train recipe.yaml data.train=LONG",
            "train recipe.yaml training.resume_from_checkpoint=LONG",
            "generate models/teacher --prompt hi --output LONG",
            "generate models/teacher --data LONG",
            "generate models/teacher --data valid.jsonl --output LONG/x",
            "generate LONG --prompt hi",
            "evaluate LONG",
            "evaluate models/teacher --data valid.jsonl --output LONG",
            "evaluate models/teacher --data LONG",
            "score LONG",
            "report LONG",
            "push LONG",
            "pull org/name LONG",
            "chat LONG",
            "init --teacher models/teacher --data train.jsonl --output LONG",
            "prepare recipes --output LONG",
            "prepare quickstart --output LONG",
            "prepare dolly --source LONG",
        )
    ),
]


@pytest.mark.parametrize(
    ("command", "says"), OTHER_COMMANDS, ids=[command.replace(LONG_NAME, "LONG") for command, _ in OTHER_COMMANDS]
)
def test_other_commands(command: str, says: tuple[str, ...], place: Path) -> None:
    (place / "unfinished").mkdir()
    (place / "unfinished" / "recipe.yaml").write_text(RECIPE)
    before = tree(place)
    result = run(*command.split())
    refused(result.exit_code, result.stdout, result.stderr, says)
    assert tree(place) == before


@pytest.mark.parametrize(
    "command",
    ["generate models/teacher --prompt hi --overwrite --output", "sweep recipe.yaml --set temperature=1,2 --slurm"],
)
def test_what_is_no_plain_file_is_never_replaced(command: str, place: Path) -> None:
    """As root, /dev/null would be an ordinary file from then on."""
    os.mkfifo(place / "pipe")
    result = run(*command.split(), "pipe")
    refused(result.exit_code, result.stdout, result.stderr, (f"{command.rpartition(' ')[2]}: pipe is ",))
    assert (place / "pipe").is_fifo()


def test_as_a_process_of_its_own(place: Path) -> None:
    """The same, seen from a shell."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dts_hf", "train", "recipe.yaml", "teacher.model=nobody/no-model"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
    refused(done.returncode, done.stdout, done.stderr, ("teacher.model", "nobody/no-model"))
    assert not (place / "runs").exists()
