"""A whole training step, forward and backward: plain SFT, distillation by peers and by ours, and the floor.

    python benchmarks/train_step.py                     fp32
    python benchmarks/train_step.py --dtype bfloat16    bf16 autocast
    python benchmarks/train_step.py --quick             tiny sizes, to see that it runs

A teacher of 30 layers and a student of 10, shaped like SmolLM-135M, random weights; 8 rows, padded to 256 positions, with
1,252 tokens of which 628 carry a label. Clipping and the optimizer are left out for all alike. Ours is
``DistillationTrainer.training_step`` of a real trainer: its ``compute_loss`` and the backward pass, nothing rewritten.

In bf16 the student's weights stay fp32 under autocast in every variant. Our teacher's weights are bf16; the peers' teachers
run under the same autocast, as their trainers do. Accelerate would also copy the peers' logits to fp32; that is left out,
in their favour.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import harness
import peers
import render
from harness import Task
from loss_head import head_matmuls
from render import Column
from shapes import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

# Like rows of Dolly: 1,252 tokens in all, 628 of them responses.
LENGTHS = ((256, 128), (224, 112), (187, 94), (160, 80), (139, 70), (118, 59), (96, 48), (72, 37))
QUICK_LENGTHS = ((24, 12), (17, 9), (9, 5), (5, 2))
FLOOR, SFT, DENSE, GKD, CHUNKED = "floor", "sft", "dense", "trl_gkd", "trl_chunked"
PADDED, PACKED, CACHED, CACHED_PACKED = "padded", "packed", "cached_padded", "cached_packed"
LABELS = {
    FLOOR: "the floor: matmuls of real tokens and labelled rows",
    SFT: "plain SFT, HF's own loss (no teacher)",
    DENSE: "KD, dense over B x T: CE + forward KL",
    GKD: "KD, TRL GKD's loss: KL alone",
    CHUNKED: "KD, TRL's chunked divergence: KL alone",
    PADDED: "dts_hf, padded",
    PACKED: "dts_hf, packed",
    CACHED: "dts_hf, padded, cached teacher states",
    CACHED_PACKED: "dts_hf, packed, cached teacher states",
}
VARIANTS = tuple(LABELS)
COLUMNS = (
    Column("label", "variant", None),
    Column("seconds", "seconds", 2),
    Column("x_floor", "x floor", 2),
    Column("x_sft", "x SFT", 2),
    Column("x_trl_gkd", "x TRL GKD", 2),
    Column("peak_gb", "peak GB", 2),
    Column("memory_x_trl_gkd", "memory x TRL GKD", 2),
    Column("kl", "KL at T", 4),
)


@dataclass(frozen=True)
class Sizes(Batch):
    """``lengths``: (tokens, labelled tokens) of each row."""

    dtype: str = "float32"
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocab: int = 49152
    teacher_layers: int = 30
    student_layers: int = 10
    lengths: tuple[tuple[int, int], ...] = LENGTHS
    temperature: float = 3.0
    kd_ratio: float = 0.5
    device: str = "cpu"

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that meet every token in a matmul."""
        kv_width = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (self.hidden + kv_width) + 3 * self.hidden * self.intermediate

    def gflop(self) -> dict[str, float]:
        """2P a token for a forward pass, 6P for forward and backward, four times 2HV a labelled row for the heads."""
        student = 6 * self.student_layers * self.layer_weights * self.tokens
        teacher = 2 * self.teacher_layers * self.layer_weights * self.tokens
        head = 4 * 2 * self.hidden * self.vocab * self.labelled
        return {"student": student / 1e9, "teacher": teacher / 1e9, "head": head / 1e9}


QUICK = {
    "hidden": 32,
    "intermediate": 64,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 512,
    "teacher_layers": 3,
    "student_layers": 2,
    "lengths": QUICK_LENGTHS,
}


# --------------------------------------------------------------------------------------------------- models and batch


