"""Whether a step is answered by the student: a coin that every process throws alike, and a resumed run once more.

A coin of each process (TRL's GKD and GOLD, DistiLLM) sends processes into different branches: the normaliser and the
temperature then mean something else on each, and collectives of sharded weights wait for each other for ever.
"""

from __future__ import annotations

import hashlib


def coin(seed: int, step: int) -> float:
    """A number in [0, 1), a function of (seed, step) alone: BLAKE2b, as the noise of ``generation.sampling``.

    Args:
        seed: of the run.
        step: number of the optimizer step, from 0.
    """
    digest = hashlib.blake2b(f"on-policy coin\x1f{seed}\x1f{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53  # 53 bits: exact in a float, and never 1
