"""Rows of instruction data: loaded, checked, tokenised, grouped by length, collated padded or packed.

One row format everywhere: ``{id, instruction, input, output}`` (``output`` a string or a list of references) or
``{id, messages}`` whose last message is the assistant's response. Everything wrong is a :class:`UserError` that names
the file and the line.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dts_hf.errors import UserError, nearest
from dts_hf.packed_attention import borders_mask
from dts_hf.prompts import Template, encode_prompts
from dts_hf.response import IGNORE_INDEX
from dts_hf.row_files import read_objects

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROW_FORMAT = "{id, instruction, input, output} or {id, messages}"
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
ROLES = ("system", "user", "assistant", "tool")
MOST_FILES = 50_000  # that are looked at to find the row files of a folder
SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "eval", "test")
# Names that other data sets use for our fields: only for the hint in an error message.
OTHER_NAMES = {
    "instruction": ("prompt", "question", "query", "instructions"),
    "output": ("response", "completion", "answer", "target", "responses", "outputs", "references"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction with its references.

    Attributes:
        id: unique in its data set; predictions, caches and samples are found by it.
        instruction: what is asked; the last user message for a conversation.
        input: the text that the instruction is about, or an empty string.
        references: good responses; the first one is trained on.
        messages: the conversation before the response (``role``, ``content``), or None for an instruction row.
    """

    id: str
    instruction: str
    input: str
    references: tuple[str, ...]
    messages: tuple[dict[str, str], ...] | None = None

    @property
    def response(self) -> str:
        return self.references[0]


# ---------------------------------------------------------------------------------------------- one row


def parse_row(obj: Mapping[str, Any], where: str, default_id: str) -> Row:
    """Check one row and bring it into the one form.

    Args:
        obj: the row as read; fields other than those of the row format are ignored.
        where: the place named in errors, such as ``train.jsonl: line 3``.
        default_id: the id where the row has none.

    Raises:
        UserError: a missing field, a wrong type, an empty instruction or response.
    """
    if not isinstance(obj, Mapping):
        raise UserError(f"{where}: expected an object {ROW_FORMAT}, got {_kind(obj)}")
    row_id = obj.get("id")
    if row_id is None:
        row_id = default_id
    elif isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        raise UserError(f"{where}: field 'id': got {row_id!r}, expected a string that is not empty")
    elif not is_encodable(str(row_id)):
        raise UserError(f"{where}: field 'id' holds half of a surrogate pair (a broken \\ud8xx escape)")
    if obj.get("messages") is not None:
        return _conversation_row(obj["messages"], where, str(row_id))
    instruction = _text(_required(obj, "instruction", where), f"{where}: field 'instruction'")
    given_input = obj.get("input")
    text_input = "" if given_input is None else _text(given_input, f"{where}: field 'input'", empty=True)
    return Row(str(row_id), instruction, text_input, _references(_required(obj, "output", where), where))


def _kind(value: object) -> str:
    """Name a JSON value's type in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the {type(value).__name__} {value!r}")


def _text(value: object, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: got {_kind(value)}, expected a string")
    if not empty and not value.strip():
        raise UserError(f"{where} is empty")
    if not is_encodable(value):
        raise UserError(f"{where} holds half of a surrogate pair (a broken \\ud8xx escape); tokenizers refuse it")
    return value


def is_encodable(text: str) -> bool:
    """Whether ``text`` has no half of a surrogate pair; neither tokenizers nor files take one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _required(obj: Mapping[str, Any], name: str, where: str) -> object:
    if obj.get(name) is not None:
        return obj[name]
    if name in obj:
        raise UserError(f"{where}: field '{name}' is null, expected text")
    # "input" is no misspelt "instruction"; a field of ours is never offered for renaming.
    others = [key for key in obj if key not in ("id", "instruction", "input", "output", "messages")]
    close = get_close_matches(name, others, n=1, cutoff=0.6) or [key for key in OTHER_NAMES[name] if key in others]
    hint = f" Rename '{close[0]}' to '{name}'?" if close else ""
    found = ", ".join(f"'{key}'" for key in obj) or "none"
    raise UserError(f"{where}: field '{name}' is missing; found the fields {found}, expected {ROW_FORMAT}.{hint}")


def _references(output: object, where: str) -> tuple[str, ...]:
    if not isinstance(output, (list, tuple)):
        return (_text(output, f"{where}: field 'output'"),)
    if not output:
        raise UserError(f"{where}: field 'output' is an empty list, expected at least one response")
    return tuple(_text(text, f"{where}: field 'output', reference {k}") for k, text in enumerate(output, 1))


