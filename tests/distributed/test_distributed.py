"""One table: one process against two (gloo) under DDP, ZeRO-1, 2, 3 and FSDP2: the same weights, temperatures, losses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.cases import CASES, MULTI, ROUNDING, TIED, Case
from tests.support.launching import ROOT, WORKERS, environment
from tests.support.warm import run_warm

# Six strategies in one launch, one after the other: about 80 seconds on 2 quiet cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LIMIT = 1e-5  # relative, of weights after a few steps
#: Room above what rounding does. Between processes and layouts nothing differs but the order of fp32 sums.
ROOM = 5
#: What is rounded in a single step, before a training multiplies it: a weight when it is stored; a temperature, which
#: some policies take from logits (sums over H = 32); means of losses, whose softmax sums V = 320 terms.
AT_ONCE = {"weights": 1, "temperature": math.sqrt(32)}
OF_LOSSES = math.sqrt(320)
#: No bound may be wider: a label counted twice changes a gradient by some 1e-2, an unsynchronised rank by more.
WIDEST = 3e-4
WRAPPERS = {
    "single": "LlamaForCausalLM",
    "ddp": "DistributedDataParallel",
    "zero1": "DeepSpeedEngine 1 DeepSpeedZeroOptimizer",
    "zero2": "DeepSpeedEngine 2 DeepSpeedZeroOptimizer",
    "zero3": "DeepSpeedEngine 3 DeepSpeedZeroOptimizer_Stage3",
    "fsdp2": "FSDPLlamaForCausalLM",  # its weights are DTensors: the worker looks
}
RUNS = [(strategy, case) for strategy in ("single", *MULTI) for case in CASES if strategy in case.strategies]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder where both launches left their results."""
    folder = tmp_path_factory.mktemp("distributed")
    for world in (1, 2):
        done = run_warm(WORKERS / "distributed_worker.py", world, [folder], timeout=800)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def result(folder: Path, strategy: str, case: Case, rank: int = 0) -> tuple[dict, dict[str, torch.Tensor]]:
    path = folder / f"{strategy}.{case.name}.{rank}"
    return json.loads(path.with_name(path.name + ".json").read_text()), load_file(f"{path}.safetensors")


def named(group: str, strategy: str = "single") -> Case:
    """The first case of ``group`` that ``strategy`` ran."""
    return next(case for case in CASES if case.group == group and strategy in case.strategies)


