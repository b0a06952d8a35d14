"""What a teacher behind an address costs beside its forward: encoding, the line, checks, and the bytes of a label.

    python benchmarks/remote_teacher.py                    the table of docs/remote_teacher.md
    python benchmarks/remote_teacher.py --quick            does it run?

Server and client are one process on one machine, so the line is loopback: a real one adds its latency, and the bytes of the
table over its bandwidth. Weights are random; each batch is 8 rows of 128 tokens, of which the last 64 are labels. ``live``
is the backbone in the training's own process, ``remote`` the same through HTTP, ``beside the forward`` a server that has the
answer ready. Rounds take turns; of each the shortest counts, so that other work on the machine does not.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dts_hf.loss.selection import IGNORE_INDEX
from dts_hf.serving.serve import ServeOptions, listen, make_server, served_model
from dts_hf.teachers.batch_rows import labelled_rows
from dts_hf.teachers.identity import TeacherIdentity, model_facts
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.remote import RemoteTeacher
from dts_hf.teachers.wire import Answer, Question, encode_answer

if TYPE_CHECKING:
    from dts_hf.serving.app import Served

ROWS, LENGTH, LABELS = 8, 128, 64
#: (what it is like, hidden size, layers, vocabulary, dtype)
SHAPES = (
    ("135M, 30 layers", 576, 30, 49_152, "float32"),
    ("135M, 30 layers", 576, 30, 49_152, "bfloat16"),
    ("8B, one of its layers", 4096, 1, 32_000, "bfloat16"),
)
QUICK = (("tiny", 64, 2, 320, "float32"),)


def teacher_of(hidden: int, layers: int, vocab: int, dtype: str) -> LlamaForCausalLM:
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 64 * 64, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // (3 if heads % 3 == 0 else 4 if heads % 4 == 0 else 1),
        max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    return model


@contextmanager
def serving(served: Served) -> Iterator[str]:
    options = ServeOptions(port=0)
    with closing(listen(options)) as listening:
        server = make_server(served, options, None)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def seconds(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(shape: tuple[str, int, int, int, str], rounds: int) -> list[str]:
    name, hidden, layers, vocab, dtype = shape
    model = teacher_of(hidden, layers, vocab, dtype)
    nobody = {"tokenizer": "none", "tokenizer_rules": None, "template": "none"}
    served = served_model(model, TeacherIdentity(**model_facts(model, "benchmark"), **nobody), ServeOptions())
    ids = torch.randint(vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(LENGTH) >= LENGTH - LABELS, ids, IGNORE_INDEX)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    live, kept = LiveTeacher(model), dict[str, Answer]()

    def ready(question: Question) -> Answer:
        if question.token_hash not in kept:
            kept[question.token_hash] = served.forward(question)
        return kept[question.token_hash]

    times: dict[str, list[float]] = {"live": [], "remote": [], "beside": []}
    with serving(served) as url, serving(replace(served, forward=ready)) as fast:
        remote, near = RemoteTeacher(url), RemoteTeacher(fast)
        for _ in range(rounds + 1):
            times["live"].append(seconds(lambda: live.states(batch, labels)))
            times["remote"].append(seconds(lambda: remote.states(batch, labels)))
            times["beside"].append(seconds(lambda: near.states(batch, labels)))
    shortest = {key: min(values[1:]) for key, values in times.items()}  # the first warms up
    question = Question.of_rows(labelled_rows(batch, labels))
    there, back = len(question.encode()), len(encode_answer(ready(question), "0" * 64, "0" * 21))
    return [
        name, f"{hidden:,}", dtype, f"{1000 * shortest['live']:.0f}", f"{1000 * shortest['remote']:.0f}",
        f"{1000 * shortest['beside']:.1f}", f"{there / question.labels:.0f}", f"{back / question.labels:,.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    heads = ["teacher", "H", "dtype", "live, ms", "remote, ms", "beside the forward, ms", "bytes there", "bytes back"]
    print(f"| {' | '.join(heads)} |\n|---|---:|---|{'---:|' * 5}")
    for shape in QUICK if given.quick else SHAPES:
        print(f"| {' | '.join(measure(shape, given.rounds))} |")


if __name__ == "__main__":
    main()
