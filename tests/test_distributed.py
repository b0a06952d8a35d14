"""One process against two (DDP over gloo): the same weights, temperatures, logged losses and held-out losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.slow


def launch(world: int, out: Path) -> None:
    out.mkdir()
    start = [sys.executable]
    if world > 1:
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", "0", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(
        [*start, str(HERE / "distributed_worker.py"), str(out)],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    launch(1, folder / "one")
    launch(2, folder / "two")
    return folder


def results(folder: Path, rank: int = 0) -> dict[str, tuple[dict, dict]]:
    return {
        path.name.split(".")[0]: (
            json.loads(path.read_text()),
            load_file(str(path.with_suffix(".safetensors"))),
        )
        for path in sorted(folder.glob(f"*.{rank}.json"))
    }


def test_the_launch_was_what_it_claims(runs):
    """accelerate can fall back to single processes without a word: look at the wrapper and the world size first."""
    one, two = results(runs / "one"), results(runs / "two")
    assert one.keys() == two.keys() and len(one) == 16
    assert all(record["world"] == 1 for record, _ in one.values())
    assert all(record["world"] == 2 for record, _ in two.values())
    assert all(record["wrapper"] == "DistributedDataParallel" for record, _ in two.values())


def test_ranks_hold_bitwise_equal_weights_and_temperatures(runs):
    first, second = results(runs / "two", 0), results(runs / "two", 1)
    for name, (record, weights) in first.items():
        other_record, other_weights = second[name]
        assert record["state"] == other_record["state"], name
        assert all(torch.equal(weights[key], other_weights[key]) for key in weights), name


def test_two_processes_equal_one(runs):
    one, two = results(runs / "one"), results(runs / "two")
    for name, (record, weights) in one.items():
        other_record, other_weights = two[name]
        for key, value in weights.items():
            difference = (other_weights[key] - value).norm() / value.norm()
            assert difference < 1e-5, (name, key, difference)
        for field in ("loss", "temperature"):
            assert other_record[field] == pytest.approx(record[field], rel=1e-5), (name, field)
        # 7 rows on 2 ranks with batches of 3: nothing is counted twice
        assert other_record["eval_rows"] == record["eval_rows"]
        assert other_record["eval_loss"] == pytest.approx(record["eval_loss"], rel=1e-6)


def test_accumulation_and_packing_equal_the_plain_step(runs):
    both = results(runs / "two")
    for tie in ("tied", "untied"):
        record, weights = both[f"gap-{tie}-1-padded"]
        for name in (f"gap-{tie}-2-padded", f"gap-{tie}-2-packed"):
            other_record, other_weights = both[name]
            assert other_record["loss"] == pytest.approx(record["loss"], rel=1e-5)
            assert other_record["temperature"] == pytest.approx(record["temperature"], rel=1e-5)
            assert all((other_weights[k] - weights[k]).norm() / weights[k].norm() < 1e-5 for k in weights), name


def test_training_moved_the_weights(runs):
    """Equality of two trainings that did nothing would prove nothing."""
    from tiny import tiny_llama

    record, weights = results(runs / "two")["gap-tied-1-padded"]
    start = tiny_llama(seed=0, tie=True).state_dict()
    assert max((weights[k] - start[k]).norm() / start[k].norm() for k in weights) > 1e-3
    assert len(set(record["temperature"])) > 1


def test_the_command_runs_on_two_processes(tmp_path):
    """``torchrun -m dts_hf train``: one run directory, written once, with the scores of all three models."""
    import yaml
    from tiny import tiny_llama, tiny_tokenizer

    tiny_llama(seed=0, layers=4).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    rows = [{"id": f"r{i}", "instruction": f"Say {i}", "input": "", "output": f"yes {i}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"init": {"from": "teacher", "layers": 2}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "validation": "rows.jsonl", "prompt_template": "chat", "responses": "teacher",
                 "teacher_max_new_tokens": 6, "cache_dir": "cache"},
        "training": {"use_cpu": True, "ddp_backend": "gloo", "max_steps": 3, "per_device_train_batch_size": 2,
                     "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"},
        "evaluation": {"rows": 5, "max_new_tokens": 6, "every_steps": 2},
        "output": {"dir": "run"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*start, "-m", "dts_hf", "train", "recipe.yaml"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["models"]) == {"teacher", "student_before", "student"} and metrics["training"]["steps"] == 3
    kinds = [json.loads(line)["kind"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 3 and kinds.count("generation") == 3
    assert (run / "final" / "model.safetensors").is_file() and (run / "report.html").is_file()
    assert (run / "checkpoint-2" / "temperature.json").is_file()