def _conversation_row(messages: object, where: str, row_id: str) -> Row:
    if not isinstance(messages, (list, tuple)) or len(messages) < 2:
        raise UserError(f"{where}: field 'messages': expected a list of at least two messages (user, assistant)")
    checked = []
    for k, message in enumerate(messages, 1):
        place = f"{where}: message {k}"
        if not isinstance(message, Mapping):
            raise UserError(f"{place}: expected an object {{role, content}}, got {_kind(message)}")
        role = message.get("role")
        if role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            raise UserError(f"{place}: role: got {role!r}, expected one of {', '.join(ROLES)}.{hint}")
        # Only a system message may be empty: templates use that to switch their default one off.
        content = _text(message.get("content"), f"{place}: content", empty=role == "system")
        checked.append({"role": role, "content": content})
    prompt, response = checked[:-1], checked[-1]
    if response["role"] != "assistant":
        raise UserError(
            f"{where}: the last message has the role '{response['role']}', expected 'assistant' (the response)"
        )
    questions = [message["content"] for message in prompt if message["role"] == "user"]
    if not questions:
        raise UserError(f"{where}: no message before the response has the role 'user'")
    return Row(row_id, questions[-1], "", (response["content"],), tuple(prompt))


# ---------------------------------------------------------------------------------------------- files and the Hub


