"""Much data and long rows, through the commands: how much memory and time they take more than little data."""

from __future__ import annotations

import json
import random
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dts_hf.cli import app as cli
from dts_hf.data import kept_rows
from dts_hf.data.kept_rows import load_mixture_once
from dts_hf.data.row_encoder import RowEncoder
from dts_hf.data.sources import load_mixture
from tests.support.peaks import Peak, has_memory_files, peak_of
from tests.support.tiny import tiny_llama, tiny_tokenizer

needs_memory_files = pytest.mark.skipif(not has_memory_files(), reason="memory is read from /proc")


def write_recipe(folder: Path, rows: list[tuple[str, str]]) -> None:
    """A recipe for ``dts_hf train recipe.yaml`` in ``folder``: three steps of a tiny model."""
    folder.mkdir()
    for name in ("teacher", "student"):
        tiny_llama().save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    with (folder / "train.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"instruction": asked, "output": said}, ensure_ascii=False) + "\n" for asked, said in rows
        )
    values = {
        "teacher": {"model": "./teacher"},
        "student": {"model": "./student"},
        "data": {"train": "train.jsonl", "max_length": 300, "max_prompt_length": 100, "prompt_template": "plain"},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no",
                     "logging_steps": 1, "disable_tqdm": True},
        "output": {"dir": "out", "report": False, "overwrite": True},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(values))


def few(count: int) -> list[tuple[str, str]]:
    return [("Say.", f"It is {k}.") for k in range(count)]


def trained(folder: Path, world: int = 1) -> Peak:
    return peak_of(("-m", "dts_hf", "train", "recipe.yaml"), folder, world)


# ------------------------------------------------------------------------------------------------------------ many rows


@pytest.mark.soak
@needs_memory_files
@pytest.mark.parametrize("world", [1, 2])
def test_200_000_rows_take_less_than_400_mb(tmp_path, world):
    tokenizer = tiny_tokenizer()
    count = 251 - 1 - len(tokenizer("Say.\n\n")["input_ids"])

    def rows(number: int) -> list[tuple[str, str]]:
        heads = [f"{k:06d} " for k in range(number)]
        return [("Say.", head + "q" * (count - len(tokenizer(head)["input_ids"]))) for head in heads]

    write_recipe(tmp_path / "few", rows(100))
    write_recipe(tmp_path / "many", rows(200_000))
    least, first, second = (trained(tmp_path / name, world) for name in ("few", "many", "many"))
    (report,) = (path for path in (tmp_path / "many" / "cache" / "encoded_rows").glob("*/record.json"))
    told = json.loads(report.read_text())["report"]
    assert (told["kept"], told["prompt_tokens"] + told["response_tokens"]) == (200_000, 200_000 * 251)
    tokens = (report.parent / "rows.arrow").stat().st_size / 1e6
    print(f"{world} processes, MB:", least, first, second, "file", tokens)
    for found in (first, second):
        # The text is given up before training walks over the tokens, so of the files the larger one counts
        assert found.total - least.total < 400
        assert found.own - least.own + tokens < 400


def test_the_text_of_many_rows_is_not_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_rows, "LEAST_BYTES", 1)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": f"Say {k}.", "output": "x" * 1500}) + "\n" for k in range(4000))
    )

    def held(load) -> tuple[int, int]:
        tracemalloc.start()
        try:
            rows = load(path).rows
            assert len(rows) == 4000 and rows[3999].instruction == "Say 3999."
            return tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    load_mixture_once(tmp_path / "train.jsonl")  # what is imported counts for neither
    shutil.rmtree(tmp_path / "cache")
    memory, made, read = held(load_mixture), held(load_mixture_once), held(load_mixture_once)
    assert memory[0] > 6e6
    assert max(made[0], read[0]) < 1e6
    assert made[1] < 5e6, "not even while they are read"


# ------------------------------------------------------------------------------------------------------------- long rows


@pytest.mark.soak
@needs_memory_files
@pytest.mark.parametrize("long_rows", ["drop", "cut"])
@pytest.mark.parametrize("text", ["The quick brown fox. ", "Größe 猫🙂 "])
def test_a_row_of_60_mb_takes_less_than_1_gb_and_5_s(tmp_path, long_rows, text):
    write_recipe(tmp_path / "without", few(20))
    write_recipe(tmp_path / "with", [*few(19), ("Say.", text * (60_000_000 // len(text.encode()))), *few(1)])
    for name in ("without", "with"):
        recipe = json.loads((tmp_path / name / "recipe.yaml").read_text())
        recipe["data"]["long_rows"] = long_rows
        (tmp_path / name / "recipe.yaml").write_text(json.dumps(recipe))
    without, found = trained(tmp_path / "without"), trained(tmp_path / "with")
    told = json.loads((tmp_path / "with" / "out" / "data_manifest.json").read_text())["splits"]["train"]
    assert (told["dropped"], told["cut"]) == ((1, 0) if long_rows == "drop" else (0, 1))
    print(long_rows, text, without, found)
    assert found.total - without.total < 1000 and found.own - without.own < 1000
    assert found.seconds - without.seconds < 5


def test_a_long_row_is_not_tokenised_whole(tmp_path, monkeypatch):
    """Through the command, as a row of a file that is kept."""
    write_recipe(tmp_path / "run", [*few(9), ("Say.", "The quick brown fox. " * 100_000)])
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    tokenise, seen = RowEncoder._ids, []

    def told(encoder, texts):
        seen.extend(map(len, texts))
        return tokenise(encoder, texts)

    monkeypatch.setattr(RowEncoder, "_ids", told)
    done = CliRunner().invoke(cli.app, ["train", "recipe.yaml"])
    assert done.exit_code == 0 and "9 of 10 rows kept; dropped as too long: 1 (train-10)" in done.output
    assert seen and max(seen) < 20_000
    assert list((tmp_path / "cache" / "rows").glob("*/rows.arrow"))


# ------------------------------------------------------------------------------------------------------------ long logs


def long_log(run: Path, count: int) -> None:
    """``count`` lines of training in the log of a finished run."""
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("step") == 1 and "loss" in line][:1]
    others = [other for other in lines if "loss" not in other]
    draw = random.Random(0).random
    numbers = [name for name, value in line.items() if isinstance(value, float)]
    with log.open("w") as file:
        for step in range(1, count + 1):
            file.write(json.dumps({**line, **{name: line[name] + draw() for name in numbers}, "step": step}) + "\n")
        file.writelines(json.dumps(other) + "\n" for other in others)


@pytest.mark.soak
@needs_memory_files
def test_a_report_of_100_000_lines_takes_less_than_30_s(tmp_path):
    write_recipe(tmp_path / "run", few(20))
    trained(tmp_path / "run")
    run = tmp_path / "run" / "out"
    long_log(run, 100_000)
    found = peak_of(("-m", "dts_hf", "report", "out"), tmp_path / "run")
    print("report of 100,000 lines:", found)
    assert (run / "report.html").stat().st_size > 10_000 and found.seconds < 30


def test_a_report_of_a_long_log_is_quick(tmp_path, monkeypatch):
    write_recipe(tmp_path / "run", few(20))
    monkeypatch.chdir(tmp_path / "run")
    assert CliRunner().invoke(cli.app, ["train", "recipe.yaml"]).exit_code == 0
    long_log(Path("out"), 3_000)
    began = time.process_time()
    done = CliRunner().invoke(cli.app, ["report", "out"])
    assert done.exit_code == 0 and Path("out/report.html").stat().st_size > 10_000
    assert time.process_time() - began < 10
