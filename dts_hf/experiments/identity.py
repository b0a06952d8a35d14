"""What a run *is*: its effective recipe with the contents of its files, and nothing of where things lie or what is shown.

Two recipes with the same id give the same student and the same scores; one is never trained twice.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dts_hf.data.sources import source_files
from dts_hf.files import digest, json_digest
from dts_hf.recipe.effective import RESULT_KEYS, effective
from dts_hf.recipe.schema import Recipe, Source
from dts_hf.recipe.training_arguments import training_arguments
from dts_hf.recipe.yaml_files import leaves

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Keys of a recipe that change neither the student nor what is measured of it: where things lie, what is shown and kept.
WITHOUT_EFFECT = (
    "output",
    "sweep",
    "evaluation.every_steps", "evaluation.models", "evaluation.batch_size",
    "data.cache_dir",
    "data.on_policy.vllm_memory", "data.on_policy.vllm_url", "data.on_policy.vllm_folder", "data.on_policy.vllm_token_env",
    "training.do_train", "training.do_eval", "training.do_predict", "training.output_dir", "training.use_cpu",
    "training.dataloader_num_workers", "training.dataloader_persistent_workers", "training.dataloader_prefetch_factor",
    "training.dataloader_pin_memory", "training.run_name", "training.report_to", "training.disable_tqdm",
    "training.log_level", "training.log_level_replica", "training.logging_first_step",
    "training.logging_steps", "training.logging_strategy", "training.save_total_limit", "training.push_to_hub",
    "training.hub_model_id", "training.hub_strategy", "training.hub_token", "training.hub_private_repo",
    "training.hub_revision", "training.hub_always_push",
)  # fmt: skip
#: These neither, unless what held-out rows say decides something (``_evaluation_decides``).
OF_EVALUATION = (
    "training.save_steps", "training.save_strategy", "training.eval_steps", "training.eval_strategy",
    "training.eval_on_start", "training.eval_delay", "training.per_device_eval_batch_size",
)  # fmt: skip
#: Keys by which runs of one kind differ.
SEEDS = ("training.seed", "training.data_seed")
ID_DIGITS = 10
_TELLS_ALL = ("manifest.json", "log.jsonl")  # of a cache of states; of a run that a temperature replays
_RUNS_OF_POLICY = (".run", ".match_mean_of", ".replay")
#: What of a folder is a model: its weights, and all that says how they and the text are read.
_OF_MODEL = (".safetensors", ".json", ".gguf", ".jinja", ".model", ".txt")


def run_id(recipe: Recipe) -> str:
    """Ten hexadecimal digits of SHA-256 that stand for ``recipe``.

    The order of keys, defaults that are written out, the folder of rows and weights, and ``WITHOUT_EFFECT`` do not count;
    every option of loss, temperature, data and training does, and so does each byte of rows and weights that lie here.
    """
    args = training_arguments(recipe, ".")
    whole = effective(recipe, args)
    whole = whole.model_copy(update={"training": _without_defaults(recipe, whole.training, args)})
    seeds = {key: whole.training.get(key.rpartition(".")[2]) for key in SEEDS}
    text = json.dumps({**settings_of(whole), **seeds, **contents(recipe)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]


def _without_defaults(recipe: Recipe, training: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """``training`` without what it would be anyway: of ``RESULT_KEYS``, which are there always, all is kept.

    Of the number of steps and that of epochs the one stays that ends the run.
    """
    bare = training_arguments(recipe.model_copy(update={"training": {}}), ".")
    silent = {"num_train_epochs" if args.max_steps > 0 else "max_steps"}
    return {
        key: value
        for key, value in training.items()
        if key not in silent and (key in RESULT_KEYS or getattr(args, key, None) != getattr(bare, key, None))
    }


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """``recipe`` as ``{dotted key: value}``, without what has no effect and without seeds."""
    values = leaves(recipe.model_dump(mode="json"))
    silent = (*WITHOUT_EFFECT, *SEEDS, *(() if _evaluation_decides(values) else OF_EVALUATION))
    return {key: value for key, value in values.items() if not is_under(key, silent)}


def _evaluation_decides(values: Mapping[str, Any]) -> bool:
    """Whether the student depends on when held-out rows are looked at.

    The best checkpoint, which a classifier is by default, an adaptive share, and a learning rate that falls when their loss
    does not.
    """
    adaptive = any(key.startswith("data.on_policy.adaptive") and value is not None for key, value in values.items())
    plateau = values.get("training.lr_scheduler_type") == "reduce_lr_on_plateau"
    best = bool(values.get("training.load_best_model_at_end")) or values.get("task.name") is not None
    return best or adaptive or plateau


def contents(recipe: Recipe, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Any]:
    """What stands in the place of paths, by key: digests of the rows, weights, caches and logs that lie here.

    A name of the Hub stays what it is.

    Args:
        recipe: names them.
        wanted: says of a key whether its files are read.
    """
    data = recipe.data
    found: dict[str, Any] = {}
    for key, sources, split in (
        ("data.train", data.train, data.train_split),
        ("data.validation", data.validation, data.validation_split),
    ):
        if isinstance(sources, (str, list, Source)) and wanted(key):
            found[key] = [_of_source(one, split) for one in (sources if isinstance(sources, list) else [sources])]
    if wanted("evaluation.sets"):
        found["evaluation.sets"] = [_of_place(name) for name in recipe.evaluation.sets]
    init = recipe.student.init
    places = {"student.model": recipe.student.model, "student.init.from": init.from_ if init is not None else None}
    for key, section in recipe.all_teachers.items():
        places |= {f"{key}.model": section.model, f"{key}.cache": section.cache, f"{key}.tokenizer": section.tokenizer}
    # A policy's name is no path, whatever folder of that name lies here
    of_policy = leaves({"temperature": recipe.temperature.model_dump()}).items()
    places |= {key: value for key, value in of_policy if isinstance(value, str) and is_replayed(key)}
    here = {key: place for key, place in places.items() if place and os.path.exists(place) and wanted(key)}
    return found | {key: _of_place(place) for key, place in here.items()}


def _of_source(source: str | Source, split: str) -> Any:
    name, own = (source, None) if isinstance(source, str) else (source.source, source.split)
    files = source_files(name, split=own or split)
    beside = {} if isinstance(source, str) else source.model_dump(exclude={"source"})
    return [name if files is None else [_content(file) for file in files], beside]


def _content(path: Path) -> str:
    """Digest of a file, read once however many runs of a sweep name it."""
    status = path.stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(4096)
def _digest_of(path: Path, size: int, changed: int) -> str:  # noqa: ARG001  # a file that changes is another one
    return digest(path)


def _of_place(place: str) -> str:
    path = Path(place)
    if path.is_file():
        return _content(path)
    if not path.is_dir():
        return place
    own = next((path / name for name in _TELLS_ALL if (path / name).is_file()), None)
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in _OF_MODEL)
    return _content(own) if own is not None else json_digest([_content(file) for file in files])


def is_replayed(key: str) -> bool:
    """Whether a dotted key names a run that a temperature replays."""
    return key.startswith("temperature.") and key.endswith(_RUNS_OF_POLICY)


def is_under(key: str, sections: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of ``sections`` or inside of one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)
