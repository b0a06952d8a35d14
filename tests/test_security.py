"""Models, recipes, rows and checkpoints of strangers: none of them runs code, learns a token, or writes where it likes.

Every attack is tried for real: the planted code would leave a file behind, and a control shows that it can.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.console import masked, printable
from dts_hf.data import file_limits
from dts_hf.data.sources import load_rows
from dts_hf.errors import RunError, UserError
from dts_hf.recipe.loading import load_recipe
from dts_hf.runs.checkpoints import COMPLETE, mark_complete, read_complete
from dts_hf.runs.environment import environment
from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
SECRET = "no-known-shape-8c1f0d"  # of an environment variable
RECIPE = """\
student: {init: {from: teacher, layers: 1}}
teacher: {model: models/teacher, dtype: float32}
data: {train: train.jsonl, validation: valid.jsonl, prompt_template: plain, max_length: 64, max_prompt_length: 40}
temperature: {name: dts}
training: {max_steps: 2, use_cpu: true, per_device_train_batch_size: 2, save_steps: 1, save_strategy: steps}
evaluation: {rows: 4, max_new_tokens: 2}
output: {dir: runs/x}
"""
NAUGHTY_IDS = (
    "../../escaped",
    "/tmp/escaped",
    "..",
    "a\x00b",
    "C:\\x",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "x" * 400,
)
ROWS = "".join(
    json.dumps({"id": row_id, "instruction": f"{row_id} names {k} trees.", "output": "<script>alert(2)</script>"})
    + "\n"
    for k, row_id in enumerate(NAUGHTY_IDS)
)


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text(ROWS)
    return tmp_path


def run(*arguments: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(result: Any, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    assert not [word for word in words if word not in result.output], result.output


# --------------------------------------------------------------------------------------------------- models are no code


def only_pickles(folder: Path, marker: Path, names: list[str]) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for name in names:
        torch.save({"model.norm.weight": Planted(marker)}, folder / name)


def test_the_planted_pickle_is_sharp(tmp_path: Path) -> None:
    torch.save(Planted(tmp_path / "marker"), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("who", ["teacher", "student"])
@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["pytorch_model.bin.index.json"], ["model.bin", "model.pt"]])
def test_pickled_weights_are_refused(place: Path, who: str, names: list[str]) -> None:
    marker = place / "marker"
    shutil.copytree(place / "models" / "teacher", place / "models" / "bad")
    only_pickles(place / "models" / "bad", marker, [name for name in names if not name.endswith(".json")])
    if names[0].endswith(".json"):
        only_pickles(place / "models" / "bad", marker, ["pytorch_model-00001-of-00001.bin"])
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
        (place / "models" / "bad" / names[0]).write_text(json.dumps(index))
    change = ["teacher.model=models/bad"] if who == "teacher" else ["student.init=null", "student.model=models/bad"]
    refused(run("train", "recipe.yaml", *change), f"{who}.model", "models/bad")
    assert not marker.exists() and not (place / "runs").exists()


def test_a_pickled_adapter_is_refused(place: Path) -> None:
    """transformers puts an adapter on a model by itself when it lies in the folder."""
    marker, folder = place / "marker", place / "models" / "adapter"
    folder.mkdir()
    tiny_tokenizer().save_pretrained(folder)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "models/teacher"}))
    torch.save({"base_model.model.x": Planted(marker)}, folder / "adapter_model.bin")
    result = run("train", "recipe.yaml", "teacher.model=models/adapter")
    assert not marker.exists()
    refused(result, "teacher.model", "models/adapter")


CODE = """\
import os
os.mkdir({marker!r})
from transformers import {base}
class Own({base}):
    model_type = "own"
