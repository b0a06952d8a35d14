"""``dts-hf export``: a finished student in its quantised form, as ``from_pretrained`` loads it (``TorchAoConfig``).

What training rounded in every forward (``models.fake_quantization``) is stored as the integers and scales that it was
rounded to, in safetensors. The loss of both is compared before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TorchAoConfig
from transformers.utils import logging as transformers_logging

from dts_hf.console import gb, say, working
from dts_hf.data.chat_templates import AUTO, resolve_template
from dts_hf.data.encoding import EncodedDataset, encode_rows
from dts_hf.data.sources import load_rows
from dts_hf.errors import RunError, UserError
from dts_hf.evaluation.subject import Subject, find_subject
from dts_hf.files import check_can_write, check_name, read_json
from dts_hf.language_modeling.task import LanguageModeling
from dts_hf.models.calibration import Calibration
from dts_hf.models.fake_quantization import (
    OTHER,
    TRAINED_FOR,
    fake_quantized_layers,
    prepare_for_quantization,
    quantize_section,
    torchao_config,
    without_fake_quantization,
)
from dts_hf.models.loading import load_model, load_tokenizer, load_weights, loading
from dts_hf.models.quantization import stored
from dts_hf.models.saving import STUDENT_FILE, Carried, save_student
from dts_hf.recipe.schema import Quantize
from dts_hf.reporting.facts import without_folders
from dts_hf.reporting.model_card import card_of_a_folder, render_model_card
from dts_hf.runs.directory import RunDirectory
from dts_hf.task import Rows

#: Nats per label by which the quantised student may differ from the rounded one; more, and it is not what was trained.
CLOSE = 0.01
#: Files of an export, which another one may replace.
WRITTEN = (
    "README.md", "config.json", STUDENT_FILE, "generation_config.json", "chat_template.jinja", "model*.safetensors",
    "model.safetensors.index.json", "*token*.json", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
#: So many rows are read at most, and on so many of them the losses are compared.
READ_ROWS, COMPARED_ROWS = 256, 16


@dataclass(frozen=True)
class ExportOptions:
    """How a student is exported.

    Attributes:
        scheme: as ``student.quantize.scheme``; None: the one that it was trained for.
        group_size: as ``student.quantize.group_size``; None: that of its training, 0: one scale for each row.
        data: rows on which the losses are compared; None: the held-out rows of its run.
        dtype: of what stays unquantised, and of the scales; None: that of its files.
        overwrite: replace an earlier export in the folder.
    """

    scheme: str | None = None
    group_size: int | None = None
    data: Path | None = None
    dtype: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: with the model, its tokenizer and its card.
        quantize: scheme and group size.
        trained_for: whether the student was trained for them.
        nats: mean cross-entropy per label of the quantised student as it was written.
        rounded: the same of the student as it was trained, its weights rounded in every forward.
        full: the same of its weights as they are.
        rows: that these are means over.
        labels: the same.
        size: of the weights, bytes.
        size_before: of the student's files.
    """

    folder: Path
    quantize: Quantize
    trained_for: bool
    nats: float
    rounded: float
    full: float
    rows: int
    labels: int
    size: int
    size_before: int

    @property
    def difference(self) -> float:
        """Nats per label between what was written and what was trained."""
        return abs(self.nats - self.rounded)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self) | {"folder": str(self.folder), "quantize": self.quantize.model_dump()}
        return values | {"difference": self.difference}

    def sentence(self) -> str:
        """In words."""
        return (
            f"{describe(self.quantize)}, {gb(self.size)} of weights (before: {gb(self.size_before)}); {self.nats:.4f} nats "
            f"per label on {self.rows} rows ({self.labels:,} labels), {self.difference:.1e} from the student as it was "
            f"{'trained' if self.trained_for else 'rounded'}; unquantised {self.full:.4f}"
        )


def describe(quantize: Quantize) -> str:
    """``int4_weight_only, a scale for 32 weights``."""
    return f"{quantize.scheme}, a scale for {quantize.group_size or 'each row of'} weights"


