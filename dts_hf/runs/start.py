"""Where a run starts: from nothing, from a checkpoint of its own (``--resume``), or nowhere, because it is done.

A killed run ends as it would have ended only if nothing that its numbers depend on has changed. So the recipe is compared
with that of the run directory; ``comparison`` does so with models and rows, and the trainer with the launch
(``check_resumable``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from dts_hf.console import say
from dts_hf.data import cache
from dts_hf.distributed.launch import check_launch, limit_waiting
from dts_hf.distributed.processes import on_first_process
from dts_hf.distributed.sharding import check_can_shard
from dts_hf.errors import UserError
from dts_hf.files import read_json
from dts_hf.models.description import knows_weights
from dts_hf.models.quantization import check_quantization
from dts_hf.recipe.effective import effective
from dts_hf.recipe.schema import Recipe
from dts_hf.recipe.yaml_files import leaves
from dts_hf.runs.checkpoints import PROGRESS, newest_whole, step_of, why_best_is_lost, why_not_resumable
from dts_hf.runs.comparison import as_text
from dts_hf.runs.directory import RunDirectory, is_before, scored_before
from dts_hf.runs.environment import environment, where_it_trains
from dts_hf.runs.local_names import local_names
from dts_hf.runs.lock import holds, lock
from dts_hf.runs.outline import outline
from dts_hf.runs.replaced import replaced_run
from dts_hf.runs.separate_disks import judged_elsewhere
from dts_hf.temperature import build_temperature

#: What may change between the attempts of a run: where results go, what is saved and shown, and how work is cut up. The
#: two about the size of a batch are compared together with the number of processes, by the trainer's ``check_resumable``.
MAY_CHANGE = (
    "output.*", "data.train", "data.train.source", "data.validation", "data.validation.source",
    "data.cache_dir", "data.on_policy.vllm_*", "student.lora.save", "teacher.placement", "loss.logits_budget_mb",
    # What is behind these is compared itself (Task.teacher_records)
    *(f"{teacher}.{key}" for teacher in ("teacher", "teachers.*") for key in ("url", "token_env", "cache")),
    *(f"training.{key}" for key in (
        "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size",
        "eval_accumulation_steps", "gradient_checkpointing*", "activation_checkpointing*", "torch_empty_cache_steps",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context", "log_level*", "log_on_each_node", "disable_tqdm", "report_to", "run_name",
        "project", "trackio_*", "push_to_hub", "hub_*", "skip_memory_metrics", "ddp_timeout", "ddp_backend",
        "resume_from_checkpoint", "ignore_data_skip", "save_*", "fsdp_config.state_dict_type",
    )),
)  # fmt: skip
SCHEDULES = ("training.max_steps", "training.num_train_epochs")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: go on from it; None: from the beginning.
        keep: the folder holds an earlier attempt at this run, whose files stay.
        finished: nothing is left to do.
        scores: those of ``BEFORE`` that an earlier attempt made, as in ``metrics.json``.
        log_bytes: where ``log.jsonl`` stood then; what follows was not yet so.
    """

    checkpoint: Path | None = None
    keep: bool = False
    finished: bool = False
    scores: dict[str, Any] = field(default_factory=dict)
    log_bytes: int | None = None


def find_start(
    recipe: Recipe,
    args: TrainingArguments,
    resume: bool,
    elsewhere: Callable[[Path], str | None] = lambda folder: None,
) -> Start:
    """Make ``output.dir``, lock it, look into it, say what is found, and decide. One process does it for all.

    Nothing in it is changed. What is found stays so until ``open_run``, and a folder that is not used is removed again
    (``unlocking``).

    Args:
        recipe: what is asked for.
        args: its training arguments; ``resume_from_checkpoint`` names a checkpoint to start from.
        resume: go on with the run in ``output.dir`` if there is one.
        elsewhere: what other machines say of their parts of a checkpoint.

    Raises:
        UserError: the folder cannot be used, or another process uses it; the named checkpoint is not complete or is damaged,
            or all are; the run in the folder is another one; a recorded run that the temperature needs is not there.
    """
    start = _start_of(recipe, args, resume, elsewhere)
    if recipe.all_teachers and start.checkpoint is None and not start.finished:
        # What the temperature reads of another run is in the checkpoints of this one; at the beginning it must be there.
        build_temperature(recipe.temperature.name, **recipe.temperature.options).begin_run()
    return start


