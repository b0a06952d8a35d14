"""Student and teacher of a language model's distillation, made ready and compared before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.distributed.launch import prepare_deepspeed
from dts_hf.distributed.processes import process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError
from dts_hf.models.checks import check_apart, check_finite
from dts_hf.models.head import check_head, head_of
from dts_hf.models.loading import load_model, load_tokenizer, unwrapped
from dts_hf.models.packing_check import check_packing
from dts_hf.models.router import Router, collects_router_logits, router_of
from dts_hf.models.vocabulary import VocabularyPlan, align_vocabularies, plan_for
from dts_hf.recipe.schema import MOST_TOKENS
from dts_hf.recipe.schema import Teacher as TeacherSection
from dts_hf.teachers.base import Teacher
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.none import NoTeacher
from dts_hf.training.student import with_adapter
from dts_hf.training.tracking import model_facts

logger = logging.getLogger(__name__)
#: Of a teacher that is given by name, as in a recipe.
TEACHER_DTYPE: str = TeacherSection.model_fields["dtype"].default


@dataclass(frozen=True)
class Pair:
    """Two models that can be compared.

    Attributes:
        student: without any wrapper.
        teacher: as the loss asks it.
        tokenizer: the student's.
        vocabulary: the ids that both share.
    """

    student: nn.Module
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    vocabulary: VocabularyPlan

    def with_student(self, student: nn.Module, peft_config: Any = None) -> Pair:
        """The same with another student, which must fit the teacher as the first one did.

        Args:
            student: a new one.
            peft_config: of the adapter that it gets.

        Raises:
            UserError: it does not fit.
        """
        check_whole(student)
        student = with_adapter(unwrapped(student), peft_config)
        if isinstance(self.teacher, LiveTeacher):
            check_apart(student, self.teacher.model)
        check_finite(student, "model_init: the student")
        check_head(student, role="student")
        before, now = head_of(self.student).vocab_size, head_of(student).vocab_size
        if before != now:
            raise UserError(f"model_init: this student has {now:,} tokens, expected {before:,} as the first one has")
        return replace(self, student=student)

    def facts(self) -> dict[str, Any]:
        """What trackers are told of the teacher."""
        if isinstance(self.teacher, LiveTeacher):
            return {
                **model_facts("teacher", self.teacher.model),
                "teacher_dtype": str(next(self.teacher.model.parameters()).dtype).removeprefix("torch."),
            }
        if isinstance(self.teacher, CachedTeacher):
            identity = self.teacher.cache.identity
            return {"teacher": identity.model, "teacher_dtype": identity.dtype, "teacher_states": "cached"}
        return {"teacher": type(self.teacher).__name__} if self.taught else model_facts("teacher", None)

    def warn_if_swapped(self) -> None:
        """Say it where the student is larger than its teacher, as when the two stand in each other's places."""
        if not isinstance(self.teacher, LiveTeacher) or process()[0] != 0:
            return
        student, teacher = (facts_of["x_parameters"] for facts_of in (model_facts("x", self.student),
                            model_facts("x", self.teacher.model)))  # fmt: skip
        if student > teacher:
            logger.warning(
                "the student has %s parameters and the teacher %s: are they in each other's places? The order is "
                "DistillationTrainer(model, teacher)", f"{student:,}", f"{teacher:,}"
            )  # fmt: skip

    def models(self) -> list[tuple[nn.Module, str]]:
        """The models that read the rows, with what errors call them."""
        live = [(self.teacher.model, "the teacher")] if isinstance(self.teacher, LiveTeacher) else []
        return [(self.student, "the student"), *live]

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return not isinstance(self.teacher, NoTeacher)

    def router(self, choice: str) -> Router | None:
        """The auxiliary loss of the student's routers, as ``router_aux_loss`` chooses it; None: there is none.

        Raises:
            UserError: there is no such choice, or see ``router_of``.
        """
        if choice not in ("model", "none"):
            raise UserError(f"router_aux_loss: got {choice!r}, expected 'model' or 'none'")
        return router_of(self.student) if choice == "model" else None

    def collator(self, packing: bool, of_user: Any, args: TrainingArguments) -> Any:
        """What makes the batches: a collator of the user's, or our own, packed or padded with a token that nobody sees.

        Args:
            packing: lay rows end to end.
            of_user: the user's; None: there is none.
            args: of the trainer.

        Raises:
            UserError: both are asked for, one process would make the packs of all, states out of a cache cannot come with
                these batches, or see ``check_packing``.
        """
        of_rows = self.teacher.of_rows if isinstance(self.teacher, CachedTeacher) else None
        config: Any = args.accelerator_config
        if of_rows is not None and of_user is not None:
            raise UserError(
                "data_collator: got one beside a cached teacher, whose states our own collators put into the batch; leave "
                "it out, or use the live teacher"
            )
        if of_rows is not None and args.world_size > 1 and config.dispatch_batches:
            raise UserError(
                "args.accelerator_config: got dispatch_batches: True, expected None or False beside a cached teacher: the "
                "states [N, H] of a batch cannot be cut like its rows"
            )
        if packing and of_user is not None:
            raise UserError("packing: got true and a data_collator; give one of them")
        if of_user is not None:
            return of_user
        if packing:
            if args.world_size > 1 and config.dispatch_batches:
                raise UserError(
                    "args.accelerator_config: got dispatch_batches: True, expected None or False beside packing: the first "
                    "process would lay the batches of all others on its own, which are of other lengths"
                )
            return PackedCollator(self.check_packing(args), of_rows=of_rows)
        pads = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)  # hidden: any of them will do
        return PaddedCollator(next(pad for pad in pads if pad is not None), of_rows=of_rows)

    def check_packing(self, args: TrainingArguments, own_mask: bool = True) -> bool:
        """Whether the batches may carry the rows' boundaries as a mask; else both models go by ``position_ids``.

        Args:
            args: of the trainer: where the models will run, and what the student's autocast is.
            own_mask: False where a collator of the user's lays the rows end to end.

        Raises:
            UserError: student or teacher mixes packed rows.
        """
        live = isinstance(self.teacher, LiveTeacher)
        device = args.device
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            args.mixed_precision
        )  # a launcher's choice, too
        # A mixture of experts reads the mask as one of tokens, for its router's loss.
        cu_seqlens = own_mask and not collects_router_logits(self.student)
        cu_seqlens = cu_seqlens and (live or getattr(self.teacher, "takes_cu_seqlens", False))
        cu_seqlens = check_packing(self.student, "the student", device, cu_seqlens, autocast)
        if isinstance(self.teacher, LiveTeacher):
            both = check_packing(self.teacher.model, "the teacher", device, cu_seqlens)
            if cu_seqlens and not both:
                check_packing(self.student, "the student", device, False, autocast)
            cu_seqlens = both
        return cu_seqlens


