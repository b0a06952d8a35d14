"""Compile the launches of the loss for cards that are not here; the job is JSON, and so is what is printed."""

from __future__ import annotations

import json
import sys
from typing import Any

import kernel_report  # benchmarks/
import torch

from dts_hf.divergences import build_divergence
from dts_hf.loss import kernels
from dts_hf.loss.fused_rows import FusedRows
from dts_hf.loss.row_loss import LossSettings
from dts_hf.models.head import Head
from dts_hf.temperature import build_temperature


def launches(job: dict[str, Any]) -> list[Any]:
    """What the loss would launch for ``cases`` (divergence, policy), without doubles.

    Args:
        job: ``cases``; ``vocab``; ``dtypes`` of student and teacher; ``capped``: whether both heads soft-cap.
    """
    found: dict[str, Any] = {}
    dtypes = [getattr(torch, name) for name in job["dtypes"]]
    for divergence, policy in job["cases"]:

        def note(kernel: Any, arguments: Any, keywords: dict[str, Any]) -> None:
            name = f"{kernel.fn.__name__} ({divergence}, {policy})"  # noqa: B023
            read = sum(dtype.itemsize for dtype in dtypes)
            variant = kernel_report.Variant.of_launch(name, kernel, arguments, keywords, read)
            found.setdefault(variant.key, variant)

        temperature = build_temperature(policy)
        temperature.begin_step(0.5)
        if policy == "adakd":  # its second step on, when rows have their own T
            temperature.log_median = -1.0
        settings = LossSettings(build_divergence(divergence), temperature, 0.5, scaled=True, logits_budget_mb=256.0)
        head = Head(torch.empty(job["vocab"], 1), None, 0.5, 30.0) if job["capped"] else Head(torch.empty(job["vocab"], 1))
        z_s, z_t = (torch.zeros(16, job["vocab"], dtype=dtype) for dtype in dtypes)
        with kernel_report.recorded(kernels, note):
            rows = FusedRows(settings, head=head, teacher_head=head, has_teacher=True, with_grad=True,
                             math_dtype=torch.float32, device=torch.device("cpu"))  # fmt: skip
            rows.run(z_s, z_t, torch.ones(16, dtype=torch.int64), torch.ones(16), z_s)
    return list(found.values())


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps([kernel_report.measure(one, arch) for one in launches(given) for arch in given["archs"]]))
