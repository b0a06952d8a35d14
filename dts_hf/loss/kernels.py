"""The elementwise work of the loss as Triton kernels: statistics, sums of the divergence, gradient. They compute in fp32.

Only ``fused_rows`` imports this file, and only where the kernels run: on a GPU, or on a CPU under ``TRITON_INTERPRET=1`` for
tests. Everything here has its twin in PyTorch, which is the reference (``plain_rows`` and ``divergences/``).

Each kernel reads both models' raw logits ``[C, V]`` once, and keeps what it needs of a row in registers:

1. ``statistics_kernel``: one program a row; log-sum-exps, cross-entropies, entropies, KL, at T = 1, at T, or at both.
2. ``divergence_kernel``: one program a row; sums of a divergence that is no linear function of p or of q alone (a mixture,
   a power), for which the normalisers have to be known first.
3. ``gradient_kernel``: a grid over rows and columns; writes g over the student's logits.

**A divergence** is one function of single entries, ``terms(p, q, log p, log q, a, b, k, at_target)``. It returns three
numbers: its part v of the value; e = d value / d log q; and h = d value / d log p, which only a temperature that learns
asks for. Value and gradient follow for all of them alike: D = sum v, and d D / d u_j = e_j - q_j sum e. Multiples of q in
e, and of p in h, change nothing, so they are chosen such that little cancels. ``a`` and ``b`` are its options, ``k`` a
number of the row.

**Parameters** of all kernels. ``student`` and ``teacher``: raw logits ``[C, V]``, rows ``stride_s`` and ``stride_t`` entries
apart. ``targets``: ``[C]``. ``t_s``, ``t_t``: temperatures, ``stride_t_s`` and ``stride_t_t`` apart (0: one for all).
``share``: the teacher's in a mixed target. ``scale_*``, ``cap_*``: of each head, capped where CAPPED_* says so. ``a``,
``b``: options of the divergence TERMS. What is written in capitals is fixed when the kernel is compiled.

**Layout.** A tile is ``[THREADS, INNER]`` with INNER entries side by side, 16 bytes: what a thread loads at once. Sums over
axis 1 stay inside a thread, so a running maximum costs one rescaling for INNER entries and no word between threads until
the row ends. Rows may begin anywhere (V odd), and then loads are narrower.

**Numbers.** Probabilities are made of logits minus the row's largest, so that neither the offset of a model's logits (GPT-2
has -100) nor their size costs digits. Exponentials are powers of two. Entries behind V count as ``LOW``, which is finite:
minus infinity would be NaN in a product with 0.

Shapes: ``C`` rows of a chunk, ``V`` vocabulary. Tables of rows are ``[K, C]`` fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOW = tl.constexpr(-1.0e20)
TINY = tl.constexpr(1.1754943508222875e-38)

#: How many rows there are, and where their numbers begin, is another matter in every chunk, and of no use to the compiler:
#: unless told, Triton would compile again for a C that is 1, and one that 16 divides.
_COUNT, _OF_ROWS = ["C"], ["targets", "t_s", "t_t", "share"]


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


# ----------------------------------------------------------------------------------------------------------- divergences


@triton.jit
def forward_kl(p, q, lp, lq, a, b, k, at_target):
    """KL(p || q)."""
    return p * (lp - lq), q - p, p * (lp - lq)


@triton.jit
def reverse_kl(p, q, lp, lq, a, b, k, at_target):
    """KL(q || p)."""
    return q * (lq - lp), q * (lq - lp), p - q


@triton.jit
def symmetric_kl(p, q, lp, lq, a, b, k, at_target):
    """(1 - a) KL(p || q) + a KL(q || p)."""
    ratio = lp - lq
    v = (1.0 - a) * p * ratio - a * q * ratio
    return v, (1.0 - a) * (q - p) - a * q * ratio, (1.0 - a) * p * ratio + a * (p - q)


@triton.jit
def jsd(p, q, lp, lq, a, b, k, at_target):
    """Generalised Jensen-Shannon, a the teacher's weight."""
    log_m = tl.log(a * p + (1.0 - a) * q + TINY)
    of_p, of_q = a * p * (lp - log_m), (1.0 - a) * q * (lq - log_m)
    return of_p + of_q, of_q, of_p


