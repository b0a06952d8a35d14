"""One score wherever the student lies: what its folder carries, and what is said where it is asked in another way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, pipeline

from dts_hf.data.chat_templates import TEMPLATES, encode_prompt, end_of_turn_ids, resolve_template
from dts_hf.data.rows import Row
from dts_hf.data.written_template import PROBES, as_chat_template
from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.evaluation.evaluate import evaluate
from dts_hf.evaluation.instruct import evaluate_instruct
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.evaluation.protocol import custom_protocol
from dts_hf.evaluation.student_file import read_student_file
from dts_hf.evaluation.subject import find_subject, with_template
from dts_hf.models.saving import STUDENT_FILE, Carried, ready_to_generate, save_student
from tests.support.recipes import recipe
from tests.support.tiny import tiny_llama, tiny_tokenizer

DATA = "valid.jsonl"
SHORT = EvaluationOptions(data=DATA, rows=5)


def set_scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """The scores of the one set, whatever it and the model are called."""
    (model,) = metrics["models"].values()
    (scores,) = model["sets"].values()
    return scores


@pytest.mark.parametrize(
    ("template", "chat", "resolved"), [("auto", True, "chat"), ("auto", False, "alpaca"), ("alpaca", True, "alpaca")]
)
def test_run_final_copy_and_download_give_one_number(
    workplace: Path, capsys: pytest.CaptureFixture[str], template: str, chat: bool, resolved: str
) -> None:
    tiny_tokenizer(chat).save_pretrained("teacher")
    if not chat:
        Path("teacher/chat_template.jinja").unlink(missing_ok=True)
    run = distill(
        recipe(
            data={"prompt_template": template, "max_length": 400, "max_prompt_length": 300},
            evaluation={"models": ["student"]},
            output={"report": False},
        )
    )
    own = run.read_metrics()
    shutil.copytree(run.final_path, "elsewhere/my-student")
    # As a pull leaves it: recipe and scores beside the weights
    shutil.copytree(run.final_path, "pulled")
    for name in ("recipe.yaml", "metrics.json"):
        shutil.copy(run.path / name, "pulled")
    capsys.readouterr()
    found = {place: evaluate(place, SHORT) for place in ("run", "run/final", "elsewhere/my-student", "pulled")}
    assert "compared" not in capsys.readouterr().err
    scores = own["models"]["student"]["sets"]["validation"]
    protocol = {**own["protocol"], "dtype": "float32", "batch_size": None}
    assert protocol["template"] == resolved
    for place, metrics in found.items():
        assert metrics["protocol"] == protocol, place
        assert set_scores(metrics) == scores and list(metrics["models"]) == ["student"], place
    assert set_scores(evaluate("run", EvaluationOptions(rows=5))) == scores
    facts = json.loads((run.final_path / STUDENT_FILE).read_text())
    assert facts["prompt_template"] == resolved and facts["protocol"]["fingerprint"] == protocol["fingerprint"]
    assert str(workplace) not in json.dumps(facts) and "/" not in json.dumps(facts["distillation"])


def test_another_protocol_than_the_students_own_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_student(workplace / "student", max_new_tokens=4)
    assert evaluate("student", SHORT)["protocol"]["max_new_tokens"] == 4
    assert "scored with" not in capsys.readouterr().err
    evaluate("student", EvaluationOptions(data=DATA, rows=1, protocol="quick", max_new_tokens=3))
    said = capsys.readouterr().err
    assert "this student was scored with custom" in said and "max_new_tokens 3 instead of 4" in said
    assert "template alpaca instead of chat" in said


@pytest.mark.parametrize(("chat", "template"), [(True, "chat"), (False, "alpaca")])
def test_a_foreign_model_is_asked_in_its_own_chat_template(
    workplace: Path, capsys: pytest.CaptureFixture[str], chat: bool, template: str
) -> None:
    tiny_llama().save_pretrained("model")
    tiny_tokenizer(chat).save_pretrained("model")
    options = {"data": DATA, "rows": 1, "max_new_tokens": 2, "seeds": [1]}
    metrics = evaluate("model", EvaluationOptions(**options))
    assert metrics["protocol"]["template"] == template and list(metrics["models"]) == ["model"]
    assert f"No dts_hf.json says how this model was trained: its prompts are in the template {template}" in (
        capsys.readouterr().err
    )
    named = evaluate("model", EvaluationOptions(**options, protocol="minillm"))
    assert named["protocol"]["template"] == "alpaca" and "No dts_hf.json" not in capsys.readouterr().err


def make_student(folder: Path, *, chat: bool = True, **evaluation: Any) -> None:
    from dts_hf.language_modeling.task import LanguageModeling

    tokenizer = tiny_tokenizer(chat)
    made = recipe(data={"prompt_template": "auto"}, evaluation=evaluation)
    save_student(tiny_llama(), tokenizer, folder, carried=LanguageModeling(made).carried(tokenizer))


def test_finished_prompts_stay_as_they_are_for_a_student_that_learned_them_so(workplace: Path) -> None:
    make_student(workplace / "student")
    subject, tokenizer = find_subject("student"), tiny_tokenizer()
    assert subject.own_protocol is not None and subject.student is not None
    row = Row("a", "A finished prompt:", "", ("yes",), kind="prompt")
    asked = with_template(subject.own_protocol, subject, EvaluationOptions(), tokenizer)
    assert (
        asked.template.render(row, tokenizer)
        == "A finished prompt:"
        == subject.student.template.render(row, tokenizer)
    )
    named = with_template(subject.own_protocol, subject, EvaluationOptions(template="chat"), tokenizer)
    assert "<|im_start|>" in named.template.render(row, tokenizer)


def test_a_student_on_the_hub_is_asked_for_its_file(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_student(workplace / "student", max_new_tokens=7)

    def download(repository: str, name: str) -> str:
        assert (repository, name) == ("me/student", STUDENT_FILE)
        return str(workplace / "student" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    student = read_student_file("me/student")
    assert student is not None and student.protocol.max_new_tokens == 7
    monkeypatch.undo()
    assert read_student_file("me/student") is None  # no network


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "protocol": {"template": "alpcaa"}}'])
def test_a_damaged_file_is_named(workplace: Path, text: str) -> None:
    make_student(workplace / "student")
    (workplace / "student" / STUDENT_FILE).write_text(text)
    with pytest.raises(UserError, match=r"student: dts_hf\.json cannot be read .*--protocol and --template"):
        evaluate("student", SHORT)


def test_a_file_of_a_later_version_is_refused(workplace: Path) -> None:
    make_student(workplace / "student")
    file = workplace / "student" / STUDENT_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(UserError, match="has format 2, this version of dts-hf reads 1"):
        evaluate("student", SHORT)


# ----------------------------------------------------------------------------------------------- the generation config


def test_a_student_stops_at_the_end_of_turn_of_its_template(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer(pad="own")
    tokenizer.eos_token = "<|endoftext|>"  # not what the template ends a turn with
    model.config.use_cache = False
    model.generation_config.eos_token_id = 5
    turn = end_of_turn_ids(tokenizer, TEMPLATES["chat"])
    save_student(model, tokenizer, tmp_path / "student", carried=Carried(turn_ends=turn))
    saved = GenerationConfig.from_pretrained(tmp_path / "student")
    assert saved.eos_token_id == [tokenizer.eos_token_id, *turn, 5] and turn == [
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]
    assert saved.pad_token_id == tokenizer.pad_token_id and saved.use_cache is True and not saved._from_model_config
    assert json.loads((tmp_path / "student" / "config.json").read_text())["use_cache"] is True
    assert not (tmp_path / "student" / STUDENT_FILE).exists()


def test_sampling_values_without_sampling_do_not_stop_the_saving(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tiny_llama().save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 7}))
    model.generation_config = GenerationConfig.from_pretrained(tmp_path / "published")
    save_student(model, tokenizer, tmp_path / "student")
    saved = GenerationConfig.from_pretrained(tmp_path / "student")
    assert saved.eos_token_id == [tokenizer.eos_token_id, 7] and saved.use_cache is True


def test_sampling_that_is_switched_on_stays() -> None:
    model = tiny_llama()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6)
    ready_to_generate(model, tiny_tokenizer())
    assert model.generation_config.temperature == 0.6 and model.generation_config.do_sample is True


# ------------------------------------------------------------------------------------------------- the written template


@pytest.mark.parametrize("name", ["alpaca", "plain"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_text_template_is_written_as_a_chat_template_of_the_same_tokens(
    tmp_path: Path, name: str, bos: bool
) -> None:
    tokenizer, template = tiny_tokenizer(chat=False, bos=bos), TEMPLATES[name]
    written = as_chat_template(template, tokenizer)
    assert written is not None and tokenizer.chat_template is None
    save_student(tiny_llama(), tokenizer, tmp_path / "student", carried=Carried(chat_template=written))
    assert tokenizer.chat_template is None
    loaded = AutoTokenizer.from_pretrained(tmp_path / "student")
    for probe in PROBES:
        messages = [{"role": "user", "content": probe}]
        ids = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompt = encode_prompt(Row("p", probe, "", ("",)), tokenizer, template, 1000)
        assert prompt is not None and ids == prompt.ids
        answered = loaded.apply_chat_template([*messages, {"role": "assistant", "content": "yes"}], tokenize=False)
        assert answered.endswith("yes<|im_end|>")
    # For whoever trains on from here it is the text template that it was
    assert resolve_template("auto", loaded).name == name and end_of_turn_ids(
        loaded, resolve_template("auto", loaded)
    ) == [loaded.eos_token_id]
    for wrong in (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "c"}],
    ):
        with pytest.raises(Exception, match="trained on single questions"):
            loaded.apply_chat_template(wrong, tokenize=False)


def test_a_pipeline_talks_to_an_alpaca_student(workplace: Path) -> None:
    make_student(workplace / "student", chat=False)
    answer = pipeline("text-generation", model="student", device="cpu")(
        [{"role": "user", "content": "Name a fish."}], max_new_tokens=3, do_sample=False
    )
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_no_template_is_written_where_one_is_or_the_tokens_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_chat_template(TEMPLATES["alpaca"], tiny_tokenizer(chat=True)) is None
    assert as_chat_template(TEMPLATES["chat"], tiny_tokenizer(chat=False)) is None
    monkeypatch.setattr("dts_hf.data.written_template.leading_special_ids", lambda _: [0])  # a token too many
    assert as_chat_template(TEMPLATES["alpaca"], tiny_tokenizer(chat=False)) is None


# ------------------------------------------------------------------------------------------------------- kinds of rows


def test_conversations_are_asked_for_their_last_turn_and_texts_are_refused() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    turns = tuple({"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant"))[:3]
    rows = [
        Row("many", "user 1", "", ("yes",), turns, "messages"),
        Row("done", "A finished prompt:", "", ("yes",), kind="prompt"),
    ]
    protocol = custom_protocol(template="auto", max_new_tokens=2, do_sample=False, max_prompt_length=200)
    result = evaluate_instruct(model, tokenizer, rows, protocol)
    assert result.scores["n"] == 2
    assert all(f"{message['role']}\n{message['content']}" in result.predictions[0]["prompt"] for message in turns)
    assert result.predictions[1]["prompt"] == "A finished prompt:"
    with pytest.raises(UserError, match=r"row 'story' is a text, .* \(1 of 3 rows are\)"):
        evaluate_instruct(model, tokenizer, [*rows, Row("story", "", "", ("Once.",), kind="text")], protocol)


def test_validation_rows_that_are_texts_have_a_loss_and_no_answers(workplace: Path) -> None:
    texts = [f"Once upon a time there were {i} pears." for i in range(6)]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    run = distill(recipe(data={"prompt_template": "auto", "validation": "texts.jsonl"}))
    entry = run.read_metrics()["models"]["student"]
    assert entry["sets"] == {} and entry["teacher_forced"]["kl"] >= 0
    assert "held-out KL" in run.report_path.read_text()
    assert torch.isfinite(torch.tensor(entry["teacher_forced"]["ce"]))
