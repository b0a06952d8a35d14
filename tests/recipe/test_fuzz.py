"""Fuzzed recipes and row files: each is read, or refused by a ``UserError``; nothing hangs, is written or is started.

``make test`` runs a fifth of them, always the same ones; ``make fuzz`` all 10,000, other ones each time.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from dts_hf.classification.glue_tasks import TASKS, load_labelled
from dts_hf.cli import app as cli
from dts_hf.console import unusable_texts
from dts_hf.data.chat_templates import TEMPLATES, get_template
from dts_hf.data.columns import FIELDS
from dts_hf.data.encoding import encode_rows
from dts_hf.data.sources import load_many, load_rows, rows_from_dataset
from dts_hf.errors import UserError
from dts_hf.evaluation.held_out import load_sets
from dts_hf.evaluation.score import score_file
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.problems import training_fields
from dts_hf.recipe.schema import Recipe, recipe_json_schema
from dts_hf.recipe.shipped import find_recipes
from dts_hf.recipe.yaml_files import parse_yaml, read_values
from tests.support.fuzzing import WORDS, cases, damaged, fence, get, limited, mutated, places, put, survive, values
from tests.support.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.timeout(3600)  # for all cases of a test; each has a limit of its own
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current folder of all cases. Everything that is loaded late is loaded here, outside of the limits."""
    folder = tmp_path_factory.mktemp("fuzz") / "here"  # what is made beside it is seen, too
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"instruction": "x", "output": "y"}\n')
    (folder / "empty").mkdir()
    (folder / "base.yaml").write_text("student: {model: a/b}\nteacher: {model: c/d}\ndata: {train: rows.jsonl}\n")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "again.yaml").write_text("extends: recipe.yaml\n")
    for number in range(40):
        (folder / f"chain{number}.yaml").write_text(f"extends: chain{number + 1}.yaml\n")
    load_recipe(RECIPES / "quickstart.yaml")
    for text in ("not/there", "text"):
        with pytest.raises(UserError):
            load_rows(text)
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_the_fence(tmp_path: Path) -> None:
    """It notices what is written beside an allowed folder, by Python and by what is not Python, and what was undone."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    with fence(tmp_path, tmp_path / "runs") as seen:
        (tmp_path / "runs" / "x").write_text("allowed")
        save_file({"x": torch.zeros(1)}, tmp_path / "runs" / "model.safetensors")
    assert not seen.touched and not seen.started
    for change in (
        lambda: (tmp_path / "runs-evil").mkdir(),
        lambda: (tmp_path / "runs-evil" / "x").write_text("not allowed"),
        lambda: (tmp_path / "runs-evil" / "x").unlink(),
        lambda: save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors"),
        lambda: save_file({"x": torch.zeros(1)}, tmp_path / "rows.jsonl"),
        lambda: (tmp_path / "model.safetensors").rename(tmp_path / "runs" / "gone"),
        lambda: ((tmp_path / "probe").mkdir(), (tmp_path / "probe").rmdir()),
    ):
        with fence(tmp_path, tmp_path / "runs") as seen:
            change()
        assert seen.touched
    with fence(tmp_path, tmp_path / "runs") as seen:
        (tmp_path / "rows.jsonl").read_bytes()
        os.system("true")
    assert not seen.touched and len(seen.started) == 1


# --------------------------------------------------------------------------------------------------------------- recipes


def _keys() -> list[tuple[str, ...]]:
    """Every key that a recipe can have, those of ``training`` included."""
    schema = recipe_json_schema()
    sections = {"": schema, **{name: schema["$defs"][name] for name in schema["$defs"]}}
    found: set[tuple[str, ...]] = {("training", key) for key in training_fields()}

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> None:
        node = sections[node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        for branch in node.get("anyOf", ()):
            walk(branch, path)
        for key, inside in node.get("properties", {}).items():
            found.add((*path, key))
            walk(inside, (*path, key))

    walk(schema, ())
    options = ("momentum", "t_init", "t_min", "t_max", "rule", "granularity", "decoupled", "range", "beta", "alpha")
    found |= {(*place, option) for place in (("temperature",), ("loss", "divergence")) for option in options}
    return sorted(found)


KEYS = _keys()
BASES = [read_values(path)[0] for path in find_recipes(RECIPES)]
FILES = [path.read_bytes() for path in sorted(RECIPES.rglob("*.yaml"))]
BOMB = b"a: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (letter, letter, b",".join([b"*%c" % (letter - 1)] * 9))
    for letter in range(ord("b"), ord("k"))
)
SNIPPETS = [
    BOMB,
    b"  bomb: &x [*x]",
    b"&a training: &b",
    b"x: *nowhere",
    b"<<: *x",
    b"<<: {loss: {kd_ratio: 2}}",
    b"student: !!python/object/apply:os.system [touch pwned]",
    b"output: !!python/name:os.system",
    b"!!binary aGVsbG8=: 1",
    b"data: !!set {a, b}",
    b"seed: !!int x",
    b"when: !!timestamp 2001-13-45",
    b"!tag {a: b}",
    b"%YAML 9.9\n---",
    b"---\n---",
    b"...",
    b"? [a, b]\n: c",
    b"? {a: b}",
    b"1: 2",
    b"null: 2",
    b".nan: 2",
    b"\t\tx: 1",
    b"x: " + b"[" * 400,
    b"x: " + b"{a: " * 200,
    b"- " * 300,
    b"x: " + b"9" * 5000,
    b"x: 1e99999",
    b"x: \"\\ud83d\\ude00\\ud800\"",
    b"x: \"\\0\"",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00",
    b"extends: recipe.yaml",
    b"extends: again.yaml",
    b"extends: loop.yaml",
    b"extends: base.yaml",
    b"extends: chain0.yaml",
    b"extends: /dev/zero",
    b"extends: ../../../../../../etc/passwd",
    b"extends: \"a\\0b\"",
    b"extends: " + b"x" * 300,
    b"extends: empty",
    b"extends: rows.jsonl",
    b"extends: [base.yaml]",
    b"extends: ''",
    b"x: |\n  " + b"word " * 3000,
    b"'" + b"a" * 3000,
]  # fmt: skip


def flow(value: Any) -> str:
    """``value`` as YAML on one line; unlike JSON it has ``.nan``, and unlike ``yaml.dump`` it is fast."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(str(key))}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else ".nan" if math.isnan(value) else f"{'-' * (value < 0)}.inf"
    if not isinstance(value, str):
        return json.dumps(value)
    escaped = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", escaped)


