"""The benchmarks of a GPU as far as a CPU shows them: they run, compare like with like, and survive what fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.benchmarks import cases
from tests.support.benchmarks import HAS_TRL, assert_same_kl, report, run

# --------------------------------------------------------------------------------------------- what fails is a row


def test_what_fails_is_a_row_and_the_others_go_on(scripts: Callable[[str], ModuleType]) -> None:
    names = ["absent", "too big", "broken", "dies", "fits"]
    groups = [["absent", "too big", "broken", "fits"], ["dies"]]
    found = scripts("harness").measure(cases.build, names, None, rounds=2, threads=1, processes=groups)
    assert list(found.numbers) == names[1:]
    assert [found.numbers[name]["failed"] for name in names[1:4]] == [
        "out of memory",
        "ValueError: not",
        "the process died",
    ]
    assert found.numbers["fits"]["kl"] == 0.5 and len(found.numbers["fits"]["seconds_per_round"]) == 2
    assert "absent is left out: no such package" in found.notes


def test_after_the_limit_no_turn_begins(scripts: Callable[[str], ModuleType]) -> None:
    found = scripts("harness").measure(cases.build, ["fits"], None, rounds=3, threads=1, device="cuda", limit=0.0)
    assert found.numbers == {"fits": {"failed": "not reached"}}
    assert "The limit of 0 s was reached" in found.notes[0]


# ------------------------------------------------------------------------------------------------- a clock of events


class Events:
    """Stands in for ``torch.cuda``: an event is the number of steps so far, memory what the test says."""

    def __init__(self) -> None:
        self.now, self.allocated, self.peak = 0.0, 1000, 0

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=-1.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def synchronize(self) -> None:
        pass

    def memory_allocated(self) -> int:
        return self.allocated

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Events:
    events = Events()
    for name in ("Event", "synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(events, name))
    return events


def test_a_turn_on_a_card_counts_warm_steps_alone(scripts: Callable[[str], ModuleType], card: Events) -> None:
    harness, calls = scripts("harness"), []

    def step() -> dict[str, Any]:
        calls.append(1)
        warm = len(calls) > harness.CUDA_WARM_UP
        card.now += 20.0 if warm else 5000.0  # milliseconds
        card.peak = max(card.peak, card.allocated + (300 if warm else 9000))
        return {"kl": torch.tensor(0.25)}

    found = harness._cuda_turn(harness.Task(step), with_memory=True)
    assert len(calls) == harness.CUDA_WARM_UP + harness.CUDA_STEPS
    assert found == {"seconds": 0.02, "kl": 0.25, "peak_bytes": 300}


def test_a_step_that_times_itself_is_called_once(scripts: Callable[[str], ModuleType], card: Events) -> None:
    harness = scripts("harness")
    task = harness.Task(lambda: {"seconds": 7.0, "peak_bytes": 5.0}, timed_inside=True)
    assert harness._cuda_turn(task, with_memory=True) == {"seconds": 7.0, "peak_bytes": 5.0}


# ----------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.soak
def test_loss_sizes_compares_the_same_loss_and_its_errors_are_small() -> None:
    found = report("loss_sizes.py", "--device", "cpu", "--dtype", "float32")
    assert len(found["tables"]) == 2
    for table in found["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert {"floor", "ours", "ours_256", "ours_1024", "ours_4096", "hf_ce"} <= set(rows)
        assert not HAS_TRL or {"trl_gkd", "trl_chunked"} <= set(rows)
        assert_same_kl(rows, rel=1e-4)
        assert rows["hf_ce"]["ce"] == pytest.approx(rows["ours"]["ce"], rel=1e-5)
        for name, row in rows.items():
            errors = [row[key] for key in ("ce_error", "kl_error", "dh_error", "dw_error") if key in row]
            assert name == "floor" or (len(errors) >= 3 and max(errors) < 1e-5), (name, errors)


@pytest.mark.soak
def test_step_sizes_trains_every_variant_on_the_same_rows() -> None:
    variants = ("floor", "sft", "padded", "packed", *(("trl_gkd", "trl_chunked") if HAS_TRL else ()))
    found = report("step_sizes.py", "--device", "cpu", "--shape", "gpt2", "--variants", *variants)
    rows = {row["name"]: row for row in found["tables"][0]["rows"]}
    assert set(rows) == set(variants) and not any("failed" in row for row in rows.values())
    assert_same_kl(rows, rel=0.02)
    assert all(row["whole_seconds"] > row["seconds"] > 0 for name, row in rows.items() if name != "floor")
    assert rows["packed"]["x_padded"] == pytest.approx(rows["packed"]["seconds"] / rows["padded"]["seconds"])


@pytest.mark.soak
def test_every_way_to_attend_gives_the_same(tmp_path: Path) -> None:
    kept = tmp_path / "all.json"
    run("run.py", "--quick", "--device", "cpu", "--only", "attention", "--results", str(tmp_path), "--json", str(kept))
    found = json.loads(kept.read_text())["reports"]["attention"]
    for table in found["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert {"dts_hf", "rows", "dense", "dense_mask", "flex_mask"} <= set(rows)
        assert all(rows[name]["error"] < 5e-3 for name in ("dts_hf", "rows", "dense"))
    printed = run("run.py", "--table", str(kept))
    assert printed.count("| dts_hf's packed attention |") == 2


def test_the_errors_of_ours_are_small(scripts: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    module = scripts("loss_sizes")
    setting = module.Setting(24, "float32", "cpu")
    found = module.build_errors("ours_256 16x64", setting).step()
    assert {"ce_error", "kl_error", "dh_error", "dw_error"} <= set(found)
    assert all(float(value) < 1e-5 for key, value in found.items() if key.endswith("_error"))
    without_factor = module.VARIANTS["ours_256"]._replace(weights=lambda r, t: (1 - r, r))
    monkeypatch.setitem(module.VARIANTS, "ours_256", without_factor)
    assert float(module.build_errors("ours_256 16x64", setting).step()["dw_error"]) > 0.1


def test_our_trainer_is_timed_step_by_step(scripts: Callable[[str], ModuleType]) -> None:
    module = scripts("step_sizes")
    setting = module.Setting(module.QUICK_SHAPES["135m"], "cpu", steps=2, warm_up=1)
    found = module.build("packed", setting).step()
    assert found["whole_seconds"] > found["seconds"] > 0
    assert 0.1 < found["kl"] < 1.0
    peer = module.build("sft", setting).step()
    assert set(peer) == {"seconds", "whole_seconds"}


@pytest.mark.parametrize("way", ["dts_hf", "rows", "dense"])
def test_a_way_to_attend_is_compared_with_fp32(scripts: Callable[[str], ModuleType], way: str) -> None:
    module = scripts("attention")
    shapes = {"0": module.Shape(3, 12, 4, 2, 16)}
    task = module.build(f"{way} 0", (module.Setting("float32", "cpu"), shapes))
    assert task.step()["error"] < 1e-5


def test_results_of_one_file_stay_beside_new_ones(tmp_path: Path, scripts: Callable[[str], ModuleType]) -> None:
    module, file, page = scripts("run"), tmp_path / "gpu.json", tmp_path / "page.md"
    where = {"date": "2026-12-01", "machine": "one H100", "commit": "abc", "versions": {"torch": "2"}}
    row = {"name": "dts_hf", "x_generate": 5.0}
    made = {"environment": where, "setting": {"device": "cuda"}, "notes": []}
    made["tables"] = [{"title": "", "columns": [["x_generate", "x", 2]], "rows": [row]}]
    file.write_text(json.dumps({"reports": {"cuda_generation": made}}))
    page.write_text(
        "\n".join(f"<!-- bench:{name} -->\n<!-- /bench:{name} -->" for name in ("cuda_generation", "cuda_bars"))
    )
    module.main(["--write", str(page), "--table", str(file), "--results", str(tmp_path)])
    text = page.read_text()
    assert "Measured on 2026-12-01 on one H100, commit abc; torch 2." in text
    assert "| GPU, generation, tokens a second / model.generate | 5.00 | ≥ 4.00 | yes |" in text


def test_shapes_are_those_of_the_models(scripts: Callable[[str], ModuleType]) -> None:
    module = scripts("step_sizes")
    for name, teacher, student in (("gpt2", 1.475e9, 85e6), ("135m", 106e6, 71e6), ("8b", 6.98e9, 0.973e9)):
        shape = module.SHAPES[name]
        for model, expected in ((shape.teacher, teacher), (shape.student, student)):
            weights = model.layers * sum(wide * out for wide, out in model.matmuls())
            assert weights == pytest.approx(expected, rel=0.01)  # of the layers; embeddings aside
        assert shape.tokens == pytest.approx(0.65 * shape.rows * shape.time, rel=0.01)
        assert shape.labelled == pytest.approx(shape.tokens / 2, rel=0.01)
        assert max(total for total, _ in shape.lengths) == shape.time


def test_a_text_that_differs_names_the_distance_of_its_two_logits(scripts: Callable[[str], ModuleType]) -> None:
    def model(ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(1, ids.shape[1], 10)
        logits[0, -1] = torch.arange(10) * float(ids.shape[1])
        return SimpleNamespace(logits=logits)

    differ = scripts("generation").differences
    prompts = [[1, 2], [3], [4]]
    found = differ(model, prompts, [[5, 6, 7], [5], [6, 7]], [[5, 8, 7], [5], [6]], eos=2)
    assert found == [(0, 1, 6.0), (2, 1, 10.0)]  # the last one ended: its token is the end


# ------------------------------------------------------------------------------------------------- compiled kernels

MACHINE_CODE = """
k:
.text.k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R6, desc[UR8][R2.64] ;
.L_x_1:
        /*0020*/              @!P1 LDG.E.128 R25, desc[UR8][R2.64+0x100] ;
        /*0030*/                   LDG.E.128.CONSTANT R33, desc[UR8][R4.64] ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   LDG.E.U16 R2, desc[UR8][R2.64] ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_the_main_loop_is_the_one_that_loads_most(
    scripts: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scripts("kernel_report")
    monkeypatch.setattr(module, "tool", lambda name: name)
    monkeypatch.setattr(module, "_run", lambda *_command: MACHINE_CODE)
    found, labels = module.disassemble(Path("a.cubin"))
    assert (len(found), labels) == (10, {".L_x_1": 0x20, ".L_x_2": 0x60, ".L_x_3": 0x90})
    assert [one.opcode for one in module.main_part(found, labels)] == [
        "LDG.E.128",
        "LDG.E.128.CONSTANT",
        "MUFU.EX2",
        "BRA",
    ]
    assert [module.load_bytes(one) for one in found if one.opcode.startswith("LDG")] == [8, 16, 16, 2]
    without_loops = [one for one in found if one.opcode != "BRA"]
    assert len(module.main_part(without_loops, labels)) == len(without_loops)
    monkeypatch.setattr(
        module, "_run", lambda *_command: " Common:\n  GLOBAL:0\n Function k:\n  REG:39 STACK:0 SHARED:8 LOCAL:4"
    )
    assert module.resources(Path("a.cubin")) == {"REG": 39, "STACK": 0, "SHARED": 8, "LOCAL": 4}
    assert [module.resident_warps(registers) for registers in (32, 64, 255)] == [64, 32, 8]


def test_launches_are_noted_and_not_made(scripts: Callable[[str], ModuleType]) -> None:
    noted: list[Any] = []
    kernels = SimpleNamespace(sum_kernel="the kernel", helper="not one")
    with scripts("kernel_report").recorded(kernels, lambda *launch: noted.append(launch)):
        kernels.sum_kernel[(1, 2)]("x", BLOCK=4)
        assert kernels.helper == "not one"
    assert noted == [("the kernel", ("x",), {"BLOCK": 4})] and kernels.sum_kernel == "the kernel"


@pytest.mark.slow
def test_a_kernel_is_compiled_without_a_card() -> None:
    pytest.importorskip("triton", reason="needs Triton, no GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    found = json.loads(run("kernel_report.py", "--toy", "--sm", "90", "--json"))
    aligned, any_size = found["tables"][0]["rows"]
    assert "LDG.E.128" in aligned["loads"] and "LDG.E.U16" in any_size["loads"]
    assert 0 < aligned["instructions"] < any_size["instructions"] and aligned["spills"] == 0
    assert aligned["special"] == 2.0 and aligned["bytes_ps"] == pytest.approx(2 / 2.96)


@pytest.mark.slow
def test_the_kernels_of_the_loss_load_16_bytes_and_spill_nothing() -> None:
    pytest.importorskip("triton", reason="needs Triton, no GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    rows = json.loads(run("kernel_report.py", "--sm", "90", "--json"))["tables"][0]["rows"]
    assert [row["name"].split()[0] for row in rows] == ["statistics", "gradient"]
    assert all("LDG.E.128" in row["loads"] and row["spills"] == 0 and "bound" in row for row in rows)
