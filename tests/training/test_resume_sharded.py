"""Checkpoints of DeepSpeed and FSDP2: killed and resumed they end as if nothing had been, on another number of processes
too where their files allow it, and what somebody has planted in them does not run."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dts_hf.distributed.checkpoint_reading import data_only
from dts_hf.errors import UserError
from dts_hf.runs.checkpoints import COMPLETE, mark_complete, newest_complete, read_complete
from tests.support.ends import end_of, finish, log_of, refused
from tests.workers.resume_worker import HAS_DEEPSPEED, Life, prepare, recipe

pytestmark = pytest.mark.slow
DEEPSPEED = ("zero1", "zero2") if HAS_DEEPSPEED else ()
FORMS = (*DEEPSPEED, "fsdp2", "fsdp2-sharded")
#: One of each kind is for every day.
DAILY = ("zero2", "fsdp2-sharded")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded-resume")
    prepare(folder, rows=12)
    return folder


def values(output: str, world: int = 2, dropout: bool = True, **training: Any) -> dict[str, Any]:
    """Eight steps of four rows: log lines, evaluations and checkpoints come at different ones."""
    made = recipe(output, evaluation={"models": ["student"], "every_steps": None})
    made["training"] |= {
        "max_steps": 8, "save_steps": 3, "per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    if not dropout:
        made["student"] = {"init": {"from": "teacher", "layers": 2}}
        # Of AdamW with its usual epsilon a rounding of a small gradient makes another step; SGD has no state to read
        made["training"] |= {"adam_epsilon": 1e-2, "learning_rate": 0.1}
    made["training"] |= training
    return made


@pytest.fixture(scope="module")
def killed(workplace: Path) -> Callable[[str], Path]:
    """By strategy: a run on two processes that was killed as step 6 began, and has a checkpoint of step 3."""

    @cache
    def of(strategy: str) -> Path:
        run = workplace / f"killed-{strategy}"
        life = Life(workplace, values(run.name), 2, strategy, kill_at_step=6)
        assert set(life.wait()) == {-9}, life.says()[-3000:]
        assert newest_complete(run) == run / "checkpoint-3"
        return run

    return of


def copied(run: Path, name: str) -> Path:
    """Another run directory with the same content, whose recipe only differs in the place."""
    return Path(shutil.copytree(run, run.with_name(name)))


# ------------------------------------------------------------------------------------------------ killed and resumed


@pytest.mark.parametrize(
    "strategy", [pytest.param(form, marks=[] if form in DAILY else pytest.mark.soak) for form in FORMS]
)
def test_killed_and_resumed_ends_as_if_nothing_was(
    workplace: Path, killed: Callable[[str], Path], strategy: str
) -> None:
    finish(Life(workplace, values(f"straight-{strategy}"), 2, strategy))
    expected = end_of(workplace / f"straight-{strategy}")
    record = read_complete(killed(strategy) / "checkpoint-3")
    assert (record["processes"], record["strategy"]) == (2, strategy.removesuffix("-sharded"))
    pieces = (killed(strategy) / "checkpoint-3" / "pytorch_model_fsdp_0" / ".metadata").is_file()
    whole = (killed(strategy) / "checkpoint-3" / "pytorch_model_fsdp.bin").is_file()
    assert (whole, pieces) == (strategy == "fsdp2", strategy == "fsdp2-sharded")
    run = copied(killed(strategy), f"resumed-{strategy}")
    resumed = Life(workplace, values(run.name), 2, strategy, resume=True)
    finish(resumed)
    assert "going on from step 3" in resumed.says()
    assert "missing keys" not in resumed.says() and "lm_head" not in resumed.says()  # tied: saved under another name
    found = end_of(run)
    assert [record["kind"] for record in found["log"]].count("train") >= 2
    for part, value in expected.items():
        assert found[part] == value, part


@pytest.fixture(scope="module")
def often() -> dict[str, float]:
    """By strategy: the seconds of a whole life that saves every second step."""
    return {}


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("strategy", [*FORMS, *(["zero3"] if HAS_DEEPSPEED else [])])
def test_killed_at_a_random_moment(
    workplace: Path, often: dict[str, float], strategy: str, case: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("campaign", f"{strategy} on 2 processes, one kill each, at a random moment or while a checkpoint is "
                                "written or removed: resumed, and all files bit-equal")  # fmt: skip
    straight = workplace / f"often-{strategy}"
    if strategy not in often:
        began = time.monotonic()
        finish(Life(workplace, values(straight.name, save_steps=2), 2, strategy))
        often[strategy] = time.monotonic() - began
    draw, run = random.Random(f"{strategy}-{case}"), workplace / f"random-{strategy}-{case}"
    made, share = values(run.name, save_steps=2), draw.uniform(0.1, 0.95)
    for _ in range(10):
        life = Life(workplace, made, 2, strategy, **({"kill_at_write": draw.randrange(40)} if case % 2 else {}))
        if case % 2:  # while a checkpoint is written or removed: the first process writes most of it
            assert life.wait()[0] == -9, life.says()[-2000:]
            break
        began = time.monotonic()
        life.processes[0].join(share * often[strategy])
        alive = life.processes[0].exitcode is None
        life.kill()
        if alive:
            break
        often[strategy] = time.monotonic() - began  # the machine has become faster: that life was over
        shutil.rmtree(run)
    else:
        pytest.fail("no life could be killed")
    saved = newest_complete(run)
    finish(Life(workplace, made, 2, strategy, resume=True))
    assert end_of(run) == end_of(straight), life.says()[-2000:]
    print(f"{strategy} {case}: killed {'in a write' if case % 2 else f'at {share:.0%}'}, resumed from {saved}: equal")


# ------------------------------------------------------------------------------------- another number of processes


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, "fsdp2-sharded"), (1, "fsdp2")),
        pytest.param((1, "fsdp2"), (2, "fsdp2-sharded"), marks=pytest.mark.soak),
        pytest.param((2, "fsdp2"), (1, "fsdp2"), marks=pytest.mark.soak),
        pytest.param((1, "fsdp2-sharded"), (2, "fsdp2-sharded"), marks=pytest.mark.soak),
    ],
)
def test_fsdp2_goes_on_with_another_number_of_processes(
    workplace: Path, first: tuple[int, str], then: tuple[int, str]
) -> None:
    """And in another form: whole or in pieces is how checkpoints are written, and they are read as they are."""
    from safetensors.torch import load_file

    straight, output = workplace / "no-dropout", f"from-{first[0]}-{first[1]}-to-{then[0]}-{then[1]}"
    if not straight.exists():
        finish(Life(workplace, values(straight.name, dropout=False), 2, "fsdp2"))
    life = Life(workplace, values(output, first[0], dropout=False), *first, kill_at_step=6)
    assert set(life.wait()) == {-9}, life.says()[-2000:]
    resumed = Life(workplace, values(output, then[0], dropout=False), *then, resume=True)
    finish(resumed)
    assert "going on from step 3" in resumed.says()
    weights, expected = (load_file(run / "final" / "model.safetensors") for run in (workplace / output, straight))
    assert all((weights[key] - expected[key]).norm() <= 1e-5 * expected[key].norm() for key in expected)
    for found, wanted in zip(log_of(workplace / output), log_of(straight), strict=True):
        assert found.keys() == wanted.keys() and found["kind"] == wanted["kind"]
        assert {k: v for k, v in found.items() if not isinstance(v, str)} == pytest.approx(
            {k: v for k, v in wanted.items() if not isinstance(v, str)}, rel=1e-5, abs=1e-6
        )
    written = workplace / output / "checkpoint-8"
    assert (written / "pytorch_model_fsdp.bin").is_file() == (then[1] == "fsdp2"), "it is written as it was asked for"


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed")
def test_zero_does_not(workplace: Path, killed: Callable[[str], Path]) -> None:
    run = copied(killed("zero2"), "alone")
    says = refused(workplace, values(run.name, world=1), 1, "zero2")
    assert "written by zero2 on 2 processes" in says and "zero2 on 1 process" in says
    assert "DeepSpeed's files fit the same number of processes, rows and accumulation only" in says


# --------------------------------------------------------------------------------------------------- planted code


class Planted:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def plant(run: Path, name: str, marker: Path) -> None:
    """Put a pickle in the place of a file of the checkpoint, and adapt the list of its files."""
    checkpoint = run / "checkpoint-3"
    if name.endswith(".metadata"):
        (checkpoint / name).write_bytes(pickle.dumps(Planted(marker)))
    else:
        torch.save({"planted": Planted(marker)}, checkpoint / name)
    record = read_complete(checkpoint)
    (checkpoint / COMPLETE).unlink()
    mark_complete(checkpoint, **{key: value for key, value in record.items() if key not in ("format", "files")})


STATES = "global_step3/zero_pp_rank_{}_mp_rank_00_optim_states.pt"
PLANTED = [
    ("fsdp2-sharded", "optimizer_0/.metadata", True),
    ("fsdp2-sharded", "pytorch_model_fsdp_0/.metadata", False),
    ("fsdp2", "pytorch_model_fsdp.bin", False),
    ("fsdp2", "optimizer.bin", False),
    ("fsdp2", "rng_state_1.pth", False),
    ("zero2", STATES.format(1), True),
    ("zero2", STATES.format(0), False),
    ("zero2", "global_step3/mp_rank_00_model_states.pt", False),
    ("zero1", STATES.format(0), False),
    ("zero1", "scheduler.pt", False),
]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [pytest.param(*case, marks=[] if quick else pytest.mark.soak) for *case, quick in PLANTED if case[0] in FORMS],
)
def test_planted_code_does_not_run(workplace: Path, killed: Callable[[str], Path], strategy: str, name: str) -> None:
    number = [case[:2] for case in PLANTED].index((strategy, name))
    run, marker = copied(killed(strategy), f"planted-{number}"), workplace / f"marker-{number}"
    plant(run, name, marker)
    life = Life(workplace, values(run.name), 2, strategy, resume=True)
    codes = life.wait()
    assert not marker.exists(), f"{name} was unpickled"
    assert 2 in codes and 0 not in codes, life.says()[-3000:]  # a process that read another file loses its peer
    assert f"{Path(run.name, 'checkpoint-3')}: a file in it asks for " in life.says()
    assert "mkdir, which is none of the types of a checkpoint" in life.says()


alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint")


@pytest.fixture
def in_pieces(tmp_path: Path) -> Path:
    """A folder of ``torch.distributed.checkpoint`` with a tensor and what is none."""
    dcp.save({"weight": torch.arange(4.0), "group": {"lr": 0.5}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def read(folder: Path) -> dict[str, Any]:
    state = {"weight": torch.zeros(4), "group": {"lr": 0.0}}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


@alone
@pytest.mark.parametrize("where", ["metadata", "value"])
def test_what_is_planted_in_pieces_is_sharp_and_is_not_run(
    in_pieces: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # of somebody's profile
    with data_only(in_pieces):
        assert read(in_pieces)["group"] == {"lr": 0.5}
    marker = tmp_path / "marker"
    if where == "metadata":
        (in_pieces / ".metadata").write_bytes(pickle.dumps(Planted(marker)))
    else:
        state = {"weight": torch.arange(4.0), "group": {"lr": Planted(marker)}}
        dcp.save(state, checkpoint_id=in_pieces, no_dist=True)
    with pytest.raises(UserError, match="mkdir, which is none of the types of a checkpoint"), data_only(in_pieces):
        read(in_pieces)
    assert not marker.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ and os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    with contextlib.suppress(BaseException):  # what it made is no metadata
        read(in_pieces)
    assert marker.is_dir(), "without data_only it does run"
