"""``dts-hf evaluate``: killed and resumed, on several processes, refused where it is another evaluation."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dts_hf.data.sources import load_rows
from dts_hf.errors import UserError
from dts_hf.evaluation.evaluate import evaluate
from dts_hf.evaluation.fingerprint import model_digest, rows_digest
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.files import file_sha256
from dts_hf.generation.answer_file import Answer, AnswerFile
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import RunDirectory
from tests.support.launching import WORKERS
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.warm import run_warm

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


def evaluated(model: str, sets: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    return evaluate(model, EvaluationOptions(sets, **options))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def work(place: Path, *arguments: str, world: int = 1, **variables: str) -> str:
    done = run_warm(WORKERS / "evaluate_worker.py", world, arguments, env=variables, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_five_kills_leave_no_trace_in_what_comes_out(place: Path, dtype: str) -> None:
    out = work(place, "kill", "5", str(ROWS), DTS_HF_TEST_DTYPE=dtype)
    killed, whole = files(place / "killed"), files(place / "whole")
    assert set(whole) == {"evaluation.json", "metrics.json", "predictions/rows.jsonl"}
    assert killed == whole
    left = [int(line.split()[1]) for line in out.splitlines() if line.startswith("left:")]
    assert len(left) == 5 and 0 < left[0] < left[3], "each round began where the one before had been killed"
    rows = [json.loads(line) for line in whole["predictions/rows.jsonl"].splitlines()]
    assert [(row["seed"], row["id"]) for row in rows] == [(s, f"rows-{i}") for s in (10, 20) for i in range(ROWS)]


def test_answers_that_are_there_are_not_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluated("model", ["rows.jsonl"], output="out", **FAST)
    before = files(place / "out")
    monkeypatch.setattr("dts_hf.evaluation.evaluate.generate", None)
    assert evaluated("model", ["rows.jsonl"], output="out", **FAST) == first
    assert files(place / "out") == before


def test_a_set_more_is_added_and_metrics_are_what_a_run_of_both_gives(place: Path) -> None:
    write_rows(place / "other.jsonl", 3, output=["a pear", "an apple"])
    evaluated("model", ["rows.jsonl"], output="out", **FAST)
    both = evaluated("model", ["rows.jsonl", "other.jsonl"], output="out", **FAST)
    assert list(both["models"]["model"]["sets"]) == ["rows", "other"]
    assert both == evaluated("model", ["rows.jsonl", "other.jsonl"], **FAST)
    assert json.loads((place / "out" / "metrics.json").read_text()) == both
    scores = both["models"]["model"]["sets"]["other"]
    assert scores["n"] == 3 and scores["rougeL"]["sd"] is not None and scores["seeds"] == [10, 20]
    assert both["protocol"]["name"] == "minillm, max_new_tokens=6, seeds=10,20"


def test_a_later_set_alone_joins_those_that_are_there(place: Path) -> None:
    write_rows(place / "other.jsonl", 3)
    both = evaluated("model", ["rows.jsonl", "other.jsonl"], **FAST)
    evaluated("model", ["rows.jsonl"], output="out", **FAST)
    assert evaluated("model", ["other.jsonl"], output="out", **FAST) == both
    assert json.loads((place / "out" / "metrics.json").read_text()) == both
    alone = evaluated("model", ["other.jsonl"], output="out", overwrite=True, **FAST)
    assert list(alone["models"]["model"]["sets"]) == ["other"]
    assert set(files(place / "out")) == {"evaluation.json", "metrics.json", "predictions/other.jsonl"}


def test_a_folder_is_refused_before_the_model_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated("model", ["rows.jsonl"], output="out", **FAST)
    monkeypatch.setattr("dts_hf.evaluation.evaluate.load_model", None)
    with pytest.raises(UserError, match="max_new_tokens 6, now 7"):
        evaluated("model", ["rows.jsonl"], output="out", **{**FAST, "max_new_tokens": 7})
    with pytest.raises(UserError, match="holds no evaluation"):
        evaluated("model", ["rows.jsonl"], output="model", **FAST)
    with pytest.raises(UserError, match="is a file"):
        evaluated("model", ["rows.jsonl"], output="rows.jsonl", **FAST)


@pytest.mark.parametrize("moment", ["write_json_atomic", "AnswerFile"])
def test_killed_while_the_folder_is_made_or_emptied(place: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"dts_hf.evaluation.output_folder.{moment}", killed)
            evaluated("model", ["rows.jsonl"], output="out", overwrite=True, **FAST)
        evaluated("model", ["rows.jsonl"], output="out", **FAST)  # not refused: nothing of another kind is there
    assert set(files(place / "out")) == {"evaluation.json", "metrics.json", "predictions/rows.jsonl"}


def test_a_pattern_is_no_name_of_a_set(place: Path) -> None:
    (place / "many").mkdir()
    write_rows(place / "many" / "one.jsonl", 2)
    write_rows(place / "many" / "two.jsonl", 2)
    found = evaluated("model", data="many/*.jsonl", output="out", **FAST)
    assert found["models"]["model"]["sets"]["many"]["n"] == 4
    assert (place / "out" / "predictions" / "many.jsonl").is_file()
    assert list(evaluated("model", data="*.jsonl", **FAST)["models"]["model"]["sets"]) == ["data"]


def test_what_a_run_is_answered_with(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, protocol and weights follow the run's recipe, and prepared sets the published protocol."""
    folder = prepared_set(place / "data" / "vicuna", 2)
    values = {
        "student": {"model": "model", "dtype": "bfloat16"},
        "teacher": {"model": "model"},
        "data": {"train": "rows.jsonl", "validation": "rows.jsonl", "max_validation_rows": 3, "responses": "teacher"},
        "evaluation": {"max_new_tokens": 2},
        "output": {"dir": "run"},
    }
    run = RunDirectory.create("run")
    run.save_recipe(Recipe.from_dict(values))
    tiny_llama(tie=False).to(torch.bfloat16).save_pretrained(run.final_path)
    tiny_tokenizer().save_pretrained(run.final_path)
    own = evaluated("run", batch_size=2)
    assert own["models"]["student"]["sets"]["validation"]["n"] == 3
    assert evaluated("run", rows=2)["models"]["student"]["sets"]["validation"]["n"] == 2
    assert (own["protocol"]["max_new_tokens"], own["protocol"]["do_sample"]) == (2, False)
    assert (own["protocol"]["dtype"], own["protocol"]["batch_size"]) == ("bfloat16", 2)
    assert own["models"]["student"]["sets"]["validation"]["seeds"] == own["protocol"]["seeds"] == []
    said = capsys.readouterr().err
    assert "validation under the protocol custom, weights in bfloat16" in said and "teacher's answers" in said
    benchmark = evaluated("run", ["Vicuna"], data_dir=folder.parent, max_new_tokens=2, dtype="float32")
    assert (
        benchmark["protocol"]["name"] == "minillm, template=chat, max_new_tokens=2"
        and benchmark["protocol"]["batch_size"] is None
    )
    said = capsys.readouterr().err
    assert "this student was scored with custom" in said and "do_sample True instead of False" in said
    assert (
        "vicuna under the protocol minillm, template=chat, max_new_tokens=2" in said
        and "teacher's answers" not in said
    )


