"""What the scripts in this folder share: arguments, the protocol's length rules, row counts, manifest, writing.

A set is written to ``<output>/<set>/``: one row file a split and, last of all, ``manifest.json``. Everything is read,
checked and counted before the first byte is written, so a wrong source changes nothing. The same source and options
give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from _download import Source

from dts_hf.data.chat_templates import get_template
from dts_hf.data.formats import parse_row
from dts_hf.data.row_files import read_objects
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import KNOWN_SETS, MANIFEST, read_manifest
from dts_hf.files import file_sha256, write_json_atomic

MAX_PROMPT_TOKENS = 256
# Reference bins of the protocol, in tokens of the first reference: the sets that are reported use the last one.
BINS: dict[str, tuple[int, int | None]] = {"0_2": (0, 2), "3_5": (3, 5), "6_10": (6, 10), "11_": (11, None)}
GPT2 = "openai-community/gpt2"
# SHA-256 of GPT-2's sorted vocabulary, as `Lengths.describe` computes it.
GPT2_VOCABULARY = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"
MAX_UNZIPPED_BYTES = 4 << 30
#: Splits whose rows give way to those of the held-out splits; ``valid`` (Dolly's) gives way to ``test`` too.
GIVES_WAY = ("valid", "train")

JsonObject = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ arguments


def parser(doc: str, source: str) -> argparse.ArgumentParser:
    """The arguments that every script has.

    Args:
        doc: the script's docstring; its first line is the description, the examples and the rest stand below the options.
        source: the default source.
    """
    first, _, rest = doc.partition("\n")
    made = argparse.ArgumentParser(
        description=first, epilog=rest.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--source", default=source, help="local file or folder, URL, or Hub name (default: %(default)s)")
    made.add_argument("--output", type=Path, default=Path("data"), help="data folder (default: %(default)s)")
    made.add_argument("--revision", help="branch, tag or commit on the Hub")
    made.add_argument("--checksum", help="SHA-256 or git blob id that the source file must have")
    made.add_argument(
        "--allow-other-counts", action="store_true", help="accept row counts other than the published ones"
    )
    return made


def with_tokenizer(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--tokenizer``, for the sets with a length rule."""
    made.add_argument(
        "--tokenizer",
        default=GPT2,
        metavar="NAME|FOLDER|none",
        help="counts the tokens of the length rules: Hub name or local folder (vocab.json, merges.txt); 'none' applies"
        " no length rule, and the manifest says so (default: %(default)s)",
    )
    return made


