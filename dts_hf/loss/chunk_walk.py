"""One walk over the rows in chunks: logits, what ``RowLoss`` makes of them, gradients of states and head.

Shapes: ``N`` labelled rows, ``C`` rows of a chunk, ``H`` hidden, ``V`` vocabulary. ``_s`` is the student, ``_t`` the teacher
(each has its own H); r is ``kd_ratio``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dts_hf.loss import statistics as stats
from dts_hf.loss.compact_rows import CompactRows
from dts_hf.loss.plain_rows import PlainRows
from dts_hf.loss.row_loss import LossSettings, RowLoss, TeacherLogits, room_for_logits
from dts_hf.loss.sequence_gap import sequence_means, whole_sequences
from dts_hf.models.head import Head

#: ``torch.mm(..., out_dtype=...)``: younger than the oldest torch that the package takes.
_HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.addmm.overloads()


class ChunkWalk:
    """Loss, sums and gradients of N rows in one pass, C rows at a time; the gradients are formed in the forward pass.

    The flow:

    1. ``_chunks``: cut the N rows into chunks of C; whole sequences, where the policy needs the gap of a sequence.
    2. ``_logits``: raw logits h_s W_s^T and h_t W_t^T ``[C, V]``, each into one buffer that all chunks share.
    3. ``RowLoss.run``: scale and soft-cap, statistics, temperature, divergence, and the gradient g ``[C, V]`` of (1 - r) CE
       + r scale D with respect to the student's raw logits, written over those. In PyTorch (``plain_rows``, the reference;
       on a CPU in blocks that fit into its cache) or, on a GPU, as kernels (``fused_rows``).
    4. ``_accumulate``: dH = g W_s ``[C, H]``, dW += g^T h_s ``[V, H]``, db += g^T 1 ``[V]``.

    ``run`` does it and returns the loss ``[]``, divided by the normaliser; ``sums`` and ``gradients`` are there afterwards.

    **Cost.** Four matmuls with the vocabulary for each row: two logits, dH, dW (three where the head is frozen or there is
    no teacher). Nothing is computed again in the backward pass.

    **Memory.** Two ``[C, V]`` buffers and what the softmaxes and the divergence need beside them (nothing, with kernels),
    whatever N: C comes from ``logits_budget_mb``. g takes the place of the student's raw logits, so it needs no third
    buffer, unless they are fp32 and g is not.

    **Precision.** Matmuls run in the student's dtype (that of autocast, where it is on; the teacher's in that of its head),
    everything between them in fp32, the sum of dW over chunks too; all of it in fp64 where the student is fp64. With kernels
    the logits lie in memory as the matmul rounds them, unless ``fp32_logits``; without, they are copied to fp32, rounded
    all the same. On a GPU dW leaves the matmul in fp32 (``out_dtype``) and is added up inside it. The gradients are those
    of the *summed* loss: over thousands of labels the gradient of a mean would underflow in fp16 before the matmuls, so
    ``_FusedLoss`` divides them afterwards.

    **Sharded heads and wrappers.** The walk sees plain tensors: it runs inside the model's forward (``loss_in_head``),
    where DDP, ZeRO-3 and FSDP2 have gathered the student's head, and ``gather_head`` has gathered the teacher's; once for
    all chunks. What the wrappers do with gradients happens outside, in autograd's backward pass.

    Args:
        settings: of the loss.
        states: ``[N, H_s]``, the student's; N may be 0.
        head: the student's, weight ``[V, H_s]``.
        teacher_states: ``[N, H_t]``, or N compact rows, whose logits need no matmul; None: no teacher, and the student's
            logits stand for the teacher's (r must be 0).
        teacher_head: weight ``[V, H_t]``.
        targets: ``[N]`` int64.
        sequences: ``[N]`` int64, never falling; for policies with ``needs_sequence_gap``.
        normalizer: the loss is divided by it.
        needs: whether a gradient of (states, weight, bias) is needed.
    """

    def __init__(
        self,
        settings: LossSettings,
        *,
        states: Tensor,
        head: Head,
        teacher_states: Tensor | CompactRows | None,
        teacher_head: Head,
        targets: Tensor,
        sequences: Tensor | None,
        normalizer: float | Tensor,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.settings, self.targets = settings, targets
        self.states, self.head = states, head
        self.teacher_states, self.teacher_head = teacher_states, teacher_head
        self.sequences = sequences if settings.temperature.needs_sequence_gap else None
        self.need_states, self.need_weight, self.need_bias = needs
        (rows, width), vocab, device = states.shape, head.vocab_size, states.device

        self.matmul_dtype = matmul_dtype_of(head, device)  # here and not in ``run``, which switches autocast off
        self.math_dtype = torch.float64 if self.matmul_dtype == torch.float64 else torch.float32
        self.weight = head.weight.detach().to(self.matmul_dtype)  # [V, H_s] cast once, and not for every chunk

        student_dtype, teacher_dtype = self.math_dtype, self.math_dtype
        if settings.fused and not settings.fp32_logits:  # the kernels read what the matmuls write
            student_dtype, teacher_dtype = self.matmul_dtype, teacher_head.weight.dtype
        itemsize = max(student_dtype.itemsize, teacher_dtype.itemsize)
        self.chunk = rows_in_budget(settings.logits_budget_mb, vocab, itemsize)
        # Whole sequences make no equal chunks, and one that a smaller chunk would cut is computed twice
        equal = settings.fused and self.sequences is None
        self.chunk = equal_chunks(rows, self.chunk) if equal else min(self.chunk, max(rows, 1))
        # All chunks write into these: taken anew for each chunk, the last and the next one would be there together
        dtypes = [student_dtype, teacher_dtype] if isinstance(teacher_states, Tensor) else [student_dtype]
        apart = settings.fused and student_dtype != self.matmul_dtype  # g is for a matmul, which takes no fp32 logits
        dtypes += [self.matmul_dtype] if apart else []
        buffers = [
            room_for_logits(self.chunk, vocab, dtype, device, fused=settings.fused) for dtype in dtypes
        ]  # [C, V]
        self.buffers, self.grad_buffer = buffers, buffers[-1 if apart else 0]

        # Gradients of the summed loss. The first chunk makes dW; without a chunk it is zeros, and not None, so that every
        # rank has a gradient to reduce.
        self.d_states = torch.empty(rows, width, dtype=states.dtype, device=device) if self.need_states else None
        self.d_weight = torch.zeros_like(head.weight) if self.need_weight and not rows else None
        self.d_bias = torch.zeros(vocab, dtype=self.math_dtype, device=device) if self.need_bias else None
        self.inverse = 1.0 / torch.as_tensor(normalizer, dtype=self.math_dtype) if rows else 0.0
        self.rows = _rows_of(settings)(
            settings,
            head=head,
            teacher_head=teacher_head,
            has_teacher=teacher_states is not None,
            with_grad=any(needs),
            math_dtype=self.math_dtype,
            device=device,
        )

    @property
    def sums(self) -> dict[str, Tensor]:
        """Over all rows so far: ``rows``, and what ``RowLoss.sums`` has."""
        count = float(len(self.states))
        return {stats.ROWS: torch.full((), count, dtype=self.math_dtype, device=self.states.device)} | self.rows.sums

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the summed loss, with respect to states ``[N, H_s]``, weight ``[V, H_s]`` and bias ``[V]``."""
        return self.d_states, self.d_weight, self.d_bias

    def run(self) -> Tensor:
        """Walk all chunks, once and without autograd; returns the loss ``[]``."""
        # The dtype of every operation was chosen in __init__; autocast must not choose again
        with torch.autocast(self.states.device.type, enabled=False):
            if len(self.states) == 0:
                self.rows.observe_nothing(self.states.device)
            for parts in self._chunks():
                # Of a sequence longer than a chunk the gap comes first; its logits are then computed a second time
                whole_gap = self._gap_of(parts) if len(parts) > 1 else None
                for span in parts:
                    self._process(span, whole_gap)
        r, sums = self.settings.kd_ratio, self.rows.sums
        total = (1.0 - r) * sums[stats.CE.sum] + r * sums[stats.KD.sum]
        # Without a row the normaliser may be 0 too. The zero still hangs in the graph: a rank without labels must take
        # part in the backward pass, or the others wait for its gradients for ever.
        return total * self.inverse if len(self.states) else total

    def _process(self, span: slice, whole_gap: Tensor | None) -> None:
        """Steps 2 to 4 for one chunk. ``whole_gap`` ``[]``: the chunk is part of one sequence, of that gap."""
        student, teacher, hidden = self._logits(span)  # [C, V], [C, V], [C, H_s]
        targets = self._targets(span, teacher)  # [C]
        gaps = self._gaps(span, student, teacher, targets, whole_gap)  # [C], where the policy needs them
        grad = self.grad_buffer[: len(student)]
        self.rows.run(student, teacher, targets, gaps, grad)
        if self.rows.with_grad:
            self._accumulate(grad, hidden, span)

    # ------------------------------------------------------------------------------------------- 1 and 2: chunks, logits

    def _chunks(self) -> Iterator[list[slice]]:
        """Step 1: the rows of each chunk; several slices are the parts of one sequence (see ``whole_sequences``)."""
        if self.sequences is not None:
            yield from whole_sequences(self.sequences, self.chunk)
            return
        rows = len(self.states)
        for start in range(0, rows, self.chunk):
            yield [slice(start, min(start + self.chunk, rows))]

    def _logits(self, span: slice) -> tuple[Tensor, TeacherLogits, Tensor]:
        """Step 2: raw logits ``[C, V]`` of student and teacher, and the student's states ``[C, H]`` as the matmul read them.

        They stand in the shared buffers, so the next call overwrites them.
        """
        hidden = self.states[span].detach().to(self.matmul_dtype)
        student = _raw_logits(hidden, self.weight, self.head.bias, self.buffers[0])
        if self.teacher_states is None:
            return student, student, hidden
        if isinstance(self.teacher_states, CompactRows):
            return student, self.teacher_states[span].to(self.math_dtype), hidden
        teacher_weight = self.teacher_head.weight.detach()
        teacher_hidden = self.teacher_states[span].to(teacher_weight.dtype)
        teacher = _raw_logits(teacher_hidden, teacher_weight, self.teacher_head.bias, self.buffers[1])
        return student, teacher, hidden

    def _targets(self, span: slice, teacher: TeacherLogits) -> Tensor:
        """The labels ``[C]``: those of the text, or the teacher's first choices, one more pass over its ``[C, V]``.

        Neither the scale of a head nor its soft-cap changes which logit is the largest.
        """
        if not self.settings.pseudo_labels:
            return self.targets[span]
        return teacher.first_choice if isinstance(teacher, CompactRows) else teacher.argmax(-1)

    def _gaps(
        self, span: slice, student: Tensor, teacher: TeacherLogits, targets: Tensor, whole_gap: Tensor | None
    ) -> Tensor | None:
        """The gap ``[C]`` of each row's sequence, from raw logits ``[C, V]``; None for policies that do not need it."""
        if self.sequences is None:
            return None
        if whole_gap is not None:
            return whole_gap.repeat(len(student))
        return sequence_means(self.rows.gaps(student, teacher, targets), self.sequences[span])

    def _gap_of(self, parts: list[slice]) -> Tensor:
        """The gap ``[]`` of one sequence that is cut into ``parts``."""
        gaps = []
        for part in parts:
            student, teacher, _ = self._logits(part)
            gaps.append(self.rows.gaps(student, teacher, self._targets(part, teacher)))
        return torch.cat(gaps).mean()

    # ---------------------------------------------------------------------------------------------------- 4: gradients

    def _accumulate(self, grad_logits: Tensor, hidden: Tensor, span: slice) -> None:
        """Step 4: from g ``[C, V]`` and states ``[C, H]`` of one chunk to dH ``[C, H]``, dW ``[V, H]`` and db ``[V]``."""
        grad = grad_logits.to(self.matmul_dtype)
        if self.d_states is not None:
            self.d_states[span] = grad @ self.weight
        if self.need_weight:
            self.d_weight = _add_product(self.d_weight, grad.t(), hidden, self.math_dtype)
        if self.d_bias is not None:
            self.d_bias += grad_logits.sum(0, dtype=self.math_dtype)