def _start_of(recipe: Recipe, args: TrainingArguments, resume: bool, elsewhere: Callable[[Path], str | None]) -> Start:
    named = args.resume_from_checkpoint
    run, overwrite, keep = RunDirectory(recipe.output.dir), recipe.output.overwrite, resume or named is not None
    run.check_content(run.path, overwrite, keep)  # a folder that is not ours gets no lock file
    lock(run.path)
    run.check_can_create(run.path, overwrite, keep)  # again: a run may have begun, or ended, in between
    exists = run.recipe_path.is_file()
    if exists and (resume or named is not None):
        _check_same(run.read_recipe(), recipe, args, run)
    if exists and resume:
        ended = run.metrics_path.is_file()
        if ended and (lost := run.why_damaged()) is None:
            say(f"{run.path}: this run is finished; nothing is trained again")
            return Start(finished=True)
        checkpoint = _newest(run, args, elsewhere)
        if ended:
            _say_rebuilt(run, str(lost), checkpoint)
        if checkpoint is not None:
            say(f"{run.path}: going on from step {step_of(checkpoint)} ({checkpoint})")
            return _start_from(checkpoint, run, recipe)
    if named is not None:
        checkpoint = Path(named)
        why = why_not_resumable(checkpoint, contents=True) or elsewhere(checkpoint)
        if why is not None:
            raise UserError(f"training.resume_from_checkpoint: {named}: nothing can go on from it: {why}")
        return _start_from(checkpoint, run, recipe)
    if not resume:
        return Start()
    if not exists:
        say(f"{run.path}: there is no run to resume, so this one starts from the beginning")
        return Start(keep=True)
    say(f"{run.path}: there is no complete checkpoint, so the run starts from the beginning")
    # The models and rows that these scores are of are in the manifest: without it nobody can tell
    kept = run.read_scores() if run.data_manifest_path.is_file() else {}
    if kept and (why := _why_scored_again(run, kept)) is not None:
        say(f"{run.path}: {why}, so the models are scored again")
        kept = {}
    return Start(None, keep=True, scores=kept.get("models", {}), log_bytes=kept.get("log_bytes", 0))


def begin(recipe: Recipe, args: TrainingArguments, resume: bool) -> Start:
    """Refuse what can be refused before rows and models are loaded, find where the run starts, and say where it trains.

    All processes call it.

    Args:
        recipe: what is asked for.
        args: of ``recipe``.
        resume: go on with the run in ``output.dir`` if there is one.

    Raises:
        UserError: the launch is not what it claims, the teacher cannot be quantised or sharded so, or see ``find_start``.
    """
    check_launch(args)
    limit_waiting(args)
    cache.limit_waiting(args.ddp_timeout if args.world_size > 1 else None)
    for key, teacher in recipe.all_teachers.items():
        if key in recipe.loaded_teachers:
            check_quantization(teacher.quantization, args.device)
        if teacher.placement == "sharded":
            check_can_shard(teacher.quantization != "none")
    named = args.resume_from_checkpoint
    elsewhere = judged_elsewhere(Path(recipe.output.dir), None if named is None else Path(named), args)
    start = on_first_process(lambda: find_start(recipe, args, resume, elsewhere), args.process_index, args.world_size)
    if args.process_index == 0 and not start.finished:
        old = replaced_run(RunDirectory(recipe.output.dir)) if recipe.output.overwrite and not start.keep else None
        if old is not None:
            say(old)
        say(where_it_trains(args))
        say(outline(recipe, args))
    return start


