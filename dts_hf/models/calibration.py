"""What each layer and channel of a model is worth, measured on a few rows: for a student that is cut out of it.

Nothing is copied and no weight is changed: a layer that is left out hands on what it is given, for the length of a pass.
Shapes: ``B`` batch, ``T`` time, ``H`` hidden, ``N`` labelled rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from dts_hf.data.collators import PaddedCollator
from dts_hf.data.encoding import EncodedDataset, Example
from dts_hf.errors import UserError
from dts_hf.loss.selection import select_response
from dts_hf.models.head import Head, backbone_of, loss_in_head
from dts_hf.models.pruning import evenly_spaced, find_stacks

#: Rows of a pass; and tokens of all rows together, above which there are fewer rows (but not fewer than ``FEWEST``).
BATCH, MOST_TOKENS, FEWEST = 8, 6144, 4
#: Labelled rows whose logits are in memory together.
CHUNK = 256
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """Rows on which layers and channels are weighed up.

    Attributes:
        batches: padded on the right; ``input_ids``, ``attention_mask`` and ``labels`` [B, T].
        row_ids: their ids.
        labels: how many tokens are predicted.
        digest: a checksum over tokens and labels.
    """

    batches: Sequence[Batch]
    row_ids: Sequence[str]
    labels: int
    digest: str

    @classmethod
    def of(cls, data: EncodedDataset, count: int, device: torch.device | str = "cpu") -> Calibration:
        """``count`` rows, evenly spaced over those of ``data`` that have a label; where none has, whole rows count.

        Args:
            data: the rows that will be trained on.
            count: fewer are taken of long rows, ``MOST_TOKENS`` tokens in all.
            device: where the batches are.

        Raises:
            UserError: no row has two tokens.
        """
        labelled = [k for k, labels in enumerate(data.target_counts) if labels > 0]
        usable = labelled or [k for k, length in enumerate(data.lengths) if length > 1]
        if not usable:
            raise UserError("student.init: no row of data.train has a token to predict, so no layer can be weighed up")
        mean = sum(data.lengths[k] for k in usable) / len(usable)
        count = min(count, len(usable), max(FEWEST, int(MOST_TOKENS / mean)))
        rows = [usable[place] for place in evenly_spaced(count, len(usable))]
        examples = {row: _example(data, row, whole=not labelled) for row in rows}
        order = sorted(rows, key=lambda row: (data.lengths[row], row))  # little padding
        collate, kept = PaddedCollator(0), ("input_ids", "attention_mask", "labels")
        batches = []
        for start in range(0, len(order), BATCH):
            batch = collate([examples[row] for row in order[start : start + BATCH]])
            batches.append({name: batch[name].to(device) for name in kept})
        xxh3 = xxhash.xxh3_64()
        for row in rows:
            xxh3.update(f"{examples[row]['input_ids']} {examples[row]['labels']}".encode())
        labels = sum(sum(label >= 0 for label in example["labels"][1:]) for example in examples.values())
        return cls(batches, [data.row_ids[row] for row in rows], labels, f"xxh3:{xxh3.hexdigest()}")

    @property
    def device(self) -> torch.device:
        return self.batches[0]["input_ids"].device

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"rows": len(self.row_ids), "labels": self.labels, "digest": self.digest}

    def nll(self, model: nn.Module) -> float:
        """Mean nats per label of a causal language model, as it is."""
        with quiet_model(model):
            return sum(_nll(model, batch) for batch in self.batches) / self.labels

    def run(self, model: nn.Module, mask: list[Tensor]) -> None:
        """Feed the rows to the model without its head.

        Args:
            model: a causal language model.
            mask: holds the attention mask [B, T] of the batch that is on its way.
        """
        with quiet_model(model):
            for batch in self.batches:
                mask[:] = [batch["attention_mask"]]
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                backbone_of(model)(**inputs, use_cache=False)


def _example(data: EncodedDataset, row: int, whole: bool) -> Example:
    example = data[row]
    return {**example, "labels": list(example["input_ids"])} if whole else example


@contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` is in evaluation mode and computes no gradient."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _nll(model: nn.Module, batch: Batch) -> float:
    """Sum over the labels of a batch, nats."""

    def total(states: Tensor, head: Head) -> Tensor:
        rows, targets = select_response(states, batch["labels"])
        parts = [
            nn.functional.cross_entropy(
                head(rows[k : k + CHUNK].to(head.weight.dtype)).float(), targets[k : k + CHUNK], reduction="sum"
            )
            for k in range(0, len(rows), CHUNK)
        ]
        return torch.stack(parts).sum()

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with loss_in_head(model, total):
        found = float(model(**inputs, use_cache=False).logits)
    return found if math.isfinite(found) else math.inf


class LayerSwitch:
    """Passes through some of a model's layers, each begun where it first differs from the last ``base``.

    Args:
        model: a causal language model on one device, full.
        calibration: the rows.

    Attributes:
        depth: how many layers there are.
        kept: those of the base.
        influence: by layer of the base, ``1 - mean cos(h_in, h_out)`` over the real tokens (ShortGPT, arXiv 2403.03853).

    Raises:
        UserError: its layers do not hand on states in a way that is known here.
    """

    def __init__(self, model: nn.Module, calibration: Calibration) -> None:
        self.model, self.calibration = model, calibration
        self.name = type(model).__name__
        self.depth = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
        decoder = model.get_decoder()  # type: ignore[operator]
        modules = dict(decoder.named_modules())
        stacks = find_stacks(decoder, self.depth)
        if not stacks:
            raise self._unknown()
        self.layers: list[nn.Module] = list(modules[stacks[0]])
        self.kept: list[int] = list(range(self.depth))
        self.influence: dict[int, float] = {}
        self._states: list[list[Tensor]] = []  # by batch and place in ``kept``: what the layer is given; then the end
        self._tuples = [False] * self.depth

    def _unknown(self) -> UserError:
        return UserError(
            f"student.init.choose: the layers of {self.name} do not hand on their states in a way that dts_hf knows, so "
            "they cannot be left out one by one; expected choose: even, or a list of student.init.layers"
        )

    def base(self, kept: Sequence[int]) -> float:
        """Make ``kept`` the layers from which the others differ; their mean NLL per label."""
        self.kept, self._states = list(kept), []
        total, cosines, tokens = 0.0, [0.0] * len(self.kept), 0.0
        for batch in self.calibration.batches:
            nll, states = self._recorded(batch)
            total += nll
            real = batch["attention_mask"].float()
            for k, (given, made) in enumerate(pairwise(states)):
                cosine = nn.functional.cosine_similarity(given.float(), made.float(), dim=-1)
                cosines[k] += float((cosine * real).sum())
            tokens += float(real.sum())
            self._states.append(states)
        self.influence = {layer: 1 - cosines[k] / tokens for k, layer in enumerate(self.kept)}
        return total / self.calibration.labels

    def _recorded(self, batch: Batch) -> tuple[float, list[Tensor]]:
        """NLL of a batch, and the states that each layer of the base is given; then those that the last one gives."""
        seen: dict[int, Tensor] = {}
        end: list[Tensor] = []

        def watch(place: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                seen[place] = self._given(args, kwargs)
                output = own(*args, **kwargs)
                self._tuples[place] = isinstance(output, tuple)
                end[:] = [output[0] if isinstance(output, tuple) else output]
                return output

            return forward

        forwards = {place: watch(place, self.layers[place].forward) for place in self.kept}
        nll = self._pass(batch, {**self._idle(self.kept), **forwards})
        if len(seen) != len(self.kept) or not all(isinstance(state, Tensor) for state in end):
            raise self._unknown()
        return nll, [*(seen[place] for place in self.kept), *end]

    def score(self, kept: Sequence[int]) -> float:
        """Mean NLL per label with the layers ``kept`` alone, which are among those of the base."""
        same = next((k for k, (a, b) in enumerate(zip(kept, self.kept, strict=False)) if a != b), len(kept))
        forwards = self._idle(kept[same:])
        total = 0.0
        for batch, states in zip(self.calibration.batches, self._states, strict=True):
            if same:  # what comes before the first difference is known
                forwards[self.kept[0]] = self._hands_on(self.kept[0], states[same])
            total += self._pass(batch, forwards)
        return total / self.calibration.labels

    @contextmanager
    def only(self, kept: Sequence[int]) -> Iterator[None]:
        """Within it the model has the layers ``kept`` alone."""
        with ExitStack() as stack:
            for place, forward in self._idle(kept).items():
                stack.enter_context(_forward_of(self.layers[place], forward))
            yield

    def _pass(self, batch: Batch, forwards: Mapping[int, Callable[..., Any]]) -> float:
        with ExitStack() as stack:
            stack.enter_context(quiet_model(self.model))
            for place, forward in forwards.items():
                stack.enter_context(_forward_of(self.layers[place], forward))
            return _nll(self.model, batch)

    def _idle(self, kept: Sequence[int]) -> dict[int, Callable[..., Any]]:
        return {place: self._hands_on(place) for place in sorted({*range(self.depth)} - {*kept})}

    def _hands_on(self, place: int, instead: Tensor | None = None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = self._given(args, kwargs) if instead is None else instead
            return (states, None) if self._tuples[place] else states

        return forward

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        states = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(states, Tensor):
            raise self._unknown()
        return states


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it ``module`` computes ``forward``; a hook of accelerate's, which stands in the same place, comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own