def _rows_of(settings: LossSettings) -> type[RowLoss]:
    """The road of the rows. The kernels are imported by those who use them: Triton does not come with torch for a CPU."""
    if not settings.fused:
        return PlainRows
    from dts_hf.loss.fused_rows import FusedRows

    return FusedRows


def matmul_dtype_of(head: Head, device: torch.device) -> torch.dtype:
    """The dtype in which the student's states and head meet: that of autocast, where it is on, else the head's."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return head.weight.dtype


def rows_in_budget(logits_budget_mb: float, vocab_size: int, itemsize: int) -> int:
    """C: how many rows of student and teacher logits fit into the budget (MiB); at least one."""
    return max(1, int(logits_budget_mb * 2**20) // (2 * itemsize * max(vocab_size, 1)))


def equal_chunks(rows: int, limit: int) -> int:
    """C for so many rows: as few equal chunks as ``limit`` allows, or one more where that makes C a multiple of 128.

    Matmuls work in tiles of 128 rows, and a chunk more drags the whole of dW through memory once more.
    """
    if rows <= limit:
        return max(rows, 1)
    fewest = -(-rows // limit)
    for count in (fewest, fewest + 1):
        rounded = -(-rows // (128 * count)) * 128
        if rounded <= limit:
            return rounded
    return -(-rows // fewest)


def _raw_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Write hidden ``[C, H]`` x weight ``[V, H]`` into the first C rows of ``buffer``, bias added there."""
    logits = buffer[: hidden.shape[0]]
    if hidden.dtype == logits.dtype:
        if bias is not None and logits.device.type == "cuda":  # inside the matmul, before it rounds
            return torch.addmm(bias.detach().to(hidden.dtype), hidden, weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
    elif _writes_fp32(hidden, logits.dtype):
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=logits)
    else:
        logits.copy_(hidden @ weight.t())
    return logits if bias is None else logits.add_(bias.detach())


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Return total + a b, ``[V, H]`` from ``[V, C]`` and ``[C, H]``, the sum in ``wide``; in place where it can be."""
    if _writes_fp32(a, wide):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if total is None:  # of a single chunk nothing is added up: it stays in the matmul's dtype
        return a @ b
    if a.dtype == wide:
        return total.addmm_(a, b)
    return total.to(wide).add_(a @ b)  # a low-precision matmul, but the sum over chunks in fp32


def _writes_fp32(factor: Tensor, wide: torch.dtype) -> bool:
    """Whether a matmul of low-precision factors can leave its fp32 sums as they are: on a GPU, by a torch that has it."""
    low = factor.dtype in (torch.bfloat16, torch.float16)
    return _HAS_OUT_DTYPE and wide == torch.float32 and low and factor.device.type == "cuda"