def test_a_run_is_answered_on_the_rows_it_was_scored_on(place: Path) -> None:
    """Texts ask nothing, and ``evaluation.rows`` of the others are answered; ``--rows`` says another number."""
    asked = [{"id": f"q{i}", "instruction": f"Name {i}", "output": "a pear"} for i in range(6)]
    texts = [{"id": f"t{i}", "text": "Once upon a time."} for i in range(2)]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (texts[0], *asked, texts[1])))
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for held_out in ("mixed", "texts"):
        run = RunDirectory.create(held_out)
        data = {"train": "rows.jsonl", "validation": f"{held_out}.jsonl"}
        evaluation = {"max_new_tokens": 1, "rows": 4}
        values = {"student": {"model": "model"}, "teacher": {"model": "model"}, "data": data, "evaluation": evaluation}
        run.save_recipe(Recipe.from_dict({**values, "output": {"dir": held_out}}))
        shutil.copytree("model", run.final_path)
    scores = evaluated("mixed")["models"]["student"]["sets"]["validation"]
    assert (scores["n"], scores["rows_sha256"]) == (4, rows_digest(load_rows("mixed.jsonl")[1:5]))
    assert evaluated("mixed", rows=6)["models"]["student"]["sets"]["validation"]["n"] == 6
    with pytest.raises(UserError, match="its held-out rows are texts, which ask nothing"):
        evaluated("texts")