def run(prepare: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Call ``prepare``; wrong input is one message on stderr and status 2."""
    try:
        prepare(arguments)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Error: {error.filename or arguments.output}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


# -------------------------------------------------------------------------------------------------------- length rules


class Lengths:
    """Token counts for the length rules; ``name`` ``none`` means that they are not applied.

    Raises:
        UserError: the tokenizer cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tokenizer: Any = None
        if name == "none":
            return
        from transformers import AutoTokenizer

        try:
            # Only counted, never put into a model: no warning about a model's longest sequence.
            self.tokenizer = AutoTokenizer.from_pretrained(name, model_max_length=1 << 60)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--tokenizer: {name} cannot be loaded: {' '.join(str(error).split())[:200]}. Give a folder with GPT-2's"
                " vocab.json and merges.txt, or 'none' to leave the length rules out (the manifest will say so)"
            ) from None

    def __bool__(self) -> bool:
        return self.tokenizer is not None

    def of_texts(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text, without special tokens."""
        if not texts:
            return []
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    def of_prompts(self, rows: Sequence[JsonObject]) -> list[int]:
        """Number of tokens of each row's Alpaca prompt."""
        template = get_template("alpaca")
        checked = [parse_row(row, str(row["id"]), str(row["id"])) for row in rows]
        return self.of_texts([template.render(row, self.tokenizer) for row in checked])

    def describe(self) -> JsonObject | None:
        """For the manifest: name (a folder's last part), vocabulary, and whether it is GPT-2's."""
        if not self:
            return None
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        digest = hashlib.sha256(vocabulary.encode()).hexdigest()
        return {
            "name": Path(self.name).name if Path(self.name).exists() else self.name,
            "vocabulary_size": len(self.tokenizer),
            "vocabulary_sha256": digest,
            "is_gpt2": digest == GPT2_VOCABULARY,
        }


# ------------------------------------------------------------------------------------------------------------- one set


class Job:
    """One set on its way from the source to the output folder; collects what the manifest will say.

    Args:
        name: canonical name of the set.
        licence: of the rows, with what is known about parts.
        arguments: as parsed by :func:`parser`.
        source: shared between the tasks of GLUE; None: made from the arguments.
    """

    def __init__(self, name: str, licence: str, arguments: argparse.Namespace, source: Source | None = None) -> None:
        self.name, self.licence, self.arguments = name, licence, arguments
        self.source = source or Source(
            arguments.source, arguments.output / ".downloads", arguments.revision, arguments.checksum
        )
        self.lengths = Lengths(getattr(arguments, "tokenizer", "none"))
        self.rules: list[str] = []
        self.dropped: Counter[str] = Counter()

    def clean(self, rows: Iterable[tuple[str, JsonObject]], id_prefix: str) -> list[JsonObject]:
        """Check rows and give them ids.

        Args:
            rows: (place, object with instruction, input, output and perhaps id, category, task).
            id_prefix: rows without an id are called ``<prefix>-<position in the source, from 0>``.

        Raises:
            UserError: a row that is wrong, or an id that appears twice.
        """
        kept: list[JsonObject] = []
        places: dict[str, str] = {}
        for number, (where, raw) in enumerate(rows):
            if not isinstance(raw, Mapping):
                parse_row(raw, where, "")  # says what is wrong
            if _is_blank(raw.get("output")):
                self.dropped["empty response"] += 1
                continue
            parsed = parse_row(raw, where, f"{id_prefix}-{number:05d}")
            if parsed.id in places:
                raise UserError(f"{where}: the id '{parsed.id}' is already used by {places[parsed.id]}")
            places[parsed.id] = where
            output = raw["output"] if isinstance(raw["output"], str) else list(parsed.references)
            row = {"id": parsed.id, "instruction": parsed.instruction, "input": parsed.input, "output": output}
            extra = {"category": raw.get("category") or raw.get("topic"), "task": raw.get("task")}
            kept.append(row | {key: value for key, value in extra.items() if isinstance(value, str)})
        return kept

    def drop_long_prompts(self, rows: list[JsonObject], split: str = "") -> list[JsonObject]:
        """The protocol's first rule: a prompt of more than 256 tokens leaves the set."""
        rule = f"prompts (Alpaca template) of more than {MAX_PROMPT_TOKENS} tokens dropped"
        return self._filter(rows, rule, f"prompt over {MAX_PROMPT_TOKENS} tokens", split, self.lengths.of_prompts,
                            lambda length: length <= MAX_PROMPT_TOKENS)  # fmt: skip

    def keep_bin(self, rows: list[JsonObject], name: str = "11_") -> list[JsonObject]:
        """The protocol's second rule: only rows whose FIRST reference has so many tokens."""
        low, high = BINS[name]
        bound = "inf)" if high is None else f"{high}]"
        if not self.lengths and high is None:  # a token has a byte at least, so this much can be told without counting
            short = sum(len(text.encode()) < low for text in _first_references(rows))
            if 2 * short > len(rows):
                raise UserError(
                    f"{self.name}: {short:,} of {len(rows):,} rows have a first reference of fewer than {low} bytes, so of"
                    f" fewer than {low} tokens: this is the file of another length, expected [{low}, {bound} tokens"
                )
        rule = f"only rows whose first reference has [{low}, {bound} tokens"
        return self._filter(rows, rule, f"first reference outside [{low}, {bound} tokens", "",
                            lambda rows: self.lengths.of_texts(_first_references(rows)),
                            lambda length: low <= length and (high is None or length <= high))  # fmt: skip

    def _filter(
        self,
        rows: list[JsonObject],
        rule: str,
        reason: str,
        split: str,
        measure: Callable[[Sequence[JsonObject]], list[int]],
        keep: Callable[[int], bool],
    ) -> list[JsonObject]:
        rule = rule if self.lengths else f"NOT applied (--tokenizer none): {rule}"
        if rule not in self.rules:
            self.rules.append(rule)
        if not self.lengths:
            return rows
        kept = [row for row, length in zip(rows, measure(rows)) if keep(length)]
        if len(kept) < len(rows):
            self.dropped[f"{split}: {reason}" if split else reason] += len(rows) - len(kept)
        return kept

    def write(self, splits: Mapping[str, Sequence[JsonObject]]) -> None:
        """Compare the row counts with the published ones, then write the splits and the manifest.

        A row of train that asks the question of a held-out row is left out: the published counts are those before that.

        Raises:
            UserError: an empty split, or other counts than published without ``--allow-other-counts``.
        """
        expected = KNOWN_SETS[self.name].rows
        found = {split: len(rows) for split, rows in splits.items()}
        splits = self._apart(splits)
        counts = {split: len(rows) for split, rows in splits.items()}
        self._check_counts(counts, found, expected)
        folder = self.arguments.output / self.name
        texts = {split: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
                 for split, rows in splits.items()}  # fmt: skip
        manifest = {
            "set": self.name,
            "source": self.source.describe(),
            "licence": self.licence,
            "tokenizer": self.lengths.describe(),
            "rules": self.rules,
            "dropped": dict(self.dropped),
            "files": {
                split: {
                    "file": f"{split}.jsonl",
                    "rows": counts[split],
                    "bytes": len(text),
                    "sha256": hashlib.sha256(text).hexdigest(),
                }
                for split, text in texts.items()
            },
            "published_rows": dict(expected),
            "counts_as_expected": all(found.get(split) == rows for split, rows in expected.items()),
        }
        if self._is_there(folder, manifest):
            print(f"{self.name}: already prepared in {folder}, nothing changed")
            return
        self._commit(folder, texts, manifest)
        rows = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        print(f"{self.name}: {rows} rows in {folder}")
        for reason, number in self.dropped.items():
            print(f"  dropped {number:,}: {reason}")

    def _apart(self, splits: Mapping[str, Sequence[JsonObject]]) -> dict[str, Sequence[JsonObject]]:
        """The splits, without the rows of train and valid whose question a split behind them has (see ``GIVES_WAY``)."""
        apart = dict(splits)
        asked = {
            key for split, rows in splits.items() if split not in GIVES_WAY for row in rows for key in identity(row)
        }
        for split in GIVES_WAY:
            if split not in apart:
                continue
            rows = apart[split]
            apart[split] = without(rows, asked)
            if len(apart[split]) < len(rows):
                self.dropped[f"{split}: the question of a held-out row"] += len(rows) - len(apart[split])
            asked |= {key for row in apart[split] for key in identity(row)}
        return apart

    def _check_counts(self, counts: Mapping[str, int], found: Mapping[str, int], expected: Mapping[str, int]) -> None:
        empty = [split for split, count in counts.items() if not count]
        if empty:
            dropped = "".join(f"; dropped {number:,}: {reason}" for reason, number in self.dropped.items())
            raise UserError(f"{self.name}: no rows are left for {', '.join(empty)}{dropped}")
        other = [f"{split} has {found.get(split, 0):,} rows, expected {rows:,}"
                 for split, rows in expected.items() if found.get(split) != rows]  # fmt: skip
        if other and not self.arguments.allow_other_counts:
            raise UserError(
                f"{self.name}: {'; '.join(other)} (as published). Scores on other rows do not compare with published"
                " ones; --allow-other-counts writes them all the same"
            )

    @staticmethod
    def _is_there(folder: Path, manifest: Mapping[str, Any]) -> bool:
        try:
            if read_manifest(folder) != manifest:
                return False
            return all(file_sha256(folder / f["file"]) == f["sha256"] for f in manifest["files"].values())
        except (UserError, OSError):
            return False

    @staticmethod
    def _commit(folder: Path, texts: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
        """Write aside, then take the manifest away, rename, and put the new manifest there last.

        A process killed anywhere leaves the old set, or a set without a manifest (not prepared), never a mixture.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.jsonl.*.tmp"):  # of a killed run
            stale.unlink()
        earlier = read_manifest(folder).get("files") or {}
        aside = {split: folder / f".{split}.jsonl.{os.getpid()}.tmp" for split in texts}
        try:
            for split, path in aside.items():
                path.write_bytes(texts[split])
            (folder / MANIFEST).unlink(missing_ok=True)
            for split, path in aside.items():
                os.replace(path, folder / f"{split}.jsonl")
            for split in earlier.keys() - texts.keys():
                (folder / f"{split}.jsonl").unlink(missing_ok=True)
            write_json_atomic(folder / MANIFEST, manifest)
        finally:
            for path in aside.values():
                path.unlink(missing_ok=True)


def _first_references(rows: Sequence[JsonObject]) -> list[str]:
    return [row["output"] if isinstance(row["output"], str) else row["output"][0] for row in rows]


def _is_blank(output: object) -> bool:
    if isinstance(output, (list, tuple)):
        return not output or (isinstance(output[0], str) and not output[0].strip())
    return isinstance(output, str) and not output.strip()


# -------------------------------------------------------------------------------------------------- the same question?


def plain(text: str) -> str:
    """Letters and digits of ``text`` alone, without what stands in square brackets.

    Editions of a text differ in punctuation and in Wikipedia's marks (``[3]``, ``[a]``, ``[citation needed]``), which stand
    behind letters, full stops, brackets and quotes alike: they go first, before the punctuation around them does.
    """
    bare, count = unicodedata.normalize("NFKC", text), 1  # an accent is a letter's, or a character of its own
    while count:  # once more for a mark within brackets
        bare, count = re.subn(r"\[\s*\w[^\[\]]{0,40}\]", "", bare)
    return re.sub(r"\W+", "", bare).casefold()


def identity(row: JsonObject) -> set[tuple[str, ...]]:
    """What makes two rows the same question: one of these in common.

    The texts that are asked with; of instruction rows also instruction and answer, because an edition may lack the input.
    """
    if "instruction" not in row:
        texts = [value for name, value in row.items() if isinstance(value, str) and name not in ("id", "idx", "label")]
        return {("texts", *map(plain, texts))}
    instruction = plain(row["instruction"])
    answers = [row["output"]] if isinstance(row["output"], str) else row["output"]
    return {("input", instruction, plain(row["input"])), *(("output", instruction, plain(text)) for text in answers)}


def without(rows: Sequence[JsonObject], asked: set[tuple[str, ...]]) -> list[JsonObject]:
    """The rows that share no ``identity`` with ``asked``."""
    return [row for row in rows if not identity(row) & asked]


# ------------------------------------------------------------------------------------------------------------- reading


def objects(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, object) of each line of a JSONL file, also gzipped or in a zip, or of each row of a Parquet file.

    Raises:
        UserError: broken JSON, a truncated file; the message names file and line.
    """
    if path.suffix == ".zip":
        yield from _zipped_objects(path)
    else:
        for _, where, obj in read_objects(path):
            yield where, obj


def read_json(path: Path) -> Any:
    """The one JSON value of a file.

    Raises:
        UserError: the file is broken; the message names it and the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: broken JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None


def zip_texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files in a zip, read in memory: nothing is unpacked to disk.

    Raises:
        UserError: the zip is broken or too large, or a member's name leads out of the folder or is a link.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                _check_member(path, member)
            if sum(member.file_size for member in members) > MAX_UNZIPPED_BYTES:
                raise UserError(f"{path}: more than {MAX_UNZIPPED_BYTES >> 30} GiB unpacked, expected far less")
            for member in members:
                if not member.is_dir() and not member.filename.startswith("__MACOSX/"):
                    yield member.filename, archive.read(member)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: the zip file is broken or cannot be read: {error}") from None


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
    if is_link or ".." in parts or name.startswith(("/", "\\")) or PureWindowsPath(name).drive:
        raise UserError(f"{path}: the member '{name}' leads out of its folder; this zip is not read")


def _zipped_objects(path: Path) -> Iterator[tuple[str, Any]]:
    found = False
    for name, content in zip_texts(path):
        if not name.endswith(".jsonl"):
            continue
        found = True
        for number, line in enumerate(content.split(b"\n"), 1):
            where = f"{path}: {name}: line {number}"
            try:
                if line.strip():
                    yield where, json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: broken JSON: {error}") from None
    if not found:
        raise UserError(f"{path}: there is no .jsonl file in this zip")
