"""What docs/scale.md says beside memory: ordinary memory, traffic and the floor of time, from the shapes of the models.

``dts-hf doctor`` needs none of it: it loads the models and takes three steps.
"""

from __future__ import annotations

from dts_hf.recipe.schema import QUANTIZED_BY
from dts_hf.training.memory_estimate import BYTES, Types, trained_weights
from dts_hf.training.model_shape import ModelShape
from dts_hf.training.workload import Plan, Workload


def estimate_host(
    student: ModelShape,
    teacher: ModelShape | None,
    workload: Workload,
    plan: Plan,
    *,
    per_node: int = 8,
    stored_dtype: str = "bfloat16",
    teacher_stored_dtype: str | None = None,
) -> float:
    """Bytes of ordinary memory that the processes of one node need while the models are loaded.

    Every process loads both models whole. Weights that keep the type of their file stay in it (mapped: the page cache
    holds them once for all processes, and may drop them); weights that change type are a copy in every process. Before
    they divide the student, DeepSpeed casts it to the type of its matmuls, and under autocast accelerate's FSDP2 casts
    trained weights to fp32: here too, not on the GPU, and in every process. A quantised teacher goes to the GPU
    tensor by tensor.

    Args:
        per_node: processes of a node.
        stored_dtype: of the student's files.
        teacher_stored_dtype: of the teacher's files; None: as the student's.
    """
    processes = min(per_node, plan.devices)
    loaded = workload.student_dtype
    mapped = BYTES[loaded] * student.parameters if loaded == stored_dtype else 0
    copied = 0 if mapped else BYTES[loaded] * student.parameters
    if plan.strategy.startswith("zero") and workload.autocast not in (None, loaded):
        copied = max(copied, BYTES[str(workload.autocast)] * student.parameters)
    elif plan.strategy == "fsdp2" and workload.autocast and loaded != "float32" and workload.lora_parameters is None:
        copied = 4 * student.parameters
    if teacher is not None and plan.teacher not in ("none", "cached"):
        stored = teacher_stored_dtype or stored_dtype
        if plan.teacher in QUANTIZED_BY or workload.teacher_dtype == stored:
            mapped += BYTES[stored] * teacher.parameters
        else:
            copied += BYTES[workload.teacher_dtype] * teacher.parameters
    return float(mapped + processes * copied)


def estimate_communication(student: ModelShape, teacher: ModelShape | None, workload: Workload, plan: Plan) -> float:
    """Bytes that one device sends in one optimizer step, with ring collectives.

    An all-gather or a reduce-scatter of S bytes costs S (D - 1) / D, an all-reduce twice that. ZeRO-1 and 2 reduce their
    gradients by all-reduce, as DeepSpeed does unless ``use_multi_rank_bucket_allreduce`` is off, and gather the updated
    weights. ZeRO-2 and 3 reduce after every micro-batch, ZeRO-3 and FSDP2 gather the weights for its forward and again
    for its backward pass.
    """
    if plan.devices == 1:
        return 0.0
    types, trained = Types.of(workload, plan), trained_weights(student, workload)
    share, times = (plan.devices - 1) / plan.devices, workload.accumulation
    updated = types.trained * trained * share
    gradients = (
        types.compute * trained * share if plan.strategy == "fsdp2" else updated
    )  # it reduces what it computed in
    gathered = types.compute * student.parameters * share
    sent = {
        "single": 0.0,
        "ddp": 2 * gradients,
        "zero1": 2 * gradients + updated,
        "zero2": times * 2 * gradients + updated,
        "zero3": times * (2 * gathered + gradients),
        "fsdp2": times * 2 * gathered + gradients,
    }[plan.strategy]
    if teacher is not None and plan.teacher == "sharded":
        sent += times * BYTES[workload.teacher_dtype] * teacher.parameters * share
    return sent


def flops(student: ModelShape, teacher: ModelShape | None, workload: Workload, plan: Plan) -> dict[str, float]:
    """Floating-point operations of one device in one optimizer step, by part.

    2P a token for a forward pass, 6P for forward and backward (4P with frozen weights), 2P more with gradient
    checkpointing; the heads cost 2HV a labelled row and matmul. Causal attention is counted where rows are not packed
    (the lengths of packed rows are not known here).
    """
    tokens = workload.rows * workload.tokens * workload.accumulation
    labelled = workload.labelled * workload.accumulation
    frozen = workload.lora_parameters is not None

    length = 0 if workload.attention == "packed" else workload.tokens

    def forward(shape: ModelShape) -> float:
        return tokens * (2 * shape.backbone + 2 * shape.layers * shape.query_width * length)

    passes = (2 if frozen else 3) + (1 if workload.gradient_checkpointing else 0)
    parts = {
        "student": passes * forward(student),
        "teacher": 0.0,
        "head": (2 if frozen else 3) * 2.0 * labelled * student.head,
    }
    if teacher is not None and plan.teacher != "none":
        parts["head"] += 2.0 * labelled * teacher.head
        if plan.teacher != "cached":
            parts["teacher"] = forward(teacher)
    return parts


def floor_seconds(
    student: ModelShape, teacher: ModelShape | None, workload: Workload, plan: Plan, flops_per_second: float
) -> float:
    """Seconds of one optimizer step if nothing but the matmuls took time, at ``flops_per_second`` per device."""
    return sum(flops(student, teacher, workload, plan).values()) / flops_per_second
