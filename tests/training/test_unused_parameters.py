"""DDP looks for weights without a gradient where there may be some, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from dts_hf.models.adapters import add_lora
from dts_hf.recipe.schema import Lora
from dts_hf.training.unused_parameters import may_leave_unused
from tests.support.launching import WORKERS
from tests.support.tiny import tiny_gpt2, tiny_llama
from tests.support.warm import run_warm
from tests.workers.unused_worker import with_idle_weight


class Mixture(torch.nn.Module):
    """Two experts that are modules of their own, of which a token goes to one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Embedding(8, 4) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.experts[int(input_ids[0, 0]) % 2](input_ids))


def opt(layerdrop: float) -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(vocab_size=32, hidden_size=8, num_hidden_layers=2, ffn_dim=8, num_attention_heads=2,
                  word_embed_proj_dim=8, layerdrop=layerdrop)
    )  # fmt: skip


@pytest.mark.parametrize("tie", [True, False])
def test_a_plain_student_uses_all_its_weights(tie: bool) -> None:
    student = tiny_llama(tie=tie)
    before = torch.random.get_rng_state()
    assert not may_leave_unused(student.train()) and student.training
    assert not may_leave_unused(tiny_gpt2()) and not may_leave_unused(opt(0.0))
    assert not may_leave_unused(add_lora(tiny_llama(), Lora(r=4, alpha=8, dropout=0.1)))
    assert may_leave_unused(opt(0.1))
    torch.random.set_rng_state(before)
    may_leave_unused(student)
    assert torch.equal(before, torch.random.get_rng_state())


def test_experts_towers_and_what_cannot_be_asked() -> None:
    assert may_leave_unused(Mixture())
    student = with_idle_weight(tiny_llama())
    assert may_leave_unused(student)
    student.model.layers[0].idle.requires_grad_(False)
    assert not may_leave_unused(student)
    assert may_leave_unused(torch.nn.Linear(2, 2))  # which takes no tokens


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_search_for_idle_weights_only_where_there_are_some(tmp_path: Path) -> None:
    done = run_warm(WORKERS / "unused_worker.py", 2, [tmp_path], "ddp", timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]

    def of(name: str) -> tuple[dict[str, Any], str]:
        result = json.loads((tmp_path / f"{name}.0.json").read_text())
        assert result["weights"] == json.loads((tmp_path / f"{name}.1.json").read_text())["weights"]
        return result, (tmp_path / f"{name}.0.err").read_text()

    plain, said = of("as_it_is")
    assert plain["searches"] is False and "find_unused_parameters" not in said
    searched, said = of("searched")
    assert searched["searches"] is True and "did not find any unused parameters" in said  # the Trainer's default
    assert plain["log"] == searched["log"] and len(plain["log"]) == 3 and plain["weights"] == searched["weights"]
    # A weight that nothing meets: found, and trained as if it was not there
    idle, said = of("idle_weight")
    assert idle["searches"] is True and idle["log"] == plain["log"] and "error" not in idle
    denied = json.loads(
        (tmp_path / "idle_weight_denied.0.json").read_text()
    )  # by the user: refused at the second step
    assert "Expected to have finished reduction in the prior iteration" in denied["error"]
