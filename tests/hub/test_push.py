"""``push_to_hub: true`` and ``dts-hf push``, over HTTP against a Hub in a thread: the same files, and every fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.data import encoded_files, kept_rows
from dts_hf.distill import distill
from dts_hf.errors import ExitCode, UploadError
from dts_hf.hub.pull import pull
from dts_hf.hub.push import staged_source
from dts_hf.recipe.loading import load_recipe
from dts_hf.runs.directory import RunDirectory
from tests.support.daily import one_in
from tests.support.fake_hub import TOKEN, FakeHub, Fault, fake_hub
from tests.support.tiny import tiny_llama, tiny_tokenizer

STUDENT = [
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip
#: dts_hf.json where this version writes one.
OF_RUN = [
    "README.md", *STUDENT, "figures/losses.png", "figures/rouge.png", "figures/temperature.png", "metrics.json",
    "recipe.yaml",
]  # fmt: skip
HELD_OUT = [
    {"id": f"secret-{i}", "instruction": f"Whisper word {i}", "input": f"context {i}", "output": f"plums of Ruritania {i}"}
    for i in range(3)
]  # fmt: skip
ROWS = [{"id": f"row-{i}", "instruction": f"Say {i}", "input": "", "output": "yes and Freedonia"} for i in range(8)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, tmp_path_factory.mktemp("home")) as running:
        yield running


def recipe(folder: Path, report: bool = False, **training: Any) -> Path:
    teacher = tiny_llama(layers=3)
    teacher.save_pretrained(folder / "customers" / "teacher")
    tiny_tokenizer().save_pretrained(folder / "customers" / "teacher")
    for name, rows in (("train", ROWS), ("valid", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "student": {"init": {"from": "teacher", "layers": 2}},
        "teacher": {"model": str(folder / "customers" / "teacher"), "dtype": "float32"},
        "data": {"train": str(folder / "train.jsonl"), "validation": "./valid.jsonl", "prompt_template": "chat"},
        "training": {"use_cpu": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no",
                     "logging_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True, "push_to_hub": True,
                     "hub_always_push": True, **training},
        "evaluation": {"max_new_tokens": 4, "every_steps": 1},
        "output": {"dir": "runs/mine", "report": report},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``runs/mine``, whose student was not uploaded."""
    folder = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(folder)
    try:
        distill(load_recipe(recipe(folder, report=True, push_to_hub=False, hub_model_id="me/small")))
    finally:
        os.chdir(before)
    return folder


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def known(names: list[str], run: Path) -> list[str]:
    return sorted([*names, *(["dts_hf.json"] if (run / "final" / "dts_hf.json").is_file() else [])])


