"""The benchmarks run and compare like with like, and no step makes the logits of a batch.

No time is asserted: this machine may be busy.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from tests.support.benchmarks import HAS_TRL, ROOT, TRL_VARIANTS, assert_same_kl, report, rows_of, run
from tests.support.tiny import TINY_VOCAB, tiny_llama, tiny_tokenizer


@pytest.mark.slow
def test_loss_head_compares_the_same_divergence() -> None:
    found = report("loss_head.py")
    rows = rows_of(found)
    assert set(rows) == {"floor", "dts_hf", "dense"} | TRL_VARIANTS
    assert bool(found["notes"]) == (not HAS_TRL or sys.platform != "linux")
    assert "kl" not in rows["floor"] and rows["floor"]["x_floor"] == 1.0
    assert_same_kl(rows, rel=1e-4)


@pytest.mark.slow
def test_train_step_compares_the_same_divergence() -> None:
    found = report("train_step.py", forked=True)
    rows = rows_of(found)
    ours = {"padded", "packed", "cached_padded", "cached_packed"}
    assert set(rows) == {"floor", "sft", "dense"} | TRL_VARIANTS | ours
    assert_same_kl(rows, rel=1e-4)
    floor = rows["floor"]
    parts = [floor[f"{part}_seconds"] for part in ("student", "teacher", "head")]
    assert 0 < sum(parts) <= floor["seconds"]
    assert rows["cached_packed"]["x_floor"] == pytest.approx(rows["cached_packed"]["seconds"] / (parts[0] + parts[2]))
    assert rows["sft"]["x_sft"] == 1.0 and rows["sft"]["x_floor"] is None


@pytest.mark.slow
def test_train_step_in_bf16() -> None:
    variants = ("sft", "dense", "padded", "cached_packed")
    rows = rows_of(report("train_step.py", "--dtype", "bfloat16", "--variants", *variants, forked=True))
    assert set(rows) == {"sft", "dense", "padded", "cached_packed"}
    assert_same_kl(rows, rel=0.02)


def test_train_step_has_the_published_size(scripts: Callable[[str], ModuleType]) -> None:
    sizes = scripts("train_step").Sizes()
    assert (sizes.tokens, sizes.labelled, len(sizes.lengths)) == (1252, 628, 8)
    assert max(total for total, _ in sizes.lengths) == 256
    assert all(0 < response < total for total, response in sizes.lengths)
    # a layer of SmolLM-135M: 2 x 576 x 576 + 2 x 576 x 192 + 3 x 576 x 1536, norms and embeddings aside
    assert sizes.layer_weights == 3_538_944
    work = sizes.gflop()
    assert work["teacher"] == pytest.approx(2 * 30 * 3_538_944 * 1252 / 1e9)
    assert work["student"] == pytest.approx(work["teacher"])  # a third of the layers, three times the work
    assert work["head"] == pytest.approx(8 * 576 * 49152 * 628 / 1e9)


@pytest.mark.slow
def test_catalogue_has_every_divergence_and_policy() -> None:
    from dts_hf.divergences import DIVERGENCES
    from dts_hf.temperature import temperature_policies

    found = report("catalogue.py", forked=True)
    divergences, policies = rows_of(found, 0), rows_of(found, 1)
    assert set(divergences) == set(DIVERGENCES)
    assert {name.split(" (")[0] for name in policies} == set(temperature_policies()) - {"replay"}  # it needs a run
    assert {"dts (granularity: token)", "dts (granularity: sequence)", "dts (decoupled: True)"} <= set(policies)
    assert divergences["forward_kl"]["x_base"] == policies["constant"]["x_base"] == 1.0
    assert_same_kl({**divergences, **policies}, rel=1e-5)


@pytest.mark.slow
def test_results_are_kept_and_written_into_a_page(tmp_path: Path, scripts: Callable[[str], ModuleType]) -> None:
    printed = run("run.py", "--quick", "--only", "sweep", "--results", str(tmp_path))
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [table["title"].split(",")[0] for table in found["tables"]] == [
        "Vocabulary",
        "Labelled rows",
        "Sequence length",
    ]
    for number, axis in enumerate(("vocab", "rows", "time")):
        first, last = list(rows_of(found, number).values())
        assert last["size_x_first"] == last[axis] / first[axis] > 1
        if sys.platform == "linux":
            assert last["peak_gb"] == pytest.approx(last["gradients_gb"] + last["beyond_gb"])
            assert first["peak_gb"] == 0 or last["peak_x_first"] == pytest.approx(last["peak_gb"] / first["peak_gb"])
    assert "**Labelled rows**" in printed
    assert printed.split("## sweep")[1].split("**Vocabulary**")[1][:40] in (tmp_path / "summary.md").read_text()
    page = tmp_path / "page.md"
    page.write_text("# Page\n<!-- bench:sweep -->\nold\n<!-- /bench:sweep -->\n<!-- bench:catalogue -->\nkeep\n")
    for _ in range(2):  # a second time changes nothing
        scripts("run").main(["--results", str(tmp_path), "--write", str(page)])
    text = page.read_text()
    assert "old" not in text and text.count("**Vocabulary**") == 1
    assert text.endswith("<!-- /bench:sweep -->\n<!-- bench:catalogue -->\nkeep\n")


def test_the_page_has_a_place_for_every_result(scripts: Callable[[str], ModuleType]) -> None:
    module = scripts("run")
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    places = re.findall(r"<!-- bench:(\w+) -->\n.*?<!-- /bench:(\w+) -->", page, re.DOTALL)
    assert all(first == last for first, last in places)
    assert sorted(first for first, _ in places) == sorted([*module.CPU, *module.CUDA, "bars", "cuda_bars"])


def test_bars_are_read_from_the_rows_they_name(scripts: Callable[[str], ModuleType]) -> None:
    rows = [{"name": "packed", "x_trl_gkd": 0.5, "x_sft": 1.2, "memory_x_trl_gkd": None}]
    costs = [{"name": "forward_kl", "x_base": 1.0}, {"name": "jsd", "x_base": 1.3}, {"name": "tvd", "x_base": 1.5}]
    sizes = [{"name": str(n), "size_x_first": n, "peak_x_first": (n + 3) / 4} for n in (1.0, 8.0)]
    reports = {
        "train_step_fp32": {"tables": [{"rows": rows}]},
        "catalogue": {"tables": [{"rows": costs}]},
        "sweep": {"tables": [{"rows": sizes}, {"rows": sizes}]},
    }
    bars = scripts("bars")
    assert bars.table(bars.cpu_figures(reports)).splitlines()[2:] == [
        "| step fp32, packed / TRL GKD | 0.50 | ≤ 0.55 | yes |",
        "| step fp32, packed / HF's SFT | 1.20 | ≤ 0.95 | **no** |",
        "| dearest divergence (tvd) / forward_kl | 1.50 | ≤ 1.40 | **no** |",
        "| loss, growth of peak memory / growth of V | 0.34 | ≤ 1.10 | yes |",
        "| loss, growth of peak memory when N grows 8 x | 2.75 | ≤ 1.10 | **no** |",
    ]


@pytest.mark.parametrize(
    ("machine", "limit"), [("2 cores of Intel, avx512f, amx_bf16", 1.6), ("2 cores of AMD", 1.35)]
)
def test_the_bar_of_the_loss_head_depends_on_the_processor(
    scripts: Callable[[str], ModuleType], machine: str, limit: float
) -> None:
    report = {"tables": [{"rows": [{"name": "dts_hf", "x_floor": 1.5}]}], "environment": {"machine": machine}}
    (figure,) = scripts("bars").cpu_figures({"loss_head": report})
    assert (figure.value, figure.limit, figure.met) == (1.5, limit, limit == 1.6)


def test_the_bars_of_a_card_take_the_better_of_ours(scripts: Callable[[str], ModuleType]) -> None:
    bars = scripts("bars")
    head = [
        {"name": "ours_1024", "x_floor": 1.2, "dw_error": 5e-4},
        {"name": "trl_chunked", "x_floor": 2.3},
        {"name": "liger_chunked", "failed": "out of memory"},
    ]
    steps = [
        {"name": "packed", "x_padded": 0.9, "x_sft": 1.4},
        {"name": "packed_compiled", "x_padded": 0.7, "x_sft": 1.2},
    ]
    figures = bars.cuda_figures(
        {
            "cuda_loss_sizes": {"tables": [{"title": "H 2,048, V 49,152", "rows": head}]},
            "cuda_step_135m": {"tables": [{"rows": steps}]},
            "cuda_generation": {"tables": [{"rows": [{"name": "dts_hf", "x_generate": 3.0}]}]},
        }
    )
    assert bars.table(figures).splitlines()[2:] == [
        "| GPU, loss head, H 2,048, V 49,152, 1 GiB / the four matmuls | 1.20 | ≤ 1.25 | yes |",
        "| GPU, loss head, H 2,048, V 49,152, 1 GiB / trl_chunked | 0.52 | ≤ 1.00 | yes |",
        "| GPU, loss head, H 2,048, V 49,152, error of dW | 5.0e-04 | ≤ 6.0e-04 | yes |",
        "| step 135m, packed_compiled / padded | 0.70 | ≤ 0.85 | yes |",
        "| step 135m, packed_compiled / HF's SFT | 1.20 | ≤ 1.25 | yes |",
        "| GPU, generation, tokens a second / model.generate | 3.00 | ≥ 4.00 | **no** |",
    ]


def test_a_table_has_equal_rows_and_no_invented_number(scripts: Callable[[str], ModuleType]) -> None:
    render = scripts("render")
    columns = [
        render.Column("name", "variant", None),
        render.Column("seconds", "s", 2),
        render.Column("kl", "KL", 4),
        render.Column("error", "error", -2),
    ]
    rows = [
        {"name": "a", "seconds": 1234.5, "kl": math.nan, "error": 0.00123},
        {"name": "b", "seconds": 0.01234},
        {"name": "c", "kl": 0.0},
        {"name": "d", "failed": "out of memory"},
        {"name": "e", "failed": "ValueError: no"},
    ]
    made = render.make_report("x", {"rounds": 1, "budget": 64.0}, [render.make_table("T", columns, rows)], ["n", "n"])
    text = render.markdown(json.loads(json.dumps(made)))
    assert render.failures(made) == ["e: ValueError: no"]  # what does not fit is no failure
    assert [line for line in text.splitlines() if line.startswith("|")] == [
        "| variant | s | KL | error |",
        "|---|---:|---:|---:|",
        "| a | 1,234.50 | - | 1.2e-03 |",
        "| b | 0.0123 | - | - |",
        "| c | - | 0.0000 | - |",
        "| d | out of memory | - | - |",
        "| e | ValueError: no | - | - |",
    ]
    assert "budget 64." in text and text.endswith("\n\nn")


def test_a_variant_without_its_package_is_missing(scripts: Callable[[str], ModuleType]) -> None:
    harness = scripts("harness")
    with pytest.raises(harness.Missing, match=r"no such package \(pip install trl"), harness.needs_trl():
        raise ImportError("no such package")


def test_the_norm_kd_run_is_judged_by_its_last_line(
    scripts: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scripts("norm_kd_gradient")
    monkeypatch.chdir(tmp_path)
    tiny_llama(seed=0, layers=3).save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    rows = [{"id": f"r{k}", "instruction": "Count.", "input": "", "output": "one two " * (2 + k)} for k in range(8)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = """
student: {init: {from: teacher, layers: 2}}
teacher: {model: ./teacher, dtype: float32}
data: {train: train.jsonl, prompt_template: chat}
training: {use_cpu: true, per_device_train_batch_size: 4}
output: {dir: elsewhere}
"""
    Path("recipe.yaml").write_text(recipe)
    lines = module.train("recipe.yaml", 3, tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3] and not Path("elsewhere").exists()
    shown = {column.key for column in module.COLUMNS}
    assert all(shown <= set(line) and math.isfinite(line["kl"]) for line in lines)
    good = [{"ce_loss": 6.0, "student_entropy": 4.1}, {"ce_loss": 2.0, "student_entropy": 1.9}]
    assert [note.split(":")[0] for note in module.judge(good)] == ["Met", "Met"]
    assert [note.split(":")[0] for note in module.judge(good[::-1])] == ["MISSED", "MISSED"]


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
