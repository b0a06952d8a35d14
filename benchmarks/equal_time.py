"""Arms that train for the same wall time: as many steps each as fit, by the seconds of a step on this machine.

A step is timed first, for every arm, with nothing beside it. From there on an arm is a number of steps, its schedules run
over these, and what else the machine does in the meantime changes nothing but how long one waits. What is done is kept in a
file of JSON lines: the same command again does what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser, arms: Sequence[str], *, minutes: float, probe: int) -> None:
    """The options of ``seconds_of_steps`` and ``all_runs``."""
    parser.add_argument("--minutes", type=float, default=minutes, help="of training, for each arm and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=arms)
    parser.add_argument("--probe", type=int, default=probe, help="steps by which the seconds of a step are measured")
    parser.add_argument("--probe-only", action="store_true", help="measure these and stop")
    parser.add_argument("--rows", type=int, default=64, help="held-out prompts that are answered")
    parser.add_argument("--kept", type=Path, help="JSON lines of what is done; what stands there is not done again")
    parser.add_argument("--json", type=Path, help="keep the numbers here")


def seconds_of_steps(
    args: argparse.Namespace, train: Callable[[str], dict[str, Any]], kept: list[dict[str, Any]]
) -> dict[str, float]:
    """Seconds of a step of each arm.

    Args:
        args: see ``add_arguments``.
        train: trains ``args.probe`` steps of an arm and returns the ``training`` of its metrics.
        kept: lines that are known; new ones are added.
    """
    for arm in args.arms:
        if not any(line["arm"] == arm and "seconds_a_step" in line for line in kept):
            done = train(arm)
            keep(args, kept, {"arm": arm, "seconds_a_step": done["seconds"] / done["steps"]})
    return {line["arm"]: line["seconds_a_step"] for line in kept if "seconds_a_step" in line}


def all_runs(
    args: argparse.Namespace,
    steps: dict[str, int],
    run: Callable[[str, int, int], dict[str, Any]],
    kept: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """One line for each arm and seed, seeds outermost, so that what is broken off is balanced.

    Args:
        args: see ``add_arguments``.
        steps: of each arm.
        run: trains an arm with a seed for so many steps and returns its scores.
        kept: lines that are known; new ones are added.
    """
    for seed in range(42, 42 + args.seeds):
        for arm in args.arms:
            if not any((line["arm"], line.get("seed")) == (arm, seed) for line in kept):
                keep(args, kept, {"arm": arm, "seed": seed, "steps": steps[arm], **run(arm, seed, steps[arm])})
    return [line for line in kept if "seed" in line]


def keep(args: argparse.Namespace, kept: list[dict[str, Any]], line: dict[str, Any]) -> None:
    """Add a line, print it, and write it where ``--kept`` says."""
    kept.append(line)
    print(json.dumps(line), flush=True)
    if args.kept is not None:
        with args.kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_kept(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What ``--kept`` holds."""
    if args.kept is None or not args.kept.exists():
        return []
    return [json.loads(line) for line in args.kept.read_text(encoding="utf-8").splitlines()]
