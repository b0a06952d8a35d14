"""Student and teacher of a language model's distillation, made ready and compared before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dts_hf.data.collators import PackedCollator, PaddedCollator
from dts_hf.distributed.launch import prepare_deepspeed
from dts_hf.distributed.processes import process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import UserError, nearest
from dts_hf.models.checks import check_apart, check_finite
from dts_hf.models.head import check_head, head_of
from dts_hf.models.loading import load_model, load_tokenizer, unwrapped
from dts_hf.models.packing_check import check_packing
from dts_hf.models.router import Router, collects_router_logits, router_of
from dts_hf.models.vocabulary import VocabularyPlan, align_vocabularies, plan_for
from dts_hf.recipe.schema import MOST_TOKENS
from dts_hf.recipe.schema import Teacher as TeacherSection
from dts_hf.teachers.asked_ahead import MOST_KEPT
from dts_hf.teachers.base import Teacher
from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.identity import TeacherIdentity
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.none import NoTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.self_teacher import SelfTeacher, SharedTeacher, TeacherOfItself
from dts_hf.teachers.several import OfRows, SeveralTeachers, naming_teacher
from dts_hf.training.student import ready_student
from dts_hf.training.tracking import model_facts

logger = logging.getLogger(__name__)
#: A teacher as a trainer takes it; None: there is none.
AnyTeacher: TypeAlias = nn.Module | Teacher | SelfTeacher | str | None
#: Of a teacher that is given by name, as in a recipe.
TEACHER_DTYPE: str = TeacherSection.model_fields["dtype"].default


@dataclass(frozen=True)
class Pair:
    """Two models that can be compared.

    Attributes:
        student: without any wrapper.
        teacher: as the loss asks it.
        tokenizer: the student's.
        vocabulary: the ids that both share; those of the student where the teacher has another tokenizer.
        teacher_tokenizer: where it is another one (``alignment``); else None.
    """

    student: nn.Module
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    vocabulary: VocabularyPlan
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def teachers(self) -> list[tuple[Teacher, str]]:
        """The teacher, or each of several once, with what errors call it."""
        if not isinstance(self.teacher, SeveralTeachers):
            return [(self.teacher, "the teacher")]
        return [(one, f"the teacher {' and '.join(map(repr, names))}") for one, names in self.teacher.distinct]

    @property
    def live(self) -> list[tuple[LiveTeacher, str]]:
        """The teachers that are models of this process, each once, with what errors call them."""
        return [(one, role) for one, role in self.teachers if isinstance(one, LiveTeacher)]

    def with_student(
        self, student: nn.Module, peft_config: Any = None, quantize: Mapping[str, Any] | None = None
    ) -> Pair:
        """The same with another student, which must fit the teacher as the first one did.

        Args:
            student: a new one.
            peft_config: of the adapter that it gets.
            quantize: see ``ready_student``.

        Raises:
            UserError: it does not fit.
        """
        if isinstance(self.teacher, TeacherOfItself):
            raise UserError(
                "model_init: makes a new student, but its teacher is the first one itself; give model instead"
            )
        check_whole(student)
        student = ready_student(unwrapped(student), peft_config, quantize)
        for teacher, _ in self.live:
            check_apart(student, teacher.model)
        check_finite(student, "model_init: the student")
        check_head(student, role="student")
        before, now = head_of(self.student).vocab_size, head_of(student).vocab_size
        if before != now:
            raise UserError(f"model_init: this student has {now:,} tokens, expected {before:,} as the first one has")
        return replace(self, student=student)

    def facts(self) -> dict[str, Any]:
        """What trackers are told of the teacher, or of each of several."""
        if isinstance(self.teacher, SeveralTeachers):
            facts: dict[str, Any] = {"teacher": ", ".join(self.teacher.names)}
            for name, teacher in self.teacher.by_name.items():
                facts |= _facts_of(f"teacher_{name}", teacher)
            return facts
        return _facts_of("teacher", self.teacher) if self.taught else model_facts("teacher", None)

    def warn_if_swapped(self) -> None:
        """Say it where the student is larger than its teacher, as when the two stand in each other's places."""
        if process()[0] != 0:
            return
        student = model_facts("x", self.student)["x_parameters"]
        for teacher, role in self.live:
            parameters = model_facts("x", teacher.model)["x_parameters"]
            if student > parameters:
                logger.warning(
                    "the student has %s parameters and %s %s: are they in each other's places? The order is "
                    "DistillationTrainer(model, teacher)", f"{student:,}", role, f"{parameters:,}"
                )  # fmt: skip

    def models(self) -> list[tuple[nn.Module, str]]:
        """The models that read the rows, with what errors call them."""
        return [(self.student, "the student"), *self._teaching]

    @property
    def _teaching(self) -> list[tuple[nn.Module, str]]:
        """The models of teachers that are run in this process, those for the rows that a cache has not among them."""
        own = [(one.live if isinstance(one, CachedTeacher) else one, role) for one, role in self.teachers]
        return [(one.model, role) for one, role in own if isinstance(one, LiveTeacher)]

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
        if self.teacher_tokenizer is not None:
            check_batches_align(of_user, args)
        config: Any = args.accelerator_config
        dispatched = args.world_size > 1 and config.dispatch_batches
        cached = any(isinstance(one, CachedTeacher) for one, _ in self.teachers)
        if cached and of_user is not None:
            raise UserError(
                "data_collator: got one beside a cached teacher, whose states our own collators put into the batch; leave "
                "it out, or use the live teacher"
            )
        if cached and dispatched:
            raise UserError(
                "args.accelerator_config: got dispatch_batches: True, expected None or False beside a cached teacher: the "
                "states [N, H] of a batch cannot be cut like its rows"
            )
        if packing and of_user is not None:
            raise UserError("packing: got true and a data_collator; give one of them")
        if of_user is not None:
            return of_user
        if packing:
            if dispatched:
                raise UserError(
                    "args.accelerator_config: got dispatch_batches: True, expected None or False beside packing: the first "
                    "process would lay the batches of all others on its own, which are of other lengths"
                )
            return PackedCollator(self.check_packing(args), of_rows=self._of_rows(args))
        pads = [  # hidden: any of them will do
            next(pad for pad in (one.pad_token_id, one.eos_token_id, 0) if pad is not None)
            for one in (self.tokenizer, self.teacher_tokenizer or self.tokenizer)
        ]
        # A server is asked for each batch as it is, when it has come, where the first process makes those of all
        of_rows = None if dispatched else self._of_rows(args)
        return PaddedCollator(pads[0], teacher_pad_id=pads[1], of_rows=of_rows)

    def _of_rows(self, args: TrainingArguments) -> OfRows | None:
        """What a collator asks of the teachers that are no models of this process; None: there is none."""
        asked = [one for one, _ in self.teachers if isinstance(one, (CachedTeacher, RemoteTeacher))]
        if not asked:
            return None
        for one in asked:
            if isinstance(one, RemoteTeacher):
                one.of_rows.most_kept = max(MOST_KEPT, 2 * args.gradient_accumulation_steps)
        return self.teacher.of_rows(asked) if isinstance(self.teacher, SeveralTeachers) else asked[0].of_rows

    def check_packing(self, args: TrainingArguments, own_mask: bool = True) -> bool:
        """Whether the batches may carry the rows' boundaries as a mask; else both models go by ``position_ids``.

        Args:
            args: of the trainer: where the models will run, and what the student's autocast is.
            own_mask: False where a collator of the user's lays the rows end to end.

        Raises:
            UserError: student or teacher mixes packed rows.
        """
        device = args.device
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            args.mixed_precision
        )  # a launcher's choice, too
        # A mixture of experts reads the mask as one of tokens, for its router's loss.
        cu_seqlens = own_mask and not collects_router_logits(self.student)
        cu_seqlens = cu_seqlens and all(
            isinstance(one, LiveTeacher) or getattr(one, "takes_cu_seqlens", False) for one, _ in self.teachers
        )
        models: list[tuple[nn.Module, str, torch.dtype | None]] = [(self.student, "the student", autocast)]
        models += [(model, role, None) for model, role in self._teaching]
        if isinstance(self.teacher, SharedTeacher):  # the student without its autocast
            models.append((self.student, "the teacher", None))
        for place, (model, role, dtype) in enumerate(models):
            takes = check_packing(model, role, device, cu_seqlens, dtype)
            if cu_seqlens and not takes:  # then all of them go by position_ids
                for earlier, its_role, its_dtype in models[:place]:
                    check_packing(earlier, its_role, device, False, its_dtype)
            cu_seqlens = takes
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
    teacher: AnyTeacher | Mapping[str, AnyTeacher],
    tokenizer: PreTrainedTokenizerBase | None,
    teacher_tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None,
    vocab_alignment: str,
    args: TrainingArguments,
    peft_config: Any = None,
    weights: Mapping[str, float] | None = None,
    alignment: str | None = None,
    quantize: Mapping[str, Any] | None = None,
) -> Pair:
    """Load what is a name, undo what an earlier trainer has done to a model, and check that the two can be compared.

    Args:
        student: as ``DistillationTrainer`` takes it.
        teacher: the same; or several by name.
        tokenizer: the student's; by default the one that its name brings.
        teacher_tokenizer: compared with it, or one for each of several teachers; by default the one that the teacher's name
            brings, else the same.
        vocab_alignment: see ``align_vocabularies``.
        args: of the trainer.
        peft_config: of the adapter that the student gets; None: it is trained as it is.
        weights: of several teachers that all have every row.
        alignment: how a teacher with another tokenizer is compared; None: it has the student's.
        quantize: see ``ready_student``.

    Raises:
        UserError: a model or the tokenizer is missing or in pieces, they share weights, one does something to its logits
            that ``Head`` cannot represent, or the tokenizers differ.
    """
    check_alignment(alignment, several=isinstance(teacher, Mapping), vocab_alignment=vocab_alignment)
    # 1. Names become models.
    if student is None:
        raise UserError("model: got None, expected the student, its name or its folder")
    if isinstance(student, str):
        tokenizer = tokenizer or load_tokenizer(student, key="model")
        student = load_model(student, key="model")
    teachers = _loaded(teacher, teacher_tokenizer)
    if tokenizer is None:
        raise UserError("processing_class: got None, expected the student's tokenizer")
    check_whole(student)
    # 2. Without what an earlier trainer has put around them; the teacher may be the student of one.
    student = ready_student(unwrapped(student), peft_config, quantize)
    for one in teachers:
        if isinstance(one.given, (nn.Module, LiveTeacher)):
            check_apart(student, one.given.model if isinstance(one.given, LiveTeacher) else one.given)
    prepare_deepspeed(args, student)
    # 3. The loss must see all models' own logits, over ids that mean the same.
    check_finite(student, "model: the student")
    check_head(student, role="student")
    ready: dict[str, Teacher] = {}
    plans = []
    for one in teachers:
        with naming_teacher(one.names[0]):
            answers, plan = (
                one.compared(student, tokenizer, vocab_alignment)
                if alignment is None
                else one.aligned(student, alignment)
            )
        ready |= dict.fromkeys(one.names, answers)
        plans.append(plan)
    plan = min(plans, key=lambda plan: plan.size)
    if not isinstance(teacher, Mapping):
        pair = Pair(student, ready[""], tokenizer, plan, None if alignment is None else teachers[0].tokenizer)
    else:
        several = SeveralTeachers({name: ready[name] for name in teacher}, weights)
        notes = dict.fromkeys(plan.note for plan in plans if plan.note)
        pair = Pair(student, several, tokenizer, replace(plan, note="; ".join(notes)))
    pair.warn_if_swapped()
    return pair


