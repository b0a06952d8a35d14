"""A teacher with another tokenizer: is it worth its time? SFT, overlap and dual_space for the same wall time.

    python benchmarks/other_tokenizer.py                                    # 10 minutes of training an arm, three seeds
    python benchmarks/other_tokenizer.py --minutes 0.5 --seeds 1 --rows 8 --probe 2  # does it run?

Teacher: SmolLM2-135M-Instruct, as in the quickstart. No second family lies at hand without a network, so the student is one
of the quickstart's shape **under a re-trained tokenizer**: a byte-level BPE trained here on the quickstart's training rows
(``--vocabulary`` entries at most). It keeps the first and the last ten of the teacher's 30 layers; its embeddings are new:
each token starts at the mean of the teacher's embeddings of its text. All arms start from the same weights, with the same
rows (the answers of the data set) and the same recipe but for teacher and loss.

Equal wall time: see equal_time.py; evaluation does not count.

Measured on held-out rows: bits per byte of the answers (what the student needs for all labels, the end of turn among
them, over the bytes of the text), and ROUGE-L of generated answers. Means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equal_time
import render

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
ENDS = [*range(10), *range(20, 30)]  # the layers that the student keeps
ARMS: dict[str, list[str]] = {
    "SFT": ["teacher=null", "loss.kd_ratio=0"],
    "overlap": ["teacher.alignment=overlap"],
    "dual_space": ["teacher.alignment=dual_space"],
}
COLUMNS = [
    render.Column("arm", "arm", None), render.Column("bits_per_byte", "bits per byte, held out", None),
    render.Column("rougeL", "ROUGE-L, held out", None), render.Column("steps", "steps", None),
    render.Column("seconds_a_step", "s a step", None), render.Column("seeds", "seeds", 0),
]  # fmt: skip


def retrained_tokenizer(texts: Sequence[str], size: int, teacher: Any) -> Any:
    """A byte-level BPE of ``size`` entries at most, with the special tokens and the chat template of ``teacher``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [teacher.bos_token, teacher.eos_token, "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(dict.fromkeys(token for token in special if token)), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=teacher.bos_token, eos_token=teacher.eos_token, pad_token=teacher.eos_token
    )
    tokenizer.chat_template = teacher.chat_template
    return tokenizer


def write_student(folder: Path, vocabulary: int) -> dict[str, int]:
    """Write tokenizer and weights that all arms start from; returns what the tokenizers have."""
    import torch

    from dts_hf.distill import task_of
    from dts_hf.models.loading import load_tokenizers
    from dts_hf.models.pruning import prune_layers
    from dts_hf.recipe.loading import load_recipe

    recipe = load_recipe(RECIPE, [])
    task, (_, of_teacher) = task_of(recipe), load_tokenizers(recipe)
    rows = task.load_rows()
    texts = [f"{row.instruction} {row.input} {row.response}" for row in rows.train]
    tokenizer = retrained_tokenizer(texts, vocabulary, of_teacher)
    teacher = task.load_teacher()
    assert teacher is not None
    student = prune_layers(teacher, ENDS).float()
    old = student.get_input_embeddings().weight.detach().clone()
    student.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for index in range(len(tokenizer)):
            said = tokenizer.convert_ids_to_tokens(index)
            text = said if index in tokenizer.all_special_ids else tokenizer.decode([index])
            ids = of_teacher(text, add_special_tokens=False)["input_ids"] or [of_teacher.eos_token_id]
            student.get_input_embeddings().weight[index] = old[ids].mean(0)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (student.config, student.generation_config):
            setattr(config, name, getattr(tokenizer, name))
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"student_tokens": len(tokenizer), "teacher_tokens": len(of_teacher)}


