"""What the compiler makes of the loss's Triton kernels, without a GPU: registers, spills, widths of loads, instructions.

    python benchmarks/kernel_report.py                       the launches of forward KL under a constant T
    python benchmarks/kernel_report.py --divergences forward_kl jsd --policies constant max_logit --vocab 50257
    python benchmarks/kernel_report.py --toy                 one small kernel, to see that it runs

Every launch that the loss would make is recorded on a CPU (``recorded``) and compiled ahead of time for each architecture;
``cuobjdump`` and ``nvdisasm`` come with Triton. Nothing is run, so **nothing here is a measurement**. The last columns are
lower bounds for one H100, from three sides of which the largest counts: warp instructions that can be issued, results of
the unit that does exponentials, and bytes against the rate of a copy. Stalls, latencies and the tail of a grid come on top.

Other kernels: give ``report`` a list of ``Variant``, made by hand (kernel, signature, constexprs, attributes, options) or by
``Variant.of_launch`` from the arguments of a launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import render
from render import Column

ARCHITECTURES = (80, 90, 100)
#: H100 SXM: multiprocessors, their schedulers (one warp instruction a cycle each), results of the special function unit a
#: cycle and multiprocessor, cycles a second at boost; bytes a second of a copy as measured (the memory's peak is 3.35e12).
SMS, SCHEDULERS, SPECIAL, HERTZ, COPY = 132, 4, 16, 1.755e9, 2.96e12
REGISTERS, MOST_WARPS = 65536, 64
_LABEL = re.compile(r"^(\.L_[\w.$]+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WIDTHS = {"64": 8, "128": 16, "256": 32, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
COLUMNS = (
    Column("name", "kernel", None),
    Column("arch", "sm", 0),
    Column("warps", "warps", 0),
    Column("registers", "registers", 0),
    Column("resident", "resident warps", 0),
    Column("spills", "spilled bytes", 0),
    Column("shared", "shared bytes", 0),
    Column("loads", "global loads of the main part", None),
    Column("instructions", "instructions / entry", 1),
    Column("special", "MUFU / entry", 2),
    Column("bytes", "bytes / entry", 0),
    Column("issue_ps", "issue, ps / entry", 3),
    Column("special_ps", "MUFU, ps / entry", 3),
    Column("bytes_ps", "bytes, ps / entry", 3),
    Column("bound", "at least", None),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled.

    Attributes:
        name: how it is shown.
        kernel: the ``triton.jit`` function.
        signature: by argument: ``*bf16``, ``i32``, ``fp32`` or ``constexpr``.
        constexprs: values of constants, by argument or by its place.
        attributes: by place, such as ``{(0,): [["tt.divisibility", 16]]}``.
        options: ``num_warps`` and the like.
        read: bytes that one entry of the vocabulary costs, read.
        written: likewise, written.
        entry: bytes of one logit.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attributes: dict[Any, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    read: int = 4
    written: int = 0
    entry: int = 2

    @classmethod
    def of_launch(
        cls, name: str, kernel: Any, arguments: Sequence[Any], keywords: dict[str, Any], **bytes_of_entry: int
    ) -> Variant:
        """As a launch with these arguments would be specialised: alignment of pointers, numbers divisible by 16, or 1."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", 90, 32))
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialised, options = bind(*arguments, **keywords)
        _, signature, constexprs, attributes = kernel._pack_args(backend, dict(keywords), bound, specialised, options)
        meta = {key: value for key, value in keywords.items() if key not in signature}
        return cls(name, kernel, signature, constexprs, attributes, meta, **bytes_of_entry)

    @property
    def key(self) -> str:
        """What makes two launches the same compiled kernel."""
        return repr((str(self.kernel), self.signature, self.constexprs, self.attributes, self.options))


# ------------------------------------------------------------------------------------------------ machine code, read


@dataclasses.dataclass
class Instruction:
    address: int
    opcode: str
    operands: str


def tool(name: str) -> str:
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__path__[0]) / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(cubin: Path) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in their order, and the address of every label."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in _run(tool("nvdisasm"), "-c", str(cubin)).splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif parts := _INSTRUCTION.match(line):
            found.append(Instruction(int(parts[1], 16), parts[2], parts[3]))
            labels |= dict.fromkeys(waiting, found[-1].address)
            waiting.clear()
    return found, labels


