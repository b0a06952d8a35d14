"""Attention of packed rows on a GPU: which kernel, with which arguments, and whether it is proved before it is used.

No kernel of a GPU runs on a CPU, so they are stood in for by functions that compute the reference from exactly the arguments
that they get. What is marked ``gpu`` runs the kernels themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask
from transformers import Gemma2Config, Gemma2ForCausalLM

from dts_hf.errors import UserError
from dts_hf.models import packed_kernels
from dts_hf.models.packed_attention import EAGER_NAME, NAME, cu_seqlens_mask, packed_attention
from dts_hf.models.packed_kernels import BLOCK, Ask, Gpu, attend, block_mask, choose
from dts_hf.models.packing_check import check_packing, why_wrong
from tests.support.packing import (
    LENGTHS,
    bloom,
    build,
    mistral,
    packed_inputs,
    rows_alone,
    states_and_gradient,
    without_dropout,
)
from tests.support.tiny import tiny_gpt2, tiny_llama

HOPPER, CPU, CUDA = Gpu((9, 0), True), torch.device("cpu"), torch.device("cuda")
ROWS = [150, 1, 30, 97, 5]


def gemma2() -> Any:
    options = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4}
    caps = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
    return build(Gemma2ForCausalLM, Gemma2Config, **options, **caps)


# ----------------------------------------------------------------------------------------------------------- which one

BF16 = Ask("cuda", torch.bfloat16, 8, 2, 64, 64)
TABLE = {
    "bf16": (BF16, HOPPER, "varlen"),
    "fp16 on an A100": (BF16._replace(dtype=torch.float16), Gpu((8, 0), True), "varlen"),
    "a window": (BF16._replace(window=128), HOPPER, "varlen"),
    "dropout": (BF16._replace(dropout=0.1), HOPPER, "varlen"),
    "head of 256": (BF16._replace(width=256, value_width=256), HOPPER, "varlen"),
    "head of 256 on a 4090": (BF16._replace(width=256, value_width=256), Gpu((8, 9), True), "flex"),
    "the same without gradient": (BF16._replace(width=256, value_width=256, gradient=False), Gpu((8, 9), True), "varlen"),
    "torch without flash": (BF16, Gpu((9, 0), False), "flash"),
    "soft-cap": (BF16._replace(softcap=50.0), HOPPER, "flash"),
    "soft-cap and dropout": (BF16._replace(softcap=50.0, dropout=0.1), HOPPER, "flash"),
    "fp32": (BF16._replace(dtype=torch.float32), HOPPER, "flex"),
    "fp32, dropout": (BF16._replace(dtype=torch.float32, dropout=0.1), HOPPER, "rows"),
    "fp32, soft-cap": (BF16._replace(dtype=torch.float32, softcap=50.0), HOPPER, "flex"),
    "a T4": (BF16._replace(dtype=torch.float16), Gpu((7, 5), True), "flex"),
    "odd head": (BF16._replace(width=20, value_width=20), HOPPER, "flex"),
    "odd head, dropout": (BF16._replace(width=20, value_width=20, dropout=0.1), HOPPER, "rows"),
    "narrow head": (BF16._replace(width=12, value_width=12), HOPPER, "rows"),
    "wide head": (BF16._replace(width=512, value_width=512), HOPPER, "flex"),
    "other width of values": (BF16._replace(width=192, value_width=128), HOPPER, "flex"),
    "a CPU": (BF16._replace(device="cpu"), None, "rows"),
}  # fmt: skip
#: What takes the place of the package where it is not installed.
WITHOUT_FLASH = {"torch without flash": "flex", "soft-cap": "flex", "soft-cap and dropout": "rows"}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("flash", [True, False])
def test_the_kernel_is_chosen_by_what_is_asked(case: str, flash: bool) -> None:
    ask, gpu, expected = TABLE[case]
    asked = []
    chosen = choose(ask, gpu, lambda: bool(asked.append(1)) or flash)  # type: ignore[func-returns-value]
    assert chosen == (expected if flash else WITHOUT_FLASH.get(case, expected))
    assert bool(asked) == (case in WITHOUT_FLASH)  # nothing is fetched that is not needed


# ------------------------------------------------------------------------------------------------- what the host knows


def test_the_mask_tells_the_longest_row_by_its_shape() -> None:
    mask = cu_seqlens_mask(ROWS)
    assert mask.dtype == torch.int32 and mask.shape == (1, 1, 2, 6) and mask[0, 0, 0].is_contiguous()
    assert mask[0, 0].tolist() == [[0, 150, 151, 181, 278, 283]] * 2
    assert cu_seqlens_mask([128]).shape == (1, 1, 1, 2) and cu_seqlens_mask([3, 129]).shape == (1, 1, 2, 3)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("window", [None, 7])
def test_nothing_waits_for_the_device(dropout: float, window: int | None) -> None:
    """Fake tensors have no values: torch's own functions take these arguments, and nobody reads a number from the device."""
    ask = Ask("meta", torch.bfloat16, 6, 2, 64, 64, None, dropout, None, window)
    with FakeTensorMode():
        mask = torch.empty(1, 1, 2, 6, dtype=torch.int32, device="meta")
        states = [
            torch.empty(1, heads, 283, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
            for heads in (6, 2, 2)
        ]
        output = attend("varlen", ask, *states, mask)  # type: ignore[call-arg]
        assert output.shape == (1, 283, 6, 64)
        output.sum().backward()
        assert all(part.grad is not None and part.grad.shape == part.shape for part in states)
        assert block_mask(mask[0, 0, 0], 283, window).shape == (1, 1, 283, 283)


# ---------------------------------------------------------------------------------------------------- FlexAttention


def allowed(lengths: list[int], window: int | None) -> Tensor:
    """Who sees whom, pair by pair: bool ``[T, T]``."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(row))[:, None] - torch.arange(len(row))
    near = (distance >= 0) & (distance < (window or len(row)))
    return near & (row[:, None] == row)


@pytest.mark.parametrize("window", [None, 1, 3, 100, 128, 129, 200, 1000])
@pytest.mark.parametrize(
    "lengths", [[1], [128], [256, 128], [129, 1, 1, 300], [5] * 60, [700], [64, 64, 200, 56, 400, 3], [1] * 130]
)
def test_the_block_mask_is_the_one_that_torch_finds_in_all_pairs(lengths: list[int], window: int | None) -> None:
    tokens = sum(lengths)
    ours = block_mask(cu_seqlens_mask(lengths)[0, 0, 0], tokens, window)
    pairs = allowed(lengths, window)
    place = torch.arange(tokens)
    assert torch.equal(ours.mask_mod(None, None, place[:, None], place[None]), pairs)
    theirs = create_block_mask(lambda _b, _h, q, k: pairs[q, k], None, None, tokens, tokens, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        blocks = (
            getattr(ours, name.replace("num_blocks", "indices")),
            getattr(theirs, name.replace("num_blocks", "indices")),
        )
        for count, *lines in zip(getattr(ours, name)[0, 0], *(table[0, 0] for table in blocks), strict=True):
            assert torch.equal(lines[0][:count], lines[1][:count]), name
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE == (BLOCK, BLOCK)


ASKS = {
    "plain": Ask("cpu", torch.float64, 4, 4, 16, 16),
    "grouped": Ask("cpu", torch.float64, 4, 2, 16, 16, 0.3),
    "three to one": Ask("cpu", torch.float64, 9, 3, 16, 16),
    "window": Ask("cpu", torch.float64, 4, 2, 16, 16, window=20),
    "soft-cap": Ask("cpu", torch.float64, 4, 2, 16, 16, 0.5, softcap=1.5),
    "soft-cap and window": Ask("cpu", torch.float64, 4, 2, 16, 16, softcap=0.7, window=40),
    "values of another width": Ask("cpu", torch.float64, 4, 2, 24, 16),
}


def states_of(ask: Ask, tokens: int = sum(ROWS)) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(1)
    heads = ((ask.heads, ask.width), (ask.key_heads, ask.width), (ask.key_heads, ask.value_width))
    return [
        torch.randn(1, count, tokens, width, dtype=ask.dtype, generator=numbers, requires_grad=True)
        for count, width in heads
    ]


def dense(ask: Ask, states: list[Tensor]) -> Tensor:
    """The whole matrix of scores, by the textbook."""
    query, key, value = states
    groups = ask.heads // ask.key_heads
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (ask.scaling or ask.width**-0.5)
    scores = scores if ask.softcap is None else ask.softcap * torch.tanh(scores / ask.softcap)
    weights = scores.masked_fill(~allowed(ROWS, ask.window), -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def outputs_and_gradients(run: Callable[[list[Tensor]], Tensor], states: list[Tensor]) -> list[Tensor]:
    output = run(states)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), states)]


@pytest.mark.parametrize("case", ASKS)
@pytest.mark.parametrize("kernel", ["rows", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU it is meant
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch 2.13's own Dynamo asks
def test_rows_and_flex_equal_the_whole_matrix(kernel: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        flex_module, "_validate_device", lambda *_: None
    )  # it refuses gradients on a CPU, and has them
    ask, states, mask = ASKS[case], states_of(ASKS[case]), cu_seqlens_mask(ROWS)
    expected = outputs_and_gradients(lambda parts: dense(ask, parts), states)
    given = outputs_and_gradients(lambda parts: attend(kernel, ask, *parts, mask), states)  # type: ignore[call-arg]
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 if kernel == "flex" else 1e-10)


@pytest.mark.soak
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated"
)  # torch 2.13's compiler imports what warns
def test_compiled_flex_reads_the_block_mask_as_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler FlexAttention looks at every pair; a compiled one skips the blocks that the table leaves out."""
    lengths = [300, 1, 30, 500, 5, 129]
    mask = cu_seqlens_mask(lengths)
    monkeypatch.setattr(flex_module, "flex_attention", torch.compile(flex_module.flex_attention))
    for window, softcap in ((None, None), (70, None), (None, 3.0), (200, 2.0)):
        ask = Ask("cpu", torch.float32, 4, 2, 32, 32, 0.2, 0.0, softcap, window, gradient=False)
        states = [part.detach() for part in states_of(ask, sum(lengths))]
        given, expected = (attend(kernel, ask, *states, mask) for kernel in ("flex", "rows"))  # type: ignore[call-arg, arg-type]
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_what_is_made_for_a_batch_is_made_once_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = packed_kernels.block_mask
    monkeypatch.setattr(packed_kernels, "block_mask", lambda *args: made.append(args[2]) or real(*args))
    mask = cu_seqlens_mask(ROWS)
    first = [packed_kernels._block_mask(mask, 283, window) for window in (None, 4, None, 4)]
    assert made == [None, 4] and first[0] is first[2] and first[1] is first[3]
    assert packed_kernels._lengths(mask) is packed_kernels._lengths(mask) == ROWS
    held = len(packed_kernels._OF_BATCH)
    del mask
    assert len(packed_kernels._OF_BATCH) == held - 1


# ------------------------------------------------------------------------------ varlen_attn and flash-attention, stood in


def flash_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None,
    window: tuple[int, int], softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """What flash-attention computes from its arguments: ``[T, heads, width]``, states not grouped to query heads.

    A query at i sees keys from i - window[0] to i + window[1] of its row, both ends included; -1 is no end.
    """
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1 and isinstance(longest, (int, torch.SymInt))
    assert query.shape[2] == key.shape[2] == value.shape[2] and query.stride(2) == 1
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    place = torch.arange(query.shape[0])
    row = torch.searchsorted(cu_seqlens, place.int(), right=True)
    distance = place[:, None] - place
    left, right = window
    sees = row[:, None] == row
    sees = sees if left < 0 else sees & (distance <= left)
    sees = sees if right < 0 else sees & (-distance <= right)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[2] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, -torch.inf).softmax(-1), value)


