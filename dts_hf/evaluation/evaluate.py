"""``dts-hf evaluate``: a saved model or a run's student on evaluation sets, with the code that training uses too.

With an output folder every answer is on disk as soon as it is made, and the same command goes on where a killed one
stopped:

    evaluation.json  metrics.json  predictions/SET.jsonl
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dts_hf.console import say
from dts_hf.data.prompt_templates import get_template
from dts_hf.data.rows import Row
from dts_hf.data.sources import load_rows
from dts_hf.distributed.processes import on_first_process, process
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import canonical_name
from dts_hf.evaluation.fingerprint import describe_protocol
from dts_hf.evaluation.instruct import evaluate_instruct, generation_settings, rows_digest
from dts_hf.evaluation.protocol import get_protocol
from dts_hf.evaluation.scorer import VALIDATION, batch_size_that_matters, load_sets, protocol_of
from dts_hf.files import write_json_atomic
from dts_hf.generation.answer_file import AnswerFile
from dts_hf.generation.engine import generate
from dts_hf.generation.vllm_backend import check_vllm_settings, load_vllm, vllm_generate
from dts_hf.models.loading import load_model, load_tokenizer
from dts_hf.recipe.schema import Recipe
from dts_hf.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IDENTITY_FILE = "evaluation.json"


def evaluate_command(
    model: str,
    sets: Sequence[str] = (),
    *,
    data: str | None = None,
    protocol: str | None = None,
    seeds: Sequence[int] | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
    no_repeat_ngram_size: int | None = None,
    rows: int | None = None,
    batch_size: int = 32,
    dtype: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    backend: str = "dts_hf",
    data_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Answer prompts with a saved model or a run's student, and score the answers.

    Launched on several processes (``torchrun``), they share out the rows, and each returns the whole result.

    Args:
        model: Hub name, model folder, or run directory.
        sets: names of prepared sets (``dts-hf list sets``) or row files.
        data: further rows in any form that ``data.load_rows`` takes. Without ``sets`` and ``data``: the validation
            rows of the run, with the data's own answers as references.
        protocol: name of a variant (``dts-hf list protocols``); None: ``minillm`` for a model and where ``sets`` names a
            prepared set, else the run's own.
        seeds: sample once per seed; None: the protocol's.
        template, max_new_tokens, no_repeat_ngram_size: change the protocol; None: the protocol's.
        rows: answer the first so many of each set; None: all.
        batch_size: prompts answered at once.
        dtype: of the weights; None: the run's ``evaluation.dtype``, else its ``student.dtype``; float32 for a model.
            There is no autocast: a run with ``training.bf16`` answers under it, and scores differ in near-ties.
        output: folder for metrics, predictions and what a killed evaluation needs to go on; None: nothing is written.
        overwrite: begin anew where ``output`` holds another evaluation.
        backend: ``dts_hf``, or ``vllm`` (a variant of the protocol: other samples, no n-gram rule).
        data_dir: folder of the prepared sets; None: the default of ``sets.resolve_set``.

    Returns:
        What ``metrics.json`` holds, sets of earlier calls with the same ``output`` included: ``{"format", "source",
        "protocol", "models": {"student" or "model": {"parameters", "sets"}}}``.

    Raises:
        UserError: unknown model or set, no rows, wrong options, or an output folder with another evaluation. Every
            process raises it.
    """
    is_run = (Path(model) / "recipe.yaml").is_file()
    run = RunDirectory.open(model) if is_run else None
    recipe = run.read_recipe() if run is not None else None
    if run is not None and not run.final_path.is_dir():
        raise UserError(
            f"{model}: this run holds no student ({run.final_path} is missing): its training has not ended"
        )
    if recipe is not None and recipe.task is not None:
        raise UserError(
            f"{model}: this run classifies ({recipe.task.subset}): its scores are in {run and run.metrics_path}"
        )
    own = recipe is not None and protocol is None and not any(canonical_name(name) for name in sets)
    chosen = protocol_of(recipe) if own and recipe is not None else get_protocol(protocol or "minillm")
    if template is not None:
        get_template(template, "--template")
    chosen = chosen.changed(
        seeds=seeds,
        do_sample=True if seeds else None,
        template=template,
        max_new_tokens=max_new_tokens,
        no_repeat_ngram_size=no_repeat_ngram_size,
        backend=backend,
    )
    settings = generation_settings(chosen, batch_size)  # refuses values out of range before anything is loaded
    if backend == "vllm":
        check_vllm_settings(settings)
    wanted = _load_rows(model, recipe, sets, data, rows, data_dir)

    source = str(run.final_path) if run is not None else model
    precision = dtype or (recipe and (recipe.evaluation.dtype or recipe.student.dtype)) or "float32"
    device = _join_processes()
    rank, world = process()
    tokenizer = load_tokenizer(source, key="model")
    matters = batch_size_that_matters([] if backend == "vllm" else [precision], batch_size)
    described = {**describe_protocol(chosen, tokenizer), "dtype": precision, "batch_size": matters}
    identity: dict[str, Any] = {
        "protocol": {key: value for key, value in described.items() if key not in ("name", "batch_size")},
        "batch_size": matters,
        "rows": {name: rows_digest(of_set) for name, of_set in wanted.items()},
    }
    folder = None if output is None else Path(output)
    if folder is not None:  # all that can be known before the model is loaded
        on_first_process(lambda: _check_folder(folder, identity, overwrite), rank, world)
    answer: Callable[..., Any] = generate
    if backend == "vllm":
        engine: Any = load_vllm(source, precision)
        answer, parameters, identity["model"] = vllm_generate, None, files_digest(source)
    else:
        engine = load_model(source, key="model", dtype=precision)
        identity["model"] = model_digest(engine)
        parameters = sum(parameter.numel() for parameter in engine.parameters())
        engine = engine.to(device)
    if folder is not None:
        on_first_process(lambda: _open_folder(folder, identity, overwrite), rank, world)
    if rank == 0:
        say(f"{model}: {', '.join(wanted)} under the protocol {chosen.name}, weights in {precision}")
        if recipe is not None and VALIDATION in wanted and recipe.data.responses == "teacher":
            say("The run's own scores are against the teacher's answers, these are against the data's")
    results: dict[str, Any] = {}
    for name, of_set in wanted.items():
        answers = None if folder is None else AnswerFile(folder / "predictions" / f"{_file_name(name)}.jsonl", rank)
        result = evaluate_instruct(
            engine, tokenizer, of_set, chosen, batch_size=batch_size, set_name=name, progress=name, answers=answers,
            all_processes=True, answer=answer,
        )  # fmt: skip
        results[name] = result.scores
        if answers is not None:
            answers.close()
            _wait()
            if rank == 0:
                answers.finish(result.predictions)
    if folder is not None:
        results = {**on_first_process(lambda: _sets_before(folder), rank, world), **results}
    metrics = {
        "format": 1,
        "source": model,
        "protocol": described,
        "models": {"model" if run is None else "student": {"parameters": parameters, "sets": results}},
    }
    if folder is not None and rank == 0:
        write_json_atomic(folder / "metrics.json", metrics)
    return metrics


