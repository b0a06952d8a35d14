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

from dts_hf.data import Row, load_rows
from dts_hf.errors import UserError
from dts_hf.evaluation.answers import AnswerFile
from dts_hf.evaluation.instruct import evaluate_instruct, rows_digest
from dts_hf.evaluation.protocol import get_protocol
from dts_hf.evaluation.scorer import VALIDATION, load_sets, protocol_of
from dts_hf.generation import generate
from dts_hf.models import load_model, load_tokenizer
from dts_hf.prompts import get_template
from dts_hf.recipe import Recipe
from dts_hf.run_directory import RunDirectory, write_json_atomic

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
            rows of the run.
        protocol: name of a variant (``dts-hf list protocols``); None: the run's own, and ``minillm`` for a model.
        seeds: sample once per seed; None: the protocol's.
        template, max_new_tokens, no_repeat_ngram_size: change the protocol; None: the protocol's.
        rows: answer the first so many of each set; None: all.
        batch_size: prompts answered at once.
        dtype: of the weights; None: the run's, else float32.
        output: folder for metrics, predictions and what a killed evaluation needs to go on; None: nothing is written.
        overwrite: begin anew where ``output`` holds another evaluation.
        backend: ``dts_hf``, or ``vllm`` (a variant of the protocol: other samples, no n-gram rule).
        data_dir: folder of the prepared sets; None: the default of ``sets.resolve_set``.

    Returns:
        What ``metrics.json`` holds: ``{"format", "source", "protocol", "models": {"student" or "model": {"parameters",
        "sets"}}}``.

    Raises:
        UserError: unknown model or set, no rows, wrong options, or an output folder with another evaluation.
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
    chosen = protocol_of(recipe) if recipe is not None and protocol is None else get_protocol(protocol or "minillm")
    if template is not None:
        get_template(template)
    chosen = chosen.changed(
        seeds=seeds,
        do_sample=True if seeds else None,
        template=template,
        max_new_tokens=max_new_tokens,
        no_repeat_ngram_size=no_repeat_ngram_size,
        backend=backend,
    )
    chosen.settings(batch_size)  # refuses values out of range before anything is loaded
    wanted = _load_rows(model, recipe, sets, data, rows, data_dir)

    source = str(run.final_path) if run is not None else model
    precision = dtype or (recipe and recipe.evaluation.dtype) or "float32"
    device = _join_processes()
    tokenizer = load_tokenizer(source, key="model")
    described = {**chosen.describe(tokenizer), "dtype": precision}
    answer: Callable[..., Any] = generate
    identity: dict[str, Any]
    if backend == "vllm":
        from dts_hf.evaluation.vllm_backend import load_vllm, vllm_generate

        engine: Any = load_vllm(source, precision)
        answer, parameters, identity = vllm_generate, None, {"model": source}
    else:
        engine = load_model(source, key="model", dtype=precision)
        identity = {"model": model_digest(engine)}
        parameters = sum(parameter.numel() for parameter in engine.parameters())
        engine = engine.to(device)
    identity |= {
        "protocol": {key: value for key, value in described.items() if key != "name"},
        # Below fp32 the text depends on what is answered together
        "batch_size": None if precision == "float32" else batch_size,
    }
    folder = None if output is None else _open_folder(Path(output), identity, wanted, overwrite)
    results = {}
    for name, of_set in wanted.items():
        answers = None if folder is None else AnswerFile(folder / "predictions" / f"{_file_name(name)}.jsonl", _rank())
        result = evaluate_instruct(
            engine, tokenizer, of_set, chosen, batch_size=batch_size, set_name=name, progress=name, answers=answers,
            all_processes=True, answer=answer,
        )  # fmt: skip
        results[name] = result.scores
        if answers is not None:
            answers.close()
            _wait()
            if _rank() == 0:
                answers.finish(result.predictions)
    metrics = {
        "format": 1,
        "source": model,
        "protocol": described,
        "models": {"model" if run is None else "student": {"parameters": parameters, "sets": results}},
    }
    if folder is not None and _rank() == 0:
        write_json_atomic(folder / "metrics.json", metrics)
    return metrics


def model_digest(model: PreTrainedModel) -> str:
    """Digest of the architecture and of a sample of every weight: finds a model that was trained on or replaced."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // 1024)].float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()[:16]


def _load_rows(
    model: str,
    recipe: Recipe | None,
    sets: Sequence[str],
    data: str | None,
    limit: int | None,
    data_dir: str | Path | None,
) -> dict[str, list[Row]]:
    """The rows of each set, by name."""
    found = load_sets(sets, limit, data_dir)
    split = recipe.data.validation_split if recipe else "validation"
    if data is not None:
        name = Path(data).name.split(".")[0] or "data"
        if name in found:
            raise UserError(f"--data: {name!r} is also the name of one of --sets; rename the file")
        found[name] = load_rows(data, split=split, limit=limit)
    if not found:
        if recipe is None or recipe.data.validation is None:
            raise UserError(
                f"evaluate: {model!r} is no run directory with validation rows; say which: --sets NAME,NAME or --data FILE"
            )
        found[VALIDATION] = load_rows(recipe.data.validation, split=split, limit=limit)
    return found


def _open_folder(
    folder: Path,
    identity: Mapping[str, Any],
    wanted: Mapping[str, Sequence[Row]],
    overwrite: bool,
) -> Path:
    """Make the folder, or go on in it where it holds the same evaluation; one of something else is refused."""
    path = folder / IDENTITY_FILE
    mine = {**identity, "rows": {name: rows_digest(rows) for name, rows in wanted.items()}}
    if _rank() == 0:
        if folder.is_dir() and any(folder.iterdir()) and not path.is_file():
            raise UserError(f"--output: {folder} is not empty and holds no evaluation; choose another folder")
        if path.is_file() and overwrite:
            for old in [path, folder / "metrics.json", *(folder / "predictions").glob("*.jsonl*")]:
                old.unlink(missing_ok=True)
        elif path.is_file():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            different = _differences(theirs, mine)
            if different:
                raise UserError(
                    f"--output: {folder} holds another evaluation ({', '.join(different)}). Choose another folder, or "
                    "replace it with --overwrite"
                )
            mine["rows"] = {**theirs["rows"], **mine["rows"]}
        try:
            (folder / "predictions").mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, mine)
        except OSError as error:
            raise UserError(f"--output: cannot write in {folder}: {error.strerror}") from None
    _wait()
    return folder


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What two evaluations differ in, in words. Sets that only one of them has are no difference."""
    found = ["another model"] if theirs["model"] != mine["model"] else []
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


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