def nothing_private_was_sent(hub: FakeHub, run: Path, *more: str) -> None:
    """No row, no answer, no path, no token, in no request."""
    answers = [
        json.loads(line)["prediction"]
        for path in (run / "predictions").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    told = {row[name] for row in (*ROWS, *HELD_OUT) for name in ("id", "instruction", "output")}
    told |= {text for text in answers if len(text) > 3} | {"customers", TOKEN, str(Path(sys.executable).parent), *more}
    sent = hub.bodies
    assert answers and not [text for text in told if text.encode() in sent]


# ------------------------------------------------------------------------------------------------- what is uploaded


@pytest.mark.parametrize("strategy", ["every_save", "end"])
def test_a_recipe_uploads_the_staged_folder(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """With checkpoints, scores and answers in the run directory."""
    monkeypatch.chdir(tmp_path)
    result = invoke("train", recipe(tmp_path, hub_strategy=strategy))
    assert result.exit_code == 0, result.output
    assert f"uploaded to {hub.endpoint}/me/mine" in result.output and "the repository is private" in result.output
    run = tmp_path / "runs" / "mine"
    assert (run / "checkpoint-2").is_dir() and (run / "predictions" / "student.jsonl").is_file()
    assert not list(run.glob(".dts*"))
    expected = known(["README.md", "metrics.json", "recipe.yaml", *STUDENT], run)
    assert hub.files("me/mine") == expected and hub.repositories["me/mine"].private
    at_saves = [commit for commit in hub.commits if "in progress" in commit.message]
    assert len(at_saves) == (0 if strategy == "end" else 2)
    for commit in at_saves:
        assert set(commit.added) <= {"README.md", *STUDENT}
    for name in STUDENT[2:]:
        assert hub.repositories["me/mine"].branches["main"][name] == (run / "final" / name).read_bytes()
    nothing_private_was_sent(hub, run, str(tmp_path))
    assert not [p for p in run.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    card = hub.text("me/mine", "README.md")
    assert yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]


def test_a_relative_folder_is_none_of_the_hubs_names_from_anywhere(tmp_path: Path, hub: FakeHub) -> None:
    """``customers/teacher`` looks like one where nobody sees the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        distill(load_recipe(recipe(tmp_path, push_to_hub=False), ["teacher.model=customers/teacher"]))
    assert invoke("push", tmp_path / "runs" / "mine").exit_code == 0
    made, card = (hub.text("me/mine", name) for name in ("recipe.yaml", "README.md"))
    assert yaml.safe_load(made)["teacher"]["model"] == "teacher" and "customers" not in made + card


def test_a_folder_that_is_gone_is_none_of_the_hubs_names(tmp_path: Path, hub: FakeHub) -> None:
    """Neither as teacher nor as rows, and the run stands elsewhere; the names were noted when it started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        path = recipe(tmp_path, push_to_hub=False, run_name="customers/logs")
        (tmp_path / "customers" / "rows").mkdir()
        shutil.copy("train.jsonl", "customers/rows/train.jsonl")
        words = ["teacher.model=customers/teacher", "data.train=customers/rows", "data.cache_dir=customers/cache"]
        distill(load_recipe(path, words))
    shutil.rmtree(tmp_path / "customers")
    run = shutil.move(tmp_path / "runs" / "mine", tmp_path / "elsewhere")
    assert invoke("push", run).exit_code == 0
    made, card = (hub.text("me/elsewhere", name) for name in ("recipe.yaml", "README.md"))
    assert (
        yaml.safe_load(made)["data"]["train"] == "rows" and "base_model" not in card and "customers" not in made + card
    )
    assert b"customers" not in hub.bodies


def test_push_uploads_a_run_and_the_second_time_nothing(
    finished: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    run = Path("runs/mine")
    listed = invoke("push", run, "--dry-run")
    assert listed.exit_code == 0 and not hub.sent("/me/")
    expected = known(OF_RUN, run)
    assert re.findall(r"│ ([\w./]+\.\w+) ", listed.output) == expected
    result = invoke("push", run)
    assert result.exit_code == 0 and f"{hub.endpoint}/me/small\n" in result.stdout
    assert hub.files("me/small") == expected
    nothing_private_was_sent(hub, run, str(finished))
    invoke("push", run)
    assert len(hub.commits) == 1 and len(hub.sent("PUT /lfs/")) == 4  # weights and three figures, once
    # Elsewhere, in the open, on a branch
    result = invoke("push", run, "--repo", "team/other", "--public", "--revision", "first")
    assert f"{hub.endpoint}/team/other/tree/first" in result.output and not hub.repositories["team/other"].private
    assert hub.files("team/other", "first") == expected and hub.files("team/other") == []
    assert 'student = "team/other"' in hub.text("team/other", "README.md", "first")


def test_push_uploads_a_folder(finished: Path, hub: FakeHub, tmp_path: Path) -> None:
    """Of a student that no run of ours has made, and nothing else that lies in it."""
    student = tmp_path / "words"
    tiny_llama().save_pretrained(student)
    tiny_tokenizer().save_pretrained(student)
    for name in (
        "training_args.bin",
        "predictions/student.jsonl",
        "notes.md",
        "optimizer.pt",
        ".env",
        "modeling_x.py",
    ):
        (student / name).parent.mkdir(exist_ok=True)
        (student / name).write_text("plums of Ruritania")
    assert invoke("push", student).exit_code == 0
    assert hub.files("me/words") == sorted(["README.md", *STUDENT]) and b"Ruritania" not in hub.bodies
    card = hub.text("me/words", "README.md")  # who knows how it was made?
    assert "# words" in card and "distill" not in card and "dts_hf" not in card and "training run" not in card
    invoke("push", finished / "runs" / "mine" / "final")  # of a run: the run's own card
    assert hub.files("me/small") == known(OF_RUN, finished / "runs" / "mine")


def test_the_cache_of_rows_stays_here(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the rows, as text and as tokens: no push takes it, wherever somebody has put it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kept_rows, "LEAST_BYTES", 1)
    monkeypatch.setattr(encoded_files, "LEAST_ROWS", 1)
    path = recipe(tmp_path, hub_strategy="every_save")
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "data": {**values["data"], "cache_dir": "./kept"}}))
    assert invoke("train", path).exit_code == 0
    run, files = tmp_path / "runs" / "mine", sorted((tmp_path / "kept").rglob("rows.arrow"))
    assert len(files) == 4  # text and tokens, to train on and held out
    sources = [run, run / "final", run / "checkpoint-2"]
    for place in sources:
        shutil.copytree(tmp_path / "kept", place / "kept")
        for name in ("rows.arrow", "record.json"):
            shutil.copy(files[0].parent / name, place / name)
    for source in sources:
        done = invoke("push", source, "--repo", f"me/of-{source.name}")
        assert done.exit_code == 0, done.output
    assert len(hub.repositories) == 4
    for name in hub.repositories:
        assert set(hub.files(name)) <= {*OF_RUN, "dts_hf.json"}
    nothing_private_was_sent(hub, run, str(tmp_path), "rows.arrow")
    assert not [file for file in files if file.read_bytes()[:4000] in hub.bodies]


