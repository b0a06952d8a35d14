"""Checks of everything between a row and its labels: tokenizers, special tokens, chat template, limits, label mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.mixture import is_mixed, summary
from dts_hf.data.prompt_templates import Template, chat_messages, leading_special_ids
from dts_hf.data.rows import Row
from dts_hf.doctor.diagnosis import Check, PicturedRow, Segment
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.pruning import evenly_spaced
from dts_hf.models.vocabulary import shared_prefix
from dts_hf.task import Rows

T = TypeVar("T")
Collate = Callable[[list[Any]], dict[str, torch.Tensor]]
#: Share of rows above which a warning is given.
MANY_ROWS = 0.05
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
#: Rows whose labels are looked at.
LABELLED_ROWS = 64


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


def check_tokenizers(check: Check, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """The same id must be the same token for both."""
    check.values = {"student": len(student), "teacher": len(teacher)}
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
            "Choose a student of the teacher's family, or prune one from it (student.init)",
        )


def check_special_tokens(
    check: Check,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    models: Mapping[str, Any],
    data: EncodedDataset | None,
) -> None:
    """The end token that is taught must be the one that the models stop at.

    Args:
        check: takes what is found.
        tokenizers: of ``student`` and ``teacher``.
        models: the same, as far as they are there.
        data: tokenised training rows.
    """
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    end, pad = student.eos_token_id, student.pad_token_id
    padding = "which also pads, told apart by length" if pad == end else f"padding is {student.pad_token!r}"
    check.summary = f"answers end with {student.eos_token!r} (id {end}), {padding}"
    check.values = {"eos": end, "bos": student.bos_token_id, "pad": pad}
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
        if not stops or tokenizer.eos_token_id in stops or check.problems:  # one cause, said once
            continue
        swapped = tokenizer.eos_token_id in first
        (check.error if swapped else check.warn)(
            "special-tokens-swapped" if swapped else code,
            f"the {who}'s tokenizer ends with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), but {other} at "
            + ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stops))
            + (" and begins with the former: the two are swapped" if swapped else "")
            + "; labels and models disagree about the end of every answer",
            f"Correct eos_token in {where}",
        )
    if data is not None:
        _check_special_tokens_of_rows(check, student, data)


def _ids_of(model: Any, name: str) -> set[int]:
    """Ids that the configurations of ``model`` give as ``name``: none, one, or a list."""
    ids: set[int] = set()
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        ids |= set() if value is None else set(value) if isinstance(value, list) else {int(value)}
    return ids


def _check_special_tokens_of_rows(check: Check, tokenizer: PreTrainedTokenizerBase, data: EncodedDataset) -> None:
    end, begin, special = tokenizer.eos_token_id, tokenizer.bos_token_id, set(tokenizer.all_special_ids)
    rows = [(name, data[index]["input_ids"], data.prompt_lengths[index]) for index, name in enumerate(data.row_ids)]
    inside = [name for name, ids, prompt in rows if special & set(ids[prompt : -1 if ids[-1] == end else None])]
    doubled = [name for name, ids, _ in rows if begin is not None and ids[:2] == [begin, begin]]
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
    """The prompt must be what both models know, and the answer must end as the template ends it.

    Args:
        check: takes what is found.
        template: of the recipe.
        tokenizers: of ``student`` and ``teacher``.
        rows: some training rows.
    """
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    start = [] if template.writes_special_tokens else leading_special_ids(student)
    before = f", {student.decode(start)!r} before it" if start else ""
    check.summary = f"{template.name}: {template.description}{before}"
    check.values = {"name": template.name, "student_has_chat": bool(student.chat_template),
                    "teacher_has_chat": bool(teacher.chat_template)}  # fmt: skip
    if template.name != "chat":
        return
    problems = (_chat_problem(row, template, student, teacher) for row in rows)
    if problem := next(filter(None, problems), None):
        check.warn(*problem)


def _chat_problem(
    row: Row, template: Template, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[str, str, str] | None:
    """(code, text, advice) of what is wrong with ``row`` in the chat template."""
    prompt = template.render(row, student)
    if teacher is not student and teacher.chat_template:
        other = template.render(row, teacher)
        if other != prompt:
            return (
                "chat-templates-differ",
                f"the student's chat template writes {_from_difference(prompt, other)}, the teacher's "
                f"{_from_difference(other, prompt)} (row '{row.id}'): the teacher answers a form it was not taught",
                "Give the student the teacher's chat template (chat_template.jinja in its folder)",
            )
    try:
        messages = [*chat_messages(row), {"role": "assistant", "content": row.response}]
        whole = str(student.apply_chat_template(messages, tokenize=False))
    except TemplateError:  # encode_rows refuses the row, with its own words
        return None
    response = row.response.strip()  # many templates strip it, too
    after_prompt = whole[len(prompt) :].lstrip() if whole.startswith(prompt) else ""
    if not after_prompt.startswith(response):
        return (
            "chat-template-prompt",
            f"the chat template writes a finished conversation otherwise than prompt and answer: it has "
            f"{_from_difference(whole, prompt + response)} where training has "
            f"{_from_difference(prompt + response, whole)} (row '{row.id}')",
            "Look at what the template does with add_generation_prompt",
        )
    after = student(after_prompt[len(response) :].lstrip(" "), add_special_tokens=False)["input_ids"]
    if after and after[0] != student.eos_token_id:
        return (
            "chat-template-end",
            f"the chat template ends an answer with {student.decode(after[:1])!r}, but the tokenizer's end token, which is "
            f"taught, is {student.eos_token!r}",
            "Set eos_token of the tokenizer to the token that ends a turn",
        )
    return None


def _from_difference(text: str, other: str) -> str:
    """``text`` from where it differs from ``other`` on, shortened, in quotes."""
    same = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, same - 10)
    return repr(text[start : start + 40])


# ------------------------------------------------------------------------------------------------------ the label mask


def check_labels(check: Check, data: EncodedDataset, collator: Collate, end: int) -> None:
    """Build real batches and look: the answer is learned, the prompt is not, and the end token is.

    Args:
        check: takes what is found.
        data: tokenised rows.
        collator: the trainer's own.
        end: id of the end token.
    """
    rows = spaced(range(len(data)), LABELLED_ROWS)
    learned = expected = ends = learned_ends = 0
    for start in range(0, len(rows), 8):
        chosen = rows[start : start + 8]
        for index, (ids, labels, _) in zip(chosen, _split(collator([data[i] for i in chosen])), strict=True):
            learned += int((labels != IGNORE_INDEX).sum())
            expected += data.lengths[index] - data.prompt_lengths[index]
            last = data.lengths[index] - 1
            ends += int(ids[last] == end)
            learned_ends += int(ids[last] == end and labels[last] == end)
    counts = {"learned": learned, "expected": expected, "ends": ends, "learned_ends": learned_ends}
    check.values = {"rows": len(rows), **counts}
    mean = learned / max(len(rows), 1)
    check.summary = f"{mean:.0f} tokens a row are learned, the end token in {learned_ends} of {len(rows)} rows"
    if learned_ends < ends:
        check.error(
            "end-token-masked",
            f"the end token has no label in {ends - learned_ends} of {ends} rows: the student would never learn to stop",
            "Mask padding by length, not by token id (the end token is often the padding token, too)",
        )
    if learned - learned_ends < expected - ends:
        check.error("answer-masked", f"{expected - ends - learned + learned_ends} tokens of answers have no label", "")
    if learned > expected:
        check.error("prompt-learned", f"{learned - expected} tokens of prompts or padding have a label", "")


def _split(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The rows of a padded or packed batch, each as (ids, labels, whether it is a token and no padding)."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" not in batch:
        return list(zip(ids, labels, batch["attention_mask"].bool(), strict=True))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], ids.shape[1]]
    real = torch.ones_like(ids[0], dtype=torch.bool)
    return [(ids[0, a:b], labels[0, a:b], real[a:b]) for a, b in zip(starts, ends, strict=True)]


def picture(data: EncodedDataset, collator: Collate, tokenizer: PreTrainedTokenizerBase) -> list[PicturedRow]:
    """Two rows of one batch as the loss sees them, a short and a long one."""
    by_length = sorted(range(len(data)), key=data.lengths.__getitem__)
    chosen = [by_length[len(data) // 4], by_length[3 * len(data) // 4]][: len(data)]
    pictured = []
    for index, (ids, labels, real) in zip(chosen, _split(collator([data[i] for i in chosen])), strict=True):
        kinds = [
            "padding" if not is_real else "masked" if label == IGNORE_INDEX else "learned"
            for label, is_real in zip(labels.tolist(), real.tolist(), strict=True)
        ]
        last = data.lengths[index] - 1
        if kinds[last] == "learned" and ids[last] == tokenizer.eos_token_id:
            kinds[last] = "end"
        segments = []
        for kind, places in groupby(range(len(kinds)), key=kinds.__getitem__):
            tokens = ids[list(places)].tolist()
            text = "" if kind == "padding" else str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
            segments.append(Segment(kind, len(tokens), text))  # type: ignore[arg-type]
        pictured.append(PicturedRow(data.row_ids[index], segments))
    return pictured
