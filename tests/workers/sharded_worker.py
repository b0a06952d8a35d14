"""What each process of test_sharded.py runs, strategy after strategy: trainings with the teacher replicated or sharded.

Results go to ``OUT/STRATEGY/RANK.json``, students to ``OUT/STRATEGY/NAME`` through ``save_student``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from dts_hf.classification.trainer import ClassificationDistillationTrainer
from dts_hf.data.rows import Row
from dts_hf.distill import distill
from dts_hf.distributed.processes import on_first_process, process
from dts_hf.distributed.sharding import is_sharded, parameter_count, shard_teacher
from dts_hf.errors import RunError, UserError
from dts_hf.evaluation.instruct import evaluate_instruct
from dts_hf.evaluation.protocol import get_protocol
from dts_hf.language_modeling.scorer import weights_as
from dts_hf.models.adapters import add_lora
from dts_hf.models.saving import save_student
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Lora
from dts_hf.training.trainer import DistillationTrainer
from tests.distributed.cases import ROWS, SHARDED_TEACHERS, SHARDED_TRAININGS
from tests.support.launching import ROOT, leave, strategy_arguments, training_arguments
from tests.support.tiny import tiny_llama, tiny_tokenizer

ASKED = [Row(f"r{i}", "Name a fruit" + " and a word" * (i % 5), "", ("a pear",)) for i in range(5)]
SENTENCES = [{"sentence": "good " * (1 + i % 4) + "film", "label": i % 2} for i in range(24)]
SENTENCES += [{"sentence": "a film " * (1 + i % 3) + "that is bad", "label": (i // 2) % 2} for i in range(8)]
MEASURED = ("ddp", "zero3")


def arguments(strategy: str, out: Path, **more: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(out / "trainer"), "report_to": "none", "per_device_train_batch_size": 8 // process()[1],
        "per_device_eval_batch_size": 3, "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.5,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
    }  # fmt: skip
    return training_arguments(strategy, **values, **more)


class Midway(TrainerCallback):
    """Scores generated answers in the middle of training, as ``evaluation.every_steps`` does."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.answer("midway")


def train(strategy: str, name: str, out: Path) -> dict[str, Any]:
    tie, placement, lora, checkpointing, packing = SHARDED_TEACHERS[name]
    single = process()[1] == 1
    args = arguments(strategy, out, activation_checkpointing=checkpointing)
    student: Any = tiny_llama(seed=0, tie=tie)
    if lora:
        torch.manual_seed(0)
        student = add_lora(student, Lora(r=4))
    teacher = tiny_llama(seed=1, layers=3, tie=tie)
    trainer = DistillationTrainer(
        student, teacher, {"name": "dts", "rule": "gap"}, args=args, train_dataset=list(ROWS), eval_dataset=ROWS[:7],
        processing_class=tiny_tokenizer(), packing=packing, teacher_placement="replicated" if single else placement,
    )  # fmt: skip
    found: dict[str, Any] = {}

    def answer(when: str, model: Any = student) -> None:
        protocol = get_protocol("minillm").changed(max_new_tokens=4, seeds=[10])
        with weights_as(model, "bfloat16" if when == "lowered" else None):
            result = evaluate_instruct(model, tiny_tokenizer(), ASKED, protocol, batch_size=2, all_processes=True)
        found[when] = [row["prediction"] for row in result.predictions]

    trainer.add_callback(Midway(answer))
    trainer.train()
    held_out = trainer.evaluate()
    answer("student")
    answer("teacher", teacher)
    answer("lowered", teacher)
    logs = [log for log in trainer.state.log_history if "kl" in log]
    found |= {
        "wrapper": type(trainer.model_wrapped).__name__,
        "world": trainer.accelerator.num_processes,
        "student_is_sharded": is_sharded(student),
        "teacher_is_sharded": is_sharded(teacher),
        "teacher_kind": sorted({type(p).__name__ for p in teacher.parameters()}),
        "teacher_held": sum(_own(p).numel() for p in teacher.parameters()) / parameter_count(teacher),
        "loss": [log["loss"] for log in logs],
        "temperature": [log["temperature"] for log in logs],
        "held_out": {key: held_out[f"eval_{key}"] for key in ("loss", "kl", "ce_loss", "rows")},
        "parameters": [parameter_count(student), parameter_count(teacher)],
    }
    # What the library itself gathers, before LoRA is merged
    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if args.process_index == 0:
        save_file({key: value.clone().contiguous() for key, value in whole.items()}, out / f"{name}.safetensors")
    if lora:  # first: merging takes the adapters off
        save_student(student, tiny_tokenizer(), out / f"{name}-adapter", merge_lora=False)
    save_student(student, tiny_tokenizer(), out / name)
    return found


