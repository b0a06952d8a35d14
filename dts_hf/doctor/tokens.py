"""Checks of everything between a row and its labels: tokenizers, special tokens, chat template, limits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from dts_hf.alignment.common import common_vocabulary
from dts_hf.alignment.rows import AlignmentReport
from dts_hf.data.chat_templates import Template, leading_special_ids, render_messages
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.mixture import is_mixed, summary
from dts_hf.data.rows import Row
from dts_hf.data.targets import TextCutter, from_difference
from dts_hf.doctor.diagnosis import Check
from dts_hf.errors import UserError
from dts_hf.models.pruning import evenly_spaced
from dts_hf.models.vocabulary import shared_prefix
from dts_hf.task import Rows

T = TypeVar("T")
#: Share of rows above which a warning is given.
MANY_ROWS = 0.05
#: Share of labels that are the same for a teacher with another tokenizer, below which a warning is given.
FEW_ALIGNED = 0.3
#: What too many rows suffer under a limit: code, text and advice by the name of their count in ``EncodingReport``.
LIMITS = {
    "cut": (
        "many-rows-cut",
        "lose the end of their answer at data.max_length",
        "Raise data.max_length, or use data.long_rows: drop",
    ),
    "dropped": ("many-rows-dropped", "are too long and left out", "Raise data.max_length and data.max_prompt_length"),
    "prompts_cut": (
        "many-inputs-cut",
        "have their input shortened to data.max_prompt_length",
        "Raise data.max_prompt_length: a question about a text that is not there teaches to make things up",
    ),
}


def spaced(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of ``items``, as far apart as possible."""
    return [items[index] for index in evenly_spaced(min(count, len(items)), len(items))]


# ---------------------------------------------------------------------------------------------------------- the rows


def check_rows(check: Check, rows: Rows) -> None:
    """Rows that are held out must not be trained on."""
    check.summary = f"{len(rows.train):,} to train on, {len(rows.validation):,} held out"
    check.values = {"train": len(rows.train), "validation": len(rows.validation)}
    if is_mixed(rows.train_parts):
        check.summary += f"; {summary(rows.train_parts)}"
        check.values["mixture"] = [part.described() for part in rows.train_parts]
    seen = {_question(row) for row in rows.train}
    leaked = [row.id for row in rows.validation if _question(row) in seen]
    check_leak(check, leaked, len(rows.validation), "prompts")


def check_leak(check: Check, leaked: Sequence[str], held_out: int, what: str) -> None:
    """Report rows that are both held out and trained on.

    Args:
        check: takes what is found.
        leaked: ids of these rows.
        held_out: how many are held out.
        what: they are, in words.
    """
    if leaked:
        check.warn(
            "leak",
            f"{len(leaked):,} of {held_out:,} held-out {what} are also in the training rows (such as '{leaked[0]}'): scores "
            "on them show what was learned by heart",
            "Take them out of data.validation",
        )


def _question(row: Row) -> tuple[Any, ...]:
    turns = tuple((message["role"], message["content"]) for message in row.messages or ())
    return (row.instruction, row.input, turns)


def check_limits(check: Check, data: EncodedDataset, rows: int) -> None:
    """How many rows the limits leave out or shorten; ``rows`` are all, ``data`` is a sample of them."""
    report = data.report
    assert report is not None  # encode_rows has written it
    looked = "" if report.rows == rows else f" (looked at {report.rows:,})"
    longest = max(data.lengths)
    shares = {name: getattr(report, name) / report.rows for name in ("dropped", "cut", "prompts_cut")}
    check.summary = (
        f"{shares['dropped']:.0%} left out, {shares['cut']:.0%} cut, {shares['prompts_cut']:.0%} of inputs shortened"
        f"{looked}; longest {longest} tokens, mean {report.prompt_tokens / report.kept:.0f} prompt + "
        f"{report.response_tokens / report.kept:.0f} learned"
    )
    check.values = {**dataclasses.asdict(report), "longest": longest}
    if report.cut == report.kept:
        check.error(
            "every-row-cut",
            "every row is cut at data.max_length, so none keeps its end token: the student would never learn to stop",
            f"Raise data.max_length (longest row: more than {longest} tokens), or use data.long_rows: drop",
        )
    for name, (code, text, advice) in LIMITS.items():
        if shares[name] > MANY_ROWS and not (name == "cut" and check.problems):
            check.warn(code, f"{shares[name]:.1%} of the rows {text}", advice)


# ----------------------------------------------------------------------------------------------------- the tokenizers


