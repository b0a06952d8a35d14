"""What a server refuses, and that it goes on with others meanwhile."""

from __future__ import annotations

import logging
import socket
import threading
import time

import pytest
import requests
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dts_hf.teachers.wire import Answer, Question
from tests.support.served import TOKEN, running, served_tiny, with_forward

HEADERS = {"X-Teacher-Protocol": "1", "Authorization": f"Bearer {TOKEN}"}
LIMITS = {"max_rows": 4, "max_tokens": 64, "max_length": 32}


def question(*rows: int) -> Question:
    return Question.of_rows([(torch.arange(n), torch.arange(n) > 1) for n in rows or (5, 7)])


@pytest.fixture(scope="module")
def url():
    with running(served_tiny(**LIMITS), TOKEN) as url:
        yield url


def post(url: str, body, **headers) -> requests.Response:
    return requests.post(f"{url}/v1/states", body, headers={**HEADERS, **headers}, timeout=20)


def raw(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head_of_request(length: int | str, **headers: str) -> bytes:
    lines = {**HEADERS, "Host": "x", "Content-Length": str(length), **headers}
    return ("POST /v1/states HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode()


def read_all(connection: socket.socket) -> bytes:
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize("given_token", [None, "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", TOKEN])
@pytest.mark.parametrize("path", ["teacher", "head", "states", "metrics"])
def test_nothing_is_said_to_who_has_no_token(url, path, given_token) -> None:
    headers = {"X-Teacher-Protocol": "1", **({} if given_token is None else {"Authorization": given_token})}
    address = f"{url}/metrics" if path == "metrics" else f"{url}/v1/{path}"
    method = "POST" if path == "states" else "GET"
    answer = requests.request(method, address, data=question().encode() if method == "POST" else None, headers=headers)
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.text == "expected the server's token, as 'Authorization: Bearer TOKEN'\n"


def test_health_is_open_and_says_nothing_else(url) -> None:
    assert requests.get(f"{url}/health").json() == {"status": "ok"}
    assert requests.get(f"{url}/docs").status_code == requests.get(f"{url}/openapi.json").status_code == 404
    assert "server" not in {name.lower() for name in requests.get(f"{url}/health").headers}


@pytest.mark.parametrize(
    ("length", "headers", "status"), [(1000, {"Authorization": "Bearer x"}, 401), (99_999_999_999, {}, 413)]
)
def test_the_token_and_the_length_are_judged_before_a_byte_of_the_body_comes(url, length, headers, status) -> None:
    with raw(url) as connection:
        connection.sendall(head_of_request(length, **headers))
        answer = read_all(connection)  # ends where the server closes
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("status", "sentence", "body"),
    [
        (413, "expected 4,432 bytes at most", b"x" * 5000),
        (422, "expected the bytes of a safetensors file", b"x" * 100),
        (422, "expected the bytes of a safetensors file", b""),
        (422, "expected the bytes of a safetensors file", question().encode()[:-1]),
        (422, "expected the bytes of a safetensors file", (1 << 62).to_bytes(8, "little") + b"{}"),
        (422, "got the tensors x (float32), expected input_ids (int32), lengths (int32)", save({"x": torch.zeros(2)})),
        (422, "got 5 rows, expected 4 at most", question(3, 3, 3, 3, 3).encode()),
        (422, "got 33 tokens in one row, expected 32 at most", question(33).encode()),
        (422, "got 75 tokens, expected 64 at most", question(25, 25, 25).encode()),
        (422, "input_ids: got 320, expected 0 to 319", Question(torch.tensor([1, 320]).int(), torch.tensor([2]).int(),
                                                             torch.tensor([0, 1]).byte()).encode()),
        (422, "input_ids: got -1, expected", Question(torch.tensor([1, -1]).int(), torch.tensor([2]).int(),
                                                     torch.tensor([0, 1]).byte()).encode()),
        (422, "lengths: expected whole numbers above 0", Question(torch.tensor([1, 2]).int(), torch.tensor([3, -1]).int(),
                                                                 torch.tensor([0, 1]).byte()).encode()),
        (422, "label_mask: got 3 values, expected 2", Question(torch.tensor([1, 2]).int(), torch.tensor([2]).int(),
                                                              torch.tensor([0, 1, 1]).byte()).encode()),
        (422, "label_mask: got 7, expected 0 and 1", Question(torch.tensor([1, 2]).int(), torch.tensor([2]).int(),
                                                             torch.tensor([0, 7]).byte()).encode()),
        (422, "the first token of a row is marked", Question(torch.tensor([1, 2]).int(), torch.tensor([2]).int(),
                                                            torch.tensor([1, 1]).byte()).encode()),
        (422, "no token is marked as a label", Question(torch.tensor([1, 2]).int(), torch.tensor([2]).int(),
                                                       torch.tensor([0, 0]).byte()).encode()),
    ],
)  # fmt: skip
def test_what_is_no_question_gets_a_sentence(url, status, sentence, body) -> None:
    answer = post(url, body)
    assert answer.status_code == status and sentence in answer.text, answer.text


def test_headers_are_judged(url) -> None:
    body = question().encode()
    assert post(url, body).status_code == 200
    assert post(url, body, **{"X-Token-Hash": question(6).token_hash}).status_code == 422
    assert post(url, body, **{"X-Teacher-Hash": "xxh3:0"}).status_code == 409
    assert post(url, body, **{"X-Teacher-Protocol": "2"}).status_code == 400
    assert post(url, (piece for piece in [body])).status_code == 411  # chunked: its length is not known


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_bytes_bring_it_down(url, data) -> None:
    body = bytearray(question().encode())
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    answer = post(url, bytes(body[: data.draw(st.integers(0, len(body)))]))
    assert answer.status_code in (200, 422)


def test_slow_clients_are_cut_and_others_go_on_meanwhile() -> None:
    big = question(9)  # answered with 40 MB, more than the buffers of both sides hold

    def forward(asked, own):
        return Answer(torch.zeros(10_000_000, 1), torch.zeros(1)) if asked.labels == big.labels else own(asked)

    with running(with_forward(served_tiny(), forward), TOKEN, cut_after=1.0) as url:
        silent, headless, bodiless, reader = (raw(url) for _ in range(4))
        headless.sendall(b"POST /v1/states HTTP/1.1\r\nX-")
        bodiless.sendall(head_of_request(1000) + b"x" * 10)
        reader.sendall(head_of_request(len(big.encode())) + big.encode())
        began = time.monotonic()
        while time.monotonic() - began < 2:
            assert post(url, question().encode()).status_code == 200
        for connection in (silent, headless, bodiless):
            assert read_all(connection) == b""
            connection.close()
        assert 0 < len(read_all(reader)) < 40_000_000
        reader.close()
        assert len(post(url, big.encode()).content) > 40_000_000


def test_a_body_that_does_not_come_is_told_so() -> None:
    with running(served_tiny(), TOKEN, body_seconds=0.3) as url, raw(url) as connection:
        connection.sendall(head_of_request(1000) + b"x" * 10)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and answer.endswith(b"the body did not come within 0.3 s\n")


def test_a_full_queue_says_so_and_a_late_answer_is_none() -> None:
    free, begun = threading.Event(), threading.Event()

    def forward(asked, own):
        begun.set()
        free.wait(20)
        return own(asked)

    with running(with_forward(served_tiny(), forward), queue=2, seconds=1.5) as url:
        found: list[requests.Response] = []
        threads = [threading.Thread(target=lambda: found.append(post(url, question().encode()))) for _ in range(2)]
        threads[0].start()
        assert begun.wait(20)
        threads[1].start()
        deadline = time.monotonic() + 20
        while "queue 2" not in requests.get(f"{url}/metrics").text and time.monotonic() < deadline:
            time.sleep(0.01)
        third = post(url, question().encode())
        assert third.status_code == 429 and int(third.headers["Retry-After"]) >= 1
        assert third.text == "2 questions wait already; ask again later\n"
        for thread in threads:
            thread.join(20)
        assert [answer.status_code for answer in found] == [504, 504]
        assert "no answer within 1.5 s" in found[0].text
        free.set()
        deadline = time.monotonic() + 20
        while "queue 0" not in requests.get(f"{url}/metrics").text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert post(url, question().encode()).status_code == 200


def test_a_forward_that_fails_is_a_sentence_and_the_next_one_is_answered(caplog) -> None:
    failures = iter([RuntimeError("ids 11 12 13 do not fit")])

    def forward(asked, own):
        for error in failures:
            raise error
        return own(asked)

    with running(with_forward(served_tiny(), forward)) as url, caplog.at_level(logging.CRITICAL, "dts_hf.serving.app"):
        failed = post(url, question().encode())
        assert failed.status_code == 500
        assert failed.text == "the teacher failed: RuntimeError; its server's log says more\n"
        assert post(url, question().encode()).status_code == 200


def test_metrics_count(url) -> None:
    def numbers() -> dict[str, float]:
        text = requests.get(f"{url}/metrics", headers=HEADERS).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    before = numbers()
    answer = post(url, question().encode())
    after = numbers()
    ends = {name.removeprefix("dts_hf_teacher_"): after[name] - before.get(name, 0) for name in after}
    assert ends['requests_total{status="200"}'] == 1 and ends["rows_total"] == 2 and ends["tokens_total"] == 12
    assert ends["labels_total"] == 8 and ends["sent_bytes_total"] == len(answer.content)
    assert ends["forward_seconds_total"] > 0 and after["dts_hf_teacher_queue"] == 0


def test_no_log_holds_a_token_or_a_row(caplog) -> None:
    with caplog.at_level(logging.DEBUG), running(served_tiny(), TOKEN) as url:
        for headers in (HEADERS, {**HEADERS, "Authorization": "Bearer a-wrong-token-of-somebody"}):
            requests.post(f"{url}/v1/states", question().encode(), headers=headers)
        post(url, b"nonsense")
    assert TOKEN not in caplog.text and "a-wrong-token" not in caplog.text