def check_recipe(content: bytes, overrides: Sequence[str] = ()) -> None:
    Path("recipe.yaml").write_bytes(content)
    recipe = survive(lambda: load_recipe("recipe.yaml", overrides))
    if recipe is not None:  # nothing is lost on the way to the run directory
        again = Recipe.from_dict(parse_yaml(recipe.to_yaml(), "again"), "again", deep=False)
        assert repr(again) == repr(recipe)  # infinity aside, every number is finite, and so equal to itself
        values_there = recipe.model_dump()
        assert not list(unusable_texts(values_there))
        assert {path for path in places(values_there) if not finite(get(values_there, path))} <= MAY_BE_INFINITE


#: Keys of a recipe that may hold an infinite number.
MAY_BE_INFINITE = {("training", "max_grad_norm")}


def finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def test_the_fuzz_starts_from_recipes_that_are_right() -> None:
    for base in BASES:
        assert parse_yaml(flow(base), "flow") == base
    check_recipe(flow(BASES[0]).encode())
    assert load_recipe("recipe.yaml").output.dir == BASES[0]["output"]["dir"]


@cases(4000)
@given(tree=mutated(BASES, KEYS))
def test_recipes_with_wrong_values(tree: Any) -> None:
    check_recipe(flow(tree).encode())


@cases(1000)
@given(content=st.sampled_from(FILES).flatmap(lambda content: damaged(content, SNIPPETS)))
def test_recipes_with_broken_text(content: bytes) -> None:
    check_recipe(content)


