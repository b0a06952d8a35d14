"""A student that rounds its weights, on two processes: DDP, ZeRO-3 and FSDP2 train what one process trains, and save it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dts_hf.models.fake_quantization import TRAINED_FOR
from tests.support.launching import WORKERS
from tests.support.quantized import INT4, needs_torchao
from tests.support.tiny import tiny_llama
from tests.support.warm import run_warm
from tests.workers import quantized_worker

pytestmark = [pytest.mark.slow, needs_torchao]

WRAPPERS = {"ddp": "DistributedDataParallel", "zero3": "DeepSpeedEngine", "fsdp2": "FSDPLlamaForCausalLM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized")
    done = run_warm(WORKERS / "quantized_worker.py", 2, [str(out), *WRAPPERS])
    assert done.returncode == 0, done.stderr[-3000:]
    quantized_worker.main(str(out), "single")
    return out


@pytest.mark.parametrize("strategy", WRAPPERS)
def test_two_processes_train_as_one_and_save_ordinary_weights(folder: Path, strategy: str) -> None:
    def found(name: str, rank: int = 0) -> dict[str, Any]:
        return json.loads((folder / f"{name}-{rank}.json").read_text())

    one, two, other = found("single"), found(strategy), found(strategy, 1)
    assert (two["world"], two["wrapper"]) == (2, WRAPPERS[strategy]) and other["losses"] == two["losses"]
    assert one["trained_for"] == two["trained_for"] == INT4
    # Of the first step all weights are the same; afterwards a weight in the middle between two integers may go either way
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
    assert two["losses"][1] == pytest.approx(one["losses"][1], rel=5e-3)
    ours, theirs = (load_file(folder / f"{name}-saved" / "model.safetensors") for name in (strategy, "single"))
    assert {*theirs} <= {*ours} <= {*theirs, "lm_head.weight"}  # FSDP2 writes a tied head beside its embedding
    assert json.loads(
        (folder / f"{strategy}-saved" / "config.json").read_text()
    )[TRAINED_FOR] == INT4  # fmt: skip
    start = tiny_llama(seed=0).state_dict()
    for name, weight in theirs.items():
        moved = (weight - start[name]).norm()
        assert float((ours[name] - weight).norm()) <= 2e-2 * float(moved), name
        assert float(moved) > 0 and torch.isfinite(weight).all()