"""


@pytest.fixture
def with_code(place: Path) -> Path:
    """A model, a tokenizer and a configuration that bring their own Python."""
    folder, marker = place / "models" / "remote", place / "marker"
    shutil.copytree(place / "models" / "teacher", folder)
    kinds = {"own_config": "LlamaConfig", "own_model": "LlamaForCausalLM", "own_tokenizer": "PreTrainedTokenizerFast"}
    for name, base in kinds.items():
        (folder / f"{name}.py").write_text(CODE.format(marker=str(marker), base=base))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {"AutoConfig": "own_config.Own", "AutoModelForCausalLM": "own_model.Own"},
        "model_type": "own",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["own_tokenizer.Own", "own_tokenizer.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return marker


@pytest.mark.parametrize(
    "command",
    [
        "train recipe.yaml teacher.model=models/remote",
        "train recipe.yaml student.init=null student.model=models/remote",
        "train recipe.yaml teacher.tokenizer=models/remote",
        "train recipe.yaml teacher.model=models/remote student.trust_remote_code=true",  # asked for, but for the student
        "evaluate models/remote --data valid.jsonl",
        "doctor recipe.yaml teacher.model=models/remote",
    ],
)
def test_code_of_a_model_does_not_run(place: Path, with_code: Path, command: str) -> None:
    result = run(*command.split())
    assert not with_code.exists()
    assert result.exit_code in (1, 2) and "Traceback" not in result.output
    assert not (place / "runs").exists()


def test_code_of_a_model_runs_when_asked_for_by_name(
    place: Path, with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above would pass for code that never runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place / "modules"))
    run("train", "recipe.yaml", "teacher.model=models/remote", "teacher.trust_remote_code=true")
    assert with_code.is_dir()


def test_a_generate_of_the_model_does_not_run(place: Path) -> None:
    """``custom_generate/generate.py`` beside the weights would stand in for ``generate``."""
    folder, marker = place / "models" / "teacher", place / "marker"
    (folder / "custom_generate").mkdir()
    code = f"import os\nos.mkdir({str(marker)!r})\ndef generate(model, **kwargs): return model.generate(**kwargs)\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    for command in (
        "evaluate models/teacher --data valid.jsonl --template plain --max-new-tokens 2",
        "doctor recipe.yaml",
    ):
        result = run(*command.split())
        assert not marker.exists() and "Traceback" not in result.output, result.output


TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').mkdir('MARKER') }}",
    "{% for kind in ().__class__.__base__.__subclasses__() %}{% if 'wrap_close' in kind.__name__ %}"
    "{{ kind.__init__.__globals__['mkdir']('MARKER') }}{% endif %}{% endfor %}",
    "{{ messages.__class__.__base__.__subclasses__() | length }}{{ lipsum.__globals__['os'].mkdir('MARKER') }}",
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_code_in_a_chat_template_does_not_run(place: Path, template: str) -> None:
    marker = place / "marker"
    text = template.replace("MARKER", str(marker))
    jinja2.Environment().from_string(text).render(messages=[])  # a control: without a sandbox it does
    marker.rmdir()
    (place / "models" / "teacher" / "chat_template.jinja").write_text(text)
    for command in ("train", "doctor"):
        result = run(command, "recipe.yaml", "data.prompt_template=chat")
        assert not marker.exists() and result.exit_code in (1, 2), result.output
    assert not (place / "runs").exists()


# -------------------------------------------------------------------------------------------------- checkpoints and rows


def test_a_checkpoint_with_planted_pickles_does_not_run(place: Path) -> None:
    done = run("train", "recipe.yaml", "evaluation.models=[]", "output.report=false")
    assert done.exit_code == 0, done.output
    checkpoint, marker = place / "runs" / "x" / "checkpoint-1", place / "marker"
    replaced = 0
    for name in sorted(file.name for file in checkpoint.iterdir()):
        if Path(name).suffix not in (".pt", ".pth", ".bin"):
            continue
        kept, new = (checkpoint / name).read_bytes(), checkpoint / name
        torch.save({"planted": Planted(marker)}, new)
        list_anew(checkpoint)
        again = ["training.resume_from_checkpoint=runs/x/checkpoint-1", "evaluation.models=[]", "output.report=false"]
        result = run("train", "recipe.yaml", *again, f"output.dir=runs/{name}")
        assert not marker.exists(), f"{name} was unpickled: {result.output}"
        if name == "training_args.bin":  # nobody reads it
            assert result.exit_code == 0, result.output
        else:
            refused(result, "checkpoint-1", "mkdir, which is none of the types of a checkpoint")
        (checkpoint / name).write_bytes(kept)
        replaced += 1
    assert replaced >= 3  # optimizer, scheduler, random state


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "old/adapter_model.bin"])
def test_a_checkpoint_with_pickled_weights_is_refused_by_name(place: Path, name: str) -> None:
    """Not once, but at each start: the run does not go on from an older one with what somebody has planted beside it."""
    done = run("train", "recipe.yaml", "evaluation.models=[]", "output.report=false")
    assert done.exit_code == 0, done.output
    checkpoint, marker = place / "runs" / "x" / "checkpoint-1", place / "marker"
    (checkpoint / name).parent.mkdir(exist_ok=True)
    torch.save({"planted": Planted(marker)}, checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    list_anew(checkpoint)
    again = ["training.resume_from_checkpoint=runs/x/checkpoint-1", "evaluation.models=[]", "output.report=false"]
    for _ in range(2):
        refused(run("train", "recipe.yaml", *again, "output.dir=runs/y"), f"checkpoint-1/{name}: weights as a pickle")
    assert not marker.exists()


def test_other_files_in_a_checkpoint_are_named_or_left_alone(place: Path) -> None:
    """A bare pickle is none of torch.save's files; the state of a loss scaler is nothing to a run without fp16."""
    done = run("train", "recipe.yaml", "evaluation.models=[]", "output.report=false")
    assert done.exit_code == 0, done.output
    checkpoint, marker = place / "runs" / "x" / "checkpoint-1", place / "marker"
    again = ["training.resume_from_checkpoint=runs/x/checkpoint-1", "evaluation.models=[]", "output.report=false"]
    torch.save({"scale": 1.0}, checkpoint / "scaler.pt")
    list_anew(checkpoint)
    result = run("train", "recipe.yaml", *again, "output.dir=runs/scaler")
    assert result.exit_code == 0, result.output
    for content, words in (
        (pickle.dumps({"state": {}}), ["optimizer.pt cannot be read: torch.save has not written it so"]),
        (pickle.dumps(Planted(marker)), ["optimizer.pt cannot be read: torch.save has not written it so"]),
        (pickle.dumps(Planted(marker), protocol=2), ["mkdir, which is none of the types of a checkpoint"]),
    ):
        (checkpoint / "optimizer.pt").write_bytes(content)
        list_anew(checkpoint)
        result = run("train", "recipe.yaml", *again, "output.dir=runs/bare")
        refused(result, *words)
        assert "mmap" not in result.output and not marker.exists()


