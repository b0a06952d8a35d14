"""Generation against ``model.generate`` one prompt at a time; seeds, random states and modes."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.generation import NoRepeatNGramLogitsProcessor

from dts_hf.errors import UserError
from dts_hf.generation.engine import Generated, GenerationSettings, generate, stop_token_ids
from dts_hf.generation.sampling import NOTHING, ban_repeated_ngrams, gumbel_noise, nucleus
from tests.support.daily import one_in
from tests.support.families import FAMILIES
from tests.support.prompts import EOS, make_prompts
from tests.support.tiny import TINY_VOCAB, tiny_gpt2, tiny_llama

LIMIT = 24


def answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], batch_size: int, **options: object
) -> list[Generated]:
    row_keys = options.pop("row_keys", None)
    settings = GenerationSettings(**{"max_new_tokens": LIMIT, "batch_size": batch_size, **options})
    return generate(model, prompts, settings, eos_token_ids=EOS, pad_token_id=2, row_keys=row_keys)


def one_by_one(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], ngram: int, limit: int = LIMIT
) -> list[Generated]:
    """The same with ``model.generate``, each prompt alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            no_repeat_ngram_size=ngram,
            eos_token_id=EOS,
            pad_token_id=2,
        )
        tokens = output[0, len(prompt) :].tolist()
        finished = tokens[-1] in EOS
        found.append(Generated(tokens[:-1], True, tokens[-1]) if finished else Generated(tokens, False))
    return found


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-tied": lambda: tiny_llama(tie=True),
    "llama-untied": lambda: tiny_llama(tie=False),
    "gpt2-tied": lambda: tiny_gpt2(tie=True),
    "gpt2-untied": lambda: tiny_gpt2(tie=False),
    "llama-eager": lambda: tiny_llama(tie=False, attn="eager"),
}


@functools.cache
def references(name: str, ngram: int) -> list[Generated]:
    return one_by_one(MODELS[name](), make_prompts(), ngram)


@pytest.mark.parametrize("ngram", [0, 3])
@pytest.mark.parametrize("batch_size", one_in(3, [7, 1, 32]))
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_generate_one_by_one(name: str, batch_size: int, ngram: int) -> None:
    prompts = make_prompts()
    model = MODELS[name]()
    expected = references(name, ngram)
    assert answers(model, prompts, batch_size, no_repeat_ngram_size=ngram) == expected
    order = random.Random(batch_size).sample(range(len(prompts)), len(prompts))
    shuffled = answers(model, [prompts[i] for i in order], batch_size, no_repeat_ngram_size=ngram)
    assert shuffled == [expected[i] for i in order]


def test_the_prompts_above_end_at_many_lengths() -> None:
    lengths = {len(answer.tokens) for answer in references("llama-untied", 0)}
    assert len(lengths) >= 6 and any(answer.finished for answer in references("llama-tied", 3))


def test_a_cache_with_a_sliding_window_gives_the_same_text() -> None:
    config = MistralConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(config).float().eval()
    prompts = make_prompts(20, longest=20)
    assert answers(model, prompts, 6) == one_by_one(model, prompts, 0)


def test_one_new_token_and_short_prompts() -> None:
    model, prompts = tiny_llama(tie=False), make_prompts(9, longest=3)
    for ngram in (0, 1, 6):
        expected = one_by_one(model, prompts, ngram, limit=1)
        assert answers(model, prompts, 4, max_new_tokens=1, no_repeat_ngram_size=ngram) == expected


def test_an_empty_prompt_starts_from_the_bos_token_and_no_prompts_give_no_answers() -> None:
    model = tiny_gpt2(tie=False)
    assert answers(model, [[], [5, 6, 7]], 2) == one_by_one(model, [[0], [5, 6, 7]], 0)
    assert answers(model, [], 2) == []


def test_a_padding_id_inside_a_prompt_is_a_token() -> None:
    model, prompts = tiny_llama(tie=False), [[2, 2, 9, 2], [2], [7, 2, 7, 2, 7, 2, 7, 8]]
    assert answers(model, prompts, 3, no_repeat_ngram_size=2) == one_by_one(model, prompts, 2)


