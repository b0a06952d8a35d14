"""Whole training steps at the shapes of real models, for a GPU: ours padded, packed and compiled, TRL's two, HF's SFT.

    python benchmarks/step_sizes.py --shape 8b      on a GPU; on a CPU: tiny, does it run?
    python benchmarks/step_sizes.py --shape 135m --variants sft packed

Random weights of the shapes of ``SHAPES``; no download. Every variant is a Trainer whose ``train()`` runs: ours is
``DistillationTrainer``, the peers' losses run in ``transformers.Trainer``, so that loader, optimizer and clipping are the
same code. ``forward + backward`` is ``training_step``, ``whole step`` the time from one to the next, optimizer and loader
included. The learning rate is 0, so that all see the same weights in every step, and ``KL at T`` must agree.

65 % of the positions are real tokens, half of them labelled. bf16 autocast, the student's weights fp32, every teacher's
bf16. No dropout. Accelerate would also copy the peers' logits to fp32; that is left out, in their favour.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import harness
import peers
import render
import train_step
from harness import Task
from loss_head import head_matmuls
from render import Column
from shapes import QUICK_SHAPES, SHAPES, Model, Shape, make_model

if TYPE_CHECKING:
    from torch import Tensor

WARM_UP, STEPS = 4, 10
FLOOR, SFT, GKD, CHUNKED = "floor", "sft", "trl_gkd", "trl_chunked"
PADDED, PACKED, COMPILED = "padded", "packed", "packed_compiled"
LABELS = {
    FLOOR: "the floor: matmuls of real tokens and labelled rows",
    SFT: "plain SFT, HF's own loss (no teacher)",
    GKD: "KD, TRL GKD's loss: KL alone",
    CHUNKED: "KD, TRL's chunked divergence: KL alone",
    PADDED: "dts_hf, padded",
    PACKED: "dts_hf, packed",
    COMPILED: "dts_hf, packed, torch_compile",
}
VARIANTS = tuple(LABELS)
COLUMNS = (
    Column("label", "variant", None),
    Column("ms", "forward + backward, ms", 1),
    Column("x_floor", "x floor", 2),
    Column("x_sft", "x SFT", 2),
    Column("x_trl_gkd", "x TRL GKD", 2),
    Column("x_trl_chunked", "x TRL chunked", 2),
    Column("x_padded", "x padded", 2),
    Column("whole_ms", "whole step, ms", 1),
    Column("peak_gb", "peak GB", 2),
    Column("kl", "KL at T", 4),
)


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    shape: Shape
    device: str
    steps: int = STEPS
    warm_up: int = WARM_UP
    optim: str = ""
    temperature: float = 3.0
    kd_ratio: float = 0.5


# --------------------------------------------------------------------------------------------------- models and batch


def make_models(setting: Setting) -> tuple[Any, Any]:
    """Student in training mode and fp32, teacher in evaluation mode and bf16."""
    student = make_model(setting.shape, setting.shape.student, "float32", 0, setting.device)
    teacher = make_model(setting.shape, setting.shape.teacher, "bfloat16", 1, setting.device)
    return student.train(), teacher.eval().requires_grad_(False)


def make_dataset(setting: Setting) -> Any:
    """As many batches as there are steps, all of the same lengths; random token ids."""
    import torch

    from dts_hf.data.encoding import EncodedDataset

    generator = torch.Generator().manual_seed(2)
    lengths = setting.shape.lengths * (setting.warm_up + setting.steps)
    rows = [torch.randint(3, setting.shape.vocab, (total,), generator=generator).tolist() for total, _ in lengths]
    prompts = [total - response for total, response in lengths]
    return EncodedDataset([str(number) for number in range(len(rows))], rows, prompts)


def arguments(setting: Setting, folder: str, **more: Any) -> Any:
    from transformers import TrainingArguments

    steps = setting.warm_up + setting.steps
    if setting.optim:
        more["optim"] = setting.optim
    return TrainingArguments(
        folder, use_cpu=setting.device == "cpu", per_device_train_batch_size=setting.shape.rows, max_steps=steps,
        learning_rate=0.0, logging_steps=steps, save_strategy="no", report_to=[], disable_tqdm=True,
        train_sampling_strategy="sequential", **more,
    )  # fmt: skip


class Stopwatch:
    """Times a trainer that runs: ``training_step``, and from the end of one to the end of the next.

    On a GPU the marks are events, read after the last step: the clock makes nobody wait.
    """

    def __init__(self, trainer: Any, setting: Setting) -> None:
        self.setting, self.inner = setting, trainer.training_step
        self.marks: list[tuple[Any, Any]] = []
        self.before = 0
        trainer.training_step = self.training_step

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        if self.setting.device == "cuda" and len(self.marks) == self.setting.warm_up:
            self.before = torch.cuda.memory_allocated()  # weights and the optimizer's state; gradients are gone
            torch.cuda.reset_peak_memory_stats()
        start = self._mark()
        loss = self.inner(*args, **kwargs)
        self.marks.append((start, self._mark()))
        return loss

    def _mark(self) -> Any:
        import torch

        if self.setting.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return last - first if self.setting.device == "cpu" else first.elapsed_time(last) / 1000  # type: ignore[no-any-return]

    def read(self) -> dict[str, float]:
        import torch

        found: dict[str, float] = {}
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - self.before
        timed = self.marks[self.setting.warm_up :]
        ends = [end for _, end in self.marks[self.setting.warm_up - 1 :]]
        found["seconds"] = statistics.median(self._between(*pair) for pair in timed)
        found["whole_seconds"] = statistics.median(self._between(a, b) for a, b in pairwise(ends))
        return found


def run_trainer(setting: Setting, make: Callable[[str], Any], kl: Callable[[Any], float | None]) -> Task:
    """A task that trains once; ``make`` gets the folder, ``kl`` the trainer when it has run."""

    def step() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:  # nothing is saved
            trainer = make(folder)
            watch = Stopwatch(trainer, setting)
            trainer.train()
        found: dict[str, Any] = watch.read()
        value = kl(trainer)
        return found if value is None else {**found, "kl": value}

    return Task(step, timed_inside=True)


# ------------------------------------------------------------------------------------------------------- the variants


def floor_task(setting: Setting) -> Task:
    """2P a token in the teacher's backbone, 6P in the student's, four times 2HV a labelled row; attention not counted."""
    import torch

    shape, device = setting.shape, setting.device

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16) * 0.05

    def pairs(model: Model) -> list[tuple[Tensor, Tensor]]:
        return [(normal(shape.tokens, wide), normal(out, wide)) for wide, out in model.matmuls()]

    student, teacher = pairs(shape.student), pairs(shape.teacher)
    heads = [
        part for model in (shape.student, shape.teacher)
        for part in (normal(shape.labelled, model.hidden), normal(shape.vocab, model.hidden))
    ]  # fmt: skip

    def step() -> dict[str, Any]:
        for _ in range(shape.teacher.layers):
            for inputs, weight in teacher:
                torch.mm(inputs, weight.t())
        for _ in range(shape.student.layers):
            for inputs, weight in student:
                outputs = torch.mm(inputs, weight.t())
                torch.mm(outputs, weight)
                torch.mm(outputs.t(), inputs)
        head_matmuls(*heads)
        return {}

    return Task(step)


def peer_task(
    setting: Setting, loss_fn: Callable[[Any, dict[str, Tensor]], Tensor], student: Any, is_kl: bool
) -> Task:
    """``transformers.Trainer`` with another loss; its autocast is ours, so that logits are not copied to fp32."""
    import torch
    from transformers import Trainer

    from dts_hf.data.collators import PaddedCollator

    losses: list[Tensor] = []

    class PeerTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            with torch.autocast(setting.device, torch.bfloat16):
                loss = loss_fn(model, inputs)
            losses.append(loss.detach())
            return loss

    pad = PaddedCollator(pad_token_id=2)

    def collate(examples: Sequence[Any]) -> dict[str, Tensor]:
        return {key: value for key, value in pad(examples).items() if key != "row_id"}

    def make(folder: str) -> Any:
        args = arguments(setting, folder, remove_unused_columns=False)
        return PeerTrainer(student, args, collate, make_dataset(setting))

    return run_trainer(setting, make, lambda _: float(torch.stack(losses).mean()) if is_kl else None)


def sft_task(setting: Setting) -> Task:
    student = make_model(setting.shape, setting.shape.student, "float32", 0, setting.device).train()
    return peer_task(setting, lambda model, inputs: model(**inputs, use_cache=False).loss, student, is_kl=False)


def gkd_task(setting: Setting) -> Task:
    import torch

    loss_fn = peers.gkd_loss()
    student, teacher = make_models(setting)

    def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.pop("labels")
        student_logits = model(**inputs, use_cache=False).logits
        with torch.no_grad():
            teacher_logits = teacher(**inputs, use_cache=False).logits
        return loss_fn(student_logits, teacher_logits, labels, setting.temperature)[0]

    return peer_task(setting, loss, student, is_kl=True)


def chunked_task(setting: Setting) -> Task:
    import torch

    loss_fn = peers.chunked_loss()
    student, teacher = make_models(setting)

    def loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.pop("labels")
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        with torch.no_grad():
            teacher_states = teacher.base_model(**inputs, use_cache=False).last_hidden_state
        heads = [found.get_output_embeddings().weight for found in (model, teacher)]
        return loss_fn(states, heads[0], teacher_states, heads[1], labels, setting.temperature)[0]

    return peer_task(setting, loss, student, is_kl=True)


def ours_task(setting: Setting, packing: bool, compiled: bool) -> Task:
    from dts_hf import DistillationTrainer

    student, teacher = make_models(setting)
    t = setting.temperature

    def make(folder: str) -> Any:
        return DistillationTrainer(
            student,
            teacher,
            temperature={"name": "dts", "rule": "gap", "t_init": t, "t_min": t, "t_max": t},
            kd_ratio=setting.kd_ratio,
            args=arguments(setting, folder, bf16=True, torch_compile=compiled),
            train_dataset=make_dataset(setting),
            processing_class=train_step.make_tokenizer(setting.shape),  # type: ignore[arg-type]  # it reads vocab alone
            packing=packing,
        )

    def kl(trainer: Any) -> float | None:
        logged = [line["kd_loss"] for line in trainer.state.log_history if "kd_loss" in line]
        return logged[-1] / t**2 if logged else None

    return run_trainer(setting, make, kl)


def build(variant: str, setting: Setting) -> Task:
    simple = {FLOOR: floor_task, SFT: sft_task, GKD: gkd_task, CHUNKED: chunked_task}
    if variant in simple:
        return simple[variant](setting)
    return ours_task(setting, packing=variant != PADDED, compiled=variant == COMPILED)


# --------------------------------------------------------------------------------------------------------- the report


def run(name: str, setting: Setting, found: argparse.Namespace) -> dict[str, Any]:
    # On a GPU one process after the other: a teacher of 8B beside another one would not fit.
    processes = [list(found.variants)] if setting.device == "cpu" else None
    common = {"threads": found.threads, "device": setting.device, "processes": processes, "limit": found.limit}
    numbers, notes = harness.measure(build, found.variants, setting, rounds=found.rounds, **common)
    rows = [
        {
            "name": variant,
            "label": LABELS[variant],
            **values,
            "ms": render.milliseconds(values),
            "whole_ms": values["whole_seconds"] * 1e3 if "whole_seconds" in values else None,
            "x_floor": render.ratio(numbers, variant, FLOOR) if variant != SFT else None,
            **{f"x_{peer}": render.ratio(numbers, variant, peer) for peer in (SFT, GKD, CHUNKED, PADDED)},
            "memory_x_trl_chunked": render.ratio(numbers, variant, CHUNKED, "peak_bytes"),
            "peak_gb": render.gigabytes(values),
        }
        for variant, values in numbers.items()
    ]
    shape = setting.shape
    setting_shown = {key: value for key, value in asdict(setting).items() if key != "shape" and value != ""} | {
        "shape": name, "vocab": shape.vocab, "batch": shape.rows, "time": shape.time, "tokens": shape.tokens,
        "labelled": shape.labelled, "rounds": found.rounds,
    }  # fmt: skip
    if setting.device == "cpu":
        setting_shown["threads"] = found.threads
    return render.make_report(f"step_{name}", setting_shown, [render.make_table("", COLUMNS, rows)], notes)


def read_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, rounds=1)
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="the pair (default: 135m)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all; on a CPU not the compiled one")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"timed steps (default: {STEPS})")
    parser.add_argument("--optim", default="", help="as in TrainingArguments (default: the trainer's own)")
    found = parser.parse_args(given)
    found.quick = found.quick or found.device == "cpu"
    found.variants = found.variants or [name for name in VARIANTS if name != COMPILED or found.device == "cuda"]
    if found.quick:
        found.rounds, found.threads, found.steps = 1, 1, 2
    return found


def main(given: list[str] | None = None) -> None:
    found = read_arguments(given)
    shape = (QUICK_SHAPES if found.quick else SHAPES)[found.shape]
    setting = Setting(shape, found.device, found.steps, 1 if found.quick else WARM_UP, found.optim)
    render.show(run(found.shape, setting, found), found.json)


if __name__ == "__main__":
    main()
