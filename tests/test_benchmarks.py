"""The benchmarks run and compare like with like, and no step makes the logits of a batch.

No time is asserted: this machine may be busy.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TINY_VOCAB, tiny_llama, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> str:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "loss_head.py"), "--quick", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_loss_head_compares_the_same_divergence() -> None:
    result = json.loads(run("--json"))
    has_trl = importlib.util.find_spec("trl") is not None
    expected = {"floor", "dts_hf", "dense"} | ({"trl_gkd", "trl_chunked"} if has_trl else set())
    assert set(result["variants"]) == expected
    assert bool(result["notes"]) == (not has_trl or sys.platform != "linux")
    ours = result["variants"]["dts_hf"]
    assert ours["kl_at_t"] > 0
    for name, numbers in result["variants"].items():
        assert len(numbers["seconds_per_round"]) == result["setting"]["rounds"]
        assert numbers["seconds"] > 0
        if name != "floor":
            assert numbers["kl_at_t"] == pytest.approx(ours["kl_at_t"], rel=1e-4)


def test_loss_head_prints_one_table() -> None:
    lines = [line for line in run("--variants", "floor").splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert "x floor" in lines[0] and "peak GB" in lines[0]


class WidestLogits(TorchDispatchMode):
    """Remembers the most rows of any tensor ``[..., V]`` that an operation returns, forward or backward."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[-1] == self.vocab:
                self.rows = max(self.rows, value.numel() // self.vocab)
        return found


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_no_tensor_holds_the_logits_of_a_batch(tmp_path: Path, packing: bool) -> None:
    from dts_hf import DistillationTrainer

    rows = [{"instruction": "Count.", "output": "one two three " * (4 + k)} for k in range(4)]
    trainer = DistillationTrainer(
        tiny_llama(hidden=16),
        tiny_llama(hidden=16, layers=3, seed=1),
        temperature={"name": "dts"},
        args=TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4, disable_tqdm=True),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        logits_budget_mb=0.05,
        packing=packing,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labelled = int((batch["labels"][..., 1:] != -100).sum())
    chunk = trainer.loss.chunk_rows(TINY_VOCAB)
    assert 16 < chunk < labelled / 5  # 16 = H: the transposed head is [H, V] too
    trainer.model.train()
    with WidestLogits(TINY_VOCAB) as seen:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=labelled).backward()
    assert seen.rows == chunk