def apart(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a weight, in its norm."""
    assert weights.keys() == others.keys()
    return largest(float((others[key] - value).norm() / value.norm()) for key, value in weights.items())


def largest(values: Iterable[float]) -> float:
    """The largest of ``values``; infinite where one is non-finite, which ``max`` can overlook."""
    values = list(values)
    return math.inf if any(map(math.isnan, values)) else max(values)


def test_the_launch_was_what_it_claims(runs):
    """accelerate can fall back to single processes without a word: look at the wrapper and the world size first."""
    for strategy, case in RUNS:
        record, _ = result(runs, strategy, case)
        assert record["world"] == (1 if strategy == "single" else 2), (strategy, case.name)
        expected = WRAPPERS[strategy]
        if case.lora and strategy in ("single", "fsdp2"):
            expected = expected.replace("LlamaForCausalLM", "PeftModelForCausalLM")
        assert (record["strategy"], record["wrapper"]) == (strategy, expected), (strategy, case.name)
        assert record["recomputed"] == case.arguments.get("activation_checkpointing", False), (strategy, case.name)


def test_the_table_covers_every_policy_accumulation_and_layout():
    for strategy in MULTI:
        cases = [case for case in CASES if strategy in case.strategies and case.group in TIED]
        assert {case.policy for case in cases} == {"gap", "paper", "code", "dtkd", "ctkd"}
        assert {case.accumulation for case in cases} == {1, 2, 4}
        assert {case.packing for case in cases} == {case.tie for case in cases} == {True, False}


def test_ranks_hold_bitwise_equal_weights_and_temperatures(runs):
    for strategy, case in RUNS:
        if strategy != "single":
            (first, weights), (second, others) = (result(runs, strategy, case, rank) for rank in (0, 1))
            assert first == second, (strategy, case.name)
            assert all(torch.equal(weights[key], others[key]) for key in weights), (strategy, case.name)


def differences(runs: Path, strategy: str, case: Case) -> dict[str, float]:
    """The largest relative difference of each quantity from one process that takes its steps whole, padded."""
    (record, weights), (expected, reference) = result(runs, strategy, case), result(runs, "single", named(case.group))
    row = {"weights": apart(reference, weights)}
    for field in ("temperature", "loss", "kl", "grad_norm"):
        pairs = list(zip(record[field], expected[field], strict=True))
        assert len(pairs) == case.steps
        row[field] = largest(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    row["held out"] = abs(record["eval_loss"] / expected["eval_loss"] - 1)
    assert record["held_out"] == pytest.approx(expected["held_out"], rel=1e-3), (strategy, case.name)
    assert record["eval_rows"] == expected["eval_rows"]  # 7 rows in batches of 3: none is counted twice
    assert record["tokens"] == expected["tokens"] > 0, (strategy, case.name)  # nor is a dummy row
    return row


def test_every_strategy_and_split_ends_in_the_same_weights_temperatures_and_losses(runs):
    """Up to rounding, which is derived and not guessed: it is another size on every CPU, and grows with the steps.

    In each group one process trains once more, its gradients disturbed by just what sums in another order are off by
    (``round_gradients``). What becomes of that in 5 or 6 steps is how far rounding carries the group's weights, losses
    and norms; norms most of all, because a gradient is what is left of terms that cancel. (A Xeon with AMX, all strategies:
    0.3 to 1.7 times as much where a quantity is well above what is rounded in one step, ``AT_ONCE``.) The bound is ``ROOM``
    times both.
    """
    bounds = {}
    for case in CASES:
        if case.rounded:
            bounds[case.group] = {
                key: ROOM * (value + AT_ONCE.get(key, OF_LOSSES) * ROUNDING)
                for key, value in differences(runs, "single", case).items()
            }
    table, wrong = [], []
    for strategy, case in RUNS:
        if case.group in ("adamw", "bf16") or case.rounded:
            continue
        row, bound = differences(runs, strategy, case), bounds[case.group]
        shown = "".join(f"  {key} {value:.1e} of {bound[key]:.1e}" for key, value in row.items())
        table.append(f"{strategy:7} {case.name:25}{shown}")
        wrong += [table[-1]] if any(not value <= bound[key] for key, value in row.items()) else []
    print("\n".join(table))
    assert not wrong, "\n".join(wrong)
    assert largest(value for bound in bounds.values() for value in bound.values()) < WIDEST


def test_rounding_is_small_and_there(runs):
    """The bounds above are worth something only if the disturbance is that of rounding, neither nothing nor a bug."""
    for case in CASES:
        if case.rounded:
            row = differences(runs, "single", case)
            assert 0.1 * ROUNDING < row["weights"] < 100 * ROUNDING, case.name


def test_without_clipping_and_accumulation_the_arithmetic_is_the_same(runs):
    """AdamW's included: bitwise under DDP, ZeRO-1 and ZeRO-2. The others cut every weight in two: the last bit moves."""
    record, weights = result(runs, "ddp", named("adamw", "ddp"))
    for strategy in ("zero1", "zero2"):
        other, others = result(runs, strategy, named("adamw", strategy))
        assert all(torch.equal(weights[key], others[key]) for key in weights), (strategy, apart(weights, others))
        for key in ("loss", "temperature", "state"):
            assert other[key] == record[key], (strategy, key)
    for strategy in ("zero3", "fsdp2"):
        assert apart(weights, result(runs, strategy, named("adamw", strategy))[1]) < 1e-6


def test_bfloat16_trains_under_every_kind_of_wrapper(runs):
    """Weights are fp32 under DDP and FSDP2 and bf16 under DeepSpeed, so only the first loss is nearly the same."""
    losses = {
        strategy: result(runs, strategy, named("bf16", strategy))[0]["loss"] for strategy in ("ddp", "zero3", "fsdp2")
    }
    for strategy, values in losses.items():
        assert values[0] == pytest.approx(losses["ddp"][0], rel=2e-3) and values[-1] < values[0], strategy
        # FSDP2 rounds what a model returns to bf16; the loss is not a number to round
        assert any(value != float(torch.tensor(value).bfloat16()) for value in values), strategy


def test_trainings_moved_weights_and_temperatures_and_gradients_were_clipped(runs):
    """Equality of trainings that did nothing would prove nothing."""
    from tests.workers.distributed_worker import student_of

    for case in CASES:
        strategy = case.strategies[-1]
        record, weights = result(runs, strategy, case)
        start = {name: value for name, value in student_of(case).named_parameters() if value.requires_grad}
        moved = apart({name: value.detach() for name, value in start.items()}, weights)
        assert 1e-3 < moved < math.inf, case.name
        assert len(set(record["temperature"])) > 1 or case.group in ("dtkd", "auto"), case.name
        assert max(record["grad_norm"]) > 1.0, case.name  # max_grad_norm
        assert all("lora_" in name for name in weights) == case.lora


def test_two_processes_select_the_tokens_that_one_selects(runs):
    """The share in force, its threshold and the running loss are of the whole step; and some tokens were left out."""
    for group in ("keep", "auto_keep"):
        one, two = (result(runs, strategy, named(group))[0]["state"] for strategy in ("single", "ddp"))
        for name, value in one.items():
            assert two[name] == (None if value is None else pytest.approx(value, rel=LIMIT)), (group, name)
        assert one["kept"] < 0.5 and one["kept_tokens"] < 0.6 and one["log_threshold"] is not None, group


def test_the_loss_in_a_hand_written_loop_under_fully_shard(runs):
    """Without Trainer and accelerate, tied and untied; a gradient error of one step would grow over five."""
    for rank in (0, 1):
        apart = json.loads((runs / f"loop.{rank}.json").read_text())
        assert len(apart) > 40
        assert largest(difference for difference, _ in apart.values()) < LIMIT
        assert 1e-2 < largest(moved for _, moved in apart.values()) < math.inf


def test_classifiers_and_regression_end_the_same(runs):
    for subset in ("sst2", "stsb"):
        expected = load_file(runs / f"single.{subset}.0.safetensors")
        for strategy in ("ddp", "zero3"):
            for rank in (0, 1):
                assert apart(expected, load_file(runs / f"{strategy}.{subset}.{rank}.safetensors")) < LIMIT, subset
                record = json.loads((runs / f"{strategy}.{subset}.{rank}.json").read_text())
                alone = json.loads((runs / f"single.{subset}.0.json").read_text())
                assert record == {"wrapper": WRAPPERS[strategy], "tokens": alone["tokens"]}


def test_a_student_in_pieces_is_refused(runs):
    for rank in (0, 1):
        assert "unsharded_init()" in (runs / f"split_before.{rank}.txt").read_text()


def test_what_stands_behind_the_last_part_of_a_weight_is_not_looked_at(runs):
    parts = [json.loads((runs / f"padded_part.{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(part) for part in parts] == [3, 2] and all(math.isfinite(value) for part in parts for value in part)


def test_the_command_runs_on_two_processes(tmp_path):
    """``accelerate launch`` with the file for ZeRO-3: one run directory, with the scores of all three models."""
    import yaml

    from tests.support.tiny import tiny_llama, tiny_tokenizer

    tiny_llama(seed=0, layers=4).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    rows = [{"id": f"r{i}", "instruction": f"Say {i}", "input": "", "output": f"yes {i}"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"init": {"from": "teacher", "layers": 2}},
        "teacher": {"model": "teacher", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "validation": "rows.jsonl", "prompt_template": "chat", "responses": "teacher",
                 "teacher_max_new_tokens": 6, "cache_dir": "cache"},
        "training": {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 2,
                     "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"},
        "evaluation": {"rows": 5, "max_new_tokens": 6, "every_steps": 2},
        "output": {"dir": "run"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    start += ["--config_file", str(ROOT / "recipes" / "accelerate" / "zero3.yaml"), "-m", "dts_hf"]
    done = subprocess.run(
        [*start, "train", "recipe.yaml"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["models"]) == {"teacher", "student_before", "student"} and metrics["training"]["steps"] == 3
    kinds = [json.loads(line)["kind"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 3 and kinds.count("generation") == 3
    assert (run / "final" / "model.safetensors").is_file() and (run / "report.html").is_file()
    assert (run / "checkpoint-2" / "temperature.json").is_file()
    record = json.loads((run / "checkpoint-2" / "complete.json").read_text())
    assert (record["strategy"], record["processes"]) == ("zero3", 2)
    weights = load_file(run / "final" / "model.safetensors")
    assert sum(value.numel() for value in weights.values()) == tiny_llama(layers=2).num_parameters()
