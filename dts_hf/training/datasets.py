"""Data sets of rows of any kind, as a trainer takes them: read once, checked before the first step, and reported on.

A ``RowReader`` is what a trainer knows of its rows' form; each kind of task has its own.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from dts_hf.alignment.rows import AlignmentReport, RowAligner
from dts_hf.data import tokenised
from dts_hf.data.chat_templates import resolve_template
from dts_hf.data.collators import Collator
from dts_hf.data.containers import as_rows
from dts_hf.data.encoded_files import encode_cached
from dts_hf.data.encoding import EncodedDataset, EncodingReport, encode_rows
from dts_hf.data.routes import Routing
from dts_hf.data.sources import rows_from_dataset
from dts_hf.data.streams import RowStream
from dts_hf.distributed.processes import gathered, process
from dts_hf.errors import UserError
from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.models.checks import check_positions, positions_of
from dts_hf.training.pair import Pair

logger = logging.getLogger(__name__)


class RowReader:
    """Makes data sets ready for the data loaders.

    Attributes:
        dummy_labels: labels of a row that only fills a batch, of which no loss takes any.
        reports: what became of the rows, by the name of the data set; of streams, of the rows that were read so far.
        takes_every_row: a row that would be dropped is an error: something is to stand beside each.
        streams: the data sets that are streams, by name.
    """

    takes_every_row = False

    def __init__(self) -> None:
        self.dummy_labels: Any = [IGNORE_INDEX]
        self.reports: dict[str, EncodingReport] = {}
        self.streams: dict[str, RowStream] = {}
        self._told: dict[str, str] = {}

    def prepare(self, dataset: Any, name: str) -> Any:
        """``dataset`` as the data loaders take it, checked; what became of its rows is kept, and said if any was lost.

        Args:
            dataset: rows, or a dictionary of several data sets; None stays None.
            name: what errors and ``reports`` call it.

        Raises:
            UserError: a row is wrong, or none has a label.
        """
        if isinstance(dataset, dict):
            return {key: self.prepare(value, f"{name}['{key}']") for key, value in dataset.items()}
        if dataset is None or isinstance(dataset, (tokenised.TokenisedDataset, RowStream)):
            return dataset
        ready, report = self.read(dataset, name)
        self.streams.pop(name, None)
        if isinstance(ready, RowStream):
            self.streams[name] = ready
        if report is not None:
            self.reports[name] = report
            known = isinstance(dataset, EncodedDataset) and dataset.report is not None  # to whoever encoded it
            if not known and not report.is_whole and process()[0] == 0:
                logger.warning("%s: %s", name, report.summary())
        return ready

    def read(self, dataset: Any, name: str) -> tuple[Any, EncodingReport | None]:
        """Rows as tokens, and what became of them; each row is read once at most.

        Raises:
            UserError: a row is wrong, or none has a label.
        """
        raise NotImplementedError

    def for_answers(self, *, losses: bool) -> RowReader:
        """This reader for rows that are to be answered, which refuses a row that it would drop.

        Args:
            losses: taken as well, so the reference must fit, too; otherwise its length does not matter.
        """
        reader = copy.copy(self)
        reader.takes_every_row = True
        return reader

    def for_card(self) -> dict[str, Any]:
        """How rows became tokens, as a model card tells it."""
        return dict(getattr(self, "encode_options", {}))

    def tell_of_streams(self, names: Callable[[str], bool] = lambda name: True) -> None:
        """Say what became of the rows of streams, where any was lost since it was said last; bring ``reports`` up to date.

        Args:
            names: which of them.
        """
        for name, stream in self.streams.items():
            report = stream.refresh()
            text = report.summary()
            if names(name) and not report.is_whole and self._told.get(name) != text and process()[0] == 0:
                logger.warning("%s, as far as it was read: %s", name, text)
                self._told[name] = text


class StreamReportCallback(TrainerCallback):
    """Says at checkpoints, after evaluations and at the end which rows of streams were dropped, cut, or teach nothing."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self.tell = tell

    def on_save(self, *_: Any, **kwargs: Any) -> None:
        self.tell()

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.tell()

    def on_evaluate(self, *_: Any, **kwargs: Any) -> None:
        self.tell(lambda name: name != "train_dataset")

    def on_predict(self, *_: Any, **kwargs: Any) -> None:
        self.tell(lambda name: name != "train_dataset")


