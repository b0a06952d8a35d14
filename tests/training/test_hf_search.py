"""``model_init`` and ``hyperparameter_search``: every run has a fresh student and a policy that begins anew."""

from __future__ import annotations

import copy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

from dts_hf.errors import UserError
from dts_hf.training.trainer import DistillationTrainer
from tests.support.hf import ROWS, arguments, logged, trainer_for
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer


def searching(folder: Path, make: Any = None, options: Any = None, **more: Any) -> DistillationTrainer:
    defaults: dict[str, Any] = {"train_dataset": ROWS, "eval_dataset": ROWS[:3], "processing_class": tiny_tokenizer()}
    return DistillationTrainer(
        None, tiny_llama(seed=1), model_init=make or (lambda: tiny_llama(seed=0)),
        args=arguments(folder, **{"max_steps": 3, **(options or {})}), **{**defaults, **more},
    )  # fmt: skip


class Trial:
    """A trial of a search: its number and its values."""

    def __init__(self, number: int, **params: Any) -> None:
        self.number, self.params = number, params


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Optuna's place is taken by a search over the trials of this list."""
    trials: list[Trial] = []

    class Grid(HyperParamSearchBackendBase):
        name = "optuna"

        @staticmethod
        def is_available() -> bool:
            return True

        def run(self, trainer: Any, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
            found = []
            for trial in trials[:n_trials]:
                trainer.objective = None
                trainer.train(trial=trial)
                if trainer.objective is None:
                    trainer.objective = trainer.compute_objective(trainer.evaluate())
                found.append((trainer.objective, trial))
            objective, best = (min if direction == "minimize" else max)(found, key=lambda one: one[0])
            return BestRun(str(best.number), objective, best.params)

        def default_hp_space(self, trial: Trial) -> dict[str, Any]:
            return {"learning_rate": 1e-3}

    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Grid)
    # The Trainer looks at trials by the class that they have there
    fake: Any = ModuleType("optuna")
    fake.__spec__, fake.trial = ModuleSpec("optuna", None), SimpleNamespace(BaseTrial=Trial)
    monkeypatch.setitem(sys.modules, "optuna", fake)
    return trials


def space(trial: Trial) -> dict[str, Any]:
    return dict(trial.params)


def search(trainer: DistillationTrainer, **options: Any) -> Any:
    return trainer.hyperparameter_search(space, backend="optuna", **options)


# -------------------------------------------------------------------------------------------------------- model_init


@pytest.mark.parametrize("takes_trial", [False, True])
def test_model_init_makes_a_fresh_student_for_every_training(tmp_path: Path, takes_trial: bool) -> None:
    """works: model_init, with and without the trial; a second train begins again and ends in the same weights"""
    made: list[torch.nn.Module] = []

    def make() -> torch.nn.Module:
        made.append(tiny_llama(seed=0))
        return made[-1]

    trainer = searching(tmp_path, (lambda trial: make()) if takes_trial else make)
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        assert trainer.model is made[-1]
    assert len(made) == 3
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    alone = trainer_for(tmp_path / "alone", teacher=tiny_llama(seed=1), temperature="dts", options={"max_steps": 3})
    alone.train()
    assert all(torch.equal(value, ends[0][name]) for name, value in alone.model.state_dict().items())


def test_model_init_draws_under_the_seed(tmp_path: Path) -> None:
    """works: random weights of model_init follow args.seed"""

    def drawn(seed: int) -> torch.Tensor:
        def make() -> torch.nn.Module:
            student = tiny_llama(seed=0)
            torch.nn.init.normal_(student.model.norm.weight)
            return student

        return searching(tmp_path, make, {"seed": seed}).model.model.norm.weight.detach().clone()

    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))


def test_model_init_with_an_adapter(tmp_path: Path) -> None:
    """works: model_init with peft_config: a fresh adapter on a fresh model"""
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = searching(tmp_path, peft_config=config, options={"max_steps": 1})
    first = trainer.model
    trainer.train()
    assert isinstance(trainer.model, peft.PeftModel) and trainer.model is not first


