"""What people see: no control character and no mark of direction reaches the terminal; ``overwrite`` says what goes."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.cli.printing import print_json, print_table
from dts_hf.console import harmless, printable, say, show
from dts_hf.doctor.diagnosis import Diagnosis, PicturedRow, Segment
from dts_hf.doctor.report import print_screen
from dts_hf.runs.directory import RECIPE_HEADER, RunDirectory
from dts_hf.runs.replaced import replaced_run
from tests.support.tiny import tiny_llama, tiny_tokenizer

PACKAGE = Path(__file__).resolve().parents[1] / "dts_hf"
#: Files whose own words alone are printed otherwise, and how often they do it.
PRINTS_ITSELF = {
    "console.py": 2,  # the choke points
    "cli/printing.py": 1,  # JSON, escaped
    "cli/app.py": 1,  # --version
    "cli/doctor.py": 1,  # names of checks, with what clears a line
    "cli/prepare.py": 1,  # --help
    "runs/stopping.py": 1,  # from a signal handler: nothing but its own words
    "inference/screens.py": 5,  # answers as they come, each piece printable
}
NASTY = "a\x1b[2J\x1b]0;owned\x07\r\x9b\u202egnp\u2066\u200f\u061c\x7fb"
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
RECIPE = """\
student: {init: {from: teacher, layers: 1}}
teacher: {model: models/teacher, dtype: float32}
data: {train: train.jsonl, validation: train.jsonl, prompt_template: plain, max_length: 400, max_prompt_length: 200}
training: {max_steps: 2, use_cpu: true, per_device_train_batch_size: 2, logging_steps: 1, save_strategy: "no"}
evaluation: {rows: 2, max_new_tokens: 2, models: [student]}
output: {dir: runs/x, report: false, overwrite: true}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "models" / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "models" / "teacher")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    rows = [
        {"id": f"r{k}{NASTY}", "instruction": f"Name {k} {NASTY}.", "output": f"An oak {NASTY}."} for k in range(4)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(*arguments: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        return CliRunner().invoke(cli.app, list(arguments))


def test_everything_is_printed_in_one_place() -> None:
    """A new ``print`` is a new way for a name of a file to act on the terminal."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [ast.unparse(call) for call in calls]
        count = sum(name in ("print", "typer.echo", "click.echo", "typer.secho") or (".write" in name and "std" in name)
                    for name in names)  # fmt: skip
        if count:
            found[path.relative_to(PACKAGE).as_posix()] = count
    assert found == PRINTS_ITSELF


def test_the_choke_points(capsys: pytest.CaptureFixture[str]) -> None:
    for write in (say, show, lambda text: show(text, error=True), lambda text: print_table(text, [{"x": text}])):
        write(NASTY)
    diagnosis = Diagnosis("recipe" + NASTY)
    with diagnosis.check("rows") as check:
        check.summary = NASTY
        check.error("x", NASTY, NASTY)
    diagnosis.picture = [PicturedRow(NASTY, [Segment("learned", NASTY, 3)])]
    print_screen(diagnosis)
    printed = capsys.readouterr()
    assert not ACTS.search(printed.out + printed.err)
    assert (printed.out + printed.err).count("gnp") >= 8
    assert "\\u202egnp" in printed.out and "\\u202egnp" in printed.err


def test_json_has_the_same_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({NASTY: [NASTY, "汉 é 🙂"]})
    text = capsys.readouterr().out
    assert not ACTS.search(text) and "汉 é 🙂" in text
    assert json.loads(text) == {NASTY: [NASTY, "汉 é 🙂"]}


def test_what_is_shown_is_not_changed_when_it_is_shown_again() -> None:
    for text in (NASTY, "x" * 5000, "x\n" * 500, "ab\tc\n", ""):
        assert printable(printable(text)) == printable(text) and harmless(harmless(text)) == harmless(text)
    assert harmless("line\n" * 500 + "end").endswith("line\nend")


def test_a_whole_run_whose_names_would_steer_the_terminal(place: Path) -> None:
    """Its directory, its rows; the end of the run, the doctor, and the scores of the student."""
    folder = "runs/\u202egnp\u200f[red]x"
    result = run("train", "recipe.yaml", f"output.dir={json.dumps(folder)}")
    assert result.exit_code == 0, result.output
    assert not ACTS.search(result.output), ACTS.search(result.output)
    assert "runs/\\u202egnp\\u200f[red]x/final" in result.stdout and "\\u202egnp\\u200f[red]x: scores" in result.stdout
    for command in (["doctor", "recipe.yaml"], ["evaluate", folder, "--output", "out", "--json"]):
        shown = run(*command)
        assert shown.exit_code in (0, 1) and not ACTS.search(shown.output), (command, ACTS.search(shown.output))


def test_overwrite_says_what_it_replaces(place: Path) -> None:
    first = run("train", "recipe.yaml")
    assert first.exit_code == 0 and "is replaced" not in first.stderr, first.output
    score = RunDirectory("runs/x").read_metrics()["models"]["student"]["sets"]["validation"]["rougeL"]["mean"]
    second = run("train", "recipe.yaml")
    assert second.exit_code == 0, second.output
    said = next(line for line in second.stderr.splitlines() if "is replaced" in line)
    expected = (
        rf"runs/x: the run 'x' of \d{{4}}-\d\d-\d\d \d\d:\d\d \(finished: ROUGE-L {100 * score:.1f} on validation\)"
    )
    assert re.fullmatch(rf"{expected} is replaced, as output.overwrite asks", said), said
    assert second.stderr.index(said) < second.stderr.index("training on")  # before anything is loaded
    # Resumed, nothing is replaced
    assert "is replaced" not in run("train", "recipe.yaml", "--resume").stderr


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, None),
        ({"recipe.yaml": "x"}, r"\(not finished, 0 steps logged\)"),
        ({"recipe.yaml": "x", "log.jsonl": '{"step": 3}\n{"step": 7}\n{"st'}, r"\(not finished, 7 steps logged\)"),
        ({"recipe.yaml": "x", "log.jsonl": "[]\n{}\n"}, r"\(not finished, 0 steps logged\)"),
        ({"recipe.yaml": "x", "metrics.json": "{}"}, r"\(finished, without a score\)"),
        ({"recipe.yaml": "x", "metrics.json": "{"}, r"\(its files are broken\)"),
        (
            {"recipe.yaml": "x", "metrics.json": '{"models": {"student": {"sets": {"v": 5}}}}'},
            r"\(finished, without a score\)",
        ),
        (
            {
                "recipe.yaml": "x",
                "metrics.json": '{"models": {"student": {"sets": {"v": {"accuracy": {"mean": 0.5}}}}}}',
            },
            r"\(finished: accuracy 50.0 on v\)",
        ),
    ],
)
def test_what_is_replaced_may_be_broken(tmp_path: Path, files: dict[str, str], says: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = replaced_run(RunDirectory(tmp_path))
    assert found is None if says is None else re.search(says, found or "")


#: Of a file: without NUL and the slash.
NAME = "a\x1b[2J\x1b]0;owned\x07\r\x9b\u202egnp\u2066\u200f\u061c\x7f\u2028b"
YAML = NAME.replace("\x1b", "\\x1b").encode("unicode_escape").decode().replace("\\\\", "\\")
#: Commands that quote what somebody else has named: each fails, or prints a result, and nothing acts on the terminal.
ATTACKS = (
    ("train", NAME), ("train", f"{NAME}.yaml"), ("train", "broken.yaml"), ("train", "keys.yaml"), ("train", "scalar.yaml"),
    ("train", "recipe.yaml", f"{NAME}=1"), ("train", "recipe.yaml", f"training.{NAME}=1"),
    ("train", "recipe.yaml", f"teacher.model={json.dumps(NAME)}"), ("train", "recipe.yaml", f"data.train={NAME}"),
    ("train", "recipe.yaml", f"teacher.model=models/{NAME}"), ("train", "recipe.yaml", "teacher.model=models/odd"),
    ("train", "recipe.yaml", f"temperature.name={NAME}"), ("train", "recipe.yaml", f"training.optim={NAME}"),
    ("train", "recipe.yaml", f"loss.divergence={NAME}"), ("train", "recipe.yaml", f"data.prompt_template={NAME}"),
    ("train", "recipe.yaml", f"training.resume_from_checkpoint={NAME}"), ("train", "recipe.yaml", f"output.dir={NAME}.txt"),
    ("train", "recipe.yaml", f"data.train={NAME}.jsonl"), ("train", "recipe.yaml", "data.train=long.jsonl"),
    ("train", "recipe.yaml", "data.train=fields.jsonl"), ("train", "recipe.yaml", "data.train=twice.jsonl"),
    ("train", "recipe.yaml", "data.train=table.csv"), ("train", "recipe.yaml", "teacher.model=models/template",
     "data.prompt_template=chat"),
    ("doctor", f"{NAME}.yaml"), ("doctor", "broken.yaml"), ("doctor", "keys.yaml"),
    ("doctor", "recipe.yaml", "data.train=long.jsonl"),
    ("doctor", "recipe.yaml", "teacher.model=models/odd"),
    ("generate", NAME, "--prompt", "x"), ("generate", "models/odd", "--prompt", "x"),
    ("generate", "models/teacher", "--data", f"{NAME}.jsonl"), ("generate", "models/teacher", "--prompt", NAME),
    ("evaluate", NAME), ("evaluate", "models/teacher", "--data", NAME), ("evaluate", "models/teacher", "--protocol", NAME),
    ("evaluate", "models/teacher", "--sets", NAME), ("score", NAME), ("score", f"{NAME}.jsonl"), ("report", NAME),
    ("report", "odd_run"), ("push", NAME), ("push", "odd_run"), ("pull", NAME, "here"), ("chat", NAME), ("list", NAME),
    ("prepare", NAME), ("prepare", "dolly", "--source", NAME), ("prepare", "recipes", "--output", f"{NAME}.txt"),
    ("init", "--teacher", NAME, "--data", NAME), (NAME,), (f"--{NAME}",), ("train", f"--{NAME}"), ("schema", NAME),
    ("env", NAME),
    ("generate", "models/teacher", "--max-new-tokens", NAME),
)  # fmt: skip


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything has a name that would act, and says it where it is quoted."""
    folder = tmp_path_factory.mktemp("attacked")
    for name in ("teacher", "odd", "template", NAME):
        tiny_llama(layers=1).save_pretrained(folder / "models" / name)
        tiny_tokenizer().save_pretrained(folder / "models" / name)
    config = json.loads((folder / "models" / "odd" / "config.json").read_text())
    for name in ("odd", NAME):
        odd = {**config, "model_type": NAME, "architectures": [NAME], NAME: NAME}
        (folder / "models" / name / "config.json").write_text(json.dumps(odd))
    (folder / "models" / "template" / "chat_template.jinja").write_text(
        f"{{{{ raise_exception({json.dumps(NAME)}) }}}}"
    )
    good = {"id": f"r{NASTY}", "instruction": "Name a tree.", "output": "An oak."}
    files = {
        "recipe.yaml": RECIPE.replace("overwrite: true", "overwrite: false"),
        "broken.yaml": f"{NAME}: [{NAME}", f"{NAME}.yaml": f"a: {NAME}\n- {NAME}",
        "keys.yaml": f'"{YAML}": {{"{YAML}": 1}}\nteacher: {{"{YAML}": "{YAML}"}}\n', "scalar.yaml": f'"{YAML}"\n',
        f"{NAME}.txt": "", f"{NAME}.jsonl": f"{NAME}\n",
        "long.jsonl": json.dumps({**good, "instruction": f"tree {NASTY} " * 400}) + "\n",
        "fields.jsonl": json.dumps({f"id{NASTY}": 1, NASTY: NASTY}) + "\n",
        "twice.jsonl": 2 * (json.dumps(good) + "\n"), "table.csv": f"{NAME},b\n1,2\n",
        "odd_run/recipe.yaml": f"{RECIPE_HEADER}{NAME}: {NAME}\n",
    }  # fmt: skip
    (folder / "odd_run").mkdir()
    for name, text in {**files, "train.jsonl": json.dumps({**good, "id": "r"}) + "\n"}.items():
        (folder / name).write_text(text, errors="surrogatepass")
    return folder


@pytest.mark.parametrize("number", range(len(ATTACKS)), ids=lambda number: f"{number}-{ATTACKS[number][0][:8]!a}")
def test_names_of_strangers_do_not_act(attacked: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(attacked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*ATTACKS[number])
    assert result.exit_code in (0, 1, 2) and "Traceback" not in result.output, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    found = ACTS.search(result.output)
    assert found is None, (ATTACKS[number], ascii(result.output[max(found.start() - 200, 0) :][:400]))
