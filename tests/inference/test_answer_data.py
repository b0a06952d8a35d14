"""``dts-hf generate --for-training``: rows to train on that no kill, no number of processes and no batch size changes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dts_hf.cli import app as cli
from dts_hf.data.sources import load_rows
from dts_hf.errors import UserError
from dts_hf.files import file_sha256
from dts_hf.generation import answers as road
from dts_hf.generation.answers import AnswerSettings
from dts_hf.generation.engine import Generated, GenerationSettings
from dts_hf.inference import answer_data as road_of_rows
from dts_hf.inference.answer_data import AnswerDataOptions, write_answer_data
from tests.support.launching import WORKERS
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.warm import run_warm

ROWS = [
    {"id": f"r{k}", "instruction": f"Say {'it ' * (k % 4)}{k}", "output": f"yes {k}", "topic": k % 3}
    for k in range(21)
]
SAMPLING = ("--temperature", "2.5", "--max-new-tokens", "8", "--batch-size", "4", "--max-repetition", "1")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def generated(*arguments: str) -> str:
    """What the command says, once it has succeeded."""
    done = invoke("generate", "model", "--data", "rows.jsonl", *arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: str, model: str = "model", data: str = "rows.jsonl") -> str:
    done = invoke("generate", model, "--data", data, *arguments)
    assert done.exit_code == 2, done.output
    return " ".join(done.stderr.split())


def write(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    tiny_llama(seed=0).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    write("rows.jsonl", ROWS)
    return tmp_path


def settings(**values: Any) -> AnswerSettings:
    generation = {
        "max_new_tokens": 8,
        "batch_size": 4,
        "do_sample": True,
        "temperature": 2.5,
        **values.pop("generation", {}),
    }
    return AnswerSettings(GenerationSettings(**generation), **{"cut": "keep", "max_repetition": 1.0, **values})


def written(
    out: str, model: str = "model", data: str = "rows.jsonl", **values: Any
) -> tuple[bytes, Mapping[str, Any]]:
    names = {"scorer", "overwrite", "rows"} & values.keys()
    options = {name: values.pop(name) for name in names}
    manifest, _ = write_answer_data(model, AnswerDataOptions(data, Path(out), settings(**values), **options))
    return Path(out).read_bytes(), manifest


# -------------------------------------------------------------------------------------------------------------- the rows


def test_rows_keep_their_columns_and_are_trained_on_as_they_are(place: Path) -> None:
    said = generated(
        "--for-training",
        "--output",
        "new/a.jsonl",
        *SAMPLING,
        "--max-new-tokens",
        "60",
        "--cut",
        "keep",
        "--answers",
        "2",
    )
    rows, manifest = read("new/a.jsonl"), json.loads(Path("new/a.manifest.json").read_text())
    assert "of 42 answers to 21 rows kept" in said and sorted(path.name for path in Path("new").iterdir()) == [
        "a.jsonl", "a.manifest.json"]  # fmt: skip
    assert len(rows) == manifest["counts"]["kept"] > 20 and manifest["sha256"] == file_sha256("new/a.jsonl")
    by_id = {row["id"]: row for row in ROWS}
    for row in rows:
        before = by_id[row["source_id"]]
        assert (row["instruction"], row["topic"]) == (before["instruction"], before["topic"])
        assert row["original_response"] == before["output"] != row["output"]
    places = [(int(row["source_id"][1:]), row["id"]) for row in rows]
    assert places == sorted(places, key=lambda one: one[0]) and len({name for _, name in places}) == len(rows)
    again = load_rows("new/a.jsonl")
    assert [row.response for row in again] == [row["output"] for row in rows]
    assert [row.cut for row in again] == [row["finish_reason"] == "length" for row in rows]
    assert {row.cut for row in again} == {True, False}
    identity = manifest["identity"]
    assert identity["model"]["name"] == "model" and identity["model"]["weights"].startswith("xxh3:")
    assert identity["model"]["template"]["name"] == "chat" and identity["settings"]["temperature"] == 2.5


def test_a_student_is_trained_on_what_was_written(place: Path) -> None:
    from dts_hf.distill import distill
    from dts_hf.recipe.schema import Recipe

    generated("--for-training", "--output", "a.jsonl", *SAMPLING, "--cut", "keep")
    recipe = Recipe.from_dict(
        {
            "student": {"init": {"from": "teacher", "layers": 1}},
            "teacher": {"model": "model"},
            "data": {"train": "a.jsonl", "max_length": 64, "max_prompt_length": 48},
            "training": {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"},
            "output": {"dir": "run", "report": False},
        }
    )
    assert distill(recipe).read_data_manifest()["splits"]["train"]["kept"] == len(read("a.jsonl"))


def test_k_answers_have_noise_of_their_own_and_the_first_is_the_one_alone(place: Path) -> None:
    written("one.jsonl")
    three, _ = written("three.jsonl", answers=3)
    again, _ = written("again.jsonl", answers=3)
    other, _ = written("other.jsonl", answers=3, generation={"seed": 11})
    assert three == again != other
    texts: dict[str, dict[int, str]] = {}
    for row in read("three.jsonl"):
        texts.setdefault(row["source_id"], {})[int(row["id"].rpartition("#")[2])] = row["output"]
    assert sum(len({*found.values()}) > 1 for found in texts.values()) > 10
    assert {row["id"]: row["output"] for row in read("one.jsonl")} == {
        name: found[1] for name, found in texts.items() if 1 in found
    }


def test_neither_batch_size_nor_order_of_rows_changes_an_answer(place: Path) -> None:
    first, _ = written("first.jsonl", answers=2)
    for size in (1, 7, 64):
        assert written(f"{size}.jsonl", answers=2, generation={"batch_size": size})[0] == first
    write("back.jsonl", ROWS[::-1])
    back = written("other.jsonl", data="back.jsonl", answers=2)[0]
    assert sorted(back.splitlines()) == sorted(first.splitlines()) and back != first


def test_prompts_alone_and_rows_without_ids_are_answered(place: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": "Name a fruit"},
        {"question": "Name two", "answer": None, "level": 3},
        {"messages": [{"role": "user", "content": "Say yes"}]},
        {"prompt": "Once upon", "completion": ""},
        {"conversations": [{"from": "human", "value": "Say no"}]},
    ]
    write("asked.jsonl", asked)
    written("a.jsonl", data="asked.jsonl", generation={"max_new_tokens": 12, "seed": 4})
    rows = read("a.jsonl")
    assert [row["id"] for row in rows] == [f"asked-{k}" for k in range(1, 6)]
    assert rows[1]["level"] == 3 and not any("original_response" in row for row in rows)
    again = load_rows("a.jsonl")
    assert [row.instruction for row in again] == ["Name a fruit", "Name two", "Say yes", "Once upon", "Say no"]
    assert [row.kind for row in again] == ["instruction", "instruction", "messages", "prompt", "messages"]


# --------------------------------------------------------------------------------------------------------------- filters


def test_answers_of_each_fault_are_left_out_and_counted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    said = {
        "r0": ("Apples and pears grow on trees, plums do, too.", True),
        "r1": ("", True),
        "r2": ("Apples and pears gr", False),
        "r3": ("I do not know. " * 12, True),
        "r4": ("no no", True),  # too short to be judged
        "r5": ("   \n", True),
        "r6": ("so it goes on, so it goes on, " * 8, False),  # cut comes before repeating
    }

    def answer(model: Any, prompts: Any, *_: Any, row_keys: Sequence[str], **__: Any) -> list[Generated]:
        return [Generated(tokenizer(said[key][0])["input_ids"], said[key][1]) for key in row_keys]

    monkeypatch.setattr(road.Answerer, "__init__", _with_answer(road.Answerer.__init__, answer))
    write("rows.jsonl", [*ROWS[:7], {"id": "long", "instruction": "Say " * 2000, "output": "no"}])
    line = generated("--for-training", "--output", "drop.jsonl").strip()
    counts = json.loads(Path("drop.manifest.json").read_text())["counts"]
    assert [row["output"] for row in read("drop.jsonl")] == [said["r0"][0], said["r4"][0]]
    assert counts == {
        "rows": 8, "no_prompt": 1, "generated": 7, "empty": 2, "cut": 2, "repeating": 1, "not_best": 0, "kept": 2,
        "kept_cut": 0, "rows_answered": 2, "without_answer": ["r1", "r2", "r3", "r5", "r6"],
    }  # fmt: skip
    for words in (
        "empty: 2",
        "cut at the limit: 2",
        "repeating themselves: 1",
        "do not fit: 1",
        "6 (r1, r2, r3, r5, r6, ...)",
    ):
        assert words in line, line
    generated("--for-training", "--output", "keep.jsonl", "--cut", "keep", "--max-repetition", "1")
    kept = read("keep.jsonl")
    assert [row["id"] for row in kept] == ["r0", "r2", "r3", "r4", "r6"]
    assert [row["finish_reason"] for row in kept] == ["stop", "length", "stop", "stop", "length"]


def _with_answer(init: Any, answer: Any) -> Any:
    def stand_in(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **{**options, "answer": answer})

    return stand_in


def test_answers_get_no_id_that_another_row_has(place: Path) -> None:
    write("rows.jsonl", [{**ROWS[0], "id": "x#2"}, {**ROWS[1], "id": "x"}])
    several = ("--for-training", "--output", "a.jsonl", *SAMPLING, "--cut", "keep", "--answers")
    said = refused(*several, "2", model="no-such-model")
    assert "row 1 has the id 'x#2', which answer 2 to row 'x' would get, too" in said
    generated(*several, "2", "--best-of", "mean")  # one answer keeps the id of its row
    assert [row["id"] for row in read("a.jsonl")] == ["x#2", "x"]
    write("rows.jsonl", [{**ROWS[0], "id": "x#3"}, {**ROWS[1], "id": "x"}, {**ROWS[2], "id": "x#2#"}])
    generated(*several, "2", "--overwrite")
    ids = {(row["id"], row["source_id"]) for row in read("a.jsonl")}
    assert len(ids) == len(read("a.jsonl")) > 3 and all(mine.startswith(f"{of}#") for mine, of in ids)
    generated(*several[:2], "b.jsonl", *SAMPLING, "--cut", "keep", "--answers", "2", "--data", "a.jsonl")
    assert {row["source_id"] for row in read("b.jsonl")} <= {one for one, _ in ids}


@pytest.mark.parametrize(
    ("text", "finished", "advice"),
    [
        ("Apples and pears gr", False, "raise --max-new-tokens, or keep answers without an end with --cut keep"),
        ("so it goes on, " * 8, True, "keep them with --max-repetition 1"),
        ("", True, "look at its prompt template"),
    ],
)
def test_a_file_without_a_row_is_a_failure_with_advice(
    place: Path, monkeypatch: pytest.MonkeyPatch, text: str, finished: bool, advice: str
) -> None:
    def answer(model: Any, prompts: Any, *_: Any, **__: Any) -> list[Generated]:
        return [Generated(tiny_tokenizer()(text)["input_ids"], finished) for _ in prompts]

    monkeypatch.setattr(road.Answerer, "__init__", _with_answer(road.Answerer.__init__, answer))
    for there in ("", "there already: "):
        done = invoke("generate", "model", "--data", "rows.jsonl", "--for-training", "--output", "a.jsonl")
        assert done.exit_code == 1 and f"a.jsonl: {there}0 of 21 answers" in done.stdout
        said = " ".join(done.stderr.split())
        assert "a.jsonl: no answer was kept" in said and advice in said and "Traceback" not in said
    if not finished:
        assert len(read("a.jsonl")) == 0
        generated("--for-training", "--output", "a.jsonl", "--cut", "keep", "--overwrite")
        assert len(read("a.jsonl")) == 21


def test_an_input_that_would_be_shortened_is_no_prompt(place: Path) -> None:
    """The row keeps all of its input, so an answer to half of it would be an answer to something else."""
    write("rows.jsonl", [{**ROWS[0], "input": "of the sea " * 900}, ROWS[1]])
    written("a.jsonl", generation={"max_new_tokens": 12, "seed": 4})
    assert [row["id"] for row in read("a.jsonl")] == ["r1"]


# -------------------------------------------------------------------------------------------------------------- best of


def dense_log_probability(
    model: Any, tokenizer: Any, row: Mapping[str, Any], answer: str, cut: bool
) -> tuple[float, int]:
    """Sum and count in float64, from the whole [1, T, V] logits and the chat format written out by hand."""
    prompt = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
    read_, learned = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer + "<|im_end|>" * (not cut))
    )
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([read_ + learned])).logits[0]
    probabilities = torch.log_softmax(logits, -1)
    found = [float(probabilities[len(read_) + k - 1, token]) for k, token in enumerate(learned)]
    return sum(found), len(found)


@pytest.mark.parametrize("scorer", [None, "scorer"])
@pytest.mark.parametrize("rule", ["mean", "sum"])
def test_the_best_answer_is_that_of_a_dense_recomputation(place: Path, scorer: str | None, rule: str) -> None:
    tiny_gpt2(seed=5).save_pretrained("scorer")
    tiny_tokenizer(pad="own").save_pretrained("scorer")
    model = tiny_gpt2(seed=5) if scorer else tiny_llama(seed=0)
    written("all.jsonl", answers=4)
    chosen: dict[str, str] = {}
    for row in ROWS:
        mine = [one for one in read("all.jsonl") if one["source_id"] == row["id"]]
        found = [
            dense_log_probability(model, tiny_tokenizer(), row, one["output"], one["finish_reason"] == "length")
            for one in mine
        ]
        scores = [total / (count if rule == "mean" else 1) for total, count in found]
        chosen[str(row["id"])] = mine[scores.index(max(scores))]["output"]
    _, manifest = written("best.jsonl", answers=4, best_of=rule, scorer=scorer)
    assert {row["id"]: row["output"] for row in read("best.jsonl")} == chosen
    assert manifest["counts"]["not_best"] == manifest["counts"]["generated"] - 21 - manifest["counts"]["empty"]
    assert ("scorer" in manifest["identity"]) == (scorer is not None)


# ---------------------------------------------------------------------------------------------- killed, shared, gone on


def work(place: Path, *arguments: str, world: int = 1, timeout: float = 280) -> str:
    done = run_warm(WORKERS / "answers_worker.py", world, arguments, cwd=place, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def same(one: str, other: str) -> bool:
    """Rows and manifest alike, but for the name in it, and nothing beside them."""
    whole, made = (Path(name) for name in (one, other))
    manifests = [json.loads(path.with_suffix(".manifest.json").read_text()) for path in (whole, made)]
    for manifest in manifests:
        manifest.pop("file")
        manifest.pop("checksum")  # of the name, too
    left = list(made.parent.glob(f"{made.stem}*"))
    return whole.read_bytes() == made.read_bytes() and manifests[0] == manifests[1] and len(left) == 2


@pytest.mark.slow
def test_kills_leave_no_trace_in_what_comes_out(place: Path) -> None:
    work(place, "kill", "0", "2", "1")
    assert same("whole.jsonl", "killed.jsonl") and len(read("whole.jsonl")) > 20


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_ten_kills_at_random_and_one_at_each_moment(place: Path, seed: int) -> None:
    write("rows.jsonl", [{**row, "id": f"{row['id']}-{k}"} for k in range(8) for row in ROWS])
    out = work(place, "kill", str(seed + 1), "1", "10", timeout=900)
    assert same("whole.jsonl", "killed.jsonl"), out
    if seed == 0:
        write("rows.jsonl", ROWS)
        for path in (*Path().glob("whole*"), *Path().glob("killed*")):
            path.unlink()
        work(place, "kill", "0", "0", "0", timeout=900)
        assert all(same("whole.jsonl", str(path)) for path in Path().glob("at-*/killed.jsonl"))


def test_two_processes_write_the_bytes_of_one(place: Path) -> None:
    alone, _ = written("one.jsonl", answers=2)
    work(place, "share", "two.jsonl", world=2)
    assert Path("two.jsonl").read_bytes() == alone and same("one.jsonl", "two.jsonl")


def half_done(monkeypatch: pytest.MonkeyPatch, out: str, **values: Any) -> None:
    """Leave what a call leaves that was killed in its third block."""
    write_block = road.AnswerBlocks.write

    def dies(self: Any, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write_block(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(road.AnswerBlocks, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            written(out, **values)
    assert sorted(path.name for path in Path(f"{out}.unfinished").iterdir()) == [
        "00000000.block", "00000001.block", "settings.json"]  # fmt: skip


def test_what_is_there_is_not_made_again_and_what_is_damaged_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = written("whole.jsonl", answers=2)
    half_done(monkeypatch, "a.jsonl", answers=2)
    block = Path("a.jsonl.unfinished/00000001.block")
    content = bytearray(block.read_bytes())
    content[-9] ^= 1
    block.write_bytes(bytes(content))
    asked, original = [], road.generate

    def counted(model: Any, prompts: Any, *rest: Any, **options: Any) -> list[Generated]:
        asked.append(len(prompts))
        return original(model, prompts, *rest, **options)

    monkeypatch.setattr(road.Answerer, "__init__", _with_answer(road.Answerer.__init__, counted))
    assert written("a.jsonl", answers=2)[0] == whole and asked == [16, 10]
    assert generated("--for-training", "--output", "a.jsonl", *SAMPLING, "--cut", "keep", "--answers", "2").startswith(
        "a.jsonl: there already"
    )
    assert asked == [16, 10]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--seed", "3"), "settings.seed: 10, now 3"),
        (("--template", "plain"), 'model.template.name: "chat", now "plain"'),
        (("--rows", "5"), "data.rows: 21, now 5"),
        (("--answers", "3"), "settings.answers: 2, now 3"),
    ],
)
def test_other_settings_do_not_go_on_with_what_was_begun(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, ...], words: str
) -> None:
    same_as_begun = (*SAMPLING, "--cut", "keep", "--answers", "2", "--for-training", "--output", "a.jsonl")
    half_done(monkeypatch, "a.jsonl", answers=2)
    before = {path: path.read_bytes() for path in Path("a.jsonl.unfinished").iterdir()}
    said = refused(*same_as_begun, *change)
    assert words in said and "unfinished rows of other settings" in said and "--overwrite" in said
    assert {path: path.read_bytes() for path in Path("a.jsonl.unfinished").iterdir()} == before
    generated(*same_as_begun, *change, "--overwrite")
    generated(*same_as_begun[:-1], "b.jsonl", *change)
    assert same("b.jsonl", "a.jsonl")


def test_another_model_or_changed_rows_do_not_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_done(monkeypatch, "a.jsonl", answers=2)
    command = (*SAMPLING, "--cut", "keep", "--answers", "2", "--for-training", "--output", "a.jsonl")
    tiny_llama(seed=1).save_pretrained("model")
    assert "model.weights" in refused(*command)
    tiny_llama(seed=0).save_pretrained("model")
    write("rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "topic": 9}])
    assert "data.sha256" in refused(*command)
    write("rows.jsonl", ROWS)
    generated(*command)


def test_a_file_that_is_not_its_own_is_never_replaced(place: Path) -> None:
    command = (*SAMPLING, "--cut", "keep", "--for-training", "--output")
    Path("mine.jsonl").write_text("mine\n")
    assert "does not say that its rows are ours" in refused(*command, "mine.jsonl", model="no-such-model")
    generated(*command, "a.jsonl")
    ours = Path("a.jsonl").read_bytes()
    assert "settings.seed: 10, now 3" in refused(*command, "a.jsonl", "--seed", "3")
    Path("a.jsonl").write_bytes(ours + b'{"instruction": "by hand", "output": "yes"}\n')
    assert "has been changed since it was written" in refused(*command, "a.jsonl")
    Path("folder.jsonl.unfinished").mkdir()
    Path("folder.jsonl.unfinished/notes.txt").write_text("mine")
    assert "holds no rows of ours" in refused(*command, "folder.jsonl")
    assert Path("mine.jsonl").read_text() == "mine\n" and Path("folder.jsonl.unfinished/notes.txt").is_file()
    generated(*command, "a.jsonl", "--overwrite")
    assert Path("a.jsonl").read_bytes() == ours


def test_a_file_that_appears_meanwhile_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_done(monkeypatch, "a.jsonl", answers=2)
    Path("a.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="is there now, and is not ours"):
        written("a.jsonl", answers=2)
    assert Path("a.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("values", [{"answers": 2}, {"answers": 2, "generation": {"seed": 99}, "overwrite": True}])
def test_a_second_call_for_the_same_file_is_refused_while_the_first_one_writes(
    place: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    """With the same settings, or with others and leave to replace the rows; before a model is loaded."""
    whole, _ = written("whole.jsonl", answers=2)
    write_block = road.AnswerBlocks.write
    refusals: list[int] = []

    def beside(self: Any, number: int, *rest: Any) -> None:
        write_block(self, number, *rest)
        with monkeypatch.context() as patch:
            patch.setattr(road_of_rows, "load_speaker", lambda *_, **__: pytest.fail("loaded"))
            with pytest.raises(UserError, match=r"--output: another process is writing a.jsonl. Wait for its end"):
                written("a.jsonl", **values)
        refusals.append(number)

    with monkeypatch.context() as patch:
        patch.setattr(road.AnswerBlocks, "write", beside)
        assert written("a.jsonl", answers=2)[0] == whole
    assert len(refusals) == 3 and same("whole.jsonl", "a.jsonl")
    if "overwrite" in values:  # once the other one has ended
        assert written("a.jsonl", **values)[0] != whole


def test_a_second_call_that_starts_in_the_same_moment_is_refused_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked, and loaded their models, before one of them makes the folder."""
    begin, inner = road.AnswerBlocks.begin, []

    def beside(self: Any, *rest: Any) -> Any:
        if not inner:
            inner.append(None)
            other = road.AnswerBlocks(Path("a.jsonl"))
            with monkeypatch.context() as patch:
                patch.setattr(self, "_check", lambda *_: "new")  # it has looked
                other.begin(*rest)
                with pytest.raises(UserError, match=r"another process is writing a.jsonl"):
                    begin(self, *rest)
            other.close()
        return begin(self, *rest)

    whole, _ = written("whole.jsonl", answers=2)
    monkeypatch.setattr(road.AnswerBlocks, "begin", beside)
    assert written("a.jsonl", answers=2)[0] == whole and inner and same("whole.jsonl", "a.jsonl")


