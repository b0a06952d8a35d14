"""The student's answers from a vLLM server elsewhere, which reads its weights from a folder before each of them.

**Not run by our tests** against vLLM itself: a server of theirs answers in its place, over HTTP, with weights that it has
read from the folder. Written against what ``vllm serve`` (0.16 or later) documents: ``/v1/completions`` on token ids with
``return_token_ids``, and, with ``VLLM_SERVER_DEV_MODE=1``, ``/collective_rpc`` for ``reload_weights`` of a
folder and ``/reset_prefix_cache``.

Weights go through a folder rather than NCCL, whose handshake is another one from version to version, needs a GPU on both
sides, and leaves the server hanging where a trainer dies in it. Safetensors in shared memory (or on a shared disk) cost one
copy in and one out. Each step has a folder of its own, for a file that is mapped must not change, and servers have answered
with what they had read before (vllm#32718). So the answers are checked too: see ``_weights_problem``.

What is given up is what ``vllm_rollouts`` gives up.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import queue
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dts_hf.distributed.processes import gathered, on_first_process, process
from dts_hf.distributed.sharding import is_sharded
from dts_hf.errors import RunError, UserError
from dts_hf.generation.engine import Generated, GenerationSettings, calmed
from dts_hf.generation.vllm_backend import row_seed
from dts_hf.models.head import Head, loss_in_head, without_adapters
from dts_hf.on_policy.vllm_rollouts import NOISE
from dts_hf.on_policy.whole_weights import whole_weights
from dts_hf.teachers.connection import Connection, Read, Refused, checked_url, token_key, token_of
from dts_hf.teachers.self_test import label_logprobs
from dts_hf.teachers.wire import WireError

logger = logging.getLogger(__name__)
KEY = "on_policy.vllm_url"
#: The first version of vLLM whose ``reload_weights`` takes a folder.
OLDEST = "0.16"
#: Of the log-probabilities of one answer, server's against student's: a larger mean distance, in nats, is no rounding.
MOST_APART = 0.25
_PREFIX = "dts_hf-weights-"  # of folders with weights: nobody else's begin so
_SHARD = 4 << 30  # bytes of a file of weights
_LONGEST_ANSWER = 64 << 20  # bytes of JSON
_JSON = {"Content-Type": "application/json"}


class Said(NamedTuple):
    """One answer, and the log-probabilities ``[tokens]`` that the server gave its tokens (the end among them)."""

    generated: Generated
    log_probs: list[float]

    @property
    def tokens(self) -> list[int]:
        """All that it has drawn."""
        end = self.generated.end
        return [*self.generated.tokens, *([] if end is None else [end])]


class VllmServer:
    """A server that answers with the student's weights of now; stands where ``generation.engine.generate`` would.

    The first process writes the weights and has the server read them; every process asks for its own rows.

    Args:
        url: of ``vllm serve``, such as ``http://127.0.0.1:8000``.
        folder: that the server sees under the same name; there is one copy of the weights in it at a time.
        token_env: name of the environment variable with the server's token (``--api-key``); None: it wants none.
        at_once: questions that one process asks at the same time.
        patience: how long a request is tried again before the run ends, seconds.

    Raises:
        UserError: the address or the variable is none.
    """

    def __init__(
        self, url: str, folder: str, *, token_env: str | None = None, at_once: int = 32, patience: float = 600.0
    ) -> None:
        self.url, self.folder, self.model = checked_url(url, KEY), Path(folder), ""
        if self.url.endswith("/v1"):
            raise UserError(f"{KEY}: got {url!r}, expected the address without /v1: weights have another path")
        token = token_of(token_env, token_key(KEY))
        self._connect = functools.partial(Connection, self.url, token, timeout=600.0, key=KEY, told={})
        self._free: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for _ in range(at_once):
            self._free.put(self._connect(patience=patience))
        self._at_once, self._told = at_once, False

    def check(self, model: nn.Module, longest: int | None, patience: float = 30.0) -> None:
        """Meet the server and the folder, and have a short answer, before anything is trained; every process calls it.

        Args:
            model: the student, whole.
            longest: tokens of a prompt and its answer; None: nobody knows.
            patience: as of the class, until somebody answers at all.

        Raises:
            UserError: nobody answers, or not as a vLLM server in development mode does; its model takes fewer tokens; or
                whatever a call raises.
        """
        self.model = on_first_process(lambda: self._meet(longest, patience), *process())
        settings = GenerationSettings(max_new_tokens=4, do_sample=True)
        try:
            self(model, [[0, 1, 2]], settings, eos_token_ids=[], pad_token_id=0, row_keys=["check"])
        except RunError as error:
            raise UserError(error, everywhere=True) from None

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        row_keys: Sequence[str],
    ) -> list[Generated]:
        """Answer every prompt with the weights that ``model`` has now; arguments as of ``generation.engine.generate``.

        Raises:
            UserError: an adapter cannot be merged.
            RunError: on every process, if the server does not read the weights of one, answer one, or answers with others.
        """
        if not self._told:
            logger.warning(NOISE)
            self._told = True
        said: list[Said] = []
        problem, vocab_size = "", without_adapters(model).config.get_text_config().vocab_size
        with self._turn():
            salt = self._push(model)
            try:
                said = self._ask_all(prompts, settings, row_keys, salt, ends=eos_token_ids, vocab_size=vocab_size)
            except RunError as error:
                problem = str(error)
            _raise_everywhere(problem)
        _raise_everywhere(self._weights_problem(model, prompts, said))
        return [one.generated for one in said]

    # -------------------------------------------------------------------------------------------------------- weights

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Within it no other run through the same folder gives the server its weights: answers would be of those.

        The first process waits for its turn, and removes what a run has left that was killed in its own.
        """
        descriptor = None
        try:
            if process()[0] == 0:
                with contextlib.suppress(OSError, ImportError):  # no such folder, which is told later; no locks here
                    import fcntl  # not everywhere

                    self.folder.mkdir(parents=True, exist_ok=True)
                    descriptor = os.open(self.folder, os.O_RDONLY)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    for left in self.folder.glob(f"{_PREFIX}*"):
                        shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _push(self, model: nn.Module) -> str:
        """Have the server read the weights of ``model``; every process calls it, for weights may lie in shares.

        Returns:
            a word for these weights, the same on every process.
        """
        rank, world = process()
        written: Path | None = None
        failed: Exception | None = None
        try:
            if rank == 0:
                try:
                    written = self._new_folder()
                except OSError as error:
                    failed = error
            failed = write_weights(model, written) or failed
            return on_first_process(lambda: self._reload(written, failed), rank, world)
        finally:
            if written is not None:
                shutil.rmtree(written, ignore_errors=True)

    def _new_folder(self) -> Path:
        """One for a step's weights; as the umask has it, for the server may be another user's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        made = self.folder.resolve() / f"{_PREFIX}{secrets.token_hex(8)}"
        made.mkdir()
        return made

    def _reload(self, written: Path | None, failed: Exception | None) -> str:
        if failed is not None or written is None:
            raise RunError(f"on_policy.vllm_folder: the student's weights could not be written: {failed}")
        asked = {"method": "reload_weights", "kwargs": {"weights_path": str(written)}}
        try:
            self._post("/collective_rpc", asked, bytes)
        except Refused as error:
            raise RunError(
                f"{error}. {KEY}: the server did not read the student's weights from {written}: it must be vLLM "
                f"{OLDEST} or later, see this folder under the same name, and serve a model of the student's class"
            ) from None
        # It answers with 200 also where it has not, for somebody asks it something: hence the word, as cache_salt
        self._post("/reset_prefix_cache", {}, bytes)
        return written.name

    def _weights_problem(self, model: nn.Module, prompts: Sequence[Sequence[int]], said: Sequence[Said]) -> str:
        """Whether answers are of other weights than the student's, in words: a server says nothing where it took none.

        What it says of the tokens of its longest answer must be what the student says of them, up to ``MOST_APART``.
        Weights of one step ago may be nearer than that; those of the beginning are not for long.
        """
        if not said:
            if is_sharded(model):  # the others need the weights that lie here
                log_probs_of(model, [0], [0])
            return ""
        prompt, longest = max(zip(prompts, said, strict=True), key=lambda pair: len(pair[1].tokens))
        own = log_probs_of(model, prompt, longest.tokens)
        apart = (own - torch.tensor(longest.log_probs, dtype=own.dtype)).abs().mean().item()
        if apart <= MOST_APART:
            return ""
        return (
            f"{KEY}: {self.url} answers with other weights than the student's: its log-probabilities of an answer of "
            f"{len(longest.tokens)} tokens are {apart:.2f} nats from the student's on average, expected {MOST_APART:g} at "
            "most. It must serve a model of the student's class, unquantised, with --logprobs-mode raw_logprobs (the "
            "default), to nobody else; or use backend: own"
        )

    # -------------------------------------------------------------------------------------------------------- answers

    def _ask_all(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        keys: Sequence[str],
        salt: str,
        *,
        ends: Sequence[int],
        vocab_size: int,
    ) -> list[Said]:
        """The answers in the order of the prompts. One question a row: one with many rows has one seed for all."""

        def read(content: bytes) -> Said:
            return read_answer(content, settings.max_new_tokens, ends=ends, vocab_size=vocab_size)

        def ask(prompt: Sequence[int], key: str) -> Said:
            body = {
                "model": self.model, "prompt": list(prompt), "max_tokens": settings.max_new_tokens,
                "temperature": settings.temperature if settings.do_sample else 0.0,
                "top_p": settings.top_p if settings.do_sample else 1.0,
                # What is not said comes out of the model's generation_config.json: its top_k, its penalties
                "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                "min_tokens": 0, "n": 1, "seed": row_seed(settings.seed, key),
                "ignore_eos": True, "stop_token_ids": list(ends),  # ours alone, not those of its files
                "logprobs": 0, "return_token_ids": True,
                "cache_salt": salt,  # nothing that was computed with other weights is found again
            }  # fmt: skip
            return self._post("/v1/completions", body, read)

        with ThreadPoolExecutor(max_workers=self._at_once) as threads:
            return list(threads.map(ask, prompts, keys))

    def _post(self, path: str, body: Mapping[str, Any], read: Callable[[bytes], Read]) -> Read:
        """Ask on a connection of its own: they are not made for several threads."""
        connection = self._free.get()
        try:
            return connection.post(path, json.dumps(body).encode(), _JSON, _LONGEST_ANSWER, read)
        finally:
            self._free.put(connection)

    # --------------------------------------------------------------------------------------------- before the training

    def _meet(self, longest: int | None, patience: float) -> str:
        """The name of the model that the server has."""
        connection = self._connect(patience=patience)
        try:
            name, most = connection.get("/v1/models", _LONGEST_ANSWER, _model_of)
            self._check_develops(connection)
        except RunError as error:  # nothing is trained yet
            raise UserError(f"{KEY}: {error}") from None
        if longest is not None and most is not None and longest > most:
            raise UserError(
                f"{KEY}: a prompt and its answer may have {longest:,} tokens, and {self.url} takes {most:,} (its "
                "--max-model-len); lower data.max_prompt_length or on_policy.max_new_tokens, or raise that"
            )
        return name

    def _check_develops(self, connection: Connection) -> None:
        """Refuse a server without the way in for weights. It takes POST alone: to GET it says so, where it is there."""
        try:
            connection.get("/collective_rpc", _LONGEST_ANSWER, bytes)
        except Refused as error:
            if error.status == HTTPStatus.METHOD_NOT_ALLOWED:
                return
        raise UserError(
            f"{KEY}: {self.url} takes no weights: start it with the environment variable VLLM_SERVER_DEV_MODE=1, where "
            "nobody else reaches it, for whoever does may then have it run anything"
        )


def _raise_everywhere(problem: str) -> None:
    """Raise what any process says: one that raised alone would leave the others in their next collective.

    Raises:
        RunError: on every process.
    """
    if found := next(filter(None, gathered(problem, process()[1])), ""):
        raise RunError(found, everywhere=True)


def write_weights(model: nn.Module, folder: Path | None) -> Exception | None:
    """Write the student's weights as safetensors, ``_SHARD`` bytes a file.

    Every process calls it, and to its end, whatever happens: sharded weights are gathered by all.

    Args:
        model: see ``whole_weights``.
        folder: an empty one; None: this process writes nothing.

    Returns:
        what went wrong as they were written.

    Raises:
        UserError: see ``whole_weights``.
    """
    from safetensors.torch import save_file

    held: dict[str, Tensor] = {}
    size = files = 0
    failed: Exception | None = None

    def flush() -> Exception | None:
        nonlocal held, size, files
        try:
            if folder is not None and held:
                file = folder / f"model-{files:05d}.safetensors"
                save_file(held, file, metadata={"format": "pt"})
                file.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for this user alone
        except Exception as error:  # of the disk, in words of safetensors; the others go on gathering
            return error
        held, size, files = {}, 0, files + 1
        return None

    for name, weight in whole_weights(model):
        if folder is None or failed is not None:
            continue
        held[name] = weight.to("cpu", copy=True).contiguous()  # one that is gathered is gone after its turn
        size += weight.numel() * weight.element_size()
        if size >= _SHARD:
            failed = flush()
    return failed or flush()


def log_probs_of(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log-probabilities ``[len(answer)]`` at T = 1, float32, on the CPU, of an answer behind its prompt.

    Where weights are sharded every process calls it at the same time, each with a row of its own.
    """
    ids = torch.tensor([[*prompt, *answer]], device=next(model.parameters()).device)
    found: list[Tensor] = []

    def read(states: Tensor, head: Head) -> Tensor:  # whole logits of a long row are gigabytes
        found.append(label_logprobs(states[0, len(prompt) - 1 : -1], head, ids[0, len(prompt) :]))
        return states

    with calmed(model), torch.no_grad(), loss_in_head(model, read):
        model(input_ids=ids, use_cache=False)
    return found[0].cpu()


