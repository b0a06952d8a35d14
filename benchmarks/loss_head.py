"""The loss head alone, forward and backward from final states: time and memory of ours, of peers, and of the floor.

    python benchmarks/loss_head.py              the published size: N = 1,024 of 2,048 positions, V = 49,152, fp32
    python benchmarks/loss_head.py --quick      tiny sizes, to see that it runs

Every variant lives in its own process and they take turns, one step each per round, so that a machine that slows down
slows all of them. Time is the median over rounds. Memory is what the step adds to the resident memory at its peak:
gradients included, inputs (allocated before) left out. ``KL at T`` shows that all variants computed the same thing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 8
IGNORE_INDEX = -100
FLOOR, OURS, DENSE, GKD, CHUNKED = "floor", "dts_hf", "dense", "trl_gkd", "trl_chunked"
LABELS = {
    FLOOR: "the floor: four matmuls alone",
    OURS: "dts_hf: CE + forward KL, policy dts",
    DENSE: "dense over B x T: CE + forward KL",
    GKD: "TRL GKD's loss: KL alone",
    CHUNKED: "TRL's chunked divergence, labelled rows: KL alone",
}
VARIANTS = tuple(LABELS)


@dataclass(frozen=True)
class Sizes:
    """``rows`` = N labelled rows, spread over BATCH sequences that are twice as long (half of each is prompt)."""

    rows: int
    hidden: int
    vocab: int
    dtype: str
    threads: int
    temperature: float
    kd_ratio: float = 0.5

    @property
    def time(self) -> int:
        return 2 * self.rows // BATCH


@dataclass
class Inputs:
    """States ``[B, T, H]``, heads ``[V, H]``, unshifted labels ``[B, T]``."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    labels: Tensor


#: One step of a variant: runs forward and backward and returns KL(teacher || student) at T in nats per label, or NaN.
Step = Callable[[], float]


def make_inputs(sizes: Sizes) -> Inputs:
    """Random states and heads whose logits have a standard deviation of about 2, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, sizes.dtype)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    std = 2.0 / math.sqrt(sizes.hidden)
    labels = torch.randint(sizes.vocab, (BATCH, sizes.time), generator=generator)
    labels[:, : sizes.time // 2] = IGNORE_INDEX
    return Inputs(
        normal(BATCH, sizes.time, sizes.hidden).requires_grad_(),
        normal(sizes.vocab, sizes.hidden, std=std).requires_grad_(),
        normal(BATCH, sizes.time, sizes.hidden),
        normal(sizes.vocab, sizes.hidden, std=std),
        labels,
    )


# ------------------------------------------------------------------------------------------------------- the variants


def floor_step(inputs: Inputs, sizes: Sizes) -> Step:
    """Both logits, dH and dW of the labelled rows in chunks of 256: the arithmetic that no exact method avoids."""
    import torch

    width = sizes.hidden
    keep = (inputs.labels != IGNORE_INDEX).reshape(-1)
    h_s = inputs.student.detach().reshape(-1, width)[keep]
    h_t = inputs.teacher.reshape(-1, width)[keep]
    w_s, w_t = inputs.student_head.detach(), inputs.teacher_head

    def step() -> float:
        d_states, d_weight = torch.empty_like(h_s), torch.zeros_like(w_s)
        logits = h_s.new_empty(min(256, sizes.rows), sizes.vocab)
        for start in range(0, sizes.rows, 256):
            span = slice(start, min(start + 256, sizes.rows))
            chunk = logits[: span.stop - start]
            torch.mm(h_t[span], w_t.t(), out=chunk)
            torch.mm(h_s[span], w_s.t(), out=chunk)
            torch.mm(chunk, w_s, out=d_states[span])
            d_weight.addmm_(chunk.t(), h_s[span])
        return math.nan

    return step


def ours_step(inputs: Inputs, sizes: Sizes) -> Step:
    """What the trainer runs: select the labelled rows, then the fused loss with every statistic that it logs."""
    from dts_hf.head import Head
    from dts_hf.losses import DistillationLoss
    from dts_hf.response import select_response
    from dts_hf.temperature import build_temperature

    t = sizes.temperature
    policy = build_temperature("dts", rule="gap", t_init=t, t_min=min(1.0, t), t_max=t)
    policy.begin_step(0.0)
    loss_fn = DistillationLoss("forward_kl", temperature=policy, kd_ratio=sizes.kd_ratio)
    student_head, teacher_head = Head(inputs.student_head), Head(inputs.teacher_head)

    def step() -> float:
        rows, targets = select_response(inputs.student, inputs.labels)
        teacher_rows, _ = select_response(inputs.teacher, inputs.labels)
        output = loss_fn(rows, student_head, teacher_rows, teacher_head, targets, targets.numel())
        output.loss.backward()
        return float(output.sums["kd"]) / (targets.numel() * t * t)

    return step


def dense_step(inputs: Inputs, sizes: Sizes) -> Step:
    """As research forks do it: logits of every position, autograd, the mask at the very end."""
    import torch
    import torch.nn.functional as F

    t, ratio = sizes.temperature, sizes.kd_ratio
    targets = inputs.labels[:, 1:].reshape(-1)

    def step() -> float:
        student = F.linear(inputs.student, inputs.student_head)[:, :-1].float()
        with torch.no_grad():
            teacher = F.linear(inputs.teacher, inputs.teacher_head)[:, :-1].float()
            F.cross_entropy(teacher.reshape(-1, sizes.vocab), targets, ignore_index=IGNORE_INDEX)  # for the gap
            teacher_probs = F.softmax(teacher / t, dim=-1)
            teacher_log_probs = F.log_softmax(teacher / t, dim=-1)
        ce = F.cross_entropy(student.reshape(-1, sizes.vocab), targets, ignore_index=IGNORE_INDEX)
        student_log_probs = F.log_softmax(student / t, dim=-1)
        per_token = (teacher_probs * (teacher_log_probs - student_log_probs)).sum(-1).reshape(-1)
        mask = (targets != IGNORE_INDEX).float()
        kl = (per_token * mask).sum() / mask.sum()
        ((1 - ratio) * ce + ratio * t * t * kl).backward()
        return float(kl.detach())

    return step


def gkd_step(inputs: Inputs, sizes: Sizes) -> Step:
    """``trl.experimental.gkd``: dense logits, its own loss function with beta = 0 (forward KL); no CE, no T^2."""
    import torch
    import torch.nn.functional as F
    from trl.experimental.gkd import GKDTrainer

    def step() -> float:
        student = F.linear(inputs.student, inputs.student_head)
        with torch.no_grad():
            teacher = F.linear(inputs.teacher, inputs.teacher_head)
        loss = GKDTrainer.generalized_jsd_loss(
            student[:, :-1], teacher[:, :-1], labels=inputs.labels[:, 1:], beta=0.0, temperature=sizes.temperature
        )
        loss.backward()
        return float(loss.detach())

    return step


def chunked_step(inputs: Inputs, sizes: Sizes) -> Step:
    """``trl.DistillationTrainer``'s function on the labelled rows (as it runs on a GPU), beta = 0; no CE, no T^2."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    keep = (inputs.labels[:, 1:] != IGNORE_INDEX).reshape(-1)

    def step() -> float:
        rows = inputs.student[:, :-1].reshape(-1, sizes.hidden)[keep]
        teacher_rows = inputs.teacher[:, :-1].reshape(-1, sizes.hidden)[keep]
        per_token, _entropy = ChunkedDivergenceFunction.apply(
            rows, inputs.student_head, None, teacher_rows, inputs.teacher_head, None, 0.0, sizes.temperature
        )
        loss = per_token.mean()
        loss.backward()
        return float(loss.detach())

    return step


