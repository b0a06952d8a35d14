"""Processes of test_evaluate.py. ``kill``: evaluations that die with SIGKILL, then one that ends. ``share``: two
processes that share out rows, with models replicated and sharded, against one process alone."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dts_hf.data.rows import Row
from dts_hf.errors import UserError
from dts_hf.evaluation import evaluate as evaluation
from dts_hf.evaluation.instruct import evaluate_instruct
from dts_hf.evaluation.options import EvaluationOptions
from dts_hf.evaluation.protocol import get_protocol
from dts_hf.generation import answer_file
from tests.support.launching import leave
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

SET = "rows.jsonl"
OPTIONS = {"seeds": [10, 20], "max_new_tokens": 8}


def evaluate(output: str) -> None:
    dtype = os.environ.get("DTS_HF_TEST_DTYPE", "float32")
    batch_size = 4 if dtype == "float32" else 1  # blocks of 4 rows: some are ended by each process, some are not
    options = EvaluationOptions(
        [SET], protocol="minillm", output=output, dtype=dtype, batch_size=batch_size, **OPTIONS
    )
    evaluation.evaluate("model", options)


def dying(append: Callable[..., None], last: int, half: bool) -> Callable[..., None]:
    """``AnswerFile.append`` that dies at the answer number ``last``, perhaps in the middle of the next write."""
    seen = 0

    def stand_in(self: answer_file.AnswerFile, row: dict[str, object]) -> None:
        nonlocal seen
        append(self, row)
        seen += 1
        if seen == last:
            if half and self._file is not None:
                self._file.write(json.dumps(row)[:40].encode())
                self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    return stand_in


def kill(kills: int, rows: int) -> None:
    """Fork for each death: the imports are paid once. One thread, so a fork is safe."""
    torch.set_num_threads(1)
    generator = random.Random(0)
    for number in range(kills):
        last, half = generator.randint(1, max(1, 2 * rows // kills - 1)), number % 2 == 1
        child = os.fork()
        if child == 0:
            # A forked torch makes its pool of threads anew when it is first used: two threads of a loader would race for it.
            torch.set_num_threads(1)
            if number < kills - 1:  # the last one dies at a moment, not at a row
                answer_file.AnswerFile.append = dying(answer_file.AnswerFile.append, last, half)  # type: ignore[method-assign]
            evaluate("killed")
            signal.pause()
        if number == kills - 1:
            time.sleep(generator.uniform(0.1, 0.4))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        partial = Path("killed/predictions")
        print("left:", sum(f.read_bytes().count(b"\n") for f in partial.glob("*.partial*")) if partial.is_dir() else 0)
    evaluate("killed")
    evaluate("whole")


def share(out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    rows = [Row(f"r{i}", "Name a fruit" + " and a word" * (i % 5), "", ("a pear",)) for i in range(23)]
    order = random.Random(1).sample(range(len(rows)), len(rows))
    protocol = get_protocol("minillm").changed(max_new_tokens=10, seeds=[10, 20])
    tokenizer = tiny_tokenizer()
    found: dict[str, object] = {"world": torch.distributed.get_world_size()}
    for name, make in (("gpt2", tiny_gpt2), ("llama", tiny_llama)):
        for dtype in (torch.float32, torch.bfloat16):
            model = make(tie=False).to(dtype)
            for batch_size in (1, 7, 32):
                key = f"{name}-{str(dtype)[6:]}-{batch_size}"
                shared = evaluate_instruct(model, tokenizer, rows, protocol, batch_size=batch_size, all_processes=True)
                found[f"{key}-two"] = shared
                if rank == 0:
                    found[f"{key}-one"] = evaluate_instruct(model, tokenizer, rows, protocol, batch_size=batch_size)
            if dtype is torch.float32:
                shuffled = evaluate_instruct(
                    model, tokenizer, [rows[i] for i in order], protocol, batch_size=7, all_processes=True
                )
                found[f"{name}-shuffled"] = sorted(
                    shuffled.predictions, key=lambda row: (row["seed"], int(row["id"][1:]))
                )
    found |= sharded(tokenizer, rows, protocol)
    evaluate("together")
    try:
        evaluate("model")
    except UserError as error:
        found["refused"] = str(error)
    (out / f"{rank}.json").write_text(json.dumps(found))
    leave()


def sharded(tokenizer, rows, protocol) -> dict[str, object]:
    """FSDP2 on two CPU processes: weights are DTensors, each forward gathers them from both."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_llama(tie=False)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    result = evaluate_instruct(model, tokenizer, rows, protocol, batch_size=4, all_processes=True)
    model.train()
    ids = torch.tensor([[4, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()  # training goes on
    graded = all(parameter.grad is not None for parameter in model.parameters())
    return {"fsdp2": result, "fsdp2-kinds": sorted(kinds), "fsdp2-graded": graded}


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(int(sys.argv[2]), int(sys.argv[3]))
    else:
        share(Path(sys.argv[2]))
