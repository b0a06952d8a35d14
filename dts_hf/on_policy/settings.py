"""How much of the training is on the student's own text, and how that text is drawn."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from dts_hf.console import SECRET_VARIABLE, SECRET_VARIABLE_EXPECTED
from dts_hf.errors import UserError, nearest

GapOn: TypeAlias = Literal["data", "teacher_argmax"]
Schedule: TypeAlias = Literal["constant", "linear", "cosine"]
Replay: TypeAlias = Literal["states", "rows", "none"]
Backend: TypeAlias = Literal["own", "vllm"]
_Settings = TypeVar("_Settings")
#: Where answers are made: another place is no other objective, and an address is nobody else's business.
PLACES = ("vllm_memory", "vllm_url", "vllm_folder", "vllm_token_env")


@dataclass(frozen=True)
class AdaptiveSettings:
    """DistiLLM's adaptive fraction and replay buffer (arXiv 2402.03898); see ``adaptive`` and ``replay``.

    Args:
        eps: the share grows when the held-out loss is so many nats above that of its last growth.
        step: by how much it grows, to 1 at most.
        capacity: rows that all processes together keep for replay.
        replay: ``states``: rows are kept with what the teacher said of them; ``rows``: without, and the teacher is asked
            again; ``none``: nothing is kept, and every step of the share generates.

    Raises:
        UserError: a value out of range.
    """

    eps: float = 0.1
    step: float = 0.1
    capacity: int = 1000
    replay: Replay = "states"

    def __post_init__(self) -> None:
        if not (_is_number(self.eps) and self.eps >= 0 and math.isfinite(self.eps)):
            raise UserError(f"on_policy.adaptive.eps: got {self.eps!r}, expected nats, 0 or above")
        if not (_is_number(self.step) and 0 < self.step <= 1):
            raise UserError(f"on_policy.adaptive.step: got {self.step!r}, expected a number above 0, at most 1")
        if not isinstance(self.capacity, int) or isinstance(self.capacity, bool) or self.capacity < 1:
            raise UserError(
                f"on_policy.adaptive.capacity: got {self.capacity!r}, expected a whole number of at least 1"
            )
        _check_word("adaptive.replay", self.replay, get_args(Replay))


@dataclass(frozen=True)
class OnPolicySettings:
    """Mixed data: in a share of the optimizer steps the student answers the prompts itself.

    Args:
        fraction: of the optimizer steps whose rows the student answers (lambda of GKD), at the beginning of the run; None:
            0.5, with ``adaptive`` 0.
        schedule: ``constant``, or ``linear`` or ``cosine`` from ``fraction`` to ``end_fraction`` over the run.
        end_fraction: at the end of the run; only with ``linear`` and ``cosine``.
        temperature: of sampling; nothing to do with the temperature of the loss.
        top_p: draw from the likeliest tokens that together have this probability (nucleus sampling); 1: from all.
        max_new_tokens: longest answer in tokens, its end included.
        batch_size: prompts that one process answers at the same time; in fp32 it changes speed and memory alone.
        seed: of the coin and of the text; None: that of the training.
        gap_on: what the gap (student CE - teacher CE) is measured on: ``data``, rows of the data alone; or also on the
            student's own text, with the teacher's first choices as labels (``teacher_argmax``). See docs/gap.md.
        adaptive: the fraction follows the held-out loss, and texts are replayed, in the place of a schedule.
        backend: what generates: ``own``, our engine; ``vllm``, beside the student in this process, or a server of its own
            (see ``vllm_rollouts`` and ``vllm_server``: its noise is its own).
        vllm_memory: share of the device's memory that vLLM takes in this process.
        vllm_url: address of ``vllm serve``; None: vLLM is in this process.
        vllm_folder: folder that the server sees under the same name: the student's weights go through it.
        vllm_token_env: name of the environment variable with the server's token; None: it wants none.

    Raises:
        UserError: a value out of range, or a schedule without an end (or the other way round).
    """

    fraction: float | None = None
    schedule: Schedule = "constant"
    end_fraction: float | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    batch_size: int = 32
    seed: int | None = None
    gap_on: GapOn = "data"
    adaptive: AdaptiveSettings | None = None
    backend: Backend = "own"
    vllm_memory: float = 0.3
    vllm_url: str | None = None
    vllm_folder: str | None = None
    vllm_token_env: str | None = None

    def __post_init__(self) -> None:
        if self.adaptive is not None and not isinstance(self.adaptive, AdaptiveSettings):
            object.__setattr__(self, "adaptive", _made_of(AdaptiveSettings, self.adaptive, "on_policy.adaptive"))
        for name in ("fraction", "end_fraction"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise UserError(f"on_policy.{name}: got {value!r}, expected a share of the steps, from 0 to 1")
        for name, known in (("schedule", Schedule), ("gap_on", GapOn), ("backend", Backend)):
            _check_word(name, getattr(self, name), get_args(known))
        if problem := schedule_problem(self.schedule, self.end_fraction, self.adaptive is not None):
            raise UserError(f"on_policy.{problem}")
        if problem := server_problem(self.backend, self.vllm_url, self.vllm_folder, self.vllm_token_env):
            raise UserError(f"on_policy.{problem}")
        if not (_is_number(self.temperature) and self.temperature > 0 and math.isfinite(self.temperature)):
            raise UserError(f"on_policy.temperature: got {self.temperature!r}, expected a number above 0")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"on_policy.top_p: got {self.top_p!r}, expected a number above 0, at most 1")
        if not (_is_number(self.vllm_memory) and 0 < self.vllm_memory < 1):
            raise UserError(f"on_policy.vllm_memory: got {self.vllm_memory!r}, expected a share between 0 and 1")
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and not (name == "seed" and value is None):
                raise UserError(f"on_policy.{name}: got {value!r}, expected a whole number of at least {least}")

    @property
    def first_fraction(self) -> float:
        """``fraction``, where it is not given what stands for it."""
        if self.fraction is not None:
            return self.fraction
        return 0.5 if self.adaptive is None else 0.0

    @property
    def objective(self) -> dict[str, Any]:
        """What a run is about, without ``PLACES``."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in PLACES}

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as flat words, for trackers."""
        flat = self.objective
        flat |= {f"adaptive_{name}": value for name, value in (flat.pop("adaptive") or {}).items()}
        return {f"on_policy_{name}": value for name, value in flat.items()}

    def fraction_at(self, progress: float) -> float:
        """The probability that a step is answered by the student.

        Args:
            progress: of the run, 0 to 1.
        """
        if self.end_fraction is None:
            return self.first_fraction
        done = min(max(progress, 0.0), 1.0)
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.first_fraction + (self.end_fraction - self.first_fraction) * done


def schedule_problem(schedule: str, end_fraction: float | None, adaptive: bool) -> str:
    """What is wrong with a schedule, its end and an adaptive fraction taken together; empty where nothing is."""
    if adaptive and schedule != "constant":
        return f"schedule: got '{schedule}' beside adaptive, which moves the fraction itself; leave one of them out"
    if schedule == "constant" and end_fraction is not None:
        return f"end_fraction: got {end_fraction:g} with schedule 'constant', expected schedule 'linear' or 'cosine'"
    if schedule != "constant" and end_fraction is None:
        return f"end_fraction: is missing, expected the fraction that the schedule '{schedule}' ends with, from 0 to 1"
    return ""


def server_problem(backend: str, url: str | None, folder: str | None, token_env: str | None) -> str:
    """What is wrong with the options of a vLLM server taken together; empty where nothing is.

    Args:
        backend: what generates.
        url: of the server.
        folder: that the weights go through.
        token_env: name of the variable with its token.
    """
    options = {"vllm_url": url, "vllm_folder": folder, "vllm_token_env": token_env}
    given = [name for name, value in options.items() if value is not None]
    if given and backend != "vllm":
        return f"{given[0]}: belongs to backend 'vllm', got backend '{backend}'"
    if given and url is None:
        return f"{given[0]}: belongs to a server, expected its address as well: vllm_url: http://HOST:8000"
    if url is not None and folder is None:
        return (
            "vllm_folder: is missing, expected a folder that this machine and the server see under the same name: the "
            "student's weights go through it (of one machine /dev/shm/NAME)"
        )
    # Nothing of the value is shown: it may be the token itself
    if token_env is not None and not re.fullmatch(SECRET_VARIABLE, token_env):
        return f"vllm_token_env: {SECRET_VARIABLE_EXPECTED}, such as VLLM_API_KEY; the token itself never stands in a recipe"
    return ""


def on_policy_settings(given: OnPolicySettings | Mapping[str, Any] | None) -> OnPolicySettings | None:
    """The settings that a trainer was given, checked; None: training is on the data alone.

    Raises:
        UserError: a name that there is not, or a value out of range.
    """
    if given is None or isinstance(given, OnPolicySettings):
        return given
    return _made_of(OnPolicySettings, given, "on_policy")


def _made_of(kind: type[_Settings], given: object, key: str) -> _Settings:
    """Settings of a mapping of options.

    Raises:
        UserError: see ``on_policy_settings``.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(given, Mapping):
        raise UserError(f"{key}: got {given!r}, expected a mapping with {', '.join(names)}")
    for name in given:
        if name not in names:
            raise UserError(
                f"{key}: {name!r} is no option of it, expected {', '.join(names)}.{nearest(str(name), names)}"
            )
    return kind(**given)


def _check_word(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(
            f"on_policy.{name}: got {value!r}, expected one of {', '.join(known)}.{nearest(str(value), known)}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
