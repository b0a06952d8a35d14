"""Files of a model or tokenizer that are broken: one message each. A disk or network that fails is not the files' fault."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.data import text_files
from dts_hf.data.sources import load_rows
from dts_hf.errors import RunError, UserError, not_readable
from dts_hf.models.checks import check_finite
from dts_hf.models.loading import load_model, load_tokenizer
from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_llama, tiny_tokenizer

DEEP = "[" * 10**6
RECIPE = """\
student: {init: {from: teacher, layers: 1}}
teacher: {model: models/teacher, dtype: float32}
data: {train: train.jsonl, validation: train.jsonl, prompt_template: chat, max_length: 64, max_prompt_length: 40}
training: {max_steps: 1, use_cpu: true, per_device_train_batch_size: 2}
evaluation: {rows: 1, max_new_tokens: 2, models: []}
output: {dir: runs/x, report: false}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = [{"id": f"r{k}", "instruction": f"Name {k} trees.", "output": "An oak."} for k in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(*arguments: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        return CliRunner().invoke(cli.app, list(arguments))


def told(result: Any, code: int, *words: str) -> None:
    """One message, without a traceback, and nothing left behind."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output and result.stderr.count("Error: ") == 1, result.stderr
    message = result.stderr[result.stderr.index("Error: ") :]
    assert not [word for word in words if word not in message], message
    assert len(message) < 1000 and not Path("runs").exists()


# -------------------------------------------------------------------------------------------------------- broken files


def _changed(**values: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **values})


def _weights(header: bytes, size: int | None = None) -> Callable[[bytes], bytes]:
    return lambda content: struct.pack("<Q", len(header) if size is None else size) + header + content[-64:]


TOKENIZERS: list[tuple[str, str, Any]] = [
    ("cut", "tokenizer.json", lambda text: text[:1000]),
    ("deep", "tokenizer.json", lambda _: DEEP),
    ("empty", "tokenizer.json", lambda _: ""),
    ("a list", "tokenizer.json", lambda _: "[]"),
    ("no model", "tokenizer.json", _changed(model=None)),
    ("a negative token", "tokenizer.json", _changed(added_tokens=[{"id": -1, "content": "x"}])),
    ("unknown part", "tokenizer.json", _changed(post_processor={"type": "X"})),
    ("no UTF-8", "tokenizer.json", lambda _: b"\xff\xfe"),
    ("cut settings", "tokenizer_config.json", lambda text: text[:40]),
    ("deep settings", "tokenizer_config.json", lambda _: DEEP),
    ("a list of settings", "tokenizer_config.json", lambda _: "[]"),
    ("a number for a token", "tokenizer_config.json", _changed(eos_token=5)),
    ("no end", "tokenizer_config.json", _changed(eos_token=None)),
    ("a mapping for a token", "tokenizer_config.json", _changed(eos_token={"a": 1})),
    ("a word for a token's number", "tokenizer_config.json", _changed(added_tokens_decoder={"x": 1})),
    ("a word for a length", "tokenizer_config.json", _changed(model_max_length="long")),
    ("a class of Python", "tokenizer_config.json", _changed(tokenizer_class="os.system", auto_map=5)),
    ("no text", "chat_template.jinja", lambda _: b"\xff\xfe"),
]
MODELS: list[tuple[str, str, Any]] = [
    ("cut", "config.json", lambda text: text[:40]),
    ("deep", "config.json", lambda _: DEEP),
    ("empty", "config.json", lambda _: ""),
    ("a list", "config.json", lambda _: "[]"),
    ("nothing in it", "config.json", lambda _: "{}"),
    ("no UTF-8", "config.json", lambda _: b"\xff"),
    ("a word for a number", "config.json", _changed(vocab_size="x")),
    ("a negative number", "config.json", _changed(vocab_size=-1)),
    ("no heads", "config.json", _changed(num_attention_heads=0)),
    ("no function", "config.json", _changed(hidden_act="system")),
    ("a number for a mapping", "config.json", _changed(rope_parameters=5)),
    ("a number for the kind", "config.json", _changed(model_type=5)),
    ("code for attention", "config.json", _changed(_attn_implementation="os/system")),
    ("no weights", "model.safetensors", lambda _: b""),
    ("half a header", "model.safetensors", lambda content: content[:4]),
    ("a header of 2^63", "model.safetensors", _weights(b"{}", 2**63)),
    ("a header that is none", "model.safetensors", _weights(b"not json!!")),
    ("a deep header", "model.safetensors", _weights(DEEP.encode())),
    ("an empty header", "model.safetensors", _weights(b"{}")),
    ("a wrong place", "model.safetensors", _weights(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}')),
    ("a wrong type", "model.safetensors", _weights(b'{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}')),
    ("cut weights", "model.safetensors", lambda content: content[:-100]),
]


def _break(folder: Path, name: str, change: Any) -> None:
    raw = (folder / name).read_bytes()
    given = raw if name.endswith(".safetensors") else raw.decode()
    made = change(given)
    (folder / name).write_bytes(made if isinstance(made, bytes) else made.encode())


@pytest.mark.parametrize(("name", "change"), [case[1:] for case in TOKENIZERS], ids=[case[0] for case in TOKENIZERS])
def test_a_broken_tokenizer_is_one_message(place: Path, name: str, change: Any) -> None:
    _break(place / "models" / "teacher", name, change)
    with pytest.raises(UserError, match=r"^teacher\.model: .*models/teacher") as caught:
        load_tokenizer("models/teacher", key="teacher.model")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(("name", "change"), [case[1:] for case in MODELS], ids=[case[0] for case in MODELS])
def test_a_broken_model_is_one_message(place: Path, name: str, change: Any) -> None:
    _break(place / "models" / "teacher", name, change)
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"^teacher\.model: .*models/teacher") as caught:
        warnings.simplefilter("ignore")
        load_model("models/teacher", key="teacher.model")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "command", ["train recipe.yaml", "doctor recipe.yaml", "evaluate models/teacher --data train.jsonl"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_deep_files_at_the_command_line(place: Path, command: str, name: str) -> None:
    (place / "models" / "teacher" / name).write_text(DEEP)
    result = run(*command.split())
    assert result.exit_code in (1, 2) and "Traceback" not in result.output
    assert "models/teacher" in result.output and not (place / "runs").exists()


def test_a_type_that_is_none_runs_nothing(place: Path) -> None:
    _break(place / "models" / "teacher", "config.json", _changed(dtype="os.system"))
    told(run("train", "recipe.yaml"), 2, "teacher.model: cannot load 'models/teacher'", "'os.system'")


@pytest.mark.parametrize("template", ["{% include 'x' %}", "{{ 1 // 0 }}", "{{ 'a' * 10**10 }}", "{{ 10**10**10 }}"])
@pytest.mark.parametrize("command", ["train recipe.yaml", "doctor recipe.yaml"])
def test_templates_at_the_command_line(place: Path, template: str, command: str) -> None:
    (place / "models" / "teacher" / "chat_template.jinja").write_text(template)
    result = run(*command.split())
    assert result.exit_code == (2 if command.startswith("train") else 1) and "Traceback" not in result.output
    assert "the tokenizer's chat template" in " ".join(result.output.split())
    assert not (place / "runs").exists()


# ------------------------------------------------------------------------------------------------- NaN and infinity


def _poison(folder: Path, **numbers: float) -> None:
    weights = load_file(folder / "model.safetensors")
    for key, number in numbers.items():
        weights[key.replace("__", ".")].view(-1)[3] = number
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_weight_that_is_no_number_is_named(place: Path, who: str, number: float) -> None:
    shutil.copytree(place / "models" / "teacher", place / "models" / "bad")
    _poison(place / "models" / "bad", **{DOWN.replace(".", "__"): number, NORM.replace(".", "__"): number})
    change = ["teacher.model=models/bad"] if who == "teacher" else ["student.init=null", "student.model=models/bad"]
    expected = (
        f"{who}.model: 'models/bad' has non-finite weights: 1 of the",
        f"numbers of {DOWN}",
        "others in 1 more tensor",
    )
    told(run("train", "recipe.yaml", *change), 2, *expected)
    found = run("doctor", "recipe.yaml", *change, "--json")
    problem = next(c for c in json.loads(found.stdout)["checks"] if c["name"] == who)["problems"][0]
    assert problem["code"] == "weights-not-finite" and DOWN in problem["text"]


def test_the_same_in_python_and_for_other_commands(place: Path) -> None:
    _poison(place / "models" / "teacher", **{NORM.replace(".", "__"): float("nan")})
    told(run("evaluate", "models/teacher", "--data", "train.jsonl"), 2, "model: 'models/teacher'", NORM)
    bad, good = AutoModelForCausalLM.from_pretrained("models/teacher"), tiny_llama()
    rows = [{"prompt": "x", "completion": "y"}]
    for student, teacher, words in ((bad, good, "model: the student has"), (good, bad, "teacher: the teacher has")):
        with pytest.raises(UserError, match=f"^{words} non-finite weights: 1 of the 32 numbers of {NORM}"):
            DistillationTrainer(student, teacher, processing_class=tiny_tokenizer(), train_dataset=rows)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2"])
def test_weights_of_one_byte_are_looked_at_as_they_can_be(kind: str) -> None:
    """torch has no ``isfinite`` for them, which was a traceback."""
    model, dtype = nn.Module(), getattr(torch, kind)
    numbers = torch.full((16,), 0x30, dtype=torch.uint8)
    model.weight = nn.Parameter(numbers.view(dtype), requires_grad=False)
    check_finite(model, "model: it")
    if "float4" in kind:  # which has no NaN
        return
    numbers[3] = 0xFF
    model.weight = nn.Parameter(numbers.view(dtype), requires_grad=False)
    with pytest.raises(UserError, match=r"non-finite weights: 1 of the 16 numbers of weight"):
        check_finite(model, "model: it")


# ----------------------------------------------------------------------------------- the machine, and not the files


def _raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        try:
            raise error
        except Exception as cause:
            raise OSError("Unable to load the file") from cause  # as libraries do, without a number

    return fail


class TransportError(Exception):
    """As the Hub's client names it, whichever library it is built on."""


class StatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = types.SimpleNamespace(status_code=status)


NUMBERS = (
    errno.EIO,
    errno.ENOMEM,
    errno.ESTALE,
    errno.EAGAIN,
    errno.ETIMEDOUT,
    errno.ENETUNREACH,
    errno.EMFILE,
    errno.ENOSPC,
)
PASSING = [
    *(OSError(number, "words of the system", "model.safetensors") for number in NUMBERS),
    RuntimeError("Error while deserializing: I/O error: Cannot read (os error 5)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(), ConnectionResetError(), TimeoutError("timed out"), TransportError("no route to host"),
    StatusError(503), StatusError(429),
]  # fmt: skip
LASTING = [
    *(OSError(number, "words of the system", "x") for number in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP)),
    ValueError("expected value at line 1"), RecursionError(), KeyError("x"), RuntimeError("size mismatch for x"),
    type("OfflineModeIsEnabled", (ConnectionError,), {})("offline"),
    StatusError(404), StatusError(401),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_a_failure_of_the_machine_is_status_1(place: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _raising(error))
    told(
        run("train", "recipe.yaml"),
        1,
        "teacher.model: cannot load 'models/teacher'",
        "the machine or the network",
        "try again",
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", _raising(error))
    told(run("train", "recipe.yaml"), 1, "teacher.model: cannot load 'models/teacher'")


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_a_wrong_file_stays_status_2(place: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", _raising(error))
    told(run("train", "recipe.yaml"), 2, "teacher.model: cannot load 'models/teacher'")
    assert isinstance(not_readable(error, "x"), UserError)


def test_rows_that_cannot_be_read_for_a_moment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    def failing(number: int) -> Callable[..., Any]:
        def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
            if str(file).endswith("train.jsonl"):
                raise OSError(number, "words of the system")
            return real(file, *args, **kwargs)

        return opened

    for number, code in ((errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2)):
        monkeypatch.setattr(text_files, "open", failing(number), raising=False)
        told(run("train", "recipe.yaml"), code, "train.jsonl: cannot be read: words of the system")


def test_a_data_set_of_the_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for error, kind in ((TransportError("slow"), RunError), (FileNotFoundError("no such set"), UserError)):
        monkeypatch.setattr(datasets, "load_dataset", _raising(error))
        with pytest.raises(kind, match="owner/rows: no such file here, and it cannot be loaded"):
            load_rows("owner/rows")


def test_the_start_of_a_recipe_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", _raising(OSError(errno.EIO, "words of the system")))
    result = run("init", "--teacher", "models/teacher", "--data", "train.jsonl", "--output", "made.yaml")
    told(result, 1, "--teacher: cannot load 'models/teacher'")