def load_rows(source: str | Path, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Load and check the rows of one source.

    Args:
        source: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, a folder or a glob of such files, or the name of a
            data set on the Hub (``owner/name`` or ``owner/name:configuration``).
        split: the split of a Hub data set; in a folder whose file names begin with split names, the files to take.
        limit: read this many rows at most.

    Returns:
        At least one row, in file order. A row without an id is called ``<file>-<line>``.

    Raises:
        UserError: nothing there, or a row that is wrong, with file and line.
    """
    files = source_files(source, split=split)
    records = _hub_records(str(source), split) if files is None else _file_records(files)
    rows = _unique(islice(records, limit))
    if not rows:
        raise UserError(f"{source}: there are no rows in it; expected rows {ROW_FORMAT}")
    return rows


def load_many(
    sources: str | Path | Sequence[str | Path], *, split: str = "train", limit: int | None = None
) -> list[Row]:
    """Load several sources one after the other as one data set; see :func:`load_rows`.

    Args:
        sources: one source, or a list of them.
        split: as in :func:`load_rows`, for every source.
        limit: at most this many rows altogether.

    Raises:
        UserError: as :func:`load_rows`, or an id that two sources use.
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not listed:
        raise UserError("no data: the list of sources is empty")
    named: list[tuple[Row, str]] = []
    for source in listed:
        if limit is None or len(named) < limit:
            remaining = None if limit is None else limit - len(named)
            named += [(row, str(source)) for row in load_rows(source, split=split, limit=remaining)]
    return _unique(iter(named))


def rows_from_dataset(dataset: Iterable[Any], name: str = "dataset") -> list[Row]:
    """Check the rows of a ``datasets.Dataset``, a list of dicts, or a list of :class:`Row`.

    Args:
        dataset: the rows; the row format is that of files.
        name: the name in errors and in the ids of rows without one.

    Raises:
        UserError: a row is wrong (the message counts rows from 1), or there are none.
    """

    def records() -> Iterator[tuple[Row, str]]:
        for k, obj in enumerate(dataset, 1):
            where = f"{name}: row {k}"
            yield (obj if isinstance(obj, Row) else parse_row(obj, where, f"{name}-{k}")), where

    rows = _unique(records())
    if not rows:
        raise UserError(f"{name}: there are no rows in it; expected rows {ROW_FORMAT}")
    return rows


def source_files(source: str | Path, *, split: str = "train") -> list[Path] | None:
    """Return the files that ``source`` stands for, or None when it is the name of a Hub data set.

    Raises:
        UserError: the source is a path with nothing to read at it.
    """
    text = str(source)
    if not text.strip():
        raise UserError("no data: the name of the source is empty")
    # os.path answers False where Path raises: for a name that is too long, or holds a NUL.
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        return _files_of_split(path, split)
    if os.path.exists(path):
        if not path.name.endswith(DATA_SUFFIXES) or not path.is_file():
            raise UserError(f"{text}: expected a file ending in {', '.join(DATA_SUFFIXES)}")
        return [path]
    if any(mark in text for mark in "*?["):
        root = Path(path.anchor)
        try:
            found = sorted(_few(root.glob(str(path.relative_to(root)) if path.anchor else str(path)), text))
        except (ValueError, OSError) as error:
            raise UserError(f"{text}: this pattern cannot be searched for: {error}") from None
        if not found:
            raise UserError(f"{text}: no file matches this pattern")
        return [file for match in found for file in source_files(match, split=split) or []]
    if _looks_like_a_path(text):
        in_folder = os.path.isdir(path.parent)
        beside = [file.name for file in path.parent.iterdir()] if in_folder else []
        missing = "" if in_folder else f"; the folder {path.parent} does not exist either"
        raise UserError(f"{text}: no such file{missing}.{nearest(path.name, beside)}")
    return None


def _looks_like_a_path(text: str) -> bool:
    endings = (*DATA_SUFFIXES, ".gz", ".csv", ".tsv", ".txt", ".arrow")
    return text.endswith(endings) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text


def _files_of_split(folder: Path, split: str) -> list[Path]:
    try:
        inside = _few(folder.rglob("*"), str(folder))
        files = sorted(file for file in inside if file.name.endswith(DATA_SUFFIXES) and file.is_file())
    except OSError as error:
        raise UserError(f"{folder}: cannot be searched: {error.strerror or error}") from None
    if not files:
        raise UserError(f"{folder}: no file ending in {', '.join(DATA_SUFFIXES)} in this folder")
    by_split = {file: _split_of(file) for file in files}
    if not any(by_split.values()):
        return files
    # A folder of the Hub's layout holds all splits: without this, test rows would be trained on.
    chosen = [file for file, name in by_split.items() if name == split]
    if not chosen:
        names = sorted({name for name in by_split.values() if name})
        raise UserError(f"{folder}: no file of the split '{split}'; found {', '.join(names)}.{nearest(split, names)}")
    return chosen


def _few(found: Iterator[Path], source: str) -> Iterator[Path]:
    """``found``, as long as it is not half of the disk."""
    for number, path in enumerate(found):
        if number == MOST_FILES:
            raise UserError(f"{source}: more than {MOST_FILES:,} files are in there; name a smaller folder")
        yield path


def _split_of(file: Path) -> str | None:
    word = re.match(r"[a-z]+", file.name.lower())
    return word[0] if word and word[0] in SPLIT_NAMES else None


def _stem(file: Path) -> str:
    return re.sub(r"\.(jsonl|json|parquet)(\.gz)?$", "", file.name)


def _file_records(files: Iterable[Path]) -> Iterator[tuple[Row, str]]:
    for file in files:
        empty = True
        for number, where, obj in read_objects(file):
            empty = False
            yield parse_row(obj, where, f"{_stem(file)}-{number}"), where
        if empty:
            raise UserError(f"{file}: the file holds no rows; expected rows {ROW_FORMAT}")


def _hub_records(name: str, split: str) -> Iterator[tuple[Row, str]]:
    for default_id, where, obj in hub_objects(name, split):
        yield parse_row(obj, where, default_id), where


def hub_objects(name: str, split: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (default id, place, object) of every row of a Hub data set, unchecked.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets

    path, _, configuration = name.partition(":")
    if path.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{path}"):
        # `text` or `json` is no data set, but a reader that would take whatever lies in the current folder.
        raise UserError(f"{name}: no such file here, expected a file, a folder or owner/name of a Hub data set")
    try:
        dataset = datasets.load_dataset(path, configuration or None, split=split)
    except Exception as error:  # whatever readers, network and caches raise; an IndexError for ":"
        raise UserError(
            f"{name}: no such file here, and it cannot be loaded as a data set from the Hub, split '{split}': "
            f"{' '.join(str(error).split())[:300]}. Give a local file (.jsonl, .jsonl.gz, .parquet) instead, "
            f"or load the data set once with network access so that it is cached."
        ) from error
    for number, obj in enumerate(dataset, 1):
        where = f"{name}, split '{split}': row {number}"
        yield f"{path.replace('/', '-')}-{number}", where, obj


def _unique(records: Iterator[tuple[Row, str]]) -> list[Row]:
    """Return the rows; two rows with one id are an error that names both places."""
    places: dict[str, str] = {}
    rows = []
    for row, where in records:
        if row.id in places:
            raise UserError(f"{where}: the id '{row.id}' is already used by {places[row.id]}; ids must be unique")
        places[row.id] = where
        rows.append(row)
    return rows


def manifest(
    sources: str | Path | Sequence[str | Path], rows: Sequence[Row], *, split: str = "train"
) -> dict[str, Any]:
    """Describe where rows come from, for ``data_manifest.json``.

    Args:
        sources: what was given to :func:`load_many`.
        rows: the rows that it returned.
        split: as given to :func:`load_many`.

    Returns:
        ``source`` (a string, or a list for several; of a path outside the current folder the file name alone),
        ``sha256`` and ``rows``. The digest is that of the file; of ``sha256sum``'s output lines for several files;
        of the rows themselves for a Hub data set.
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    digests: list[tuple[str, str]] = []
    for source in listed:
        files = source_files(source, split=split)
        if files is None:
            content = json.dumps([[r.id, r.instruction, r.input, r.references, r.messages] for r in rows])
            digests.append((hashlib.sha256(content.encode()).hexdigest(), str(source)))
        else:
            digests += [(_sha256(file), file.name) for file in files]
    lines = "".join(f"{digest}  {name}\n" for digest, name in digests)
    return {
        "source": _public_name(listed[0]) if len(listed) == 1 else [_public_name(source) for source in listed],
        "sha256": digests[0][0] if len(digests) == 1 else hashlib.sha256(lines.encode()).hexdigest(),
        "rows": len(rows),
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _public_name(source: str | Path) -> str:
    """Shorten a path that would show the folders of this machine in a published model card."""
    path = Path(os.path.expanduser(source))
    if not path.is_absolute() and ".." not in path.parts:
        return str(source)
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path.name


# ---------------------------------------------------------------------------------------------- tokens


class Example(TypedDict):
    """One tokenised row: ``labels`` are ``input_ids`` with -100 on the prompt; ``row_id`` indexes the data set."""

    input_ids: list[int]
    labels: list[int]
    row_id: int


class EncodedDataset(Dataset[Example]):
    """Tokenised rows, prompt then response, held as compact arrays.

    Attributes:
        row_ids: the id of each row.
        ids: the tokens of each row.
        lengths: tokens of each row, prompt and response.
        prompt_lengths: tokens of each row's prompt, at least 1; they carry no label.
        report: what became of the rows when they were encoded; None for tokens that come from elsewhere.
    """

    report: EncodingReport | None = None

    def __init__(self, row_ids: Sequence[str], ids: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> None:
        self.row_ids = list(row_ids)
        self.prompt_lengths = list(prompt_lengths)
        self.lengths = [len(row) for row in ids]
        self.ids = [array("i", row) for row in ids]

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # negative indices count from the end; row_id is always the place
        ids = self.ids[index].tolist()
        prompt = self.prompt_lengths[index]
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "row_id": index}

    def subset(self, n: int) -> EncodedDataset:
        """Return the first ``n`` rows (all of them when there are fewer)."""
        return EncodedDataset(self.row_ids[:n], self.ids[:n], self.prompt_lengths[:n])


@dataclass
class EncodingReport:
    """What became of the rows.

    Attributes:
        rows, kept, dropped: counts of rows; ``rows == kept + dropped``.
        cut: rows whose response was cut, so that they end without the end-of-sequence token.
        prompts_cut: rows whose input was shortened to fit ``max_prompt_length``.
        unlabelled: rows kept of which no label counts, so that nothing is learned from them.
        dropped_ids, unlabelled_ids: the first five ids of such rows (of tokenised rows: their numbers, from 0).
        prompt_tokens, response_tokens: tokens kept; those of responses carry the labels.
    """

    rows: int = 0
    kept: int = 0
    dropped: int = 0
    cut: int = 0
    prompts_cut: int = 0
    unlabelled: int = 0
    dropped_ids: list[str] = field(default_factory=list)
    unlabelled_ids: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    response_tokens: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every row is learned from as it was given."""
        return not (self.dropped or self.cut or self.prompts_cut or self.unlabelled)

    def summary(self) -> str:
        """Return one line for people."""
        parts = [f"{self.kept:,} of {self.rows:,} rows kept"]
        if self.dropped:
            parts.append(f"dropped as too long: {self.dropped:,} ({_first_of(self.dropped_ids, self.dropped)})")
        if self.unlabelled:
            parts.append(
                f"without a label that counts: {self.unlabelled:,} ({_first_of(self.unlabelled_ids, self.unlabelled)})"
            )
        if self.cut:
            parts.append(f"responses cut: {self.cut:,}")
        if self.prompts_cut:
            parts.append(f"inputs shortened: {self.prompts_cut:,}")
        parts.append(f"{self.prompt_tokens:,} prompt and {self.response_tokens:,} response tokens")
        return "; ".join(parts)


def _first_of(ids: Sequence[str], count: int) -> str:
    return ", ".join(ids) + (", ..." if count > len(ids) else "")


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    max_length: int,
    max_prompt_length: int,
    long_rows: str = "drop",
    progress: str | None = None,
    name: str = "data",
) -> tuple[EncodedDataset, EncodingReport]:
    """Tokenise prompts and responses: ``prompt + response + end-of-sequence``, labels on response and end.

    Prompt and response are tokenised apart, so the first response token never depends on the prompt's last characters
    and generation starts from the very tokens that training saw.

    Args:
        rows: the rows; ``row.response`` is the one trained on.
        tokenizer: the student's tokenizer; its ``eos_token`` ends every response and is a target, also when it is the
            padding token as well.
        template: from :func:`dts_hf.prompts.get_template`.
        max_length: limit of a row in tokens.
        max_prompt_length: limit of its prompt in tokens; below ``max_length``. Longer prompts have their *input*
            shortened; a row whose prompt does not fit even then is dropped.
        long_rows: ``"drop"`` rows longer than ``max_length``, or ``"cut"`` their response (the end is lost with it).
        progress: the title of a progress bar on stderr, shown for more than 2,000 rows; None shows none.
        name: what errors call these rows, such as ``data.train``.

    Raises:
        UserError: limits that contradict each other, a tokenizer without an end-of-sequence token, no row left.
    """
    if long_rows not in ("drop", "cut"):
        raise UserError(f"data.long_rows: got {long_rows!r}, expected 'drop' or 'cut'")
    if not 0 < max_prompt_length < max_length:
        raise UserError(
            f"data.max_prompt_length: got {max_prompt_length}, expected at least 1 and less than "
            f"data.max_length ({max_length}), or no response fits"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token (eos_token): the student could never learn to stop"
        )
    end = int(tokenizer.eos_token_id)
    report = EncodingReport(rows=len(rows))
    row_ids: list[str] = []
    encoded: list[list[int]] = []
    prompt_lengths: list[int] = []
    for block in _blocks(rows, progress):
        prompts = encode_prompts(block, tokenizer, template, max_prompt_length)
        texts = [row.response for row in block]
        responses = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for row, prompt, response in zip(block, prompts, responses, strict=True):
            ids = [] if prompt is None else [*prompt.ids, *response, end]
            if prompt is None or (long_rows == "drop" and len(ids) > max_length):
                report.dropped += 1
                report.dropped_ids += [row.id] if len(report.dropped_ids) < 5 else []
                continue
            report.cut += len(ids) > max_length
            report.prompts_cut += prompt.cut
            row_ids.append(row.id)
            encoded.append(ids[:max_length])
            prompt_lengths.append(len(prompt.ids))
    dataset = EncodedDataset(row_ids, encoded, prompt_lengths)
    report.kept = len(dataset)
    report.prompt_tokens = sum(prompt_lengths)
    report.response_tokens = sum(dataset.lengths) - report.prompt_tokens
    dataset.report = report
    if not len(dataset):
        raise UserError(
            f"{name}: no row left: all {len(rows)} rows are too long for data.max_prompt_length = {max_prompt_length} and "
            f"data.max_length = {max_length} (in tokens). Raise the limits, or use data.long_rows: cut."
        )
    return dataset, report


def _blocks(rows: Sequence[Row], progress: str | None, size: int = 1000) -> Iterator[list[Row]]:
    """Yield the rows in blocks (tokenizers work on a block in parallel), moving a progress bar along."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(
        console=Console(stderr=True), transient=True, disable=progress is None or len(rows) <= 2 * size
    ) as bar:
        task = bar.add_task(progress or "", total=len(rows))
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])
            bar.advance(task, size)


# ---------------------------------------------------------------------------------------------- batches


#: The ``row_id`` of a tokenised row that brings none.
NO_ROW = -1


class Collator:
    """Base of our collators: they take of a row what they know, and return its ``row_id``."""


@dataclass
class PaddedCollator(Collator):
    """Pad rows on the right to the longest of the batch.

    The mask comes from lengths, never from token ids: with pad == eos a mask by id would hide every row's end.

    Args:
        pad_token_id: fills ``input_ids``; hidden by the mask and by the labels, so any valid id will do.
        pad_to_multiple_of: round the width up to a multiple of this.

    Returns (of a call):
        ``input_ids``, ``attention_mask``, ``labels`` [B, T] and ``row_id`` [B], all int64.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        step = self.pad_to_multiple_of or 1
        width = -(-max(len(example["input_ids"]) for example in examples) // step) * step
        input_ids = torch.full((len(examples), width), self.pad_token_id)
        labels = torch.full((len(examples), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(examples), width), dtype=torch.int64)
        for k, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[k, :length] = torch.tensor(example["input_ids"])
            labels[k, :length] = torch.tensor(example["labels"])
            attention_mask[k, :length] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "row_id": torch.tensor([example.get("row_id", NO_ROW) for example in examples]),
        }


class PackedCollator(Collator):
    """Lay the rows of a batch one after the other in a single row, without padding.

    ``position_ids`` restart at 0 for each row. Transformers (>= 5) reads the borders from them and lets no token
    attend across, but **only when it gets neither an attention mask nor a KV cache**: call the model with
    ``use_cache=False``, or the borders are silently ignored. Some families always ignore them:
    ``packed_attention.check_packing`` tells.

    Args:
        borders: also give ``borders``, the ``packed_attention.borders_mask`` of the rows: the attention mask of a model
            for which ``check_packing`` returned True.

    Returns (of a call):
        ``input_ids``, ``position_ids``, ``labels`` [1, sum of T] and ``row_id`` [rows], all int64. The first label of
        each row is -100: after the shift it would be predicted from the row before.
    """

    def __init__(self, borders: bool = False) -> None:
        self.borders = borders

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = [i for example in examples for i in example["input_ids"]]
        positions = [i for example in examples for i in range(len(example["input_ids"]))]
        labels = [i for example in examples for i in (IGNORE_INDEX, *example["labels"][1:])]
        batch = {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
            "row_id": torch.tensor([example.get("row_id", NO_ROW) for example in examples]),
        }
        if self.borders:
            batch["borders"] = borders_mask([len(example["input_ids"]) for example in examples])
        return batch


def check_positions(model: PreTrainedModel, name: str, tokens: int, advice: str) -> None:
    """Refuse ``tokens`` tokens in one row where ``model`` has fewer positions.

    Learned positions would fail in the middle of the run; rotary ones would get worse without a word.

    Args:
        model: a causal language model; one whose configuration names no limit takes everything.
        name: the word for it in the error.
        tokens: of the longest row.
        advice: what to change.

    Raises:
        UserError: it does not fit.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(
            f"{name} ({type(model).__name__}) has {positions} positions, but the longest row needs {tokens}. {advice}"
        )


class LengthGroupedSampler(Sampler[int]):
    """Shuffle rows so that each batch holds rows of similar length, the same way on every rank and after a resume.

    The order is a function of ``(seed, epoch)`` alone. The sampler of ``transformers`` draws from the global
    generator: another order after a resume, and other orders on ranks whose generators have drifted apart.

    Rows are shuffled, cut into pools of ``pool_batches`` batches, sorted inside a pool, cut into batches, and the
    batches shuffled. The batch with the longest row comes first in epoch 0, so that a lack of memory shows at once.

    Args:
        lengths: tokens of each row (``EncodedDataset.lengths``).
        batch_size: rows that should be of similar length: one micro-batch times the number of processes.
        seed: of the run.
        pool_batches: batches sorted together; more means less padding and less randomness.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, pool_batches: int = 50) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        # At least four pools, or short and long rows of a small set would meet in the same batches in every epoch.
        self.pool_batches = max(1, min(pool_batches, len(self.lengths) // (4 * batch_size)))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; call it before iterating."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"length groups {self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        whole = len(order) - len(order) % self.batch_size
        # Rows that fill no batch go last: anywhere else they would shift every later batch across the groups.
        order, rest = order[:whole], order[whole:]
        pool = self.pool_batches * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, whole, pool):
            ordered = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            batches += [ordered[k : k + self.batch_size] for k in range(0, len(ordered), self.batch_size)]
        draw.shuffle(batches)
        if self.epoch == 0 and batches:
            longest = max(range(len(batches)), key=lambda k: self.lengths[batches[k][-1]])
            batches[0], batches[longest] = batches[longest], batches[0]
        return iter([index for batch in [*batches, rest] for index in batch])