class LanguageRows(RowReader):
    """Rows of language models: text that is to be encoded, or tokens from elsewhere.

    Args:
        pair: the models that read the rows, their tokenizer and the ids that they share.
        template: the name of that of text, or ``auto``.
        limits: of text: ``max_length``, ``max_prompt_length``, ``long_rows`` and ``train_on``; see ``encode_rows``.
        collator: of the batches; one of the user's gets every column of tokenised rows.
        columns: of text, as ``data.columns``: our names and theirs.
        routing: how rows name one of several teachers; None: they do not.

    Attributes:
        aligner: finds what is the same for a teacher with another tokenizer; None: it has the student's.
        alignment_reports: what that found, by the name of the data set.
    """

    def __init__(
        self,
        pair: Pair,
        template: str,
        limits: Mapping[str, Any],
        collator: Any,
        columns: Mapping[str, str | None] | None = None,
        routing: Routing | None = None,
    ) -> None:
        super().__init__()
        named = resolve_template(template, pair.tokenizer, "prompt_template")
        self.encode_options = {"tokenizer": pair.tokenizer, "template": named, **limits}
        self.vocab_size, self.models = pair.vocabulary.size, pair.models()
        self.as_they_are, self.columns = not isinstance(collator, Collator), columns
        self.routing = routing
        self.alignment_reports: dict[str, AlignmentReport] = {}
        self.aligner: RowAligner | None = None
        if pair.teacher_tokenizer is not None:
            own = {key: limits[key] for key in ("train_on", "max_length", "max_prompt_length")}
            self.aligner = RowAligner(pair.tokenizer, pair.teacher_tokenizer, template, **own)

    def read(self, dataset: Any, name: str) -> tuple[Any, EncodingReport | None]:
        """Text is encoded, tokens are checked: at once or, of a stream, as they come.

        Raises:
            UserError: a row is wrong, none has a label, or the data set cannot be read as training reads it.
        """
        form = tokenised.RowForm(name, self.vocab_size, self.as_they_are, routing=self.routing)
        # 1. Rows that ``encode_rows`` has made need no more than a look.
        if isinstance(dataset, EncodedDataset):
            report = self._check_encoded(dataset, form)
            if self.routing is not None and dataset.teachers is None:
                raise UserError(
                    f"{name}: its rows are tokens without their text, so none of them names its teacher; expected an "
                    "EncodedDataset with teachers (data.routes.Routing.route)"
                )
            self._check_read_by_teacher(name, dataset.for_teacher is not None)
            if dataset.for_teacher is not None and "teacher_prefix" not in (self.columns or {}):
                raise UserError(
                    f"{name}: its teacher reads more than the student; expected teacher_prefix_column as well"
                )
            if self.aligner is not None and dataset.aligned is None:
                raise UserError(_no_text(name))
            return dataset, dataset.report or report
        dataset = as_rows(dataset, name, keep_format=self.as_they_are)
        # 2. The first row tells text from tokens; it is read once, for reading it again may cost as much as the first time.
        rows = tokenised.rows_of(dataset)
        first = next(rows, None)
        tokens = isinstance(first, Mapping) and "input_ids" in first
        self._check_read_by_teacher(name, not tokens)
        if self.as_they_are and isinstance(first, Mapping) and tokens and first.get("labels") is None:
            form = dataclasses.replace(form, labelled=False)  # a collator of the user's may make them
        if self.aligner is not None and (tokens or isinstance(dataset, IterableDataset)):
            raise UserError(_no_text(name))
        if isinstance(dataset, IterableDataset):
            if self.routing is not None:
                raise UserError(
                    f"{name}: a stream cannot be routed to several teachers: that each of its rows names one could only be "
                    "found out during training; expected a list or a data set that is read by number, or teachers with "
                    "weights"
                )
            stream = self._stream(dataset, first, form, tokens)
            return stream, stream.report
        if not tokens:
            columns = self.columns if self.routing is None else self.routing.columns(self.columns)
            raw = rows_from_dataset(rows if first is None else chain([first], rows), name, columns)
            every = self.takes_every_row
            encoded, report = encode_cached(raw, name=name, may_be_empty=every, **self.encode_options)
            if every and report.dropped:
                raise UserError(self._too_long(report, name))
            if self.routing is not None:
                self.routing.route(encoded, raw, name)
            if self.aligner is not None:
                self.alignment_reports[name] = self.aligner.align(encoded, raw)
                say_aligned(self.alignment_reports[name], name)
            self._check_encoded(encoded, form)
            return encoded, report
        # 3. Tokens.
        if not hasattr(dataset, "__getitem__"):
            raise UserError(
                f"{name}: got {type(dataset).__name__}, expected a list or a data set that is read by number"
            )
        ready = tokenised.TokenisedDataset(dataset, form, chain([first], rows))
        self._check_positions(max(ready.lengths), "Shorten the rows")
        return ready, ready.report

    def for_card(self) -> dict[str, Any]:
        column = (self.columns or {}).get("teacher_prefix")
        return {**self.encode_options, **({"teacher_prefix_column": column} if column else {})}

    def _check_read_by_teacher(self, name: str, has_text: bool) -> None:
        if not has_text and "teacher_prefix" in (self.columns or {}):
            raise UserError(
                f"{name}: its rows are tokens, and teacher_prefix_column names a text of rows of text; expected those, or "
                "an EncodedDataset of them (data.encoding.encode_rows)"
            )

    def for_answers(self, *, losses: bool) -> LanguageRows:
        reader = cast(LanguageRows, super().for_answers(losses=losses))
        if not losses:  # no model reads the reference: it may be of any length
            reader.encode_options = {**self.encode_options, "max_length": sys.maxsize, "long_rows": "cut"}
            reader.models, reader.routing, reader.aligner = [], None, None
            reader.columns = {
                k: v for k, v in (self.columns or {}).items() if k != "teacher_prefix"
            }  # nobody is taught
        return reader

    def _too_long(self, report: EncodingReport, name: str) -> str:
        limits = [f"max_prompt_length = {self.encode_options['max_prompt_length']}"]
        if self.encode_options["long_rows"] == "drop":
            limits.append(f"max_length = {self.encode_options['max_length']}")
        rows = ", ".join(report.dropped_ids) + (", ..." if report.dropped > len(report.dropped_ids) else "")
        return (
            f"{name}: {report.dropped} of {report.rows} rows are too long for {' or '.join(limits)} ({rows}), so their "
            "answers would be missing; expected shorter rows, or higher limits of the trainer"
        )

    def _stream(self, dataset: Any, first: Any, form: tokenised.RowForm, tokens: bool) -> RowStream:
        """Rows that are read while training runs, by every process in the same order.

        Raises:
            UserError: the first row is wrong, or another one on another process.
        """
        limits = [(positions_of(model), f"{role} ({type(model).__name__})") for model, role in self.models]
        positions = min(((limit, role) for limit, role in limits if limit is not None), default=None)
        encode = None if tokens else partial(encode_rows, name=form.name, may_be_empty=True, **self.encode_options)
        stream = RowStream(dataset, first, form, encode, self.columns, positions)
        if len(set(gathered(stream.first_row, process()[1]))) > 1:
            raise UserError(
                f"{form.name}: its first row is another one on each process, so rows would be taken twice or never; "
                "expected the same data set on all of them, in the same order (shuffle with a seed; do not split it by "
                "node: the trainer shares its rows out)",
                everywhere=True,
            )
        return stream

    def _check_encoded(self, dataset: EncodedDataset, form: tokenised.RowForm) -> EncodingReport:
        report = tokenised.check_encoded(dataset, form)
        if dataset.aligned is None:
            read = dataset.lengths if dataset.for_teacher is None else [*dataset.lengths, *dataset.teacher_lengths]
            self._check_positions(max(read), "Lower data.max_length")
        else:  # each reads tokens of its own
            student, teachers = self.models[:1], self.models[1:]
            self._check_positions(max(dataset.lengths), "Lower data.max_length", student)
            longest = max(len(row.ids) for row in dataset.aligned)
            self._check_positions(longest, "Lower data.max_length: the teacher reads rows in its own tokens", teachers)
        return report

    def _check_positions(self, longest: int, advice: str, models: Sequence[tuple[Any, str]] | None = None) -> None:
        for model, role in self.models if models is None else models:
            check_positions(model, role, longest, advice)  # type: ignore[arg-type]


