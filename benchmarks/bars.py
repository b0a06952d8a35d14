"""The figures that have a limit: what is asked of them, and whether the results meet it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Reports = dict[str, dict[str, Any]]
_LIVE, _CACHED = ("packed", "padded"), ("cached_packed", "cached_padded")
#: Ours, packed; the better of the two counts.
_PACKED = ("packed", "packed_compiled")


class Figure(NamedTuple):
    """A measured number and its limit; ``least``: it must be at least that, else at most."""

    text: str
    value: float
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def line(self) -> str:
        # As many digits of a small number as of a large one
        value, limit = (f"{number:.2f}" if number >= 0.1 else f"{number:.1e}" for number in (self.value, self.limit))
        return f"| {self.text} | {value} | {'≥' if self.least else '≤'} {limit} | {'yes' if self.met else '**no**'} |"


def head_limit(machine: str) -> float:
    """Where the matmuls are faster (AMX), the same elementwise work is a larger part."""
    return 1.6 if "amx_bf16" in machine else 1.35


def _rows(reports: Reports, result: str, table: int = 0) -> list[dict[str, Any]]:
    found = reports.get(result, {}).get("tables", [])
    return found[table]["rows"] if table < len(found) else []


def _pick(rows: Iterable[dict[str, Any]], names: Sequence[str], key: str) -> tuple[float, str] | None:
    """The smallest ``key`` among the rows of these names, and whose it is."""
    found = [(row[key], row["name"]) for row in rows if row["name"] in names and row.get(key) is not None]
    return min(found, default=None)


def _step(reports: Reports, result: str, names: Sequence[str], key: str, peer: str, limit: float) -> list[Figure]:
    found = _pick(_rows(reports, result), names, key)
    words = result.removeprefix("cuda_").removeprefix("train_").replace("_", " ")
    return [Figure(f"{words}, {found[1]} / {peer}", found[0], limit)] if found else []


def cpu_figures(reports: Reports) -> list[Figure]:
    """Of ``loss_head`` and the two ``train_step``."""
    figures = []
    for name in _LIVE:
        figures += _step(reports, "train_step_fp32", [name], "x_trl_gkd", "TRL GKD", 0.55)
    figures += _step(reports, "train_step_fp32", ["packed"], "x_sft", "HF's SFT", 0.95)
    figures += _step(reports, "train_step_fp32", ["padded"], "x_sft", "HF's SFT", 1.10)
    for name in _CACHED:
        figures += _step(reports, "train_step_fp32", [name], "x_sft", "HF's SFT", 0.60)
    for name in _LIVE:
        figures += _step(reports, "train_step_fp32", [name], "memory_x_trl_gkd", "TRL GKD, peak memory", 0.35)
    for name in _LIVE:
        figures += _step(reports, "train_step_bf16", [name], "x_trl_gkd", "TRL GKD", 0.75)
    figures += _step(reports, "train_step_bf16", ["packed"], "x_sft", "HF's SFT", 0.95)
    for name in _CACHED:
        figures += _step(reports, "train_step_bf16", [name], "x_sft", "HF's SFT", 0.92)
    head = _pick(_rows(reports, "loss_head"), ["dts_hf"], "x_floor")
    if head:
        machine = reports["loss_head"].get("environment", {}).get("machine", "")
        figures.append(Figure("loss head fp32 / the four matmuls", head[0], head_limit(machine)))
    figures += _dearest(reports, "catalogue", (1.4, 1.15))
    by_vocab, by_rows = ([row for row in _rows(reports, "sweep", n) if "peak_x_first" in row] for n in (0, 1))
    if len(by_vocab) > 1:
        growth = max(row["peak_x_first"] / row["size_x_first"] for row in by_vocab[1:])
        figures.append(Figure("loss, growth of peak memory / growth of V", growth, 1.1))
    if len(by_rows) > 1:
        spread = max(row["peak_x_first"] for row in by_rows)
        text = f"loss, growth of peak memory when N grows {by_rows[-1]['size_x_first']:g} x"
        figures.append(Figure(text, spread, 1.1))
    return figures


def _dearest(reports: Reports, result: str, limits: tuple[float, float]) -> list[Figure]:
    figures = []
    for number, (word, base) in enumerate((("divergence", "forward_kl"), ("policy", "constant"))):
        costs = [
            (row["x_base"], row["name"])
            for row in _rows(reports, result, number)
            if row["name"] != base and row.get("x_base") is not None
        ]
        if costs:
            cost, name = max(costs)
            where = "GPU, " if result.startswith("cuda") else ""
            figures.append(Figure(f"{where}dearest {word} ({name}) / {base}", cost, limits[number]))
    return figures


def cuda_figures(reports: Reports) -> list[Figure]:
    """Of an H100-class card."""
    figures = []
    for table in reports.get("cuda_loss_sizes", {}).get("tables", []):
        title, rows = table["title"], table["rows"]
        ours = _pick(rows, ["ours_1024"], "x_floor")
        if ours is None:
            continue
        limit = 1.9 if title.startswith("H 576,") else 1.4 if "V 151,936" in title else 1.25
        figures.append(Figure(f"GPU, loss head, {title}, 1 GiB / the four matmuls", ours[0], limit))
        for peer in ("trl_chunked", "liger_chunked", "liger_triton"):
            theirs = _pick(rows, [peer], "x_floor")
            if theirs:
                figures.append(Figure(f"GPU, loss head, {title}, 1 GiB / {peer}", ours[0] / theirs[0], 1.0))
        error = _pick(rows, ["ours_1024"], "dw_error")
        if error:
            figures.append(Figure(f"GPU, loss head, {title}, error of dW", error[0], 6e-4))
    figures += _dearest(reports, "cuda_catalogue", (1.3, 1.35))
    for shape, limit in (("gpt2", 0.75), ("8b", 0.75), ("135m", 0.85)):
        figures += _step(reports, f"cuda_step_{shape}", _PACKED, "x_padded", "padded", limit)
        figures += _step(
            reports, f"cuda_step_{shape}", _PACKED, "memory_x_trl_chunked", "TRL chunked, peak memory", 1.0
        )
    figures += _step(reports, "cuda_step_8b", _PACKED, "x_trl_gkd", "TRL GKD", 0.65)
    figures += _step(reports, "cuda_step_8b", _PACKED, "x_trl_chunked", "TRL chunked", 0.75)
    figures += _step(reports, "cuda_step_135m", _PACKED, "x_sft", "HF's SFT", 1.25)
    rate = _pick(_rows(reports, "cuda_generation"), ["dts_hf"], "x_generate")
    if rate:
        figures.append(Figure("GPU, generation, tokens a second / model.generate", rate[0], 4.0, least=True))
    return figures


def table(figures: Sequence[Figure]) -> str:
    """The figures, as far as they were measured."""
    lines = [figure.line() for figure in figures]
    return "\n".join(["| figure | measured | limit | met |", "|---|---:|---:|---|", *lines])