def export_quantized(source: Path, out: Path, options: ExportOptions | None = None) -> Exported:
    """Quantise a student and write it into a folder of its own.

    Args:
        source: a run directory, or the folder of a student.
        out: the folder; new or empty, or with ``options.overwrite`` that of an earlier export.
        options: None: the usual ones.

    Raises:
        UserError: wrong input, before anything is loaded or written.
        RunError: the quantised student is not what was trained; nothing is written then.
    """
    options = options or ExportOptions()
    check_out(out, options.overwrite)
    subject = find_subject(str(source))
    folder = Path(subject.location)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{source}: holds an adapter, expected whole weights: save it with student.lora.save: merged")
    if not (folder / "config.json").is_file():
        raise UserError(f"{source}: holds no config.json, expected a run directory or a student's folder")
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise UserError(f"{source}: its weights are quantised already, expected those of a training")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--output: {out} is inside of {folder}, whose files are the student's; choose another folder")
    quantize, trained_for = _asked(source, options, config.get(TRAINED_FOR))
    torchao_config(quantize)  # refuses a missing torchao
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(str(folder), key=str(source))
    dtype = options.dtype or _dtype_of(folder, str(source))
    rows = Calibration.of(_rows(source, subject, options.data, tokenizer), COMPARED_ROWS)
    with working("quantising the student"):
        full, rounded, names = _rounded(folder, quantize, dtype, rows, str(source))
        model = _quantized(folder, quantize, dtype, names, str(source))
        nats = rows.nll(model)
    if not abs(nats - rounded) <= CLOSE:
        raise RunError(
            f"{source}: the quantised student has {nats:.4f} nats per label and the one that was trained {rounded:.4f}, "
            f"more than {CLOSE} apart, so nothing is written. Is --dtype too coarse ({dtype})?"
        )
    sizes = {"size_before": _weights(folder), "size": 0}
    found = Exported(out, quantize, trained_for, nats, rounded, full, len(rows.row_ids), rows.labels, **sizes)
    facts = None if subject.student is None else {**subject.student.facts, "dtype": dtype}
    save_student(model, tokenizer, out, carried=Carried(facts, card=_card(source, folder, out, found)))
    return replace(found, size=_weights(out))


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot take an export, or should not.

    Raises:
        UserError: a file, a name that is too long, or a folder with other files than an earlier export's.
    """
    check_name(out, "--output")
    if out.exists() and not out.is_dir():
        raise UserError(f"--output: {out} is a file, expected a folder")
    if out.is_symlink():
        raise UserError(f"--output: {out} is a link, expected a folder of its own")
    check_can_write(out, "--output")
    if not out.is_dir() or not any(out.iterdir()):
        return
    quantized = read_json(out / "config.json").get("quantization_config")
    if not isinstance(quantized, Mapping) or quantized.get("quant_method") != "torchao":
        raise UserError(f"--output: {out} is not empty and holds no quantised student; choose another folder")
    others = [path.name for path in out.iterdir() if not any(fnmatch(path.name, name) for name in WRITTEN)]
    if others:  # the folder is replaced as a whole
        raise UserError(
            f"--output: {out} holds {min(others)!r}, which is of no export; choose another folder, or move it"
        )
    if not overwrite:
        raise UserError(
            f"--output: {out} holds a quantised student. Choose another folder, or replace it with --overwrite"
        )


def _asked(source: Path, options: ExportOptions, trained: Any) -> tuple[Quantize, bool]:
    """Scheme and group size, and whether the student was trained for them."""
    known = isinstance(trained, Mapping) and trained.get("scheme") != OTHER
    values: dict[str, Any] = dict(trained) if known else {}
    if options.scheme is None and not known:
        what = "in a way that dts_hf does not know" if isinstance(trained, Mapping) else "for no quantised form"
        raise UserError(f"{source}: it was trained {what}: give --scheme, as in --scheme int4_weight_only")
    if options.scheme is not None:
        values["scheme"] = options.scheme
    if options.group_size is not None:
        values["group_size"] = options.group_size or None
    quantize = quantize_section(values, "--quantized")
    same = known and quantize == quantize_section(dict(trained))
    if not same:
        before = "" if not known else f" but for {describe(quantize_section(dict(trained)))}"
        say(f"{source}: it was not trained for {describe(quantize)}{before}: its weights are rounded as they are")
    return quantize, same


def _dtype_of(folder: Path, key: str) -> str:
    with loading(str(folder), key):
        found = getattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), "dtype", None)
    return str(found or "float32").removeprefix("torch.")


def _rows(source: Path, subject: Subject, data: Path | None, tokenizer: PreTrainedTokenizerBase) -> EncodedDataset:
    """Rows as tokens, with labels on what is learned."""
    if data is None:
        if subject.recipe is None:
            raise UserError(f"--data: {source} is no run directory: give a file of rows to compare the losses on")
        task = LanguageModeling(subject.recipe)
        found = task.load_rows()
        return task.encode(Rows((found.validation or found.train)[:READ_ROWS]), tokenizer).train
    facts: Mapping[str, Any] = {} if subject.student is None else subject.student.facts
    template = resolve_template(AUTO, tokenizer) if subject.student is None else subject.student.template
    usual = {"max_length": 512, "max_prompt_length": 256}
    limits: dict[str, Any] = {name: facts.get(name) or number for name, number in usual.items()}
    rows = load_rows(str(data), limit=READ_ROWS)
    return encode_rows(rows, tokenizer, template, train_on=facts.get("train_on"), name="--data", **limits)[0]


def _rounded(
    folder: Path, quantize: Quantize, dtype: str, rows: Calibration, key: str
) -> tuple[float, float, set[str]]:
    """The loss of the student as it is, and rounded as training did; and which weights were."""
    model = load_model(str(folder), key=key, dtype=dtype)
    prepare_for_quantization(model, quantize, "--quantized")
    with without_fake_quantization(model):
        full = rows.nll(model)
    return full, rows.nll(model), {f"{name}.weight" for name in fake_quantized_layers(model)}


def _quantized(folder: Path, quantize: Quantize, dtype: str, names: set[str], key: str) -> PreTrainedModel:
    """The student with quantised weights: those that training rounded, and no others."""
    options: dict[str, Any] = {"quantization_config": TorchAoConfig(torchao_config(quantize))}
    model, _ = load_weights(AutoModelForCausalLM, str(folder), key=key, dtype=dtype, **options)
    found = {name for name, weight in model.named_parameters() if stored(weight) is not weight}
    if found != names:
        raise RunError(
            f"{key}: transformers quantises other layers than those that were trained for it, such as "
            f"{min(found ^ names)}, so nothing is written"
        )
    return model


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _card(source: Path, folder: Path, out: Path, found: Exported) -> str:
    """The card of the student, with what has become of its weights at the end."""
    name = out.resolve().name
    if (source / "recipe.yaml").is_file():
        card = render_model_card(RunDirectory(source), repository=name, student=folder)
    elif (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    else:
        card = card_of_a_folder(folder, name)
    how = (
        "by quantisation-aware training" if found.trained_for else "after training (it was not trained for this form)"
    )
    scheme = json.dumps({"scheme": found.quantize.scheme, "group_size": found.quantize.group_size})
    return without_folders(card).rstrip() + (
        "\n\n## Quantised form\n\n"
        f"These weights are quantised {how} with torchao: `{scheme}`. Output layer and embeddings are not. The scores above "
        "are of the student before it was exported. On "
        f"{found.rows} rows ({found.labels} labels) this model has {found.nats:.4f} nats per label, the student with "
        f"weights rounded in every forward {found.rounded:.4f}, and with its weights as they are {found.full:.4f}.\n\n"
        "`pip install torchao`, then `AutoModelForCausalLM.from_pretrained` loads it.\n"
    )
