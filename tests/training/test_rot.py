"""Files of a run that have rotted: none is trained on in silence, and none ends in a traceback.

Each case is ``dts-hf train recipe.yaml --resume`` of a copy of a run in which one file was changed. It ends, bit for bit, as
the undisturbed run did, or is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from dts_hf.errors import UserError
from dts_hf.runs.checkpoints import COMPLETE, UNREADABLE, mark_complete, newest_whole, read_complete, rotate
from dts_hf.runs.damage import refuse_damaged
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.warm import fork_server
from tests.workers.fault_worker import life

pytestmark = pytest.mark.slow

RECIPE: dict[str, Any] = {
    "student": {"init": {"from": "teacher", "layers": 1}},
    "teacher": {"model": "../teacher", "dtype": "float32"},
    "data": {"train": "../rows.jsonl", "validation": "../rows.jsonl", "prompt_template": "chat"},
    "temperature": {"name": "dts"},
    "training": {"use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1,
                 "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no", "disable_tqdm": True,
                 "learning_rate": 1e-3, "save_total_limit": 2},
    "evaluation": {"rows": 2, "max_new_tokens": 3, "models": ["teacher", "student_before", "student"]},
    "output": {"dir": "run", "report": False},
}  # fmt: skip
OF_KILLED = (
    "checkpoint-4/complete.json", "checkpoint-4/model.safetensors", "checkpoint-4/config.json",
    "checkpoint-4/generation_config.json", "checkpoint-4/optimizer.pt", "checkpoint-4/scheduler.pt",
    "checkpoint-4/rng_state.pth", "checkpoint-4/trainer_state.json", "checkpoint-4/training_args.bin",
    "checkpoint-4/progress.json", "checkpoint-4/rank_0.json", "checkpoint-4/temperature.json",
    "checkpoint-4/tokenizer.json", "checkpoint-4/tokenizer_config.json", "data_manifest.json", "log.jsonl", "scores.json",
)  # fmt: skip
OF_FINISHED = (
    "final/model.safetensors",
    "final/config.json",
    "final/tokenizer.json",
    "final.json",
    "metrics.json",
    "log.jsonl",
)


def _flip(content: bytes, draw: random.Random, bits: int) -> bytes:
    changed = bytearray(content)
    for place in draw.sample(range(len(changed) * 8), bits):
        changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "one bit": lambda content, draw: _flip(content, draw, 1),
    "many bits": lambda content, draw: _flip(content, draw, min(64, len(content))),
    "truncated": lambda content, draw: content[: draw.randrange(len(content))],
    "garbage": lambda content, draw: draw.randbytes(len(content)),
    "empty": lambda content, draw: b"",
    "deleted": lambda content, draw: None,
}
CASES = [(kind, name, damage) for kind, names in (("killed", OF_KILLED), ("finished", OF_FINISHED)) for name in names
         for damage in DAMAGES]  # fmt: skip


def start(folder: Path, *argv: str, **faults: Any) -> Any:
    for name in ("go", "reached.0"):
        (folder / name).unlink(missing_ok=True)
    process = fork_server().Process(target=life, args=(str(folder), ["train", "recipe.yaml", *argv], {}, faults))
    process.start()
    return process


def said(folder: Path) -> str:
    return "".join((folder / name).read_text(errors="replace") for name in ("out.0", "err.0"))


class Runs(NamedTuple):
    """Folders with ``recipe.yaml`` and ``run``: one that was killed behind step 4, and one that has finished."""

    root: Path
    killed: Path
    finished: Path

    def copy(self, kind: str, name: str) -> Path:
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(getattr(self, kind), folder)
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("rot")
    tiny_llama(seed=0, layers=2).save_pretrained(root / "teacher")
    tiny_tokenizer().save_pretrained(root / "teacher")
    rows = [{"id": f"r{i}", "instruction": f"Say {i}", "input": "", "output": "yes " * (1 + i % 5)} for i in range(20)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("killed", "finished"):
        (root / name).mkdir()
        (root / name / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    finished, killed = start(root / "finished"), start(root / "killed", step=5)
    finished.join(120)
    assert finished.exitcode == 0, said(root / "finished")
    while not (root / "killed" / "reached.0").exists():
        assert killed.is_alive(), said(root / "killed")
        killed.join(0.05)
    killed.kill()
    killed.join()
    return Runs(root, root / "killed", root / "finished")


def end_of(run: Path) -> tuple[str, list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if not k.endswith(("_per_second", "_runtime"))} for line in lines]
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest(), log


def verdict(runs: Runs, kind: str, name: str, damage: str, seed: int = 0) -> tuple[str, str]:
    """``silent`` and ``traceback`` are failures; ``older``, ``equal`` and ``refused`` are not. And what was said."""
    folder = runs.copy(kind, "case")
    path = folder / "run" / name
    content = DAMAGES[damage](path.read_bytes(), random.Random(f"{seed} {kind} {name} {damage}"))
    path.unlink() if content is None else path.write_bytes(content)
    process = start(folder, "--resume")
    process.join(120)
    text = said(folder)
    if "Traceback" in text or process.exitcode not in (0, 1, 2):
        return "traceback", text
    if process.exitcode:
        return "refused", text
    if end_of(folder / "run") != end_of(runs.finished / "run"):
        return "silent", text
    return ("older" if "is ignored" in text or "is made again" in text else "equal"), text


def check(runs: Runs, cases: list[tuple[str, str, str]], seed: int = 0) -> None:
    table, wrong = {}, []
    for kind, name, damage in cases:
        found, text = verdict(runs, kind, name, damage, seed)
        table[kind, name, damage] = found
        line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        print(
            f"{kind:9}{name:38}{damage:11}{found:10}{line[:150] if found in ('refused', 'silent', 'traceback') else ''}"
        )
        if found in ("silent", "traceback"):
            wrong.append((kind, name, damage, text[-1500:]))
        must_tell = name.startswith("checkpoint-4/") or name.startswith("final/")
        if must_tell and found not in ("older", "refused"):
            wrong.append((kind, name, damage, "nothing was said"))
    counts = {found: list(table.values()).count(found) for found in sorted({*table.values()})}
    print(f"{len(cases)} corruptions: {counts}")
    assert not wrong, wrong


@pytest.mark.soak
def test_every_corruption(runs: Runs) -> None:
    check(runs, CASES)


def test_a_sample_of_the_corruptions(runs: Runs) -> None:
    sure = [
        ("killed", "checkpoint-4/model.safetensors", "one bit"),
        ("finished", "final/model.safetensors", "one bit"),
    ]
    check(runs, [*sure, *random.Random(1).sample(CASES, 6)], seed=1)


def rewrite(checkpoint: Path) -> None:
    """``complete.json`` for the files as they are now."""
    record = {key: value for key, value in read_complete(checkpoint).items() if key not in ("format", "files")}
    mark_complete(checkpoint, **record)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json", "temperature.json"])
def test_files_that_no_loader_can_read_although_their_checksum_is_right(runs: Runs, name: str) -> None:
    folder = runs.copy("killed", "case")
    checkpoint = folder / "run" / "checkpoint-4"
    (checkpoint / name).write_bytes(random.Random(0).randbytes(200))
    rewrite(checkpoint)
    found = newest_whole(folder / "run")
    assert found.checkpoint == checkpoint.with_name("checkpoint-2") and f"{name} cannot be read" in found.ignored[0][1]


def test_a_checkpoint_that_fails_to_load_is_left_to_the_next_start(runs: Runs) -> None:
    """Weights of another shape: everything can be parsed."""
    from safetensors.torch import load_file, save_file

    folder = runs.copy("killed", "case")
    checkpoint = folder / "run" / "checkpoint-4"
    weights = {
        name: value[..., :1].contiguous() for name, value in load_file(checkpoint / "model.safetensors").items()
    }
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    rewrite(checkpoint)
    first = start(folder, "--resume")
    first.join(120)
    assert first.exitcode == 1 and "cannot be loaded" in said(folder) and "Traceback" not in said(folder)
    assert (checkpoint / UNREADABLE).is_file()
    second = start(folder, "--resume")
    second.join(120)
    assert second.exitcode == 0 and "checkpoint-4 is ignored: it could not be loaded" in said(folder)
    assert end_of(folder / "run") == end_of(runs.finished / "run")


def test_no_checkpoint_is_left(runs: Runs) -> None:
    folder = runs.copy("killed", "case")
    for name in ("checkpoint-2", "checkpoint-4"):
        path = folder / "run" / name / "optimizer.pt"
        path.write_bytes(_flip(path.read_bytes(), random.Random(0), 1))
    process = start(folder, "--resume")
    process.join(120)
    assert process.exitcode == 2
    assert re.search(
        r"no checkpoint is left.*checkpoint-2: optimizer.pt is damaged \(its checksum", said(folder), re.S
    )


def go_on(folder: Path) -> tuple[int, str]:
    process = start(folder, "--resume")
    process.join(120)
    return process.exitcode, said(folder)


def scores_of(run: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((run / "metrics.json").read_text())["models"]
    return entries


@pytest.mark.parametrize("damage", ["a number", "cut"])
def test_damaged_answers_are_found_before_training(runs: Runs, damage: str) -> None:
    """The report reads them, after hours. A number that has become another one can be parsed all the same."""
    folder = runs.copy("killed", "case")
    path = folder / "run" / "predictions" / "student_before.jsonl"
    text = path.read_text()
    changed = text[:-9] + "\n" if damage == "cut" else re.sub(r'"tokens": \d', '"tokens": 7', text)
    assert changed != text
    path.write_text(changed)
    code, text = go_on(folder)
    assert code == 2
    assert re.search(r"predictions/student_before\.jsonl (is damaged|has ).*or remove it: the run then goes on", text)
    assert not (folder / "run" / "checkpoint-6").exists()


@pytest.mark.parametrize("kind", ["killed", "finished"])
@pytest.mark.parametrize("damage", ["one bit", "deleted"])
def test_answers_of_the_teacher_are_made_again(runs: Runs, kind: str, damage: str) -> None:
    folder = runs.copy(kind, "case")
    path = folder / "run" / "predictions" / "teacher.jsonl"
    content = DAMAGES[damage](path.read_bytes(), random.Random(3))
    path.unlink() if content is None else path.write_bytes(content)
    code, text = go_on(folder)
    assert code == 0 and "no scores of teacher were kept, so it is scored again" in text, text
    assert damage == "deleted" or "predictions/teacher.jsonl is damaged" in text
    for name in ("teacher", "student_before", "student"):
        of = f"predictions/{name}.jsonl"
        assert (folder / "run" / of).read_bytes() == (runs.finished / "run" / of).read_bytes(), name
    assert scores_of(folder / "run") == scores_of(runs.finished / "run")


def test_a_lost_answer_of_a_finished_run_is_said_where_nothing_can_make_it(runs: Runs) -> None:
    folder = runs.copy("finished", "case")
    (folder / "run" / "predictions" / "student.jsonl").unlink()
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    code, text = go_on(folder)
    assert code == 2 and "predictions/student.jsonl is missing, and there is no checkpoint" in text


@pytest.mark.parametrize("name", ["final.json", "metrics.json"])
@pytest.mark.parametrize("damage", ["one bit", "empty", "deleted"])
def test_scores_outlive_the_files_of_the_end(runs: Runs, name: str, damage: str) -> None:
    folder = runs.copy("finished", "case")
    path = folder / "run" / name
    content = DAMAGES[damage](path.read_bytes(), random.Random(3))
    path.unlink() if content is None else path.write_bytes(content)
    code, text = go_on(folder)
    assert code == 0 and "no scores of" not in text and "Traceback" not in text
    assert scores_of(folder / "run") == scores_of(runs.finished / "run")


def test_lost_scores_of_the_teacher_are_made_again(runs: Runs) -> None:
    folder = runs.copy("killed", "case")
    (folder / "run" / "scores.json").write_text("")
    code, text = go_on(folder)
    assert code == 0 and "no scores of student_before were kept, so they are left out" in text
    found, expected = scores_of(folder / "run"), scores_of(runs.finished / "run")
    assert found["teacher"] == expected["teacher"] and found["student"] == expected["student"]
    assert "student_before" not in found


@pytest.mark.parametrize("kind", ["killed", "finished"])
@pytest.mark.parametrize("damage", ["empty", "garbage"])
def test_no_number_depends_on_the_environment(runs: Runs, kind: str, damage: str) -> None:
    folder = runs.copy(kind, "case")
    path = folder / "run" / "environment.json"
    path.write_bytes(DAMAGES[damage](path.read_bytes(), random.Random(0)) or b"")
    code, text = go_on(folder)
    assert code == 0, text
    assert end_of(folder / "run") == end_of(runs.finished / "run")
    if kind == "killed":
        assert "environment.json: broken JSON" in text and "versions and machine is lost" in text
        assert "torch" in json.loads(path.read_text())["packages"]


def test_a_damaged_manifest_says_what_to_do(runs: Runs) -> None:
    folder = runs.copy("killed", "case")
    (folder / "run" / "data_manifest.json").write_bytes(b"\xc2 garbage")
    code, text = go_on(folder)
    assert code == 2 and re.search(
        r"data_manifest.json: broken JSON.*from a copy, or train again with --overwrite", text
    )


def test_damaged_students_are_not_used(runs: Runs) -> None:
    folder = runs.copy("finished", "case")
    run = folder / "run"
    for source in (run, run / "final", run / "checkpoint-6"):
        refuse_damaged(source)
    for name in ("final/model.safetensors", "checkpoint-6/model.safetensors"):
        (run / name).write_bytes(_flip((run / name).read_bytes(), random.Random(0), 1))
    for source in (run, run / "final", run / "checkpoint-6"):
        with pytest.raises(UserError, match=r"model.safetensors is damaged \(its checksum is"):
            refuse_damaged(source)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Path]:
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100))
        mark_complete(folder, step=step, resumable=True)
    yield tmp_path


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-4" / "model.safetensors").write_bytes(bytes(99) + b"\1")
    rotate(checkpoints, 6, 2)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-6"]


def test_format_1_knows_sizes_alone(checkpoints: Path) -> None:
    folder = checkpoints / "checkpoint-6"
    old = {"format": 1, "step": 6, "resumable": True, "files": {"model.safetensors": 100}}
    (folder / COMPLETE).write_text(json.dumps(old))
    assert read_complete(folder)["files"] == {"model.safetensors": {"size": 100}}
