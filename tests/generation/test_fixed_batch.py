"""Decoding in fixed shapes: the text of the growing cache, on a CPU as it is and on a GPU as a CUDA graph."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from dts_hf.generation import engine, fixed_batch
from dts_hf.generation.engine import Generated, GenerationSettings, generate
from dts_hf.generation.fixed_batch import TOKENS_PER_LOOK, FixedBatch
from dts_hf.generation.sampling import NOTHING, ban_repeated_ngrams, repeated_ngrams
from tests.support.families import FAMILIES
from tests.support.prompts import EOS, make_prompts
from tests.support.synchronising import Synchronising
from tests.support.tiny import TINY_VOCAB, tiny_gpt2, tiny_llama


@pytest.fixture(autouse=True)
def _warnings_anew() -> None:
    engine._warn_once.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package says; transformers has words of its own about missing packages."""
    return [record.message for record in caplog.records if record.name.startswith("dts_hf")]


def answers(
    model: PreTrainedModel, prompts: list[list[int]], fixed: bool | None, batch_size: int = 7, **options: Any
) -> list[Generated]:
    settings = GenerationSettings(**{"max_new_tokens": 24, "batch_size": batch_size, **options})
    return generate(model, prompts, settings, eos_token_ids=EOS, pad_token_id=2, fixed_shapes=fixed)


def random_model(kind: Any, config: Any, **more: Any) -> PreTrainedModel:
    shape = {
        "vocab_size": TINY_VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config(**shape, **more)).float().eval()


MODELS: dict[str, Any] = {
    "llama": lambda: tiny_llama(tie=False),
    "gpt2": lambda: tiny_gpt2(tie=False),
    "llama-eager": lambda: tiny_llama(tie=False, attn="eager"),
    "gpt2-eager": lambda: tiny_gpt2(tie=False, attn="eager"),
    "qwen3": lambda: random_model(Qwen3ForCausalLM, Qwen3Config, head_dim=8),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one_batch": {"batch_size": 64},
    "ngrams": {"no_repeat_ngram_size": 2},
    "sampled": {"do_sample": True},
    "nucleus": {"do_sample": True, "top_p": 0.8, "temperature": 2.0},
    "sampled_ngrams": {"do_sample": True, "temperature": 0.7, "no_repeat_ngram_size": 3, "seed": 3},
    "two_tokens": {"max_new_tokens": 2},
    "one_token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_that_of_a_growing_cache(name: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts of 1 to 40 tokens, answers that end anywhere or not at all, a last batch that is not full."""
    model, prompts = MODELS[name](), make_prompts()
    expected = answers(model, prompts, False, **WAYS[way])
    assert answers(model, prompts, True, **WAYS[way]) == expected
    assert not said(caplog)  # it was not done in the other way
    if way == "greedy":
        assert len({len(answer.tokens) for answer in expected}) > 3


def test_a_cpu_decodes_as_before_unless_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(fixed_batch.FixedBatch, "load", lambda self, *args: made.append(1))
    answers(tiny_llama(), make_prompts(3), None)
    assert not made


@pytest.mark.parametrize("name", ["sliding", "mamba"])
def test_what_has_no_columns_goes_on_with_its_own_cache(name: str, caplog: pytest.LogCaptureFixture) -> None:
    if name == "sliding":
        model = random_model(MistralForCausalLM, MistralConfig, sliding_window=8)
    else:
        model = FAMILIES["Mamba"].build()
    prompts = [[token % 60 for token in prompt] for prompt in make_prompts(9, longest=20)]
    assert answers(model, prompts, True) == answers(model, prompts, False)
    assert not said(caplog)


def broken_record(self: FixedBatch) -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def broken_step(self: FixedBatch) -> None:
    self.seen[..., 0] = True  # what only a row without padding may see
    self.positions += 1
    STEP(self)


STEP = FixedBatch._step


@pytest.mark.parametrize(
    ("method", "broken", "words"),
    [
        ("record", broken_record, "RuntimeError: operation not permitted when"),
        ("_step", broken_step, "its logits are"),
    ],
)
def test_what_does_not_work_is_said_once_and_done_in_the_other_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, broken: Any, words: str
) -> None:
    model, prompts = tiny_llama(), make_prompts()
    expected = answers(model, prompts, False, do_sample=True)
    monkeypatch.setattr(FixedBatch, method, broken)
    assert answers(model, prompts, True, do_sample=True) == expected
    assert answers(model, prompts, True, do_sample=True) == expected
    (message,) = said(caplog)
    assert "LlamaForCausalLM is decoded with a growing cache" in message and words in message


