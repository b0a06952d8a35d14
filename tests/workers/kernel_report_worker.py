"""Compile the launches of the loss for cards that are not here; the job is JSON, and so is what is printed."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import kernel_report  # benchmarks/
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dts_hf.divergences import build_divergence
from dts_hf.loss import kernels
from dts_hf.loss.fused_rows import FusedRows
from dts_hf.loss.row_loss import LossSettings
from dts_hf.models.head import Head
from dts_hf.temperature import build_temperature


def launches(job: dict[str, Any]) -> list[Any]:
    """What the loss would launch for ``cases`` (divergence, policy), without doubles.

    Args:
        job: ``cases``; ``vocab``; ``dtypes`` of student and teacher; ``capped``: whether both heads soft-cap;
            ``pitched``: whether every row begins at a multiple of 64 entries, as ``ChunkWalk`` has it; ``rows``: C, one
            or several.
    """
    found: dict[str, Any] = {}
    dtypes = [getattr(torch, name) for name in job["dtypes"]]
    for divergence, policy in job["cases"]:

        def note(kernel: Any, arguments: Any, keywords: dict[str, Any]) -> None:
            name = f"{kernel.fn.__name__} ({divergence}, {policy})"  # noqa: B023
            read = sum(dtype.itemsize for dtype in dtypes)
            variant = kernel_report.Variant.of_launch(name, kernel, arguments, keywords, read=read)
            found.setdefault(variant.key, variant)

        temperature = build_temperature(policy)
        temperature.begin_step(0.5)
        if policy == "adakd":  # its second step on, when rows have their own T
            temperature.log_median = -1.0
        settings = LossSettings(build_divergence(divergence), temperature, 0.5, scaled=True, logits_budget_mb=256.0)
        head = (
            Head(torch.empty(job["vocab"], 1), None, 0.5, 30.0)
            if job["capped"]
            else Head(torch.empty(job["vocab"], 1))
        )
        pitch = -(-job["vocab"] // 64) * 64 if job["pitched"] else job["vocab"]
        for count in job.get("rows", [16]):
            z_s, z_t = (torch.zeros(count, pitch, dtype=dtype)[:, : job["vocab"]] for dtype in dtypes)
            targets = torch.ones(count + 1, dtype=torch.int64)[count % 2 :][:count]  # aligned where C is even
            with kernel_report.recorded(kernels, note):
                rows = FusedRows(settings, head=head, teacher_head=head, has_teacher=True, with_grad=True,
                                 math_dtype=torch.float32, device=torch.device("cpu"))  # fmt: skip
                rows.run(z_s, z_t, targets, torch.ones(count), z_s)
    return list(found.values())


def examined(variant: Any, arch: int) -> dict[str, Any]:
    """As ``kernel_report`` has it, and ``wide``: how often a thread loads 16 bytes, wherever that is.

    The report's main part is a loop, and that of the gradient's is the rest of a row.
    """
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, variant.attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options).asm["ptx"]
    return {**kernel_report.measure(variant, arch), "wide": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps([examined(one, arch) for one in launches(given) for arch in given["archs"]]))