def pack_tokens(packing: bool | Mapping[str, Any]) -> int | None:
    """To how many tokens ``packing`` fills each batch; None: a batch is a number of rows, packed or not.

    Raises:
        UserError: it is neither a truth value nor a mapping of ``tokens`` to a number of them, a million at most.
    """
    if isinstance(packing, bool):
        return None
    tokens = packing.get("tokens") if isinstance(packing, Mapping) and [*packing] == ["tokens"] else None
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MOST_TOKENS:
        raise UserError(
            f"packing: got {packing!r}, expected true, false, or a budget of tokens as in {{'tokens': 8192}}"
        )
    return tokens


def set_up_models(
    student: nn.Module | str | None,
    teacher: nn.Module | Teacher | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    vocab_alignment: str,
    args: TrainingArguments,
    peft_config: Any = None,
) -> Pair:
    """Load what is a name, undo what an earlier trainer has done to a model, and check that the two can be compared.

    Args:
        student: as ``DistillationTrainer`` takes it.
        teacher: the same.
        tokenizer: the student's; by default the one that its name brings.
        teacher_tokenizer: compared with it; by default the one that the teacher's name brings, else the same.
        vocab_alignment: see ``align_vocabularies``.
        args: of the trainer.
        peft_config: of the adapter that the student gets; None: it is trained as it is.

    Raises:
        UserError: a model or the tokenizer is missing or in pieces, they share weights, one does something to its logits
            that ``Head`` cannot represent, or the tokenizers differ.
    """
    # 1. Names become models.
    if student is None:
        raise UserError("model: got None, expected the student, its name or its folder")
    if isinstance(student, str):
        tokenizer = tokenizer or load_tokenizer(student, key="model")
        student = load_model(student, key="model")
    if isinstance(teacher, str):
        teacher_tokenizer = teacher_tokenizer or load_tokenizer(teacher, key="teacher")
        teacher = load_model(teacher, key="teacher", dtype=TEACHER_DTYPE)
    if tokenizer is None:
        raise UserError("processing_class: got None, expected the student's tokenizer")
    check_whole(student)
    # 2. Without what an earlier trainer has put around them; the teacher may be the student of one.
    student = with_adapter(unwrapped(student), peft_config)
    teacher = unwrapped(teacher) if isinstance(teacher, nn.Module) else teacher
    held = teacher.model if isinstance(teacher, LiveTeacher) else teacher
    if isinstance(held, nn.Module):
        check_apart(student, held)
    prepare_deepspeed(args, student)
    # 3. The loss must see both models' own logits, over ids that mean the same.
    check_finite(student, "model: the student")
    check_head(student, role="student")
    if isinstance(teacher, CachedTeacher):
        teacher.check_tokenizer(
            tokenizer
        )  # it is the one that was compared with the teacher's when the cache was made
        widths, shared = (head_of(student).vocab_size, teacher.head.vocab_size), teacher.cache.manifest.shared_tokens
        return Pair(student, teacher, tokenizer, plan_for(widths, tokenizer, len(tokenizer), shared, vocab_alignment))
    if not isinstance(teacher, nn.Module):  # anything may stand behind the interface: its head is all that is known
        answers = NoTeacher() if teacher is None else teacher
        heads = [head for head in (head_of(student), answers.head) if head is not None]
        return Pair(student, answers, tokenizer, VocabularyPlan(min(head.vocab_size for head in heads)))
    if not is_sharded(teacher):  # otherwise it was checked when it was whole
        check_finite(teacher, "teacher: the teacher")
        check_head(teacher, role="teacher")
    plan = align_vocabularies(student, teacher, tokenizer, teacher_tokenizer or tokenizer, vocab_alignment)
    pair = Pair(student, LiveTeacher(teacher), tokenizer, plan)
    pair.warn_if_swapped()
    return pair


def check_whole(student: nn.Module) -> None:
    """Refuse a student that is in pieces before anybody could check it.

    Raises:
        UserError: its weights are sharded over processes.
    """
    if is_sharded(student):
        raise UserError(
            "model: its weights are sharded over processes already, as from_pretrained makes them while "
            "TrainingArguments with ZeRO-3 exist; expected a whole model: load it within "
            "dts_hf.distributed.sharding.unsharded_init(), or give its name"
        )
