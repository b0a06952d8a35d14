"""What teacher and student say of the student's own answers to held-out prompts (``evaluation.own_text``).

KL on the text of the data says how near the student is where the data goes; what it says itself is another text, and what
KL is like there is what its reader meets (exposure bias). Both directions are taken token by token over sampled answers, at
temperature 1, by the loss and in the batches that held-out rows have: so the teacher may be a model, a server or several.

**Cost**, each time that it is measured: sampling the answers, and one forward pass of student and teacher over them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from dts_hf.distributed.processes import gathered, process
from dts_hf.errors import UserError
from dts_hf.evaluation.fingerprint import digest_of
from dts_hf.generation.engine import Generated, GenerationSettings, generate
from dts_hf.generation.shares import answer_share
from dts_hf.on_policy.rollout import Row, answered_row, prompt_length, teacher_prompt_length
from dts_hf.recipe.schema import OwnText
from dts_hf.training.on_policy_trainer import LEAST_PROMPT

if TYPE_CHECKING:
    from dts_hf.data.encoding import EncodedDataset
    from dts_hf.training.trainer import DistillationTrainer

#: Of the trainer's means over these rows, those that are kept, and what they are called in ``metrics.json``.
_MEANS = {"kl": "kl", "reverse_kl": "reverse_kl", "student_entropy": "entropy", "teacher_entropy": "teacher_entropy"}


class OwnTextRows(Dataset[Row]):
    """Rows with their ``lengths``, as the trainer's data loaders take them.

    Args:
        rows: tokenised.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.lengths = [len(row["input_ids"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return dict(self.rows[index])


class OwnTextScorer:
    """Has the student answer held-out prompts, and both models compared on what it said.

    Args:
        settings: how many, and how they are answered.
        trainer: of student and teacher.
        held_out: its held-out rows as tokens, of which those with a question count; an answer is learned from its prompt on.
        batch_size: prompts that one process answers at once.

    Raises:
        UserError: no row asks anything, or a prompt with its answer has more tokens than a model has positions.
    """

    def __init__(
        self, settings: OwnText, trainer: DistillationTrainer, held_out: EncodedDataset, batch_size: int
    ) -> None:
        self.settings, self.trainer, self.batch_size = settings, trainer, batch_size
        rows: list[Row] = []
        self.keys: list[str] = []
        for place, row_id in enumerate(held_out.row_ids):
            if len(rows) == settings.rows:
                break
            row: Row = dict(held_out[place])
            if (prompt_length(row) or 0) >= LEAST_PROMPT:
                rows.append(row)
                self.keys.append(row_id)
        if not rows:
            raise UserError(
                "evaluation.own_text: none of the held-out rows asks anything that the student could answer (texts have no "
                "prompt); expected rows with a question, or leave it out"
            )
        self.rows = rows
        self.prompts = [row["input_ids"][: prompt_length(row)] for row in rows]
        self._check_room()

    def _check_room(self) -> None:
        read = [teacher_prompt_length(row) or 0 for row in self.rows]
        for limit, role, teaches in self.trainer.length_limits():
            longest = max(map(len, self.prompts)) if not teaches else max(*map(len, self.prompts), *read)
            if longest + self.settings.max_new_tokens > limit:
                raise UserError(
                    f"evaluation.own_text: a held-out prompt of {longest:,} tokens, with max_new_tokens = "
                    f"{self.settings.max_new_tokens}, is more than the {limit:,} positions of {role}; lower one of them"
                )

    @property
    def fingerprint(self) -> str:
        """Digest of what is asked and how: numbers of equal ones can be compared."""
        chosen = self.settings
        return digest_of([chosen.temperature, chosen.max_new_tokens, chosen.seed, self.prompts])

    def answer(self, model: torch.nn.Module) -> list[Generated]:
        """The answers of ``model``, the same for any number of processes (see ``generation.shares``); all call it."""
        rank, world = process()
        tokenizer: Any = self.trainer.processing_class
        settings = GenerationSettings(
            max_new_tokens=self.settings.max_new_tokens, batch_size=self.batch_size, do_sample=True,
            temperature=self.settings.temperature, seed=self.settings.seed,
        )  # fmt: skip
        own: dict[int, Generated] = {}
        # Ids behind those that both models share are none that the teacher could judge
        answer_share(
            model, tokenizer, self.prompts, settings, turn_ends=self.trainer.end_token_ids(), known=(),
            on_finished=own.__setitem__, rank=rank, world=world, row_keys=self.keys,
            answer=functools.partial(generate, vocab_size=self.trainer.vocab_size),
        )  # fmt: skip
        found = {place: one for part in gathered(own, world) for place, one in part.items()}
        return [found[place] for place in range(len(self.prompts))]

    def score(self, answers: Sequence[Generated]) -> dict[str, Any]:
        """The entry ``own_text`` of a model in ``metrics.json``; every process calls it.

        Args:
            answers: of the student as it is now.

        Returns:
            ``kl`` (teacher from student) and ``reverse_kl`` (student from teacher), ``entropy`` and ``teacher_entropy``:
            nats, means over the ``n_tokens`` tokens of all answers, their ends included, at temperature 1; ``n`` answers of
            ``mean_tokens`` tokens, of which the share ``cut_at_limit`` has no end; ``fingerprint`` of what was asked.
        """
        rows = [answered_row(row, one) for row, one in zip(self.rows, answers, strict=True)]
        means = self.trainer.means_on(OwnTextRows(rows))
        count = len(answers)
        return {
            **{ours: means[theirs] for theirs, ours in _MEANS.items()},
            "n_tokens": int(means["labels"]),
            "n": count,
            "mean_tokens": sum(len(one.tokens) + one.finished for one in answers) / count,
            "cut_at_limit": sum(not one.finished for one in answers) / count,
            "fingerprint": self.fingerprint,
        }
