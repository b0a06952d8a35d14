"""The HTTP side of a served teacher: who may ask, how much, and what becomes of everything else.

Nothing that a client sends is trusted before it is counted: the token is compared before the body is read, the declared
length before a byte of it, and the bytes as they come. Answers to refused requests are a plain sentence.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from dts_hf.serving.forward import ForwardQueue, QueueFull, TooLate
from dts_hf.serving.metrics import CONTENT_TYPE as METRICS_TYPE
from dts_hf.serving.metrics import Metrics
from dts_hf.teachers.description import Description
from dts_hf.teachers.wire import (
    CONTENT_TYPE,
    HEAD_PATH,
    PROTOCOL,
    PROTOCOL_HEADER,
    STATES_PATH,
    TEACHER_HEADER,
    TEACHER_PATH,
    TOKENS_HEADER,
    Answer,
    Limits,
    Question,
    WireError,
    encode_answer,
)

logger = logging.getLogger(__name__)
#: Bytes of an answer that are handed to the transport at once: a slow reader holds up so much and no more.
_PIECE = 1 << 18


class Refused(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP.
        message: a plain sentence for the client.
        headers: beside it.
    """

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class Served:
    """What a server answers from.

    Attributes:
        description: what ``GET /v1/teacher`` says.
        head: the bytes of ``GET /v1/head``.
        forward: takes a question.
    """

    description: Description
    head: bytes
    forward: Callable[[Question], Answer]

    @property
    def limits(self) -> Limits:
        """Of one question."""
        return self.description.limits

    @property
    def most_bytes(self) -> int:
        """Of a request's body: 5 for a token, 4 for a row, and the header of safetensors."""
        return 5 * self.limits.tokens + 4 * self.limits.rows + 4096

    def answer(self, question: Question) -> bytes:
        """The body of the answer."""
        return encode_answer(self.forward(question), question.token_hash, self.description.teacher_hash)


class TeacherApp:
    """The routes.

    Args:
        served: what they answer from.
        token: that a request must bear; None: anybody may ask.
        queue: how many questions may be here at once.
        seconds: after which an answer is too late.
        body_seconds: in which a body must have come.
    """

    def __init__(self, served: Served, token: str | None, *, queue: int, seconds: float, body_seconds: float) -> None:
        self.served, self.body_seconds = served, body_seconds
        self.metrics = Metrics()
        self.queue = ForwardQueue(served.answer, queue, seconds)
        self._token = None if token is None else _hashed(token)

    def asgi(self) -> FastAPI:
        """The application, as uvicorn runs it. It has no pages of documentation, which would be open to everybody."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            self.queue.close()

        app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
        for path, method, endpoint in (
            (TEACHER_PATH, "GET", self.teacher),
            (HEAD_PATH, "GET", self.head),
            (STATES_PATH, "POST", self.states),
            ("/metrics", "GET", self.show_metrics),
        ):
            app.add_api_route(path, self._guarded(endpoint), methods=[method], response_model=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        return app

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._check_token(request)
                response = await endpoint(request)
            except Refused as error:
                # Its body may not have been read: the next request must not begin in the middle of it
                headers = {**error.headers, "Connection": "close"}
                response = PlainTextResponse(f"{error}\n", error.status, headers)
            if request.url.path == STATES_PATH:
                self.metrics.requests[response.status_code] += 1
            return response

        return guarded

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            return
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(_hashed(given.strip()), self._token):
            raise Refused(401, "expected the server's token, as 'Authorization: Bearer TOKEN'",
                          **{"WWW-Authenticate": "Bearer"})  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ endpoints

    async def health(self) -> Response:
        """Open to everybody, and says nothing else."""
        return JSONResponse({"status": "ok"})

    async def teacher(self, request: Request) -> Response:
        """``GET /v1/teacher``: identity, limits, protocol."""
        return JSONResponse(self.served.description.as_json())

    async def head(self, request: Request) -> Response:
        """``GET /v1/head``: the head as a safetensors file."""
        return self._bytes(self.served.head)

    async def show_metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self.metrics.text(self.queue.here, self.queue.busy), media_type=METRICS_TYPE)

    async def states(self, request: Request) -> Response:
        """``POST /v1/states``."""
        self._check_headers(request)
        content = await self._body(request)
        try:
            question = Question.decode(content, self.served.limits)
        except WireError as error:
            raise Refused(422, str(error)) from None
        if (told := request.headers.get(TOKENS_HEADER)) not in (None, question.token_hash):
            raise Refused(422, f"{TOKENS_HEADER}: got {told[:64]!r}, but the hash of the tokens is another")
        try:
            answer = await self.queue.ask(question)
        except QueueFull:
            wait = max(1, math.ceil(self.queue.busy / max(1, self.metrics.requests[200]) * self.queue.longest / 2))
            raise Refused(429, f"{self.queue.longest} questions wait already; ask again later",
                          **{"Retry-After": str(min(wait, 30))}) from None  # fmt: skip
        except TooLate:
            raise Refused(504, f"the teacher had no answer within {self.queue.seconds:g} s") from None
        except Exception as error:  # memory, say: the next question may fit
            logger.exception("a question of %s rows failed", len(question.lengths))
            raise Refused(500, f"the teacher failed: {type(error).__name__}; its server's log says more") from None
        self.metrics.rows += len(question.lengths)
        self.metrics.tokens += len(question.input_ids)
        self.metrics.labels += question.labels
        self.metrics.bytes_sent += len(answer)
        return self._bytes(answer, **{TOKENS_HEADER: question.token_hash})

    def _check_headers(self, request: Request) -> None:
        """Refuse, before a byte of the body is read, what its headers rule out."""
        if (told := request.headers.get(PROTOCOL_HEADER, "none")) != str(PROTOCOL):
            raise Refused(400, f"{PROTOCOL_HEADER}: got {told[:20]!r}, expected {PROTOCOL}, which this server speaks")
        known = self.served.description.teacher_hash
        if (expected := request.headers.get(TEACHER_HEADER, known)) != known:
            raise Refused(409, f"{TEACHER_HEADER}: got {expected[:64]!r}, but the teacher here is {known}")
        length = request.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(411, "Content-Length: expected the number of bytes of the body")
        if len(length) > 18 or int(length) > self.served.most_bytes:
            raise Refused(413, f"Content-Length: got {length[:18]}, expected {self.served.most_bytes:,} bytes at most")

    async def _body(self, request: Request) -> bytes:
        async def read() -> bytes:
            content = bytearray()
            async for piece in request.stream():
                content += piece
                if len(content) > self.served.most_bytes:
                    raise Refused(413, f"the body has more than {self.served.most_bytes:,} bytes")
            return bytes(content)

        try:
            return await asyncio.wait_for(read(), self.body_seconds)
        except ClientDisconnect:
            raise Refused(408, "the client has left") from None
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not come within {self.body_seconds:g} s") from None

    def _bytes(self, content: bytes, **headers: str) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), _PIECE):
                yield content[start : start + _PIECE]

        headers["Content-Length"] = str(len(content))
        return StreamingResponse(pieces(), headers=headers, media_type=CONTENT_TYPE)


def _hashed(token: str) -> bytes:
    """Of one length, so that the time to compare two tells nothing of either."""
    return hashlib.sha256(token.encode()).digest()