def test_a_second_student_leaves_nothing_of_the_first(finished: Path, hub: FakeHub, tmp_path: Path) -> None:
    """Its template, protocol, recipe and scores would be those of another; what is not ours stays."""
    invoke("push", finished / "runs" / "mine", "--repo", "me/both")
    hub.repositories["me/both"].branches["main"]["notes.md"] = b"by hand"
    student = tmp_path / "words"
    tiny_llama().save_pretrained(student)
    assert invoke("push", student, "--repo", "me/both").exit_code == 0
    assert hub.files("me/both") == sorted(
        ["README.md", "config.json", "generation_config.json", "model.safetensors", "notes.md"]
    )


def test_a_secret_in_a_comment_of_the_recipe_stays_here(finished: Path, hub: FakeHub, tmp_path: Path) -> None:
    """And one that the card would quote is refused, by name."""
    run = Path(shutil.copytree(finished / "runs" / "mine", tmp_path / "mine"))
    secret = "ghp_" + "aB3d" * 9
    with (run / "recipe.yaml").open("a") as file:
        file.write(f"# {secret}\n")
    assert invoke("push", run).exit_code == 0 and secret.encode() not in hub.bodies
    manifest = json.loads((run / "data_manifest.json").read_text())
    manifest["splits"]["train"]["sha256"] = secret
    (run / "data_manifest.json").write_text(json.dumps(manifest))
    result = invoke("push", run, "--repo", "me/other")
    assert result.exit_code == ExitCode.WRONG_INPUT and "README.md, line " in result.output
    assert "a GitHub token" in result.output and secret not in result.output and secret.encode() not in hub.bodies


