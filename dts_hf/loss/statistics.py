"""Every number that the loss puts into the log, in one table: what it is made of, how it is reduced, what it is called.

The road of a number: ``ChunkWalk`` adds it up over rows (``LossOutput.sums``), ``SumMeter`` over micro-batches and ranks,
``MeanLog`` over the optimizer steps between two log lines, and ``LogColumns`` makes the logged number of it. Whoever reads
one further on takes its name from here. A change of a name is a change of ``log.jsonl``, which other programs read.

No torch: reports are written without it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

#: ``sum``: added over rows, micro-batches, ranks and steps, and divided by ``ROWS`` at the end; the others: the extreme.
Reduction = Literal["sum", "min", "max"]
#: What is over nothing, and so stands where nothing was seen yet.
START: dict[Reduction, float] = {"sum": 0.0, "min": math.inf, "max": -math.inf}
#: The sum that the others are divided by: labelled rows.
ROWS = "rows"
#: Where the teacher has another tokenizer: labels that are the same for it, which alone have a soft loss, and bytes of the
#: answers that both sides cover. Then some statistics are means over these and not over all labels (``Statistic.over``).
ALIGNED, BYTES = "aligned", "answer_bytes"
#: Sums for the policy and not for the log: d kd / d T (policies with ``learns``), and ``Temperatures.observed`` ``[K]``.
TEMPERATURE_GRAD, OBSERVED = "temperature_grad", "observed"
#: Before the names of what a policy wants logged (``TemperaturePolicy.log_values``), while they are summed up.
OF_POLICY = "policy_"
#: Before the names of sums over labels that are text of the student's own (``on_policy``); ``ROWS`` counts both kinds.
OF_GENERATED = "generated_"
#: Of such text, by row and not by label: rows that could be answered, rows that were, and sums over the latter.
TEXTS, GENERATED_TEXTS = "texts", "generated_texts"
#: Rows that the student has answered in an earlier step (``on_policy.replay``).
REPLAYED_TEXTS = "replayed_texts"
#: How many bins of confidence a calibration error has, equally wide, from 0 to 1.
CONFIDENCE_BINS = 15
#: Between the name of a number and that of the teacher whose rows it is about, where there are several: ``kd_loss/math``.
OF_TEACHER = "/"


@dataclass(frozen=True)
class Statistic:
    """One number of a log line.

    Attributes:
        log: its name in ``log.jsonl``.
        unit: nats (natural logarithms), a share, ...
        meaning: a few words, for the page of the log.
        sums: what it is made of: names in ``LossOutput.sums``. One, except for a number derived from several; where it is
            called as in the log, it need not be given.
        reduction: of its sums.
        of: makes the logged number of the reduced ones (means over rows, or extremes).
        needs_teacher: without a teacher it says nothing, and is not logged.
        held_out: whether held-out lines have it; what describes the temperature says nothing at T = 1.
        regression: its name where the task is a regression and its sum holds squared errors; empty: not logged there.
        of_loss: whether the loss fills its sums, in every call; else somebody else may.
        over: the sum that its own sums are divided by where there is one of that name; otherwise ``ROWS``.
    """

    log: str
    unit: str
    meaning: str
    sums: tuple[str, ...] = ()
    reduction: Reduction = "sum"
    of: Callable[..., float] = float
    needs_teacher: bool = True
    held_out: bool = True
    regression: str = ""
    of_loss: bool = True
    over: str = ROWS

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums", self.sums or (self.log,))  # frozen

    @property
    def sum(self) -> str:
        """The one sum it is made of."""
        (name,) = self.sums
        return name

    def number(self, totals: Mapping[str, float]) -> float:
        """The number that is logged, from reduced sums; NaN where there was no row."""
        rows = totals.get(self.over, totals[ROWS]) or math.nan
        summed = self.reduction == "sum"
        return self.of(*(totals[name] / rows if summed else totals[name] for name in self.sums))

    @property
    def held_out_log(self) -> str:
        """Its name in a held-out line of ``log.jsonl``."""
        return f"eval_{self.log}"


CE = Statistic(
    "ce_loss", "nats per label", "the student's cross-entropy of the labels",
    sums=("ce",), needs_teacher=False, regression="label_mse",
)  # fmt: skip
KD = Statistic(
    "kd_loss", "nats per label",
    "the soft loss: the divergence at the temperatures in force, its factor (T_s T_t) included",
    sums=("kd",), regression="kd_loss",
)  # fmt: skip
TEACHER_CE = Statistic(
    "teacher_ce", "nats per label", "the teacher's cross-entropy of the labels", regression="teacher_mse"
)
GAP = Statistic(
    "gap", "nats per label", "`ce_loss` - `teacher_ce`; positive while the student is the worse one",
    sums=(*CE.sums, *TEACHER_CE.sums), of=operator.sub,
)  # fmt: skip
KL = Statistic(
    "kl", "nats per label", "forward KL from the teacher at T = 1, whatever divergence is trained with", over=ALIGNED
)
STUDENT_ENTROPY = Statistic("student_entropy", "nats", "entropy of the student at T = 1", needs_teacher=False)
TEACHER_ENTROPY = Statistic("teacher_entropy", "nats", "entropy of the teacher at T = 1", over=ALIGNED)
STUDENT_ENTROPY_AT_T = Statistic(
    "student_entropy_at_t", "nats", "entropy of the student at T_s", held_out=False, over=ALIGNED
)
TEACHER_ENTROPY_AT_T = Statistic(
    "teacher_entropy_at_t", "nats", "entropy at T_t of the teacher, or of the mixed target where the policy has one",
    held_out=False, over=ALIGNED,
)  # fmt: skip
EFFECTIVE_SUPPORT = Statistic(
    "effective_support", "tokens", "exp of `teacher_entropy_at_t`: how many tokens the teacher really offers",
    sums=TEACHER_ENTROPY_AT_T.sums, of=math.exp, held_out=False, over=ALIGNED,
)  # fmt: skip
TOP1_AGREEMENT = Statistic(
    "top1_agreement", "share of labels", "the student's first choice is the teacher's", over=ALIGNED
)
TEMPERATURE = Statistic("temperature", "T", "mean of T_s over rows", held_out=False, over=ALIGNED)
TEACHER_TEMPERATURE = Statistic("teacher_temperature", "T", "mean of T_t over rows", held_out=False, over=ALIGNED)
TEMPERATURE_MIN = Statistic("temperature_min", "T", "the smallest T_s of a row", reduction="min", held_out=False)
TEMPERATURE_MAX = Statistic("temperature_max", "T", "the largest T_s of a row", reduction="max", held_out=False)
REVERSE_KL = Statistic(
    "reverse_kl", "nats per label", "reverse KL, of the student from the teacher, at T = 1; of held-out lines alone",
    of_loss=False, over=ALIGNED,
)  # fmt: skip
CALIBRATION_ERROR = Statistic(
    "ece", "share", "expected calibration error of the student at T = 1: how far the probability of its first choice is "
    "from how often that is the label, in 15 bins (Guo et al. 2017); of held-out lines alone",
    sums=("miscalibration",), needs_teacher=False, of_loss=False,
)  # fmt: skip
TEACHER_CALIBRATION_ERROR = Statistic(
    "teacher_ece", "share", "the same of the teacher", sums=("teacher_miscalibration",), of_loss=False
)
AUX = Statistic(
    "aux_loss", "per label", "auxiliary loss of a mixture of experts' routers, without its coefficient",
    sums=("aux",), needs_teacher=False, held_out=False, of_loss=False,
)  # fmt: skip
ALIGNED_SHARE = Statistic(
    "aligned_share", "share of labels", "those that are the same for a teacher with another tokenizer, and have a `kd_loss`",
    sums=(ALIGNED,), of_loss=False,
)  # fmt: skip
COMMON_MASS = Statistic(
    "common_mass", "share", "of the student's probability on tokens that both vocabularies have, at aligned labels",
    of_loss=False, over=ALIGNED,
)  # fmt: skip
TEACHER_COMMON_MASS = Statistic(
    "teacher_common_mass", "share", "the same of the teacher's probability", of_loss=False, over=ALIGNED
)
CE_PER_BYTE = Statistic(
    "ce_per_byte", "nats per byte", "the student's cross-entropy of answers, where the teacher has another tokenizer",
    sums=("covered_ce",), of_loss=False, over=BYTES,
)  # fmt: skip
TEACHER_CE_PER_BYTE = Statistic(
    "teacher_ce_per_byte", "nats per byte", "the teacher's of the same bytes", sums=("covered_teacher_ce",),
    of_loss=False, over=BYTES,
)  # fmt: skip
KD_TEACHER_SPACE = Statistic(
    "kd_teacher_space", "nats per label",
    "with `teacher.alignment: dual_space`, the part of `kd_loss` in the teacher's space; the rest is in the student's",
    of_loss=False,
)  # fmt: skip
PROJECTOR_CE = Statistic(
    "projector_ce", "nats per label",
    "with `teacher.alignment: dual_space`, the cross-entropy of the teacher behind the map into the student's space",
    of_loss=False, over=ALIGNED,
)  # fmt: skip


def _of_generated(statistic: Statistic) -> Statistic:
    """The same of the labels that are text of the student's own."""
    return replace(
        statistic, log=f"{OF_GENERATED}{statistic.log}", meaning=f"`{statistic.log}` on text of the student's own",
        sums=tuple(f"{OF_GENERATED}{name}" for name in statistic.sums), over=f"{OF_GENERATED}{ROWS}", held_out=False,
        regression="", of_loss=False,
    )  # fmt: skip


