"""The benchmark of compact caches, on a tiny model: with every token kept nothing is lost, and less with more of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.benchmarks import run
from tests.support.tiny import TINY_VOCAB, tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS


def test_more_tokens_lose_less_and_all_of_them_nothing(tmp_path: Path) -> None:
    teacher, data = tmp_path / "teacher", tmp_path / "rows.jsonl"
    tiny_llama(seed=1).save_pretrained(teacher)
    tiny_tokenizer().save_pretrained(teacher)
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--teacher", str(teacher), "--data", str(data), "--labels", "60", "--threads", "1", "--json"]
    found = json.loads(
        run("compact_cache.py", *words, "--top-k", "8", "64", str(TINY_VOCAB), "--temperatures", "1", "2")
    )
    errors, needed = (table["rows"] for table in found["tables"])
    by_k = [[row[key] for row in errors if row["temperature"] == "2"] for key in ("mass", "kl", "variation")]
    assert by_k[0] == sorted(by_k[0]) and by_k[1] == sorted(by_k[1], reverse=True)
    assert by_k[0][-1] == pytest.approx(1.0, abs=1e-5) and by_k[2][-1] < 1e-3
    assert by_k[2][0] < next(row["renormalised"] for row in errors if row["temperature"] == "2")
    assert needed[0]["top_k"] <= needed[1]["top_k"] <= TINY_VOCAB