@cases(500)
@given(
    overrides=st.lists(
        st.one_of(
            st.builds(lambda key, value: f"{'.'.join(key)}={flow(value)}", st.sampled_from(KEYS), values),
            st.builds(lambda key, text: f"{'.'.join(key)}={text}", st.sampled_from(KEYS), st.sampled_from(WORDS)),
            st.sampled_from(
                ["", "=", "a", "a=", "=a", ".=1", "a..b=1", "a." * 500 + "b=1", "loss=[", "x=" + "[" * 400]
            ),
            st.text(max_size=30),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_overrides(overrides: list[str]) -> None:
    check_recipe(FILES[-1], overrides)


# ------------------------------------------------------------------------------------------------------------- row files

INSTRUCTION_ROWS = [
    [{"id": f"r{k}", "instruction": f"Name {k} trees.", "input": "", "output": "An oak."} for k in range(3)],
    [{"instruction": "Say it.", "input": "it " * 9, "output": ["It.", "That."]}],
    [{"id": 5, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}],
    [
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y"},
                {"role": "user", "content": "z"},
                {"role": "assistant", "content": "<|im_end|> <|endoftext|>"},
            ]
        }
    ],
    [{"prompt": "The sky is", "completion": " blue."}, {"text": "Once."}, {"question": "6 x 7?", "answer": "42"}],
    [
        {
            "instruction": "Add.",
            "context": "2",
            "response": "2",
            "system": "s",
            "history": [["a", "b"]],
            "reasoning": "r",
        }
    ],
    [{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}],
    [
        {
            "messages": [
                {"role": "developer", "content": "x"},
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "content": "y", "tool_call_id": "1"},
                {"role": "assistant", "content": "z", "reasoning_content": "r"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ],
    [
        {
            "conversations": [
                {"from": "human", "value": "x"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "y"},
                {"from": "gpt", "value": "z"},
            ],
            "tools": '[{"name": "f"}]',
            "images": [],
        }
    ],
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "content": ["y"]},
            ]
        }
    ],
    [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b", "label": False}],
]
LABELLED_ROWS = [
    [{"id": "a/../b", "sentence": "good", "label": 1}, {"idx": 7, "sentence": "bad", "label": 0}],
    [{"sentence1": "one", "sentence2": "two", "label": 2.5}, {"sentence1": "one", "sentence2": "two", "label": 1}],
    [{"premise": "p", "hypothesis": "h", "label": 2, "id": "x"}],
    [{"question": "q", "sentence": "s", "label": 0}, {"question1": "q", "question2": "s", "label": 1}],
]
PREDICTION_ROWS = [
    [{"prediction": "An oak.", "references": ["An oak.", "A tree."], "set": "s", "seed": 10}],
    [{"prediction": "", "output": "x", "set": "a/b", "seed": k} for k in range(3)],
]
LINES = [
    b"",
    b"[]",
    b"{}",
    b"null",
    b"5",
    b'"text"',
    b"NaN",
    b'{"instruction": NaN, "output": Infinity}',
    b'{"instruction": "x", "output": "y"},',
    b'{"instruction": "x" "output": "y"}',
    b"{'instruction': 'x'}",
    b'{"instruction": "x", "instruction": "z", "output": "y"}',
    b'{"id": ' + b"9" * 5000 + b', "instruction": "x", "output": "y"}',
    b'{"id": 1e400, "instruction": "x", "output": "y"}',
    b'{"id": "../../escaped", "instruction": "x", "output": "y"}',
    b'{"id": "a\\u0000b/\\ud800", "instruction": "x", "output": "y"}',
    b'{"instruction": "\\ud83d\\ude00 \\udc00", "output": "y"}',
    b'{"instruction": "' + b"x" * 200_000 + b'", "output": "y"}',
    b'{"x": ' + b"[" * 3000,
    b'{"x": ' + b'{"a": ' * 3000,
    b'{"sentence": "s", "label": ' + b"1" + b"0" * 400 + b"}",
    b'{"sentence": "s", "label": NaN}',
    b'{"prediction": "x", "references": []}',
    b'{"prediction": "\\ud800", "references": ["\\ud800"]}',
    b'{"prediction": "x", "references": "x", "set": ["\\u001b[2J"], "seed": {"a": 1}}',
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"\xe2\x80\xa8",
    b"\x00" * 50,
    b"\r",
]


def as_list(rows: Any) -> bytes:
    """One JSON value, as ``.json`` files may be; lines of it may be damaged, too."""
    return json.dumps({"data": rows} if isinstance(rows, list) and len(rows) == 1 else rows, indent=1).encode()


def as_lines(rows: Any, end: str = "\n") -> bytes:
    listed = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + end for row in listed).encode()