def make_model(sizes: Sizes, layers: int, seed: int) -> Any:
    """A LLaMA with tied embeddings and random weights, whose logits have a standard deviation of about 2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=2.0 / sizes.hidden**0.5)
    return model.to(sizes.device)


def make_models(sizes: Sizes) -> tuple[Any, Any]:
    """Student in training mode and fp32, teacher in evaluation mode."""
    student, teacher = make_model(sizes, sizes.student_layers, 0), make_model(sizes, sizes.teacher_layers, 1)
    return student.train(), teacher.eval().requires_grad_(False)


def make_dataset(sizes: Sizes) -> Any:
    """The rows as ``encode_rows`` would return them; random token ids."""
    import torch

    from dts_hf.data.encoding import EncodedDataset

    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, sizes.vocab, (total,), generator=generator).tolist() for total, _ in sizes.lengths]
    prompts = [total - response for total, response in sizes.lengths]
    return EncodedDataset([str(number) for number in range(len(rows))], rows, prompts)


def padded_batch(sizes: Sizes) -> dict[str, Tensor]:
    from dts_hf.data.collators import PaddedCollator

    batch = PaddedCollator(pad_token_id=2)([*make_dataset(sizes)])
    del batch["row_id"]
    return {key: value.to(sizes.device) for key, value in batch.items()}


def make_tokenizer(sizes: Sizes) -> Any:
    """As many entries as the models have ids; nothing is tokenised with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<{number}>": number for number in range(sizes.vocab)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<1>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<2>", pad_token="<2>", unk_token="<1>")


# --------------------------------------------------------------------------------------------------------- the floor


def floor_task(sizes: Sizes) -> Task:
    """The matmuls that 2P and 6P a token and the four of the head stand for, and nothing else; attention is not counted."""
    import torch

    dtype, device = getattr(torch, sizes.dtype), sizes.device
    kv_width = sizes.hidden * sizes.kv_heads // sizes.heads
    h, m, tokens = sizes.hidden, sizes.intermediate, sizes.tokens
    shapes = [(h, h), (h, kv_width), (h, kv_width), (h, h), (h, m), (h, m), (m, h)]
    pairs = [
        (
            torch.randn(tokens, wide, device=device, dtype=dtype),
            torch.randn(out, wide, device=device, dtype=dtype) * 0.02,
        )
        for wide, out in shapes
    ]
    rows = torch.randn(sizes.labelled, h, device=device, dtype=dtype)
    head = torch.randn(sizes.vocab, h, device=device, dtype=dtype)

    def backbone(layers: int, backward: bool) -> None:
        for _ in range(layers):
            for inputs, weight in pairs:
                outputs = torch.mm(inputs, weight.t())
                if backward:
                    torch.mm(outputs, weight)
                    torch.mm(outputs.t(), inputs)

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def step() -> dict[str, float]:
        return {
            "student_seconds": seconds(lambda: backbone(sizes.student_layers, True)),
            "teacher_seconds": seconds(lambda: backbone(sizes.teacher_layers, False)),
            "head_seconds": seconds(lambda: head_matmuls(rows, head, rows, head)),
        }

    return Task(step)


# --------------------------------------------------------------------------------------------------------- the peers


def autocast(sizes: Sizes) -> contextlib.AbstractContextManager[Any]:
    import torch

    return torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.dtype == "bfloat16")


def sft_task(sizes: Sizes) -> Task:
    student, batch = make_model(sizes, sizes.student_layers, 0).train(), padded_batch(sizes)

    def step() -> dict[str, float]:
        with autocast(sizes):
            loss = student(**batch, use_cache=False).loss
        loss.backward()
        return {}

    return Task(step, student.zero_grad)


def logits_task(sizes: Sizes, loss_fn: Callable[..., tuple[Tensor, Tensor]]) -> Task:
    """Logits of both models at every position, then ``loss_fn(student, teacher, labels, T)``."""
    import torch

    (student, teacher), batch = make_models(sizes), padded_batch(sizes)
    labels = batch.pop("labels")

    def step() -> dict[str, float]:
        with autocast(sizes):
            student_logits = student(**batch, use_cache=False).logits
            with torch.no_grad():
                teacher_logits = teacher(**batch, use_cache=False).logits
            loss, kl = loss_fn(student_logits, teacher_logits, labels, sizes.temperature)
            del student_logits, teacher_logits
        loss.backward()
        return {"kl": kl}

    return Task(step, student.zero_grad)


