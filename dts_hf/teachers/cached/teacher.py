"""``CachedTeacher``: a ``Teacher`` whose states come out of a cache, with the batch; its backbone is not in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dts_hf.alignment.batch import as_read
from dts_hf.data.chat_templates import Template
from dts_hf.divergences import Divergence
from dts_hf.errors import UserError
from dts_hf.loss.compact_rows import CompactRows
from dts_hf.loss.compact_served import check_served
from dts_hf.loss.selection import IGNORE_INDEX, select_response
from dts_hf.models.head import Head
from dts_hf.models.pruning import evenly_spaced
from dts_hf.teachers.cached.layout import row_key, targets_of
from dts_hf.teachers.cached.reader import StateCache, torch_dtype
from dts_hf.teachers.compact import (
    MEASURED,
    CompactFormat,
    alone,
    check_mass,
    compare_rows,
    measured_rows,
    stored_errors,
    visited,
)
from dts_hf.teachers.identity import differences, rows_facts
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.self_test import LabelDifference, compare_labels, compare_live, judge, label_difference
from dts_hf.temperature import TemperaturePolicy

logger = logging.getLogger(__name__)

#: In a batch: the states of its rows ``[N, H]`` as whole numbers with the same bits, for the Trainer casts every floating
#: input to the type that DeepSpeed trains in; and which of them the cache has not ``[N]``, where there are any.
STATES, MISSING = "teacher_states", "teacher_states_missing"
#: In a batch: the bits of the label log-probabilities ``[N]`` that were stored with the states.
LOGPROBS = "teacher_logprobs"
BITS = {2: torch.int16, 4: torch.int32}
#: For the self-test: at least so many labels, of at most so many rows; and rows that a live teacher scores again.
_LABELS, _ROWS, _LIVE_ROWS = 512, 64, 8
#: Temperatures that are measured again differ in their last digits, for the rows of the policy are others.
_NEAR = 1.05


@dataclass
class CachedStates:
    """Adds to a batch the states of its rows; workers of a data loader run it.

    Args:
        cache: where they are.
        fill: rows that the cache has not are marked, for a live teacher; False: they are an error.

    Returns (of a call):
        ``teacher_states [N, H]`` in the order of ``selection.select_response``, as whole numbers (of a compact cache as
        ``CompactFormat.pack`` lays them), ``teacher_logprobs [N]``, and ``teacher_states_missing [N]`` where there are any.
    """

    cache: StateCache
    fill: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        width, dtype = self.cache.row_shape
        parts, missing = [torch.zeros(0, width, dtype=dtype)], [torch.zeros(0, dtype=torch.bool)]
        logprobs = [torch.zeros(0)]
        for example in examples:
            labels = example["labels"]
            if all(label == IGNORE_INDEX for label in labels[1:]):  # a row that only fills a batch
                continue
            row = self.cache.find(row_key(example["input_ids"], labels))
            if row is None and not self.fill:
                raise UserError(
                    f"{self.cache.folder}: row number {example.get('row_id')} of a batch is not in the cache, with these "
                    "tokens and labels. teacher.missing: live has the teacher answer such rows"
                )
            count = len(targets_of(labels)) if row is None else self.cache.labels(row)
            parts.append(torch.zeros(count, width, dtype=dtype) if row is None else self.cache.row(row))
            missing.append(torch.full((count,), row is None))
            logprobs.append(torch.zeros(count) if row is None else self.cache.label_logprobs(row))
        states, absent = torch.cat(parts), torch.cat(missing)
        batch = {STATES: states.view(BITS[dtype.itemsize]), LOGPROBS: torch.cat(logprobs).view(torch.int32)}
        return {**batch, MISSING: absent} if absent.any() else batch


class CachedTeacher:
    """Takes the states of a batch's rows out of the batch, where ``CachedStates`` has put them.

    Args:
        cache: a finished one, or its folder.
        live: answers rows that the cache has not; None: such rows are an error.

    Raises:
        UserError: the cache is unfinished or damaged.
    """

    takes_cu_seqlens = True

    def __init__(self, cache: StateCache | str | Path, live: LiveTeacher | None = None) -> None:
        self.cache = cache if isinstance(cache, StateCache) else StateCache(cache)
        self.live = live
        self._head = self.cache.head()
        self._untested = _LABELS  # labels; of rows that are only known as their batches come

    @property
    def head(self) -> Head:
        """As it was when the teacher ran, in its type."""
        return self._head

    @property
    def compact(self) -> bool:
        """Whether it answers with ``CompactRows`` in the place of states."""
        return self.cache.manifest.form is not None

    @property
    def of_rows(self) -> CachedStates:
        """What a collator asks for the states of its rows."""
        return CachedStates(self.cache, fill=self.live is not None)

    def to(self, device: torch.device) -> CachedTeacher:
        """Move the head, and the live teacher where there is one."""
        self._head = self._head.to(device)
        if self.live is not None:
            self.live.to(device)
        return self

    @torch.no_grad()
    def states(self, batch: dict[str, Any], labels: Tensor) -> Tensor | CompactRows:
        """The states ``[N, H]`` of the rows that carry a label, in the type of the head; see ``Teacher.states``.

        Of a compact cache what it has kept of N rows of logits.

        Args:
            batch: with ``teacher_states``.
            labels: ``[B, T]`` unshifted.

        Raises:
            UserError: the batch brings none, as that of a collator that is not ours; or, in the first batches of rows that
                could not be looked at before, states are not those that the head reads.
        """
        batch = dict(batch)
        if STATES not in batch:
            raise UserError("teacher: a batch without the states of its rows, which our own collators put there")
        bits, missing, logprobs = batch.pop(STATES), batch.pop(MISSING, None), batch.pop(LOGPROBS, None)
        if self._untested > 0 and logprobs is not None:
            self._test_batch(bits, missing, logprobs.view(torch.float32), labels)
        if (form := self.cache.manifest.form) is not None:
            if missing is not None:
                bits = torch.where(missing[:, None], self._live_words(form, batch, labels).to(bits.device), bits)
            return form.unpack(bits)
        states: Tensor = bits.view(torch_dtype(self.cache.manifest.dtype)).to(self._head.weight.dtype)
        if missing is None:
            return states
        assert self.live is not None  # else the collator has refused the row
        return torch.where(missing[:, None], self.live.states(batch, labels).to(states.dtype), states)

    def _live_words(self, form: CompactFormat, batch: dict[str, Any], labels: Tensor) -> Tensor:
        """What the live teacher would have had kept of a batch, as ``CompactFormat.pack`` lays it."""
        assert self.live is not None
        targets = select_response(labels.unsqueeze(-1), labels)[1]
        return form.answer(self.live.states(batch, labels), self.live.head, targets)[0]

    def record(self) -> dict[str, Any]:
        """What a resume compares: see ``StateCache.record``."""
        return self.cache.record()

    # ------------------------------------------------------------------------------------------- before the first step

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, whose: str = "the student") -> None:
        """Refuse ids that mean something else than those that were cached.

        Args:
            tokenizer: of the rows that the teacher reads.
            whose: it is; the teacher's own where that is another one than the student's.

        Raises:
            UserError: its vocabulary is another one.
        """
        facts = {key: value for key, value in rows_facts(tokenizer, _NO_TEMPLATE).items() if key == "tokenizer"}
        if lines := differences(self.cache.identity, facts):
            raise UserError(
                f"{self.cache.folder}: {whose} has another tokenizer than the rows that were cached: {lines[0]}"
            )

    def check_rows(
        self, dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase, template: Template | None, top: float = 1.0
    ) -> None:
        """Look for every row of a data set in the cache, and make the self-test on some of them.

        Args:
            dataset: encoded rows, read by number.
            name: what errors call it.
            tokenizer: of the rows as the teacher reads them.
            template: what words these; None: they came as tokens.
            top: the highest temperature that states are compared at.

        Raises:
            UserError: a row is not in the cache and no live teacher is there to answer it, the states are not those that
                the head reads, or not the live teacher's.
        """
        if not self._is_whole(dataset):
            self._check_present(dataset, name, tokenizer, template)
        self._test(dataset, top)

    def check_loss(self, policy: TemperaturePolicy, divergence: Divergence, vocab_size: int) -> None:
        """Refuse a loss for which what a compact cache has kept is not enough; states are enough for every one.

        Args:
            policy: whose temperatures the kept tokens must cover.
            divergence: of the soft loss.
            vocab_size: V, the ids that student and teacher are compared over.

        Raises:
            UserError: it is another vocabulary than that of the cache, the policy or the divergence needs every logit, or
                the kept tokens have too little of the teacher at a temperature of the policy.
        """
        form, facts = self.cache.manifest.form, self.cache.manifest.compact
        if form is None or facts is None:
            return
        check_served(policy, divergence)
        if vocab_size != form.vocab_size:
            raise UserError(
                f"{self.cache.folder}: keeps distributions over {form.vocab_size:,} tokens, and student and teacher are "
                f"compared over {vocab_size:,} (teacher.vocab_alignment). Make it again with this recipe"
            )
        looked_at = measured_rows(len(self.cache), self.cache.manifest.labels)
        words = [self.cache.row(row) for row in looked_at if self.cache.labels(row)]
        rows = form.unpack(torch.cat(words)[:MEASURED])
        first = rows.logits.float().argmax(-1, keepdim=True)  # labels are not stored: what the teacher would have said
        likeliest = rows.ids.gather(-1, first).squeeze(-1)
        errors = stored_errors(rows, visited(policy, rows, likeliest.long()))
        for error in errors:
            logger.info("%s: compact: %s", self.cache.folder, error)
        instead = "Make it again with more tokens (dts-hf cache-teacher --compact K), or cache the teacher's states"
        # --force was given for the temperatures that were measured then, and not for warmer ones
        measured = [error["temperature"] for error in facts["errors"]] if facts["forced"] else []
        highest = max(measured, default=0.0)
        check_mass([error for error in errors if error.temperature > highest * _NEAR], instead)
        check_mass([error for error in errors if error.temperature <= highest * _NEAR], instead, forced=True)

    def _is_whole(self, dataset: Any) -> bool:
        """Whether the cache was made of this very data set."""
        known = [digest for digest in self.cache.manifest.data.values() if digest is not None]
        return bool(known) and getattr(dataset, "digest", None) in known

    def _check_present(
        self, dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase, template: Template | None
    ) -> None:
        missing = []
        for number in range(len(dataset)):
            example = as_read(dataset[number])
            key = row_key(example["input_ids"], example["labels"])
            if self.cache.find(key) is None and len(targets_of(example["labels"])):
                missing.append(number)
        if not missing:
            return
        ids = getattr(dataset, "row_ids", None)
        shown = [str(number) if ids is None else f"'{ids[number]}'" for number in missing[:5]]
        what = (
            f"{name}: {len(missing):,} of {len(dataset):,} rows are not in the cache {self.cache.folder} "
            f"({', '.join(shown)}{', ...' if len(missing) > 5 else ''})"
        )
        if self.live is not None:
            logger.warning("%s: the live teacher answers them", what)
            return
        reasons = [] if template is None else differences(self.cache.identity, rows_facts(tokenizer, template))
        if ids is not None and self.cache.knows_id(ids[missing[0]]):
            rule = ", ".join(f"{key} {value}" for key, value in self.cache.manifest.label_rule.items())
            reasons.append(f"row {shown[0]} is in it with other tokens or labels (it was made with {rule})")
            if getattr(dataset, "aligned", None) is not None:
                reasons.append(
                    "with teacher.alignment its labels depend on the student's tokenizer and template as well"
                )
        raise UserError(
            f"{what}{': ' + '; '.join(reasons) if reasons else ''}. Run dts-hf cache-teacher with this recipe, or set "
            "teacher.missing: live, which has the teacher answer them as they come"
        )

    def _test(self, dataset: Any, top: float) -> None:
        """Label log-probabilities again, from states and head; and states again, where the teacher is at hand."""
        stored, states, targets, examples, labels = [], [], [], [], 0
        for number in evenly_spaced(min(_ROWS, len(dataset)), len(dataset)):
            example = as_read(dataset[number])
            row = self.cache.find(row_key(example["input_ids"], example["labels"]))
            if row is None or not self.cache.labels(row):
                continue
            stored.append(self.cache.label_logprobs(row))
            states.append(self.cache.row(row))
            targets.append(torch.from_numpy(targets_of(example["labels"])))
            examples.append(example)
            labels += len(stored[-1])
            if labels >= _LABELS and len(examples) >= _LIVE_ROWS:
                break
        if not stored:
            return
        found = self._compare(torch.cat(stored), torch.cat(states), torch.cat(targets))
        logger.info("%s: self-test: %s", self.cache.folder, found)
        self._untested = 0
        if self.live is not None:
            self._test_live(examples[:_LIVE_ROWS], states[:_LIVE_ROWS], top)

    def _test_batch(self, bits: Tensor, missing: Tensor | None, logprobs: Tensor, labels: Tensor) -> None:
        """The self-test of the rows of a batch that are in the cache, until enough labels were tested."""
        known = torch.ones_like(logprobs, dtype=torch.bool) if missing is None else ~missing
        known = known.nonzero()[: self._untested, 0]
        if not len(known):
            return
        targets = select_response(labels.unsqueeze(-1), labels)[1].to(known.device)[known]
        states = bits[known] if self.compact else bits[known].view(torch_dtype(self.cache.manifest.dtype))
        self._compare(logprobs[known], states, targets)
        self._untested -= len(known)

    def _compare(self, stored: Tensor, states: Tensor, targets: Tensor) -> LabelDifference:
        """Label log-probabilities ``[n]`` as they were stored, and again from what is kept of them.

        Raises:
            UserError: see ``self_test.judge``.
        """
        device = self._head.weight.device
        if (form := self.cache.manifest.form) is not None:
            found = label_difference(stored, form.unpack(states).log_probs(targets))
        else:
            found = compare_labels(stored, states.to(device), self._head, targets.to(device))
        self._warn(judge(found, self.cache.manifest.dtype, str(self.cache.folder)))
        return found

    def _test_live(self, examples: Sequence[Mapping[str, Any]], states: Sequence[Tensor], top: float) -> None:
        assert self.live is not None
        device, live, form = self._head.weight.device, [], self.cache.manifest.form
        for example in examples:  # one at a time: no padding, no collator
            inputs, labels = alone(example, device)
            live.append(self.live.states(inputs, labels) if form is None else self._live_words(form, inputs, labels))
        kept, again, temperatures = torch.cat(list(states)), torch.cat(live), sorted({1.0, top})
        if form is None:
            found = compare_live(kept, again, self._head, temperatures)
        else:
            found = compare_rows(form.unpack(kept), form.unpack(again.cpu()), temperatures)
        self._warn(judge(found, self.cache.manifest.dtype, str(self.cache.folder)))
        logger.info("%s: self-test against the live teacher: %s", self.cache.folder, found)

    def _warn(self, warning: str | None) -> None:
        if warning is not None:
            logger.warning(warning)


#: Where only the tokenizer is compared.
_NO_TEMPLATE = Template("", "", lambda row, tokenizer: "", is_chat=False)
