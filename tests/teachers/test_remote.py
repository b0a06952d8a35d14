"""A teacher behind HTTP gives what the same teacher gives in the process, and nothing else is learned from."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import logging
import socket
import threading
import time

import pytest
import requests
import torch

from dts_hf.errors import RunError, UserError
from dts_hf.models.packed_attention import cu_seqlens_mask
from dts_hf.teachers.description import Description, encode_head
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.wire import Answer
from tests.support.served import TOKEN, VARIABLE, batch_of, running, served_tiny, with_forward
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import trainer_for

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19]]


@pytest.fixture(scope="module")
def url():
    with running(served_tiny()) as url:
        yield url


def losses(trainer):
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], {
        name: value.clone() for name, value in trainer.model.state_dict().items()
    }


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["padded", "packed"])
def test_fifty_steps_with_a_remote_teacher_are_those_with_a_local_one(tmp_path, url, options) -> None:
    told = {"options": {"max_steps": 50}, **options}
    local, weights = losses(trainer_for(tmp_path / "local", **told))
    remote, far_weights = losses(trainer_for(tmp_path / "remote", teacher=RemoteTeacher(url), **told))
    assert len(local) == 50
    assert remote == pytest.approx(local, rel=1e-6)
    assert max(float((weights[name] - far_weights[name]).abs().max()) for name in weights) < 1e-5


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_on_either_side_is_cut_off(url, left) -> None:
    batch, labels = batch_of(ROWS, left=left)
    teacher = LiveTeacher(tiny_llama(seed=1, layers=3))
    alone = [teacher.states(*batch_of([row])) for row in ROWS]
    torch.testing.assert_close(RemoteTeacher(url).states(batch, labels), torch.cat(alone), rtol=0, atol=1e-5)


def test_packs_are_cut_by_positions_or_by_boundaries(url) -> None:
    teacher, remote = LiveTeacher(tiny_llama(seed=1, layers=3)), RemoteTeacher(url)
    expected = torch.cat([teacher.states(*batch_of([row])) for row in ROWS])
    ids = torch.tensor([[i for row in ROWS for i in row]])
    labels = torch.tensor([[label for row in ROWS for label in (-100, -100, *row[2:])]])
    positions = torch.tensor([[k for row in ROWS for k in range(len(row))]])
    for told in ({"position_ids": positions}, {"attention_mask": cu_seqlens_mask([len(row) for row in ROWS])}):
        torch.testing.assert_close(remote.states({"input_ids": ids, **told}, labels), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_batch_is_asked_while_this_one_is_at_work(tmp_path, workers) -> None:
    """Also in workers of a data loader, which then carry the states; and a batch is asked for once."""
    asked: list[str] = []
    served = with_forward(served_tiny(), lambda question, own: (asked.append(question.token_hash), own(question))[1])
    options = {"max_steps": 4, "dataloader_num_workers": workers, "gradient_accumulation_steps": 2,
               "per_device_train_batch_size": 2}  # fmt: skip
    local = losses(trainer_for(tmp_path / "local", options=options))[0]
    with running(served) as url:
        teacher = RemoteTeacher(url)
        met = len(asked)
        found = losses(trainer_for(tmp_path / "remote", teacher=teacher, options=options))[0]
    assert found == pytest.approx(local, rel=1e-6)
    assert len(set(asked[met:])) == len(asked[met:]) <= 8 + (1 if workers == 0 else 8)


def test_a_step_of_many_micro_batches_is_asked_once(tmp_path, monkeypatch) -> None:
    """All of them are drawn before the first forward: what is kept must hold them."""
    monkeypatch.setattr("dts_hf.training.pair.MOST_KEPT", 2)
    asked: list[str] = []
    served = with_forward(served_tiny(), lambda question, own: (asked.append(question.token_hash), own(question))[1])
    options = {"max_steps": 2, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    with running(served) as url:
        teacher = RemoteTeacher(url)
        met = len(asked)
        losses(trainer_for(tmp_path, teacher=teacher, options=options))
    assert len(set(asked[met:])) == len(asked[met:])


def test_a_batch_with_too_many_rows_is_asked_in_parts() -> None:
    batch, labels = batch_of(ROWS * 3)
    with running(served_tiny(max_rows=2, max_tokens=11, max_length=8)) as url:
        found = RemoteTeacher(url).states(batch, labels)
    expected = LiveTeacher(tiny_llama(seed=1, layers=3)).states(batch, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_batch_without_labels_asks_nothing(url) -> None:
    batch, labels = batch_of(ROWS)
    assert RemoteTeacher(url).states(batch, torch.full_like(labels, -100)).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, "hides tokens in the middle of a row"),
        ({"attention_mask": torch.tensor([[1, 2, 2, 1]])}, "got values beside 0 and 1"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "got the shape (1, 1, 4, 4), expected that of input_ids, (1, 4)"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6]])}, "expected 0, 1, 2 and so on"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "nor on the first token of a packed"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "3 of them count, but 2 lie on tokens"),
    ],
)
def test_batches_that_are_no_rows_are_refused(url, change, words) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(UserError) as error:
        RemoteTeacher(url).states({"input_ids": ids, **change}, ids.clone())
    assert words in str(error.value)


def test_bfloat16_states_have_the_bits_of_a_local_teacher(tmp_path) -> None:
    batch, labels = batch_of(ROWS)
    teacher = tiny_llama(seed=1, layers=3).to(torch.bfloat16)
    with running(served_tiny(teacher)) as url:
        remote = RemoteTeacher(url)
        found = remote.states(batch, labels)
    assert found.dtype == torch.bfloat16 and torch.equal(found, LiveTeacher(teacher).states(batch, labels))
    assert torch.equal(remote.head.weight, teacher.lm_head.weight)


# ------------------------------------------------------------------------------------------------- what is not learned from


def pre_norm(question, own):
    """States before the final norm, with log-probabilities that are right."""
    answer, live = own(question), own.teacher
    kept = []
    hook = live.backbone.norm.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    try:
        own(question)
    finally:
        hook.remove()
    mask = torch.nn.utils.rnn.pad_sequence([row[1] for row in question.rows()], batch_first=True).bool()
    return Answer(kept[0][:, :-1][mask[:, 1:]], answer.label_logprob)


def shifted(question, own):
    answer = own(question)
    return Answer(answer.states.roll(1, 0), answer.label_logprob)


def bf16_then_back(question, own):
    answer = own(question)
    return Answer((answer.states.bfloat16() * 1.05).float(), answer.label_logprob)


@pytest.mark.parametrize("forward", [pre_norm, shifted, bf16_then_back])
def test_states_that_the_head_does_not_read_are_refused_when_the_server_is_met(forward) -> None:
    with running(with_forward(served_tiny(), forward)) as url, pytest.raises(UserError) as error:
        RemoteTeacher(url)
    assert url in str(error.value) and "the self-test failed" in str(error.value)
    assert "another head or vocabulary, other rows, or states before the norm" in str(error.value)


@pytest.mark.parametrize("forward", [pre_norm, shifted])
def test_a_server_that_goes_wrong_later_ends_the_run_before_its_step(tmp_path, forward) -> None:
    wrong = threading.Event()
    served = with_forward(
        served_tiny(), lambda question, own: forward(question, own) if wrong.is_set() else own(question)
    )
    with running(served) as url:
        trainer = trainer_for(tmp_path, teacher=RemoteTeacher(url), options={"max_steps": 3})
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        wrong.set()
        with pytest.raises(RunError, match="the self-test failed"):
            trainer.train()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_a_server_that_declares_states_before_the_norm_is_refused() -> None:
    served = served_tiny()
    identity = dataclasses.replace(served.description.identity, states="pre_norm")
    served = dataclasses.replace(served, description=Description(identity, served.limits))
    with running(served) as url, pytest.raises(UserError, match="states are 'pre_norm', expected 'post_norm'"):
        RemoteTeacher(url)


def test_a_head_that_is_not_the_described_one_is_refused() -> None:
    served = served_tiny()
    cut = dataclasses.replace(served, head=encode_head(served.forward.teacher.head.cut(300)))
    with (
        running(cut) as url,
        pytest.raises(UserError, match="vocabulary V of the head: 320 in its identity, 300 here"),
    ):
        RemoteTeacher(url)


def test_other_tokens_are_refused(url, tmp_path) -> None:
    with pytest.raises(UserError, match="for other tokens: tokenizer's vocabulary"):
        trainer_for(tmp_path, teacher=RemoteTeacher(url), processing_class=tiny_tokenizer_with_a_swap())


def tiny_tokenizer_with_a_swap():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<one more>"])
    return tokenizer


def test_rows_longer_than_the_server_takes_are_refused_before_the_first_step(tmp_path) -> None:
    with running(served_tiny(max_length=20)) as url, pytest.raises(UserError) as error:
        trainer_for(tmp_path, teacher=RemoteTeacher(url))
    assert "train_dataset: " in str(error.value) and "the server takes 20 at most" in str(error.value)


# ------------------------------------------------------------------------------------------------------------- the line


@contextlib.contextmanager
def through(url: str, change):
    """A server before the server at ``url``: ``change(path, content)`` says what becomes of an answer's bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            told = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            answer = requests.request(self.command, url + self.path, data=body, headers=told)
            status, content = change(self.path, answer.status_code, answer.content)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("place", ["states", "logprob", "header"])
