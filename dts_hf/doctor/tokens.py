"""Checks of everything between a row and its labels: tokenizers, special tokens, chat template, limits, label mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from dts_hf.data.encoding import EncodedDataset, EncodingReport
from dts_hf.data.prompt_templates import Template, leading_special_ids
from dts_hf.data.rows import Row
from dts_hf.doctor.diagnosis import Check, PicturedRow, Segment
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.vocabulary import shared_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Shares of rows above which a warning is given.
MANY_ROWS = 0.05
SAMPLED_ROWS = 64


def spaced_indices(count: int, total: int) -> list[int]:
    """At most ``count`` of the numbers below ``total``, as far apart as possible."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


# ---------------------------------------------------------------------------------------------------------- the rows


def check_rows(check: Check, train: Sequence[Row], validation: Sequence[Row]) -> None:
    """Rows that are held out must not be trained on."""
    check.summary = f"{len(train):,} to train on, {len(validation):,} held out"
    check.values = {"train": len(train), "validation": len(validation)}
    seen = {_question(row) for row in train}
    leaked = [row.id for row in validation if _question(row) in seen]
    if leaked:
        check.warn(
            "leak",
            f"{len(leaked):,} of {len(validation):,} held-out prompts are also in the training rows (such as "
            f"'{leaked[0]}'): scores on them show what was learned by heart",
            "Take them out of data.validation",
        )


def _question(row: Row) -> tuple[Any, ...]:
    turns = tuple((message["role"], message["content"]) for message in row.messages or ())
    return (row.instruction, row.input, turns)


def check_limits(check: Check, report: EncodingReport, data: EncodedDataset, rows: int) -> None:
    """How many rows the limits leave out or shorten."""
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
    elif shares["cut"] > MANY_ROWS:
        check.warn(
            "many-rows-cut",
            f"{shares['cut']:.1%} of the rows lose the end of their answer at data.max_length",
            "Raise data.max_length, or use data.long_rows: drop",
        )
    if shares["dropped"] > MANY_ROWS:
        check.warn(
            "many-rows-dropped",
            f"{shares['dropped']:.1%} of the rows are too long and left out",
            "Raise data.max_length and data.max_prompt_length",
        )
    if shares["prompts_cut"] > MANY_ROWS:
        check.warn(
            "many-inputs-cut",
            f"{shares['prompts_cut']:.1%} of the rows have their input shortened to data.max_prompt_length",
            "Raise data.max_prompt_length: a question about a text that is not there teaches to make things up",
        )


# ----------------------------------------------------------------------------------------------------- the tokenizers


