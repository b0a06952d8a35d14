"""Write the quickstart's instruction set: `recipes/data/quickstart_train.jsonl` and `quickstart_validation.jsonl`.

    dts-hf prepare quickstart            # write both files into recipes/data
    dts-hf prepare quickstart --check    # only say whether the files are up to date

Everything is our own: the topics, sentences, passages and answers were written by hand for this project and lie in
`quickstart_lists/*.txt` (one entry a line, fields separated by ` | `); the word problems and the sentences to extract
from are computed from the word lists below. No network, no other data set, no model. The same input gives the same
bytes.

A row is `{id, kind, instruction, input, output}`. The output is a short correct answer, so that the files are a valid
data set by themselves; the quickstart recipe replaces it by the teacher's own answer (`data.responses: teacher`).

Split rule: a line (or a list member) that begins with a star is held out. All rows made from it go to the validation
file and none to the training file, so the held-out rows have the same kinds and wording as the training rows, but
other topics, passages, names and things. Every kind has four held-out rows.

Order: the kinds take turns, so that the first n rows of either file are a balanced sample.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from dts_hf.console import show
from dts_hf.data_prep.arguments import described, run
from dts_hf.errors import UserError
from dts_hf.files import check_output_folder, write_text_atomic

HERE = Path(__file__).resolve().parent
LISTS = HERE / "quickstart_lists"
OUTPUT = Path("recipes", "data")
TRAIN = "quickstart_train.jsonl"
VALIDATION = "quickstart_validation.jsonl"
SEED = 20
ARITHMETIC_ROWS = 66
EXTRACTION_ROWS = 66
HELD_OUT_PER_KIND = 4

# People, things and cities of the computed kinds; the second tuple of each pair is held out.
PEOPLE = (
    ("Tom", "he"), ("Anna", "she"), ("Ben", "he"), ("Clara", "she"), ("David", "he"), ("Eva", "she"),
    ("Felix", "he"), ("Grace", "she"), ("Hugo", "he"), ("Ida", "she"), ("Jack", "he"), ("Lena", "she"),
    ("Martin", "he"), ("Nora", "she"), ("Oscar", "he"), ("Rosa", "she"),
), (("Victor", "he"), ("Wanda", "she"), ("Simon", "he"), ("Paula", "she"))  # fmt: skip
THINGS = (
    ("apples", "pens", "books", "coins", "stamps", "eggs", "balls", "cards", "pears", "shells", "cups", "tickets"),
    ("buttons", "marbles", "candles", "plates"),
)
CONTAINERS = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("drawer", "drawers")), (("jar", "jars"),)
CITIES = (
    ("Lisbon", "Oslo", "Leeds", "Vienna", "Dublin", "Prague", "Boston", "Madrid", "Turin", "Lyon", "Bergen", "Cork"),
    ("Geneva", "Porto", "Bristol", "Malaga"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DEEDS = (
    ("bought", "buy", "a red bicycle"), ("sold", "sell", "an old piano"), ("found", "find", "a silver ring"),
    ("lost", "lose", "a brown wallet"), ("repaired", "repair", "a broken clock"), ("painted", "paint", "a white door"),
    ("borrowed", "borrow", "a large tent"), ("baked", "bake", "a plum cake"), ("built", "build", "a bird house"),
    ("visited", "visit", "a small museum"), ("met", "meet", "an old friend"), ("opened", "open", "a flower shop"),
    ("rented", "rent", "a blue van"), ("watched", "watch", "a football match"), ("ordered", "order", "a fish soup"),
    ("wrote", "write", "a long letter"), ("cleaned", "clean", "a dusty attic"), ("saw", "see", "a rare bird"),
), (
    ("knitted", "knit", "a warm scarf"), ("caught", "catch", "a big trout"),
    ("tested", "test", "a solar lamp"), ("planted", "plant", "a fig tree"),
)  # fmt: skip


class Item(NamedTuple):
    """One task before it gets its id; `topic` is what the split rule keeps apart."""

    kind: str
    topic: str
    held_out: bool
    instruction: str
    input: str
    output: str


class Entry(NamedTuple):
    """One line of a list: its fields, and whether it begins with a star."""

    fields: tuple[str, ...]
    held_out: bool


def read_list(name: str) -> list[Entry]:
    """Entries of `quickstart_lists/<name>.txt`, without comments and empty lines."""
    entries = []
    for line in (LISTS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            fields = tuple(field.strip() for field in line.removeprefix("*").split(" | "))
            entries.append(Entry(fields, line.startswith("*")))
    return entries


def sentence(text: str) -> str:
    """`text` with a capital first letter and a full stop."""
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def from_list(kind: str, name: str, build: Callable[..., tuple[str, str, str]]) -> Iterator[Item]:
    """One item for every entry; `build(*fields)` gives instruction, input and output."""
    for fields, held_out in read_list(name):
        yield Item(kind, fields[0], held_out, *build(*fields))


def question_answering() -> Iterator[Item]:
    """Capitals, and what people of a job do."""
    yield from from_list(
        "question_answering",
        "capitals",
        lambda country, city: (f"What is the capital of {country}?", "", f"The capital of {country} is {city}."),
    )
    yield from from_list(
        "question_answering",
        "occupations",
        lambda job, deed: (f"What does {job} do? Answer in one sentence.", "", sentence(f"{job} {deed}")),
    )


def definition() -> Iterator[Item]:
    """What a thing or an idea is."""
    for number, (fields, held_out) in enumerate(read_list("definitions")):
        thing, meaning = fields
        word = re.sub(r"^(an?|the) ", "", thing)
        ask = (
            f"What is {thing}? Answer in one sentence." if number % 3 else f"Define the term '{word}' in one sentence."
        )
        yield Item("definition", thing, held_out, ask, "", sentence(meaning))


def explanation() -> Iterator[Item]:
    """Why something is so, how it works, why it matters."""
    yield from from_list(
        "explanation", "explanations", lambda clause, answer: (f"Explain in one sentence {clause}.", "", answer)
    )
    yield from from_list(
        "explanation",
        "importance",
        lambda thing, reason: (
            f"Why is {thing} important? Answer in one sentence.",
            "",
            sentence(f"{thing} is important because {reason}"),
        ),
    )


def purpose() -> Iterator[Item]:
    """What a thing is used for."""
    for (thing, use), held_out in read_list("purposes"):
        verb = "are" if thing in {"scissors", "sunglasses"} else "is"
        ask = f"What {verb} {thing} used for? Answer in one sentence."
        yield Item("purpose", thing, held_out, ask, "", sentence(f"{thing} {verb} used to {use}"))


def classification() -> Iterator[Item]:
    """What kind of thing something is."""
    for (category, members), _ in read_list("categories"):
        for member in members.split(", "):
            thing = member.removeprefix("*")
            ask = f"What kind of thing is {thing}? Answer in one sentence."
            yield Item("classification", thing, member[0] == "*", ask, "", sentence(f"{thing} is {category}"))


def rewriting() -> Iterator[Item]:
    """Past tense, and shorter sentences."""
    yield from from_list(
        "rewriting", "past_tense", lambda now, past: ("Rewrite the sentence in the past tense.", now, past)
    )
    yield from from_list("rewriting", "shorter", lambda long, short: ("Make this sentence shorter.", long, short))


def extraction() -> Iterator[Item]:
    """Who, what, where or when, from a sentence."""
    rng = random.Random(SEED)
    for held_out, rows in ((False, EXTRACTION_ROWS), (True, HELD_OUT_PER_KIND)):
        part = int(held_out)
        deeds = [DEEDS[part][n % len(DEEDS[part])] for n in range(rows)]
        for number, (past, verb, thing) in enumerate(deeds):
            name, _ = rng.choice(PEOPLE[part])
            city, day = rng.choice(CITIES[part]), rng.choice(DAYS)
            question, answer = (
                (f"Who {past} {thing}?", f"{name} {past} {thing}."),
                (f"What did {name} {verb}?", f"{name} {past} {thing}."),
                (f"Where did {name} {verb} {thing}?", f"{name} {past} {thing} in {city}."),
                (f"When did {name} {verb} {thing}?", f"{name} {past} {thing} on {day}."),
            )[(number + number // len(DEEDS[part])) % 4]
            text = f"On {day} {name} {past} {thing} in {city}."
            yield Item("extraction", text, held_out, f"{question} Answer in one sentence.", text, answer)


def word_problem(form: int, rng: random.Random, part: int) -> tuple[str, str]:
    """A word problem (0 adds, 1 subtracts, 2 multiplies) and its answer."""
    name, pronoun = rng.choice(PEOPLE[part])
    things = rng.choice(THINGS[part])
    if form == 0:
        a, b = rng.randint(2, 12), rng.randint(2, 9)
        story = f"{name} has {a} {things} and buys {b} more"
        answer = f"{story}, so {pronoun} has {a} + {b} = {a + b} {things} now."
    elif form == 1:
        a = rng.randint(5, 20)
        b = rng.randint(2, a - 2)
        story = f"{name} has {a} {things} and gives {b} away"
        answer = f"{story}, so {pronoun} has {a} - {b} = {a - b} {things} now."
    else:
        one, many = rng.choice(CONTAINERS[part])
        a, b = rng.randint(3, 12), rng.randint(2, 6)
        story = f"{name} has {b} {many} with {a} {things} in each {one}"
        answer = f"{story}, so {pronoun} has {b} * {a} = {a * b} {things} now."
    return f"{story}. How many {things} does {pronoun} have now?", answer


def arithmetic() -> Iterator[Item]:
    """Word problems."""
    rng = random.Random(SEED)
    for held_out, rows in ((False, ARITHMETIC_ROWS), (True, HELD_OUT_PER_KIND)):
        seen: set[str] = set()
        while len(seen) < rows:
            problem, answer = word_problem(len(seen) % 3, rng, int(held_out))
            if problem not in seen:
                seen.add(problem)
                yield Item(
                    "arithmetic", problem, held_out, f"{problem} Show the calculation in one sentence.", "", answer
                )


def lists() -> Iterator[Item]:
    """Three members of a group."""
    for (group, members), held_out in read_list("lists"):
        which = group if group.startswith(("largest", "longest")) else f"most common {group}"
        ask = f"What are the three {which}? Answer in one sentence."
        answer = f"The three {which} are" if which == group else f"Three common {group} are"
        yield Item("list", group, held_out, ask, "", f"{answer} {members}.")


def summary() -> Iterator[Item]:
    """One-sentence summaries and titles."""
    yield from from_list(
        "summary", "passages", lambda passage, _title, short: ("Summarize the text in one sentence.", passage, short)
    )
    yield from from_list(
        "summary", "passages", lambda passage, title, _short: ("Write a short title for this text.", passage, title)
    )


def style() -> Iterator[Item]:
    """More formal, more vivid."""
    yield from from_list("style", "formal", lambda plain, formal: ("Make this sentence more formal.", plain, formal))
    yield from from_list(
        "style",
        "vivid",
        lambda plain, vivid: ("Replace the simple words in this sentence with more vivid words.", plain, vivid),
    )


def code() -> Iterator[Item]:
    """What a piece of Python does, what a term means."""
    yield from from_list(
        "code",
        "code",
        lambda source, answer: (
            "Explain in one sentence what this Python code does.",
            source.replace("\\n", "\n"),
            answer,
        ),
    )
    yield from from_list(
        "code",
        "code_terms",
        lambda term, meaning: (f"What is {term} in Python? Answer in one sentence.", "", sentence(meaning)),
    )


def comparison() -> Iterator[Item]:
    """The main difference between two things."""
    yield from from_list(
        "comparison",
        "differences",
        lambda one, two, is_one, is_two: (
            f"What is the main difference between {one} and {two}? Answer in one sentence.",
            "",
            f"{sentence(one)[:-1]} {is_one}, while {two} {is_two}.",
        ),
    )


def advice() -> Iterator[Item]:
    """Tips and advantages."""
    yield from from_list(
        "advice",
        "advice",
        lambda goal, tip: (
            f"How can I {goal}? Answer in one sentence.",
            "",
            f"To {goal.replace('my ', 'your ')}, {tip}.",
        ),
    )
    yield from from_list(
        "advice",
        "advantages",
        lambda thing, gain: (
            f"Name one advantage of {thing} in one sentence.",
            "",
            f"One advantage of {thing} is that {gain}.",
        ),
    )


def how_to() -> Iterator[Item]:
    """The first step of a task."""
    yield from from_list(
        "how_to",
        "first_steps",
        lambda task, step: (
            f"What should I do first if I want to {task}? Answer in one sentence.",
            "",
            f"To {task}, first {step}.",
        ),
    )


def opposite() -> Iterator[Item]:
    """Sentences completed with an opposite."""
    yield from from_list(
        "opposite",
        "opposites",
        lambda word, other: (
            f"Complete the sentence: The opposite of '{word}' is",
            "",
            f"The opposite of '{word}' is '{other}'.",
        ),
    )


KINDS: tuple[Callable[[], Iterator[Item]], ...] = (
    question_answering,
    definition,
    explanation,
    purpose,
    classification,
    rewriting,
    extraction,
    arithmetic,
    lists,
    summary,
    style,
    code,
    comparison,
    advice,
    how_to,
    opposite,
)


def all_items() -> list[Item]:
    """Every item of both splits, kind by kind in the order of the lists."""
    return [item for kind in KINDS for item in kind()]


def rows(items: list[Item], *, held_out: bool) -> list[dict[str, str]]:
    """The rows of one split; the kinds take turns, each in a shuffled order."""
    rng = random.Random(SEED)
    by_kind: dict[str, list[dict[str, str]]] = {}
    for item in items:
        if item.held_out == held_out:
            group = by_kind.setdefault(item.kind, [])
            name = f"{item.kind}-{'held' if held_out else 'train'}-{len(group) + 1:03d}"
            text = {"instruction": item.instruction, "input": item.input, "output": item.output}
            group.append({"id": name, "kind": item.kind, **text})
    for group in by_kind.values():
        rng.shuffle(group)
    return [row for turn in zip_longest(*by_kind.values()) for row in turn if row is not None]


def build() -> dict[str, str]:
    """Text of both files by file name."""
    items = all_items()
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(items, held_out=held_out))
        for name, held_out in ((TRAIN, False), (VALIDATION, True))
    }


def arguments() -> argparse.ArgumentParser:
    """The options of ``dts-hf prepare quickstart``."""
    parser = described(__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the two files (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is missing or differs")
    return parser


def prepare(arguments: argparse.Namespace) -> None:
    """Write both files, or compare them.

    Raises:
        UserError: with ``--check``, a file is missing or differs; else the folder cannot be written.
    """
    if not arguments.check:
        check_output_folder(arguments.output)
    stale = []
    for name, text in build().items():
        path = arguments.output / name
        if arguments.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(str(path))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, text)
            show(f"{path}: {text.count(chr(10))} rows")
    if stale:
        raise UserError(f"{', '.join(stale)}: differs from the lists: run dts-hf prepare quickstart")


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set with command-line options; the exit status."""
    return run(prepare, arguments().parse_args(argv))