def test_a_flipped_byte_is_found_and_asked_again(url, place) -> None:
    batch, labels = batch_of(ROWS)
    flips = iter([True])

    def change(path, status, content):
        if path == "/v1/states" and next(flips, False):
            changed = bytearray(content)
            changed[{"states": -5, "logprob": -3, "header": 30}[place]] ^= 4
            if place == "states":
                changed[len(content) // 2] ^= 4
            return status, bytes(changed)
        return status, content

    with through(url, change) as proxy:
        teacher = RemoteTeacher(proxy)
        flips = iter([True])
        found = teacher.states(batch, labels)
    assert torch.equal(found, RemoteTeacher(url).states(batch, labels))
    assert teacher.asking.connection.retries >= 1


def test_a_line_that_always_flips_a_byte_ends_the_run(url) -> None:
    batch, labels = batch_of(ROWS)
    broken = threading.Event()

    def change(path, status, content):
        return status, content[:-1] + bytes([content[-1] ^ 1]) if broken.is_set() else content

    with through(url, change) as proxy:
        teacher = RemoteTeacher(proxy)
        broken.set()
        with pytest.raises(RunError, match="3 damaged answers: its checksum is another one"):
            teacher.states(batch, labels)


def test_what_passes_is_waited_for_and_what_does_not_ends_at_once(url, monkeypatch) -> None:
    monkeypatch.setattr("dts_hf.teachers.connection._FIRST_PAUSE", 0.01)
    batch, labels = batch_of(ROWS)
    codes = iter([429, 503, 504, 502])

    def change(path, status, content):
        code = next(codes, 200) if path == "/v1/states" else 200
        return (status, content) if code == 200 else (code, b"not now")

    with through(url, change) as proxy:
        teacher = RemoteTeacher(proxy)
        assert teacher.asking.connection.retries == 4
        teacher.asking.connection.patience = 0.05
        codes = iter([503] * 1000)
        with pytest.raises(RunError, match=rf"{proxy}/v1/states: no answer in 0.05 s .* the last: 503 not now"):
            teacher.states(batch, labels)
        codes = iter([413])
        with pytest.raises(RunError, match=rf"{proxy}/v1/states: 413 not now"):
            teacher.states(batch, labels)
        codes = iter([302])  # a token must not follow to wherever an answer points
        with pytest.raises(RunError, match="302, a redirection to nowhere, which is not followed"):
            teacher.states(batch, labels)


def test_an_answer_that_is_too_long_is_not_read(url) -> None:
    batch, labels = batch_of(ROWS)
    large = threading.Event()

    def change(path, status, content):
        return status, b"x" * 50_000_000 if large.is_set() else content

    with through(url, change) as proxy:
        teacher = RemoteTeacher(proxy)
        large.set()
        with pytest.raises(RunError, match="damaged answers: it has more than"):
            teacher.states(batch, labels)


def test_nobody_there_is_a_sentence_before_training() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError) as error:
        RemoteTeacher(url, first_patience=0.3)
    assert str(error.value).startswith(f"teacher.url: {url}/v1/teacher: no answer in 0.3 s and ")
    assert "Connection refused" in str(error.value) and "object at 0x" not in str(error.value)


