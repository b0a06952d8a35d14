r"""The bytes that each id of a tokenizer stands for, and where the tokens of a text begin and end in its bytes.

From the vocabulary itself, never from decoded text: a token may be a part of a character (``\xe2\x82``), and what a
decoder makes of it alone is U+FFFD. Markers of spaces (``Ġ``, ``▁``) are the space that they stand for: replaced by nothing,
"a" and " a" would be equal.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dts_hf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: One character that a WordPiece tokenizer loses between words, as bytes.
_SPACE = re.compile(b"|".join(re.escape(chr(code).encode()) for code in range(0x3001) if chr(code).isspace()))
#: What the decoders of tokenizers are called of which the bytes of a token are known, and how its text becomes bytes.
SCHEMES = {"ByteLevel": "byte_level", "Metaspace": "metaspace", "ByteFallback": "metaspace", "WordPiece": "word_piece"}


class Extents(NamedTuple):
    """Where the n tokens of a text stand in its bytes.

    Attributes:
        starts: the first byte of each, int64 ``[n]``; -1 for a space before the text that a tokenizer has put there.
        ends: behind its last byte, ``[n]``. Spaces between ``ends[k - 1]`` and ``starts[k]`` are in no token (WordPiece).
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """What the ids of one tokenizer stand for, over V = ``len(tokenizer)`` of them.

    Attributes:
        contents: the bytes of each id, its leading space included; of a special token its spelling.
        tokens: the entry of each id, as it stands in the vocabulary.
        lengths: of ``contents``, int64 ``[V]``.
        plain: ids that stand for text; False for special tokens and holes in the vocabulary, bool ``[V]``.
        rare: ids that stand for text which another id usually writes (``<0x41>`` beside ``A``), bool ``[V]``.
        scheme: one of the values of ``SCHEMES``.
    """

    contents: list[bytes]
    tokens: list[str | None]
    lengths: NDArray[np.int64]
    plain: NDArray[np.bool_]
    rare: NDArray[np.bool_]
    scheme: str

    @property
    def loses_spaces(self) -> bool:
        """Whether spaces between words are in no token."""
        return self.scheme == "word_piece"

    def extents(self, ids: Sequence[int], text: bytes) -> Extents | None:
        """Where ``ids`` stand in ``text``, every byte of which they account for; WordPiece loses spaces between words.

        Args:
            ids: tokens of ``text``, or of its beginning where they were cut.
            text: what was tokenised, in UTF-8.

        Returns:
            None where the tokens' bytes are not those of the text: a normaliser has changed it, or a token is unknown.
        """
        if self.loses_spaces:
            return self._between_spaces(ids, text)
        said = b"".join([self.contents[token] for token in ids])
        lengths = self.lengths[np.asarray(ids, np.int64)]
        ends = lengths.cumsum()
        if not text.startswith(said):
            if not (said[:1] == b" " and text.startswith(said[1:])):  # nor with a space that was put before it
                return None
            ends = ends - 1
        return Extents(ends - lengths, ends)

    def _between_spaces(self, ids: Sequence[int], text: bytes) -> Extents | None:
        starts, ends, place = [], [], 0
        for token in ids:
            content = self.contents[token]
            while not text.startswith(content, place):
                space = _SPACE.match(text, place)
                if space is None:
                    return None
                place = space.end()
            starts.append(place)
            place += len(content)
            ends.append(place)
        return Extents(np.array(starts, np.int64), np.array(ends, np.int64))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The table of ``tokenizer``, made once.

    Raises:
        UserError: it is none of those whose tokens have known bytes.
    """
    return _table(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _table(tokenizer: Any, size: int) -> TokenBytes:
    """``size`` is the tokenizer's length: tokens may be added to it."""
    scheme, marker, falls_back = _scheme_of(tokenizer)
    contents, tokens = [b""] * size, [None] * size
    plain, rare = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
    characters = _byte_level_characters()
    for token, index in tokenizer.get_vocab().items():
        if index >= size:
            continue
        tokens[index] = token
        plain[index] = index not in special
        byte = _BYTE_TOKEN.fullmatch(token) if falls_back else None
        if index in added:
            contents[index] = added[index].content.encode()
        elif byte is not None:
            contents[index], rare[index] = bytes([int(byte[1], 16)]), True
        elif scheme == "byte_level":
            try:
                contents[index] = bytes([characters[character] for character in token])
            except KeyError:  # an entry that no text can be split into
                contents[index] = token.encode()
                plain[index] = False
        elif scheme == "metaspace":
            contents[index] = token.replace(marker, " ").encode()
        else:
            said = token.removeprefix(marker)
            contents[index] = said.encode()
            # Within a word is where the bytes are sure: at its start a space has been lost. What always stands alone starts
            rare[index] = token.startswith(marker) == _stands_alone(said)
    lengths = np.array([len(content) for content in contents], np.int64)
    return TokenBytes(contents, tokens, lengths, plain & (lengths > 0), rare, scheme)  # type: ignore[arg-type]


def _scheme_of(tokenizer: Any) -> tuple[str, str, bool]:
    """(scheme, marker of a space or of a word's continuation, whether ``<0x41>`` is a byte).

    Raises:
        UserError: the tokenizer is a slow one, or has a decoder whose bytes are not known.
    """
    name = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"alignment: {name} has no tokens of known bytes, expected a fast tokenizer (tokenizer.json in its folder)"
        )
    parts = {} if backend.decoder is None else {part["type"]: part for part in _parts(_state(backend.decoder))}
    kinds = [kind for kind in parts if kind in SCHEMES]
    replaced = parts.get("Replace", {})
    if not kinds and replaced.get("content") == " ":
        kinds = ["Metaspace"]
    if not kinds:
        found = ", ".join(parts) or "none"
        raise UserError(
            f"alignment: the decoder of {name} is {found}, expected one of {', '.join(SCHEMES)}: of others the bytes of a "
            "token are not known"
        )
    scheme = SCHEMES[kinds[0]]
    marker = parts.get("Metaspace", {}).get("replacement") or replaced.get("pattern", {}).get("String") or "▁"
    if scheme == "word_piece":
        marker = parts["WordPiece"]["prefix"]
    return scheme, marker, "ByteFallback" in parts


def _state(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part.__getstate__())
    return found


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A decoder, or those that it is a sequence of."""
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for part in decoder["decoders"]:
        yield from _parts(part)


def _stands_alone(text: str) -> bool:
    """Whether WordPiece cuts a text round these characters: one ideograph or punctuation mark."""
    if len(text) != 1:
        return False
    ideograph = "\u3400" <= text <= "\u9fff" or "\uf900" <= text <= "\ufaff" or text >= "\U00020000"
    return ideograph or unicodedata.category(text)[0] in "PS"


@functools.cache
def _byte_level_characters() -> dict[str, int]:
    """The byte of each character in the vocabulary of a byte-level tokenizer (GPT-2's table, Radford et al. 2019)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
