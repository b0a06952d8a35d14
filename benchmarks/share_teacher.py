"""What K students of one batch save when they share the teacher's forward: seconds, over those of K that do not.

    python benchmarks/share_teacher.py              K 1, 2, 4
    python benchmarks/share_teacher.py --quick      does it run?

Only the teacher's part of a step is timed, and the students ask in turns in one process, so that cores are not what is
measured. Weights are random.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.shared_answers import SharedAnswers


def seconds(model: LlamaForCausalLM, students: int, batches: list[torch.Tensor], folder: Path | None) -> float:
    """Of all batches for all students."""
    teachers = [LiveTeacher(model) for _ in range(students)]
    for teacher in teachers:
        teacher.shared = None if folder is None else SharedAnswers(folder, students)
    began = time.perf_counter()
    for ids in batches:
        for teacher in teachers:
            teacher.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)
    took = time.perf_counter() - began
    for teacher in teachers:
        if teacher.shared is not None:
            teacher.shared.close()
    return took


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    hidden, layers, count = (32, 2, 2) if quick else (576, 30, 5)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 16, num_key_value_heads=hidden // 16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    batches = [torch.randint(1024, (8, 16 if quick else 128)) for _ in range(count)]
    print("| students | shared / separate |\n|---|---|")
    for students in (1, 2) if quick else (1, 2, 4):
        separate = seconds(model, students, batches, None)
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {students} | {seconds(model, students, batches, Path(folder)) / separate:.2f} |")


if __name__ == "__main__":
    main()