def _of_texts(log: str, unit: str, meaning: str, over: str = GENERATED_TEXTS) -> Statistic:
    return Statistic(
        f"{OF_GENERATED}{log}", unit, meaning, needs_teacher=False, held_out=False, of_loss=False, over=over
    )


#: What is measured on labels that the data has: text of the student's own counts in columns of its own.
OF_LABELS = (CE, TEACHER_CE, GAP)
#: The same on text of the student's own.
GENERATED_CE = _of_generated(CE)
GENERATED_LABELS = (GENERATED_CE, *(_of_generated(statistic) for statistic in (KD, TEACHER_CE, GAP, KL)))
#: The columns of these are of both kinds; a line that has both also has the data's part, by this prefix.
OF_BOTH, OF_DATA = (KD, KL), "data_"
GENERATED_SHARE = replace(
    _of_texts("share", "share of rows", "rows that the student has answered itself", TEXTS), sums=(GENERATED_TEXTS,)
)
REPLAYED_SHARE = replace(
    GENERATED_SHARE,
    log="replayed_share",
    meaning="rows that it has answered in an earlier step",
    sums=(REPLAYED_TEXTS,),
)
GENERATED_LENGTH = _of_texts("length", "tokens", "mean length of its answers, their end included")
GENERATED_TRUNCATED = _of_texts("truncated", "share of answers", "ran into `max_new_tokens`, and have no end")
GENERATED_ENDED = _of_texts("ended", "share of answers", "came to an end of turn")
GENERATED_REPETITION = _of_texts("repetition", "share of 4-grams", "mean share that an answer has said before")