def open_run(
    recipe: Recipe,
    start: Start,
    made_from: Mapping[str, Any],
    args: TrainingArguments,
    student_init: Mapping[str, Any] | None = None,
) -> RunDirectory:
    """The run directory, with what is known before training; all processes call it.

    Everything is checked by now: from here on things are written.

    Args:
        recipe: of this attempt.
        start: where it starts.
        made_from: ``data_manifest.json``.
        args: name the device and this process; the first one writes.
        student_init: ``student_init.json``; None or empty: no row has decided what the student is.

    Raises:
        UserError: see ``RunDirectory.create``; or the folder is no longer the one that ``find_start`` has locked.
    """
    run = RunDirectory(recipe.output.dir)
    run.goes_on = start.checkpoint is not None

    def write() -> None:
        if not holds(run.path):  # loading takes minutes, and somebody may tidy up
            raise UserError(f"output.dir: {run.path} was removed or replaced since this run began. Start it again")
        RunDirectory.create(run.path, recipe.output.overwrite, resume=start.keep)
        run.save_recipe(effective(recipe, args))
        # Of an attempt before this one, too: what was a folder then may be gone
        local = {*run.read_environment().get("local_names", ()), *local_names(recipe.model_dump(mode="json"))}
        run.write_environment({**environment(args.device), "local_names": sorted(local)})
        run.write_data_manifest(made_from)
        if student_init:
            run.write_student_init(student_init)
        if start.log_bytes is not None:  # what follows was logged after the checkpoint, and will be again
            run.cut_log(start.log_bytes)

    on_first_process(write, args.process_index, args.world_size)
    return run


def _start_from(checkpoint: Path, run: RunDirectory, recipe: Recipe) -> Start:
    scores = _scores_before(run)
    for name in scored_before(recipe):
        if name not in scores and recipe.data.validation is not None:
            so = "they are left out: it is trained by now" if name == "student_before" else "it is scored again"
            say(f"{run.path}: no scores of {name} were kept, so {so}")
    log_bytes = None
    if checkpoint.resolve().is_relative_to(run.path.resolve()):  # else it is that of another log
        if not run.data_manifest_path.is_file():
            raise UserError(
                f"{run.data_manifest_path}: missing, and it alone knows the rows and models that {checkpoint.name} was made "
                "with, so nothing can go on from it. Put the file back, or start again with --overwrite"
            )
        if (why := _why_log_differs(run, checkpoint)) is not None:
            raise UserError(f"{checkpoint}: nothing can go on from it: {why}")
        log_bytes = read_json(checkpoint / PROGRESS)["log_bytes"]
    return Start(checkpoint, keep=True, scores=scores, log_bytes=log_bytes)


def _newest(run: RunDirectory, args: TrainingArguments, elsewhere: Callable[[Path], str | None]) -> Path | None:
    """The newest checkpoint that can be resumed; says of each newer one why it cannot.

    Raises:
        UserError: none can, and one could have been, but for a file that is damaged.
    """

    def also(folder: Path) -> str | None:
        why = elsewhere(folder) or (why_best_is_lost(folder) if args.load_best_model_at_end else None)
        return why or _why_log_differs(run, folder)

    found = newest_whole(run.path, also)
    if found.checkpoint is None and found.damaged:
        lines = "".join(f"\n  {folder.name}: {why}" for folder, why in found.damaged)
        raise UserError(
            f"{run.path}: no checkpoint is left to go on from:{lines}\nPut the files back from a copy, or start again "
            "from the beginning with --overwrite"
        )
    for folder, why in found.ignored:
        say(f"{folder} is ignored: {why}")
    return found.checkpoint


def _why_log_differs(run: RunDirectory, checkpoint: Path) -> str | None:
    """Why a run that goes on from ``checkpoint`` would have another log than it should; what is behind it is made again."""
    try:
        return run.why_log_differs(read_json(checkpoint / PROGRESS))
    except (KeyError, UserError):  # damaged: ``why_not_resumable`` says so
        return None


