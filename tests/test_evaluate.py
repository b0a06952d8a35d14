"""``dts-hf evaluate``: killed and resumed, on several processes, refused where it is another evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

from dts_hf.errors import UserError
from dts_hf.evaluation.answers import Answer, AnswerFile
from dts_hf.evaluation.evaluate import evaluate_command, model_digest

HERE = Path(__file__).resolve().parent
ROWS = 20
FAST = {"protocol": "minillm", "max_new_tokens": 6, "seeds": [10, 20], "batch_size": 4}


@pytest.fixture()
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama(tie=False).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def write_rows(path: Path, count: int, output: object = "a pear") -> None:
    rows = [
        {"id": f"{path.stem}-{i}", "instruction": f"Name {i}" + " more" * (i % 4), "output": output}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def work(place: Path, *arguments: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_five_kills_leave_no_trace_in_what_comes_out(place: Path, dtype: str) -> None:
    out = work(place, str(HERE / "evaluate_worker.py"), "kill", "5", str(ROWS), DTS_HF_TEST_DTYPE=dtype)
    killed, whole = files(place / "killed"), files(place / "whole")
    assert set(whole) == {"evaluation.json", "metrics.json", "predictions/rows.jsonl"}
    assert killed == whole
    left = [int(line.split()[1]) for line in out.splitlines() if line.startswith("left:")]
    assert len(left) == 5 and 0 < left[0] < left[3], "each round began where the one before had been killed"
    rows = [json.loads(line) for line in whole["predictions/rows.jsonl"].splitlines()]
    assert [(row["seed"], row["id"]) for row in rows] == [(s, f"rows-{i}") for s in (10, 20) for i in range(ROWS)]


def test_answers_that_are_there_are_not_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate_command("model", ["rows.jsonl"], output="out", **FAST)
    before = files(place / "out")
    monkeypatch.setattr("dts_hf.evaluation.evaluate.generate", None)
    assert evaluate_command("model", ["rows.jsonl"], output="out", **FAST) == first
    assert files(place / "out") == before


def test_a_set_more_is_added_and_metrics_are_what_a_run_of_both_gives(place: Path) -> None:
    write_rows(place / "other.jsonl", 3, output=["a pear", "an apple"])
    evaluate_command("model", ["rows.jsonl"], output="out", **FAST)
    both = evaluate_command("model", ["rows.jsonl", "other.jsonl"], output="out", **FAST)
    assert list(both["models"]["model"]["sets"]) == ["rows", "other"]
    assert both == evaluate_command("model", ["rows.jsonl", "other.jsonl"], **FAST)
    assert json.loads((place / "out" / "metrics.json").read_text()) == both
    scores = both["models"]["model"]["sets"]["other"]
    assert scores["n"] == 3 and scores["rougeL"]["sd"] is not None and scores["seeds"] == [10, 20]
    assert both["protocol"]["name"] == "minillm, max_new_tokens=6, seeds=10,20"


def test_another_evaluation_is_refused_by_what_differs_or_replaced_when_asked(place: Path) -> None:
    evaluate_command("model", ["rows.jsonl"], output="out", **FAST)
    before = files(place / "out")

    def refused(words: str, *, model: str = "model", **changes: object) -> None:
        with pytest.raises(UserError, match=words):
            evaluate_command(model, ["rows.jsonl"], output="out", **{**FAST, **changes})
        assert files(place / "out") == before

    refused("max_new_tokens 6, now 7.*--overwrite", max_new_tokens=7)
    refused("other rows of rows", rows=5)
    refused("dtype float32, now bfloat16", dtype="bfloat16")
    tiny_llama(tie=False, seed=1).save_pretrained("trained")
    tiny_tokenizer().save_pretrained("trained")
    refused("another model", model="trained")
    evaluate_command("trained", ["rows.jsonl"], output="out", overwrite=True, **FAST)
    assert files(place / "out") != before
    evaluate_command("trained", ["rows.jsonl"], output="out", **{**FAST, "batch_size": 3})  # fp32: the same text


def test_the_digest_of_a_model_follows_its_weights() -> None:
    base = model_digest(tiny_llama(seed=0))
    assert base == model_digest(tiny_llama(seed=0)) != model_digest(tiny_llama(seed=1))
    moved = tiny_llama(seed=0)
    for parameter in moved.parameters():
        parameter.data *= 1.0001
    assert model_digest(moved) != base


def test_half_a_line_is_dropped_and_a_broken_one_named(tmp_path: Path) -> None:
    answers = AnswerFile(tmp_path / "s.jsonl")
    answers.append({"seed": 1, "id": "a", "prediction": "é"})
    answers.close()
    partial = tmp_path / "s.jsonl.partial-0"
    partial.write_bytes(partial.read_bytes() + '{"seed": 1, "id": "b", "prediction": "é'.encode()[:-1])
    again = AnswerFile(tmp_path / "s.jsonl")
    assert list(again.load()) == [Answer(1, "a")]
    again.append({"seed": 1, "id": "c"})
    assert list(again.load()) == [Answer(1, "a"), Answer(1, "c")]
    partial.write_bytes(b"{}\n" + partial.read_bytes())
    with pytest.raises(UserError, match=r"partial-0, line 1.*Remove the file"):
        again.load()
    again.close()
    again.finish([{"seed": 1, "id": "z"}])
    assert set(files(tmp_path)) == {"s.jsonl"} and list(again.load()) == [Answer(1, "z")]


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_one_process_and_two_give_the_same_answers(place: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    work(place, *launch, str(HERE / "evaluate_worker.py"), "share", str(place))
    first, second = (json.loads((place / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    for name in ("gpt2", "llama"):
        for dtype in ("float32", "bfloat16"):
            for batch_size in (1, 7, 32):
                key = f"{name}-{dtype}-{batch_size}"
                assert first[f"{key}-two"] == first[f"{key}-one"], key
                assert second[f"{key}-two"] == first[f"{key}-one"], "every process has the result"
        reference = first[f"{name}-float32-1-one"]
        assert first[f"{name}-float32-7-one"] == first[f"{name}-float32-32-one"] == reference
        assert first[f"{name}-shuffled"] == reference[1]
        assert len({row["prediction"] for row in reference[1]}) > 20
    assert first["fsdp2-kinds"] == ["DTensor"] and first["fsdp2-graded"]
    assert first["fsdp2"] == second["fsdp2"] == first["llama-float32-1-one"]
    evaluate_command(
        "model", ["rows.jsonl"], output="alone", protocol="minillm", max_new_tokens=8, seeds=[10, 20], batch_size=4
    )
    assert files(place / "together") == files(place / "alone")


# ---------------------------------------------------------------------------------------------------------------- vllm


def test_vllm_is_asked_in_its_own_words(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: what it is given, and what becomes of its answers."""
    with pytest.raises(UserError, match="vLLM is not installed"):
        evaluate_command("model", ["rows.jsonl"], protocol="no_ngram", backend="vllm")
    asked = []

    class LLM:
        def __init__(self, **options: object) -> None:
            asked.append(options)

        def generate(self, prompts, parameters, use_tqdm):
            asked.append(parameters)
            tokens = [[100 + i % 3, 101, 2][: 3 - i % 2] for i in range(len(prompts))]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)]) for ids in tokens]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    options = {"seeds": [10], "max_new_tokens": 5, "backend": "vllm"}
    with pytest.raises(UserError, match=r"n-gram rule.*no_ngram"):
        evaluate_command("model", ["rows.jsonl"], protocol="minillm", **options)
    found = evaluate_command("model", ["rows.jsonl"], protocol="no_ngram", **options)
    assert found["protocol"]["backend"] == "vllm" and "backend=vllm" in found["protocol"]["name"]
    scores = found["models"]["model"]["sets"]["rows"]
    assert scores["n"] == ROWS and scores["cut_at_limit"]["mean"] == 0.5 and scores["mean_tokens"]["mean"] == 2.0
    parameters = asked[-1]
    assert {p["max_tokens"] for p in parameters} == {5} and {p["top_k"] for p in parameters} == {0}
    assert len({p["seed"] for p in parameters}) == ROWS
    ours = evaluate_command("model", ["rows.jsonl"], protocol="no_ngram", **{**options, "backend": "dts_hf"})
    assert ours["protocol"]["fingerprint"] != found["protocol"]["fingerprint"]
