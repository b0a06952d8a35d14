"""The benchmark of generation runs and compares like with like. No time is asserted: this machine may be busy."""

from __future__ import annotations

from tests.support.benchmarks import report


def test_generation_compares_tokens_per_second() -> None:
    found = report("generation.py", "--threads", "1", "--device", "cpu")
    rows = {row["name"]: row for row in found["tables"][0]["rows"]}
    assert set(rows) == {"model.generate", "dts_hf"} and found["setting"]["prompts"] == 12
    assert all(row["rate"] > 0 and row["tokens"] > 12 for row in rows.values())
    assert rows["dts_hf"]["x_generate"] == rows["dts_hf"]["rate"] / rows["model.generate"]["rate"]
    assert found["notes"][0].endswith("4 of 4 rows; 0 differ at a near-tie, 0 without one.")  # a CPU beside itself