def _say_rebuilt(run: RunDirectory, lost: str, checkpoint: Path | None) -> None:
    """Say what a finished run has lost, and from where it is made again.

    Raises:
        UserError: from nowhere.
    """
    if checkpoint is None:
        raise UserError(
            f"{run.path}: this run has ended, but {lost}, and there is no checkpoint from which it could be made again. Put "
            f"the file back from a copy, or train again with --overwrite (without {run.final_list_path.name} the rest is "
            "taken as it is)"
        )
    say(f"{run.path}: this run has ended, but {lost}: it is made again from {checkpoint.name}")


def _why_scored_again(run: RunDirectory, kept: Mapping[str, Any]) -> str | None:
    """Why a run that begins again cannot keep its ``scores.json``, as the end of a sentence."""
    if kept["log_bytes"] is None:
        return f"{run.scores_path.name} is of an attempt that had gone on from a checkpoint"
    answers = (run.why_predictions_differ(name) for name in kept["models"])
    return run.why_log_differs(kept) or next(filter(None, answers), None)


def _scores_before(run: RunDirectory) -> dict[str, Any]:
    """The scores that were made before training; of a run of an older version that has ended, those of its end.

    Raises:
        UserError: answers of the student from before training are damaged, which nobody can make again.
    """
    scores: dict[str, Any] = run.read_scores().get("models", {})
    if not scores and run.metrics_path.is_file() and run.why_damaged("metrics.json") is None:
        models = run.read_metrics().get("models", {})
        scores = {name: entry for name, entry in models.items() if is_before(name) and run.has_predictions(name)}
    for name in list(scores):
        why = run.why_predictions_differ(name)
        if why is not None and name != "student_before":
            say(f"{run.path}: {why}")
            del scores[name]
        elif why is not None:
            raise UserError(
                f"{run.path}: {why} (answers of {name!r} from before training). Put the file back from a copy, or remove "
                "it: the run then goes on without these scores"
            )
    return scores


# ---------------------------------------------------------------------------------------------------- the same run?


def _check_same(was: Recipe, now: Recipe, args: TrainingArguments, run: RunDirectory) -> None:
    """Refuse where the recipe of the run directory gives other numbers than ``now``; names what differs."""
    before, asked = leaves(was.model_dump(mode="json")), leaves(now.model_dump(mode="json"))
    after = leaves(effective(now, args).model_dump(mode="json"))
    # A run of an older version has not written all defaults: what it does not say, and nobody asks for, is the same.
    unsaid = {key for key in after if key not in before and key not in asked}
    changed = sorted(key for key in {*before, *after} - unsaid if before.get(key) != after.get(key))
    free = list(MAY_CHANGE)
    if args.load_best_model_at_end:  # what is saved decides which weights are the result
        free.remove("training.save_*")
    # What is loaded is compared itself (comparison.ModelRecord), where the record tells one from another
    known = run.read_data_manifest().get("models", {})
    for role in (*was.all_teachers, "student"):
        free += [f"{role}.{key}" for key in ("model", "revision") if knows_weights(known.get(role, {}))]
        free += [f"{role}.tokenizer"] if "student_tokenizer" in known else []  # the teacher's, too, if it has its own
    refused = [key for key in changed if not any(fnmatchcase(key, pattern) for pattern in free)]
    if refused:
        lines = [f"  {key}: was {as_text(before, key)}, now {as_text(after, key)}" for key in refused]
        if {*refused} & {*SCHEDULES}:
            lines.append(
                "  (learning rate and temperature are scheduled over the whole run: a longer one is another run)"
            )
        raise UserError(
            f"{run.path}: this run was started with another recipe, so going on would give numbers of neither:\n"
            + "\n".join(lines)
            + "\nSet them back, or choose another output.dir, or start again with --overwrite"
        )
    for key in changed:
        if not key.startswith("output."):
            say(f"resumed with {key}: {as_text(after, key)} (was {as_text(before, key)})")