#: In the order of a log line.
STATISTICS = (
    CE, KD, TEACHER_CE, GAP, KL, STUDENT_ENTROPY, TEACHER_ENTROPY, STUDENT_ENTROPY_AT_T, TEACHER_ENTROPY_AT_T,
    EFFECTIVE_SUPPORT, TOP1_AGREEMENT, REVERSE_KL, CALIBRATION_ERROR, TEACHER_CALIBRATION_ERROR, TEMPERATURE,
    TEACHER_TEMPERATURE, TEMPERATURE_MIN, TEMPERATURE_MAX, AUX,
    *GENERATED_LABELS, GENERATED_SHARE, REPLAYED_SHARE, GENERATED_LENGTH, GENERATED_TRUNCATED, GENERATED_ENDED,
    GENERATED_REPETITION, ALIGNED_SHARE, COMMON_MASS, TEACHER_COMMON_MASS, CE_PER_BYTE, TEACHER_CE_PER_BYTE,
    KD_TEACHER_SPACE, PROJECTOR_CE,
)  # fmt: skip
#: What the loss measures of held-out rows alone: training pays nothing for it.
OF_HELD_OUT = (REVERSE_KL, CALIBRATION_ERROR, TEACHER_CALIBRATION_ERROR)
#: Sums in bins of confidence, ``[CONFIDENCE_BINS]``: probability of the first choice minus whether it is the label. Once
#: all rows of all ranks are in them, their magnitudes are added up.
IN_BINS = tuple(statistic.sum for statistic in OF_HELD_OUT[1:])
#: What is also logged of the rows of each of several teachers.
BY_TEACHER = (CE, KD, TEACHER_CE, TEACHER_ENTROPY, TEMPERATURE)
#: And in held-out lines.
HELD_OUT_BY_TEACHER = (TEACHER_CALIBRATION_ERROR,)
#: Also summed up for each of them: what its policy is told, where each has its own.
SUMS_BY_TEACHER = (
    ROWS, *(statistic.sum for statistic in (*BY_TEACHER, *HELD_OUT_BY_TEACHER)), TEMPERATURE_GRAD, OBSERVED
)  # fmt: skip
#: How many labels of a teacher a line of the log is about.
LABELS = "labels"
#: The sums that every call of the loss fills, beside ``ROWS``.
SUMS_OF_LOSS: dict[str, Reduction] = {
    name: statistic.reduction for statistic in STATISTICS if statistic.of_loss for name in statistic.sums
}


def reduction_of(name: str) -> Reduction:
    """How the sum ``name`` is reduced. One that the table does not have (tokens, a policy's own number) is added up."""
    return SUMS_OF_LOSS.get(name, "sum")
