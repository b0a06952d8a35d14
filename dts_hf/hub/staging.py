"""The one place that says which files leave the machine. Every upload is a folder that ``stage`` has made.

It is a list of what may go, not of what may not: a file that nobody thought of stays here. Predictions, rows, logs,
checkpoints, optimizer states, ``training_args.bin``, the command line and the environment of this machine have no name in
it. What is text is cleaned of local paths, and refused by name where something in it looks like an access token.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from dts_hf.console import gb, secrets_in
from dts_hf.errors import UserError
from dts_hf.files import jsonable, naming
from dts_hf.on_policy.settings import PLACES
from dts_hf.recipe.yaml_files import dump_values
from dts_hf.reporting import model_card
from dts_hf.reporting.facts import MODELS, publishable, short_name, without_folders
from dts_hf.runs.directory import is_before

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
PROTOCOL = model_card.STUDENT_FILE  # template and protocol that the student was trained and scored with
#: What is taken from a student's folder as ``save_pretrained`` left it.
OF_STUDENT = (*WEIGHTS, *ADAPTER, *CONFIGS, *TOKENIZER, PROTOCOL)
CARD, RECIPE, METRICS = "README.md", "recipe.yaml", "metrics.json"
FIGURES = tuple(f"figures/{name}.png" for name in model_card.FIGURES)
#: Everything that is ever uploaded; a download takes no other file either.
ALLOWED = (*OF_STUDENT, CARD, RECIPE, METRICS, *FIGURES)
#: What an older upload may have left in a repository: another student's template or scores beside this one's weights would
#: be wrong, and two forms of weights cannot be told apart. The card is always among what is new.
REPLACED = tuple(name for name in ALLOWED if name != CARD)
#: JSON in which any text may be a path of this machine. Not the tokenizer's: its vocabulary holds "/" and "~" as tokens.
_CLEANED = (*CONFIGS, "adapter_config.json", PROTOCOL)
#: Of tokenizer_config.json, which keeps where it was read.
_PATH_KEYS = (
    "name_or_path",
    "_name_or_path",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "special_tokens_map_file",
)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
_BINARY = (".safetensors", ".model", ".png")
#: What ``metrics.json`` has that says how good the student is; of the training these numbers.
_METRICS = ("format", "protocol", "models", "training", "task")
_TRAINING = (
    "steps", "seconds", "total_seconds", "tokens", "peak_memory_gb", "vocabulary_note", "seed", "best_step", "best_epoch",
)  # fmt: skip
#: What ``dts_hf.json`` has, as ``evaluation.student_file`` writes it.
_FACTS = (
    "format", "dts_hf", "prompt_template", "wraps_prompts", "train_on", "max_length", "max_prompt_length", "protocol",
    "dtype", "distillation",
)  # fmt: skip


class Staged(NamedTuple):
    """A folder that holds what is uploaded and nothing else; ``files`` are (name, bytes), by name."""

    folder: Path
    files: list[tuple[str, int]]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.files]

    @property
    def size(self) -> str:
        """Bytes of all files, for people."""
        total = sum(size for _, size in self.files)
        return gb(total) if total >= 1e6 else f"{total / 1e3:,.0f} kB"


def is_allowed(name: str) -> bool:
    """Whether a file of this name, with ``/`` between folders, may be uploaded or downloaded."""
    # fnmatch takes "/" for any other character: no pattern of ours may reach into a folder that it does not name
    return any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in ALLOWED)


def has_weights(names: Iterable[str]) -> bool:
    """Whether there are weights among ``names``, whole or of an adapter."""
    patterns = [pattern for pattern in (*WEIGHTS, *ADAPTER) if pattern.endswith(".safetensors")]
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def stage(
    student: Path,
    target: Path,
    *,
    card: str,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    figures: Iterable[Path] = (),
    end_tokens: Iterable[int] = (),
) -> Staged:
    """Make the folder that is uploaded. Weights are linked, not copied, where the disk can; all else is written anew.

    Args:
        student: a folder as ``save_pretrained`` leaves it, or a checkpoint; whatever else lies in it stays there.
        target: an empty folder, or none yet.
        card: text of README.md.
        recipe: the effective recipe; names of local files lose their folders.
        metrics: the contents of ``metrics.json``; scores and sizes are taken, and no text of a row.
        figures: pictures that the card shows.
        end_tokens: that generation stops at, beside those of ``generation_config.json``.

    Raises:
        UserError: there are no weights, a file is a link out of its folder, a text holds an access token, or the head of the
            weights holds a text.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = list(_names_in(student))
    if not has_weights(names):
        raise UserError(f"{student}: holds no weights that can be uploaded, expected model.safetensors or an adapter")
    for name in names:
        _place(student, name, target / name)
    for name in _CLEANED:
        if (target / name).is_file():
            values = _read_json(target / name)
            kept = {key: values[key] for key in _FACTS if key in values} if name == PROTOCOL else values
            if (cleaned := publishable(kept)) != values:
                _write_json(target / name, cleaned)
    _clean_tokenizer_config(target / "tokenizer_config.json")
    _stop_at(target / "generation_config.json", list(end_tokens))
    for figure in figures:
        if is_allowed(name := f"figures/{figure.name}"):
            _place(figure.parent, figure.name, target / name)
    _write_text(target / CARD, card)
    if recipe is not None:
        _write_text(target / RECIPE, public_recipe(recipe))
    if metrics:
        _write_json(target / METRICS, publishable(_public_metrics(metrics)))
    check_no_secret(target)
    for path in sorted(target.glob("*.safetensors")):
        check_head(path)
    files = sorted((path.relative_to(target).as_posix(), path.stat().st_size) for path in _files(target))
    return Staged(target, files)


