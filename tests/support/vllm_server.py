"""A server with the doors of ``vllm serve``: it answers with weights that it has read from a folder, by our own engine."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from safetensors.torch import load_file

from dts_hf.generation.engine import GenerationSettings, generate


@dataclass
class Vllm:
    """What it has, what it was asked, and what is wrong with it.

    Args:
        model: with weights of its own until it reads others.
        develops: ``VLLM_SERVER_DEV_MODE=1``.
        reads: whether ``reload_weights`` has an effect: vllm#32718 had none, in silence.
        longest: ``--max-model-len``.
        ids: ``return_token_ids`` is known.
        token: ``--api-key``; guards ``/v1`` alone, as vLLM's does.
        busy: so many questions are answered with 503 first.
        most: ``max_new_tokens`` of its generation config, which it takes where the question has more.
        ends: its own end tokens, unless the question says ``ignore_eos``.
        keeps: its prefix cache cannot be reset, which it says with a 200; of a prompt that it knows, if not of another
            ``cache_salt``, it says again what it has said.
        slow: seconds that it takes to read weights.
        spoil: changes an answer's choice.
    """

    model: torch.nn.Module
    develops: bool = True
    reads: bool = True
    longest: int = 512
    ids: bool = True
    token: str | None = None
    busy: int = 0
    most: int = 10_000
    ends: tuple[int, ...] = ()
    keeps: bool = False
    slow: float = 0.0
    spoil: Callable[[dict], object] = lambda _choice: None
    asked: list[dict] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    known: dict[tuple, dict] = field(default_factory=dict)
    modes: set[str] = field(default_factory=set)
    resets: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reload_weights(self, weights_path: str) -> None:
        files = sorted(Path(weights_path).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(weights_path)
        self.folders.append(Path(weights_path))
        self.modes |= {oct(path.stat().st_mode & 0o777) for path in (Path(weights_path), *files)}
        time.sleep(self.slow)
        if self.reads:
            own = dict(self.model.named_parameters())
            read = {name: value for file in files for name, value in load_file(file).items()}
            assert read.keys() == own.keys()
            with torch.no_grad():
                for name, value in read.items():
                    own[name].copy_(value)

    def complete(self, body: dict) -> dict:
        key = (*body["prompt"], body.get("cache_salt"))
        if not self.keeps or key not in self.known:
            self.known[key] = self._answer(body)
        return self.known[key]

    def _answer(self, body: dict) -> dict:
        settings = GenerationSettings(max_new_tokens=min(body["max_tokens"], self.most), do_sample=False)
        ends = [*body["stop_token_ids"], *(() if body.get("ignore_eos") else self.ends)]
        with self.lock:
            self.asked.append(body)
            (said,) = generate(self.model, [body["prompt"]], settings, eos_token_ids=ends, pad_token_id=0)
            tokens = [*said.tokens, *([said.end] if said.finished else [])]
            with torch.no_grad():
                logits = self.model(torch.tensor([[*body["prompt"], *tokens]])).logits[0, -len(tokens) - 1 : -1]
            told = logits.float().log_softmax(-1)[range(len(tokens)), tokens].tolist()
        choice = {"index": 0, "text": "", "finish_reason": "stop" if said.finished else "length"}
        if self.ids:
            choice |= {"token_ids": tokens, "logprobs": {"token_logprobs": told}}
        self.spoil(choice)
        return {"object": "text_completion", "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    vllm: Vllm

    def log_message(self, *_args) -> None:
        pass

    def _say(self, status: int, content: dict | None = None) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _allowed(self) -> bool:
        wanted = self.vllm.token
        if self.path.startswith("/v1") and wanted and self.headers.get("Authorization") != f"Bearer {wanted}":
            self._say(401, {"error": "Unauthorized"})
            return False
        return True

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path == "/v1/models":
            self._say(200, {"object": "list", "data": [{"id": "student", "max_model_len": self.vllm.longest}]})
        elif self.path == "/collective_rpc" and self.vllm.develops:
            self._say(405, {"detail": "Method Not Allowed"})
        else:
            self._say(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        if self.vllm.busy > 0:
            self.vllm.busy -= 1
            self._say(503, {"error": "busy"})
        elif self.path == "/v1/completions":
            self._say(200, self.vllm.complete(body))
        elif self.path == "/reset_prefix_cache":
            self.vllm.resets += 1
            self._say(200)
        else:
            try:
                getattr(self.vllm, body["method"])(**body["kwargs"])
            except Exception as error:  # as vLLM does
                self._say(500, {"error": {"message": repr(error)}})
            else:
                self._say(200, {"results": [None]})


@contextlib.contextmanager
def serving(vllm: Vllm) -> Iterator[str]:
    """Serve within the context; yields the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"vllm": vllm}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(20)