@triton.jit
def skew_kl(p, q, lp, lq, a, b, k, at_target):
    """KL(p || a p + (1 - a) q), a above 0."""
    m = a * p + (1.0 - a) * q + TINY
    v = p * (lp - tl.log(m))
    return v, (a - 1.0) * (q / m) * p, v - a * (p / m) * p


@triton.jit
def skew_reverse_kl(p, q, lp, lq, a, b, k, at_target):
    """KL(q || (1 - a) p + a q), a above 0."""
    m = (1.0 - a) * p + a * q + TINY
    v = q * (lq - tl.log(m))
    return v, v - a * (q / m) * q, (a - 1.0) * (p / m) * q


@triton.jit
def tvd(p, q, lp, lq, a, b, k, at_target):
    """Total variation; sign(0) = 0 is the middle of the kink."""
    sign = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return sign * (q - p), sign * q, -sign * p


@triton.jit
def alpha_beta(p, q, lp, lq, a, b, k, at_target):
    """The alpha-beta family, both exponents above 0; p^a q^b by way of q^(a + b), so that p = q gives 0 exactly."""
    student = tl.exp2((a + b) * lq * LOG2E)
    cross = tl.exp2(((a + b) * lq + a * (lp - lq)) * LOG2E)
    teacher = tl.exp2(((a + b) * lq + (a + b) * (lp - lq)) * LOG2E)
    v = (a * (teacher - cross) + b * (student - cross)) / ((a + b) * a * b)
    return v, (student - cross) / a, (teacher - cross) / b


@triton.jit
def alpha_beta_at_alpha_zero(p, q, lp, lq, a, b, k, at_target):
    """Its limit for a = 0."""
    student = tl.exp2(b * lq * LOG2E)
    teacher = tl.exp2((b * lq + b * (lp - lq)) * LOG2E)
    e = student * (lq - lp)
    return e / b + (teacher - student) / (b * b), e, (teacher - student) / b


@triton.jit
def alpha_beta_at_beta_zero(p, q, lp, lq, a, b, k, at_target):
    """Its limit for b = 0."""
    student = tl.exp2(a * lq * LOG2E)
    teacher = tl.exp2((a * lq + a * (lp - lq)) * LOG2E)
    h = teacher * (lp - lq)
    return h / a + (student - teacher) / (a * a), (student - teacher) / a, h


@triton.jit
def alpha_beta_at_zero(p, q, lp, lq, a, b, k, at_target):
    """Its limit for a = b = 0."""
    return 0.5 * (lp - lq) * (lp - lq), lq - lp, lp - lq


@triton.jit
def todi(p, q, lp, lq, a, b, k, at_target):
    """ToDi; e with the weights held constant: q^2 / (p + q) as q (q / (p + q)), because q^2 underflows."""
    e = q - p - 0.5 * q * (q / (0.5 * (p + q) + TINY)) * (lp - lq)
    return (q - p) * (lq - lp), e, p * (lp - lq) + (p - q)


@triton.jit
def todi_as_reported(p, q, lp, lq, a, b, k, at_target):
    """ToDi with the derivative of its value, nothing held: what a temperature that learns follows."""
    return (q - p) * (lq - lp), q * (lq - lp) + (q - p), p * (lp - lq) + (p - q)


@triton.jit
def csd_by_teacher(p, q, lp, lq, a, b, k, at_target):
    """Variance of d = u - u_t under p; k = KL(p || q), so that log q - log p + k is d minus its mean."""
    d = lq - lp + k
    return p * d * d, 2.0 * p * d, p * d * (d - 2.0)


@triton.jit
def csd_by_student(p, q, lp, lq, a, b, k, at_target):
    """The same under q, which is held constant; k = -KL(q || p)."""
    d = lq - lp + k
    return q * d * d, 2.0 * q * d, -2.0 * q * d


@triton.jit
def csd_by_student_as_reported(p, q, lp, lq, a, b, k, at_target):
    """The same with q moving, too: what a temperature that learns follows."""
    d = lq - lp + k
    return q * d * d, q * d * (d + 2.0), -2.0 * q * d


@triton.jit
def eopd(p, q, lp, lq, a, b, k, at_target):
    """KL(q || p), and a KL(p || q) where k is 1: beside it (b = 0), or in its place (b = 1)."""
    ratio = lp - lq
    forward, reverse = a * k, 1.0 - b * k
    v = forward * p * ratio - reverse * q * ratio
    return v, forward * (q - p) - reverse * q * ratio, forward * p * ratio + reverse * (p - q)