def test_blocks_of_other_settings_are_made_again_or_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no locks, two calls may meet in one folder: their rows do not."""
    whole, _ = written("whole.jsonl", answers=2)
    half_done(monkeypatch, "other.jsonl", answers=2, generation={"seed": 99})
    half_done(monkeypatch, "a.jsonl", answers=2)
    block = "jsonl.unfinished/00000001.block"
    Path(f"a.{block}").write_bytes(Path(f"other.{block}").read_bytes())
    write_block = road.AnswerBlocks.write

    def meets(self: Any, number: int, *rest: Any) -> None:
        write_block(self, number, *rest)
        Path("a.jsonl.unfinished/00000000.block").write_bytes(
            Path("other.jsonl.unfinished/00000000.block").read_bytes()
        )

    with monkeypatch.context() as patch:
        patch.setattr(road.AnswerBlocks, "write", meets)
        with pytest.raises(UserError, match=r"00000000.block is gone or was changed .* Give the same command again"):
            written("a.jsonl", answers=2)
    assert not Path("a.jsonl").exists()
    assert written("a.jsonl", answers=2)[0] == whole and same("whole.jsonl", "a.jsonl")


def test_rows_that_change_while_they_are_answered_are_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_block = road.AnswerBlocks.write

    def meddles(self: Any, number: int, *rest: Any) -> None:
        if number == 0:
            with Path("rows.jsonl").open("a") as file:
                file.write(json.dumps({**ROWS[0], "id": "late"}) + "\n")
        write_block(self, number, *rest)

    monkeypatch.setattr(road.AnswerBlocks, "write", meddles)
    with pytest.raises(UserError, match="written to while its rows were answered"):
        written("a.jsonl", answers=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--answers", "2"), "--answers: is for rows to train on"),
        (("--for-training", "--output", "a.jsonl", "--answers", "2"), "with temperature 0"),
        (("--for-training", "--output", "a.jsonl", "--best-of", "mean", "--temperature", "1"), "one answer a row"),
        (("--for-training", "--output", "a.jsonl", "--scorer", "model"), "--best-of mean"),
        (("--top-p", "0.9"), "--top-p: is of sampling"),
        (("--top-p", "1.1"), "--top-p"),
        (("--top-p", "0", "--temperature", "1"), "top_p: got 0.0"),
        (("--for-training",), "--for-training: expected --data FILE, --output FILE.jsonl"),
        (("--for-training", "--output", "a.csv"), "JSON lines"),
        (("--for-training", "--output", "rows.jsonl"), "is a file of --data"),
        (("--for-training", "--output", "a.jsonl", "--prompt", "hello"), "no --prompt"),
    ],
)
def test_wrong_options_are_told_before_anything_is_loaded(place: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(*arguments, model="no-such-model")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROWS[0], {"id": "r1", "instruction": 3, "output": "x"}], "rows.jsonl: line 2"),
        ([ROWS[0], ROWS[0]], "rows 1 and 2 have the id 'r0'"),
        ([{"text": "Once upon a time"}], "is a text, which asks nothing"),
        ([{"topic": 1}], "no row format is whole"),
    ],
)
def test_wrong_rows_are_told_before_the_model_is_loaded(place: Path, rows: list[Any], words: str) -> None:
    write("rows.jsonl", rows)
    assert words in refused("--for-training", "--output", "a.jsonl", model="no-such-model")


def test_answers_of_all_tokens_are_those_of_before_top_p_was_known() -> None:
    """What was answered then is found again, and not answered anew."""
    known = settings().identity()
    assert "top_p" not in known["generation"] and known["generation"]["temperature"] == 2.5
    assert settings(generation={"top_p": 0.9}).identity()["generation"]["top_p"] == 0.9


def test_settings_say_what_they_expect() -> None:
    with pytest.raises(UserError, match=r"max_repetition: got 1\.5"):
        settings(max_repetition=1.5)
    with pytest.raises(UserError, match="answers: got 0"):
        settings(answers=0)
    assert dataclasses.replace(settings(), answers=100).block_rows == 1