class StandIns:
    """Torch's doors to the kernel, by the release that has them; ``calls`` names those that were taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, release: str) -> None:
        self.calls: list[str] = []
        options = {"2.9": (), "2.10": ("is_causal",), "2.11": ("scale", "window_size"),
                   "2.12": ("scale", "window_size", "enable_gqa")}[release]  # fmt: skip

        def varlen_attn(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            cu_seq_q: Tensor,
            cu_seq_k: Tensor,
            max_q: int,
            max_k: int,
            **told: Any,
        ) -> Tensor:
            assert told.keys() <= set(options), "this release does not know that"
            assert query.shape[1] == key.shape[1] or told.get("enable_gqa")
            assert cu_seq_q is cu_seq_k and max_q == max_k
            self.calls.append("varlen_attn")
            return flash_reference(query, key, value, cu_seq_q, max_q, told["scale"], told["window_size"])

        def forward(
            query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int,
            dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
            window_size_left: int | None = None, window_size_right: int | None = None,
        ) -> tuple[Tensor]:  # fmt: skip
            assert is_causal and not return_debug_mask and cum_seq_q is cum_seq_k and max_q == max_k
            assert window_size_left is not None and window_size_right == 0
            self.calls.append(f"aten {dropout_p}")
            return (flash_reference(query, key, value, cum_seq_q, max_q, scale, (window_size_left, 0)),)

        monkeypatch.setattr(packed_kernels, "varlen_attn", None if release == "2.9" else varlen_attn)
        monkeypatch.setattr(packed_kernels, "VARLEN_OPTIONS", frozenset(options))
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)


HALF = {name: ask for name, ask in ASKS.items() if ask.softcap is None and ask.width == ask.value_width}


@pytest.mark.parametrize("case", HALF)
@pytest.mark.parametrize("release", ["2.9", "2.10", "2.11", "2.12"])
def test_varlen_is_told_what_is_asked(release: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = StandIns(monkeypatch, release)
    ask, states, mask = ASKS[case], states_of(ASKS[case]), cu_seqlens_mask(ROWS)
    expected = outputs_and_gradients(lambda parts: dense(ask, parts), states)
    given = outputs_and_gradients(lambda parts: attend("varlen", ask, *parts, mask), states)  # type: ignore[call-arg]
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    through_the_door = release == "2.12" or (release == "2.11" and ask.heads == ask.key_heads)
    assert stand_ins.calls == ["varlen_attn" if through_the_door else "aten 0.0"]
    attend("varlen", ask._replace(dropout=0.25), *states, mask)  # type: ignore[call-arg]
    assert stand_ins.calls[1:] == ["aten 0.25"]  # never dropped in silence


@pytest.mark.parametrize("case", [name for name in ASKS if ASKS[name].width == ASKS[name].value_width])
def test_flash_attention_is_told_what_is_asked(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dropouts = []

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float, softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
    ) -> Tensor:  # fmt: skip
        dropouts.append(dropout_p)
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == 256
        return flash_reference(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, (window_size[0], 0), softcap)

    monkeypatch.setattr(packed_kernels, "_FLASH", [flash_attn_varlen_func])
    ask, states, mask = ASKS[case], states_of(ASKS[case]), cu_seqlens_mask(ROWS)
    expected = outputs_and_gradients(lambda parts: dense(ask, parts), states)
    given = outputs_and_gradients(lambda parts: attend("flash", ask, *parts, mask), states)  # type: ignore[call-arg]
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    attend("flash", ask._replace(dropout=0.25), *states, mask)  # type: ignore[call-arg]
    assert dropouts == [0.0, 0.25]


def test_a_flash_attention_that_cannot_be_loaded_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, loaded in (
        (False, None),
        (True, OSError("no network")),
        (True, lambda q, k, v: q),
    ):  # the last is too old

        def load(name: str, loaded: Any = loaded) -> Any:
            assert name == "flash_attention_2"
            if isinstance(loaded, Exception):
                raise loaded
            return ((None, loaded), ())

        monkeypatch.setattr(packed_kernels, "_FLASH", [])
        monkeypatch.setattr(packed_kernels, "is_flash_attn_2_available", lambda found=found, **_: found)
        monkeypatch.setattr(packed_kernels, "lazy_import_flash_attention", load)
        assert not packed_kernels.has_flash() and packed_kernels._FLASH == [None]


def test_under_autocast_the_kernels_get_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings leave queries and keys in fp32 beside values in bf16."""
    StandIns(monkeypatch, "2.12")
    seen: list[Ask] = []
    monkeypatch.setattr(packed_kernels, "gpu_of", lambda device: HOPPER)
    monkeypatch.setattr(packed_kernels, "choose", lambda ask, *_: seen.append(ask) or "varlen")
    query, key, value = (part.float() for part in states_of(ASKS["grouped"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = packed_attention(torch.nn.Module(), query, key, value.bfloat16(), cu_seqlens_mask(ROWS))
    assert seen[0].dtype == output.dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, mistral])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_are_each_row_alone_through_varlen(
    make: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIns(monkeypatch, "2.12")
    model = make().double()
    without_dropout(model)
    inputs = packed_inputs()
    alone = rows_alone(inputs)
    expected, expected_grad = states_and_gradient(model, alone)
    model.set_attn_implementation(NAME)
    monkeypatch.setattr(packed_kernels, "choose", lambda *_: "varlen")
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.config.attn_pdrop = 0.0
        for module in model.modules():
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.0
    together, grad = states_and_gradient(model, [inputs])
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9)


def test_a_layer_is_compiled_as_one_graph_whatever_the_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for the first batch, one for rows of up to 128 tokens, one for any: choice and boundaries are in it."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        return flash_reference(query, key, value, cu_seq_q, max_q, scale, window_size)

    monkeypatch.setattr(packed_kernels, "varlen_attn", varlen_attn)
    monkeypatch.setattr(packed_kernels, "gpu_of", lambda device: HOPPER)
    as_bf16 = lambda ask, gpu, has_flash: choose(ask._replace(dtype=torch.bfloat16), gpu, has_flash)  # noqa: E731
    monkeypatch.setattr(packed_kernels, "choose", as_bf16)
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    module = torch.nn.Module()
    layer = torch.compile(lambda *states: packed_attention(module, *states)[0], backend=backend, fullgraph=True)
    ask = ASKS["grouped"]._replace(dtype=torch.float32)
    for lengths in ([20, 30], [40, 50, 60], [200, 7, 90, 300], [129, 1], [900, 3, 4, 5, 6]):
        states = states_of(ask, sum(lengths))
        mask = cu_seqlens_mask(lengths)
        torch.testing.assert_close(layer(*states, mask), attend("rows", ask._replace(scaling=None), *states, mask))
    assert len(graphs) <= 3
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ proved before it is used


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Ask]]:
    """As if there were an H100; what is to be proved on it is noted, and believed."""
    proved: list[tuple[str, Ask]] = []
    monkeypatch.setattr(packed_kernels, "gpu_of", lambda device: HOPPER if device.type == "cuda" else None)
    monkeypatch.setattr(packed_kernels, "has_flash", lambda: False)
    monkeypatch.setattr(
        "dts_hf.models.packing_check.why_wrong", lambda kernel, ask, device: proved.append((kernel, ask)) or ""
    )
    return proved


