"""The student's own text on two processes: the same coins, texts, temperatures and weights as on one, and no hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launching import WORKERS
from tests.support.tiny import tiny_llama
from tests.support.vllm_server import Vllm, serving
from tests.support.warm import run_warm
from tests.workers import on_policy_worker

WRAPPERS = {
    "ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDPLlamaForCausalLM"
}  # fmt: skip
trained = pytest.mark.parametrize(
    ("strategy", "case"),
    [(strategy, case) for strategy in WRAPPERS for case in on_policy_worker.OF_STRATEGY[strategy]],
)
pytestmark = pytest.mark.slow


class Runs:
    """One launch of two processes trains under all strategies; it is killed where it hangs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (
            serving(Vllm(tiny_llama(seed=99, tie=False))) as url,
            serving(Vllm(tiny_llama(seed=99, tie=False), reads=False)) as deaf,
        ):
            (folder / "server").write_text(url)
            (folder / "deaf_server").write_text(deaf)
            done = run_warm(WORKERS / "on_policy_worker.py", 2, [str(folder), *WRAPPERS], timeout=800)
        assert done.returncode == 0, done.stderr[-3000:]
        on_policy_worker.main(["single"], folder)

    def __call__(self, strategy: str, rank: int = 0) -> dict[str, Any]:
        return json.loads((self.folder / strategy / f"{rank}.json").read_text())

    def weights(self, strategy: str, case: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / strategy / f"{case}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("on_policy"))


@trained
def test_the_launch_was_what_it_claims(runs: Runs, strategy: str, case: str) -> None:
    for rank in (0, 1):
        found = runs(strategy, rank)[case]
        assert found["world"] == 2 and found["wrapper"].replace("PeftModel", "Llama") == WRAPPERS[strategy]
        assert found["sharded"] == (strategy in ("zero3", "fsdp2"))


@trained
def test_two_processes_throw_the_same_coins_and_give_the_texts_of_one(runs: Runs, strategy: str, case: str) -> None:
    one, ranks = runs("single")[case], [runs(strategy, rank)[case] for rank in (0, 1)]
    assert ranks[0]["kinds"] == ranks[1]["kinds"] == one["kinds"] and any(one["kinds"])
    assert (case in ("uneven", "server")) == all(one["kinds"])
    for step, texts in enumerate(one["texts"]):
        assert not {*ranks[0]["texts"][step]} & {*ranks[1]["texts"][step]}, "each answers its own rows"
        assert {**ranks[0]["texts"][step], **ranks[1]["texts"][step]} == texts
    assert len({len(ids) for ids in one["texts"][0].values()}) > 2


@trained
def test_two_processes_learn_what_one_learns(runs: Runs, strategy: str, case: str) -> None:
    """One temperature, one normaliser (of generated labels of all ranks), one gradient."""
    one, ranks = runs("single")[case], [runs(strategy, rank)[case] for rank in (0, 1)]
    for found in ranks:
        for key in ("temperature", "loss"):
            assert found[key] == pytest.approx(one[key], rel=1e-5), key
        for log, expected in zip(found["logs"], one["logs"], strict=True):
            assert log == pytest.approx(expected, rel=1e-4)
    ours, theirs = runs.weights("single", case), runs.weights(strategy, case)
    assert ours.keys() == theirs.keys()
    apart = max(float((theirs[key] - value).norm() / value.norm()) for key, value in ours.items() if value.any())
    assert apart < 1e-5


@pytest.mark.parametrize("strategy", [name for name in WRAPPERS if "server" in on_policy_worker.OF_STRATEGY[name]])
def test_a_server_with_other_weights_ends_every_process(runs: Runs, strategy: str) -> None:
    """Also where weights are sharded, and a forward needs all processes."""
    for rank in (0, 1):
        words = runs(strategy, rank)["refused"]["words"]
        assert "answers with other weights than the student's" in words and words.endswith("everywhere=True")


def test_the_uneven_case_is_uneven(runs: Runs) -> None:
    """One process has nothing to answer while the other makes its longest answers."""
    for strategy in ("ddp", "zero3", "fsdp2"):
        first, second = (runs(strategy, rank)["uneven"] for rank in (0, 1))
        assert first["labels"][0] > 100 and second["labels"] == [0, 0]