def dense_task(sizes: Sizes) -> Task:
    return logits_task(sizes, lambda *inputs: peers.dense_loss(*inputs, sizes.kd_ratio))


def gkd_task(sizes: Sizes) -> Task:
    return logits_task(sizes, peers.gkd_loss())


def chunked_task(sizes: Sizes) -> Task:
    import torch

    loss_fn = peers.chunked_loss()
    (student, teacher), batch = make_models(sizes), padded_batch(sizes)
    labels = batch.pop("labels")

    def step() -> dict[str, float]:
        with autocast(sizes):
            states = student.model(**batch, use_cache=False).last_hidden_state
            with torch.no_grad():
                teacher_states = teacher.model(**batch, use_cache=False).last_hidden_state
            heads = (student.lm_head.weight, teacher.lm_head.weight)
            loss, kl = loss_fn(states, heads[0], teacher_states, heads[1], labels, sizes.temperature)
        loss.backward()
        return {"kl": kl}

    return Task(step, student.zero_grad)


# --------------------------------------------------------------------------------------------------------------- ours


def cached_teacher(teacher: nn.Module, dataset: Any, tokenizer: Any, folder: str) -> Any:
    """The states of all rows, written as ``dts-hf cache-teacher`` writes them; the backbone is not kept."""
    from pathlib import Path

    from dts_hf.data.chat_templates import get_template
    from dts_hf.teachers.cached.teacher import CachedTeacher
    from dts_hf.teachers.cached.writer import Facts, Rows, make_plan, write_cache
    from dts_hf.teachers.identity import identity_of
    from dts_hf.teachers.live import LiveTeacher

    rows = Rows(dataset, dataset.row_ids)
    plan = make_plan(rows, identity_of(teacher, tokenizer, get_template("plain"), name="benchmark"))
    facts = Facts({}, {"train": dataset.digest}, len(tokenizer))
    write_cache(Path(folder), LiveTeacher(teacher), rows, plan, facts)
    return CachedTeacher(folder)