@triton.jit
def logit_mse(p, q, lp, lq, a, b, k, at_target):
    """Squared error of centred logits, a = 1 / V: log q - log p + k is u - u_t minus its mean."""
    d = lq - lp + k
    return a * d * d, 2.0 * a * d, -2.0 * a * d


@triton.jit
def dkd(p, q, lp, lq, a, b, k, at_target):
    """The gradient of DKD from p and q without the label, b its beta, k = beta - alpha (q_y - p_y); its value is known."""
    e = tl.where(at_target, b - k, q * k - b * p)
    return 0.0 * e, e, 0.0 * e


@triton.jit
def overlap(p, q, lp, lq, a, b, k, at_target):
    """sqrt(p q), whose sum is the Bhattacharyya coefficient: no divergence, but a statistic that ``adakd`` asks for."""
    v = tl.exp2(0.5 * (lp + lq) * LOG2E)
    return v, v, v


# -------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def _tanh(x):
    """The hyperbolic tangent from one exponential; its series where that would cancel (libdevice has no interpreter)."""
    square = x * x
    far = 1.0 - 2.0 / (_exp(2.0 * x) + 1.0)
    near = x * (1.0 + square * (-0.3333333333 + square * (0.1333333333 - 0.0539682540 * square)))
    return tl.where(square < 0.04, near, far)


@triton.jit
def _activate(raw, scale, cap, CAPPED: tl.constexpr):
    """What the head does to its raw logits: ``Head.activate``."""
    z = raw.to(tl.float32) * scale
    if CAPPED:
        z = cap * _tanh(z / cap)
    return z


@triton.jit
def _at_target(logits, target, V, scale, cap, CAPPED: tl.constexpr):
    """The label's logit; NaN where the label is no entry, so that a wrong label cannot pass for a right one."""
    inside = (target >= 0) & (target < V)
    return _activate(tl.load(logits + target, mask=inside, other=float("nan")), scale, cap, CAPPED)