def test_the_kernels_of_training_are_proved_on_the_card(card: list[tuple[str, Ask]]) -> None:
    """In the dtype of autocast, with dropout where the student has it, while the model is on the CPU still."""
    model = tiny_llama()
    assert check_packing(model, device=CUDA, autocast=torch.bfloat16)
    assert model.config._attn_implementation == NAME and not model.training
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    width = model.config.head_dim
    assert [kernel for kernel, _ in card] == ["varlen" if width % 8 == 0 else "rows"]
    assert card[0][1] == Ask("cuda", torch.bfloat16, *heads, width, width, width**-0.5)
    card.clear()
    student = tiny_gpt2()
    student.config.attn_pdrop = 0.3
    for block in student.transformer.h:
        block.attn.attn_dropout.p = 0.3
    random = torch.get_rng_state()
    assert check_packing(student, device=CUDA, autocast=torch.bfloat16)
    assert sorted(ask.dropout for _, ask in card) == [0.0, 0.3] and torch.equal(torch.get_rng_state(), random)
    card.clear()
    assert check_packing(student.bfloat16().requires_grad_(False), device=CUDA)  # a teacher
    assert [(kernel, ask.dropout, ask.dtype, ask.gradient) for kernel, ask in card] == [
        ("varlen", 0.0, torch.bfloat16, False)
    ]


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_what_no_kernel_knows_is_refused(name: str) -> None:
    states = states_of(ASKS["plain"])
    with pytest.raises(ValueError, match=f"does not know the layers' {name}"):
        packed_attention(torch.nn.Module(), *states, cu_seqlens_mask(ROWS), **{name: torch.zeros(4)})