def ours_task(sizes: Sizes, packing: bool, cached: bool) -> Task:
    """A real trainer's ``training_step``: autocast, ``compute_loss``, backward."""
    import torch
    from transformers import TrainingArguments

    from dts_hf import DistillationTrainer

    student, teacher = make_models(sizes)
    teacher = teacher.to(getattr(torch, sizes.dtype))
    dataset, tokenizer, t = make_dataset(sizes), make_tokenizer(sizes), sizes.temperature
    states = tempfile.TemporaryDirectory()  # as long as the step below is
    if cached:
        teacher = cached_teacher(teacher, dataset, tokenizer, states.name)
    with tempfile.TemporaryDirectory() as folder:  # the Trainer makes it and, in one step, puts nothing there
        trainer = DistillationTrainer(
            student,
            teacher,
            temperature={"name": "dts", "rule": "gap", "t_init": t, "t_min": min(1.0, t), "t_max": t},
            kd_ratio=sizes.kd_ratio,
            args=TrainingArguments(
                folder,
                use_cpu=sizes.device == "cpu",
                bf16=sizes.dtype == "bfloat16",
                per_device_train_batch_size=len(sizes.lengths),
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            packing=packing,
        )
    model = trainer.accelerator.prepare(trainer.model)  # what train() does to it: autocast, wrappers
    trainer.model_wrapped = model
    examples = [*dataset]
    batch = trainer.data_collator(examples)
    labels = torch.tensor(sizes.labelled)
    trainer.temperature.begin_step(0.0)

    def step() -> dict[str, float]:
        began = time.perf_counter()
        # Reading states is in the time of a step, as without workers; the other variants have their batch
        given = trainer.data_collator(examples) if cached else dict(batch)
        waited = time.perf_counter() - began
        trainer.training_step(model, given, num_items_in_batch=labels)
        sums = trainer.sums.step_meter.reduce(trainer.accelerator)  # once a step, as the callback does it
        assert states.name
        return {"kl": sums["kd"] / sums["rows"] / t**2, "data_seconds": waited}

    return Task(step, model.zero_grad)


def build(variant: str, sizes: Sizes) -> Task:
    simple = {FLOOR: floor_task, SFT: sft_task, DENSE: dense_task, GKD: gkd_task, CHUNKED: chunked_task}
    if variant in simple:
        return simple[variant](sizes)
    return ours_task(sizes, packing=variant in (PACKED, CACHED_PACKED), cached=variant in (CACHED, CACHED_PACKED))


# --------------------------------------------------------------------------------------------------------- the report


def run(
    sizes: Sizes,
    rounds: int,
    threads: int,
    variants: Sequence[str] = VARIANTS,
    one_process: bool = False,
    limit: float | None = None,
) -> dict[str, Any]:
    processes = [list(variants)] if one_process else None
    options = {"rounds": rounds, "threads": threads, "device": sizes.device, "processes": processes, "limit": limit}
    numbers, notes = harness.measure(build, variants, sizes, **options)
    floor = None if "failed" in numbers.get(FLOOR, {"failed": "not asked for"}) else numbers[FLOOR]
    work = sizes.gflop()
    if floor:
        rates = ", ".join(f"{part} {work[part] / floor[f'{part}_seconds']:.0f}" for part in work)
        parts = ", ".join(f"{part} {floor[f'{part}_seconds']:.3g} s" for part in work)
        total = sum(work.values())
        notes.append(
            f"The floor is {total:.0f} GFLOP: {parts}; GFLOP/s: {rates}. Cached rows are compared with the floor "
            "without the teacher's backbone."
        )
    waits = [numbers[name] for name in (CACHED, CACHED_PACKED) if "data_seconds" in numbers.get(name, {})]
    if waits:
        shares = " and ".join(f"{found['data_seconds'] / found['seconds']:.1%}" for found in waits)
        notes.append(
            f"Rows with cached states read them from files inside the step, without workers: {shares} of its time."
        )
    rows = []
    for name, found in numbers.items():
        needed = floor["seconds"] if floor else None
        if floor and name in (CACHED, CACHED_PACKED):
            needed = floor["student_seconds"] + floor["head_seconds"]
        rows.append(
            {
                "name": name,
                "label": LABELS[name],
                **found,
                "x_floor": found["seconds"] / needed if needed and name != SFT and "seconds" in found else None,
                "x_sft": render.ratio(numbers, name, SFT),
                "x_trl_gkd": render.ratio(numbers, name, GKD),
                "peak_gb": render.gigabytes(found),
                "memory_x_trl_gkd": render.ratio(numbers, name, GKD, "peak_bytes"),
            }
        )
    shown = {key: value for key, value in asdict(sizes).items() if key != "lengths"}
    setting = {
        **shown,
        "batch": len(sizes.lengths),
        "time": max(total for total, _ in sizes.lengths),
        "tokens": sizes.tokens,
        "labelled": sizes.labelled,
        "threads": threads,
        "rounds": rounds,
    }
    short = {"float32": "fp32", "bfloat16": "bf16"}[sizes.dtype]
    return render.make_report(f"train_step_{short}", setting, [render.make_table("", COLUMNS, rows)], notes)


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all of them")
    found = parser.parse_args(arguments)
    if found.quick:
        found.rounds, found.threads = 1, 1
    return found


def main(arguments: list[str] | None = None) -> None:
    found = read_arguments(arguments)
    sizes = Sizes(found.dtype, device=found.device, **(QUICK if found.quick else {}))
    done = run(sizes, found.rounds, found.threads, found.variants, one_process=found.quick, limit=found.limit)
    render.show(done, found.json)


if __name__ == "__main__":
    main()