@triton.jit
def _logits(raw, offsets, V, scale, cap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Activated logits; ``LOW`` behind the end."""
    if MASKED:
        inside = offsets < V
        return tl.where(inside, _activate(tl.load(raw + offsets, mask=inside, other=0.0), scale, cap, CAPPED), LOW)
    else:
        return _activate(tl.load(raw + offsets), scale, cap, CAPPED)


@triton.jit
def _mixed(z_s, z_t, pivot_s, pivot_t, share):
    """The logits of a mixed target (TAID): the student's, exactly, where both agree; the label's is the student's."""
    return z_s + share * ((z_t - pivot_t) - (z_s - pivot_s))


@triton.jit
def _moments(x, inside, count, mean, square, MASKED: tl.constexpr, INNER: tl.constexpr):
    """Chan's update of each thread's mean and sum of squares by INNER entries."""
    if MASKED:
        there = inside.to(tl.float32)
        n = tl.sum(there, 1)
        x = tl.where(inside, x, 0.0)
        new = tl.sum(x, 1) / tl.maximum(n, 1.0)
        apart = (x - new[:, None]) * there
    else:
        n = tl.zeros_like(count) + INNER
        new = tl.sum(x, 1) * (1.0 / INNER)
        apart = x - new[:, None]
    share = n / tl.maximum(count + n, 1.0)
    delta = new - mean
    return mean + delta * share, square + tl.sum(apart * apart, 1) + delta * delta * count * share


@triton.jit
def _write_moments(out, C, V, count, mean_s, mean_t, square_s, square_t):
    """Join the threads' means and sums of squares, and write those of the row."""
    whole_s, whole_t = tl.sum(count * mean_s, 0) / V, tl.sum(count * mean_t, 0) / V
    off_s, off_t = mean_s - whole_s, mean_t - whole_t
    tl.store(out, whole_s)
    tl.store(out + C, whole_t)
    tl.store(out + 2 * C, tl.sum(square_s + count * off_s * off_s, 0))
    tl.store(out + 3 * C, tl.sum(square_t + count * off_t * off_t, 0))


# ----------------------------------------------------------------------------------------------------------- statistics


@triton.jit
def _add_at_one(z_s, z_t, top_s, top_t, sum_s, sum_t, dot_s, dot_t, cross):
    """Bring each thread's maxima and sums at T = 1 up to date; returns them, and by how much the maxima rose (<= 0)."""
    higher_s, higher_t = tl.maximum(top_s, tl.max(z_s, 1)), tl.maximum(top_t, tl.max(z_t, 1))
    fell_s, fell_t = top_s - higher_s, top_t - higher_t
    d_s, d_t = z_s - higher_s[:, None], z_t - higher_t[:, None]
    e_s, e_t = _exp(d_s), _exp(d_t)
    shrink_s, shrink_t = _exp(fell_s), _exp(fell_t)
    cross = (cross + sum_t * (fell_t - fell_s)) * shrink_t + tl.sum(e_t * (d_t - d_s), 1)
    dot_s = (dot_s + sum_s * fell_s) * shrink_s + tl.sum(e_s * d_s, 1)
    dot_t = (dot_t + sum_t * fell_t) * shrink_t + tl.sum(e_t * d_t, 1)
    sum_s = sum_s * shrink_s + tl.sum(e_s, 1)
    sum_t = sum_t * shrink_t + tl.sum(e_t, 1)
    return higher_s, higher_t, sum_s, sum_t, dot_s, dot_t, cross, fell_s, fell_t


@triton.jit
def _add_at_t(
    y_s, y_t, peak_s, peak_t, rose_s, rose_t, inverse_s, inverse_t,
    sum_s, sum_t, dot_s, dot_t, forward, reverse, RUNNING: tl.constexpr,
):  # fmt: skip
    """Bring each thread's sums at T up to date. RUNNING: the maxima ``peak`` have just moved by ``rose`` (<= 0)."""
    if RUNNING:
        drop_s, drop_t = rose_s * inverse_s, rose_t * inverse_t
        fade_s, fade_t = _exp(drop_s), _exp(drop_t)
        forward = (forward + sum_t * (drop_t - drop_s)) * fade_t
        reverse = (reverse + sum_s * (drop_s - drop_t)) * fade_s
        dot_s, dot_t = (dot_s + sum_s * drop_s) * fade_s, (dot_t + sum_t * drop_t) * fade_t
        sum_s, sum_t = sum_s * fade_s, sum_t * fade_t
    v_s, v_t = (y_s - peak_s[:, None]) * inverse_s, (y_t - peak_t[:, None]) * inverse_t
    w_s, w_t = _exp(v_s), _exp(v_t)
    apart = v_t - v_s
    sum_s += tl.sum(w_s, 1)
    sum_t += tl.sum(w_t, 1)
    dot_s += tl.sum(w_s * v_s, 1)
    dot_t += tl.sum(w_t * v_t, 1)
    forward += tl.sum(w_t * apart, 1)
    reverse -= tl.sum(w_s * apart, 1)
    return sum_s, sum_t, dot_s, dot_t, forward, reverse


@triton.jit
def _write_at_one(
    out, C, top_s, top_t, sum_s, sum_t, dot_s, dot_t, cross, agreement, pivot_s, pivot_t, peak_s, peak_t
):
    """Join the threads' sums at T = 1, and write the row's numbers; see ``fused_rows.One``."""
    all_s, all_t = tl.max(top_s, 0), tl.max(top_t, 0)
    fell_s, fell_t = top_s - all_s, top_t - all_t
    shrink_s, shrink_t = _exp(fell_s), _exp(fell_t)
    total_s, total_t = tl.sum(sum_s * shrink_s, 0), tl.sum(sum_t * shrink_t, 0)
    rest_s, rest_t = tl.log(total_s), tl.log(total_t)
    ce_s, ce_t = (all_s - pivot_s) + rest_s, (all_t - pivot_t) + rest_t
    tl.store(out, ce_s)
    tl.store(out + C, ce_t)
    wrong = 0.0 * (ce_s + ce_t)  # NaN where the label is none, so that nothing comes of the row
    crossed = tl.sum((cross + sum_t * (fell_t - fell_s)) * shrink_t, 0)
    tl.store(out + 2 * C, crossed / total_t + (rest_s - rest_t) + wrong)
    tl.store(out + 3 * C, agreement)
    tl.store(out + 4 * C, rest_s - tl.sum((dot_s + sum_s * fell_s) * shrink_s, 0) / total_s)
    tl.store(out + 5 * C, rest_t - tl.sum((dot_t + sum_t * fell_t) * shrink_t, 0) / total_t)
    tl.store(out + 6 * C, all_s + rest_s)
    tl.store(out + 7 * C, all_t + rest_t)
    tl.store(out + 8 * C, all_s)
    tl.store(out + 9 * C, all_t)
    tl.store(out + 14 * C, tl.max(peak_s, 0))
    tl.store(out + 15 * C, tl.max(peak_t, 0))
    tl.store(out + 16 * C, pivot_s)
    tl.store(out + 17 * C, pivot_t)
    tl.store(out + 18 * C, rest_s + wrong)
    tl.store(out + 19 * C, rest_t)


@triton.jit
def _write_at_t(
    out, C, pivot_s, pivot_t, inverse_s, inverse_t, peak_s, peak_t, sum_s, sum_t, dot_s, dot_t, forward, reverse
):
    """Join the threads' sums at T, and write the row's numbers; see ``fused_rows.AtT``."""
    all_s, all_t = tl.max(peak_s, 0), tl.max(peak_t, 0)
    drop_s, drop_t = (peak_s - all_s) * inverse_s, (peak_t - all_t) * inverse_t
    fade_s, fade_t = _exp(drop_s), _exp(drop_t)
    total_s, total_t = tl.sum(sum_s * fade_s, 0), tl.sum(sum_t * fade_t, 0)
    rest_s, rest_t = tl.log(total_s), tl.log(total_t)
    norm_s, norm_t = (all_s - pivot_s) * inverse_s + rest_s, (all_t - pivot_t) * inverse_t + rest_t
    tl.store(out, norm_s)
    tl.store(out + C, norm_t)
    tl.store(out + 2 * C, rest_s - tl.sum((dot_s + sum_s * drop_s) * fade_s, 0) / total_s)
    tl.store(out + 3 * C, rest_t - tl.sum((dot_t + sum_t * drop_t) * fade_t, 0) / total_t)
    tl.store(out + 4 * C, tl.sum((forward + sum_t * (drop_t - drop_s)) * fade_t, 0) / total_t)
    tl.store(out + 5 * C, tl.sum((reverse + sum_s * (drop_s - drop_t)) * fade_s, 0) / total_s)
    tl.store(out + 6 * C, all_s)
    tl.store(out + 7 * C, all_t)
    tl.store(out + 8 * C, rest_s + 0.0 * (norm_s + norm_t))
    tl.store(out + 9 * C, rest_t)


@triton.jit(do_not_specialize=_COUNT, do_not_specialize_on_alignment=_OF_ROWS)
def statistics_kernel(
    student, teacher, targets, t_s, t_t, share, one, at_t,
    V, C, stride_s, stride_t, stride_t_s, stride_t_t, scale_s, cap_s, scale_t, cap_t,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr,
    AT_ONE: tl.constexpr, AT_T: tl.constexpr, MOMENTS: tl.constexpr, WITHOUT_TARGET: tl.constexpr, MIXED: tl.constexpr,
    THREADS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Statistics of one row: fills a column of the tables ``one`` and ``at_t`` (``fused_rows.One`` and ``AtT``).

    AT_ONE: the softmaxes at T = 1, with running maxima. AT_T: those at T_s and T_t; without AT_ONE the maxima are read from
    ``one``. MOMENTS: mean and sum of squares. WITHOUT_TARGET: at T the label is left out (DKD). MIXED: at T the target is a
    mixture of both logits (TAID), which needs AT_ONE.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    target, out = tl.load(targets + row), one + row
    pivot_s = _at_target(student, target, V, scale_s, cap_s, CAPPED_S)
    pivot_t = _at_target(teacher, target, V, scale_t, cap_t, CAPPED_T)
    column = tl.arange(0, THREADS)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    inverse_s, inverse_t, teacher_share = 1.0, 1.0, 1.0
    if AT_T:
        inverse_s, inverse_t = 1.0 / tl.load(t_s + row * stride_t_s), 1.0 / tl.load(t_t + row * stride_t_t)
    if MIXED:
        teacher_share = tl.load(share)
    target_pivot = pivot_s if MIXED else pivot_t  # the label's logit in the target
    # Of each thread: maxima, where the student's was last raised, and sums that belong to these maxima
    zeros = tl.zeros([THREADS], tl.float32)
    top_s, top_t, raised = zeros + LOW, zeros + LOW, tl.zeros([THREADS], tl.int32)
    sum_s, sum_t, dot_s, dot_t, cross = zeros, zeros, zeros, zeros, zeros
    peak_s, peak_t = zeros + LOW, zeros + LOW  # the maxima of what is summed up at T
    at_sum_s, at_sum_t, at_dot_s, at_dot_t, forward, reverse = zeros, zeros, zeros, zeros, zeros, zeros
    count, mean_s, mean_t, square_s, square_t = zeros, zeros, zeros, zeros, zeros
    if not AT_ONE:
        known = out + (14 if WITHOUT_TARGET else 8) * C
        peak_s, peak_t = zeros + tl.load(known), zeros + tl.load(known + C)

    BLOCK: tl.constexpr = THREADS * INNER
    whole = V // BLOCK * BLOCK
    for part in tl.static_range(2):  # whole blocks without a mask, then the rest with one
        for start in range(part * whole, whole + part * (V - whole), BLOCK):
            offsets = start + column
            z_s = _logits(student, offsets, V, scale_s, cap_s, CAPPED_S, part == 1)
            z_t = _logits(teacher, offsets, V, scale_t, cap_t, CAPPED_T, part == 1)
            y_s, y_t, rose_s, rose_t = z_s, z_t, zeros, zeros
            if MIXED:
                y_t = _mixed(z_s, z_t, pivot_s, pivot_t, teacher_share)
            if WITHOUT_TARGET:
                y_s, y_t = tl.where(offsets == target, LOW, y_s), tl.where(offsets == target, LOW, y_t)
            if AT_ONE:
                before = top_s
                top_s, top_t, sum_s, sum_t, dot_s, dot_t, cross, rose_s, rose_t = _add_at_one(
                    z_s, z_t, top_s, top_t, sum_s, sum_t, dot_s, dot_t, cross
                )
                raised = tl.where(top_s > before, start, raised)
                higher_s, higher_t = top_s, top_t
                if WITHOUT_TARGET:
                    higher_s = tl.maximum(peak_s, tl.max(y_s, 1))
                    rose_s = peak_s - higher_s
                if WITHOUT_TARGET or MIXED:
                    higher_t = tl.maximum(peak_t, tl.max(y_t, 1))
                    rose_t = peak_t - higher_t
                peak_s, peak_t = higher_s, higher_t
            if AT_T:
                at_sum_s, at_sum_t, at_dot_s, at_dot_t, forward, reverse = _add_at_t(
                    y_s, y_t, peak_s, peak_t, rose_s, rose_t, inverse_s, inverse_t,
                    at_sum_s, at_sum_t, at_dot_s, at_dot_t, forward, reverse, AT_ONE,
                )  # fmt: skip
            if MOMENTS:
                inside = offsets < V
                mean_s, square_s = _moments(z_s - pivot_s, inside, count, mean_s, square_s, part == 1, INNER)
                mean_t, square_t = _moments(z_t - pivot_t, inside, count, mean_t, square_t, part == 1, INNER)
                count += tl.sum(inside.to(tl.float32), 1)

    if AT_ONE:
        # The student's first choice, the first of equal ones, and what the teacher gives it
        offsets, best = raised[:, None] + column, tl.max(top_s, 0)
        z_s = _logits(student, offsets, V, scale_s, cap_s, CAPPED_S, True)
        first = tl.min(tl.min(tl.where(z_s == best, offsets, V - 1), 1), 0)
        chosen = _activate(tl.load(teacher + first), scale_t, cap_t, CAPPED_T)
        agreement = tl.where(chosen == tl.max(top_t, 0), 1.0, 0.0)
        _write_at_one(
            out, C, top_s, top_t, sum_s, sum_t, dot_s, dot_t, cross, agreement, pivot_s, pivot_t, peak_s, peak_t
        )
    if MOMENTS:
        _write_moments(out + 10 * C, C, V, count, mean_s, mean_t, square_s, square_t)
    if AT_T:
        _write_at_t(
            at_t + row, C, pivot_s, target_pivot, inverse_s, inverse_t, peak_s, peak_t,
            at_sum_s, at_sum_t, at_dot_s, at_dot_t, forward, reverse,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------- sums of the divergence


@triton.jit(do_not_specialize=_COUNT, do_not_specialize_on_alignment=_OF_ROWS)
def divergence_kernel(
    student, teacher, targets, t_s, t_t, share, rows, sums,
    V, C, stride_s, stride_t, stride_t_s, stride_t_t, scale_s, cap_s, scale_t, cap_t, a, b,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, TERMS: tl.constexpr, SLOPES: tl.constexpr, MIXED: tl.constexpr,
    THREADS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Sums of one row: fills a column of ``sums``, ``[4, C]``.

    They are sum v; sum e; and with SLOPES sum e (u - E_q u) and sum h (u_t - E_p u_t), of which the derivatives by the two
    temperatures are made. ``rows`` ``[7, C]``: the largest logits; log norms, E_q u and E_p u_t of u = (z - largest) / T; k.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    rows += row
    target = tl.load(targets + row)
    column = tl.arange(0, THREADS)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    inverse_s = 1.0 / tl.load(t_s + row * stride_t_s)
    inverse_t = 1.0 / tl.load(t_t + row * stride_t_t)
    teacher_share, pivot_s, pivot_t = 1.0, 0.0, 0.0
    if MIXED:
        teacher_share = tl.load(share)
        pivot_s = _at_target(student, target, V, scale_s, cap_s, CAPPED_S)
        pivot_t = _at_target(teacher, target, V, scale_t, cap_t, CAPPED_T)
    peak_s, peak_t, norm_s, norm_t = tl.load(rows), tl.load(rows + C), tl.load(rows + 2 * C), tl.load(rows + 3 * C)
    centre_s, centre_t, k = tl.load(rows + 4 * C), tl.load(rows + 5 * C), tl.load(rows + 6 * C)
    zeros = tl.zeros([THREADS], tl.float32)
    values, derivatives, slopes_s, slopes_t = zeros, zeros, zeros, zeros

    BLOCK: tl.constexpr = THREADS * INNER
    whole = V // BLOCK * BLOCK
    for part in tl.static_range(2):
        for start in range(part * whole, whole + part * (V - whole), BLOCK):
            offsets = start + column
            z_s = _logits(student, offsets, V, scale_s, cap_s, CAPPED_S, part == 1)
            z_t = _logits(teacher, offsets, V, scale_t, cap_t, CAPPED_T, part == 1)
            if MIXED:
                z_t = _mixed(z_s, z_t, pivot_s, pivot_t, teacher_share)
            u_s, u_t = (z_s - peak_s) * inverse_s, (z_t - peak_t) * inverse_t
            log_q, log_p = u_s - norm_s, u_t - norm_t
            v, e, h = TERMS(_exp(log_p), _exp(log_q), log_p, log_q, a, b, k, offsets == target)
            if part == 1:  # powers of 0 and squared differences are not 0 behind the end
                inside = offsets < V
                v, e, h = tl.where(inside, v, 0.0), tl.where(inside, e, 0.0), tl.where(inside, h, 0.0)
                u_s, u_t = tl.where(inside, u_s, 0.0), tl.where(inside, u_t, 0.0)
            values += tl.sum(v, 1)
            derivatives += tl.sum(e, 1)
            if SLOPES:
                slopes_s += tl.sum(e * (u_s - centre_s), 1)
                slopes_t += tl.sum(h * (u_t - centre_t), 1)
    tl.store(sums + row, tl.sum(values, 0))
    tl.store(sums + C + row, tl.sum(derivatives, 0))
    if SLOPES:
        tl.store(sums + 2 * C + row, tl.sum(slopes_s, 0))
        tl.store(sums + 3 * C + row, tl.sum(slopes_t, 0))


# ------------------------------------------------------------------------------------------------------------- gradient


@triton.jit
def _soft(z_s, z_t, of, C, a, b, at_target, TERMS: tl.constexpr):
    """One soft term's gradient with respect to z_s; ``of`` points at its numbers of the row."""
    log_q = (z_s - tl.load(of + 2 * C)) * tl.load(of) - tl.load(of + 4 * C)
    log_p = (z_t - tl.load(of + 3 * C)) * tl.load(of + C) - tl.load(of + 5 * C)
    # Above 0 only at a label that is left out, where infinity times 0 would be NaN
    q = _exp(tl.minimum(log_q, 0.0))
    _, e, _ = TERMS(_exp(log_p), q, log_p, log_q, a, b, tl.load(of + 8 * C), at_target)
    return tl.load(of + 6 * C) * (e - q * tl.load(of + 7 * C))


@triton.jit
def _write_gradient(
    student, teacher, grad, offsets, target, teacher_share, rows, terms,
    V, C, scale_s, cap_s, scale_t, cap_t, a, b, ce_weight,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, TERMS: tl.constexpr, COUNT: tl.constexpr, WITH_CE: tl.constexpr,
    SCALE_FREE: tl.constexpr, MIXED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile; ``rows`` and ``terms`` point at the numbers of the row."""
    z_s = _logits(student, offsets, V, scale_s, cap_s, CAPPED_S, MASKED)
    g = tl.zeros_like(z_s)
    if WITH_CE:
        q = _exp((z_s - tl.load(rows)) - tl.load(rows + C))
        g = ce_weight * (q - tl.where(offsets == target, 1.0, 0.0))
    if COUNT > 0:
        z_t = _logits(teacher, offsets, V, scale_t, cap_t, CAPPED_T, MASKED)
        if MIXED:
            z_t = _mixed(z_s, z_t, tl.load(rows + 3 * C), tl.load(rows + 5 * C), teacher_share)
        for term in tl.static_range(COUNT):
            g += _soft(z_s, z_t, terms + term * 9 * C, C, a, b, offsets == target, TERMS)
    if SCALE_FREE:
        g -= tl.load(rows + 2 * C) * ((z_s - tl.load(rows + 3 * C)) - tl.load(rows + 4 * C))
    if CAPPED_S:
        bent = z_s / cap_s
        g *= 1.0 - bent * bent
    g = (g * scale_s).to(grad.dtype.element_ty)
    if MASKED:
        tl.store(grad + offsets, g, mask=offsets < V)
    else:
        tl.store(grad + offsets, g)


@triton.jit(do_not_specialize=_COUNT, do_not_specialize_on_alignment=_OF_ROWS)
def gradient_kernel(
    student, teacher, grad, targets, share, rows, terms,
    V, C, stride_s, stride_t, stride_g, scale_s, cap_s, scale_t, cap_t, a, b, ce_weight,
    CAPPED_S: tl.constexpr, CAPPED_T: tl.constexpr, TERMS: tl.constexpr, COUNT: tl.constexpr, WITH_CE: tl.constexpr,
    SCALE_FREE: tl.constexpr, MIXED: tl.constexpr, TILES: tl.constexpr, THREADS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to the student's raw logits, for TILES tiles of one row; ``grad`` may be ``student`` itself.

    Then other programs of the row overwrite what they have read: nothing may be read here but the program's own tiles.

    ``rows`` ``[6, C]``: the student's largest logit and the log norm of z minus it; with SCALE_FREE how much of z - mean z
    leaves, the label's logit, and mean z minus it; the teacher's logit of the label. ``terms`` ``[COUNT, 9, C]``: of each
    soft term 1 / T_s, 1 / T_t, both largest logits, both log norms, its weight, sum e, k.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    grad += row * stride_g
    target = tl.load(targets + row)
    column = tl.arange(0, THREADS)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    teacher_share = 1.0
    if MIXED:
        teacher_share = tl.load(share)
    BLOCK: tl.constexpr = THREADS * INNER
    first = tl.program_id(1) * (TILES * BLOCK)
    # A mask that may end anywhere splits 16 bytes into single loads: the last program of a row alone has one
    if first + TILES * BLOCK <= V:
        for tile in tl.static_range(TILES):
            _write_gradient(
                student, teacher, grad, first + tile * BLOCK + column, target, teacher_share,
                rows + row, terms + row, V, C, scale_s, cap_s, scale_t, cap_t, a, b, ce_weight,
                CAPPED_S, CAPPED_T, TERMS, COUNT, WITH_CE, SCALE_FREE, MIXED, False,
            )  # fmt: skip
    else:
        for start in range(first, V, BLOCK):
            _write_gradient(
                student, teacher, grad, start + column, target, teacher_share,
                rows + row, terms + row, V, C, scale_s, cap_s, scale_t, cap_t, a, b, ce_weight,
                CAPPED_S, CAPPED_T, TERMS, COUNT, WITH_CE, SCALE_FREE, MIXED, True,
            )  # fmt: skip
