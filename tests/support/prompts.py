"""Prompts of random tokens, and what ends an answer to them."""

from __future__ import annotations

import random

from tests.support.tiny import TINY_VOCAB

#: Many tokens end an answer, so that random models end at very different lengths and lines leave the batch all the time.
EOS = [2, *range(20, 40)]


def make_prompts(count: int = 30, longest: int = 40) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(3, TINY_VOCAB) for _ in range(generator.randint(1, longest))] for _ in range(count)]