def test_model_init_resumes(tmp_path: Path) -> None:
    """works: a run with model_init goes on from its checkpoint"""
    options = {"save_strategy": "steps", "save_steps": 2}
    straight = searching(tmp_path, options=options)
    straight.train()
    again = searching(tmp_path, options=options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "with a model": ({"model": tiny_llama()}, "model_init: got a model, too; give one of them"),
    "nothing": ({"model_init": lambda: None}, "model_init: returned NoneType, expected the student, a model"),
    "two arguments": ({"model_init": lambda a, b: None}, "model_init: takes 2 arguments, expected none, or the trial"),
    "no function": ({"model_init": tiny_tokenizer()}, "model_init: "),
    "an optimizer": (
        {"model_init": tiny_llama, "optimizers": (torch.optim.SGD([torch.zeros(1)], 0.1), None)}, "optimizers: each call of"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_model_init_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    """refused: model_init beside a model or an optimizer, or that makes no model"""
    given, says = WRONG[case]
    with pytest.raises(UserError, match=says):
        DistillationTrainer(**{"model": None, "teacher": tiny_llama(seed=1), "model_init": tiny_llama,
                               "args": arguments(tmp_path), "processing_class": tiny_tokenizer(), **given})  # fmt: skip


def test_a_later_student_that_does_not_fit(tmp_path: Path) -> None:
    """refused: a model_init whose later students have another vocabulary"""
    students = iter([tiny_llama(seed=0), tiny_gpt2(vocab=330, seed=0)])
    trainer = searching(tmp_path, lambda: next(students))
    with pytest.raises(UserError, match="model_init: this student has 330 tokens, expected 320"):
        trainer.train()


# ------------------------------------------------------------------------------------------------------------ search


def test_a_search_over_training_arguments(tmp_path: Path, grid: list[Trial]) -> None:
    """works: hyperparameter_search over training arguments: each trial is the run with these arguments alone"""
    grid += [Trial(0, learning_rate=1e-3), Trial(1, learning_rate=1e-2), Trial(2, learning_rate=1e-3)]
    objectives: list[float] = []

    def objective(metrics: dict[str, float]) -> float:
        objectives.append(metrics["eval_kl"])
        return metrics["eval_kl"]

    best = search(searching(tmp_path), n_trials=3, compute_objective=objective)
    assert objectives[0] == objectives[2] != objectives[1]  # a fresh student and a fresh policy
    assert best.objective == min(objectives) and best.hyperparameters["learning_rate"] in (1e-3, 1e-2)
    alone = trainer_for(
        tmp_path / "alone",
        teacher=tiny_llama(seed=1),
        temperature="dts",
        options={"max_steps": 3, "learning_rate": 1e-2},
    )
    alone.train()
    assert alone.evaluate(ROWS[:3])["eval_kl"] == pytest.approx(objectives[1], rel=1e-6)


def test_a_search_over_the_distillation(tmp_path: Path, grid: list[Trial]) -> None:
    """works: hp_space may give temperature, kd_ratio and divergence; trackers see those of the trial"""
    grid += [
        Trial(0, temperature=4.0, kd_ratio=1.0), Trial(1, temperature={"name": "cosine"}, divergence="reverse_kl"), Trial(2),
    ]  # fmt: skip
    seen: list[dict[str, Any]] = []
    temperatures: list[list[float]] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, *_: Any, **kwargs: Any) -> None:
            seen.append(args.distillation)

        def on_train_end(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            temperatures.append([line["temperature"] for line in state.log_history if "temperature" in line])

    search(searching(tmp_path, callbacks=[Look]), n_trials=3)
    assert [one["temperature"] for one in seen] == ["constant", "cosine", "dts"]
    assert [one["kd_ratio"] for one in seen] == [1.0, 0.5, 0.5]
    assert [one["divergence"] for one in seen] == ["forward_kl", "reverse_kl", "forward_kl"]
    assert temperatures[0] == [4.0] * 3 and temperatures[1][0] > temperatures[1][-1]
    alone = trainer_for(tmp_path / "alone", teacher=tiny_llama(seed=1), temperature="dts", options={"max_steps": 3})
    alone.train()
    assert temperatures[2] == logged(alone, "temperature")


def test_a_policy_object_begins_anew_in_each_trial(tmp_path: Path, grid: list[Trial]) -> None:
    """works: the state of the policy is that of a new run in each trial"""
    from dts_hf.temperature import build_temperature

    grid += [Trial(0, learning_rate=1e-2), Trial(1, learning_rate=1e-2)]
    trainer = searching(tmp_path, temperature=build_temperature("dts", momentum=0.5))
    fresh = copy.deepcopy(trainer.temperature.state())
    begun: list[dict[str, Any]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                begun.append(copy.deepcopy(trainer.temperature.state()))

    trainer.add_callback(Look)
    search(trainer, n_trials=2)
    assert begun[0] == begun[1] and trainer.temperature.state() != fresh


def test_a_search_with_checkpoints_and_evaluation(tmp_path: Path, grid: list[Trial]) -> None:
    """works: each trial has a folder of its own, named by hp_name, with its checkpoints; evaluation in training reports"""
    grid += [Trial(0, learning_rate=1e-3), Trial(1, learning_rate=1e-2)]
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
               "load_best_model_at_end": True}  # fmt: skip
    best = search(searching(tmp_path, options=options), n_trials=2, hp_name=lambda trial: f"lr{trial.number}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr0", "lr1"]
    assert (tmp_path / "lr0" / "checkpoint-3" / "complete.json").is_file() and best.run_id in ("0", "1")


def test_the_space_of_the_backend(tmp_path: Path, grid: list[Trial]) -> None:
    """works: without hp_space the backend's own"""
    grid += [Trial(0)]
    trainer = searching(tmp_path)
    trainer.hyperparameter_search(n_trials=1, direction="maximize", backend="optuna")
    assert trainer.args.learning_rate == 1e-3


@pytest.mark.parametrize("params, says", [
    ({"kd_ration": 0.5}, "hp_space: kd_ration is no argument of this trainer. Did you mean 'kd_ratio'"),
    ({"kd_ratio": 2.0}, r"loss.kd_ratio: got 2\.0, expected a number between 0 and 1"),
    ({"temperature": "dst"}, "Did you mean 'dts'"),
])  # fmt: skip
def test_a_space_of_values_that_are_wrong(tmp_path: Path, grid: list[Trial], params: Any, says: str) -> None:
    """refused: hp_space with an unknown name (transformers warns and goes on), or a value out of range"""
    grid += [Trial(0, **params)]
    with pytest.raises(UserError, match=says):
        search(searching(tmp_path), n_trials=1)


def test_a_search_without_model_init(tmp_path: Path) -> None:
    """refused: hyperparameter_search without model_init"""
    with pytest.raises(UserError, match="hyperparameter_search: every trial needs a student of its own"):
        trainer_for(tmp_path).hyperparameter_search()


@pytest.mark.parametrize("backend", ["ray", "wandb", "nothing"])
def test_a_search_without_its_package(tmp_path: Path, backend: str) -> None:
    """refused: a backend that is not installed or not known, with transformers' advice"""
    if backend != "nothing" and ALL_HYPERPARAMETER_SEARCH_BACKENDS[HPSearchBackend(backend)].is_available():
        pytest.skip(f"{backend} is installed")
    with pytest.raises(UserError, match=r"hyperparameter_search: .*(pip install|not a valid)"):
        searching(tmp_path).hyperparameter_search(space, backend=backend)


def test_optuna_itself(tmp_path: Path) -> None:
    """works: a search with optuna, where it is installed"""
    pytest.importorskip("optuna")
    trainer = searching(tmp_path, options={"eval_strategy": "steps", "eval_steps": 1})
    best = trainer.hyperparameter_search(
        lambda trial: {"kd_ratio": trial.suggest_float("kd_ratio", 0.1, 0.9)}, lambda metrics: metrics["eval_kl"], 2
    )
    assert 0.1 <= best.hyperparameters["kd_ratio"] <= 0.9  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "more", "named"),
    [
        (
            {"divergence": "dkd"},
            {"on_policy": {"gap_on": "teacher_argmax"}},
            "gap_on: got 'teacher_argmax', but .*dkd",
        ),
        (
            {"temperature": {"name": "dts", "range": "auto"}},
            {"on_policy": {"fraction": 1.0}},
            "gap_on: got 'data' with fraction 1 and temperature.range 'auto'",
        ),
        (
            {"temperature": {"name": "dts", "gap_source": "held_out"}},
            {"eval_dataset": {"one": ROWS[:3], "other": ROWS[3:5]}},
            "gap_source: got held_out, but .*several sets",
        ),
    ],
    ids=["dkd", "range", "held-out"],
)
def test_values_of_a_trial_that_do_not_go_with_the_trainer(
    tmp_path: Path, grid: list[Trial], values: dict[str, Any], more: dict[str, Any], named: str
) -> None:
    """refused: a loss or a temperature of hp_space that the trainer would have refused when it was made"""
    grid.append(Trial(0, **values))
    trainer = searching(tmp_path, temperature="dts", **more)
    with pytest.raises(UserError, match=named):
        search(trainer, n_trials=1)


def test_the_students_own_text_is_drawn_by_the_seed_of_the_trial(tmp_path: Path, grid: list[Trial]) -> None:
    """works: a seed in hp_space is also that of on_policy, whose own seed is not given"""
    grid += [Trial(0, seed=1), Trial(1, seed=2)]
    trainer = searching(tmp_path, temperature=2.0, on_policy={"fraction": 1.0, "max_new_tokens": 4})
    seen: list[tuple[int, int]] = []

    class Seeds(TrainerCallback):
        def on_step_begin(self, args: Any, *_: Any, **kwargs: Any) -> None:
            assert trainer.rollout is not None
            seen.append((args.seed, trainer.rollout.generation.seed))

    trainer.add_callback(Seeds())
    search(trainer, n_trials=2, compute_objective=lambda metrics: metrics["eval_kl"])
    assert {*seen} == {(1, 1), (2, 2)}