def model_digest(model: PreTrainedModel) -> str:
    """Digest of configuration, end tokens and a sample of every weight: finds a model that was changed or replaced."""
    config = json.loads(model.config.to_json_string())
    config.pop("transformers_version", None)  # of the reader
    stops = getattr(model.generation_config, "eos_token_id", None)
    digest = hashlib.sha256(json.dumps([config, stops], sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // 1024)].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()[:16]


def files_digest(source: str) -> str:
    """Digest of a model by name, and for a folder by the names, sizes and times of its files: it is not loaded here."""
    files = sorted(Path(source).iterdir()) if Path(source).is_dir() else []
    listed = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return hashlib.sha256(json.dumps([source, listed]).encode()).hexdigest()[:16]


def _load_rows(
    model: str,
    recipe: Recipe | None,
    sets: Sequence[str],
    data: str | None,
    limit: int | None,
    data_dir: str | Path | None,
) -> dict[str, list[Row]]:
    """The rows of each set, by name."""
    found = load_sets(sets, limit, data_dir, key="--sets")
    split = recipe.data.validation_split if recipe else "validation"
    if data is not None:
        # Of a pattern, the folder: rows/*.jsonl is called rows
        plain = [part.split(".")[0] for part in Path(data).parts if not set(part) & set("*?[")]
        name = next(filter(None, reversed(plain)), "data")
        if name in found:
            raise UserError(f"--data: {name!r} is also the name of one of --sets; rename the file")
        found[name] = load_rows(data, split=split, limit=limit)
    if not found:
        if recipe is None or recipe.data.validation is None:
            raise UserError(
                f"evaluate: {model!r} is no run directory with validation rows; say which: --sets NAME,NAME or --data FILE"
            )
        limits = [count for count in (limit, recipe.data.max_validation_rows) if count is not None]
        found[VALIDATION] = load_rows(recipe.data.validation, split=split, limit=min(limits, default=None))
    return found


def _check_folder(folder: Path, mine: Mapping[str, Any], overwrite: bool) -> dict[str, str]:
    """Refuse a folder of something else; return the digests of the rows that the evaluation in it has, by set."""
    path = folder / IDENTITY_FILE
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()) and not path.is_file():
        raise UserError(f"--output: {folder} is not empty and holds no evaluation; choose another folder")
    if overwrite or not path.is_file():
        return {}
    theirs = json.loads(path.read_text(encoding="utf-8"))
    different = _differences(theirs, mine)
    if different:
        raise UserError(
            f"--output: {folder} holds another evaluation ({', '.join(different)}). Choose another folder, or "
            "replace it with --overwrite"
        )
    return dict(theirs["rows"])


def _open_folder(folder: Path, mine: Mapping[str, Any], overwrite: bool) -> None:
    """Make the folder, or go on in it where it holds the same evaluation; one of something else is refused."""
    before = _check_folder(folder, mine, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for old in [folder / "metrics.json", *(folder / "predictions").glob("*.jsonl*")]:
                old.unlink(missing_ok=True)
        # Before the first answer, after the last old one: whatever is killed, the answers are those of this file
        write_json_atomic(folder / IDENTITY_FILE, {**mine, "rows": {**before, **mine["rows"]}})
        (folder / "predictions").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write in {folder}: {error.strerror}") from None


def _sets_before(folder: Path) -> dict[str, Any]:
    """The scores of the sets that ``metrics.json`` holds already; ``_open_folder`` has seen to it that they fit."""
    path = folder / "metrics.json"
    if not path.is_file():
        return {}
    (entry,) = json.loads(path.read_text(encoding="utf-8"))["models"].values()
    return dict(entry["sets"])


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What two evaluations differ in, in words. Sets that only one of them has are no difference."""
    found = ["another model"] if "model" in mine and theirs["model"] != mine["model"] else []
    old, new = theirs["protocol"], mine["protocol"]
    found += [
        f"{key} {old.get(key)}, now {new[key]}" for key in new if key != "fingerprint" and old.get(key) != new[key]
    ]
    if theirs["batch_size"] != mine["batch_size"]:
        found.append(f"batch_size {theirs['batch_size']}, now {mine['batch_size']}, which changes the text below fp32")
    shared = theirs["rows"].keys() & mine["rows"].keys()
    return found + [f"other rows of {name}" for name in sorted(shared) if theirs["rows"][name] != mine["rows"][name]]


def _file_name(set_name: str) -> str:
    return set_name.replace("/", "-")


# -------------------------------------------------------------------------------------------------- several processes


def _join_processes() -> torch.device:
    """Join the processes of a launcher (``torchrun``, ``accelerate launch``), if there are any, and take a device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        return torch.device(PartialState(cpu=not torch.cuda.is_available()).device)  # type: ignore[arg-type]
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
