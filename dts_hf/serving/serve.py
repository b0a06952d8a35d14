"""``dts-hf serve-teacher``: load a teacher, and answer for it until somebody stops it."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from dts_hf.console import harmless
from dts_hf.data.chat_templates import resolve_template
from dts_hf.distributed.processes import default_device
from dts_hf.errors import RunError, UserError
from dts_hf.models.checks import positions_of
from dts_hf.models.head import check_head, head_of
from dts_hf.models.loading import load_teacher, load_tokenizer
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Teacher
from dts_hf.serving.forward import TeacherForward
from dts_hf.teachers.connection import is_loopback, token_of
from dts_hf.teachers.description import Description, encode_head
from dts_hf.teachers.identity import TeacherIdentity, identity_of, model_facts, rows_facts
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.wire import Answer, Limits, Question

if TYPE_CHECKING:
    import uvicorn

    from dts_hf.serving.app import Served

logger = logging.getLogger(__name__)
#: A token that is guessed in less is none.
SHORTEST_TOKEN = 16
#: Seconds that a connection may take besides the time of the answer, to send the body and to read the answer.
_TRANSFER_SECONDS = 60.0
_MOST_CONNECTIONS = 512


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, to whom, and how much it takes.

    Args:
        host: address to listen on.
        port: 0: any that is free.
        token_env: name of the environment variable with the token; None: none is asked for, on loopback alone.
        queue: questions that may be here at once; the next one is told to come again.
        seconds: after which an answer is too late.
        body_seconds: in which a body must have come.
        max_rows: most rows of one question.
        max_tokens: most tokens of one question.
        max_length: most tokens of one row; None: the model's positions, and 8,192 at most.
        batch_tokens: most tokens of a forward, padding included.
        engine: ``transformers``, or ``vllm`` for a model of several GPUs (see ``vllm_states``).
        tensor_parallel: GPUs that vLLM puts each layer on.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    token_env: str | None = None
    queue: int = 16
    seconds: float = 120.0
    body_seconds: float = 30.0
    max_rows: int = 1024
    max_tokens: int = 65_536
    max_length: int | None = None
    batch_tokens: int = 16_384
    engine: str = "transformers"
    tensor_parallel: int = 1


def serve_teacher(source: str, options: ServeOptions, **changes: Any) -> None:
    """Load the teacher of a recipe, or a model, and serve it until a signal comes.

    Args:
        source: a recipe (its teacher, of whatever kind the recipe trains with), Hub name, folder or GGUF file.
        options: see ``ServeOptions``.
        changes: to the teacher's section, such as ``dtype``; None: as it is.

    Raises:
        UserError: before anything is loaded, or the model is none that can teach.
        RunError: the address cannot be listened on.
    """
    token = _checked(options)
    teacher, template = _teacher(source, {key: value for key, value in changes.items() if value is not None})
    with closing(listen(options)) as listening:  # before the model is loaded, which may take minutes
        served = load_served(teacher, template, options)
        server = make_server(served, options, token)
        host, port = listening.getsockname()[:2]
        identity = served.description.identity
        logger.warning(
            "serving %s (%s, H %s, V %s) at http://%s:%s", harmless(identity.model), identity.dtype,
            identity.hidden_size, identity.vocab_size, f"[{host}]" if ":" in host else host, port,
        )  # fmt: skip
        server.run([listening])


def _checked(options: ServeOptions) -> str | None:
    """The token, or None.

    Raises:
        UserError: the options do not fit together, or a package is missing.
    """
    if any(importlib.util.find_spec(package) is None for package in ("fastapi", "uvicorn")):
        raise UserError("serve-teacher: needs FastAPI and uvicorn: pip install 'dts-hf[server]'")
    token = token_of(options.token_env)
    if token is None and not is_loopback(options.host):
        raise UserError(
            f"--host: got {options.host!r}, which other machines reach, without --token-env; expected the name of an "
            "environment variable with a token, such as --token-env TEACHER_TOKEN, or --host 127.0.0.1"
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise UserError(
            f"--token-env: the token in {options.token_env} has {len(token)} characters, expected {SHORTEST_TOKEN} at "
            "least, such as those of: openssl rand -hex 32"
        )
    return token


def _teacher(source: str, changes: dict[str, Any]) -> tuple[Teacher, str]:
    """The teacher's section, and the name of the prompt template.

    Raises:
        UserError: the recipe has no teacher.
    """
    if source.endswith((".yaml", ".yml")):
        recipe = load_recipe(source)
        if recipe.task is not None:
            raise UserError(
                f"{source}: a recipe with a task, expected one of a language model: classifiers are not served"
            )
        elsewhere = {"kind": "live", "url": None, "token_env": None, "cache": None, "missing": "error"}
        section = recipe.required_teacher.model_dump()
        if section["kind"] == "self":
            raise UserError(f"{source}: teacher.kind is 'self', so there is no teacher to serve besides the student")
        return Teacher(**{**section, **elsewhere, **changes}), recipe.data.prompt_template
    return Teacher(model=source, **changes), "auto"


def listen(options: ServeOptions) -> socket.socket:
    """A bound socket.

    Args:
        options: for the address.

    Raises:
        RunError: the address is taken, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
    except OSError as error:
        listening.close()
        raise RunError(f"cannot listen on {options.host}, port {options.port}: {error.strerror or error}") from None
    return listening


