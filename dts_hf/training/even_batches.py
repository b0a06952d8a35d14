"""``EvenBatchesTrainer``: rows in an order of our own, in batches that several processes share out evenly.

The order of the rows is a function of seed and epoch alone, an epoch is filled up with dummy rows instead of rows taken
twice, and every count (labels of a step, rows of an evaluation, tokens seen) is one of real rows. The private names of the
Trainer that this needs are in ``resumable_trainer.PRIVATE_NAMES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from dts_hf.data.collators import Collator, PackedCollator
from dts_hf.data.encoding import EncodedDataset
from dts_hf.data.samplers import (
    DummyRowsLast,
    FilledStream,
    LengthGroupedSampler,
    Packs,
    PackSampler,
    PadToMultiple,
    best_fit,
    check_whole_batch,
    dummy_row,
    real_tokens,
    total_steps,
)
from dts_hf.data.streams import RowStream, errors_of_workers
from dts_hf.data.tokenised import NUM_LABELS, CountingCollator, NumberedCollator, TokenisedDataset
from dts_hf.errors import UserError
from dts_hf.loss.selection import count_targets
from dts_hf.runs.failures import one_sentence
from dts_hf.training.datasets import RowReader, StreamReportCallback
from dts_hf.training.signals import ignore_signals_in_worker


class EvenBatchesTrainer(Trainer):
    """Hugging Face's Trainer, with batches that do not depend on how many processes share them.

    Args:
        model: what is trained.
        args: ``transformers.TrainingArguments``.
        data_collator: a ``Collator`` of ours, or one of the user's, which sees no dummy row.
        train_dataset: rows of any kind that ``rows`` reads.
        eval_dataset: the same, or a dictionary of several.
        processing_class: the tokenizer.
        rows: makes data sets ready for the data loaders, now and whenever they are set or given.
        pack_tokens: fill each training batch to so many tokens (see ``PackSampler``), whatever
            ``args.per_device_train_batch_size``; None: a batch is a number of rows.
        kwargs: everything else that ``Trainer`` takes.

    Attributes:
        encoding_reports: what became of the rows; see ``RowReader``.
        train_sampler: the order of the training rows, where it is ours.

    Raises:
        UserError: a row is wrong or longer than ``pack_tokens``, or the Trainer refuses its arguments.
    """

    # Our loss is divided by the labels of the whole optimizer step, so the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        data_collator: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        *,
        rows: RowReader,
        pack_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(train_dataset, dict):
            raise UserError(one_of_several("train_dataset", train_dataset))
        self.rows, self.encoding_reports, self.pack_tokens = rows, rows.reports, pack_tokens
        self.train_sampler: LengthGroupedSampler | PackSampler | None = None
        self._counted = WeakIdKeyDictionary()  # labels of the step's batches, with their version
        self._prepared_train_dataset = rows.prepare(train_dataset, "train_dataset")
        check_stream(args, self._prepared_train_dataset)
        if pack_tokens is not None:
            check_packs(args, self._prepared_train_dataset, pack_tokens)
        held_out = rows.prepare(eval_dataset, "eval_dataset")
        try:
            self.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]  # a missing package shows now
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=self._prepared_train_dataset,
                eval_dataset=held_out,
                processing_class=processing_class,
                **kwargs,
            )
        except (ValueError, ImportError, OSError, RuntimeError) as error:  # its checks raise these, as they come
            if one_sentence(error):  # out of memory, a full disk: nothing is wrong with the input
                raise
            raise UserError(f"training: transformers.Trainer refuses this: {error}") from error
        self.add_callback(StreamReportCallback(rows.tell_of_streams))

    # ------------------------------------------------------------------------------------- what a kind of trainer adds

    def count_items(self, labels: Tensor) -> Tensor:
        """How many of ``labels`` ``[B, T]`` the loss is taken over, as a 0-d tensor."""
        return count_targets(labels)

    def labels_on_host(self, inputs: Mapping[str, Any]) -> int | None:
        """How many labels count, as the collator has counted them; None: they have to be counted where they are.

        A subclass may have masked some of them since, in a tensor of their own or in place: the count is then of others.
        """
        labels: Tensor = inputs["labels"]
        return inputs.get(NUM_LABELS) if self._counted.get(labels) == labels._version else None

    def keep_outputs(self, inputs: dict[str, Any], outputs: Any) -> None:
        """Take what the model made of a held-out batch; what ``compute_loss`` adds up needs no keeping."""

    # ----------------------------------------------------------------------------------------- the training rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, with epochs that several processes can share out evenly: filled up with label-free rows.

        Accelerate would take rows twice instead, and the last step of an epoch would depend on the number of processes.
        """
        if self.train_dataset is not self._prepared_train_dataset:  # set from outside since
            self._prepared_train_dataset = self.train_dataset = self.rows.prepare(self.train_dataset, "train_dataset")
            check_stream(self.args, self.train_dataset)
            if self.pack_tokens is not None:
                check_packs(self.args, self.train_dataset, self.pack_tokens)
        dataset: Any = self.train_dataset
        world = self.accelerator.num_processes
        if isinstance(dataset, RowStream):
            batch = self._train_batch_size * world
            whole = batch if self.args.dataloader_drop_last else 1
            steps = FilledStream(dataset, batch * self.args.gradient_accumulation_steps, self.without_label, whole)
            return self._get_dataloader(steps, "Training", self._train_batch_size, is_training=True)
        if self.pack_tokens is not None:
            self.train_sampler = sampler = PackSampler(dataset.lengths, self.pack_tokens, self._order_seed, world)
            packs = Packs(dataset, self.without_label)
            return self._get_dataloader(packs, "Training", 1, sampler_fn=lambda _: sampler, is_training=True)
        if self.args.dataloader_drop_last and hasattr(dataset, "__len__"):
            check_whole_batch(len(dataset), self._train_batch_size * world)
        if world == 1 or self.args.dataloader_drop_last or self.length_bucket_size(dataset) is None:
            return super().get_train_dataloader()
        size = self._train_batch_size
        filled = PadToMultiple(dataset, size * world, self.without_label)
        return self._get_dataloader(filled, "Training", size, sampler_fn=self._get_train_sampler, is_training=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Our own sampler wherever it can be: its order depends on seed and epoch alone, so ranks and resumes agree."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        real_rows: Any = dataset.dataset if isinstance(dataset, PadToMultiple) else dataset
        together = self.length_bucket_size(real_rows)
        if together is None or self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(dataset)
        self.train_sampler = LengthGroupedSampler(real_rows.lengths, together, seed=self._order_seed)
        return self.train_sampler if real_rows is dataset else DummyRowsLast(self.train_sampler, len(dataset))

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def length_bucket_size(self, dataset: Any) -> int | None:
        """On what the order of the rows depends besides seed and epoch: how many of similar length stand together.

        1 is a plain shuffle or no shuffle at all; None is an order that is not ours.
        """
        strategy = self.args.train_sampling_strategy
        if strategy in ("sequential", "random") and (hasattr(dataset, "__len__") or isinstance(dataset, RowStream)):
            return 1
        if not hasattr(dataset, "lengths") or strategy != "group_by_length":
            return None
        packed = isinstance(self.data_collator, PackedCollator)
        return 1 if packed else self.args.train_batch_size * self.accelerator.num_processes

    def planned_steps(self) -> int | None:
        """Optimizer steps that ``train`` will take; None where only the Trainer finds out (rows without a number)."""
        if not hasattr(self.train_dataset, "__len__"):
            return self.args.max_steps if self.args.max_steps > 0 else None
        devices = self.args.world_size * max(1, self.args.n_gpu)
        packs = None
        if self.pack_tokens is not None and self.args.max_steps <= 0:
            packs = len(best_fit(self.train_dataset.lengths, self.pack_tokens))  # type: ignore[union-attr]
        return total_steps(self.args, len(self.train_dataset), devices, packs)  # type: ignore[arg-type]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; where a stream has no more, its pass is over, long before the steps that the Trainer counts on."""
        with errors_of_workers():
            samples, count = super().get_batch_samples(*args, **kwargs)
        self.control.should_epoch_stop |= not samples
        return samples, count

    # ----------------------------------------------------------------------------------------- the held-out rows

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Longest rows first (less padding), filled up with label-free rows so that no rank evaluates a row twice."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in named:
                known = ", ".join(map(repr, named)) or "none with a name"
                raise UserError(f"evaluate: got '{dataset}', expected rows, or one of the eval_dataset: {known}")
            dataset = named[dataset]
        if dataset is None:
            raise UserError("eval_dataset: got None, expected held-out rows to evaluate on")
        ours = dataset is self.eval_dataset or isinstance(eval_dataset, str)
        if not ours or not isinstance(dataset, (EncodedDataset, TokenisedDataset, RowStream)):
            dataset = self.rows.prepare(dataset, "eval_dataset" if ours else "evaluate")
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        return self._held_out_loader(dataset, key if ours else None)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As for evaluation: ``predict`` is one that leaves no line in the log; its ``predictions`` are None."""
        if test_dataset is None:
            raise UserError("predict: got None, expected rows")
        if isinstance(test_dataset, dict):
            raise UserError(one_of_several("predict", test_dataset))
        return self._held_out_loader(self.read_test_rows(test_dataset), None)

    def read_test_rows(self, test_dataset: Any) -> Any:
        """The rows that ``predict`` was given, as the data loaders take them."""
        return self.rows.prepare(test_dataset, "predict")

    def _held_out_loader(self, dataset: Any, key: str | None) -> DataLoader[Any]:
        kept = getattr(self, "_eval_dataloaders", {}) if self.args.dataloader_persistent_workers else {}
        if key in kept and cast(Any, kept[key].dataset).dataset is dataset:
            return cast("DataLoader[Any]", kept[key])
        size = self.args.eval_batch_size
        if isinstance(dataset, RowStream):
            dataset.set_epoch(0)  # held-out rows are the same ones each time
            stream = FilledStream(dataset, size * self.accelerator.num_processes, self.without_label)
            return self._get_dataloader(stream, "Evaluation", size)
        filled = PadToMultiple(dataset, size * self.accelerator.num_processes, self.without_label, longest_first=True)
        return self._get_dataloader(filled, "Evaluation", size, sampler_fn=self._get_eval_sampler, dataloader_key=key)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        return SequentialSampler(eval_dataset)  # PadToMultiple has sorted the rows already

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Rows of the data set behind a loader, without what only fills its batches; of a stream, those it has given."""
        dataset = getattr(dataloader, "dataset", None)
        stream = getattr(dataset, "dataset", dataset)  # accelerate's shard of one process
        if isinstance(dataset, FilledStream) or isinstance(stream, FilledStream):
            filled: Any = dataset if isinstance(dataset, FilledStream) else stream
            return int(filled.stream.counts.kept_in_pass)
        return len(dataset.order) if isinstance(dataset, PadToMultiple) else super().num_examples(dataloader)

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop; what only fills the last batches is no sample."""
        with errors_of_workers():
            output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        return output._replace(num_samples=self.num_examples(dataloader))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss alone: ``compute_loss`` adds up what is to be known of the batch, and no logits are gathered."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        self.keep_outputs(inputs, outputs)
        return loss.detach(), None, None

    # ----------------------------------------------------------------------------------------------- of both kinds

    @property
    def without_label(self) -> Callable[[Any], dict[str, Any]]:
        """Makes of a row its first token, which only fills a batch."""
        return partial(dummy_row, labels=self.rows.dummy_labels)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        config, workers = self.accelerator.dataloader_config, self.args.dataloader_num_workers
        dispatch = config.dispatch_batches
        if isinstance(dataset, IterableDataset):
            # Its batches are those of a list: each process takes its part of them, and does not wait for the first one. A
            # second worker would read the same rows once more, and data sets that share rows out among workers lose some.
            config.dispatch_batches, self.args.dataloader_num_workers = False, min(workers, 1)
        try:
            loader: DataLoader[Any] = super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            config.dispatch_batches, self.args.dataloader_num_workers = dispatch, workers
        context = loader.multiprocessing_context or torch.multiprocessing
        if loader.num_workers and context.get_start_method() == "fork":
            initialise = partial(ignore_signals_in_worker, loader.worker_init_fn)
            for part in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate iterates over the latter
                part.worker_init_fn = initialise
        return loader

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        collator: Any = data_collator
        if not isinstance(data_collator, Collator):
            collator = NumberedCollator(super()._get_collator_with_removed_columns(data_collator, description))
        # Batches that accelerate cuts and sends to other processes would keep the count of the whole.
        config: Any = self.args.accelerator_config
        return collator if config.dispatch_batches else CountingCollator(collator)

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        """A batch as the data loaders make it."""
        return cast("dict[str, Any]", self._get_collator_with_removed_columns(self.data_collator)(examples))

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Labels of the whole optimizer step: all micro-batches of all ranks, counted after the shift."""
        for batch in batch_samples:
            self._counted[batch["labels"]] = batch["labels"]._version
        local = sum((self.count_items(batch["labels"]) for batch in batch_samples), torch.zeros((), dtype=torch.int64))
        return cast(Tensor, self.accelerator.gather(local.to(device).reshape(1)).sum().clamp(min=1))

    def count_of_step(self, batches: list[dict[str, Any]]) -> Tensor:
        """What the loss of an optimizer step is divided by, ``[]``, where its batches are not those of the data loader."""
        return self._get_num_items_in_batch(batches, self.args.device)

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as a training step is given it: where the student is, and under DeepSpeed in its type."""
        return self._prepare_inputs(batch)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """The Trainer's count without dummy rows; ``non_padding`` by length, for a padding token may be a real one, too."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        count = count_tokens if self.args.include_num_input_tokens_seen == "non_padding" else count_cells
        seen = self.accelerator.gather(count(inputs).to(self.args.device).reshape(1))
        self.state.num_input_tokens_seen += int(seen.sum())


def one_of_several(name: str, datasets: Mapping[Any, Any]) -> str:
    """What to say to a dictionary of data sets, such as a ``DatasetDict``, where one is expected."""
    names = [*map(str, datasets)]
    chosen = "train" if "train" in names else names[0] if names else "train"
    return (
        f"{name}: got several data sets ({', '.join(names) or 'none'}), expected one of them, such as data['{chosen}']"
    )


def check_stream(args: TrainingArguments, dataset: Any) -> None:
    """Refuse arguments that a stream's rows cannot follow.

    Raises:
        UserError: names the argument.
    """
    if not isinstance(dataset, RowStream):
        return
    for name, wrong, expected in (
        ("max_steps", args.max_steps <= 0, "a number of steps: nobody knows how many rows an epoch has"),
        (
            "train_sampling_strategy",
            args.train_sampling_strategy not in ("random", "sequential"),
            "random: its rows come in an order of their own (dataset.shuffle(buffer_size=..., seed=...))",
        ),
    ):
        if wrong:
            raise UserError(
                f"training.{name}: got {getattr(args, name)}, expected {expected}, as train_dataset is a stream"
            )
    config: Any = args.accelerator_config
    if config.dispatch_batches and args.world_size > 1:
        raise UserError(
            "args.accelerator_config: got dispatch_batches: true, expected None or false, as train_dataset is a stream: "
            "every process reads it and takes its own rows"
        )


def check_packs(args: TrainingArguments, dataset: Any, tokens: int) -> None:
    """Refuse rows that do not fit into a pack, and arguments that would have another say in what is a batch.

    Raises:
        UserError: names the row and its length, or the argument.
    """
    said = f"data.packing: {{tokens: {tokens}}}"
    for name, expected, why in (
        ("train_sampling_strategy", "random", "which fills batches from rows of all lengths, in an order of its own"),
        ("dataloader_drop_last", False, "which leaves no row out"),
        ("auto_find_batch_size", False, "where a batch is a number of tokens; lower that one"),
    ):
        value = getattr(args, name)
        if value != expected:
            raise UserError(f"training.{name}: got {value}, expected {expected} beside {said}, {why}")
    if dataset is None:
        return
    if not hasattr(dataset, "lengths"):
        raise UserError(f"{said}: an iterable data set has no lengths to pack by; expected a list of its rows")
    longest = max(dataset.lengths)
    if longest > tokens:
        place = dataset.lengths.index(longest)
        row = dataset.row_ids[place] if hasattr(dataset, "row_ids") else place
        raise UserError(
            f"{said}: row {row} has {longest:,} tokens and fits into no batch; expected at least {longest}, or shorter rows "
            "(data.max_length)"
        )


def count_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Real tokens of a batch, as a 0-d tensor: neither padding nor dummy rows."""
    return real_tokens(inputs).sum()


def count_cells(inputs: Mapping[str, Tensor]) -> Tensor:
    """Tokens of a batch with its padding, but without dummy rows, as a 0-d tensor."""
    return count_tokens({name: value for name, value in inputs.items() if name != "attention_mask"})
