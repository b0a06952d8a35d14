"""The teacher's answers: made once, by the road of ``dts-hf generate``; a run that is killed while they are made goes on."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from dts_hf.data.chat_templates import get_template
from dts_hf.data.encoding import encode_rows
from dts_hf.data.rows import Row
from dts_hf.generation import answers as road
from dts_hf.generation.answer_blocks import AnswerBlocks
from dts_hf.generation.engine import Generated
from dts_hf.recipe.schema import Recipe
from dts_hf.teachers.answers import answer_rows
from tests.support.tiny import tiny_llama, tiny_tokenizer

ROWS = [Row(str(k), f"Say {'it ' * k}.", "", ("x",)) for k in range(14)]


class Killed(BaseException):
    """Nothing catches it."""


def recipe(place: Path, run: str = "a", **data: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "student": {"init": {"from": "teacher", "layers": 1}},
            "teacher": {"model": str(place / "teacher")},
            "data": {"train": "x.jsonl", "responses": "teacher", "teacher_max_new_tokens": 5, "max_prompt_length": 64,
                     "cache_dir": str(place / "cache"), **data},
            "evaluation": {"batch_size": 1},
            "output": {"dir": str(place / run)},
        }
    )  # fmt: skip


def answered(place: Path, dtype: torch.dtype = torch.float32, run: str = "a", seed: int = 2, **data: Any) -> Any:
    return answer_rows(
        recipe(place, run, **data),
        tiny_llama(seed=seed).to(dtype).eval(),
        tiny_tokenizer(),
        get_template("plain"),
        ROWS,
    )


def answers(place: Path, dtype: torch.dtype = torch.float32, run: str = "a") -> tuple[list[str], bool]:
    rows, about = answered(place, dtype, run)
    return ["" if row is None else row.references[0] for row in rows], about["cached"]


def cached(place: Path) -> list[str]:
    return sorted("".join(path.suffixes) for path in (place / "cache").iterdir())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of the engine was given."""
    found: list[int] = []
    init, generate = road.Answerer.__init__, road.generate

    def counted(model: Any, prompts: Any, *rest: Any, **options: Any) -> list[Generated]:
        found.append(len(prompts))
        return generate(model, prompts, *rest, **options)

    def stand_in(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **{**options, "answer": counted})

    monkeypatch.setattr(road.Answerer, "__init__", stand_in)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_killed_run_goes_on_behind_the_last_block(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    straight, _ = answers(tmp_path / "straight", dtype)
    assert asked == [4, 4, 4, 2] and sum(map(bool, straight)) > 10
    place, write = tmp_path / "killed", AnswerBlocks.write

    def dies(self: AnswerBlocks, number: int, *rest: Any) -> None:
        if number == 2:
            raise Killed
        write(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerBlocks, "write", dies)
        with pytest.raises(Killed):
            answers(place, dtype)
    (unfinished,) = (place / "cache").iterdir()
    (unfinished / ".00000002.block.77-ab.tmp").write_text("the kill came in the middle of a write")
    asked.clear()
    assert answers(place, dtype) == (straight, False) and asked == [4, 2]
    assert cached(place) == [".jsonl", ".manifest.json"]
    assert answers(place, dtype, run="b") == (straight, True) and asked == [4, 2]


def test_another_run_does_not_write_into_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of a sweep share teacher, prompts and cache, and start at the same time."""
    write, inner = AnswerBlocks.write, []

    def beside(self: AnswerBlocks, number: int, *rest: Any) -> None:
        write(self, number, *rest)
        if not inner:
            inner.append(None)
            inner.append(answers(tmp_path, run="b"))

    monkeypatch.setattr(AnswerBlocks, "write", beside)
    texts, was_cached = answers(tmp_path)
    assert inner[1] == (texts, False) and not was_cached
    assert cached(tmp_path) == [".jsonl", ".manifest.json"]


def test_other_weights_and_filters_are_answered_anew_and_damage_is_seen(tmp_path: Path, asked: list[int]) -> None:
    _, first = answered(tmp_path)
    names = {first["fingerprint"]}
    for change in ({"seed": 1}, {"cut_answers": "drop"}, {"max_repetition": 0.25}, {"teacher_max_new_tokens": 6}):
        _, about = answered(tmp_path, **change)  # type: ignore[arg-type]
        assert not about["cached"]
        names.add(about["fingerprint"])
    assert len(names) == 5
    path = tmp_path / "cache" / f"{first['fingerprint']}.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"stop"', b'"STOP"').replace(b'"length"', b'"LENGTH"'))
    asked.clear()
    assert answered(tmp_path)[1] == first and sum(asked) == 14 and path.read_bytes() == content


def without(key: str) -> Any:
    def change(content: bytes) -> bytes:
        return json.dumps({name: value for name, value in json.loads(content).items() if name != key}).encode()

    return change


def lines_of(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


DAMAGE: dict[str, tuple[str, Any]] = {
    "cut": ("jsonl", lambda content: content[: len(content) // 2]),
    "empty": ("jsonl", lambda _: b""),
    "binary": ("jsonl", lambda _: bytes(range(256))),
    "an empty object": ("jsonl", lambda _: b"{}\n"),
    "too few answers": ("jsonl", lambda content: b"".join(lines_of(content)[:-2])),
    "an answer twice": ("jsonl", lambda content: content + lines_of(content)[-1]),
    "a number for a text": (
        "jsonl",
        lambda content: b"".join(json.dumps({**json.loads(line), "text": 7}).encode() + b"\n" for line in lines_of(content)),
    ),
    "changed letters": ("jsonl", lambda content: content.replace(b'"text": "', b'"text": "x')),
    "gone": ("jsonl", None),
    "a manifest that is gone": ("manifest.json", None),
    "an empty manifest": ("manifest.json", lambda _: b""),
    "half a manifest": ("manifest.json", lambda content: content[: len(content) // 2]),
    "a binary manifest": ("manifest.json", lambda _: bytes(range(256))),
    "a list": ("manifest.json", lambda content: b"[" + content + b"]"),
    "no counts": ("manifest.json", without("counts")),
    "no counts and no seal": ("manifest.json", lambda content: without("checksum")(without("counts")(content))),
    "other counts": ("manifest.json", lambda content: content.replace(b'"kept": 14', b'"kept": 13')),
    "counts of words": (
        "manifest.json",
        lambda content: json.dumps({**json.loads(without("checksum")(content)), "counts": "many"}).encode(),
    ),
    "no sha256": ("manifest.json", without("sha256")),
    "no identity": ("manifest.json", without("identity")),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_answers_are_made_again_and_never_learned(tmp_path: Path, asked: list[int], name: str) -> None:
    rows, about = answered(tmp_path)
    suffix, change = DAMAGE[name]
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    (path,) = (path for path in kept if path.name == f"{about['fingerprint']}.{suffix}")
    path.unlink()
    if change is not None:
        path.write_bytes(change(kept[path]))
        assert path.read_bytes() != kept[path]
    asked.clear()
    assert answered(tmp_path) == (rows, about) and sum(asked) == 14
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == kept
    assert answered(tmp_path)[1]["cached"] and sum(asked) == 14


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": 2}', None])
def test_unfinished_answers_of_who_knows_what_are_begun_anew(
    tmp_path: Path, asked: list[int], content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = answered(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerBlocks, "finish", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            answered(tmp_path)
    (folder,) = (tmp_path / "cache").iterdir()
    settings = folder / "settings.json"
    settings.unlink()
    if content is not None:
        settings.write_bytes(content)
    asked.clear()
    assert answered(tmp_path)[0] == whole and sum(asked) == 14 and cached(tmp_path) == [".jsonl", ".manifest.json"]


def test_nobody_else_may_read_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are text of a user; also where the folder of the cache is open to all, and while they are made."""
    write, modes = AnswerBlocks.write, []

    def look(self: AnswerBlocks, number: int, *rest: Any) -> None:
        write(self, number, *rest)
        modes.append(stat.S_IMODE(self.folder.stat().st_mode))

    monkeypatch.setattr(AnswerBlocks, "write", look)
    before = os.umask(0o022)
    try:
        answered(tmp_path / "a")
        (tmp_path / "b" / "cache").mkdir(parents=True)
        answered(tmp_path / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "cache").stat().st_mode) == 0o700 and {*modes} == {0o700}
    for path in (*(tmp_path / "a" / "cache").iterdir(), *(tmp_path / "b" / "cache").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_filters_leave_rows_out_and_count_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut answer is kept, as far as it goes: no end of turn is learned behind it. Or it is dropped."""
    tokenizer, init = tiny_tokenizer(), road.Answerer.__init__
    said = {"0": ("A fig.", True), "1": ("", True), "2": ("A fig and a pl", False), "3": ("so it goes on, " * 8, True)}

    def answer(model: Any, prompts: Any, *_: Any, row_keys: Any, **__: Any) -> list[Generated]:
        return [
            Generated(tokenizer(text)["input_ids"], end)
            for text, end in (said.get(key, said["0"]) for key in row_keys)
        ]

    def stand_in(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **{**options, "answer": answer})

    monkeypatch.setattr(road.Answerer, "__init__", stand_in)
    rows, about = answered(tmp_path)
    counts = about["counts"]
    assert [k for k, row in enumerate(rows) if row is None] == [1, 3] and about["answered"] == 12
    assert (counts["empty"], counts["cut"], counts["repeating"], counts["kept_cut"]) == (1, 0, 1, 1)
    kept = [row for row in rows[:4] if row is not None]
    encoded, _ = encode_rows(kept, tokenizer, get_template("plain"), max_length=64, max_prompt_length=32)
    ends = [encoded[k]["labels"][-1] == tokenizer.eos_token_id for k in range(2)]
    assert ends == [True, False] and tokenizer.decode(encoded[1]["labels"][-2:]).endswith("pl")
    dropped, about = answered(tmp_path, cut_answers="drop", max_repetition=1.0)
    assert [k for k, row in enumerate(dropped) if row is None] == [1, 2] and about["counts"]["cut"] == 1


def test_the_file_of_answers_says_what_made_them(tmp_path: Path) -> None:
    _, about = answered(tmp_path)
    manifest = json.loads((tmp_path / "cache" / f"{about['fingerprint']}.manifest.json").read_text())
    assert manifest["counts"] == about["counts"] and manifest["identity"]["teacher"]["weights"].startswith("xxh3:")
    assert str(tmp_path) not in json.dumps(manifest)