def prepared_set(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    write_rows(folder / "test.jsonl", count)
    entry = {"file": "test.jsonl", "rows": count, "sha256": file_sha256(folder / "test.jsonl")}
    (folder / "manifest.json").write_text(json.dumps({"files": {"test": entry}}))
    return folder


def test_another_evaluation_is_refused_by_what_differs_or_replaced_when_asked(place: Path) -> None:
    evaluated("model", ["rows.jsonl"], output="out", **FAST)
    before = files(place / "out")

    def refused(words: str, *, model: str = "model", **changes: object) -> None:
        with pytest.raises(UserError, match=words):
            evaluated(model, ["rows.jsonl"], output="out", **{**FAST, **changes})
        assert files(place / "out") == before

    refused("max_new_tokens 6, now 7.*--overwrite", max_new_tokens=7)
    refused("other rows of rows", rows=5)
    refused("dtype float32, now bfloat16", dtype="bfloat16")
    tiny_llama(tie=False, seed=1).save_pretrained("trained")
    tiny_tokenizer().save_pretrained("trained")
    refused("another model", model="trained")
    evaluated("trained", ["rows.jsonl"], output="out", overwrite=True, **FAST)
    assert files(place / "out") != before
    evaluated("trained", ["rows.jsonl"], output="out", **{**FAST, "batch_size": 3})  # fp32: the same text


def test_the_digest_of_a_model_follows_its_weights() -> None:
    base = model_digest(tiny_llama(seed=0))
    assert base == model_digest(tiny_llama(seed=0)) != model_digest(tiny_llama(seed=1))
    moved = tiny_llama(seed=0)
    for parameter in moved.parameters():
        parameter.data *= 1.0001
    assert model_digest(moved) != base
    scaled, ended = tiny_llama(seed=0), tiny_llama(seed=0)
    scaled.config.rope_parameters["rope_theta"] *= 2
    ended.generation_config.eos_token_id = [2, 3]
    assert len({base, model_digest(scaled), model_digest(ended)}) == 3


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


def test_a_set_whose_name_is_a_pattern_has_its_own_answers(tmp_path: Path) -> None:
    for name in ("s[12].jsonl", "s1.jsonl", "*.jsonl"):
        answers = AnswerFile(tmp_path / name)
        answers.append({"seed": 1, "id": name})
        answers.close()
        assert list(answers.load()) == [Answer(1, name)]


# -------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_one_process_and_two_give_the_same_answers(place: Path) -> None:
    work(place, "share", str(place), world=2)
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
    assert first["refused"] == second["refused"] and "holds no evaluation" in first["refused"], "none waits for ever"
    evaluated(
        "model", ["rows.jsonl"], output="alone", protocol="minillm", max_new_tokens=8, seeds=[10, 20], batch_size=4
    )
    assert files(place / "together") == files(place / "alone")


# ---------------------------------------------------------------------------------------------------------------- vllm


def test_vllm_is_asked_in_its_own_words(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: what it is given, and what becomes of its answers."""
    with pytest.raises(UserError, match="vLLM is not installed"):
        evaluated("model", ["rows.jsonl"], protocol="no_ngram", backend="vllm")
    asked = []

    class LLM:
        def __init__(self, **options: object) -> None:
            asked.append(options)

        def generate(self, prompts, parameters, use_tqdm):
            asked.append(parameters)
            # An end token that only the engine knows (105) ends an answer too
            ended = [([100 + i % 3, 101, [2, 105][i % 4 // 2]][: 3 - i % 2], i % 2 == 0) for i in range(len(prompts))]
            outputs = [types.SimpleNamespace(token_ids=t, finish_reason="stop" if e else "length") for t, e in ended]
            return [types.SimpleNamespace(outputs=[output]) for output in outputs]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    options = {"seeds": [10], "max_new_tokens": 5, "backend": "vllm"}
    with pytest.raises(UserError, match=r"n-gram rule.*no_ngram"):
        evaluated("model", ["rows.jsonl"], protocol="minillm", output="out", **options)
    assert asked == [] and not (place / "out").exists()
    found = evaluated("model", ["rows.jsonl"], protocol="no_ngram", **options)
    assert found["protocol"]["backend"] == "vllm" and "backend=vllm" in found["protocol"]["name"]
    scores = found["models"]["model"]["sets"]["rows"]
    assert scores["n"] == ROWS and scores["cut_at_limit"]["mean"] == 0.5 and scores["mean_tokens"]["mean"] == 2.0
    parameters = asked[-1]
    assert {p["max_tokens"] for p in parameters} == {5} and {p["top_k"] for p in parameters} == {0}
    assert len({p["seed"] for p in parameters}) == ROWS
    ours = evaluated("model", ["rows.jsonl"], protocol="no_ngram", **{**options, "backend": "dts_hf"})
    assert ours["protocol"]["fingerprint"] != found["protocol"]["fingerprint"]
    evaluated("model", ["rows.jsonl"], protocol="no_ngram", output="out", **options)
    tiny_llama(tie=False, seed=1).save_pretrained("model")
    with pytest.raises(UserError, match="another model"):
        evaluated("model", ["rows.jsonl"], protocol="no_ngram", output="out", **options)
