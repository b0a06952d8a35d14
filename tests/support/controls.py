"""The controls of a policy that reacts, as recipes name them, and a trainer that runs one."""

from __future__ import annotations

from transformers import TrainingArguments

from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_llama, tiny_tokenizer

#: What each makes of the folder of a finished run.
CONTROLS = {
    "replay": lambda run: {"name": "replay", "run": run},
    "permuted": lambda run: {"name": "dts", "gap_source": {"replay": run, "order": "permuted"}, "seed": 4},
    "match": lambda run: {"name": "cosine", "match_mean_of": run},
}


def trainer_for(folder, temperature, **arguments):
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    rows = [
        {"id": f"r{i}", "instruction": "Say it", "input": "", "output": "yes " * (1 + 3 * (i % 5)) + "no"}
        for i in range(16)
    ]
    return DistillationTrainer(
        tiny_llama(seed=arguments.pop("student", 0)),
        tiny_llama(seed=1),
        args=TrainingArguments(**{**defaults, **arguments}),
        temperature=temperature,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