@dataclass(frozen=True)
class _Given:
    """A teacher as it was given, and what it is called: nothing where there is but one."""

    names: list[str]
    given: nn.Module | Teacher | SelfTeacher | None
    tokenizer: PreTrainedTokenizerBase | None

    def compared(
        self, student: nn.Module, tokenizer: PreTrainedTokenizerBase, alignment: str
    ) -> tuple[Teacher, VocabularyPlan]:
        """As the loss asks it, and the ids that it shares with the student."""
        if isinstance(self.given, SelfTeacher):
            if self.names != [""]:
                raise UserError(
                    "got SelfTeacher, expected models: a student that teaches itself is the one teacher (teacher)"
                )
            plan = align_vocabularies(student, student, tokenizer, tokenizer, alignment)
            return self.given.of(student), plan
        if isinstance(self.given, (CachedTeacher, RemoteTeacher)):
            return self.given, self._elsewhere(self.given, student, tokenizer, alignment)
        if not isinstance(
            self.given, nn.Module
        ):  # anything may be behind the interface: its head is all that is known
            answers = NoTeacher() if self.given is None else self.given
            heads = [head for head in (head_of(student), answers.head) if head is not None]
            return answers, VocabularyPlan(min(head.vocab_size for head in heads))
        if not is_sharded(self.given):  # otherwise it was checked when it was whole
            check_finite(self.given, "teacher: the teacher")
            check_head(self.given, role="teacher")
        plan = align_vocabularies(student, self.given, tokenizer, self.tokenizer or tokenizer, alignment)
        return LiveTeacher(self.given), plan

    def aligned(self, student: nn.Module, alignment: str) -> tuple[Teacher, VocabularyPlan]:
        """As the loss asks it where it has another tokenizer, and the ids of the student.

        Raises:
            UserError: its tokenizer is not known or not the one that it reads rows with, or what it gives cannot be cut to
                common tokens.
        """
        if not isinstance(self.given, (nn.Module, CachedTeacher, RemoteTeacher)):
            kind = "None" if self.given is None else type(self.given).__name__
            raise UserError(
                f"alignment: the teacher is {kind}, expected a causal language model, its name or its folder, a "
                "CachedTeacher or a RemoteTeacher"
            )
        if self.tokenizer is None:
            raise UserError(
                "teacher_tokenizer: got None beside alignment, expected the tokenizer of the teacher, which is another one "
                "than the student's"
            )
        if isinstance(self.given, CachedTeacher):
            self.given.check_tokenizer(self.tokenizer, "the teacher (teacher_tokenizer)")
            if self.given.compact:
                raise UserError(
                    f"alignment: got {alignment!r}, which asks for the logits of tokens that the compact cache "
                    f"{self.given.cache.folder} has not kept, or for states; expected a cache of states (without --compact)"
                )
        elif isinstance(self.given, RemoteTeacher):
            self.given.check_tokenizer(self.tokenizer)
        elif not is_sharded(self.given):
            check_finite(self.given, "teacher: the teacher")
            check_head(self.given, role="teacher")
        teacher = LiveTeacher(self.given) if isinstance(self.given, nn.Module) else self.given
        if teacher.head.vocab_size < len(self.tokenizer):
            raise UserError(
                f"teacher_tokenizer: it has {len(self.tokenizer):,} entries, and the teacher's head has "
                f"{teacher.head.vocab_size:,}; expected the tokenizer that the teacher was trained with"
            )
        return teacher, VocabularyPlan(head_of(student).vocab_size)

    def _elsewhere(
        self,
        given: CachedTeacher | RemoteTeacher,
        student: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        alignment: str,
    ) -> VocabularyPlan:
        """The ids that are shared with a teacher whose model is not in this process."""
        given.check_tokenizer(
            tokenizer
        )  # of a cache it is the one that was compared with the teacher's when it was made
        shared = given.cache.manifest.shared_tokens if isinstance(given, CachedTeacher) else len(tokenizer)
        widths = head_of(student).vocab_size, given.head.vocab_size
        return plan_for(widths, tokenizer, len(tokenizer), shared, alignment)