def load_served(teacher: Teacher, template: str, options: ServeOptions) -> Served:
    """Load a teacher and describe it.

    Args:
        teacher: its section.
        template: name of the prompt template of the rows.
        options: for the limits.

    Raises:
        UserError: see ``load_teacher`` and ``check_head``.
    """
    tokenizer = load_tokenizer(
        teacher.tokenizer or teacher.model, key="teacher.tokenizer", revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
    )  # fmt: skip
    words = resolve_template(template, tokenizer)
    if options.engine == "vllm":
        return _load_vllm(teacher, options, rows_facts(tokenizer, words))
    model = load_teacher(teacher)
    names = {"name": teacher.model, "revision": teacher.revision, "quantization": teacher.quantization}
    identity = identity_of(model, tokenizer, words, **names)  # type: ignore[arg-type]
    return served_model(model, identity, options)


def _load_vllm(teacher: Teacher, options: ServeOptions, rows: Mapping[str, Any]) -> Served:
    """A folder's model behind vLLM; only its final norm and head are loaded beside the engine.

    Args:
        teacher: its section.
        options: see ``ServeOptions``.
        rows: the part of the identity that says what encodes the rows.

    Raises:
        UserError: it is no folder, quantised, or what vLLM gives fails the self-test.
    """
    from dts_hf.serving.vllm_states import VllmStates, load_ends, load_engine

    if not Path(teacher.model).is_dir() or teacher.quantization != "none":
        raise UserError(
            f"--engine: vllm serves a folder with safetensors, got {teacher.model!r} with quantization "
            f"'{teacher.quantization}'; 'hf download' fetches one from the Hub"
        )
    ends = load_ends(teacher.model, getattr(torch, teacher.dtype))
    storage = tempfile.mkdtemp(prefix="dts-hf-states-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    atexit.register(shutil.rmtree, storage, ignore_errors=True)
    layers: int = ends.config.get_text_config().num_hidden_layers
    length = _length(ends, options)
    engine = load_engine(
        teacher.model, teacher.dtype, layers, storage, tensor_parallel_size=options.tensor_parallel,
        max_model_len=length + 1,
    )  # fmt: skip
    forward = VllmStates(engine[0], ends, *engine[1:])
    forward.check(teacher.dtype)
    identity = TeacherIdentity(**model_facts(ends, teacher.model), **rows)
    return _served(ends, identity, options, forward)


def served_model(model: PreTrainedModel, identity: TeacherIdentity, options: ServeOptions) -> Served:
    """A model that is loaded as something to serve.

    Args:
        model: a causal language model.
        identity: of it.
        options: for the limits.

    Raises:
        UserError: its head is none that ``Head`` can represent.
    """
    live = LiveTeacher(model).to(default_device())
    check_head(model, role="teacher")
    return _served(model, identity, options, TeacherForward(live, options.batch_tokens))


def _served(
    model: PreTrainedModel, identity: TeacherIdentity, options: ServeOptions, forward: Callable[[Question], Answer]
) -> Served:
    from dts_hf.serving.app import Served

    # Below the ids of the embedding: the head may have more rows, or fewer
    embedding: Any = model.get_input_embeddings()
    ids = min(identity.vocab_size, int(embedding.weight.shape[0]))
    limits = Limits(options.max_rows, options.max_tokens, _length(model, options), ids)
    return Served(Description(identity, limits), encode_head(head_of(model)), forward)


def _length(model: PreTrainedModel, options: ServeOptions) -> int:
    """Most tokens of a row."""
    return min(options.max_length or 8192, positions_of(model) or 8192, options.max_tokens)


def make_server(served: Served, options: ServeOptions, token: str | None) -> uvicorn.Server:
    """What runs the application, with time limits on every connection, and no line about any request.

    Args:
        served: what is served.
        options: see ``ServeOptions``.
        token: that a request must bear; None: none.
    """
    import uvicorn

    from dts_hf.serving.app import TeacherApp
    from dts_hf.serving.connections import timed_protocol

    app = TeacherApp(served, token, queue=options.queue, seconds=options.seconds, body_seconds=options.body_seconds)
    return uvicorn.Server(
        uvicorn.Config(
            app.asgi(), http=timed_protocol(options.seconds + _TRANSFER_SECONDS), ws="none", loop="asyncio",
            log_level="warning", access_log=False, server_header=False, limit_concurrency=_MOST_CONNECTIONS,
            timeout_keep_alive=75, timeout_graceful_shutdown=10,
        )
    )  # fmt: skip