def test_the_host_looks_at_the_tokens_once_in_many() -> None:
    """Of one batch: the tokens of the prompt's end, one comparison, and then one look for ``TOKENS_PER_LOOK`` tokens."""
    settings = GenerationSettings(max_new_tokens=2 + 3 * TOKENS_PER_LOOK, batch_size=4, do_sample=True)
    with Synchronising() as counting:
        generate(tiny_llama(), make_prompts(4), settings, eos_token_ids=[], pad_token_id=2, fixed_shapes=True)
    looks = {call: number for call, number in counting.counts.items() if "tensor" not in call}
    decoded = {call: number for call, number in looks.items() if call[0] == "fixed_batch"}
    assert decoded == {("fixed_batch", "advance", "tolist"): 1 + 3}
    # Each forward of the growing cache asks about its mask, but no other does; two choices of a token are its own
    assert looks["engine", "_choose_next", "tolist"] == 2
    assert looks["masking_utils", "_ignore_causal_mask_sdpa", "__bool__"] <= 4


@pytest.mark.parametrize("name", ["llama", "gpt2-eager"])
def test_a_step_that_is_recorded_once_can_be_repeated(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a CUDA graph does it: operations on the tensors that were there, without Python; here recorded by torch.fx."""
    model, prompts, way = MODELS[name](), make_prompts(), WAYS["sampled_ngrams"]
    expected = answers(model, prompts, False, **way)
    replays: list[int] = []

    def record(batch: FixedBatch) -> None:
        def step() -> torch.Tensor:
            batch._step()
            return batch.logits

        recorded = make_fx(step)()

        def replay() -> None:
            batch.logits = recorded()
            replays.append(1)

        batch._graph = SimpleNamespace(replay=replay)

    monkeypatch.setattr(FixedBatch, "record", record)
    assert answers(model, prompts, True, **way) == expected
    assert len(replays) > 24 and not said(caplog)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_low_precision_is_compared_with_its_own_tolerance(how: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(tie=False)
    if how == "weights":
        found = answers(model.bfloat16(), make_prompts(), True)
    else:
        inside: Any = torch.autocast("cpu", torch.bfloat16)(model.forward)
        model.forward = convert_outputs_to_fp32(inside)  # as accelerate does it
        found = answers(model, make_prompts(), True)
    assert len(found) == 30 and not said(caplog)


def test_memory_of_a_batch_is_taken_once() -> None:
    made: list[FixedBatch] = []
    original = FixedBatch.__init__

    def counted(self: FixedBatch, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedBatch, "__init__", counted)
        answers(tiny_llama(), make_prompts(30, longest=40), True)
    (batch,) = made
    assert batch.columns == max(len(prompt) for prompt in make_prompts(30, longest=40)) + 24
    assert all(layer.keys.shape == (7, 2, batch.columns, 8) for layer in batch.cache.layers)  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@examples(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4),
    free=st.integers(0, 4),
)
def test_the_ngram_rule_of_fixed_shapes_bans_the_same_tokens(n: int, rows: list[list[int]], free: int) -> None:
    width, vocabulary = max(map(len, rows)), 4  # token 4 is beyond the head
    history = torch.tensor([[NOTHING] * (width - len(row)) + row for row in rows])
    expected = ban_repeated_ngrams(torch.zeros(len(rows), vocabulary), history, n) == float("-inf")
    longer = torch.cat([history, torch.full((len(rows), free), NOTHING)], dim=1)
    assert torch.equal(repeated_ngrams(longer, torch.tensor([width]), n, vocabulary), expected)


# ------------------------------------------------------------------------------------------------------------ a card


def first_difference(one: Generated, other: Generated) -> int | None:
    tokens = [(*answer.tokens, *([-1] if answer.finished else [])) for answer in (one, other)]
    return next((place for place, pair in enumerate(zip(*tokens)) if pair[0] != pair[1]), None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["greedy", "ngrams", "sampled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_card_gives_the_text_of_a_cpu(name: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """In fp32 without TF32; where a row goes another way, the two best logits lie within 1e-3 of each other."""
    model, prompts, options = MODELS[name](), make_prompts(), WAYS[way]
    expected = answers(model, prompts, False, **options)
    assert not torch.backends.cuda.matmul.allow_tf32
    found = answers(model.cuda(), prompts, None, **options)
    assert not said(caplog)  # recorded, and not given up
    model.cpu()
    apart = [row for row, (one, other) in enumerate(zip(expected, found)) if first_difference(one, other) is not None]
    if way == "sampled":  # the noise is part of the race, and differs in its last bits
        assert len(apart) <= 1
        return
    for row in apart:
        place = first_difference(expected[row], found[row])
        ids = torch.tensor([[*prompts[row], *expected[row].tokens[:place]]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1]
        if options.get("no_repeat_ngram_size"):
            ban_repeated_ngrams(logits, ids, options["no_repeat_ngram_size"])
        best = logits[0].topk(2).values
        assert best[0] - best[1] < 1e-3, f"row {row}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_card_records_in_low_precision_too(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    found = answers(tiny_llama().to(dtype).cuda(), make_prompts(), None)
    assert len(found) == 30 and not said(caplog)