def check_tokenizers(check: Check, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """The same id must be the same token for both."""
    check.values = {"student": len(student), "teacher": len(teacher)}
    if student is teacher:
        check.summary = f"one for teacher and student, {len(student):,} entries"
        return
    shared = shared_prefix(student, teacher)
    check.values["shared"] = shared
    if shared < max(len(student), len(teacher)):
        first = " and ".join(
            f"{tokenizer.convert_ids_to_tokens(shared)!r} for the {who}"
            if shared < len(tokenizer)
            else f"nothing for the {who}"
            for who, tokenizer in (("student", student), ("teacher", teacher))
        )
        check.error(
            "tokenizers-differ",
            f"{len(student):,} entries for the student and {len(teacher):,} for the teacher; id {shared:,} is {first}",
            "Choose a student of the teacher's family, or prune one from it (student.init)",
        )
        return
    check.summary = f"equal, {len(student):,} entries"


def check_special_tokens(
    check: Check,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    configs: dict[str, Any],
    data: EncodedDataset | None,
) -> None:
    """The end token that is taught must be the one that the models stop at.

    Args:
        configs: ``model.config`` and ``model.generation_config`` of each model by ``student`` and ``teacher``, as far
            as they are known.
        data: tokenised training rows.
    """
    end, pad = student.eos_token_id, student.pad_token_id
    padding = "which also pads, told apart by length" if pad == end else f"padding is {student.pad_token!r}"
    check.summary = f"answers end with {student.eos_token!r} (id {end}), {padding}"
    check.values = {"eos": end, "bos": student.bos_token_id, "pad": pad}
    if teacher is not student and teacher.eos_token_id != end:
        swapped = end == teacher.bos_token_id
        (check.error if swapped else check.warn)(
            "special-tokens-swapped" if swapped else "end-tokens-differ",
            f"the student's tokenizer ends with {student.eos_token!r} (id {end}), the teacher's with "
            f"{teacher.eos_token!r} (id {teacher.eos_token_id})"
            + (", and the student's end token is the teacher's first token" if swapped else "")
            + ": labels and teacher disagree about the end of every answer",
            "Correct eos_token in the student's tokenizer_config.json",
        )
    for who, (config, generation) in configs.items():
        tokenizer = student if who == "student" else teacher
        stops = _ids(config, "eos_token_id") | _ids(generation, "eos_token_id")
        first = _ids(config, "bos_token_id") | _ids(generation, "bos_token_id")
        known = any(problem.code.startswith(("special", "end")) for problem in check.problems)
        if not stops or tokenizer.eos_token_id in stops or known:
            continue
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stops))
        swapped = tokenizer.eos_token_id in first
        (check.error if swapped else check.warn)(
            "special-tokens-swapped" if swapped else "end-token-unknown",
            f"the {who}'s tokenizer ends with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), but its model stops "
            f"at {names}" + (" and begins with the former: the two are swapped" if swapped else ""),
            "Correct eos_token in its tokenizer_config.json, or eos_token_id in its generation_config.json",
        )
    if data is not None:
        _check_special_tokens_of_rows(check, student, data)


def _check_special_tokens_of_rows(check: Check, tokenizer: PreTrainedTokenizerBase, data: EncodedDataset) -> None:
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    special = set(tokenizer.all_special_ids)
    inside: list[str] = []
    doubled: list[str] = []
    for index, name in enumerate(data.row_ids):
        ids, prompt = data[index]["input_ids"], data.prompt_lengths[index]
        response = ids[prompt:-1] if ids[-1] == end else ids[prompt:]
        inside += [name] if special.intersection(response) else []
        doubled += [name] if begin is not None and ids[:2] == [begin, begin] else []
    if inside:
        check.warn(
            "special-token-in-answer",
            f"{len(inside):,} of {len(data):,} answers hold a special token themselves (row '{inside[0]}'): written as "
            f"text, {tokenizer.eos_token!r} becomes the real end token",
            "Take the special tokens out of the rows; the end token is added by itself",
        )
    if doubled:
        check.warn(
            "bos-doubled",
            f"{len(doubled):,} of {len(data):,} rows begin with {tokenizer.bos_token!r} twice (row '{doubled[0]}')",
            "Take it out of the rows or of the chat template",
        )


def _ids(config: Any, name: str) -> set[int]:
    value = getattr(config, name, None)
    return set() if value is None else set(value) if isinstance(value, list) else {int(value)}


# --------------------------------------------------------------------------------------------------- the chat template