def check_tokenizers(
    check: Check, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, alignment: str | None = None
) -> None:
    """The same id must be the same token for both, unless ``teacher.alignment`` compares what both share.

    Args:
        check: takes what is found.
        student: the student's tokenizer.
        teacher: the teacher's.
        alignment: of the recipe.
    """
    check.values = {"student": len(student), "teacher": len(teacher)}
    if alignment is not None:
        common = check.values["common"] = len(common_vocabulary(student, teacher))
        check.summary = (
            f"{len(student):,} entries for the student and {len(teacher):,} for the teacher; {common:,} tokens are in both "
            f"({common / min(len(student), len(teacher)):.0%} of the smaller one)"
        )
        return
    if student is teacher:
        check.summary = f"one for teacher and student, {len(student):,} entries"
        return
    shared = check.values["shared"] = shared_prefix(student, teacher)
    check.summary = f"equal, {len(student):,} entries"
    if shared < max(len(student), len(teacher)):
        check.summary = ""
        tokens = [
            repr(tokenizer.convert_ids_to_tokens(shared)) if shared < len(tokenizer) else "nothing"
            for tokenizer in (student, teacher)
        ]
        check.error(
            "tokenizers-differ",
            f"{len(student):,} entries for the student and {len(teacher):,} for the teacher; id {shared:,} is {tokens[0]} "
            f"for the student and {tokens[1]} for the teacher",
            "Choose a student of the teacher's family, prune one from it (student.init), or compare what both share "
            "(teacher.alignment: overlap)",
        )


def check_alignment(check: Check, report: AlignmentReport) -> None:
    """How much of the answers is the same for a teacher with another tokenizer."""
    check.summary, check.values = report.summary(), {**dataclasses.asdict(report), "share": report.share}
    if not report.pairs:
        check.error(
            "nothing-aligned",
            "no label is the same for the teacher: it would teach nothing",
            "Look at what both templates write (data.prompt_template), or train on labels alone (loss.kd_ratio: 0)",
        )
        return
    alone = sum(report.unaligned.values())
    if alone > MANY_ROWS * report.rows:
        text = f"{alone / report.rows:.1%} of the rows are learned from labels alone"
        check.warn("many-rows-unaligned", text, "Another teacher, or rows without what one tokenizer changes")
    if report.share < FEW_ALIGNED:
        check.warn(
            "few-labels-aligned",
            f"the teacher says something to {report.share:.0%} of the labels alone, less than {FEW_ALIGNED:.0%}",
            "A teacher whose tokenizer cuts texts more alike",
        )


def check_special_tokens(
    check: Check,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    models: Mapping[str, Any],
    data: EncodedDataset | None,
    turn_ends: Sequence[int] = (),
) -> None:
    """The end token that is taught must be one that the models stop at.

    Args:
        check: takes what is found.
        tokenizers: of ``student`` and ``teacher``.
        models: the same, as far as they are there.
        data: tokenised training rows.
        turn_ends: the tokens that end an answer in the prompt template (``end_of_turn_ids``).
    """
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    end, pad = next(iter(turn_ends), student.eos_token_id), student.pad_token_id
    padding = "which also pads, told apart by length" if pad == end else f"padding is {student.pad_token!r}"
    other = "" if end == student.eos_token_id else f", which is not eos_token {student.eos_token!r}"
    check.summary = f"answers end with {student.convert_ids_to_tokens(end)!r} (id {end}){other}, {padding}"
    check.values = {"end": end, "eos": student.eos_token_id, "bos": student.bos_token_id, "pad": pad}
    # (code, whose tokenizer is compared with what, where that stops and begins, what to correct)
    others: list[tuple[str, str, str, set[int], set[int], str]] = []
    where = "its tokenizer_config.json"
    if teacher is not student:
        theirs = ({teacher.eos_token_id}, {teacher.bos_token_id})
        others += [("end-tokens-differ", "student", "the teacher's tokenizer ends", *theirs, where)]
    where += ", or eos_token_id in its generation_config.json"
    for who, model in models.items():
        theirs = (_ids_of(model, "eos_token_id"), _ids_of(model, "bos_token_id"))
        others += [("end-token-unknown", who, "its model stops", *theirs, where)]
    for code, who, other, stops, first, where in others:
        tokenizer = tokenizers[who]
        swapped = tokenizer.eos_token_id in first
        # Generation stops at the template's end of turn, too: where that is known, another eos_token does no harm
        known = {tokenizer.eos_token_id} if swapped else {tokenizer.eos_token_id, *turn_ends}
        if not stops or known & stops or check.problems:  # one cause, said once
            continue
        (check.error if swapped else check.warn)(
            "special-tokens-swapped" if swapped else code,
            f"the {who}'s tokenizer ends with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), but {other} at "
            + ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stops))
            + (" and begins with the former: the two are swapped" if swapped else "")
            + "; labels and models disagree about the end of every answer",
            f"Correct eos_token in {where}",
        )
    if data is not None:
        _check_special_tokens_of_rows(check, student, data, turn_ends)