def public_recipe(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML without comments, tokens and folders of this machine: names of local files stand alone."""
    header = "# What this student was trained with. Local files and folders are named without those around them.\n"
    values = _without_folders(publishable(jsonable(recipe)))
    own_text = (values.get("data") or {}).get("on_policy") or {}
    for key in PLACES:  # of machines that nobody else has
        own_text.pop(key, None)
    # Always folders, whether they are there or not; of the arguments of training two are names on the Hub
    for section, keys in (("output", ("dir",)), ("data", ("cache_dir",)), ("training", values.get("training") or ())):
        for key in keys:
            text = (values.get(section) or {}).get(key)
            if isinstance(text, str) and "://" not in text and key not in ("hub_model_id", "hub_revision"):
                values[section][key] = re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return header + dump_values(values)


def check_no_secret(folder: Path) -> None:
    """Refuse a folder in which a text looks like it holds an access token.

    Raises:
        UserError: names the file and the line, and not the token.
    """
    for path in sorted(_files(folder)):
        if path.suffix in _BINARY:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for line, kind in secrets_in(text, urls=path.name not in _VOCABULARIES):
            raise UserError(
                f"{path.relative_to(folder).as_posix()}, line {line}: holds what looks like {kind}, so nothing is uploaded. "
                "Take it out of the file that this one is made from, and revoke it"
            )


def check_head(weights: Path) -> None:
    """Refuse a safetensors file whose head says more than the format needs: it is text that nobody looks at.

    Raises:
        UserError: it does, or the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as file:
            told, names = file.metadata() or {}, set(file.keys())
    except SafetensorError as error:
        raise UserError(f"{weights.name}: cannot be read as safetensors: {error}") from None
    for key, value in told.items():
        # ``safetensors.torch.save_model`` notes under the name of a shared weight the one that it is stored as
        known = (key == "format" and re.fullmatch(r"\w{1,8}", value)) or value in names
        if not known and not _is_of_torchao(key, value):
            raise UserError(
                f"{weights.name}: its head holds {key!r} beside the format, so nothing is uploaded. Save the weights "
                "again: safetensors.torch.save_file(weights, file, metadata={'format': 'pt'})"
            )


def _is_of_torchao(key: str, value: str) -> bool:
    """Whether a note in the head is how torchao says what a quantised weight is made of: names, types and numbers alone."""
    try:
        told = json.loads(value)
    except ValueError:
        return False
    if not (key == "tensor_names" if isinstance(told, list) else isinstance(told, dict) and "_type" in told):
        return False
    return all(re.fullmatch(r"[\w.]{1,200}", text) for text in (key, *_texts(told))) and not [*secrets_in(value)]


def _texts(value: Any) -> Iterator[str]:
    """Every text in JSON, keys too."""
    if isinstance(value, Mapping):
        yield from value
        value = value.values()
    if isinstance(value, str):
        yield value
    elif isinstance(value, Iterable):
        for item in value:
            yield from _texts(item)


def inside(folder: Path, name: str) -> Path:
    """The file behind ``name``; a link that leads out of ``folder`` would publish what somebody else has pointed it at.

    Raises:
        UserError: it is such a link.
    """
    source = (folder / name).resolve()
    if not source.is_relative_to(folder.resolve()):
        raise UserError(
            f"{folder / name}: is a link to a file elsewhere, so nothing is uploaded. Put the file in its place"
        )
    return source


def _public_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``metrics.json`` what is known to be a score, a size or a setting."""
    kept = {key: metrics[key] for key in _METRICS if key in metrics}
    if isinstance(values := kept.get("training"), Mapping):
        kept["training"] = {name: values[name] for name in _TRAINING if name in values}
    if isinstance(values := kept.get("models"), Mapping):
        kept["models"] = {name: entry for name, entry in values.items() if name in MODELS or is_before(name)}
    return kept


def _names_in(student: Path) -> Iterator[str]:
    """The names in ``student`` that may go."""
    for pattern in OF_STUDENT:
        yield from (path.relative_to(student).as_posix() for path in sorted(student.glob(pattern)) if path.is_file())


def _place(folder: Path, name: str, target: Path) -> None:
    """Link or copy a file of ``folder``."""
    source = inside(folder, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.suffix != ".safetensors":  # what is rewritten below must not be the original
            raise OSError
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _clean_tokenizer_config(path: Path) -> None:
    if path.is_file():
        values = _read_json(path)
        cleaned = {
            # A template is part of the model: it stays as it is
            key: value if key in ("chat_template", "added_tokens_decoder") else _without_paths(value)
            for key, value in values.items()
        }
        cleaned |= {key: short_name(values[key]) for key in _PATH_KEYS if isinstance(values.get(key), str)}
        if cleaned != values:
            _write_json(path, cleaned)


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return without_folders(value) if isinstance(value, str) else value


def _stop_at(path: Path, end_tokens: list[int]) -> None:
    """Add ``end_tokens`` to what generation stops at, first, and keep what stood there; adapters may have no such file."""
    adapter = (path.parent / "adapter_config.json").is_file()
    if not end_tokens or not (path.is_file() or adapter):
        return
    values = _read_json(path) if path.is_file() else {}
    given = values.get("eos_token_id")
    known = [] if given is None else given if isinstance(given, list) else [given]
    tokens = list(dict.fromkeys([*end_tokens, *known]))
    if set(tokens) - set(known):
        values["eos_token_id"] = tokens[0] if len(tokens) == 1 else tokens
        _write_json(path, values)


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    # An address on the web is as good elsewhere as here
    return short_name(value) if isinstance(value, str) and not re.match(r"[a-z][a-z0-9+.-]*://", value) else value


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name}: broken JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path.name}: expected a JSON object, got {type(values).__name__}")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with naming(path):
        path.write_text(text, encoding="utf-8")
