"""The nine GLUE tasks: fields of a row, names of the classes in their order, and rows read from files or the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dts_hf.data.cells import is_encodable
from dts_hf.data.row_files import read_objects
from dts_hf.data.sources import hub_objects, source_files
from dts_hf.errors import UserError, nearest


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE (Wang et al. 2018, arXiv 1804.07461).

    Attributes:
        subset: its name, as in the ``glue`` data set of the Hub.
        fields: the text fields of a row, one or two.
        labels: the classes in the order of their numbers; none for STS-B, whose label is a number from 0 to 5.
    """

    subset: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def outputs(self) -> int:
        """Logits of a model for this task: one per class, a single score for regression."""
        return len(self.labels) or 1

    def has_label(self, label: float) -> bool:
        """Whether ``label`` is one of the task's; NaN lies in no range."""
        return 0 <= label <= 5 if self.regression else label in range(self.outputs)

    @property
    def row_format(self) -> str:
        label = "a number from 0 to 5" if self.regression else f"0 to {len(self.labels) - 1}"
        return f"{{{', '.join(self.fields)}, label ({label})}}"

    @property
    def describe_labels(self) -> str:
        return ", ".join(f"{number} {name}" for number, name in enumerate(self.labels)) or "a number from 0 to 5"


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
TASKS: dict[str, GlueTask] = {
    task.subset: task
    for task in (
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable")),
        GlueTask("sst2", ("sentence",), ("negative", "positive")),
        GlueTask("mrpc", _PAIR, ("not_equivalent", "equivalent")),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
        GlueTask("stsb", _PAIR, ()),
        GlueTask("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
        GlueTask("qnli", ("question", "sentence"), _ENTAILED),
        GlueTask("rte", _PAIR, _ENTAILED),
        GlueTask("wnli", _PAIR, _ENTAILED[::-1]),
    )
}


def get_task(subset: str) -> GlueTask:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    if subset not in TASKS:
        raise UserError(f"task.subset: got {subset!r}, expected one of {', '.join(TASKS)}.{nearest(subset, TASKS)}")
    return TASKS[subset]


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One example: its one or two ``texts`` and its ``label``, a class number or (STS-B) a score."""

    id: str
    texts: tuple[str, ...]
    label: float


def load_labelled(
    sources: str | Sequence[str], task: GlueTask, *, split: str = "train", limit: int | None = None
) -> list[LabelledRow]:
    """Load and check the rows of one or several sources (as ``data.sources.load_rows``: file, folder, pattern, Hub name).

    A row is an object with the task's fields, ``label`` and, where it has one, ``id`` or ``idx``: what
    ``dts-hf prepare glue`` writes and what the Hub's ``nyu-mll/glue`` holds.

    Args:
        sources: one or several.
        task: its fields and labels are demanded; other fields are ignored.
        split: of a folder or a Hub data set.
        limit: the first so many rows.

    Raises:
        UserError: nothing there, or a row that is wrong, with file and line.
    """
    listed = [sources] if isinstance(sources, str) else list(sources)
    objects = (one for source in listed for one in _objects(source, split))
    rows = [parse_labelled(obj, task, where, default_id) for default_id, where, obj in islice(objects, limit)]
    if not rows:
        raise UserError(f"{', '.join(listed)}: there are no rows in it; expected rows {task.row_format}")
    return rows


def _objects(source: str, split: str) -> Iterator[tuple[str, str, Any]]:
    files = source_files(source, split=split)
    if files is None:
        yield from hub_objects(source, split)
    for file in files or ():
        for number, where, obj in read_objects(file):
            yield f"{file.name.partition('.')[0]}-{number}", where, obj


def parse_labelled(obj: object, task: GlueTask, where: str, default_id: str) -> LabelledRow:
    """Check one row.

    Args:
        obj: the row as it was read.
        task: what it must have.
        where: file and line, for errors.
        default_id: of a row that brings none.

    Raises:
        UserError: a missing field, an empty text, or a label that the task does not have.
    """
    if not isinstance(obj, Mapping):
        raise UserError(f"{where}: got {obj!r}, expected an object {task.row_format}")
    texts = []
    for name in task.fields:
        if name not in obj:
            present = ", ".join(f"'{key}'" for key in obj) or "none"
            others = [str(key) for key in obj if key not in task.fields]
            raise UserError(
                f"{where}: field '{name}' is missing; found the fields {present}, expected {task.row_format} of the task "
                f"{task.subset}.{nearest(name, others)}"
            )
        if not isinstance(obj[name], str) or not obj[name].strip():
            raise UserError(f"{where}: field '{name}': got {obj[name]!r}, expected text that is not empty")
        if not is_encodable(obj[name]):
            raise UserError(f"{where}: field '{name}' holds half of a surrogate pair (a broken \\ud8xx escape)")
        texts.append(obj[name])
    row_id = obj.get("id", obj.get("idx"))
    if not is_encodable(str(row_id)):
        raise UserError(f"{where}: field 'id' holds half of a surrogate pair (a broken \\ud8xx escape)")
    return LabelledRow(default_id if row_id is None else str(row_id), tuple(texts), _label(obj, task, where))


def _label(obj: Mapping[Any, Any], task: GlueTask, where: str) -> float:
    if "label" not in obj:
        raise UserError(f"{where}: field 'label' is missing, expected {task.describe_labels}")
    label = obj["label"]
    if isinstance(label, (int, float)) and not isinstance(label, bool) and task.has_label(label):
        return float(label) if task.regression else int(label)
    hidden = " The labels of GLUE's test splits are hidden: they can be neither trained on nor scored." * (label == -1)
    raise UserError(
        f"{where}: field 'label': got {label!r}, expected {task.describe_labels} (task {task.subset}).{hidden}"
    )
