"""What a server says of its teacher: identity, limits and head, and the hash that names all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from dts_hf.errors import UserError
from dts_hf.files import json_digest
from dts_hf.models.head import Head
from dts_hf.teachers.identity import POST_NORM, TeacherIdentity, differences, head_facts
from dts_hf.teachers.wire import PROTOCOL, STATE_DTYPES, Limits

#: Of an identity, what does not change an answer to token ids: where the teacher came from, who words the rows.
_NOT_HASHED = ("model", "commit", "versions", "template")
#: Of a limit: a question has int32 lengths.
_MOST = (1 << 31) - 1


@dataclass(frozen=True)
class Description:
    """The JSON object of ``GET /v1/teacher``.

    Attributes:
        identity: of the teacher.
        limits: of one question.
    """

    identity: TeacherIdentity
    limits: Limits

    @cached_property
    def teacher_hash(self) -> str:
        """Names the teacher: equal where the same tokens get the same states, and the head is the same."""
        values = {key: value for key, value in self.identity.as_json().items() if key not in _NOT_HASHED}
        return json_digest(values)

    def as_json(self) -> dict[str, Any]:
        """The object."""
        return {
            "protocol": PROTOCOL,
            "teacher_hash": self.teacher_hash,
            "limits": self.limits._asdict(),
            "identity": self.identity.as_json(),
        }

    @classmethod
    def from_json(cls, values: Any, where: str) -> Description:
        """Read the object.

        Args:
            values: of the JSON.
            where: the server, for errors.

        Raises:
            UserError: another protocol, other fields, states that are not those after the norm, or a wrong hash.
        """
        protocol = values.get("protocol") if isinstance(values, Mapping) else None
        if protocol != PROTOCOL:
            raise UserError(
                f"{where}: got protocol {protocol!r}, expected {PROTOCOL}: is this the address of 'dts-hf serve-teacher', "
                "of the same version of dts_hf?"
            )
        identity, limits = values.get("identity"), values.get("limits")
        if not isinstance(identity, Mapping) or not isinstance(limits, Mapping) or {*limits} != {*Limits._fields}:
            raise UserError(
                f"{where}: its description has no identity or no limits: another version of dts_hf wrote it"
            )
        if not all(type(limit) is int and 1 <= limit <= _MOST for limit in limits.values()):
            raise UserError(f"{where}: got the limits {dict(limits)}, expected whole numbers from 1 to {_MOST:,}")
        if identity.get("states") != POST_NORM:
            raise UserError(
                f"{where}: its states are {identity.get('states')!r}, expected {POST_NORM!r}: the head reads those after "
                "the final norm, and no others give the teacher's logits"
            )
        found = cls(TeacherIdentity.from_json(identity, where), Limits(**limits))
        if found.limits.vocab_size > found.identity.vocab_size:
            raise UserError(
                f"{where}: takes ids below {found.limits.vocab_size:,}, and its head has {found.identity.vocab_size:,}"
            )
        if found.identity.dtype not in STATE_DTYPES:
            raise UserError(f"{where}: its states are in {found.identity.dtype}, expected {', '.join(STATE_DTYPES)}")
        if values.get("teacher_hash") != found.teacher_hash:
            raise UserError(
                f"{where}: the hash it gives is not that of its identity: another version of dts_hf made it"
            )
        return found

    @property
    def head_bytes(self) -> int:
        """Most bytes of ``encode_head``."""
        one = self.identity
        return (one.hidden_size + 1) * one.vocab_size * STATE_DTYPES[one.dtype].itemsize + 4096


def encode_head(head: Head) -> bytes:
    """The head's tensors as a safetensors file; scale and soft-cap are in the identity."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    return save(tensors)


def decode_head(content: bytes, identity: TeacherIdentity, where: str) -> Head:
    """The head that ``encode_head`` wrote.

    Args:
        content: the bytes.
        identity: which head it has to be.
        where: the server, for errors.

    Raises:
        UserError: it is another, or broken.
    """
    try:
        tensors = load(content)
        head = Head(tensors["weight"], tensors.get("bias"), identity.logit_scale, identity.softcap)
        found = head_facts(head)
    except (SafetensorError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: its head cannot be read: {' '.join(str(error).split())[:200]}") from None
    if apart := differences(identity, found, "its identity"):
        raise UserError(f"{where}: its head is not the one it describes: {'; '.join(apart)}")
    return head