def read_answer(content: bytes, most: int, *, ends: Sequence[int], vocab_size: int) -> Said:
    """Read an answer of ``/v1/completions``.

    Args:
        content: JSON.
        most: tokens that were asked for.
        ends: those that end an answer.
        vocab_size: of the student.

    Raises:
        WireError: it is none.
        RunError: it is one of another kind, or to another question.
    """
    try:
        choice = json.loads(content)["choices"][0]
        reason, tokens = choice["finish_reason"], choice.get("token_ids")
        log_probs = (choice.get("logprobs") or {}).get("token_logprobs")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise WireError("it is no completion in JSON") from None
    if not isinstance(tokens, list) or not isinstance(log_probs, list):
        raise RunError(
            f"{KEY}: the server answers without token_ids or logprobs; expected vLLM {OLDEST} or later, whose option "
            "return_token_ids this is"
        )
    if problem := _problem_of(tokens, log_probs, reason, most, ends, vocab_size):
        raise RunError(f"{KEY}: {problem}")
    finished = reason == "stop"
    return Said(Generated(tokens[:-1], True, tokens[-1]) if finished else Generated(tokens, False), log_probs)


def _problem_of(
    tokens: list[Any], log_probs: list[Any], reason: object, most: int, ends: Sequence[int], vocab_size: int
) -> str:
    """What is wrong with an answer; empty where nothing is."""
    if reason not in ("stop", "length") or not tokens or len(tokens) > most or len(log_probs) != len(tokens):
        return (
            f"an answer of {len(tokens)} tokens and {len(log_probs)} log-probabilities ended for the reason {reason!r}; "
            f"expected 1 to {most} of both, and the reason stop or length"
        )
    if not all(isinstance(token, int) and 0 <= token < vocab_size for token in tokens):
        return f"an answer holds what is no token of the student's vocabulary of {vocab_size:,}: it is another model's"
    if not all(isinstance(one, (int, float)) and math.isfinite(one) for one in log_probs):
        return "an answer has tokens without a log-probability, or with one that is non-finite"
    if reason == "length" and len(tokens) < most:
        return (
            f"the server has cut an answer after {len(tokens)} tokens, asked for {most}: its --max-model-len leaves no more "
            "behind the prompt, or the max_new_tokens of its --generation-config or --override-generation-config does not"
        )
    if reason == "stop" and tokens[-1] not in ends:
        return (
            f"the server has ended an answer with the token {tokens[-1]}, which is no end here; expected one of {ends}"
        )
    return ""


def _model_of(content: bytes) -> tuple[str, int | None]:
    """Name and longest row of the first model that ``/v1/models`` lists.

    Raises:
        WireError: it lists none.
    """
    try:
        first = json.loads(content)["data"][0]
        most = first.get("max_model_len")
        return str(first["id"]), None if most is None else int(most)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise WireError("it lists no model, as vllm serve does") from None