def list_anew(checkpoint: Path) -> None:
    """The list of a complete checkpoint tells what its files were: an attacker would have adapted it."""
    record = read_complete(checkpoint)
    (checkpoint / COMPLETE).unlink()
    mark_complete(checkpoint, **{key: value for key, value in record.items() if key not in ("format", "files")})


def test_names_in_rows_lead_nowhere(place: Path) -> None:
    """A whole run on rows whose ids are paths, markup and templates."""
    before = {path for path in place.rglob("*") if "runs" not in path.parts}
    result = run("train", "recipe.yaml", "output.dir=runs/../runs/x")
    assert result.exit_code == 0, result.output
    assert {path for path in place.rglob("*") if not {"runs", "cache"} & set(path.parts)} == before
    run_folder = place / "runs" / "x"
    assert sorted(path.name for path in (run_folder / "predictions").iterdir()) == [
        "student.jsonl",
        "student_before.jsonl",
        "teacher.jsonl",
    ]
    rows = [json.loads(line) for line in (run_folder / "predictions" / "student.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} <= set(NAUGHTY_IDS)
    page = (run_folder / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "<script>alert" not in (run_folder / "README.md").read_text()
    assert all("49 names" not in row["prompt"] for row in rows)


def test_names_of_sets_lead_nowhere(place: Path) -> None:
    names = ["..jsonl", "...jsonl", ".jsonl", "-.jsonl", "a b;touch x.jsonl", "\x1b[2J.jsonl", "\\..\\x.jsonl"]
    (place / "sets").mkdir()
    for number, name in enumerate(names):
        (place / "sets" / name).write_text(json.dumps({"instruction": f"x{number}", "output": "y"}) + "\n")
    before = set(place.rglob("*"))
    given = ",".join(f"sets/{name}" for name in names)
    result = run(
        "evaluate", "models/teacher", "--sets", given, "--output", "out", "--template", "plain", "--max-new-tokens", "2",
        "--protocol", "greedy",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = {path.relative_to(place) for path in place.rglob("*") if path not in before}
    assert made and all(path.parts[0] == "out" for path in made), made
    assert "\x1b[2J" not in result.output


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the true ones, so that the bombs can be small."""
    monkeypatch.setattr(file_limits, "LONGEST_LINE", file_limits.LONGEST_LINE // 64)
    monkeypatch.setattr(file_limits, "FREE_BYTES", file_limits.FREE_BYTES // 64)


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path, small_limits: None) -> None:
    line, lines = tmp_path / "line.jsonl.gz", tmp_path / "lines.jsonl.gz"
    with gzip.open(line, "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(b" " * (1 << 20))
    with gzip.open(lines, "wb") as file:
        for _ in range(32):
            file.write((b" " * 4095 + b"\n") * 256)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="line 1 has more than 1 MiB"):
            load_rows(line)
        with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
            load_rows(lines)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_parquet_bomb_is_refused(tmp_path: Path, small_limits: None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, text = tmp_path / "bomb.parquet", "x" * (1 << 17)
    again = pa.DictionaryArray.from_arrays([0] * 200, [text])
    pq.write_table(pa.table({"id": [str(k) for k in range(200)], "instruction": again, "output": again}), path)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(UserError, match="unpacks to more than 200 times its size"):
        load_rows(path)


def test_a_pipe_is_no_row_file(tmp_path: Path) -> None:
    """Opening it would wait for ever."""
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="expected a file ending in"):
        load_rows(tmp_path / "rows.jsonl")


# ---------------------------------------------------------------------------------------------------------------- tokens


def everything_in(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_no_token_in_what_a_run_leaves_behind(place: Path) -> None:
    """Processes of their own, so that their whole output is seen; tokens in the environment and on the command line."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN, "WANDB_API_KEY": SECRET}
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "dts_hf", "train", "recipe.yaml"]
    first = subprocess.run([*command, f"training.run_name=of-{SECRET}"], capture_output=True, cwd=place, env=env)
    assert first.returncode == 2 and b"holds an access token" in first.stderr, first.stderr.decode()
    assert not (place / "runs").exists()
    done = subprocess.run(command, capture_output=True, cwd=place, env=env)
    assert done.returncode == 0, done.stderr.decode()
    assert sum(path.is_file() for path in (place / "runs").rglob("*")) > 20
    left = everything_in(place / "runs") + first.stdout + first.stderr + done.stdout + done.stderr
    assert TOKEN.encode() not in left and b"hf_AbC" not in left and SECRET.encode() not in left


@pytest.mark.parametrize(
    "override",
    [
        f"teacher.revision={TOKEN}",
        f"student.lora={{target_modules: [{TOKEN}]}}",
        f"training.run_name={TOKEN}",
        f"training.hub_token={TOKEN}",
        f"training.deepspeed={{x: {{y: [{TOKEN}]}}}}",
        f"{TOKEN}=1",
        f"loss.{TOKEN}=1",
        f"loss.kd_ratio={TOKEN}",
        f"data.train=https://me:{TOKEN}@host/x.jsonl",
        f"data.train=/nowhere/{TOKEN}/x.jsonl",
        f"{TOKEN}",
        f"loss=[{TOKEN}",
        f"training.run_name={SECRET}",
        f"training.run_name=of-{SECRET}.1",
        f"training.run_name=my_{TOKEN}_run",
        f"training.hub_model_id=https://me:{SECRET}@host/x",
    ],
)
def test_a_token_in_a_recipe_is_refused_and_not_shown(
    place: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    result = run("train", "recipe.yaml", override)
    refused(result)
    assert TOKEN not in result.output and SECRET not in result.output and "AbCdEf" not in result.output
    assert not (place / "runs").exists()
    # the same in the file
    key, _, value = override.partition("=")
    (place / "recipe.yaml").write_text(f"{RECIPE}{key.partition('.')[0]}x: {{{key}: {value}}}\n")
    result = run("train", "recipe.yaml")
    refused(result)
    assert "AbCdEf" not in result.output and SECRET not in result.output


@pytest.mark.parametrize(
    "value",
    ["https://me:letmein@host/x", "https://letmein@host/x", "git+ssh://a:letmein@h", "http://h/x?token=letmein"],
)
def test_a_password_in_a_url_is_refused_and_not_shown(place: Path, value: str) -> None:
    """No variable holds it and it has no known shape: its place in the URL tells."""
    result = run("train", "recipe.yaml", f"training.hub_model_id={value}")
    refused(result, "training.hub_model_id", "a URL with a user name, password or token")
    assert "letmein" not in result.output and not (place / "runs").exists()


def test_a_name_like_a_token_is_none(place: Path) -> None:
    names = [
        "teacher.model=hf_models/llama",
        "output.dir=runs/hf_transformers_baseline",
        "training.run_name=me@home",
    ]
    recipe = load_recipe("recipe.yaml", [*names, "training.hub_model_id=https://host/x?y=1"])
    assert recipe.teacher is not None and recipe.teacher.model == "hf_models/llama"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"a {TOKEN} b", "a hf_*** b"),
        ("https://me:pass@host/x", "https://***@host/x"),
        (f"https://{TOKEN}@host/x", "https://***@host/x"),
        ("https://host/x?token=abc&y=1", "https://host/x?token=***&y=1"),
        ("https://host/x?y=1&Access_Token=abc", "https://host/x?y=1&Access_Token=***"),
        (f"x={SECRET}!", "x=***!"),
        (f"my_{TOKEN}_run", "my_hf_***_run"),
        ("me@host, a hf_model and 3 tokens", "me@host, a hf_model and 3 tokens"),
    ],
)
def test_masked(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "short")
    assert masked(text) == shown
    assert str(UserError(text)) == str(RunError(text)) == shown
    assert masked(shown) == shown


def test_a_message_cannot_steer_the_terminal() -> None:
    assert str(UserError("id '\x1b]0;owned\x07' \r\x9b2J \u202egnp \ud800")) == (
        "id '\\x1b]0;owned\\x07' \\r\\x9b2J \\u202egnp \\ud800"
    )
    assert str(UserError("two\nlines\tand é 汉 🙂")) == "two\nlines\tand é 汉 🙂"
    assert len(printable("x" * 10**6)) < 3000 and printable("x\n" * 10**5).count("\n") < 100
    error = pickle.loads(pickle.dumps(UserError("of another process")))
    assert isinstance(error, UserError) and str(error) == "of another process"


def test_the_environment_file_has_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["dts-hf", f"--x={SECRET}", f"u=https://me:{TOKEN}@h"])
    text = json.dumps(environment(torch.device("cpu")))
    assert SECRET not in text and TOKEN not in text and not re.search("me:", text)
