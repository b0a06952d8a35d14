"""How fast rows are aligned with a teacher that has another tokenizer, and how much of them is the same.

    python benchmarks/alignment.py                              the shipped quickstart rows, two tokenizers trained on them
    python benchmarks/alignment.py --rows FILE --student NAME --teacher NAME
    python benchmarks/alignment.py --quick                      does it run?

One process, seconds of its CPU. Tokens are the student's labels. ``tables`` is made once for a tokenizer, ``pairs`` is the
alignment of answers that are tokens already, ``rows`` is the whole stage: both templates, the teacher's tokens, the pairs.
Of three rounds the shortest counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dts_hf.alignment.answers import align, read_answer
from dts_hf.alignment.rows import RowAligner
from dts_hf.alignment.token_bytes import _table
from dts_hf.data.chat_templates import resolve_template
from dts_hf.data.encoding import encode_rows
from dts_hf.data.sources import load_rows
from dts_hf.models.loading import load_tokenizer

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "data" / "quickstart_train.jsonl"
LIMITS: dict[str, Any] = {"max_length": 512, "max_prompt_length": 256}
#: Entries of the tokenizers that are trained where none is named.
SIZES = {"student": 4_000, "teacher": 12_000}


def trained(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``size`` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def shortest(work: Callable[[], Any], rounds: int = 3) -> float:
    """CPU seconds of the quickest of some rounds."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def measure(rows: Any, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Print the table of one pair of tokenizers."""
    tables = shortest(lambda: [_table.__wrapped__(one, len(one)) for one in (student, teacher)])
    data, _ = encode_rows(rows, student, resolve_template("auto", student), long_rows="cut", **LIMITS)
    aligner = RowAligner(student, teacher, "auto", train_on=None, **LIMITS)
    report = aligner.align(data, rows)
    whole = shortest(lambda: aligner.align(data, rows))
    answers = [row.response for row in rows]
    read = [[list(one(text, add_special_tokens=False)["input_ids"]) for text in answers] for one in (student, teacher)]
    sides = (aligner.student, aligner.teacher)

    def pairs() -> None:
        for text, *ids in zip(answers, *read, strict=True):
            found = [read_answer(side.table, of_one, text, side.ends) for side, of_one in zip(sides, ids, strict=True)]
            if found[0] is not None and found[1] is not None:
                align(found[0], found[1], aligner.common)

    alone = shortest(pairs)
    tokens = sum(map(len, read[0]))
    print(
        f"{len(rows):,} rows; tokenizers of {len(student):,} and {len(teacher):,} entries, {len(aligner.common):,} common"
    )
    print(f"tables  {tables:8.2f} s, once")
    print(f"pairs   {alone:8.2f} s, {tokens / alone:12,.0f} tokens/s")
    print(f"rows    {whole:8.2f} s, {report.labels / whole:12,.0f} tokens/s")
    print(report.summary())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=str(QUICKSTART), help="row file")
    parser.add_argument("--student", help="its tokenizer: Hub name, folder or GGUF file")
    parser.add_argument("--teacher", help="the teacher's")
    parser.add_argument("--quick", action="store_true", help="a few rows")
    options = parser.parse_args()
    rows = load_rows(options.rows)
    texts = [row.instruction + " " + row.response for row in rows]
    tokenizers = [
        load_tokenizer(name, key=who) if name else trained(texts, SIZES[who])
        for who, name in (("student", options.student), ("teacher", options.teacher))
    ]
    measure(rows[:40] if options.quick else rows, *tokenizers)


if __name__ == "__main__":
    main()