def lines(bases: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """Files with wrong objects in right lines, and with wrong lines."""
    mended = mutated(bases).map(as_lines)
    broken = st.sampled_from(bases).map(as_lines).flatmap(lambda text: damaged(text, LINES))
    return st.one_of(mended, mended, mutated(bases).map(as_list), broken)


@st.composite
def packed(draw: st.DrawFn, bases: Sequence[Any]) -> tuple[str, bytes]:
    """(file name, content): as it is or as gzip, which may be broken, too."""
    content = draw(lines(bases))
    kind = draw(st.integers(0, 5))
    if kind < 4:
        return draw(
            st.sampled_from(["f.jsonl", "f.json", "f.jsonl", "train.json", "ä b.jsonl", "f.jsonl.gz"])
        ), content
    squeezed = gzip.compress(content, mtime=0)
    if kind == 5:
        squeezed = draw(damaged(squeezed, [squeezed, b"\x1f\x8b\x08\x00"]))
    return "f.jsonl.gz", squeezed


@st.composite
def parquet(draw: st.DrawFn, bases: Sequence[Any]) -> bytes:
    """A Parquet file with columns of any type, as it is or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = st.sampled_from(
        [["a", "b"], [b"\xff", b"a"], [1, 2], [None, None], [1.5, float("nan")], [["a"], ["b", "c"]], [[], None]]
        + [
            [{"a": 1}, {"a": None}],
            [{"role": "user", "content": "x"}] * 2,
            [True, False],
            ["", " "],
            [[{"role": "user"}]] * 2,
        ]
    )
    names = st.sampled_from(
        ["id", "instruction", "input", "output", "messages", "sentence", "label", "prediction", "\x1b"]
    )
    columns = draw(st.dictionaries(names, kinds, min_size=1, max_size=4))
    arrays = {name: pa.array(column) for name, column in columns.items()}
    if draw(st.booleans()):
        arrays |= {name: pa.array(["x1", "x2"]) for name in ("instruction", "output")}
    stream = io.BytesIO()
    pq.write_table(pa.table(arrays), stream)
    content = stream.getvalue()
    return draw(damaged(content, [b"PAR1", content])) if draw(st.booleans()) else content


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def check_instruction_rows(name: str, content: bytes, template: str, tokenizer: Any) -> None:
    Path(name).write_bytes(content)
    try:
        rows = survive(lambda: load_rows(name))
        survive(lambda: load_many([name, "rows.jsonl"], limit=3))
        survive(lambda: load_sets([name]))
        if rows is not None:
            assert all(row.id and row.references for row in rows)
            encoded = survive(
                lambda: encode_rows(
                    rows,
                    tokenizer,
                    get_template(template),
                    max_length=48,
                    max_prompt_length=24,
                    long_rows="cut" if len(rows) % 2 else "drop",
                    name="data.train",
                )
            )
            assert encoded is None or all(0 < length <= 48 for length in encoded[0].lengths)
    finally:
        os.unlink(name)


templates = st.sampled_from(sorted(TEMPLATES))


@cases(2000)
@given(file=packed(INSTRUCTION_ROWS), template=templates)
def test_instruction_rows(file: tuple[str, bytes], template: str, tokenizer: Any) -> None:
    check_instruction_rows(*file, template, tokenizer)


@cases(500)
@given(content=parquet(INSTRUCTION_ROWS), template=templates)
def test_parquet(content: bytes, template: str, tokenizer: Any) -> None:
    check_instruction_rows("f.parquet", content, template, tokenizer)


@st.composite
def cells(draw: st.DrawFn) -> tuple[str, bytes]:
    """A CSV or TSV file, with wrong cells or with wrong bytes."""
    names = st.sampled_from(["id", "question", "answer", "prompt", "completion", "messages", "text", "tools", "x", ""])
    header = draw(st.lists(names, min_size=1, max_size=4))
    texts = st.one_of(st.sampled_from(WORDS), st.sampled_from(INSTRUCTION_ROWS).map(json.dumps), st.text(max_size=9))
    rows = draw(st.lists(st.lists(texts, min_size=len(header), max_size=len(header)), max_size=3))
    delimiter = draw(st.sampled_from(",\t"))
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    content = stream.getvalue().encode(errors="surrogatepass")
    if draw(st.booleans()):
        content = draw(damaged(content, [b'"', b",", b"\t", b"\r", b"\n", b"\x00", content]))
    return ("f.csv" if delimiter == "," else "f.tsv"), content


@cases(500)
@given(file=cells(), template=templates)
def test_cells(file: tuple[str, bytes], template: str, tokenizer: Any) -> None:
    check_instruction_rows(*file, template, tokenizer)


ONE_TYPE_A_COLUMN = [rows for rows in INSTRUCTION_ROWS if len(rows) == 1 and '"content": [' not in json.dumps(rows)]


@st.composite
def arrow(draw: st.DrawFn) -> bytes:
    """An Arrow file of rows, as a stream or with a footer, plain or compressed, as it is or damaged."""
    import pyarrow as pa

    table = pa.Table.from_pylist(draw(st.sampled_from(ONE_TYPE_A_COLUMN)))
    if draw(st.booleans()):
        table = pa.table({name: pa.array(["a", "b", "a"]).dictionary_encode() for name in ("question", "answer")})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=draw(st.sampled_from([None, None, "lz4", "zstd"])))
    with draw(st.sampled_from([pa.ipc.new_stream, pa.ipc.new_file]))(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    content = sink.getvalue().to_pybytes()
    return (
        draw(damaged(content, [b"\xff" * 4, b"\x00" * 8, b"ARROW1\0\0", content])) if draw(st.booleans()) else content
    )


@cases(500)
@given(content=arrow(), template=templates)
def test_arrow(content: bytes, template: str, tokenizer: Any) -> None:
    check_instruction_rows("f.arrow", content, template, tokenizer)


@cases(500)
@given(
    rows=mutated(INSTRUCTION_ROWS),
    columns=st.dictionaries(
        st.one_of(st.sampled_from(sorted(FIELDS)), st.sampled_from(WORDS)),
        st.one_of(
            st.none(),
            st.sampled_from(["prompt", "messages", "messages.0.content", "x", "history.0.1", "text.a.b"]),
            st.text(),
        ),
        max_size=3,
    ),
)
def test_columns(rows: Any, columns: dict[str, str | None]) -> None:
    survive(lambda: rows_from_dataset(rows if isinstance(rows, list) else [rows], "train_dataset", columns))


@cases(1000)
@given(file=packed(LABELLED_ROWS), subset=st.sampled_from(sorted(TASKS)))
def test_labelled_rows(file: tuple[str, bytes], subset: str) -> None:
    name, content = file
    Path(name).write_bytes(content)
    rows = survive(lambda: load_labelled(name, TASKS[subset]))
    os.unlink(name)
    for row in rows or ():
        assert row.texts and math.isfinite(row.label)


@cases(700)
@given(content=lines(PREDICTION_ROWS))
def test_prediction_rows(content: bytes) -> None:
    Path("p.jsonl").write_bytes(content)
    scores = survive(lambda: score_file("p.jsonl"))
    if scores is not None:
        json.dumps(scores, ensure_ascii=False).encode()  # can be printed


@cases(300)
@given(
    source=st.one_of(st.sampled_from(WORDS), st.text(max_size=30)),
    split=st.sampled_from(["train", "", "a b", "\ud800"]),
)
def test_sources(source: str, split: str) -> None:
    """Names instead of files: paths, patterns, data sets."""
    survive(lambda: load_rows(source, split=split))
    survive(lambda: load_sets([source]))


# ---------------------------------------------------------------------------------------------------- the whole command

GOOD = {
    "student": {"init": {"from": "teacher", "layers": 1}},
    "teacher": {"model": "models/teacher", "dtype": "float32"},
    "data": {
        "train": "train.jsonl",
        "validation": "valid.jsonl",
        "prompt_template": "plain",
        "max_length": 48,
        "max_prompt_length": 24,
    },
    "temperature": {"name": "dts"},
    "loss": {"divergence": {"name": "jsd", "beta": 0.5}, "kd_ratio": 0.5},
    "training": {"use_cpu": True, "per_device_train_batch_size": 2},
    "evaluation": {"rows": 2, "batch_size": 2},
    "output": {"dir": "runs/x", "report": False},
}
# They start processes or programs, or change the whole process for good; and the last three must stay small.
NOT_HERE = re.compile(
    r"training\.(dataloader_|torch_compile|deepspeed|fsdp|full_determinism|ddp_|parallelism|tpu|local_rank|use_liger)"
    r"|training\.(max_steps|save_steps|logging_steps)|max_new_tokens"
)
plausible = st.one_of(
    st.sampled_from([0, 1, 2, 3, 64, 1000, 2**31 - 1, 0.0, 0.1, 1.0, 2.5, 1e-30, 1e30, True, False, None]),
    st.sampled_from(
        ["", "runs/y", "../escaped", "train.jsonl", "models/teacher", "x", "chat", "alpaca", "cut", "teacher"]
    ),
    st.sampled_from(
        ["bfloat16", "no", "steps", "epoch", "best", "adapter", "adafactor", "sgd", "cosine", "dtkd", "ctkd"]
    ),
    st.sampled_from(["truncate_to_tokenizer", "intersect", "quick", "reverse_kl", "gap", "paper", "code", "token"]),
    st.lists(st.sampled_from(["train.jsonl", "student", "teacher", 0, 1, 10, "q_proj"]), max_size=2),
)


BIG = 2**31 - 1
# What passes the check of the recipe, up to its ends.
CHOICES: dict[str, list[Any]] = {
    "student.init.layers": [1, 2, [1], [0, 1]],
    "student.init.choose": ["block_influence", "middle_block", "search"],
    "student.init.mlp": [1, 8, BIG],
    "student.init.hidden": [1, 8, BIG],
    "student.init.parameters": [1, "20k", "60M"],
    "student.init.calibration_rows": [1, BIG],
    "student.dtype": ["bfloat16", "float16"],
    "student.lora": [{}, {"r": 1, "save": "merged"}, {"r": 3, "alpha": BIG, "dropout": 0.99}, {"target_modules": "q_proj"}],
    "teacher.dtype": ["bfloat16", "float16"],
    "teacher.vocab_alignment": ["intersect", "truncate_to_tokenizer"],
    "data.train": [["train.jsonl", "valid.jsonl"], "*.jsonl", ".", [{"source": "train.jsonl", "weight": 0.5}, "."]],
    "data.columns": [{"output": "output"}, {"input": None}, {"text": "output"}],
    "data.validation": [None, "train.jsonl"],
    "data.prompt_template": ["alpaca", "chat"],
    "data.max_length": [2, 25, 10**6, BIG],
    "data.max_prompt_length": [1, 2, 47, BIG - 1],
    "data.long_rows": ["cut"],
    "data.packing": [True, {"tokens": 47}, {"tokens": 10**6}],
    "data.responses": ["teacher"],
    "data.teacher_max_new_tokens": [1, 3, BIG],
    "data.max_train_rows": [1, 3, BIG],
    "data.max_validation_rows": [1, BIG],
    "temperature": ["constant", {"name": "dts", "rule": "paper"}, "dtkd", "ctkd", "taid"],
    "temperature.t_init": [1e-30, 1e30, 2.0],
    "temperature.momentum": [0.0, 0.999999],
    "loss.divergence": ["reverse_kl", "tvd", {"name": "alpha_beta"}, {"name": "skew_kl", "alpha": 1e-9}, "logit_mse", "dkd"],
    "loss.kd_ratio": [0.0, 1.0, 1e-30],
    "loss.temperature_scaling": ["none"],
    "loss.logits_budget_mb": [1, BIG],
    "training.learning_rate": [0.0, 1e-30, 1e30, 5],
    "training.per_device_train_batch_size": [1, 1000, BIG],
    "training.gradient_accumulation_steps": [3, 1000],
    "training.optim": ["sgd", "adafactor"],
    "training.lr_scheduler_type": ["cosine", "constant", "reduce_lr_on_plateau", "polynomial"],
    "training.warmup_steps": [0, 0.5, 1000],
    "training.weight_decay": [1e30, -1.0],
    "training.max_grad_norm": [0.0, 1e-30, -1.0],
    "training.seed": [0, 2**32 - 1, 2**32, 2**62],
    "training.eval_strategy": ["no", "steps"],
    "training.save_strategy": ["no", "steps", "best"],
    "training.activation_checkpointing": [True],
    "training.bf16": [True],
    "training.neftune_noise_alpha": [5.0],
    "training.load_best_model_at_end": [True],
    "training.save_total_limit": [0, 1, -1],
    "training.num_train_epochs": [1e-9, 1e30],
    "evaluation.protocol": ["quick", "minillm", "greedy"],
    "evaluation.sets": [["train.jsonl"], ["train.jsonl", "train.jsonl"], ["validation"]],
    "evaluation.rows": [1, None, BIG],
    "evaluation.set_rows": [1, BIG],
    "evaluation.batch_size": [1, BIG],
    "evaluation.no_repeat_ngram_size": [1, BIG],
    "evaluation.do_sample": [True],
    "evaluation.seeds": [[0], [BIG, 1], [1, 1]],
    "evaluation.every_steps": [1, BIG],
    "evaluation.models": [[], ["student"], ["student", "student"]],
    "evaluation.dtype": ["bfloat16", "float32"],
    "output.dir": ["runs/../runs/z", "runs/a b/ä", "../escaped", "models", "train.jsonl/x", "x" * 300, "runs/" + "y" * 99],
    "output.report": [True],
    "output.overwrite": [True],
}  # fmt: skip


@st.composite
def nearly_right(draw: st.DrawFn) -> tuple[dict[str, Any], bytes | None]:
    """(recipe, rows or None for the good ones)."""
    tree: dict[str, Any] = json.loads(json.dumps(GOOD))
    rows, kind = None, draw(st.integers(0, 7))
    for key in draw(st.lists(st.sampled_from(sorted(CHOICES)), max_size=3, unique=True)):
        put(tree, tuple(key.split(".")), draw(st.sampled_from(CHOICES[key])))
    if kind == 6:
        rows = draw(lines(INSTRUCTION_ROWS))
    elif kind == 7:
        put(tree, draw(st.sampled_from([k for k in KEYS if not NOT_HERE.search(".".join(k))])), draw(plausible))
    return tree, rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import matplotlib.font_manager  # noqa: F401  # its first import writes a cache in the home folder

    place = tmp_path_factory.mktemp("command") / "here"
    place.mkdir()
    tiny_llama().save_pretrained(place / "models" / "teacher")
    tiny_tokenizer().save_pretrained(place / "models" / "teacher")
    rows = [{"id": f"../{k}", "instruction": f"Name {k} trees.", "output": "An oak."} for k in range(4)]
    for name in ("train.jsonl", "valid.jsonl"):
        (place / name).write_bytes(as_lines(rows))
    return place


@cases(100)
@given(case=nearly_right())
def test_the_command(case: tuple[dict[str, Any], bytes | None], place: Path) -> None:
    """Recipes that may pass every check and rows that may be read: then something is trained for a step."""
    tree, rows = case
    environment = dict(os.environ)
    os.chdir(place)
    os.environ["DTS_HF_CACHE"] = str(place / "cache")
    Path("recipe.yaml").write_text(flow(tree))
    if rows is not None:
        Path("train.jsonl").write_bytes(rows)
    fixed = [
        "training.max_steps=1",
        "training.logging_steps=1",
        "training.save_steps=1",
        "evaluation.max_new_tokens=2",
    ]
    allowed = [place / "cache", place / "runs"]
    if isinstance(tree.get("output"), dict) and isinstance(tree["output"].get("dir"), str) and tree["output"]["dir"]:
        allowed.append(place / tree["output"]["dir"])
    try:
        with fence(place.parent, *allowed) as seen, limited(60), torch.random.fork_rng(devices=[]):
            result = CliRunner().invoke(cli.app, ["train", "recipe.yaml", *fixed])
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for made in (place / "runs", *allowed[2:]):
            if os.path.isdir(made) and made != place and "models" not in made.parts:  # a name may be too long
                shutil.rmtree(made)
        if rows is not None:
            shutil.copyfile("valid.jsonl", "train.jsonl")
    event(f"exit code {result.exit_code}")
    assert result.exit_code in (0, 1, 2) and "Traceback" not in result.output, result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    # A folder that is made and removed at once: can anything be written there?
    # And `mkdir` of a folder that is there already.
    left = {Path(path) for path in seen.touched} - {place.resolve()}
    assert not [path for path in left if not path.name.startswith(".dts_hf-") or path.exists()]
    assert all("git" in program for program in seen.started)
