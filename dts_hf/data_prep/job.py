"""One set on its way from the source to its folder: rows checked, counted, kept apart, and written with a manifest.

A set is written to ``<output>/<set>/``: one row file a split and, last of all, ``manifest.json``. Everything is read,
checked and counted before the first byte is written, so a wrong source changes nothing. The same source and options
give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dts_hf.console import show
from dts_hf.data.formats import parse_row
from dts_hf.data_prep.download import Source, git_blob
from dts_hf.data_prep.lengths import BINS, MAX_PROMPT_TOKENS, JsonObject, Lengths
from dts_hf.data_prep.same_question import identity, without
from dts_hf.data_prep.upstream import UPSTREAM
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import KNOWN_SETS, MANIFEST, read_manifest
from dts_hf.files import check_output_folder, file_sha256, naming, write_json_atomic

#: Splits whose rows give way to those of the held-out splits; ``valid`` (Dolly's) gives way to ``test`` too.
GIVES_WAY = ("valid", "train")


class Job:
    """One set on its way from the source to the output folder; collects what the manifest will say.

    Args:
        name: canonical name of the set.
        arguments: as parsed by :func:`dts_hf.data_prep.arguments.parser`.
        licence: of the rows, with what is known about parts; None: that of the table of sources.
        source: shared between the tasks of GLUE; None: made from the arguments.

    Raises:
        UserError: nothing can be written in the output folder.
    """

    def __init__(
        self, name: str, arguments: argparse.Namespace, licence: str | None = None, source: Source | None = None
    ) -> None:
        check_output_folder(arguments.output)  # before anything is downloaded
        self.name, self.arguments = name, arguments
        self.licence = licence or UPSTREAM[name].licence
        self.source = source or Source(
            arguments.source, arguments.output / ".downloads", arguments.revision, arguments.checksum
        )
        self.lengths = Lengths(getattr(arguments, "tokenizer", "none"))
        self.rules: list[str] = []
        self.dropped: Counter[str] = Counter()

    def note_edition(self, path: Path) -> None:
        """Say in the manifest that the default source is not the file that these rules were checked with."""
        known = UPSTREAM[self.name]
        if known.blob and self.arguments.source == known.source and git_blob(path) != known.blob:
            self.rules.append(f"the source's file is another edition than the one checked (git blob {known.blob})")

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
        """The protocol's second rule: only rows whose FIRST reference has so many tokens.

        Raises:
            UserError: without a tokenizer, most references are too short to have that many.
        """
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
            show(f"{self.name}: already prepared in {folder}, nothing changed")
            return
        self._commit(folder, texts, manifest)
        rows = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        show(f"{self.name}: {rows} rows in {folder}")
        for reason, number in self.dropped.items():
            show(f"  dropped {number:,}: {reason}")

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
                with naming(path):
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