def test_the_card_on_the_hub(finished: Path, hub: FakeHub) -> None:
    run = finished / "runs" / "mine"
    invoke("push", run)
    card, files = hub.text("me/small", "README.md"), hub.files("me/small")
    assert [name for name in re.findall(r"!\[.*?\]\((.*?)\)", card) if name not in files] == []
    assert 'student = "me/small"' in card and card.count("figures/") == 3
    made = yaml.safe_load(hub.text("me/small", "recipe.yaml"))
    assert made["teacher"]["model"] == "teacher" and made["data"]["train"] == "train.jsonl"
    assert made["data"]["validation"] == "valid.jsonl" and made["output"]["dir"] == "mine"
    metrics = json.loads(hub.text("me/small", "metrics.json"))
    assert metrics["models"]["student"]["sets"] == RunDirectory(run).read_metrics()["models"]["student"]["sets"]
    stops = json.loads(hub.text("me/small", "generation_config.json"))["eos_token_id"]
    assert tiny_tokenizer().convert_tokens_to_ids("<|im_end|>") in (stops if isinstance(stops, list) else [stops])


def test_the_pulled_student_gives_the_same_logits_and_the_cards_code_runs(
    finished: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished / "runs" / "mine"
    invoke("push", run)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = invoke("pull", "me/small")
        assert result.exit_code == 0 and "parameters: " in result.output and "ROUGE-L, validation: " in result.output
    ids = torch.arange(20)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "final", tmp_path / "small"))
    assert torch.equal(one(ids).logits, other(ids).logits)
    assert sorted(path.relative_to(tmp_path / "small").as_posix() for path in (tmp_path / "small").rglob("*.*")) == (
        hub.files("me/small")
    )
    (code,) = re.findall(r"```python\n(.*?)```", hub.text("me/small", "README.md"), re.DOTALL)
    capsys.readouterr()
    hub.requests.clear()
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n") and hub.sent("GET /me/small/resolve/.*/model.safetensors")


# ---------------------------------------------------------------------------------------------------------- faults

FAULTS = {
    "cut": (Fault("PUT /lfs/", 0), "the connection to the Hub broke off"),
    "cut at the commit": (Fault("/commit/", 0), "the connection to the Hub broke off"),
    "401": (Fault("/preupload/", 401), "the Hub does not know this login (401): run 'hf auth login'"),
    "403": (Fault("/commit/", 403), "this login may not write there (403)"),
    "429": (Fault("/preupload/", 429, headers={"Retry-After": "1"}), "the Hub has had too many requests (429)"),
    "500": (Fault("/objects/batch", 500), "the Hub is out of order (500)"),
    "413": (Fault("PUT /lfs/", 413), "the Hub takes no files of this size (413)"),
}