def _own(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def classify(strategy: str, out: Path) -> dict[str, Any]:
    """A task's classifiers; the second epoch answers from memory, where no process may run the teacher alone."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from dts_hf.distributed.sharding import unsharded_init

    def classifier(layers: int, seed: int) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_labels=2, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1}, pad_token_id=2,
        )  # fmt: skip
        with unsharded_init():
            return LlamaForSequenceClassification(config)

    student, teacher = classifier(2, 0), classifier(3, 1)
    trainer = ClassificationDistillationTrainer(
        student, teacher, "sst2", args=arguments(strategy, out), train_dataset=SENTENCES[:16], eval_dataset=SENTENCES,
        processing_class=tiny_tokenizer(), teacher_placement="replicated" if process()[1] == 1 else "sharded",
    )  # fmt: skip
    trainer.train()
    held_out = trainer.evaluate()
    save_student(student, tiny_tokenizer(), out / "classifier")
    names = ("eval_loss", "eval_accuracy", "eval_teacher_accuracy", "eval_kl")
    return {"teacher_is_sharded": is_sharded(teacher), "held_out": {name: held_out[name] for name in names}}


def failures() -> dict[str, str]:
    """What goes wrong on the first process alone ends on all of them."""
    rank, world = process()
    found = {}
    for name, error in (("user", UserError("no room")), ("system", OSError(28, "No space left on device"))):

        def fail(error: Exception = error) -> None:
            raise error

        try:
            on_first_process(fail, rank, world)
        except (UserError, RunError, OSError) as caught:
            found[name] = f"{type(caught).__name__}: {caught}"
    found["result"] = on_first_process(lambda: f"of {process()[0]}", rank, world)
    if world > 1:
        teacher = tiny_llama()
        teacher.is_quantized = True
        try:
            shard_teacher(teacher, "cpu")
        except UserError as caught:
            found["quantized"] = str(caught)
    return found


def memory(strategy: str) -> dict[str, Any]:
    """Peak memory of this process in a run whose weights dominate; DDP has its whole teacher, ZeRO-3 a share of it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import sharded_memory

    return sharded_memory.run(strategy, "replicated" if strategy == "ddp" else "sharded", sharded_memory.QUICK)


def whole_run(out: Path, world: int) -> None:
    """What ``dts-hf train`` does with a recipe: teacher answers, scores before, during and after, LoRA merged at the end."""
    strategy_arguments("single")  # takes away what the trainings before have left in the environment
    os.chdir(out)  # the paths of the recipe
    several = ["teacher.placement=sharded", "training.deepspeed=zero3.json"]
    changes = several if world > 1 else ["training.per_device_train_batch_size=4"]
    place = "two" if world > 1 else "one"
    distill(load_recipe("recipe.yaml", [*changes, f"output.dir={place}", f"data.cache_dir={place}-cache"]))


def main(strategies: list[str], out: Path) -> None:
    rank, world = process()
    # First, and DDP before DeepSpeed: the process has not grown yet
    measured = {strategy: memory(strategy) for strategy in MEASURED if strategy in strategies}
    for strategy in strategies:
        (out / strategy).mkdir(exist_ok=True)
        found: dict[str, Any] = {name: train(strategy, name, out / strategy) for name in SHARDED_TRAININGS[strategy]}
        if strategy in ("single", "zero3"):
            found["classify"] = classify(strategy, out / strategy)
        found |= {"memory": measured.get(strategy), "failures": failures() if world > 1 else None}
        (out / strategy / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    training_arguments("ddp", output_dir=sys.argv[1])  # joins the processes
    main(sys.argv[2:], Path(sys.argv[1]))
    whole_run(Path(sys.argv[1]), process()[1])
    leave()
