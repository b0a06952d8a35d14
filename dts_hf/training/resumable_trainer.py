"""``ResumableTrainer``: what Hugging Face's Trainer lacks, and nothing that is distillation.

An order of the rows that is a function of seed and epoch, batches that several processes share out evenly, checkpoints that
are complete or no checkpoints, a resume that ends as if there had been no break, an end on a signal or on a loss that is
non-finite, clocks that leave out what is no training, and an upload of the finished student alone.

Everything that leans on a private name of the Trainer stands here or in ``even_batches``, and in ``PRIVATE_NAMES``; the
modules beside them need none.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_callback import ProgressCallback as TqdmCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.streams import RowStream
from dts_hf.data.tokenised import TokenisedDataset
from dts_hf.distributed.checkpoint_reading import data_only, in_form_of, refuse_pickled_weights
from dts_hf.distributed.launch import strategy_of
from dts_hf.distributed.processes import on_first_process, silent_processes
from dts_hf.errors import RunError, UserError
from dts_hf.files import check_no_link, write_text_atomic
from dts_hf.models.compilation import compile_layers
from dts_hf.models.description import describe_for_training, describe_tokenizer, versions
from dts_hf.models.saving import ready_for_generation, save_generation_config
from dts_hf.runs.checkpoints import INTERRUPTED, make_way, mark_complete, read_complete, rotate, why_incomplete
from dts_hf.runs.comparison import refuse_changed_models
from dts_hf.runs.directory import RunDirectory
from dts_hf.runs.failures import has_no_answer, is_lost_peer, lost_peer_sentence, writing
from dts_hf.runs.links import refuse_links
from dts_hf.runs.separate_disks import judged_elsewhere
from dts_hf.training import exact_resume
from dts_hf.training.arguments import check_optimizer
from dts_hf.training.callbacks import GenerationEvalCallback, InterruptionCallback, ProgressCallback
from dts_hf.training.card import OTHER_ROWS
from dts_hf.training.clock import TrainingClock
from dts_hf.training.even_batches import EvenBatchesTrainer
from dts_hf.training.hub_upload import UPLOAD, HubUploads, remove_all_of
from dts_hf.training.non_finite import NonFiniteCallback, check_weights, stop_non_finite_run
from dts_hf.training.signals import asked_to_stop, at_step_end
from dts_hf.training.silence import SilenceCallback
from dts_hf.training.tracking import facts_for_trackers
from dts_hf.training.unused_parameters import may_leave_unused

logger = logging.getLogger(__name__)
#: Every private name of ``transformers.Trainer`` that this package overrides or reads: a method with its signature, or an
#: attribute of the instance (None). tests/training/test_trainer_contract.py compares them with the transformers that is
#: installed, and says what has changed.
PRIVATE_NAMES: dict[str, str | None] = {
    # Batches (even_batches.py)
    "_get_dataloader": (
        "(self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None)"
    ),
    "_get_collator_with_removed_columns": "(self, data_collator, description=None)",
    "_get_train_sampler": "(self, train_dataset=None)",
    "_get_eval_sampler": "(self, eval_dataset)",
    "_get_num_items_in_batch": "(self, batch_samples, device)",
    "_track_num_input_tokens": "(self, inputs)",
    "_prepare_inputs": "(self, inputs)",
    "_train_batch_size": None,
    "_eval_dataloaders": None,
    # The loop
    "_build_accelerator_args": "(self, **kwargs)",
    "_init_training_state": (
        "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)"
    ),
    "_run_epoch": (
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
    ),
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_get_learning_rate": "(self)",
    "_maybe_log_save_evaluate": (
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None)"
    ),
    "_tr_loss": None,
    "_total_loss_scalar": None,
    "_globalstep_last_logged": None,
    "_created_lr_scheduler": None,
    # Checkpoints
    "_get_output_dir": "(self, trial)",
    "_save_checkpoint": "(self, model, trial)",
    "_load_best_model": "(self)",
    "_prepare_for_training": "(self, max_steps, train_dataloader, resume_from_checkpoint)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_rng_state": "(self, checkpoint)",
    "_load_scaler": "(self, checkpoint)",
    "_issue_warnings_after_load": "(self, load_result)",
    # The Hub
    "_save": "(self, output_dir=None, state_dict=None)",
    "_push_from_checkpoint": "(self, checkpoint_folder)",
}


class ResumableTrainer(EvenBatchesTrainer):
    """Hugging Face's Trainer, with runs that can be stopped anywhere and go on exactly.

    Args:
        model: what is trained.
        positional: what else ``EvenBatchesTrainer`` takes by its place.
        callbacks: of the user; they stand after ours.
        model_card: returns the text of the model card that ``push_to_hub`` uploads.
        kwargs: everything else that ``EvenBatchesTrainer`` takes.

    Attributes:
        clock: how long training took.
        models_record: what the models are, where that is known better than the trainer can tell (``runs.comparison``).
        whole: checkpoints that this process has written or read whole (resolved): they are not read again.

    Raises:
        UserError: the Trainer refuses its arguments, or a row is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        *positional: Any,
        callbacks: list[TrainerCallback] | None = None,
        model_card: Callable[[], str] | None = None,
        **kwargs: Any,
    ) -> None:
        # Everything of ours is there before the Trainer's own __init__, which calls methods of ours.
        self.model_card = model_card
        self.clock = TrainingClock()
        self.non_finite = NonFiniteCallback(self._stop_non_finite_run)
        self.interruption = InterruptionCallback(self.save_checkpoint_now)
        self._resume = exact_resume.ResumeCallback(self._finish_step, self.clock)
        self.resumed_from: Path | None = None
        self.whole: set[Path] = set()
        self.models_record: Mapping[str, Any] | None = None
        self._models_described: Mapping[str, Any] = {}
        self._progress: exact_resume.Progress | None = (
            None  # of the checkpoint that is resumed from, until its step is finished
        )
        self._mean_loss_from = 0  # the step behind which ``_total_loss_scalar`` begins
        self._interrupting = False  # the checkpoint being written is one that a signal asked for
        self._filters_loss = False  # an epoch runs, and args.logging_nan_inf_filter was set when it began
        self._pass_began = (0, 0)  # of a stream: the number of the pass that runs, and the step that it began behind
        self._grad_norm: Any = None  # of the last step, for its log line
        self._learning_rate: float | None = None
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        ours = (*self.step_callbacks(), self.non_finite, self.interruption, ProgressCallback())
        super().__init__(model, *positional, callbacks=[*ours, *(callbacks or []), self._resume], **kwargs)
        if self.optimizer is None:
            chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, cast(Any, self.model)
            )
            check_optimizer(self.args, *chosen)
        # Here and not earlier: whatever looks at the model to see what it is (heads, packing, routers) has done so.
        self.compile_layers(model, "the student")
        if self.args.world_size > 1:
            self.add_callback(SilenceCallback())
        self.remove_callback(TqdmCallback)
        self.remove_callback(PrinterCallback)

    @cached_property
    def hub_uploads(self) -> HubUploads:
        """Made when the Trainer's own ``__init__`` asks for the repository."""
        return HubUploads(self.args)

    # ------------------------------------------------------------------------------------- what a kind of trainer adds

    def step_callbacks(self) -> list[TrainerCallback]:
        """Callbacks that look at the finished step before any other does; they tell ``non_finite`` and ``interruption``."""
        return []

    def extra_state(self) -> exact_resume.ExtraState:
        """What a checkpoint keeps besides the Trainer's state and the loop's."""
        return exact_resume.ExtraState()

    def load_extra_state(self, folder: Path, progress: exact_resume.Progress) -> None:
        """Restore what ``extra_state`` gave when the checkpoint in ``folder`` was written."""

    def describe_models(self) -> dict[str, Any]:
        """What a resumed run must find again of models and tokenizer; the first process asks, before training."""
        found: dict[str, Any] = versions()
        if self.model_init is None:  # else each trial has a student of its own
            found["student"] = describe_for_training(cast(nn.Module, self.model), trained=True)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            found["student_tokenizer"] = describe_tokenizer(self.processing_class)
        return found

    def describe_objective(self) -> dict[str, Any]:
        """What is minimised, as JSON: a run that goes on must have the same."""
        return {}

    def facts_for_trackers(self) -> dict[str, Any]:
        """What trackers are to know of the run besides its arguments and the model's configuration."""
        return {}

    def end_token_ids(self) -> list[int]:
        """The tokens that end an answer, which a saved student must know of."""
        token = getattr(self.processing_class, "eos_token_id", None)
        return [] if token is None else [token]

    def scheduled_over_run(self) -> list[str]:
        """What besides the learning rate has values that depend on how many steps the run has."""
        return []

    # ------------------------------------------------------------------------------------------------------- the loop

    def compile_layers(self, model: nn.Module, role: str) -> None:
        """Compile the layers of ``model`` where ``args.torch_compile`` asks for it; see ``models.compilation``.

        Raises:
            UserError: the strategy or the model does not go with it.
        """
        if self.args.torch_compile:
            if strategy_of(self.accelerator) == "zero3":
                raise UserError(
                    "training.torch_compile: got true under ZeRO-3, whose hooks gather the weights of each module inside "
                    "its layer: they would be compiled over and over. Leave it out, or use ZeRO-2 or FSDP2"
                )
            assert self.args.torch_compile_backend is not None  # TrainingArguments fills it
            backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
            compile_layers(model, role, backend=backend, mode=mode)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """The Trainer's, but accelerate compiles nothing, and DDP looks for weights without a gradient where some may be.

        Batches in pinned memory go to a GPU while it computes; they lie there until the next one is asked for.

        The Trainer asks for the search whenever activations are not recomputed; it costs a walk through the graph of every
        step, and DDP warns where it was for nothing.
        """
        args = super()._build_accelerator_args(**kwargs)
        # compile_layers does it. NO and not None: TrainingArguments have put their backend into the environment.
        args["dynamo_plugin"] = TorchDynamoPlugin(backend=DynamoBackend.NO)
        args["dataloader_config"].non_blocking |= self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        if self.args.ddp_find_unused_parameters is None and self.args.world_size > 1:
            for handler in args["kwargs_handlers"]:
                if getattr(handler, "find_unused_parameters", False):
                    handler.find_unused_parameters = may_leave_unused(cast(nn.Module, self.model))
        return args

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The Trainer's; where a run stood in a stream, whose passes it takes for one long epoch, the checkpoint tells."""
        epoch, batches = super()._init_training_state(*args, **kwargs)
        if self.resumed_from is None or not isinstance(self.train_dataset, RowStream):
            return epoch, batches
        place = exact_resume.place_in_stream(self.resumed_from, self.train_dataset.first_row)
        return (epoch, batches) if place is None else (place[0], place[1] * self.args.gradient_accumulation_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed where training had come to its end: the Trainer would take one more step.
        if self.control.should_training_stop:
            return
        resumed = kwargs["epoch"] == kwargs["epochs_trained"]
        steps = resumed * kwargs["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps
        self._pass_began = (kwargs["epoch"], self.state.global_step - steps)
        if self.train_sampler is not None:  # accelerate's own set_epoch does not reach it on a resume with processes
            self.train_sampler.set_epoch(int(self.state.epoch or 0))
        # The Trainer's filter of the logged loss asks the device twice for every micro-batch: training_step has another.
        self._filters_loss, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.args.logging_nan_inf_filter, self._filters_loss = self._filters_loss, False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; which rows it is made of is remembered until the step has ended well."""
        if "row_id" in inputs:
            self.non_finite.rows_of_step.append(inputs["row_id"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not self._filters_loss:
            return loss
        # logging_nan_inf_filter: in the place of a loss that is non-finite, the mean since the last log line
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(torch.isfinite(loss), loss, mean.to(loss.dtype))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own, tried out at its last step: some divide by the steps that the warm-up leaves."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        try:
            for factor in getattr(scheduler, "lr_lambdas", ()):
                factor(num_training_steps)
        except ZeroDivisionError:
            raise UserError(
                f"training.warmup_steps: {self.args.warmup_steps:g} leaves none of {num_training_steps} steps to the "
                f"schedule {self.args.lr_scheduler_type}; expected a shorter warm-up, or more steps"
            ) from None
        return scheduler

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from nothing or from a checkpoint (True: the newest complete one of ``args.output_dir``).

        A run that is resumed with another ``max_steps`` or ``num_train_epochs`` goes on where that is exact: with a learning
        rate and a temperature that do not depend on how long the run is (``lr_scheduler_type="constant"``, a constant
        temperature). Otherwise it is refused: both are scheduled over the whole run, so a longer one is another run.

        Raises:
            UserError: the checkpoint is not complete, holds the weights alone, was not written by dts_hf, or this launch
                cannot go on from it exactly; or a checkpoint in ``args.output_dir`` is a link.
            RunError: training cannot go on (see ``stop_non_finite_run``), the last step broke the weights, the disk takes no
                checkpoint, or another process has ended or does not answer.
        """
        run = Path(str(self.args.output_dir))
        refuse_links(run, (f"{PREFIX_CHECKPOINT_DIR}-#", INTERRUPTED))
        self.resumed_from = folder = self._checkpoint_to_resume(resume_from_checkpoint, run)
        self._progress, self._mean_loss_from = None, 0
        self.clock.start()
        if self.models_record is None:
            self._models_described = on_first_process(
                self.describe_models, self.args.process_index, self.args.world_size
            )
        if folder is not None:
            self.check_resumable(folder)
        try:
            with at_step_end(), facts_for_trackers(self.callback_handler.callbacks, self.facts_for_trackers):
                output = super().train(str(folder) if folder else None, *args, **kwargs)
                self._check_weights()  # of the last steps: no checkpoint has to follow them
                return output._replace(training_loss=output.metrics["train_loss"])  # see ``log``
        except RuntimeError as error:
            # Where a signal has come, the other process has left because of it: ``stops_on_signal`` says so.
            if asked_to_stop() is not None or not is_lost_peer(error):
                raise
            silent = silent_processes(look=has_no_answer(error))
            raise RunError(lost_peer_sentence(error, silent, self.state.global_step)) from error
        finally:
            if self._use_cache is not None:  # off for training; what follows is for generation
                self.model.config.use_cache = self._use_cache  # type: ignore[union-attr]
            for kind in (ProgressCallback, SilenceCallback):
                for callback in self._callbacks_of(kind):
                    callback.close()

    def _checkpoint_to_resume(self, given: str | Path | bool | None, run: Path) -> Path | None:
        """``exact_resume.checkpoint_to_resume``, decided by the first process for all."""
        named = Path(given) if isinstance(given, (str, Path)) else None
        if (named is None and given is not True) or (named is not None and named.resolve() in self.whole):
            return named
        elsewhere = judged_elsewhere(run, named, self.args)
        best = self.args.load_best_model_at_end
        found = on_first_process(
            lambda: exact_resume.checkpoint_to_resume(given, run, best, elsewhere),
            self.args.process_index,
            self.args.world_size,
        )
        if found is not None:
            self.whole.add(found.resolve())
        return found

    def _callbacks_of(self, kind: type[Any]) -> Iterator[Any]:
        return (callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    def exclude_from_timing(self) -> AbstractContextManager[None]:
        """What happens inside does not count for ``tokens_per_second``, and before the first step for no clock at all."""
        return self.clock.exclude(from_total=self.state.global_step == 0)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; ``tokens_per_second`` is none the lower for it. Lines of the log tell rows that are not its own."""
        if eval_dataset is self.eval_dataset:
            eval_dataset = None
        before = len(self.state.log_history)
        with self.exclude_from_timing():
            values = super().evaluate(eval_dataset, *args, **kwargs)
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            for line in self.state.log_history[before:]:
                line[OTHER_ROWS] = True
        return values

    @property
    def step_of_weights(self) -> int:
        """The step that the student's weights are of: the best one where training has ended and put it back."""
        # state.best_global_step may be one whose weights were not saved
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return int(best.rpartition("-")[2]) if best and not self.is_in_train else self.state.global_step

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._grad_norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self._grad_norm

    def _get_learning_rate(self) -> float:
        self._learning_rate = super()._get_learning_rate()
        return self._learning_rate

    def _check_weights(self) -> None:
        check_weights(cast(nn.Module, self.model), self.accelerator, self.state.global_step)

    def _stop_non_finite_run(self, step: int, rows: list[int]) -> None:
        names = getattr(self.train_dataset, "row_ids", None)
        stop_non_finite_run(Path(str(self.args.output_dir)), step, self.args.process_index, rows, names)

    # ---------------------------------------------------------------------------------------------- checkpoints, saved

    def save_checkpoint_now(self) -> Path | None:
        """Save a complete checkpoint of the optimizer step that has just ended, whatever the recipe saves, and return it.

        What this step still has to do (its log line, a held-out evaluation) is noted in it and made up for on resume.
        Every rank calls it at the same step, from an ``on_step_end`` after ours; then training must end. It is whole, on
        the disk, when it returns.

        Returns:
            The folder, ``interrupted/checkpoint-STEP``; None, and nothing is written, where the loss was non-finite.
        """
        if self.non_finite.broken_steps:
            return None
        only_model, self.args.save_only_model = self.args.save_only_model, False
        self._interrupting = True
        try:
            self._save_checkpoint(self.model_wrapped, None)
            return self._checkpoint_folder(None)
        finally:
            self._interrupting, self.args.save_only_model = False, only_model

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        # A place of its own: the Trainer must not take it for the checkpoint of an evaluation, or count it.
        return os.path.join(folder, INTERRUPTED) if self._interrupting else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's, in an order in which a kill at any moment leaves a complete checkpoint, if there ever was one."""
        self._check_weights()
        folder = self._checkpoint_folder(trial)
        if self.resumed_from is not None and folder.resolve() == self.resumed_from.resolve():
            return  # made up for on resume: it is complete already, and still read from
        with self.exclude_from_timing(), writing(folder.parent):
            # 1. What a killed run left of it goes.
            if self.args.should_save:
                if self._interrupting:
                    check_no_link(folder.parent)
                make_way(folder)
            self.accelerator.wait_for_everyone()
            # 2. Our files and the Trainer's; older checkpoints are needed until the end, so it must not rotate.
            self.save_progress(folder)
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            # 3. All have written: it is complete, and what it makes useless may go.
            if self.args.should_save:
                step, resumable = self.state.global_step, not self.args.save_only_model
                models = self.models_record or self._models_described
                told = {"models": models, "objective": self.describe_objective()}
                mark_complete(folder, step=step, resumable=resumable, **told, **self.layout())
                self.whole.add(folder.resolve())
                run = folder.parent.parent if self._interrupting else folder.parent
                keep = [self.state.best_model_checkpoint]
                rotate(run, step, None if self._interrupting else limit, keep, self.whole)
            self.accelerator.wait_for_everyone()

    def save_progress(self, folder: Path) -> None:
        """Write what the Trainer's checkpoint leaves out into ``folder``; every process calls it."""
        extra = self.extra_state()
        due = exact_resume.what_is_due(
            self.control, self.state, interrupted=self._interrupting, epoch_ended=self._resume.epoch_ended
        )
        generate = any(callback.is_due(self.state) for callback in self._callbacks_of(GenerationEvalCallback))
        extra.process = {"unlogged_loss": float(self._tr_loss), **extra.process}
        extra.shared |= {
            "last_logged_step": self._globalstep_last_logged,
            "total_loss": self._total_loss_scalar,  # of all steps that were logged
            "grad_norm": None if self._grad_norm is None else float(self._grad_norm),
            "learning_rate": self._learning_rate,
            "due": {"generate": generate, **due},
            "seconds": self.clock.seconds,
            # What is written behind it is cut off on a resume
            **RunDirectory(str(self.args.output_dir)).log_mark(),
        }
        if isinstance(self.train_dataset, RowStream):
            number, began = self._pass_began
            over = self._resume.epoch_ended
            extra.shared["stream"] = {
                "pass": number + over,
                "steps": 0 if over else self.state.global_step - began,
                "first_row": self.train_dataset.first_row,
            }
        exact_resume.write_progress(folder, extra, rank=self.args.process_index, shared_too=self.args.should_save)

    def layout(self) -> dict[str, Any]:
        """How the rows of an optimizer step are shared out and what they are computed in, for ``complete.json``."""
        rows: Any = self.train_dataset
        return {
            "processes": self.args.world_size,
            "strategy": strategy_of(self.accelerator),
            "rows_per_device": self._train_batch_size if self.pack_tokens is None else None,
            "tokens_per_device": self.pack_tokens,
            "accumulation": self.args.gradient_accumulation_steps,
            "rows": len(rows) if hasattr(rows, "__len__") else None,
            "length_bucket_size": self.length_bucket_size(rows),
            "mixed_precision": self.accelerator.mixed_precision,  # a launcher may have chosen it
            "device": self.args.device.type,  # the same recipe takes a GPU where it finds one
            "optim": str(getattr(self.args.optim, "value", self.args.optim)),
            "token_digest": rows.digest if isinstance(rows, EncodedDataset) else None,
            "row_digest": rows.digest if isinstance(rows, TokenisedDataset) else None,
        }

    # -------------------------------------------------------------------------------------------- checkpoints, resumed

    def check_resumable(self, folder: Path) -> None:
        """Refuse to go on from the checkpoint ``folder`` where the numbers could not be those of the run that wrote it.

        Raises:
            UserError: it cannot be exact; says why, and what to launch instead.
        """
        record = read_complete(folder)
        now = self.models_record or self._models_described
        refuse_changed_models(str(folder), record.get("models", {}), now, "train from the beginning")
        exact_resume.check_objective(folder, record.get("objective", {}), self.describe_objective())
        exact_resume.check_layout(
            folder, self.layout(), self.args, cast(nn.Module, self.model), self.neftune_noise_alpha
        )

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        # The first place that knows how many steps the run has; nothing is loaded or written yet.
        values: Any = super().set_initial_training_values(*args, **kwargs)
        if self.pack_tokens is not None and self.args.max_steps > 0:  # train_samples_per_second: a pack is no row
            epochs, steps_of_epoch, rows, _, *rest = values
            values = (epochs, steps_of_epoch, rows, rows * self.args.max_steps / steps_of_epoch, *rest)
        if self.resumed_from is not None:
            own = self.lr_scheduler is not None and not self._created_lr_scheduler
            scheduled = self.scheduled_over_run()
            exact_resume.check_length(self.resumed_from, values[-1], self.args, own_scheduler=own, scheduled=scheduled)
        return values

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """The Trainer's. DeepSpeed's and FSDP2's checkpoints are read here, and here alone."""
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        own = strategy_of(self.accelerator) in ("single", "ddp")  # whose weights were loaded before
        reading = nullcontext() if own else exact_resume.loading(resume_from_checkpoint)
        with data_only(resume_from_checkpoint), in_form_of(resume_from_checkpoint, self.accelerator), reading:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[no-untyped-call]

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))

        def check() -> None:  # the Trainer would go on with other weights where they are not there
            why = None if best.resolve() in self.whole else why_incomplete(best, contents=True)
            if why is not None:
                raise RunError(
                    f"{best}: the weights of the best step, which are to be the result (load_best_model_at_end), are lost: "
                    f"{why}. Start again with --resume: it goes on from a checkpoint before it, if there is one"
                )

        on_first_process(check, self.args.process_index, self.args.world_size)
        with data_only(best), in_form_of(best, self.accelerator):
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        refuse_pickled_weights(resume_from_checkpoint)
        with data_only(resume_from_checkpoint), exact_resume.loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_scaler(self, checkpoint: str | None) -> None:
        # Without fp16 there is none, whatever lies in the folder: another precision is refused before
        if self.accelerator.scaler is not None:
            with exact_resume.loading(checkpoint):
                super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with data_only(str(checkpoint)), exact_resume.loading(checkpoint):  # as it is, but refused in our words
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Not in _load_from_checkpoint, which the Trainer does not call under DeepSpeed.
        with exact_resume.loading(checkpoint):
            if checkpoint is not None:
                self.load_progress(Path(checkpoint))
            super()._load_optimizer_and_scheduler(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are saved once, under one of their names: the others are missing in every checkpoint, and no harm."""
        tied = getattr(self.model, "_tied_weights_keys", None) or ()
        missing = [key for key in load_result.missing_keys if not key.endswith(tuple(tied))]
        if len(missing) < len(load_result.missing_keys):
            self.model.tie_weights()  # type: ignore[operator, union-attr]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def load_progress(self, folder: Path) -> None:
        """Restore what ``save_progress`` wrote; the step is finished when training begins.

        Raises:
            UserError: the checkpoint was written by another kind of run.
        """
        progress = exact_resume.read_progress(folder, self.args.process_index, self.args.world_size)
        self.load_extra_state(folder, progress)
        self.clock.seconds_before = progress.shared["seconds"]
        self._progress = progress

    def _finish_step(self) -> None:
        """Make up for what the checkpoint's step still had to do, in the order of the Trainer's loop."""
        progress, self._progress = self._progress, None
        if progress is None or self.resumed_from is None:
            return
        args, state, loop = self.args, self.state, progress.shared
        # 1. The state is that of the checkpoint, but the run may be of another length, and in another place.
        then = exact_resume.state_then(self.resumed_from)
        due = exact_resume.due_now(loop["due"], then, state)
        state.compute_steps(args, state.max_steps)  # the Trainer has put back those of the checkpoint
        exact_resume.put_in_place(self.resumed_from, then, state, args, self.whole)
        # 2. The loop stands where it stood.
        self._tr_loss = torch.tensor(progress.unlogged_loss, device=args.device)
        self._restore_total_loss(loop.get("total_loss"), progress.unlogged_loss)
        self._globalstep_last_logged = loop["last_logged_step"]
        self._grad_norm, self._learning_rate = loop["grad_norm"], loop["learning_rate"]
        args.eval_on_start = False  # it was done when the run started
        # 3. Answers are scored in on_step_end; then come the log line, the evaluation and the checkpoint, ...
        for callback in self._callbacks_of(GenerationEvalCallback):
            if due["generate"]:
                callback.on_step_end(args, state, self.control)
            callback.scored_step = state.global_step
        control = self.control
        control.should_log, control.should_evaluate, control.should_save = due["log"], due["evaluate"], due["save"]
        self._log_evaluate_save()
        # 4. ... and once more where the epoch ends.
        if due["end_epoch"]:
            self.control = self.callback_handler.on_epoch_end(args, state, self.control)
            self._log_evaluate_save()
        self.control.should_training_stop |= due["stop"]
        if due["stop"] and state.global_step < state.max_steps and self.is_world_process_zero():
            logger.warning(
                "%s: a callback ended the run at step %d of %d, as it would have without a break, so nothing is left to "
                "train; to train on, leave that callback out and go on from an earlier checkpoint",
                self.resumed_from, state.global_step, state.max_steps,
            )  # fmt: skip

    def _restore_total_loss(self, total: float | None, unlogged: float) -> None:
        """The mean that ``train`` returns is over the whole run, as without a break; over this attempt if nobody knows."""
        self._total_loss_scalar, self._mean_loss_from = (
            (-unlogged, self.state.global_step) if total is None else (total, 0)
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, whose ``train_loss`` at the end is a mean over the steps of this attempt alone."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._mean_loss_from, 0.001)
        super().log(logs, start_time)

    def _log_evaluate_save(self) -> None:
        position = (self._tr_loss, self._grad_norm, self.model_wrapped, None, float(self.state.epoch or 0))
        self._maybe_log_save_evaluate(*position, None, time.time(), learning_rate=self._learning_rate)

    # -------------------------------------------------------------------------------------------------------- the Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The Trainer's, private unless ``private`` or ``args.hub_private_repo`` is False; all processes call it.

        Raises:
            UserError: the Hub refuses, or cannot be asked.
        """
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        self.hub_model_id = on_first_process(  # type: ignore[assignment]
            lambda: self.hub_uploads.open(name, token, private), self.args.process_index, self.args.world_size
        )
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the student, its tokenizer and its card, from a folder that ``hub.staging`` has made.

        Never ``args.output_dir`` itself: logs, checkpoints and answers to held-out rows lie there. All processes call it.

        Args:
            commit_message: as for ``Trainer.push_to_hub``.
            blocking: wait for the end of the upload.
            token: as for ``Trainer.push_to_hub``.
            revision: the same.
            private: of a repository that has to be made; None: ``args.hub_private_repo``, and where that is None, True.
            kwargs: for the card, as for ``Trainer.create_model_card``.

        Returns:
            The address of the repository; where ``blocking`` is False, a future of it; None on the other processes.

        Raises:
            UserError: there is nothing to upload, or a text holds an access token.
            UploadError: the Hub or the network failed; the student is saved and can be pushed again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)  # its name may be that of the folder
        saved = Path(str(self.args.output_dir)) / UPLOAD
        if self.is_world_process_zero():
            remove_all_of(saved)  # of a killed process
        self.accelerator.wait_for_everyone()
        try:
            self.save_model(str(saved), _internal_call=True)
            if not self.is_world_process_zero():
                return None
            repository = str(self.hub_model_id)
            ready = self.hub_uploads.stage(saved, self.card(repository, **kwargs), self.answers_with)
        finally:
            if self.is_world_process_zero():
                remove_all_of(saved)
        to = self.hub_uploads.destination(repository, token, private, revision)
        future = self.hub_uploads.start(ready, to, commit_message or "End of training")
        if blocking:
            return future.result()
        self.push_in_progress = PushInProgress([future])  # type: ignore[assignment, arg-type]
        return future

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the student of a checkpoint while training goes on, unless ``args.hub_strategy`` is ``end``.

        ``checkpoint`` and ``all_checkpoints`` upload no more than ``every_save`` does: optimizer states stay here.
        """
        last = cast(PushInProgress | None, self.push_in_progress)
        busy = last is not None and not last.is_done()
        later = busy and not self.args.hub_always_push
        if (
            self._interrupting
            or later
            or not self.is_world_process_zero()
            or self.args.hub_strategy == HubStrategy.END
        ):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        repository, step = str(self.hub_model_id), self.state.global_step
        message = f"Training in progress, step {step}"
        card = self.card(
            repository, note=f"Training was in progress at step {step}: this is not the finished student."
        )
        to = self.hub_uploads.destination(repository, None, None, None)
        future = self.hub_uploads.push_checkpoint(Path(checkpoint_folder), to, card, self.answers_with, message)
        if future is not None:
            jobs: list[Any] = [*last.jobs, future] if last is not None and busy else [future]  # type: ignore[misc]
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment, arg-type]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The Trainer's, ready for ``generate``; ``training_args.bin`` holds nobody's token.

        Raises:
            UserError: the weights to upload are split over processes, and DeepSpeed does not gather them.
        """
        if Path(output_dir or str(self.args.output_dir)).name == UPLOAD and state_dict == {}:
            raise UserError(  # in its place the Trainer would put a checkpoint there
                "deepspeed: stage3_gather_16bit_weights_on_model_save is false, expected true: the student is in pieces "
                "and cannot be uploaded"
            )
        token, self.args.hub_token = self.args.hub_token, None
        while_running = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter |= self._filters_loss  # as it was given: see _run_epoch
        try:
            tokenizer = cast(Any, self.processing_class)
            with ready_for_generation(cast(nn.Module, self.model), tokenizer, self.end_token_ids()):
                super()._save(output_dir, state_dict)
                save_generation_config(cast(nn.Module, self.model), Path(output_dir or str(self.args.output_dir)))
        finally:
            self.args.hub_token, self.args.logging_nan_inf_filter = token, while_running

    @property
    def answers_with(self) -> str:
        """Prompt template of what the student generates; empty: nothing is generated, or nobody knows how."""
        return ""

    def card(self, repository: str | None, note: str = "", **metadata: Any) -> str:
        """Text of the model card: ``model_card``'s where it was given.

        Args:
            repository: where it will stand on the Hub; None: beside a saved model.
            note: a paragraph for it, such as that training goes on.
            metadata: as for ``Trainer.create_model_card``.

        Raises:
            NotImplementedError: there is none, and this kind of trainer makes none.
        """
        if self.model_card is None:
            raise NotImplementedError
        return self.model_card()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md into ``args.output_dir``: the card that ``push_to_hub`` uploads. Arguments as the Trainer's."""
        if self.is_world_process_zero():
            given = inspect.signature(Trainer.create_model_card).bind(self, *args, **kwargs).arguments
            given.pop("self")
            write_text_atomic(Path(str(self.args.output_dir)) / "README.md", self.card(None, **given))