def train(arm: str, student: Path, run: Path, seed: int, steps: int, rows: int) -> Any:
    """The finished run of one arm; ``rows`` held-out prompts are answered at its end, 0: none."""
    from dts_hf.distill import distill
    from dts_hf.recipe.loading import load_recipe

    overrides = [
        "student.init=null", f"student.model={student}", "data.responses=data", f"training.max_steps={steps}",
        f"training.warmup_steps={min(10, steps // 2)}", f"training.seed={seed}", "training.eval_strategy=no",
        "evaluation.every_steps=null", "output.report=false", f"output.dir={run}", *ARMS[arm],
        f"evaluation.models={'[student]' if rows else '[]'}", f"evaluation.rows={max(rows, 1)}",
    ]  # fmt: skip
    return distill(load_recipe(RECIPE, overrides))


def bits_per_byte(folder: Path) -> float:
    """Of the held-out answers, by the student in ``folder``: bits of all their labels over the bytes of their text."""
    import torch
    from transformers import AutoModelForCausalLM

    from dts_hf.data.chat_templates import resolve_template
    from dts_hf.data.encoding import encode_rows
    from dts_hf.distill import task_of
    from dts_hf.models.loading import load_tokenizer
    from dts_hf.recipe.loading import load_recipe

    recipe = load_recipe(RECIPE, ["data.responses=data"])
    rows = {row.id: row for row in task_of(recipe).load_rows().validation}
    tokenizer = load_tokenizer(str(folder), key="student")
    limits = recipe.data.model_dump(include={"max_length", "max_prompt_length", "train_on"})
    data, _ = encode_rows(list(rows.values()), tokenizer, resolve_template("chat", tokenizer), **limits)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats = size = 0.0
    with torch.no_grad():
        for index, row_id in enumerate(data.row_ids):
            example = data[index]
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
            logits = model(input_ids=ids).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
            size += len(rows[row_id].response.encode())
    return nats / size / math.log(2)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what they are about."""
    kept = equal_time.read_kept(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = write_student(folder / "student", args.vocabulary)
        untrained = bits_per_byte(folder / "student")

        def probe(arm: str) -> dict[str, Any]:
            tried = train(arm, folder / "student", folder / "probe", 42, args.probe, 0)
            return dict(tried.read_metrics()["training"])

        seconds = equal_time.seconds_of_steps(args, probe, kept)

        def run(arm: str, seed: int, steps: int) -> dict[str, Any]:
            done = train(arm, folder / "student", folder / f"{arm}-{seed}", seed, steps, args.rows)
            score = done.read_metrics()["models"]["student"]["sets"]["validation"]["rougeL"]["mean"]
            return {
                "rougeL": 100 * score, "bits_per_byte": bits_per_byte(done.final_path), "seconds_a_step": seconds[arm]
            }  # fmt: skip

        steps = {arm: max(2, int(60 * args.minutes / seconds[arm])) for arm in args.arms}
        rows = [] if args.probe_only else equal_time.all_runs(args, steps, run, kept)
    return {"rows": rows, "untrained_bits_per_byte": untrained, **sizes}


def report(found: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """One row an arm: mean and standard deviation over the seeds."""
    rows = render.over_seeds(found["rows"], {"bits_per_byte": 3, "rougeL": 1, "steps": 0, "seconds_a_step": 2})
    notes = [
        f"The student's tokenizer, re-trained on the quickstart's training rows, has {found['student_tokens']:,} entries, "
        f"the teacher's {found['teacher_tokens']:,}. Before training the student needs "
        f"{found['untrained_bits_per_byte']:.3f} bits per byte."
    ]
    return render.make_report("other_tokenizer", setting, [render.make_table("", COLUMNS, rows)], notes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    equal_time.add_arguments(parser, list(ARMS), minutes=10.0, probe=20)
    parser.add_argument("--vocabulary", type=int, default=4096, help="entries of the student's tokenizer at most")
    args = parser.parse_args()
    setting = {"minutes": args.minutes, "seeds": args.seeds, "vocabulary": args.vocabulary, "rows": args.rows}
    found = measured(args)
    if found["rows"]:
        render.finish(report(found, setting), args.json)


if __name__ == "__main__":
    main()
