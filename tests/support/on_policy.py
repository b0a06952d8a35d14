"""A trainer that writes down the rows that its student has answered, and the gradient of each optimizer step."""

from __future__ import annotations

from transformers import TrainerCallback

from dts_hf.training.trainer import DistillationTrainer
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.trainers import ROWS

#: Many tokens end an answer, so that a random model's answers end at very different lengths, and by different ends.
ENDS = [2, *range(20, 60)]


class Recording(DistillationTrainer):
    """Attributes: ``answered``, the rows of each generated step, batch by batch; ``kinds`` of all steps."""

    def __init__(self, *args, ends=ENDS, **kwargs):
        self.answered, self.kinds, self.ends = [], [], ends
        super().__init__(*args, **kwargs)

    def end_token_ids(self):
        return self.ends

    def get_batch_samples(self, *args, **kwargs):
        samples, count = super().get_batch_samples(*args, **kwargs)
        self.kinds += [self.generated_step] if samples else []
        return samples, count

    def rebuilt(self, batches):
        self.answered.append([list(rows) for rows in batches])
        return super().rebuilt(batches)

    @property
    def texts(self):
        """Of each generated step: the rows by their number, wherever they stood."""
        found = []
        for batches in self.answered:
            rows = [row for rows in batches for row in rows]
            found.append({row["row_id"]: (row["input_ids"], row["labels"]) for row in rows if row["row_id"] >= 0})
        return found


class Gradients(TrainerCallback):
    """Attributes: ``found``, by optimizer step the gradients by name."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def recording(args, model=None, teacher=None, rows=ROWS, on_policy=None, **more):
    """A ``Recording`` of two tiny models, by default always on the student's text and at a constant temperature."""
    if teacher is None and "teachers" not in more:
        teacher = tiny_llama(seed=1, layers=3)
    defaults = {"temperature": 2.0, "processing_class": tiny_tokenizer(), "train_dataset": rows}
    asked = {"fraction": 1.0, "max_new_tokens": 24} if on_policy is None else on_policy
    return Recording(
        tiny_llama(seed=0) if model is None else model, teacher, args=args, on_policy=asked, **{**defaults, **more}
    )
