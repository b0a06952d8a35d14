"""Memory and disk of a distillation, from the shapes of its models alone.

Bytes are per device. The memory model counts tensors: what autograd keeps for the backward pass of a LLaMA or GPT-2
block, what ``DistillationLoss`` allocates, what the optimizer and the sharding strategy hold. It is compared with
measured peaks by ``benchmarks/estimate_check.py``. Sources: ZeRO (Rajbhandari et al. 2020, sections 3 and 5) for what is
divided by the number of devices, Megatron (Korthikanti et al. 2022, section 4) for the way to count activations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dts_hf.loss.chunk_walk import equal_chunks, rows_in_budget
from dts_hf.loss.road import default_budget_mb
from dts_hf.recipe.schema import QUANTIZED_BY, Recipe
from dts_hf.training.model_shape import ModelShape
from dts_hf.training.workload import Plan, Workload, launched_plan

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
#: Sharded in the plan's devices: parameters, gradients, optimizer state.
SHARDS_PARAMETERS = ("zero3", "fsdp2")
SHARDS_GRADIENTS = ("zero2", "zero3", "fsdp2")
SHARDS_OPTIMIZER = ("zero1", "zero2", "zero3", "fsdp2")
#: Tensors [tokens, intermediate] that an MLP without a gate keeps: the function's own, and what the next layer reads.
KEPT_BY_ACTIVATION = {"relu": 1, "gelu": 2, "gelu_pytorch_tanh": 2, "gelu_new": 5, "gelu_fast": 5}
#: fp32 buffers [C, V] beside the logits while the loss of a chunk is computed at once, counted for forward_kl.
BLOCK_BUFFERS = 12
#: nf4 of bitsandbytes: half a byte, and a scale of 4 bytes per 64 weights.
FOUR_BITS = 0.5 + 4 / 64
#: Bytes of one entry while activations become fp8 without ``torch.compile``: three fp32 copies, and the result.
MAKING_FP8 = 13


@dataclass(frozen=True)
class Memory:
    """Bytes per device: what each part takes at most, and ``peak``, the most that they take together.

    The parts take turns (activations go while gradients come), so ``total`` is ``peak`` and may be less than their sum.

    Attributes:
        student: weights, with the copies that the strategy keeps.
        gradients: of the trained weights.
        optimizer: its state and, under DeepSpeed, the fp32 weights.
        teacher: weights, or what is left of them.
        activations: kept by the student for the backward pass, and one block at work.
        loss: chunks of logits, rows of states, gradient of the head.
        buffers: communication buckets and gathered weights.
        beside: rows and tokenizers, where they are in the same memory.
        peak: the largest sum of parts that stand at the same time.
        moment: when that is: ``answers`` (of the student, before the step), ``teacher``, ``loss``, ``backward`` or ``step``.
    """

    student: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    loss: float
    buffers: float
    beside: float
    peak: float
    moment: str

    @property
    def total(self) -> float:
        return self.peak

    def as_dict(self) -> dict[str, Any]:
        """Whole bytes, for JSON."""
        values = {**asdict(self), "total": self.total}
        return {name: round(value) if isinstance(value, float) else value for name, value in values.items()}


def estimate_memory(student: ModelShape, teacher: ModelShape | None, workload: Workload, plan: Plan) -> Memory:
    """Peak memory of one device in training.

    Args:
        student: what is trained.
        teacher: None: there is none, as where ``plan`` says so.
        workload: what the device works on.
        plan: how the work is spread.
    """
    if plan.teacher == "none":
        teacher = None
    trained, types = trained_weights(student, workload), Types.of(workload, plan)
    weights, gradients, optimizer, buffers = _divided(student, workload, plan, types)
    teacher_weights = _teacher_bytes(teacher, workload, plan) + workload.other_teachers
    held = weights + optimizer + buffers + teacher_weights + workload.beside

    carried = 0.0  # gradients that are there before the backward pass begins
    if plan.strategy == "zero3":
        carried = gradients  # a buffer that is never given back
    elif workload.accumulation > 1:
        if plan.strategy == "fsdp2":
            gradients = types.trained * trained  # whole until the last micro-batch: accelerate delays the reduction
        carried = gradients
    kept, working = _activations(student, workload, types)
    loss, left = _loss_bytes(student, teacher, workload, types)
    # The embedding's gradient is made whole beside the head's, although the two are one weight.
    second = types.weight * student.embedding if student.tied and workload.lora_parameters is None else 0
    stepping = types.master * trained / plan.devices  # DeepSpeed: the fp32 gradients of its own share
    if workload.device == "cuda" and workload.optimizer == "adamw_torch":
        stepping += types.trained * trained  # torch's foreach: the root of the second moment, of all weights at once
    # Keys and values of all layers; and a block at work on all prompts at once
    cached = 2 * student.layers * student.kv_width + 3 * student.intermediate + 2 * student.hidden
    answering = types.compute * workload.answered * cached
    moments = {
        "answers": held + (carried if plan.strategy == "zero3" else 0.0) + answering,
        "teacher": held + carried + _teacher_working(teacher, workload, plan),
        "loss": held + carried + kept + loss,
        "backward": held + max(carried + kept + working + left, gradients + second),
        "step": held + gradients + stepping,
    }
    moment = max(moments, key=lambda name: moments[name])
    return Memory(
        student=weights,
        gradients=gradients,
        optimizer=optimizer,
        teacher=teacher_weights,
        activations=kept + working,
        loss=loss,
        buffers=buffers,
        beside=workload.beside,
        peak=moments[moment],
        moment=moment,
    )


# ----------------------------------------------------------------------------------------------- weights and optimizer


@dataclass(frozen=True)
class Types:
    """Bytes of one number.

    Attributes:
        weight: a weight of the student as it is held.
        compute: what meets in a matmul.
        stream: what runs from block to block.
        trained: a trained weight and its gradient; adapters are fp32 (peft makes them so).
        master: the fp32 weights that DeepSpeed's step works on, also where the model is fp32; else 0.
    """

    weight: int
    compute: int
    stream: int
    trained: int
    master: int

    @classmethod
    def of(cls, workload: Workload, plan: Plan) -> Types:
        """What ``plan`` makes of the types that ``workload`` asks for."""
        weight = stream = BYTES[workload.student_dtype]
        compute = BYTES[workload.autocast] if workload.autocast else weight
        deepspeed = plan.strategy.startswith("zero")
        if deepspeed:
            weight = stream = compute  # it casts the model itself
        elif plan.strategy == "fsdp2":
            stream = compute  # it casts what it gathers,
            weight = 4 if workload.autocast else weight  # and accelerate holds fp32 for that
        adapters = workload.lora_parameters is not None and not deepspeed
        return cls(weight, compute, stream, 4 if adapters else weight, 4 if deepspeed else 0)

    @property
    def casts(self) -> bool:
        """Autocast: every matmul reads copies."""
        return self.compute != self.stream


def _divided(student: ModelShape, workload: Workload, plan: Plan, types: Types) -> tuple[float, float, float, float]:
    """Bytes of (weights, gradients, optimizer, buffers): what the strategy divides, and what that costs."""
    trained, adapters = trained_weights(student, workload), workload.lora_parameters or 0
    weights: float = types.weight * student.parameters + types.trained * adapters
    gradients: float = types.trained * trained
    optimizer: float = (_state_bytes(workload, types) + types.master) * trained
    buffers = 0.0
    if plan.strategy in SHARDS_OPTIMIZER:
        optimizer /= plan.devices
    if plan.strategy in SHARDS_GRADIENTS:
        gradients /= plan.devices
    if plan.strategy in SHARDS_PARAMETERS:
        weights /= plan.devices
        buffers += types.compute * _gathered(student, plan)
    if plan.strategy == "ddp":
        buffers += gradients  # its buckets are a second copy
    elif types.master:
        bucket = student.hidden**2 if plan.bucket is None else plan.bucket
        # Allocated whole, whatever the model; a CPU gives only the pages that are written to.
        buffers += types.trained * (min(bucket, trained) if workload.device == "cpu" else bucket)
    return weights, gradients, optimizer, buffers


def trained_weights(student: ModelShape, workload: Workload) -> int:
    """How many weights the optimizer moves: all, or those of the adapters."""
    return student.parameters if workload.lora_parameters is None else workload.lora_parameters


def _state_bytes(workload: Workload, types: Types) -> float:
    """Optimizer state of one trained weight."""
    name = workload.optimizer
    if name.startswith(("sgd", "adafactor")):  # Adafactor keeps a row and a column of each matrix
        return 0.0
    if "8bit" in name:
        return 2.0
    per_moment = types.master or types.trained
    return per_moment if name.startswith(("lion", "adagrad", "rmsprop")) else 2.0 * per_moment


def _gathered(shape: ModelShape, plan: Plan) -> float:
    """Weights that are whole at one time: head and two blocks; DeepSpeed keeps more of them if it may."""
    needed = shape.head + 2 * shape.block_weights
    if plan.strategy != "zero3":
        return needed
    return min(max(needed, shape.parameters // 10 if plan.live is None else plan.live), shape.parameters)


def teacher_weights(shape: ModelShape, recipe: Recipe, devices: int) -> float:
    """Bytes of the weights of the one teacher of ``recipe`` on one of so many devices.

    Args:
        shape: of the teacher.
        recipe: has no other one.
        devices: that it may be sharded over.
    """
    work = Workload(rows=1, tokens=1, labelled=1, teacher_dtype=recipe.required_teacher.dtype)
    return _teacher_bytes(shape, work, launched_plan(recipe, devices))


def _teacher_bytes(teacher: ModelShape | None, workload: Workload, plan: Plan) -> float:
    if teacher is None:
        return 0.0
    itemsize = BYTES[workload.teacher_dtype]
    if plan.teacher == "shared":
        return workload.running_mean
    if plan.teacher == "cached":
        return itemsize * teacher.head
    if plan.teacher in QUANTIZED_BY:  # embedding and head stay as they are
        packed = FOUR_BITS if plan.teacher == "4bit" else 1.0 + 4 / teacher.hidden  # a scale for each row of a weight
        return packed * teacher.backbone + itemsize * (teacher.parameters - teacher.backbone)
    if plan.teacher == "sharded":
        return itemsize * (teacher.parameters / plan.devices + teacher.head + 2 * teacher.block_weights)
    return itemsize * teacher.parameters


# --------------------------------------------------------------------------------------------------------- activations


def _activations(student: ModelShape, workload: Workload, types: Types) -> tuple[float, float]:
    """(kept for the backward pass, what it works with beside them)."""
    tokens = workload.rows * workload.tokens
    block = tokens * kept_by_block(student, workload, types)
    working = tokens * types.compute * (3 * student.intermediate + 2 * student.hidden)
    ends = tokens * 3 * student.hidden * types.stream  # final norm, and the states that the loss is given
    # Autocast keeps the cast copy of every weight until the end of the forward pass; then the graph does.
    copies = types.compute * student.backbone if types.casts else 0
    if (
        workload.rounded
    ):  # the graph keeps a block's rounded weights, and what they were before they were clamped, in fp32
        block, copies = block + (4 + types.compute) * student.block_weights, 0
    if workload.gradient_checkpointing:
        return student.layers * tokens * student.hidden * types.stream + ends + copies, block + working
    return student.layers * block + ends + copies, working


def kept_by_block(shape: ModelShape, workload: Workload, types: Types | None = None) -> float:
    """Bytes that autograd keeps of one token in one block; ``tests/training/test_memory_estimate.py`` counts them."""
    types = types or Types.of(workload, Plan())
    hidden, inner, query = shape.hidden, shape.intermediate, shape.query_width
    lora = workload.lora_parameters is not None
    # RMSNorm computes in fp32: its input, and the normalised input for the gradient of its weight.
    norm = hidden * (4 + (0 if lora else types.stream)) if shape.rms_norm else hidden * types.stream
    # What linear layers read. Autocast, and adapters in fp32 on weights that are not, make a copy for each of them.
    if types.casts:
        readers, inputs = (5 if shape.gated else 4), types.compute
    elif lora and types.trained != types.stream:
        readers, inputs = (6 if shape.gated else 5), types.trained
    else:
        readers, inputs = 2, types.compute
    linear = readers * hidden * inputs
    attention = 4 * query * types.compute  # keys and values are repeated for every head
    # The mask, or the outputs of the rows, which are joined
    attention += query * types.compute if workload.attention == "packed" else workload.tokens * types.stream
    kept = 4 if shape.gated else KEPT_BY_ACTIVATION.get(shape.activation, 2)
    mlp = inner * ((kept - 1) * types.compute + inputs)  # the last is what the next linear layer reads
    return 2 * norm + linear + attention + mlp + (2 * hidden if shape.dropout else 0)


def _teacher_working(teacher: ModelShape | None, workload: Workload, plan: Plan) -> float:
    """A block of the teacher at work; nothing is kept."""
    if teacher is None or plan.teacher == "cached":
        return 0.0
    itemsize, tokens = BYTES[workload.teacher_dtype], workload.rows * (workload.teacher_tokens or workload.tokens)
    working: float = tokens * itemsize * (3 * teacher.intermediate + 3 * teacher.hidden)
    if plan.teacher == "int8":  # a weight in the type of the matmul, for its length
        working += itemsize * teacher.intermediate * teacher.hidden
    elif plan.teacher == "fp8":
        working += MAKING_FP8 * tokens * teacher.intermediate
    return working


def _loss_bytes(
    student: ModelShape, teacher: ModelShape | None, workload: Workload, types: Types
) -> tuple[float, float]:
    """(at its peak, what is left of it for the backward pass); see ``dts_hf.loss.chunk_walk``."""
    rows, size, head = max(workload.labelled, 1), types.compute, student.head
    chunk, (of_student, of_teacher) = chunk_rows(workload, student.vocab, size), _logit_bytes(workload, size)
    entries = chunk * student.vocab
    logits = entries * (of_student + (0 if teacher is None else of_teacher))
    states = rows * 2 * student.hidden * types.stream  # the labelled rows and their gradient
    states += 0 if teacher is None else rows * teacher.hidden * BYTES[workload.teacher_dtype]
    several, learns = chunk < rows, workload.lora_parameters is None
    if not learns:
        at_work = left = 0
    elif size == 4:
        at_work = left = 4 * head
    else:  # the sum over chunks is fp32, as GPUs leave it; on a CPU two more in the matmul's type stand beside it
        at_work = 4 * head if workload.device == "cuda" else (4 + 2 * size if several else size) * head
        left = 4 * head if types.stream == 4 else (4 + size) * head
    further = (workload.teachers - 1) * left  # each has its own gradient of the head, until autograd adds them up
    at_work, left = at_work + further, left + further
    if types.casts:
        at_work += size * head
    if size < of_student:  # g for the matmuls, which otherwise lies over the student's logits
        at_work += size * entries
        if workload.device == "cpu":
            at_work += size * head  # oneDNN brings the weight into an order of its own
    # On a CPU blocks of 512 KiB; on a GPU, without the kernels, the whole chunk: softmax, entropies and gradients of both
    blocks = 0 if workload.device == "cpu" or workload.fused else BLOCK_BUFFERS * 4 * entries
    return logits + states + max(at_work, blocks + (4 * head if learns else 0)), states + left


def _logit_bytes(workload: Workload, compute: int) -> tuple[int, int]:
    """Of one logit of the student and of the teacher, as the loss keeps them."""
    if not workload.fused or workload.logits_dtype == "float32":
        return 4, 4
    return compute, BYTES[workload.teacher_dtype]


def chunk_rows(workload: Workload, vocab: int, compute: int = 4) -> int:
    """C, the rows of a chunk of the loss: what fits into the budget; in the kernels cut into equal chunks.

    Args:
        workload: says how many rows have a label, and what the budget is.
        vocab: V.
        compute: bytes of a number in the matmuls.
    """
    rows, budget = max(workload.labelled, 1), workload.logits_budget_mb
    budget = default_budget_mb(workload.fused) if budget is None else budget
    limit = rows_in_budget(budget, vocab, max(_logit_bytes(workload, compute)))
    return equal_chunks(rows, limit) if workload.fused else min(rows, limit)


# ---------------------------------------------------------------------------------------------------------------- disk


def disk_needed(student: ModelShape, workload: Workload, plan: Plan, checkpoints: int | None = 2) -> float:
    """Bytes of the run directory: its checkpoints and the final student.

    Args:
        student: what is saved.
        workload: says in which types.
        plan: a strategy may keep weights twice.
        checkpoints: ``save_total_limit``, or how many are written without one. One more is counted, because an old one
            is deleted only after the new one is complete.
    """
    types, trained = Types.of(workload, plan), trained_weights(student, workload)
    weights = types.weight * student.parameters
    saved = weights if workload.lora_parameters is None else types.trained * trained
    one = saved + workload.running_mean + (_state_bytes(workload, types) + types.master) * trained
    if types.master:  # DeepSpeed keeps the model in its own form as well
        one += weights
    if plan.strategy == "fsdp2":  # and accelerate, where checkpoints are whole (fsdp_state_dict_type)
        one += saved
    return (0 if not checkpoints else checkpoints + 1) * one + weights
