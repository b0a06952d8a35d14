"""What happens to the logits of the next token: the noise that draws from them, and the rule against repetition.

Shapes: ``B`` slots of the batch, ``L`` tokens seen (prompt, padding on the left, answer so far), ``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

NOTHING = -1  # in a token history: no token here. Not the padding id, which is often a real token (pad == eos)
NOISE_PIECE = 1 << 18  # elements drawn at a time on a CPU: a dozen passes over memory become passes over the cache


def ban_repeated_ngrams(logits: Tensor, history: Tensor, n: int) -> Tensor:
    """Set to minus infinity every token that would complete an n-gram the row already holds.

    The rule of ``no_repeat_ngram_size`` in ``transformers``, applied to each row without its padding.

    Args:
        logits: [B, V]; written in place.
        history: [B, L] token ids of prompt and answer so far; ``NOTHING`` (-1) where there is no token.
        n: length of the n-gram in tokens, at least 1.
    """
    length = history.shape[1]
    if length < n:
        return logits
    windows = history.unfold(1, n, 1)  # [B, L - n + 1, n], a view
    last = windows[..., -1]
    # A suffix that reaches into the padding equals only itself, or windows that end in padding: those ban nothing
    banned = (last >= 0) & (last < logits.shape[-1])
    for offset in range(n - 1):
        banned &= windows[..., offset] == history[:, length - n + 1 + offset, None]
    row, column = banned.nonzero(as_tuple=True)
    logits[row, last[row, column]] = float("-inf")
    return logits


def repeated_ngrams(history: Tensor, end: Tensor, n: int, vocabulary: int) -> Tensor:
    """Which tokens ``ban_repeated_ngrams`` would ban: bool [B, V]; of a history with room on its right, without a host.

    Args:
        history: [B, C] token ids; ``NOTHING`` (-1) where there is no token, also in the columns that are still free.
        end: [1] int64, how many columns are in use.
        n: length of the n-gram in tokens, at least 1.
        vocabulary: V.
    """
    banned = torch.zeros((len(history), vocabulary + 1), dtype=torch.bool, device=history.device)
    if history.shape[1] < n:
        return banned[:, :vocabulary]
    windows = history.unfold(1, n, 1)  # [B, C - n + 1, n], a view
    last = windows[..., -1]
    again = (last >= 0) & (last < vocabulary)
    for offset in range(n - 1):
        # Before n - 1 columns are in use no window is full, and whichever column is read bans nothing
        token = history.index_select(1, (end - n + 1 + offset).clamp_(min=0))
        again &= windows[..., offset] == token
    # All that is not banned lands in the column behind the vocabulary
    return banned.scatter_(1, last.masked_fill(~again, vocabulary), True)[:, :vocabulary]


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """``scores`` with minus infinity on all but the likeliest tokens that together have the probability ``top_p``.

    Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the smallest such set, so at least one token. Each row by
    itself, with a stable sort: of equal scores the lower id comes first, whatever the batch.

    Args:
        scores: [B, V], divided by the temperature already.
        top_p: above 0; 1 and more keep all.
    """
    if top_p >= 1:
        return scores
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    shares = ordered.softmax(-1)
    outside = shares.cumsum(-1) - shares >= top_p  # by what comes before a token: the one that crosses the line is in
    outside[:, 0] = False
    return scores.masked_fill(outside.scatter(1, places, outside), float("-inf"))


def gumbel_noise(seed: int, draws: Sequence[tuple[str, int]], vocabulary: int, device: torch.device | str) -> Tensor:
    """Return standard Gumbel noise [B, V], fp32, each row a function of (seed, its key, its step) alone.

    The largest ``logit + noise`` is an exact draw from the softmax (Gumbel 1954, the "Gumbel-max trick"). A
    counter-based generator: 64 key bits from BLAKE2b of (seed, key, step), then two rounds of a 32-bit integer hash of
    the token id.

    Args:
        seed: of the run.
        draws: (row key, step) of each row.
        vocabulary: V.
        device: where the noise is made; the integers behind it are the same on all devices.
    """
    piece = max(1, NOISE_PIECE // vocabulary)
    if len(draws) > piece and torch.device(device).type == "cpu":
        pieces = [draws[start : start + piece] for start in range(0, len(draws), piece)]
        return torch.cat([gumbel_noise(seed, some, vocabulary, device) for some in pieces])
    return gumbel_of_keys(noise_keys(seed, draws).to(device), vocabulary)


def noise_keys(seed: int, draws: Sequence[tuple[str, int]]) -> Tensor:
    """The two halves of the key of each (row key, step): int32 [len(draws), 2], on the CPU."""
    digests = b"".join(
        hashlib.blake2b(f"{seed}\x1f{step}\x1f{key}".encode(), digest_size=8).digest() for key, step in draws
    )
    halves = [int.from_bytes(digests[i : i + 4], "little", signed=True) for i in range(0, len(digests), 4)]
    return torch.tensor(halves, dtype=torch.int32).view(-1, 2)


def gumbel_of_keys(row_keys: Tensor, vocabulary: int) -> Tensor:
    """The noise [B, V], fp32, that ``gumbel_noise`` makes of the keys [B, 2], int32, of its rows."""
    keys = row_keys.view(-1, 2, 1)
    bits = torch.arange(vocabulary, dtype=torch.int32, device=keys.device) * -1640531535 ^ keys[:, 0]
    # Shifts and factors of lowbias32 (Wellons 2018), with the second half of the key between its rounds. int32 wraps
    # around, and `>>` keeps the sign: hence the masks
    bits ^= (bits >> 16) & 0xFFFF
    bits *= 2146121005
    bits += keys[:, 1]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= -2073254261
    bits ^= (bits >> 16) & 0xFFFF
    # 31 bits, finest near 0: u near 0 makes the large noise that lets a token of probability 1e-9 win
    uniform = (bits & 0x7FFFFFFF).float().mul_(2.0**-31).add_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()