def load_bytes(instruction: Instruction) -> int:
    """Bytes that a thread loads from global memory; 0: it does not."""
    if not instruction.opcode.startswith(("LDG", "LDGSTS")):
        return 0
    return next((_WIDTHS[word] for word in instruction.opcode.split(".") if word in _WIDTHS), 4)


def bytes_of_logits(part: list[Instruction], entry: int) -> int:
    """What a thread loads of both models' logits: by vectors, or entry by entry. (All else are numbers of the row.)"""
    widths = [load_bytes(one) for one in part]
    vectors = sum(width for width in widths if width >= 16)
    return vectors or sum(width for width in widths if width == entry)


def main_part(found: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The loop that loads most, the tightest of equal ones; without a loop that loads, everything up to the last EXIT."""
    best: list[Instruction] = []
    for jump in found:
        target = re.search(r"`\((\.L_[\w.$]+)\)", jump.operands) if jump.opcode.startswith("BRA") else None
        if target is None or labels.get(target[1], jump.address + 1) > jump.address:
            continue
        body = [one for one in found if labels[target[1]] <= one.address <= jump.address]
        rank = (sum(map(load_bytes, body)), -len(body))
        if rank[0] and (not best or rank > (sum(map(load_bytes, best)), -len(best))):
            best = body
    if best:
        return best
    last = max((place for place, one in enumerate(found) if one.opcode.startswith("EXIT")), default=len(found))
    return found[: last + 1]


def resources(cubin: Path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of the one function."""
    text = _run(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}


# ---------------------------------------------------------------------------------------------------------- one row


def resident_warps(registers: int) -> int:
    """Warps of one multiprocessor that so many registers leave room for (blocks and shared memory not counted)."""
    of_warp = -(-registers * 32 // 256) * 256
    return min(MOST_WARPS, REGISTERS // of_warp // 4 * 4)


def measure(variant: Variant, arch: int) -> dict[str, Any]:
    """Compile for one architecture and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, variant.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        used = resources(cubin)
        part = main_part(*disassemble(cubin))
    loads: dict[str, int] = {}
    for one in part:
        if load_bytes(one):
            loads[one.opcode] = loads.get(one.opcode, 0) + 1
    entries = bytes_of_logits(part, variant.entry) / variant.read  # of one thread
    row: dict[str, Any] = {
        "name": variant.name, "arch": arch, "warps": compiled.metadata.num_warps, "registers": used["REG"],
        "resident": resident_warps(used["REG"]), "spills": used.get("STACK", 0) + used.get("LOCAL", 0),
        "shared": compiled.metadata.shared, "loads": ", ".join(f"{count} x {name}" for name, count in loads.items()),
        "bytes": variant.read + variant.written,
    }  # fmt: skip
    if entries:
        row["instructions"] = len(part) / entries
        row["special"] = sum(one.opcode.startswith("MUFU") for one in part) / entries
    if entries and arch == 90:
        sides = {
            "issue": row["instructions"] / (SMS * SCHEDULERS * 32 * HERTZ),
            "special": row["special"] / (SMS * SPECIAL * HERTZ),
            "bytes": row["bytes"] / COPY,
        }
        row |= {f"{side}_ps": seconds * 1e12 for side, seconds in sides.items()}
        side = max(sides, key=lambda name: sides[name])
        row["bound"] = f"{sides[side] * 8192 * 49152 * 1e3:.2f} ms ({side})"
    return row


def report(variants: Sequence[Variant], architectures: Sequence[int]) -> dict[str, Any]:
    """The table of all variants; one that does not compile is a row that says so."""
    import triton

    rows = []
    for variant in variants:
        for arch in architectures:
            try:
                rows.append(measure(variant, arch))
            except Exception as error:
                text = " ".join(str(error).split())[-200:]
                rows.append({"name": variant.name, "arch": arch, "failed": f"{type(error).__name__}: {text}"})
    notes = [
        f"Compiled with Triton {triton.__version__}, not run. The bounds are arithmetic for an H100 ({SMS} multiprocessors, "
        f"{HERTZ / 1e9:g} GHz, copy {COPY / 1e12:g} TB/s), for 8,192 x 49,152 entries: an estimate, no measurement."
    ]
    setting = {"device": "none", "variants": len(variants)}
    found = render.make_report("kernel_report", setting, [render.make_table("", COLUMNS, rows)], notes)
    found["environment"]["done"] = "Compiled, not run,"
    return found


# ------------------------------------------------------------------------------------------- the loss's own launches


class _Recorder:
    """Stands in for a kernel: a launch is noted and not made."""

    def __init__(self, kernel: Any, note: Callable[[Any, Sequence[Any], dict[str, Any]], None]) -> None:
        self.kernel, self.note = kernel, note

    def __getitem__(self, _grid: Any) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.note(self.kernel, arguments, keywords)


@contextmanager
def recorded(module: Any, note: Callable[[Any, Sequence[Any], dict[str, Any]], None]) -> Iterator[None]:
    """Note the launches of every kernel of ``module`` (the functions called ``..._kernel``) instead of making them."""
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, note))
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def loss_variants(
    divergences: Sequence[str], policies: Sequence[str], vocab: int, dtype: str, pitch: int = 1
) -> list[Variant]:
    """What the loss would launch for a chunk of 16 rows, without doubles.

    Args:
        divergences: their names.
        policies: their names.
        vocab: V.
        dtype: of the logits.
        pitch: entries that the distance of two rows is a multiple of; 8 of 2 bytes let every row begin at 16 bytes.
    """
    import torch

    from dts_hf.divergences import build_divergence
    from dts_hf.loss import kernels
    from dts_hf.loss.fused_rows import FusedRows
    from dts_hf.loss.row_loss import LossSettings
    from dts_hf.models.head import Head
    from dts_hf.temperature import build_temperature

    found: dict[str, Variant] = {}
    size = getattr(torch, dtype).itemsize
    for divergence in divergences:
        for policy in policies:

            def note(kernel: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> None:
                name = kernel.fn.__name__
                words = [word for word in ("AT_ONE", "AT_T", "MOMENTS", "SLOPES", "SCALE_FREE") if keywords.get(word)]
                title = f"{name.removesuffix('_kernel')} {'+'.join(words).lower()} ({divergence}, {policy})"  # noqa: B023
                moved = {"read": 2 * size, "written": size if name.startswith("gradient") else 0, "entry": size}
                variant = Variant.of_launch(title, kernel, arguments, keywords, **moved)
                found.setdefault(variant.key, variant)

            temperature = build_temperature(policy)
            temperature.begin_step(0.5)
            settings = LossSettings(build_divergence(divergence), temperature, 0.5, scaled=True, logits_budget_mb=256)
            head = Head(torch.empty(vocab, 1))
            width = -(-vocab // pitch) * pitch
            z_s, z_t = (torch.zeros(16, width, dtype=getattr(torch, dtype))[:, :vocab] for _ in range(2))
            common = {
                "has_teacher": True,
                "with_grad": True,
                "math_dtype": torch.float32,
                "device": torch.device("cpu"),
            }
            with recorded(kernels, note):
                rows = FusedRows(settings, head=head, teacher_head=head, **common)
                rows.run(z_s, z_t, torch.ones(16, dtype=torch.int64), torch.ones(16), z_s)
    return list(found.values())


def toy_variants() -> list[Variant]:
    """An online log-sum-exp of a row, the smallest thing that has a loop."""
    import triton
    import triton.language as tl

    @triton.jit
    def log_sum_exp(logits, out, V, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        top = tl.full([BLOCK], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + offsets, mask=offsets < V, other=-1e20).to(tl.float32)
            higher = tl.maximum(top, x)
            total = total * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        best = tl.max(top, 0)
        tl.store(out + row, best + tl.log(tl.sum(total * tl.exp(top - best), 0)))

    signature = {"logits": "*bf16", "out": "*fp32", "V": "i32", "BLOCK": "constexpr"}
    aligned = {(0,): [["tt.divisibility", 16]], (2,): [["tt.divisibility", 16]]}
    one = Variant("toy, V divisible by 16", log_sum_exp, signature, {(3,): 1024}, aligned, {"num_warps": 4}, read=2)
    return [one, dataclasses.replace(one, name="toy, any V", attributes={})]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergences", nargs="+", default=["forward_kl"])
    parser.add_argument("--policies", nargs="+", default=["constant"])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the logits"
    )
    parser.add_argument("--pitch", type=int, default=1, help="distance of two rows: a multiple of so many entries")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="architectures (default: 80 90 100)")
    parser.add_argument("--toy", action="store_true", help="one small kernel instead of the loss's")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    found = parser.parse_args(given)
    sizes = (found.divergences, found.policies, found.vocab, found.dtype, found.pitch)
    variants = toy_variants() if found.toy else loss_variants(*sizes)
    render.show(report(variants, found.sm), found.json)


if __name__ == "__main__":
    main()
