"""A ``DistillationTrainer`` of two tiny models on a few rows, and what its log says."""

from __future__ import annotations

from transformers import TrainingArguments

from dts_hf.data.chat_templates import get_template
from dts_hf.data.encoding import encode_rows
from dts_hf.data.sources import rows_from_dataset
from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_llama, tiny_tokenizer

ROWS = [
    {
        "id": f"r{i}",
        "instruction": "Say it" + " again" * (i % 4),
        "input": "",
        "output": "yes " * (1 + 3 * (i % 5)) + "no",
    }
    for i in range(16)
]


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **options})


def trainer_for(folder, model=None, teacher=None, rows=ROWS, options=None, **more):
    defaults = {"temperature": {"name": "dts"}, "train_dataset": rows, "processing_class": tiny_tokenizer()}
    return DistillationTrainer(
        tiny_llama(seed=0) if model is None else model,
        tiny_llama(seed=1, layers=3) if teacher is None else teacher,
        args=arguments(folder, **(options or {})),
        **{**defaults, **more},
    )


def encoded(rows=ROWS):
    limits = {"max_length": 128, "max_prompt_length": 64}
    return encode_rows(rows_from_dataset(rows), tiny_tokenizer(), get_template("chat"), **limits)[0]


def plain(rows=ROWS):
    """``rows`` as tokens that somebody else has made."""
    data = encoded(rows)
    return [{key: data[i][key] for key in ("input_ids", "labels")} for i in range(len(data))]


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "kl" in log]


def temperatures(trainer):
    names = ("temperature", "temperature_min", "temperature_max")
    return [[log[name] for name in names] for log in trainer.state.log_history if "kl" in log]


def step_gradients(trainer, batches):
    """Gradients of one optimizer step made of these micro-batches, as the Trainer would form them."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.temperature.begin_step(0.0)
    count = trainer._get_num_items_in_batch(batches, trainer.args.device)
    for batch in batches:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(((one[k] - other[k]).norm() / other[k].norm().clamp(min=1e-12)).item() for k in one)