def _ids_of(model: Any, name: str) -> set[int]:
    """Ids that the configurations of ``model`` give as ``name``: none, one, or a list."""
    ids: set[int] = set()
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        ids |= set() if value is None else set(value) if isinstance(value, list) else {int(value)}
    return ids


def _check_special_tokens_of_rows(
    check: Check, tokenizer: PreTrainedTokenizerBase, data: EncodedDataset, turn_ends: Sequence[int]
) -> None:
    begin, ends = tokenizer.bos_token_id, {tokenizer.eos_token_id, *turn_ends}
    special = {begin, tokenizer.pad_token_id, *ends} - {None}
    inside, doubled = [], []
    for index, name in enumerate(data.row_ids):
        ids = data.ids[index]
        said = [ids[start : stop - (ids[stop - 1] in ends)] for start, stop in data.spans(index)]
        inside += [name] if any(special & set(part) for part in said) else []
        doubled += [name] if begin is not None and list(ids[:2]) == [begin, begin] else []
    if inside:
        check.warn(
            "special-token-in-answer",
            f"{len(inside):,} of {len(data):,} answers hold a special token themselves (row '{inside[0]}'): written as "
            f"text, {tokenizer.eos_token!r} becomes the real end token",
            "Take the special tokens out of the rows; the end token is added by itself",
        )
    if doubled:
        text = f"{len(doubled):,} of {len(data):,} rows begin with {tokenizer.bos_token!r} twice (row '{doubled[0]}')"
        check.warn("bos-doubled", text, "Take it out of the rows or of the chat template")


# --------------------------------------------------------------------------------------------------- the chat template


def check_template(
    check: Check, template: Template, tokenizers: Mapping[str, PreTrainedTokenizerBase], rows: Sequence[Row]
) -> None:
    """The prompt must be what both models know, and all that a row brings must reach the models.

    Args:
        check: takes what is found.
        template: of the recipe.
        tokenizers: of ``student`` and ``teacher``.
        rows: some training rows.
    """
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    start = [] if template.is_chat else leading_special_ids(student)
    before = f", {student.decode(start)!r} before it" if start else ""
    check.summary = f"{template.name}: {template.description}{before}"
    check.values = {"name": template.name, "student_has_chat": bool(student.chat_template),
                    "teacher_has_chat": bool(teacher.chat_template)}  # fmt: skip
    if not template.is_chat:
        return
    cutter = TextCutter(student, template, "last_turn")
    check.values["end_of_turn"] = cutter.end
    if cutter.end is None:
        check.warn(
            "chat-template-no-end",
            f"the chat template writes no end of turn behind an answer: {student.eos_token!r} is appended to the last one, "
            "and nothing ends the others",
            "A chat template that ends each turn with a special token, which generation can stop at",
        )
    found: set[str] = set()
    for row in (row for row in rows if template.words(row)):
        for problem in _chat_problems(row, cutter, teacher):
            if problem[0] not in found:  # each once, for the first row that has it
                found.add(problem[0])
                check.warn(*problem)


def _chat_problems(row: Row, cutter: TextCutter, teacher: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, str]]:
    """(code, text, advice) of what is wrong with ``row`` in the chat template."""
    template, student = cutter.template, cutter.tokenizer
    try:
        prompt = template.render(row, student)
        whole = render_messages(row, row.conversation, student)
        cut = cutter.cut(row)
        other = template.render(row, teacher) if teacher is not student and teacher.chat_template else prompt
    except UserError:  # encode_rows refuses the row, with the same words
        return
    if other != prompt:
        yield (
            "chat-templates-differ",
            f"the student's chat template writes {from_difference(prompt, other)}, the teacher's "
            f"{from_difference(other, prompt)} (row '{row.id}'): the teacher answers a form it was not taught",
            "Give the student the teacher's chat template (chat_template.jinja in its folder)",
        )
    *given, learned = cut.texts
    read, response = "".join(given), row.response.strip()  # many templates strip it, too
    expected = prompt + response
    # Before the answer there may be a thought, and nothing that asks for an answer
    before = learned.partition(response)[0] if response else ""  # a tool call alone has no content
    opening = re.sub("<think>.*?</think>", "", before, flags=re.DOTALL)
    if not whole.startswith(prompt) or read != prompt or (row.answer is None and opening.strip()):
        yield (
            "chat-template-prompt",
            f"the chat template writes a finished conversation otherwise than prompt and answer: it has "
            f"{from_difference(whole, expected)} where generation begins with "
            f"{from_difference(expected, whole)} (row '{row.id}')",
            "Look at what the template does with add_generation_prompt",
        )
    lost = cutter.left_out(row, cut)
    if lost is not None:
        yield (
            "chat-template-ignores",
            f"the chat template leaves out {lost} of row '{row.id}': neither model sees it",
            "Another chat template, or rows without it",
        )
