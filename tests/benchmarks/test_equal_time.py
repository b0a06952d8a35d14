"""Arms of equal time: what is done is kept and not done again, and seeds are the outermost loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_a_campaign_that_is_broken_off_goes_on_where_it_was(
    scripts: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    equal_time = scripts("equal_time")
    parser = argparse.ArgumentParser()
    equal_time.add_arguments(parser, ["a", "b"], minutes=1.0, probe=4)
    args = parser.parse_args(["--seeds", "2", "--kept", str(tmp_path / "kept.jsonl")])
    probed: list[str] = []
    ran: list[tuple[str, int, int]] = []

    def probe(arm: str) -> dict[str, Any]:
        probed.append(arm)
        return {"seconds": 2.0 if arm == "a" else 8.0, "steps": args.probe}

    def run(arm: str, seed: int, steps: int) -> dict[str, Any]:
        if len(ran) == 3 and not broken:
            broken.append(True)
            raise KeyboardInterrupt
        ran.append((arm, seed, steps))
        return {"score": steps}

    broken: list[bool] = []
    for _ in range(2):
        kept = equal_time.read_kept(args)
        seconds = equal_time.seconds_of_steps(args, probe, kept)
        assert seconds == {"a": 0.5, "b": 2.0}
        steps = {arm: int(60 * args.minutes / seconds[arm]) for arm in args.arms}
        if not broken:
            with pytest.raises(KeyboardInterrupt):
                equal_time.all_runs(args, steps, run, kept)
        else:
            found = equal_time.all_runs(args, steps, run, kept)
    assert probed == ["a", "b"], "each arm is timed once"
    assert ran == [("a", 42, 120), ("b", 42, 30), ("a", 43, 120), ("b", 43, 30)]
    assert [(line["arm"], line["seed"], line["score"]) for line in found] == ran