# ------------------------------------------------------------------------------------------------------- n-gram rule


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_ngram_rule_is_that_of_transformers_on_each_row_without_padding(n: int) -> None:
    generator = random.Random(n)
    rows = [[generator.randrange(2) for _ in range(length)] for length in (0, 1, 2, 3, 5, 6, 7, 12, 40, 41)]
    history = torch.tensor([[NOTHING] * (41 - len(row)) + row for row in rows])
    logits = torch.randn(len(rows), 6, generator=torch.Generator().manual_seed(0))
    found = ban_repeated_ngrams(logits.clone(), history, n)
    processor = NoRepeatNGramLogitsProcessor(n)
    for line, row in enumerate(rows):
        alone = processor(torch.tensor([row], dtype=torch.long), logits[line : line + 1])
        assert torch.equal(found[line : line + 1], alone), row
    assert found.isinf().any()


@examples(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 2, 3, 6]),
    rows=st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=6),
    padding=st.integers(0, 5),
)
def test_the_ngram_rule_on_random_batches_with_padding(n: int, rows: list[list[int]], padding: int) -> None:
    width = max(map(len, rows)) + padding
    history = torch.tensor([[NOTHING] * (width - len(row)) + row for row in rows], dtype=torch.long).view(
        len(rows), width
    )
    logits = torch.randn(len(rows), 4, generator=torch.Generator().manual_seed(0))
    found = ban_repeated_ngrams(logits.clone(), history, n)
    processor = NoRepeatNGramLogitsProcessor(n)
    for line, row in enumerate(rows):
        alone = processor(torch.tensor([row], dtype=torch.long).view(1, len(row)), logits[line : line + 1])
        assert torch.equal(found[line : line + 1], alone), row


def test_the_ngram_rule_leaves_ids_beyond_the_head_alone() -> None:
    history = torch.tensor([[9, 9, 1, 9]])
    assert torch.equal(ban_repeated_ngrams(torch.zeros(1, 4), history, 2), torch.tensor([[0.0, -torch.inf, 0.0, 0.0]]))


# ---------------------------------------------------------------------------------------------------------- sampling


def test_sampled_text_depends_on_seed_and_key_but_not_on_batch_size_or_order() -> None:
    model, prompts = tiny_llama(tie=False), make_prompts(20)
    keys = [f"row-{i}" for i in range(20)]
    options = {"do_sample": True, "temperature": 3.0, "no_repeat_ngram_size": 3}
    first = answers(model, prompts, 1, row_keys=keys, **options)
    for batch_size in (7, 32):
        order = random.Random(batch_size).sample(range(20), 20)
        again = answers(model, [prompts[i] for i in order], batch_size, row_keys=[keys[i] for i in order], **options)
        assert again == [first[i] for i in order]
    assert answers(model, prompts, 7, row_keys=keys, seed=11, **options) != first
    assert answers(model, prompts, 7, row_keys=[key + "x" for key in keys], **options) != first
    same = [prompts[0]] * 20  # equal prompts are different rows
    assert len({tuple(answer.tokens) for answer in answers(model, same, 20, **options)}) > 10


