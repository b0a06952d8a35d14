"""Answers from vLLM, for those who have it. **Not run by our tests**: they put a stand-in in the place of the package.

A backend of its own in the protocol, because its samples are others: vLLM draws from its own generator (one seed for
each row, so they do not depend on the batch either) and has no n-gram rule that counts the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from dts_hf.errors import UserError
from dts_hf.generation.engine import Generated, GenerationSettings


def check_vllm_settings(settings: GenerationSettings) -> None:
    """Refuse what vLLM cannot do.

    Raises:
        UserError: the settings ask for the n-gram rule.
    """
    if settings.no_repeat_ngram_size:
        raise UserError(
            f"backend: vllm has no n-gram rule that counts the prompt (no_repeat_ngram_size is "
            f"{settings.no_repeat_ngram_size}): use the protocol 'no_ngram', or backend: dts_hf"
        )


def load_vllm(model: str, dtype: str) -> Any:
    """Return the engine for a model folder or Hub name.

    Raises:
        UserError: vLLM is not installed.
    """
    try:
        from vllm import LLM
    except ImportError:
        raise UserError("backend: vllm, but vLLM is not installed: pip install vllm, or backend: dts_hf") from None
    return LLM(model=model, dtype=dtype)


def vllm_generate(
    engine: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    row_keys: Sequence[str],
    progress: str | None = None,
    on_finished: Callable[[int, Generated], None] | None = None,
) -> list[Generated]:
    """Answer every prompt; result and arguments are those of ``generation.engine.generate``. vLLM batches as it likes.

    Args:
        engine: of ``load_vllm``.
        prompts: token ids of each prompt.
        settings: limits and sampling.
        eos_token_ids: tokens that end an answer, besides the engine's own.
        pad_token_id: not used: vLLM does not pad.
        row_keys: one name per prompt, of which its seed is made.
        progress: show the engine's progress bar unless None.
        on_finished: called with the position in ``prompts`` and the answer, once all have ended.

    Raises:
        UserError: the settings ask for the n-gram rule.
    """
    check_vllm_settings(settings)
    from vllm import SamplingParams

    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    parameters = [
        SamplingParams(
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature if settings.do_sample else 0.0,
            top_p=settings.top_p if settings.do_sample else 1.0,
            top_k=0,
            seed=row_seed(settings.seed, key),
            stop_token_ids=list(eos_token_ids),
            detokenize=False,
        )
        for key in row_keys
    ]
    answers = []
    for position, output in enumerate(engine.generate(requests, parameters, use_tqdm=progress is not None)):
        tokens = list(output.outputs[0].token_ids)
        # Its own end tokens count too; the one that ended the answer is the last of its ids
        finished = output.outputs[0].finish_reason == "stop"
        answers.append(Generated(tokens[:-1], True, *tokens[-1:]) if finished else Generated(tokens, False))
        if on_finished is not None:
            on_finished(position, answers[-1])
    return answers


def row_seed(seed: int, key: str) -> int:
    """The seed of one row's noise, which vLLM takes as 31 bits: of the run's seed and the row's key."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x1f{key}".encode(), digest_size=4).digest(), "little") >> 1