def _no_text(name: str) -> str:
    return (
        f"{name}: a teacher with another tokenizer reads the text of rows, in its own template; expected a list or a data "
        "set of rows with their text, and no tokens and no stream"
    )


def say_aligned(report: AlignmentReport, name: str) -> None:
    """Say how much is the same; a warning where rows are learned from labels alone.

    Args:
        report: of the rows.
        name: what errors call them.
    """
    if process()[0] == 0:
        logger.log(logging.WARNING if report.unaligned else logging.INFO, "%s: %s", name, report.summary())


def check_aligned(dataset: Any, kd_ratio: float) -> None:
    """Refuse to train on rows of which a teacher with another tokenizer is told nothing.

    Args:
        dataset: of training.
        kd_ratio: the share of the soft loss; with 0 no teacher is needed.

    Raises:
        UserError: no label is the same on both sides.
    """
    rows = getattr(dataset, "aligned", None)
    if rows and kd_ratio and not any(len(row.student) for row in rows):
        raise UserError(
            "teacher.alignment: no label of the training rows is the same for the teacher, so it would teach nothing. Look "
            "at what both templates write (data.prompt_template), or train on labels alone (loss.kd_ratio: 0)"
        )


def try_collator(
    data_collator: Any, collate: Callable[[list[Any]], Mapping[str, Any]], dataset: Any, batch_size: int
) -> bool:
    """A collator of the user's must make labels of the first row, and one batch of rows of different lengths.

    Args:
        data_collator: as the user gave it.
        collate: the same as the data loaders call it.
        dataset: rows that a ``RowReader`` has prepared.
        batch_size: the smallest batch that a process takes.

    Returns:
        Whether it lays rows end to end.

    Raises:
        UserError: it cannot make a batch, or none that a causal language model learns from.
    """
    name = type(data_collator).__name__
    try:
        batch = collate([dataset[0]] * 2)
    except Exception as error:  # whatever it raises
        raise UserError(f"data_collator: {name} cannot make a batch of the first row: {error}") from error
    if getattr(data_collator, "mlm", False):
        raise UserError(
            "data_collator: got mlm true, but a causal language model learns the next token; expected mlm=False"
        )
    if batch.get("labels") is None:
        raise UserError(
            f"data_collator: {name} makes no labels, and the rows have none; expected {tokenised.EXPECTED_LABELS}"
        )
    lengths = dataset.lengths
    ends = [dataset[lengths.index(end)] for end in sorted({min(lengths), max(lengths)})]
    if len(ends) <= batch_size:
        try:
            collate(ends)
        except Exception as error:
            raise UserError(
                f"data_collator: {name} cannot make a batch of the shortest and the longest row ({min(lengths):,} and "
                f"{max(lengths):,} tokens): {error}"
            ) from error
    return len(batch["input_ids"]) == 1