#: How a teacher with another tokenizer may be compared.
ALIGNMENTS = ("overlap", "dual_space")


def check_alignment(alignment: str | None, *, several: bool, vocab_alignment: str) -> None:
    """Refuse what does not go together with a teacher of another tokenizer.

    Args:
        alignment: None: the tokenizers are the same.
        several: there are several teachers.
        vocab_alignment: of the trainer.

    Raises:
        UserError: there is no such alignment, or it does not fit the others.
    """
    if alignment is None:
        return
    if alignment not in ALIGNMENTS:
        raise UserError(
            f"alignment: got {alignment!r}, expected None or one of {', '.join(ALIGNMENTS)}.{nearest(alignment, ALIGNMENTS)}"
        )
    if several:
        raise UserError(
            f"alignment: got {alignment!r} beside teachers; one teacher alone may have another tokenizer (teacher)"
        )
    if vocab_alignment != "strict":
        raise UserError(
            f"vocab_alignment: got {vocab_alignment!r} beside alignment {alignment!r}, which finds the common tokens "
            "itself; leave it out"
        )


def check_batches_align(of_user: Any, args: TrainingArguments) -> None:
    """Refuse batches that could not carry the teacher's side of rows.

    Raises:
        UserError: a collator of the user's makes them, or one process makes those of all.
    """
    if of_user is not None:
        raise UserError(
            "data_collator: got one beside alignment, whose teacher reads tokens that our own collators put into the batch; "
            "leave it out"
        )
    config: Any = args.accelerator_config
    if args.world_size > 1 and config.dispatch_batches:
        raise UserError(
            "args.accelerator_config: got dispatch_batches: True, expected None or False beside alignment: the pairs of a "
            "batch cannot be cut like its rows"
        )


