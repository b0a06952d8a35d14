"""``GeneratingTrainer``: a distillation whose held-out predictions are generated answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from dts_hf.training.distillation_base import DistillationBase
from dts_hf.training.generated import (
    OPTIONS,
    Predictions,
    asks_for_generation,
    check_metrics,
    checked_options,
    decoded,
    metrics_of,
    predict_answers,
    questions_of,
)


class GeneratingTrainer(DistillationBase):
    """A ``DistillationBase`` of language models, which answer the prompts of held-out rows.

    Args:
        model: the student.
        args: of the trainer.
        positional: what else ``EvenBatchesTrainer`` takes by its place.
        predict_with_generate: ``predict``, and with ``compute_metrics`` ``evaluate``, also answer the prompts of the rows;
            true in ``Seq2SeqTrainingArguments`` does the same.
        generation: options of ``generation.engine.GenerationSettings``, such as ``{"max_new_tokens": 64}``; greedy and 128
            tokens without.
        compute_metrics: takes an ``EvalPrediction`` whose ``predictions`` and ``label_ids`` are token ids ``[rows, T]`` of
            generated answers and references, in the order of the rows, filled up with -100.
        kwargs: everything else that ``DistillationBase`` takes.

    Raises:
        UserError: an option of generation or a use of ``compute_metrics`` that there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *positional: Any,
        predict_with_generate: bool = False,
        generation: Mapping[str, Any] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.predict_with_generate = predict_with_generate or asks_for_generation(args)
        self.generation = self._generating = checked_options(generation or {}, args.per_device_eval_batch_size)
        check_metrics(compute_metrics, self.predict_with_generate, args)
        super().__init__(model, args, *positional, compute_metrics=compute_metrics, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **generation: Any,
    ) -> dict[str, float]:
        """The Trainer's: losses and distances to the teacher, and what ``compute_metrics`` makes of generated answers.

        Args:
            eval_dataset: rows of any kind that the trainer takes, a dictionary of several, or the name of one of its own.
            ignore_keys: no use: there are no outputs.
            metric_key_prefix: before the name of every number.
            generation: options for this call, as ``max_new_tokens=64``.

        Raises:
            UserError: see ``checked_options`` and ``questions_of``.
        """
        with self._with_options(generation):
            values: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            return values

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        *,
        predict_with_generate: bool | None = None,
        **generation: Any,
    ) -> PredictionOutput:
        """Losses on ``test_dataset``, and with ``predict_with_generate`` its prompts' answers.

        Args:
            test_dataset: rows of any kind that the trainer takes.
            ignore_keys: no use: there are no outputs.
            metric_key_prefix: before the name of every number.
            predict_with_generate: for this call; None: as the trainer has it. Options of generation are for it, too.
            generation: options for this call, as ``max_new_tokens=64``.

        Returns:
            ``predictions`` and ``label_ids``: token ids ``[rows, T]`` of answers and references in the order of the rows,
            filled up with -100, or None; ``metrics`` as those of ``evaluate``.

        Raises:
            UserError: see ``checked_options`` and ``questions_of``; or a row is too long, whose answer would be missing.
        """
        before = self.predict_with_generate
        if predict_with_generate is None:
            predict_with_generate = before or bool(generation)
        self.predict_with_generate = predict_with_generate
        try:
            with self._with_options(generation):
                return super().predict(test_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.predict_with_generate = before

    def generate(self, rows: Any, **generation: Any) -> list[str]:
        """The student's answers to the prompts of ``rows``, as text, in their order.

        Args:
            rows: of any kind that the trainer takes, with an answer, which is not looked at, however long it is.
            generation: options for this call, as ``max_new_tokens=64``.

        Raises:
            UserError: see ``checked_options`` and ``questions_of``; or a prompt is too long.
        """
        with self._with_options(generation):
            prepared = self.rows.for_answers(losses=False).prepare(rows, "generate")
            return decoded(self.processing_class, self._answers(prepared, "generate").answers)

    def read_test_rows(self, test_dataset: Any) -> Any:
        reader = self.rows.for_answers(losses=True) if self.predict_with_generate else self.rows
        return reader.prepare(test_dataset, "predict")

    @contextmanager
    def _with_options(self, generation: Mapping[str, Any]) -> Iterator[None]:
        before = self._generating
        given = {name: getattr(self.generation, name) for name in OPTIONS}
        self._generating = checked_options({**given, **generation}, self.generation.batch_size)
        try:
            yield
        finally:
            self._generating = before

    def _answers(self, dataset: Any, name: str) -> Predictions:
        model = self.accelerator.unwrap_model(self.model_wrapped)
        return predict_answers(
            model,
            self.processing_class,
            questions_of(dataset, name),
            self._generating,
            turn_ends=self.end_token_ids(),
            row_keys=getattr(dataset, "row_ids", None),
            rank=self.args.process_index,
            world=self.args.world_size,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The losses of ``DistillationBase``, then the answers where predictions are asked for."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        losses_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if losses_only or not self.predict_with_generate:
            return output
        dataset: Any = dataloader.dataset
        found = self._answers(getattr(dataset, "dataset", dataset), description.lower())
        if self.compute_metrics is not None:
            with_inputs = "inputs" in (self.args.include_for_metrics or ())
            values = metrics_of(self.compute_metrics, found, with_inputs)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in values.items()})
        return output._replace(predictions=found.answers, label_ids=found.references)
