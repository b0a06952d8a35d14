"""A search by Optuna in the place of a grid; every trial is a run of a sweep, or one for each seed.

    pip install optuna 'dts-hf @ git+https://github.com/dts-hf/dts_hf'
    python examples/optuna_search.py recipe.yaml --trials 20 --seeds 1,2 --output studies/search

What has been tried is in ``studies/search/optuna.log``, so the same command again goes on: a trial that was killed is
asked for again, and no run is made twice. Change ``space`` for your own question.

The measure is held-out KL at T = 1. ``forward_kl`` at ``constant`` 1 trains on exactly that: to search over divergences or
temperatures take ``--measure ce``. The best of 20 trials looks better than it is: confirm it with other seeds
(``dts-hf sweep``, then ``dts-hf compare``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dts_hf.console import show
from dts_hf.experiments.sweep import Sweep, plan
from dts_hf.runs.directory import RunDirectory


def space(trial: Any) -> dict[str, Any]:
    """Values by dotted key of a recipe."""
    return {
        "temperature": trial.suggest_float("temperature", 0.5, 4.0, log=True),
        "loss.kd_ratio": trial.suggest_float("kd_ratio", 0.1, 1.0),
        "training.learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True),
    }


def score(
    recipe: Path, folder: Path, values: dict[str, Any], seeds: Sequence[int], measure: str = "kl"
) -> float | None:
    """The mean over seeds of a held-out measure of the student, in nats per label; None: a run has failed or diverged."""
    study = plan(recipe, [], folder, {key: [value] for key, value in values.items()}, {}, seeds)
    Sweep(study, study.runs).run()
    if any(study.state(run) != "done" for run in study.runs):
        return None
    metrics = [RunDirectory(run.path).read_metrics() for run in study.runs]
    scores = [one["models"]["student"]["teacher_forced"][measure] for one in metrics]
    return None if None in scores else fmean(scores)


def search(study: Any, trials: int, objective: Callable[[dict[str, Any]], float | None]) -> None:
    """Ask ``study`` for so many trials in all; those that it knows already are counted."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # it was killed
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    while len(study.get_trials(states=ended)) < trials:
        trial = study.ask()
        value = objective(space(trial))
        # Without a value it is pruned and not failed: then it counts
        study.tell(trial, value, state=None if value is not None else TrialState.PRUNED)
        show(f"trial {trial.number}: {'failed' if value is None else f'{value:.4f}'}, {json.dumps(trial.params)}")


def main(arguments: Sequence[str] | None = None) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--output", type=Path, default=Path("studies/search"))
    parser.add_argument("--measure", choices=("kl", "ce"), default="kl")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(given.output / "optuna.log")))
    sampler = optuna.samplers.TPESampler(seed=1)
    study = optuna.create_study(storage=storage, study_name=given.measure, sampler=sampler, load_if_exists=True)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    search(study, given.trials, lambda values: score(given.recipe, given.output, values, seeds, given.measure))
    show(f"best: {study.best_value:.4f} with {json.dumps(study.best_params)}")


if __name__ == "__main__":
    main()