def _loaded(
    teacher: AnyTeacher | Mapping[str, AnyTeacher],
    tokenizers: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None,
) -> list[_Given]:
    """Each teacher once, whatever names it has, and without what an earlier trainer has put around it."""
    asked = dict(teacher) if isinstance(teacher, Mapping) else {"": teacher}
    found: dict[object, _Given] = {}
    for name, one in asked.items():
        key: object = one if isinstance(one, str) else id(one)
        if isinstance(one, CachedTeacher) and one.live is None:
            key = one.cache.folder  # a cache is read once
        if key in found:
            found[key].names.append(name)
            continue
        where = f"teachers.{name}" if name else "teacher"
        tokenizer = tokenizers.get(name) if isinstance(tokenizers, Mapping) else tokenizers
        if not isinstance(tokenizer, (PreTrainedTokenizerBase, NoneType)):
            raise UserError(
                f"teacher_tokenizer: got {tokenizer!r}, expected a tokenizer, as AutoTokenizer.from_pretrained gives one"
            )
        if isinstance(one, type):
            raise UserError(
                f"{where}: got the class {one.__name__}, expected one that is made, as in {one.__name__}()"
            )
        if isinstance(one, str):
            tokenizer = tokenizer or load_tokenizer(one, key=where)
            loaded: nn.Module | Teacher | SelfTeacher | None = load_model(one, key=where, dtype=TEACHER_DTYPE)
        else:
            loaded = unwrapped(one) if isinstance(one, nn.Module) else one
        found[key] = _Given([name], loaded, tokenizer)
    return list(found.values())


def _facts_of(role: str, teacher: Teacher) -> dict[str, Any]:
    if (identity := identity_of_states(teacher)) is not None:
        states = "cached" if isinstance(teacher, CachedTeacher) else "remote"
        return {role: identity.model, f"{role}_dtype": identity.dtype, f"{role}_states": states}
    if isinstance(teacher, TeacherOfItself):
        return {
            role: "self",
            **{f"{role}_{name}": value for name, value in teacher.spec.facts.items() if name != "kind"},
        }
    if not isinstance(teacher, LiveTeacher):
        return {role: type(teacher).__name__}
    dtype = str(next(teacher.model.parameters()).dtype).removeprefix("torch.")
    return {**model_facts(role, teacher.model), f"{role}_dtype": dtype}


def identity_of_states(teacher: Teacher) -> TeacherIdentity | None:
    """What a teacher is whose states are cached, or come from a server; None: it is of another kind."""
    if isinstance(teacher, CachedTeacher):
        return teacher.cache.identity
    return teacher.description.identity if isinstance(teacher, RemoteTeacher) else None


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
