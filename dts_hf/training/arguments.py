"""Arguments that ``transformers.Trainer`` takes and a distillation cannot honour: refused, with what to give instead."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from dts_hf.distributed.launch import check_launch, limit_waiting
from dts_hf.errors import UserError, nearest
from dts_hf.recipe.problems import wrong_value
from dts_hf.recipe.training_keys import MAY_BE_INFINITE, TRAINING_RANGES, key_schema

Init = TypeVar("Init", bound=Callable[..., None])
#: What goes to ``transformers.Trainer`` as it is, and to our own bases.
PASSED_ON = frozenset({*inspect.signature(Trainer.__init__).parameters, "model_card"}) - {"self"}
#: Of our bases, which our own trainers fill.
NOT_KEYWORDS = {"self", "kwargs", "positional", "rows", "pack_tokens", "classes", "loss_options", "columns", "facts"}
#: Words of other releases and other libraries for what is here under another name.
RENAMED = {
    "tokenizer": "processing_class",
    "training_args": "args",
    "teacher_model": "teacher",
    "teacher_model_name_or_path": "teacher",
    "student": "model",
    "student_model": "model",
    "alpha": "kd_ratio",
    "beta": "divergence={'name': 'jsd', 'beta': ...}",
    "max_seq_length": "max_length",
}


def in_order(init: Init) -> Init:
    """``check_order`` before ``init``, the ``__init__`` of a trainer: Python would say that it got several teachers."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        check_order(args, kwargs)
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def check_order(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse the arguments of a trainer that stand in each other's places.

    Args:
        args: those by place: the student, the teacher, ...
        kwargs: those by name.

    Raises:
        UserError: arguments or data stand where the teacher is expected, or a teacher is given twice.
    """
    second = args[1] if len(args) > 1 else kwargs.get("teacher")
    if isinstance(second, TrainingArguments):
        raise UserError(
            f"teacher: got {type(second).__name__}; here the second argument is the teacher, and what transformers.Trainer "
            "has there is given by name: DistillationTrainer(model, teacher, args=args, train_dataset=rows)"
        )
    if len(args) > 1 and "teacher" in kwargs:
        raise UserError(
            "teacher: got two, by its place and by its name; give DistillationTrainer(model, teacher, ...)"
        )
    first = args[0] if args else kwargs.get("model")
    if isinstance(first, TrainingArguments):
        raise UserError(
            f"model: got {type(first).__name__}, expected the student: DistillationTrainer(model, teacher, args=args)"
        )


def check_keywords(kwargs: Mapping[str, Any], kind: type) -> None:
    """Refuse a keyword that neither a trainer of ours nor ``transformers.Trainer`` has.

    Args:
        kwargs: what the trainer would pass on.
        kind: the trainer; its own parameters and those of its bases are known, too.

    Raises:
        UserError: names the keyword and the nearest right word.
    """
    own = {name for base in kind.__mro__ if "__init__" in vars(base) for name in inspect.signature(base).parameters}
    known = sorted({*own, *PASSED_ON} - NOT_KEYWORDS)
    for name in kwargs:
        if name in known:
            continue
        if name in RENAMED:
            raise UserError(f"{name}: no argument of this trainer, expected {RENAMED[name]}")
        if name in TrainingArguments.__dataclass_fields__:
            raise UserError(f"{name}: no argument of the trainer, expected it in args=TrainingArguments({name}=...)")
        raise UserError(f"{name}: no argument of this trainer.{nearest(name, known) or ' See its documentation.'}")


def checked_arguments(
    args: TrainingArguments | None, kwargs: Mapping[str, Any], kind: type | None = None
) -> TrainingArguments:
    """Refuse what the Trainer would take and this loss would ignore without a word, and say what to give instead.

    Args:
        args: of the trainer; None: those of a run in ``runs/distillation``.
        kwargs: everything else that goes to ``transformers.Trainer`` as it is.
        kind: the trainer, whose keywords these are; None: they are none of a caller's.

    Returns:
        A copy of the arguments, which are those of a launch that is what it claims to be: the Trainer writes into its own,
        and the caller's may serve another trainer.

    Raises:
        UserError: names the argument, or see ``check_launch``.
    """
    if kind is not None:
        check_keywords(kwargs, kind)
    if args is not None and not isinstance(args, TrainingArguments):
        raise UserError(f"args: got {type(args).__name__}, expected transformers.TrainingArguments")
    args = TrainingArguments(output_dir="runs/distillation") if args is None else copy.copy(args)
    check_launch(args)
    limit_waiting(args)
    for name in ("compute_loss_func", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise UserError(f"{name}: the loss needs no logits, so it would never be called; expected None")
    if args.label_smoothing_factor:
        raise UserError(
            f"args.label_smoothing_factor: got {args.label_smoothing_factor}, expected 0: it is not used here"
        )
    check_numbers(args)
    check_compilation(args)
    # Our dummy rows make the batches of an epoch even; with these, accelerate counts steps and shares rows out otherwise.
    for name, expected in (("split_batches", False), ("even_batches", True)):
        value = getattr(args.accelerator_config, name)
        if value != expected:
            raise UserError(
                f"args.accelerator_config: got {name}: {value}, expected {name}: {expected}; "
                "per_device_train_batch_size is the batch of each process"
            )
    foreign = [name for name in ("lmbda", "beta", "packing", "max_length", "temperature") if hasattr(args, name)]
    if foreign:
        raise UserError(
            f"args: {type(args).__name__} has {', '.join(foreign)}, which would have no effect; expected "
            "transformers.TrainingArguments, and such options as arguments of the trainer"
        )
    return args


def check_numbers(args: TrainingArguments) -> None:
    """Refuse a learning rate of NaN, a beta above 1 or thousands of workers, as a recipe does.

    Whole numbers are transformers' own business: some of its zeros mean "all" or "never".

    Raises:
        UserError: names the argument, the value and the range.
    """
    for name, limits in TRAINING_RANGES.items():
        value = getattr(args, name, None)
        checked = isinstance(value, float) or name == "dataloader_num_workers"
        if checked and value not in limits and not (value == math.inf and name in MAY_BE_INFINITE):
            raise UserError(f"args.{name}: {wrong_value(value, key_schema(name), {})}")


def check_optimizer(args: TrainingArguments, kind: Any, options: Mapping[str, Any]) -> None:
    """Refuse what optimizer and schedule would, but for one that asks for the model: they are made after the first scores.

    Args:
        args: its ``optim_args`` may be what is wrong.
        kind: the optimizer's class.
        options: what it is given beside the weights.

    Raises:
        UserError: with the words of the optimizer, or of the schedule.
    """
    if {"params", "model", "optimizer_dict"} & {*options}:
        return
    try:
        optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
    except ValueError as error:
        given = f"_args: got {args.optim_args!r}, which" if args.optim_args else ":"
        name = getattr(kind, "__name__", str(kind))
        raise UserError(f"training.optim{given} {name} refuses: {error}") from error
    steps, more = {"num_warmup_steps": 0, "num_training_steps": 100}, args.lr_scheduler_kwargs or None
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=more)  # type: ignore[arg-type]
    except ValueError as error:  # as polynomial's, where learning_rate is not above its lr_end
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise UserError(f"training.lr_scheduler_type: {name} refuses: {error}") from error


def check_compilation(args: TrainingArguments) -> None:
    """Refuse a backend or a mode that ``torch.compile`` does not have; it would say so where the layers are compiled.

    Raises:
        UserError: names the argument and the nearest right word.
    """
    if not args.torch_compile:
        return
    known = {backend.value.lower() for backend in DynamoBackend}  # accelerate has another list, and reads it, too
    choices = {"torch_compile_backend": sorted(known & {*torch.compiler.list_backends(exclude_tags=())})}
    if args.torch_compile_backend == "inductor":
        choices["torch_compile_mode"] = [*torch._inductor.list_mode_options()]
    for name, words in choices.items():
        value = getattr(args, name)
        if value is not None and value not in words:
            raise UserError(
                f"training.{name}: got '{value}', expected one of {', '.join(words)}.{nearest(value, words)}"
            )


def check_for_classifiers(kwargs: Mapping[str, Any]) -> None:
    """Refuse what ``DistillationTrainer`` takes and a trainer of classifiers does not.

    Raises:
        UserError: names the argument and what to give instead.
    """
    instead = {
        "model_init": "the student as model; for a search over hyperparameters make one trainer for each setting",
        "peft_config": "the student with its adapter: model = peft.get_peft_model(model, peft_config)",
        "quantize": "None: it is for language models",
        "compute_metrics": "None: evaluate gives the metrics of the task, and trainer.predicted the logits",
    }
    for name, expected in instead.items():
        if kwargs.get(name) is not None:
            raise UserError(f"{name}: is not supported for classifiers; expected {expected}")
