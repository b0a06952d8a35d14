"""What travels between a trainer and a teacher that runs elsewhere: token ids there, final states back.

Both ways are the bytes of a safetensors file, which costs a thousandth of JSON and can hold neither code nor text. A
question names its tokens by a hash; the answer repeats it, names the teacher by the hash of its identity, and carries a
checksum of its numbers, so that an answer to another question, from another teacher, or with a flipped bit is known as
one. Shapes: ``R`` rows, ``M`` tokens of all rows together, ``N`` tokens with a label, ``H`` hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

#: Of the protocol; a client and a server that disagree do not talk.
PROTOCOL = 1
TEACHER_PATH, HEAD_PATH, STATES_PATH = "/v1/teacher", "/v1/head", "/v1/states"
PROTOCOL_HEADER, TOKENS_HEADER, TEACHER_HEADER = "X-Teacher-Protocol", "X-Token-Hash", "X-Teacher-Hash"
CONTENT_TYPE = "application/octet-stream"
#: The types that states travel in: those that models compute them in.
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Of a safetensors header, bytes: three tensors and three hashes take a few hundred.
_LONGEST_HEADER = 100_000


class WireError(ValueError):
    """What came over the wire is not what the protocol says; the message says in what."""


class Limits(NamedTuple):
    """What a server takes in one question.

    Attributes:
        rows: most rows, R.
        tokens: most tokens, M.
        length: most tokens of one row.
        vocab_size: ids are below it.
    """

    rows: int
    tokens: int
    length: int
    vocab_size: int


@dataclass(frozen=True)
class Question:
    """Rows whose labelled tokens need states.

    Attributes:
        input_ids: int32 ``[M]``, the rows one after the other.
        lengths: int32 ``[R]``, tokens of each row.
        label_mask: uint8 ``[M]``, 1 at tokens that are labels; never at the first token of a row, which nothing predicts.
    """

    input_ids: Tensor
    lengths: Tensor
    label_mask: Tensor

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[Tensor, Tensor]]) -> Question:
        """Out of ``(ids [T], is a label [T])`` of each row."""
        ids, masks = [row[0] for row in rows], [row[1] for row in rows]
        lengths = torch.tensor([len(row) for row in ids], dtype=torch.int32)
        return cls(torch.cat(ids).to(torch.int32), lengths, torch.cat(masks).to(torch.uint8))

    @cached_property
    def labels(self) -> int:
        """N, how many states the answer has."""
        return int(self.label_mask.sum())

    @cached_property
    def token_hash(self) -> str:
        """SHA-256 over ids, lengths and mask: equal for equal questions, whoever asks, and however often."""
        digest = hashlib.sha256(f"dts_hf states {PROTOCOL}".encode())
        for tensor in (self.lengths, self.input_ids, self.label_mask):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """``(ids [T], is a label [T])`` of each row."""
        lengths = self.lengths.tolist()
        return list(zip(self.input_ids.split(lengths), self.label_mask.split(lengths), strict=True))

    def encode(self) -> bytes:
        """The body of a request."""
        return save({"input_ids": self.input_ids, "lengths": self.lengths, "label_mask": self.label_mask})

    @classmethod
    def decode(cls, content: bytes, limits: Limits) -> Question:
        """Read a body.

        Args:
            content: the body.
            limits: what the server takes.

        Raises:
            WireError: it is no question, or asks for more than the server takes.
        """
        expected = {"input_ids": torch.int32, "lengths": torch.int32, "label_mask": torch.uint8}
        tensors, _ = _decode(content, expected)
        question = cls(**tensors)
        if any(tensor.dim() != 1 or not len(tensor) for tensor in tensors.values()):
            raise WireError("input_ids, lengths and label_mask: expected one dimension each and at least one token")
        question._check(limits)
        return question

    def _check(self, limits: Limits) -> None:
        ids, lengths, mask = self.input_ids, self.lengths, self.label_mask
        if len(mask) != len(ids):
            raise WireError(f"label_mask: got {len(mask):,} values, expected {len(ids):,}, one for each token")
        if int(lengths.min()) < 1 or int(lengths.sum(dtype=torch.int64)) != len(ids):
            raise WireError(f"lengths: expected whole numbers above 0 that add up to {len(ids):,}, the number of ids")
        for name, value, most in (
            ("rows", len(lengths), limits.rows),
            ("tokens", len(ids), limits.tokens),
            ("tokens in one row", int(lengths.max()), limits.length),
        ):
            if value > most:
                raise WireError(f"got {value:,} {name}, expected {most:,} at most")
        if int(ids.min()) < 0 or int(ids.max()) >= limits.vocab_size:
            wrong = ids[(ids < 0) | (ids >= limits.vocab_size)][0]
            raise WireError(f"input_ids: got {int(wrong)}, expected 0 to {limits.vocab_size - 1}, the teacher's ids")
        if int(mask.max()) > 1:
            raise WireError(f"label_mask: got {int(mask.max())}, expected 0 and 1")
        starts = lengths.cumsum(0) - lengths
        if mask[starts].any():
            raise WireError("label_mask: the first token of a row is marked as a label, but no token predicts it")
        if not mask.any():
            raise WireError("label_mask: no token is marked as a label, so there is nothing to answer")


class Answer(NamedTuple):
    """States of the tokens that predict a label, in the order of the labels.

    Attributes:
        states: ``[N, H]``, after the final norm: what the head reads.
        label_logprob: fp32 ``[N]``, log-probability of each label at T = 1 over the head's whole vocabulary, nats.
    """

    states: Tensor
    label_logprob: Tensor


def encode_answer(answer: Answer, token_hash: str, teacher_hash: str) -> bytes:
    """The body of an answer.

    Args:
        answer: on the CPU.
        token_hash: of the question.
        teacher_hash: of the identity of the teacher.
    """
    tensors = {"states": answer.states.contiguous(), "label_logprob": answer.label_logprob.contiguous()}
    hashes = {"token_hash": token_hash, "teacher_hash": teacher_hash}
    return save(tensors, metadata={**hashes, "checksum": checksum(tensors, **hashes)})


def decode_answer(content: bytes, question: Question, dtype: str, hidden: int) -> tuple[Answer, str]:
    """Read an answer and check that it is one to this question.

    Args:
        content: the body.
        question: that was asked.
        dtype: of the states, a key of ``STATE_DTYPES``.
        hidden: H.

    Returns:
        the answer, and the hash of the teacher that gave it.

    Raises:
        WireError: it is broken, answers another question, or has other shapes.
    """
    tensors, told = _decode(content, {"states": STATE_DTYPES[dtype], "label_logprob": torch.float32})
    hashes = {key: str(told.get(key, "")) for key in ("token_hash", "teacher_hash")}
    if told.get("checksum") != checksum(tensors, **hashes):
        raise WireError("its checksum is another one: bytes have changed on the way")
    if hashes["token_hash"] != question.token_hash:
        raise WireError("it answers another question (its token hash is not that of the tokens sent)")
    answer, count = Answer(**tensors), question.labels
    if answer.states.shape != (count, hidden) or answer.label_logprob.shape != (count,):
        shapes = [tuple(tensor.shape) for tensor in answer]
        raise WireError(f"got states and label_logprob of shapes {shapes}, expected {[(count, hidden), (count,)]}")
    if not bool(torch.isfinite(answer.states).all()) or not bool(torch.isfinite(answer.label_logprob).all()):
        raise WireError("its states or log-probabilities are not finite")
    return answer, hashes["teacher_hash"]


def checksum(tensors: Mapping[str, Tensor], token_hash: str, teacher_hash: str) -> str:
    """``xxh3_128`` over an answer: against flipped bits, not against people.

    Args:
        tensors: of the answer; their names, shapes and numbers count.
        token_hash: of the question.
        teacher_hash: of the identity of the teacher.
    """
    digest = xxhash.xxh3_128(f"{token_hash} {teacher_hash}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)  # numpy has no bfloat16, but it has bytes
    return digest.hexdigest()


def _decode(content: bytes, expected: Mapping[str, torch.dtype]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors body that holds those of ``expected`` and no other.

    Raises:
        WireError: it does not.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        if len(content) < 8 or size > min(_LONGEST_HEADER, len(content) - 8):
            raise ValueError("its header is cut or too long")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
        tensors = load(content)
    except (SafetensorError, ValueError, AttributeError, KeyError, RecursionError, RuntimeError, TypeError) as error:
        raise WireError(f"expected the bytes of a safetensors file: {' '.join(str(error).split())[:200]}") from None
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    if found != dict(expected):
        listed = ", ".join(f"{name} ({_word(dtype)})" for name, dtype in expected.items())
        told = ", ".join(f"{name} ({_word(dtype)})" for name, dtype in sorted(found.items())) or "none"
        raise WireError(f"got the tensors {told[:200]}, expected {listed}")
    return tensors, metadata


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