def test_something_else_than_a_teacher_is_a_sentence() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="501"):
            RemoteTeacher(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("teacher.example:8765", "expected an address such as"),
        ("ftp://teacher.example", "expected an address such as"),
        ("http://user:secret@teacher.example", "holds a user or a password"),
        ("http://teacher.example?token=1", "expected an address such as"),
        ("http://teacher example", "expected an address such as"),
    ],
)
def test_addresses_are_checked(address, words) -> None:
    with pytest.raises(UserError) as error:
        RemoteTeacher(address)
    assert words in str(error.value) and "secret" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- token, restarts


def test_the_token_comes_from_the_environment_and_is_in_no_message(monkeypatch, caplog) -> None:
    batch, labels = batch_of(ROWS)
    with running(served_tiny(), TOKEN) as url, caplog.at_level(logging.DEBUG):
        with pytest.raises(UserError, match="401 expected the server's token"):
            RemoteTeacher(url)
        with pytest.raises(UserError, match=f"the environment variable {VARIABLE} is not set here"):
            RemoteTeacher(url, token_env=VARIABLE)
        monkeypatch.setenv(VARIABLE, "another-token-altogether-7")
        with pytest.raises(UserError) as error:
            RemoteTeacher(url, token_env=VARIABLE)
        assert "another-token" not in str(error.value) + repr(error.value)
        monkeypatch.setenv(VARIABLE, TOKEN)
        teacher = RemoteTeacher(url, token_env=VARIABLE)
        assert teacher.states(batch, labels).shape == (9, 32)
    assert TOKEN not in caplog.text and TOKEN not in str(vars(teacher)) + repr(teacher)


