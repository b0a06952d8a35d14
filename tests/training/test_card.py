"""The scores on a card from Python: those of the weights that the student has, on the trainer's own held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback

from dts_hf.training.card import held_out_scores
from dts_hf.training.trainer import DistillationTrainer
from tests.support.trainers import ROWS, trainer_for

HELD_OUT = ROWS[:5]
NONE = "This student was not evaluated: it has no scores."


def published(trainer: DistillationTrainer) -> dict[str, float]:
    """KL by set, as the ``model-index`` of the card has it."""
    card = trainer.card("org/name")
    head: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    if "model-index" not in head:
        assert NONE in card
        return {}
    results = head["model-index"][0]["results"]
    found = {
        result["dataset"]["name"]: metric["value"]
        for result in results for metric in result["metrics"] if metric["type"] == "kl"
    }  # fmt: skip
    assert found and all(f"{value:.3f}" in card.partition("## Scores")[2] for value in found.values())
    return found


def test_the_scores_are_those_of_the_best_weights(tmp_path: Path) -> None:
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
               "load_best_model_at_end": True, "metric_for_best_model": "eval_kl", "greater_is_better": True,
               "learning_rate": 0.05}  # fmt: skip
    during: list[dict[str, float]] = []

    class Ask(TrainerCallback):
        def on_save(self, *_: Any, **kwargs: Any) -> None:
            during.append(published(trainer))

    trainer = trainer_for(tmp_path, eval_dataset=HELD_OUT, options=options, callbacks=[Ask()])
    trainer.train()
    values = [line["eval_kl"] for line in trainer.state.log_history if "eval_kl" in line]
    assert trainer.step_of_weights < 3 and max(values) - values[-1] > 1e-3
    assert during == [{"held-out rows": round(value, 4)} for value in values]  # until then each step has its own
    for _ in range(2):
        assert published(trainer) == {"held-out rows": round(max(values), 4)}
        assert trainer.evaluate()["eval_kl"] == pytest.approx(max(values), rel=1e-5)


def test_rows_given_to_the_call_and_weights_of_before_have_no_score(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == 3

    options = {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_for(tmp_path, eval_dataset=HELD_OUT, options=options, callbacks=[Stop()])
    trainer.train()
    assert published(trainer) == {}  # step 2 was evaluated, and not 3
    assert trainer.evaluate(ROWS[5:7])["eval_rows"] == 2
    trainer.evaluate(HELD_OUT, metric_key_prefix="eval_more")
    assert published(trainer) == {}
    values = trainer.evaluate(trainer.eval_dataset)  # its own
    trainer.evaluate(ROWS[5:7])
    assert published(trainer) == {"held-out rows": round(values["eval_kl"], 4)}
    card = trainer.card(None)
    assert 'student = "."' in card and "final/" not in card


def test_each_held_out_set_has_its_scores(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, eval_dataset={"a": HELD_OUT, "a_ce": ROWS[5:7]})
    trainer.train()
    values = trainer.evaluate()
    trainer.evaluate({"a": ROWS[:1]})
    expected = {name: round(values[f"eval_{name}_kl"], 4) for name in ("a", "a_ce")}
    assert published(trainer) == expected and expected["a"] != expected["a_ce"]
    card = trainer.card("org/name")
    assert (
        "held-out KL at T = 1, a_ce (" in card
        and f"osses over {values['eval_a_labels']} tokens of a; losses over" in card
    )


def test_a_set_is_not_taken_for_a_value_of_another() -> None:
    log = [{"step": 1, "eval_a_rows": 5, "eval_a_ce_loss": 1.0}, {"step": 2, "eval_a_rows": 5}]
    assert held_out_scores(log, 1, ["a", "a_ce"]) == {"a": {"rows": 5, "ce_loss": 1.0}}
    assert held_out_scores(log, 1) == held_out_scores(log, 3, ["a"]) == {}