def test_sampled_frequencies_follow_the_softmax() -> None:
    vocab, draws = 50, 20_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 2
    probabilities = torch.softmax(logits.double(), -1)
    for seed, step in ((10, 0), (20, 7)):
        noise = gumbel_noise(seed, [(f"row-{i}", step) for i in range(draws)], vocab, "cpu")
        counts = torch.bincount((logits + noise).argmax(-1), minlength=vocab).double()
        expected = probabilities * draws
        common = expected >= 5
        observed = torch.cat([counts[common], counts[~common].sum()[None]])
        wanted = torch.cat([expected[common], expected[~common].sum()[None]])
        statistic = float(((observed - wanted) ** 2 / wanted).sum())
        freedom = len(wanted) - 1
        # 5 standard deviations of a chi-square; the draws are fixed, so this cannot fail by chance tomorrow
        assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_200_000_draws_pass_a_chi_square_test_against_the_softmax(temperature: float) -> None:
    """Every draw of another row and step, through the very lines that generation uses; 5 % tokens down to 1 in 10^4."""
    vocab, draws, chunk = 64, 200_000, 20_000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(4)) * 2.5
    counts = torch.zeros(vocab, dtype=torch.float64)
    for start in range(0, draws, chunk):
        keys = [(f"dolly-{i % 500}", i // 500) for i in range(start, start + chunk)]
        noise = gumbel_noise(10, keys, vocab, "cpu")
        chosen = noise.add_(logits.expand(chunk, vocab) / temperature).argmax(-1)
        counts += torch.bincount(chosen, minlength=vocab).double()
    expected = torch.softmax(logits.double() / temperature, -1) * draws
    common = expected >= 5  # the rare ones together, as the test asks
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    keep = wanted > 0
    p_value = scipy.stats.chisquare(observed[keep].numpy(), wanted[keep].numpy()).pvalue
    assert 1e-3 < p_value < 1 - 1e-3  # the draws are fixed, so this cannot fail by chance tomorrow


def test_first_tokens_of_a_model_are_drawn_from_its_softmax() -> None:
    model, prompt, draws = tiny_gpt2(tie=False), [5, 6, 7], 2_000
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 1.5, -1)
    settings = GenerationSettings(max_new_tokens=1, batch_size=500, do_sample=True, temperature=1.5)
    drawn = generate(model, [prompt] * draws, settings, eos_token_ids=[], pad_token_id=2)
    counts = torch.bincount(torch.tensor([answer.tokens[0] for answer in drawn]), minlength=TINY_VOCAB)
    deviation = (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((counts / draws - probabilities).abs() <= 5 * deviation + 2 / draws).all()


@pytest.mark.parametrize("top_p", [1e-9, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_a_nucleus_is_the_smallest_set_of_likeliest_tokens_with_its_share(top_p: float) -> None:
    scores = torch.randn(40, 31, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 2
    scores[0] = 0.0  # all alike: those of the lowest ids
    scores[1, 3:] = float("-inf")  # as the rule against repetition leaves them
    kept = nucleus(scores, top_p) > float("-inf")
    for row, chosen in zip(scores, kept, strict=True):
        order, inside, share = sorted(range(31), key=lambda token: (-float(row[token]), token)), set(), 0.0
        shares = torch.softmax(row, -1).tolist()
        for token in order:
            if inside and share >= top_p - 1e-12:
                break
            inside.add(token)
            share += shares[token]
        found = set(chosen.nonzero()[:, 0].tolist())
        assert found == {token for token in inside if row[token] > float("-inf")}
    assert torch.equal(nucleus(scores, top_p)[5:6], nucleus(scores[5:6], top_p)), "whatever the batch"


def test_sampled_tokens_are_in_the_nucleus_and_drawn_from_it() -> None:
    model, prompt, draws = tiny_gpt2(tie=False), [5, 6, 7], 2_000
    with torch.no_grad():
        scores = model(torch.tensor([prompt])).logits[:, -1].double() / 1.5
    probabilities = torch.softmax(nucleus(scores, 0.6), -1)[0]
    settings = GenerationSettings(max_new_tokens=1, batch_size=500, do_sample=True, temperature=1.5, top_p=0.6)
    for fixed in (False, True):
        drawn = generate(model, [prompt] * draws, settings, eos_token_ids=[], pad_token_id=2, fixed_shapes=fixed)
        counts = torch.bincount(torch.tensor([answer.tokens[0] for answer in drawn]), minlength=TINY_VOCAB)
        assert not counts[probabilities == 0].any() and 1 < int((probabilities > 0).sum()) < TINY_VOCAB
        deviation = (probabilities * (1 - probabilities) / draws).sqrt()
        assert ((counts / draws - probabilities).abs() <= 5 * deviation + 2 / draws).all()


def test_noise_is_gumbel_and_independent_of_its_neighbours() -> None:
    noise = gumbel_noise(1, [("a", 0), ("a", 1), ("b", 0), ("a", 0)], 200_000, "cpu")
    assert torch.isfinite(noise).all() and torch.equal(noise[0], noise[3])
    assert noise[:3].mean(1).tolist() == pytest.approx([0.5772] * 3, abs=0.015)
    assert noise[:3].var(1).tolist() == pytest.approx([1.6449] * 3, abs=0.03)
    rows = torch.cat([noise[:3], noise[:1].roll(1, 1)])
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 0.012
    # The same noise for a wider vocabulary, so a head with padding rows draws the same tokens
    assert torch.equal(gumbel_noise(1, [("a", 0)], 300, "cpu")[0], noise[0, :300])


# ---------------------------------------------------------------------------------------- what is left as it was


def test_no_global_random_state_is_touched() -> None:
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    answers(tiny_gpt2(), make_prompts(5), 2, do_sample=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(np.array_equal(new, old) for new, old in zip(np.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


class Stop(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
def test_modes_flags_and_config_come_back(fails: bool) -> None:
    model = tiny_llama()
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()  # a frozen part keeps its own mode
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    expected = references("llama-tied", 0)
    if fails:
        model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            answers(model, make_prompts(), 7)
    else:
        assert answers(model, make_prompts(), 7) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: getattr(module, "gradient_checkpointing", None) for name, module in model.named_modules()} == flags
    assert model.config.to_dict() == config


def test_training_goes_on_after_generation() -> None:
    model = tiny_llama().train()
    answers(model, make_prompts(4), 2)
    ids = torch.tensor([[4, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_generation_under_autocast_runs_in_bf16_and_training_goes_on() -> None:
    model = tiny_llama().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(answers(model, make_prompts(4), 2)) == 4
    ids = torch.tensor([[4, 5, 6]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_only_the_last_position_meets_the_vocabulary() -> None:
    model, shapes = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    answers(model, make_prompts(8), 8)
    assert {shape[1] for shape in shapes} == {1}


def test_ended_rows_leave_and_waiting_prompts_take_their_lines() -> None:
    model, lines = tiny_llama(tie=False), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: lines.append(output.shape[0]))
    found = answers(model, make_prompts(), 8)
    tokens = sum(len(answer.tokens) + answer.finished for answer in found)
    assert max(lines) <= 8
    assert sum(lines) < 1.35 * tokens  # lines computed for each token that counts
    longest = sum(max(len(a.tokens) for a in found[i : i + 8]) for i in range(0, len(found), 8))
    assert len(lines) < 1.5 * longest


def test_each_row_is_handed_out_once_as_soon_as_it_has_ended() -> None:
    model, prompts, seen = tiny_llama(tie=False), make_prompts(), []
    options = GenerationSettings(max_new_tokens=LIMIT, batch_size=7)
    found = generate(
        model, prompts, options, eos_token_ids=EOS, pad_token_id=2,
        on_finished=lambda row, answer: seen.append((row, answer._replace(tokens=list(answer.tokens)))),
    )  # fmt: skip
    assert dict(seen) == dict(enumerate(found)) and len(seen) == len(prompts)
    rows = [row for row, _ in seen]
    assert rows != sorted(rows), "short answers come before long ones, whatever the order of the prompts"


# -------------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("name", ["Mixtral", "OLMoE", "Qwen3-MoE"])
def test_a_mixture_that_collects_for_its_routers_loss_answers_as_one_that_does_not(name: str) -> None:
    """As ``router_aux_loss`` wants it: the model would compute that loss, with a mask that is longer than the new tokens."""
    prompts = [[3 + token % 50 for token in prompt] for prompt in make_prompts(3)]
    plain, collecting = (FAMILIES[name].build(0, output_router_logits=on) for on in (False, True))
    assert answers(collecting, prompts, 2) == answers(plain, prompts, 2)
    assert collecting.config.output_router_logits


def test_prompts_beyond_the_positions_of_the_model_are_refused_before_any_work() -> None:
    model = tiny_gpt2(max_positions=32)
    with pytest.raises(UserError, match=r"prompt 1 has 20 tokens.*max_new_tokens=13.*32 positions"):
        answers(model, [[5], [5] * 20], 2, max_new_tokens=13)
    assert len(answers(model, [[5] * 20], 2, max_new_tokens=12)) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("no_repeat_ngram_size", -1),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_settings_out_of_range(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option}: got {value}"):
        GenerationSettings(**{option: value})


def test_one_key_for_each_prompt() -> None:
    with pytest.raises(UserError, match="2 keys for 1 prompts"):
        answers(tiny_llama(), [[5]], 1, row_keys=["a", "b"])


def test_stop_tokens_come_from_tokenizer_and_model() -> None:
    class Tokenizer:
        eos_token_id = 7

    model = tiny_llama()
    model.generation_config.eos_token_id = [9, 2]
    assert stop_token_ids(model, Tokenizer()) == [2, 7, 9]
    model.generation_config.eos_token_id = None
    assert stop_token_ids(model, Tokenizer()) == [7]
    assert stop_token_ids(torch.nn.Linear(1, 1), Tokenizer()) == [7]


def test_the_progress_bar_appears_only_when_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GenerationSettings(max_new_tokens=4)
    generate(tiny_llama(), [[5]], settings, eos_token_ids=EOS, pad_token_id=2, progress="answers")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("dts_hf.generation.progress.SECONDS_BEFORE_BAR", 0.0)
    generate(tiny_llama(), [[5]], settings, eos_token_ids=EOS, pad_token_id=2, progress="answers")
    shown = capsys.readouterr()
    assert "answers" in shown.err and shown.out == ""  # stdout is for results


def test_a_model_with_adapters_is_generated_from_like_any_other() -> None:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(tiny_llama(tie=False), LoraConfig(r=2, target_modules="all-linear"))
    shapes: list[tuple[int, ...]] = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert answers(model, make_prompts(), 7) == references("llama-untied", 0), "a new adapter adds nothing"
    assert {shape[1] for shape in shapes} == {1}
