"""Runs whose rows lie in a file: the numbers are those of rows in memory, and a second run encodes nothing."""

from __future__ import annotations

from pathlib import Path

from dts_hf.data import encoded_files
from dts_hf.distill import distill
from dts_hf.files import file_sha256
from tests.support.recipes import recipe


def test_a_run_from_a_file_is_the_run_from_memory(workplace, monkeypatch):
    def run(name: str, **data):
        made = distill(recipe(data=data, output={"dir": name, "report": False}))
        timed = ("second", "runtime", "time", "memory")
        log = [
            {key: value for key, value in line.items() if not any(word in key for word in timed)}
            for line in made.read_log()
        ]
        return file_sha256(made.final_path / "model.safetensors"), log, made.read_data_manifest()

    memory = run("memory")
    assert not Path("cache/encoded_rows").exists()
    monkeypatch.setattr(encoded_files, "LEAST_ROWS", 5)
    assert run("first") == memory
    assert len(list(Path("cache/encoded_rows").glob("*/rows.arrow"))) == 2  # to train on, and held out

    def refuse(*_, **__):
        raise AssertionError("the rows were encoded again")

    monkeypatch.setattr(encoded_files, "_write", refuse)
    assert run("second") == memory
