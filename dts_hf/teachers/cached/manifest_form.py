"""What ``manifest.json`` of a cache may hold: it comes from anywhere, and files are named in it.

Types and names are checked before anything is opened; a name that is not one of a cache's own is nothing to read, to hash or
to upload.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dts_hf.errors import UserError

INDEX, HEAD = "index.safetensors", "head.safetensors"
#: Far above every cache that fits a disk, and far below what an int64 holds.
_MOST = 1 << 48
Count = Annotated[int, Field(ge=0, lt=_MOST)]
AtLeastOne = Annotated[int, Field(ge=1, lt=_MOST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Shard(_Strict):
    file: str
    rows: AtLeastOne
    labels: Count
    bytes: AtLeastOne
    sha256: Sha256


class _Error(_Strict):
    temperature: Annotated[Finite, Field(gt=0)]
    mass: Finite
    kl: Finite
    total_variation: Finite
    labels: Count


class _Compact(_Strict):
    top_k: AtLeastOne
    vocab_size: AtLeastOne
    dtype: Literal["float16", "float32"]
    knots: list[Finite]
    forced: bool
    errors: list[_Error]


class _Manifest(_Strict):
    format: int
    identity: dict[str, Any]
    plan: str
    dtype: Literal["float32", "bfloat16", "float16", "int8"]
    rows: AtLeastOne
    labels: AtLeastOne
    shards: Annotated[list[_Shard], Field(min_length=1)]
    files: dict[str, Sha256]
    label_rule: dict[str, Any]
    data: dict[str, str | None]
    shared_tokens: Count
    nll: Finite
    made_with: dict[str, str]
    options: dict[str, int]
    compact: _Compact | None = None


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"states-{number:05}.safetensors"


def is_shard_name(name: str) -> bool:
    """Whether ``shard_name`` gives it of some number."""
    return re.fullmatch(r"states-([0-9]{5}|[1-9][0-9]{5,})\.safetensors", name) is not None


#: Whose answers are kept in the folder of a cache that is filled while a run trains.
ANSWERS = "answers.json"


def answers_name(number: str) -> str:
    """The file of the answers that one process has kept; ``number`` is of 16 hexadecimal digits."""
    return f"answers-{number}.rows"


def is_answers_name(name: str) -> bool:
    """Whether ``answers_name`` gives it of some number."""
    return re.fullmatch(r"answers-[0-9a-f]{16}\.rows", name) is not None


def check_form(values: Mapping[str, Any], where: str) -> None:
    """Refuse what is no manifest of a cache, or names a file that is not a cache's own.

    Args:
        values: of the JSON.
        where: the file, for errors.

    Raises:
        UserError: names the first key that is wrong, what it has, and what was expected.
    """
    try:
        form = _Manifest.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = "".join(letter for letter in ".".join(map(str, first["loc"])) if letter.isprintable())[:200]
        given = repr(first["input"])[:60]
        raise UserError(f"{where}: is no manifest of a cache of states: {key}: got {given}: {first['msg']}") from None
    own = {INDEX} if form.compact is not None else {INDEX, HEAD}
    if {*form.files} != own:
        raise UserError(
            f"{where}: files: got {', '.join(sorted(form.files)) or 'none'}, expected {', '.join(sorted(own))}"
        )
    for number, shard in enumerate(form.shards):
        if shard.file != shard_name(number):
            raise UserError(f"{where}: shards.{number}.file: got {shard.file!r}, expected {shard_name(number)}")
    for key in ("rows", "labels"):
        if (total := sum(getattr(shard, key) for shard in form.shards)) != getattr(form, key):
            raise UserError(f"{where}: {key}: got {getattr(form, key):,}, and the shards have {total:,} together")
    if form.compact is not None and form.compact.dtype != form.dtype:
        raise UserError(f"{where}: dtype: got {form.dtype!r}, and the kept logits are in {form.compact.dtype!r}")
