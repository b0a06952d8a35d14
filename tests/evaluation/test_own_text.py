"""KL between teacher and student on the student's own answers: through ``distill``, beside dense float64 by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dts_hf.data.chat_templates import end_of_turn_ids, get_template
from dts_hf.data.encoding import encode_rows
from dts_hf.data.sources import load_rows, rows_from_dataset
from dts_hf.distill import distill
from dts_hf.errors import UserError
from dts_hf.evaluation.own_text import OwnTextScorer
from dts_hf.generation.engine import GenerationSettings, generate, stop_token_ids
from dts_hf.recipe.schema import OwnText
from tests.support.recipes import recipe
from tests.support.trainers import ROWS, encoded, trainer_for

ASKED = {"rows": 4, "max_new_tokens": 6, "seed": 3}
QUIET: dict[str, Any] = {"output": {"dir": "run", "report": False}}


def by_hand(student: Any, teacher: Any, tokenizer: Any, prompts: list[list[int]], keys: list[str]) -> dict[str, float]:
    """Each answer alone, without padding, in float64: KL both ways and entropies of the tokens said and the end."""
    stops = stop_token_ids(student, tokenizer, end_of_turn_ids(tokenizer, get_template("chat")))
    settings = GenerationSettings(
        max_new_tokens=ASKED["max_new_tokens"], batch_size=1, do_sample=True, seed=ASKED["seed"]
    )
    forward = reverse = entropy = of_teacher = count = cut = 0.0
    for prompt, key in zip(prompts, keys, strict=True):
        (one,) = generate(student, [prompt], settings, eos_token_ids=stops, pad_token_id=0, row_keys=[key])
        said = [*one.tokens, *([one.end] if one.finished else [])]
        ids = torch.tensor([[*prompt, *said]])
        with torch.no_grad():
            p, q = (
                model.double()(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for model in (teacher, student)
            )
        student.float()
        forward += float((p.exp() * (p - q)).sum())
        reverse += float((q.exp() * (q - p)).sum())
        entropy -= float((q.exp() * q).sum())
        of_teacher -= float((p.exp() * p).sum())
        count, cut = count + len(said), cut + (not one.finished)
    means = {"kl": forward, "reverse_kl": reverse, "entropy": entropy, "teacher_entropy": of_teacher}
    rows = len(prompts)
    return {
        **{name: value / count for name, value in means.items()}, "n_tokens": count, "n": rows, "mean_tokens": count / rows,
        "cut_at_limit": cut / rows,
    }  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_measures_what_a_hand_does(workplace: Any, packing: bool, capsys: pytest.CaptureFixture[str]) -> None:
    training = {"per_device_eval_batch_size": 3}
    run = distill(
        recipe(
            **QUIET,
            data={"packing": packing},
            training=training,
            evaluation={"own_text": ASKED, "models": ["student"]},
        )
    )
    entry = dict(run.read_metrics()["models"]["student"]["own_text"])
    assert len(entry.pop("fingerprint")) == 16
    student, teacher = (AutoModelForCausalLM.from_pretrained(one) for one in (run.final_path, "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(run.final_path)
    limits = {"max_length": 96, "max_prompt_length": 64}
    rows, _ = encode_rows(
        load_rows("valid.jsonl"), AutoTokenizer.from_pretrained("teacher"), get_template("chat"), **limits
    )
    prompts = [rows[place]["input_ids"][: rows.spans(place)[-1][0]] for place in range(4)]
    assert entry == pytest.approx(by_hand(student, teacher, tokenizer, prompts, rows.row_ids[:4]), rel=1e-4)
    assert entry["kl"] > 1e-3 and "student on its own text" in capsys.readouterr().err


def test_it_is_off_and_training_does_not_feel_it(workplace: Any) -> None:
    without = distill(recipe(output={"dir": "without", "report": False}))
    assert all("own_text" not in entry for entry in without.read_metrics()["models"].values())
    asked = distill(recipe(output={"dir": "with", "report": False}, evaluation={"own_text": ASKED}))
    found = asked.read_metrics()["models"]
    assert {name for name, entry in found.items() if "own_text" in entry} == {"student_before", "student"}
    assert found["student"]["own_text"]["kl"] != found["student_before"]["own_text"]["kl"]
    weights = [AutoModelForCausalLM.from_pretrained(run.final_path).state_dict() for run in (without, asked)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert asked.read_metrics()["protocol"] == without.read_metrics()["protocol"]  # its numbers are not covered by it


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data": {"validation": None}, "evaluation": {"own_text": ASKED, "every_steps": None}},
            "data.validation is null",
        ),
        ({"teacher": None, "student": {"model": "teacher"}, "loss": {"kd_ratio": 0}}, "there is no teacher"),
        ({"teacher": {"kind": "cached", "cache": "c", "model": "teacher"}}, "expected teacher.missing: live"),
        ({"teacher": {"model": "teacher", "alignment": "overlap"}, "student": {"model": "m"}}, "another tokenizer"),
        ({"evaluation": {"own_text": {"temperature": 0}}}, "evaluation.own_text.temperature: got 0"),
        ({"evaluation": {"own_text": {"row": 3}}}, "Did you mean 'rows'"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"evaluation\.own_text") as refused:
        recipe(**{"evaluation": {"own_text": ASKED}, **changes})
    assert words in str(refused.value)


def test_prompts_that_are_too_long_or_missing_are_found_before_training(tmp_path: Any) -> None:
    trainer = trainer_for(tmp_path)
    limit = trainer.length_limits()[0][0]
    with pytest.raises(UserError, match=rf"more than the {limit:,} positions of the student"):
        OwnTextScorer(OwnText(max_new_tokens=limit), trainer, encoded(ROWS[:3]), 4)
    texts, _ = encode_rows(
        rows_from_dataset([{"text": "one two three"}, {"text": "four five"}]),
        trainer.processing_class,
        get_template("chat"),
        max_length=64,
        max_prompt_length=32,
    )
    with pytest.raises(UserError, match="none of the held-out rows asks anything"):
        OwnTextScorer(OwnText(), trainer, texts, 4)