def check_template(
    check: Check,
    template: Template,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    rows: Sequence[Row],
) -> None:
    """The prompt must be what both models know, and the answer must end as the template ends it."""
    start = [] if template.writes_special_tokens else leading_special_ids(student)
    before = f", {student.decode(start)!r} before it" if start else ""
    check.summary = f"{template.name}: {template.description}{before}"
    check.values = {"name": template.name, "student_has_chat": bool(student.chat_template),
                    "teacher_has_chat": bool(teacher.chat_template)}  # fmt: skip
    if template.name != "chat":
        return
    for row in rows:
        prompt = template.render(row, student)
        if teacher is not student and teacher.chat_template:
            other = template.render(row, teacher)
            if other != prompt:
                check.warn(
                    "chat-templates-differ",
                    f"the student's chat template writes {_from_difference(prompt, other)}, the teacher's "
                    f"{_from_difference(other, prompt)} (row '{row.id}'): the teacher answers a form it was not taught",
                    "Give the student the teacher's chat template (chat_template.jinja in its folder)",
                )
                break
        whole = _whole_conversation(row, student)
        if whole is None:
            continue
        response = row.response.strip()  # many templates strip it, too
        after_prompt = whole[len(prompt) :].lstrip() if whole.startswith(prompt) else ""
        if not after_prompt.startswith(response):
            check.warn(
                "chat-template-prompt",
                f"the chat template writes a finished conversation otherwise than prompt and answer: it has "
                f"{_from_difference(whole, prompt + response)} where training has "
                f"{_from_difference(prompt + response, whole)} (row '{row.id}')",
                "Look at what the template does with add_generation_prompt",
            )
            break
        rest = after_prompt[len(response) :].lstrip(" ")
        after = student(rest, add_special_tokens=False)["input_ids"]
        if after and after[0] != student.eos_token_id:
            check.warn(
                "chat-template-end",
                f"the chat template ends an answer with {student.decode(after[:1])!r}, but the tokenizer's end token, "
                f"which is taught, is {student.eos_token!r}",
                "Set eos_token of the tokenizer to the token that ends a turn",
            )
            break


def _whole_conversation(row: Row, tokenizer: PreTrainedTokenizerBase) -> str | None:
    content = "\n\n".join(text for text in (row.instruction, row.input) if text)
    messages = list(row.messages) if row.messages is not None else [{"role": "user", "content": content}]
    messages.append({"role": "assistant", "content": row.response})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:  # encode_rows refuses the row, with its own words
        return None


def _from_difference(text: str, other: str) -> str:
    """``text`` from where it differs from ``other`` on, shortened, in quotes."""
    same = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, same - 10)
    return repr(text[start : start + 40])


# ------------------------------------------------------------------------------------------------------ the label mask


def check_labels(check: Check, data: EncodedDataset, collator: Any, end: int) -> None:
    """Build real batches and look: the answer is learned, the prompt is not, and the end token is.

    Args:
        data: tokenised rows.
        collator: the trainer's own.
        end: id of the end token.
    """
    rows = spaced_indices(SAMPLED_ROWS, len(data))
    learned = expected = ends = learned_ends = 0
    for start in range(0, len(rows), 8):
        examples = [data[index] for index in rows[start : start + 8]]
        batch = collator(examples)
        for index, (ids, labels, _) in zip(rows[start : start + 8], split_batch(batch), strict=True):
            learned += int((labels != IGNORE_INDEX).sum())
            expected += data.lengths[index] - data.prompt_lengths[index]
            last = data.lengths[index] - 1
            if ids[last] == end:
                ends += 1
                learned_ends += int(labels[last] == end)
    check.values = {
        "rows": len(rows),
        "learned": learned,
        "expected": expected,
        "ends": ends,
        "learned_ends": learned_ends,
    }
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


def split_batch(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The rows of a padded or packed batch, each as (ids, labels, whether it is a token and no padding)."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "position_ids" not in batch:
        return list(zip(ids, labels, batch["attention_mask"].bool(), strict=True))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], ids.shape[1]]
    real = torch.ones_like(ids[0], dtype=torch.bool)
    return [(ids[0, a:b], labels[0, a:b], real[a:b]) for a, b in zip(starts, ends, strict=True)]


def picture(
    data: EncodedDataset, collator: Any, tokenizer: PreTrainedTokenizerBase, rows: int = 2
) -> list[PicturedRow]:
    """Some rows of one batch as the loss sees them, a short and a long one among them."""
    by_length = sorted(range(len(data)), key=data.lengths.__getitem__)
    chosen = [by_length[len(by_length) // 4], by_length[3 * len(by_length) // 4]][: min(rows, len(data))]
    batch = collator([data[index] for index in chosen])
    pictured = []
    for index, (ids, labels, real) in zip(chosen, split_batch(batch), strict=True):
        kinds = ["masked" if label == IGNORE_INDEX else "learned" for label in labels.tolist()]
        kinds = [kind if is_real else "padding" for kind, is_real in zip(kinds, real.tolist(), strict=True)]
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