def test_a_family_with_a_soft_cap_is_switched_and_elsewhere_unchanged(card: list[tuple[str, Ask]]) -> None:
    model = gemma2()
    assert model.config._attn_implementation == "eager"
    inputs = {"input_ids": torch.arange(3, 43).view(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.int64)}
    inputs["attention_mask"][0, 15:] = 0
    packed = packed_inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        alone = torch.cat([model(input_ids=ids).logits for ids in packed["input_ids"].split(LENGTHS, dim=1)], dim=1)
    answer = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    assert check_packing(model, device=CUDA, autocast=torch.bfloat16)
    assert model.config._attn_implementation == EAGER_NAME
    assert {(kernel, ask.softcap) for kernel, ask in card} == {("flex", 2.0)}
    assert {ask.window for _, ask in card} == {4, None}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
        torch.testing.assert_close(model(**packed, use_cache=False).logits, alone, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), answer)
    assert check_packing(model, device=CUDA)  # once more, as a second trainer does


WARNED = {
    "eager by choice": (tiny_llama, {}, "eager", "its attention is eager"),
    "batches of others": (tiny_llama, {"own_mask": False}, "sdpa", "its batches carry position_ids alone"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_a_dense_mask_on_a_card_is_never_taken_in_silence(
    case: str, card: list[tuple[str, Ask]], caplog: pytest.LogCaptureFixture
) -> None:
    make, options, attention, reason = WARNED[case]
    model = make()
    model.set_attn_implementation(attention)
    with caplog.at_level(logging.WARNING):
        assert check_packing(model, "the student", device=CUDA, **options) is False
    (record,) = caplog.records
    assert f"the student ({type(model).__name__})" in record.getMessage() and reason in record.getMessage()
    assert model.config._attn_implementation == attention and not card
    caplog.clear()
    assert (
        check_packing(model, "the student", **options) is (attention == "sdpa" and not options) and not caplog.records
    )  # a CPU says nothing


def test_a_kernel_that_fails_its_proof_leaves_the_dense_mask_and_says_so(
    card: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "dts_hf.models.packing_check.why_wrong", lambda *_: "cannot be used: RuntimeError: no kernel image"
    )
    model = tiny_llama()
    assert check_packing(model, device=CUDA, autocast=torch.bfloat16) is False
    assert (
        "cannot be used: RuntimeError: no kernel image" in caplog.text and model.config._attn_implementation == "sdpa"
    )


def test_a_family_that_ignores_boundaries_is_refused_on_a_card_too(card: Any) -> None:
    with pytest.raises(UserError, match="does not keep packed rows apart"):
        check_packing(bloom(), device=CUDA)


def test_the_proof_finds_what_a_kernel_may_get_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Ask("cpu", torch.float32, 4, 2, 16, 16, 0.4, window=70)
    real = packed_kernels._rows

    def kernel(change: Callable[[Ask, Tensor], tuple[Ask, Tensor]]) -> Any:
        def run(ask: Ask, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            ask, mask = change(ask, mask)
            return real(ask, *(part.transpose(0, 1)[None] for part in (query, key, value)), mask)[0]  # type: ignore[arg-type]

        return run

    def broken(ask: Ask, mask: Tensor) -> tuple[Ask, Tensor]:
        raise RuntimeError("no kernel image is available\nfor this device")

    faults = {
        "": lambda ask, mask: (ask, mask),
        "does not give what attention row by row gives": lambda ask, mask: (ask._replace(window=ask.window + 1), mask),
        "gives": lambda ask, mask: (ask._replace(scaling=None), mask),
        "lets a row see the one before it": lambda ask, mask: (ask, cu_seqlens_mask([int(mask.max())])),
        "cannot be used: RuntimeError: no kernel image is available": broken,
    }
    for says, change in faults.items():
        monkeypatch.setattr(packed_kernels, "_varlen", kernel(change))
        found = why_wrong("varlen", ask, CPU)
        assert found == says or (says and says in found), (says, found)
    monkeypatch.setattr(packed_kernels, "_varlen", kernel(faults["lets a row see the one before it"]))
    assert why_wrong("varlen", ask._replace(dropout=0.1), CPU) == "lets a row see the one before it"
    monkeypatch.setattr(packed_kernels, "_varlen", kernel(faults[""]))
    assert why_wrong("varlen", ask._replace(dropout=0.1), CPU) == ""


# ---------------------------------------------------------------------------------------------------------- on a card

ON_A_CARD = {
    "varlen": Ask("cuda", torch.bfloat16, 9, 3, 64, 64),
    "varlen, alone heads": Ask("cuda", torch.float16, 4, 4, 128, 128, 0.1),
    "varlen, window": Ask("cuda", torch.bfloat16, 8, 2, 64, 64, window=33),
    "varlen, dropout": Ask("cuda", torch.bfloat16, 8, 2, 64, 64, dropout=0.2),
    "flex": Ask("cuda", torch.float32, 9, 3, 64, 64),
    "flex, window": Ask("cuda", torch.float32, 8, 2, 64, 64, window=33),
    "flex, soft-cap": Ask("cuda", torch.bfloat16, 8, 4, 64, 64, softcap=5.0),
    "flex, odd head": Ask("cuda", torch.bfloat16, 4, 4, 20, 20),
    "flash, soft-cap": Ask("cuda", torch.bfloat16, 8, 4, 64, 64, softcap=5.0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_CARD)
def test_the_kernels_themselves(case: str) -> None:
    kernel, ask = case.split(",", maxsplit=1)[0], ON_A_CARD[case]
    if kernel == "flash" and not packed_kernels.has_flash():
        pytest.skip("neither flash-attn nor the kernels package is here")
    assert choose(ask, packed_kernels.gpu_of(CUDA), packed_kernels.has_flash) in (kernel, "flash")
    assert why_wrong(kernel, ask, CUDA) == ""  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, mistral, gemma2])
def test_models_on_the_card_keep_rows_apart(make: Any, autocast: torch.dtype | None) -> None:
    model = make().cuda()
    with torch.autocast("cuda", dtype=autocast or torch.bfloat16, enabled=autocast is not None), torch.no_grad():
        inputs = {name: value.cuda() for name, value in packed_inputs().items()}
        alone = torch.cat([model(input_ids=ids).logits for ids in inputs["input_ids"].split(LENGTHS, dim=1)], dim=1)
        assert check_packing(model, device=CUDA, autocast=autocast)
        packed = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(packed.float(), alone.float(), rtol=0, atol=1e-3 if autocast is None else 0.1)


@pytest.mark.gpu
def test_a_packed_forward_never_waits_for_the_card() -> None:
    model = tiny_llama().cuda().bfloat16()
    assert check_packing(model, device=CUDA)
    inputs = {name: value.cuda() for name, value in packed_inputs().items()}
    model(**inputs, use_cache=False).logits.float().sum().backward()  # the first time compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs, use_cache=False).logits.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
