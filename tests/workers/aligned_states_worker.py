"""What each process of test_aligned_states.py runs: a teacher with another tokenizer, live, cached and behind an address."""

from __future__ import annotations

import sys
from pathlib import Path

from dts_hf.teachers.cached.teacher import CachedTeacher
from dts_hf.teachers.remote import RemoteTeacher
from tests.support.alignment import instruction_rows, tokenizer_of
from tests.support.tiny import tiny_llama
from tests.support.two_teachers import record_runs


def main(folder: str, cache: str, url: str) -> None:
    tokenizer = tokenizer_of("byte_level", 900)
    teachers = {
        "live": lambda: tiny_llama(vocab=len(tokenizer), seed=1, layers=3),
        "cached": lambda: CachedTeacher(cache),
        "remote": lambda: RemoteTeacher(url),
    }
    told = {"train_dataset": instruction_rows(13), "teacher_tokenizer": tokenizer, "alignment": "overlap"}
    record_runs(Path(folder), teachers, [*teachers], told, max_steps=20, learning_rate=0.05, optim="sgd")


if __name__ == "__main__":
    main(*sys.argv[1:])