def test_a_server_that_comes_back_is_waited_for_and_another_teacher_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("dts_hf.teachers.connection._LONGEST_PAUSE", 0.2)
    batch, labels = batch_of(ROWS)
    served = served_tiny()
    with running(served) as url:
        teacher = RemoteTeacher(url)
        before = teacher.states(batch, labels)
    port, found = int(url.rsplit(":", 1)[1]), []
    thread = threading.Thread(target=lambda: found.append(teacher.states(batch, labels)))
    thread.start()
    time.sleep(0.5)
    with running(served, port=port):
        thread.join(20)
        assert torch.equal(found[0], before)
    with running(served_tiny(tiny_llama(seed=5, layers=3)), port=port), pytest.raises(RunError) as error:
        teacher.states(batch, labels)
    assert "It has another teacher now (weights: " in str(error.value) and "--resume" in str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("identity", "model", {"a": 1}, "the teacher's identity: model: got"),
        ("identity", "logit_scale", "x", "the teacher's identity: logit_scale: got 'x'"),
        ("identity", "hidden_size", 10**12, "the teacher's identity: hidden_size: got 1,000,000,000,000"),
        ("limits", "vocab_size", 10**9, "takes ids below 1,000,000,000, and its head has 320"),
        ("limits", "rows", 10**12, "expected whole numbers from 1 to"),
        ("limits", "rows", True, "expected whole numbers from 1 to"),
    ],
)
def test_a_description_that_cannot_be_is_a_sentence(url, part, key, value, words) -> None:
    def change(path, status, content):
        if path != "/v1/teacher":
            return status, content
        told = json.loads(content)
        told[part][key] = value
        return status, json.dumps(told).encode()

    with through(url, change) as proxy, pytest.raises(UserError) as error:
        RemoteTeacher(proxy, first_patience=1)
    assert words in str(error.value)


def test_a_redirection_says_where_it_led() -> None:
    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "https://login.example/in")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"302, a redirection to https://login\.example/in, which is not followed"):
            RemoteTeacher(f"http://127.0.0.1:{server.server_address[1]}", first_patience=1)
        server.shutdown()