STEPS: dict[str, Callable[[Inputs, Sizes], Step]] = {
    FLOOR: floor_step,
    OURS: ours_step,
    DENSE: dense_step,
    GKD: gkd_step,
    CHUNKED: chunked_step,
}


# --------------------------------------------------------------------------------------------------------- the worker


def resident_bytes(field: str) -> int | None:
    """``VmRSS`` (now) or ``VmHWM`` (high-water mark) of this process; None where the system does not say."""
    try:
        with open("/proc/self/status") as status:
            lines = dict(line.split(":", 1) for line in status)
        return int(lines[field].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        return True
    except OSError:
        return False


def give_memory_back() -> None:
    """Freed heap must leave the resident memory, or the next step would reuse it and look smaller than it is."""
    import ctypes

    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def worker(pipe: Connection, variant: str, sizes: Sizes) -> None:
    """Answers "time" and "memory" with the result of one step, until it is told "stop"."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch

    torch.set_num_threads(sizes.threads)
    inputs = make_inputs(sizes)
    try:
        step = STEPS[variant](inputs, sizes)
    except (ImportError, RuntimeError) as error:  # trl's lazy imports raise either
        if variant not in (GKD, CHUNKED):
            raise
        pipe.send({"missing": str(error)})
        return

    def run() -> dict[str, float]:
        began = time.perf_counter()
        kl = step()
        seconds = time.perf_counter() - began
        inputs.student.grad = inputs.student_head.grad = None
        return {"seconds": seconds, "kl": kl}

    pipe.send({"ready": True})
    while (order := pipe.recv()) != "stop":
        if order == "time":
            pipe.send(run())
            continue
        give_memory_back()
        can_reset, before = reset_high_water_mark(), resident_bytes("VmRSS")
        run()
        after = resident_bytes("VmHWM")
        known = can_reset and before is not None and after is not None
        pipe.send({"peak_bytes": after - before if known else None})  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------- the parent


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, variant: str, sizes: Sizes) -> None:
        # A fresh interpreter, not a fork: a fork would start with the parent's memory.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=worker, args=(theirs, variant, sizes), daemon=True)
        self.process.start()
        theirs.close()  # so that a worker that dies shows as the end of its pipe
        self.variant = variant

    def missing(self) -> str | None:
        """Wait until the worker is ready; returns why it cannot run, or None."""
        return self._receive().get("missing")

    def ask(self, order: str) -> dict[str, Any]:
        self.pipe.send(order)
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"the worker '{self.variant}' died; its own message stands above") from None
        return answer

    def stop(self) -> None:
        with contextlib.suppress(OSError):  # it may be gone already
            self.pipe.send("stop")
        self.process.join()


def measure(sizes: Sizes, rounds: int, wanted: tuple[str, ...] = VARIANTS) -> dict[str, Any]:
    """Run ``rounds`` interleaved rounds; returns ``{"variants": {name: numbers}, "notes": [...]}``."""
    workers = {name: Worker(name, sizes) for name in wanted}
    missing = {name: w.missing() for name, w in workers.items()}
    notes = [f"{name} is left out: {why} (pip install trl==1.16.0)" for name, why in missing.items() if why]
    running = {name: w for name, w in workers.items() if not missing[name]}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    kl: dict[str, float] = {}
    try:
        for name in running:  # warm up one after the other: together they would not fit into a small machine
            running[name].ask("time")
        memory = {name: running[name].ask("memory")["peak_bytes"] for name in running}
        for number in range(rounds):
            order = list(running)
            order = order[number % len(order) :] + order[: number % len(order)]  # nobody always follows the same one
            for name in order:
                answer = running[name].ask("time")
                seconds[name].append(answer["seconds"])
                kl[name] = answer["kl"]
    finally:
        for w in workers.values():
            w.stop()
    if any(peak is None for peak in memory.values()):
        notes.append("peak memory needs Linux's /proc/self/clear_refs")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "variants": {
            name: {
                "label": LABELS[name],
                "seconds": medians[name],
                "seconds_per_round": seconds[name],
                "x_floor": medians[name] / medians[FLOOR] if FLOOR in medians else None,
                "peak_gb": None if memory[name] is None else memory[name] / 1e9,
                "x_trl_gkd": medians[name] / medians[GKD] if GKD in medians else None,
                "kl_at_t": None if math.isnan(kl[name]) else kl[name],
            }
            for name in running
        },
        "notes": notes,
    }


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(result: dict[str, Any]) -> str:
    """The markdown table that is printed."""
    head = ("variant", "seconds", "x floor", "peak GB", "x TRL GKD", "KL at T")
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for row in result["variants"].values():
        numbers = (
            cell(row["seconds"], 4 if row["seconds"] < 0.1 else 2),
            cell(row["x_floor"], 2),
            cell(row["peak_gb"], 3),
            cell(row["x_trl_gkd"], 2),
            cell(row["kl_at_t"], 4),
        )
        lines.append(f"| {row['label']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median is reported (default: 5)")
    parser.add_argument("--rows", type=int, default=1024, help="labelled rows N, a multiple of 8 (default: 1024)")
    parser.add_argument("--hidden", type=int, default=576, help="H (default: 576)")
    parser.add_argument("--vocab", type=int, default=49152, help="V (default: 49152)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="states and heads")
    parser.add_argument("--threads", type=int, default=2, help="threads of every worker (default: 2)")
    parser.add_argument("--temperature", type=float, default=3.0, help="T in force, for every variant (default: 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="N 32, H 32, V 512, one thread, 2 rounds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    found = parser.parse_args(arguments)
    if found.quick:
        found.rounds, found.rows, found.hidden, found.vocab, found.threads = 2, 32, 32, 512, 1
    if found.rows < BATCH or found.rows % BATCH:
        parser.error(f"--rows: got {found.rows}, expected a multiple of {BATCH}")
    if found.rounds < 1:
        parser.error(f"--rounds: got {found.rounds}, expected at least 1")
    return found


def main(arguments: list[str] | None = None) -> None:
    found = read_arguments(arguments)
    sizes = Sizes(found.rows, found.hidden, found.vocab, found.dtype, found.threads, found.temperature)
    result = measure(sizes, found.rounds, tuple(found.variants))
    result["setting"] = {**asdict(sizes), "batch": BATCH, "time": sizes.time, "rounds": found.rounds, **versions()}
    if found.json:
        print(json.dumps(result, indent=2))
        return
    setting = ", ".join(f"{key} {value}" for key, value in result["setting"].items())
    print(f"{setting}\n\n{table(result)}")
    for note in result["notes"]:
        print(f"\n{note}", file=sys.stderr)


if __name__ == "__main__":
    main()