@pytest.mark.parametrize("name", one_in(3, FAULTS))
def test_a_fault_leaves_a_complete_run_and_the_command_that_uploads(
    finished: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The end of a run, as ``--resume`` of a finished one makes it once more."""
    monkeypatch.chdir(finished)
    fault, words = FAULTS[name]
    hub.faults = [Fault(fault.pattern, fault.status, headers=fault.headers)]
    words_of_recipe = ["train", "recipe.yaml", "training.push_to_hub=true", "--resume"]
    result = invoke(*words_of_recipe)
    assert result.exit_code == ExitCode.NOT_UPLOADED == 69, result.output
    assert "Error: run complete, upload failed: " in result.output and words in result.output
    assert result.output.rstrip().endswith("retry: dts-hf push runs/mine") and "Traceback" not in result.output
    assert "mine: scores" in result.output and "--resume" not in result.output
    assert (finished / "runs" / "mine" / "report.html").is_file() and not list((finished / "runs/mine").glob(".dts*"))
    hub.faults = []
    assert invoke("push", "runs/mine").exit_code == 0 and "README.md" in hub.files("me/small")


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_what_passes_is_tried_again(
    finished: Path, hub: FakeHub, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commit is what the client itself does not try twice; large files that are there are not sent again."""
    hub.faults = [Fault("/commit/", status, times=2)]
    assert invoke("push", finished / "runs" / "mine").exit_code == 0
    assert len(hub.sent("/commit/")) == 3 and len(hub.commits) == 1 and len(hub.sent("PUT /lfs/")) == 4


def test_python_gets_the_run_from_the_error(finished: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    hub.faults = [Fault("/commit/", 403)]
    with pytest.raises(UploadError, match="run complete, upload failed") as caught:
        distill(load_recipe("recipe.yaml", ["training.push_to_hub=true"]), resume=True)
    assert isinstance(caught.value.result, RunDirectory) and caught.value.result.read_metrics()["models"]


@pytest.mark.parametrize(
    ("who", "status", "words"),
    [
        (None, 401, "the Hub does not know this login (401)"),
        (None, 403, "this login may not write there (403)"),
        ({"name": "me", "auth": {"accessToken": {"role": "read"}}}, 200, "the token of me may only read"),
    ],
)
def test_a_login_that_will_not_do_is_found_before_training(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, who: Any, status: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.who = who or hub.who
    hub.faults = [] if who else [Fault("/whoami-v2", status)]
    path = recipe(tmp_path)
    result = invoke("train", path)
    assert result.exit_code == ExitCode.WRONG_INPUT and f"training.push_to_hub: {words}" in result.output
    assert not (tmp_path / "runs").exists() and not hub.repositories
    result = invoke("doctor", path, "--json")
    (check,) = [check for check in json.loads(result.stdout)["checks"] if check["name"] == "hub"]
    assert check["problems"][0]["code"] == "hub-login" and words in check["problems"][0]["text"]


def test_no_login_at_all_is_found_before_training(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    result = invoke("train", recipe(tmp_path))
    assert result.exit_code == 2 and "training.push_to_hub: there is no login on this machine" in result.output


def test_doctor_says_whose_login_it_is(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("doctor", recipe(tmp_path, hub_model_id="team/small"), "--json")
    (check,) = [check for check in json.loads(result.stdout)["checks"] if check["name"] == "hub"]
    assert check["status"] == "ok" and check["summary"] == "team/small, private, with the login of me"
    assert not hub.repositories


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_pushed_is_refused(finished: Path, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    unfinished = RunDirectory.create(tmp_path / "unfinished")
    unfinished.save_recipe(RunDirectory(finished / "runs" / "mine").read_recipe())
    for words, expected in (
        (("push", tmp_path / "nowhere"), "no such run directory"),
        (("push", tmp_path / "empty"), "holds no weights"),
        (("push", tmp_path / "unfinished"), "this run is not finished"),
        (("push", finished / "runs" / "mine", "--repo", "a/b/c"), "--repo: got 'a/b/c'"),
    ):
        result = invoke(*words)
        assert result.exit_code == ExitCode.WRONG_INPUT and expected in result.output, result.output
    assert not hub.commits and not hub.repositories  # a typo makes none


def test_a_folders_own_card_is_no_link_and_names_no_folder_of_this_machine(hub: FakeHub, tmp_path: Path) -> None:
    student = tmp_path / "words"
    tiny_llama().save_pretrained(student)
    (tmp_path / "secret").write_text("of somebody")
    (student / "README.md").symlink_to(tmp_path / "secret")
    result = invoke("push", student)
    assert result.exit_code == ExitCode.WRONG_INPUT and "is a link to a file elsewhere" in result.output.replace(
        "\n", " "
    )
    assert not hub.repositories
    (student / "README.md").unlink()
    (student / "README.md").write_text("# Mine\n\nTrained on /home/anna/acme/rows.jsonl\n")
    assert "lose their folders" in invoke("push", student).output
    assert hub.text("me/words", "README.md") == "# Mine\n\nTrained on rows.jsonl\n"


def test_a_resume_leaves_the_folder_of_an_upload_that_is_going_on(finished: Path, tmp_path: Path) -> None:
    """And removes that of one that was killed."""
    run = Path(shutil.copytree(finished / "runs" / "mine", tmp_path / "mine"))
    (run / ".dts_hf-hub-killed").mkdir()
    with staged_source(run, "me/mine", online=False) as ready:
        RunDirectory.create(run, resume=True)
        assert ready.folder.parent == run and (ready.folder / "model.safetensors").is_file()
        assert not (run / ".dts_hf-hub-killed").exists()


def test_pull_takes_no_code_and_no_pickles(hub: FakeHub, tmp_path: Path, finished: Path) -> None:
    invoke("push", finished / "runs" / "mine")
    files = hub.repositories["me/small"].branches["main"]
    files |= {
        "modeling_x.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "../up.json": b"{}",
        "figures/a/b.png": b"",
    }
    pull("me/small", tmp_path / "got")
    got = {path.relative_to(tmp_path / "got").as_posix() for path in (tmp_path / "got").rglob("*.*")}
    assert got == set(files) - {"modeling_x.py", "pytorch_model.bin", "../up.json", "figures/a/b.png"}
    del files["model.safetensors"]
    for words, code, expected in (
        (("pull", "me/small", tmp_path / "other"), 2, "only pickles (pytorch_model.bin)"),
        (("pull", "me/small", tmp_path / "got"), 2, "is there already"),
        (("pull", "me/nothing", tmp_path / "other"), 2, "no such repository or revision"),
        (("pull", "me/small", tmp_path / "other", "--revision", "v9"), 2, "no such repository or revision"),
        (("pull", "a/b/c", tmp_path / "other"), 2, "is no name of a repository"),
    ):
        result = invoke(*words)
        assert result.exit_code == code and expected in result.output, result.output
    hub.faults = [Fault("/api/models/me/small", 503)]
    result = invoke("pull", "me/small", tmp_path / "other")
    assert result.exit_code == 1 and "download failed: the Hub is out of order (503)" in result.output


def test_pull_touches_nothing_of_somebodys_and_goes_on_where_it_was(
    hub: FakeHub, tmp_path: Path, finished: Path
) -> None:
    """A home has a folder ``.cache`` of its own; what a try that broke off has left is marked."""
    invoke("push", finished / "runs" / "mine")
    home = tmp_path / "home-of-anna"
    for name in (".cache/huggingface/token", ".cache/huggingface/download/x", "README.md"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("precious")
    result = invoke("pull", "me/small", home)
    assert result.exit_code == ExitCode.WRONG_INPUT and "is there already" in result.output
    assert {path.read_text() for path in home.rglob("*") if path.is_file()} == {"precious"}
    hub.faults = [Fault("/resolve/.*/model.safetensors", 403)]
    assert invoke("pull", "me/small", tmp_path / "got").exit_code == ExitCode.WRONG_INPUT
    assert (tmp_path / "got" / "config.json").is_file()
    (tmp_path / "got" / ".cache" / "huggingface" / "token").write_text("precious")
    hub.faults = []
    hub.repositories["me/other"] = hub.repositories["me/small"]
    assert "is there already" in invoke("pull", "me/other", tmp_path / "got").output
    result = invoke("pull", "me/small", tmp_path / "got")
    assert result.exit_code == 0, result.output
    left = {path.relative_to(tmp_path / "got").as_posix() for path in (tmp_path / "got").rglob("*") if path.is_file()}
    assert left == {*hub.files("me/small"), ".cache/huggingface/token"}


def test_files_of_strangers_are_described_as_far_as_they_go(hub: FakeHub, tmp_path: Path, finished: Path) -> None:
    invoke("push", finished / "runs" / "mine")
    hub.repositories["me/small"].branches["main"] |= {
        "adapter_config.json": b"[]", "metrics.json": b"[1]", "dts_hf.json": b'{"protocol": 5}',
    }  # fmt: skip
    result = invoke("pull", "me/small", tmp_path / "got")
    assert result.exit_code == 0 and "parameters: " in result.output and "adapter of: None" in result.output
    assert "metrics.json: expected a JSON object, got list" in result.output


def test_a_run_whose_scores_are_a_list_is_refused_by_name(finished: Path, hub: FakeHub, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished / "runs" / "mine", tmp_path / "mine"))
    (run / "metrics.json").write_text("[]")
    result = invoke("push", run)
    assert (
        result.exit_code == ExitCode.WRONG_INPUT and "metrics.json: expected a JSON object, got list" in result.output
    )
