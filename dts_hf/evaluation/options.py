"""The options of an evaluation, declared once: the command line fills them, and they change a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dts_hf.errors import UserError, nearest
from dts_hf.recipe.schema import Dtype

DTYPES: tuple[str, ...] = get_args(Dtype)


@dataclass(frozen=True)
class EvaluationOptions:
    """What is asked, how it is answered, and where the answers go. None: as the protocol or the run has it.

    Args:
        sets: names of prepared sets (``dts-hf list sets``) or row files.
        data: further rows in any form that ``data.sources.load_rows`` takes. Without ``sets`` and ``data``: the
            validation rows of the run, with the data's own answers as references.
        protocol: name of a variant (``dts-hf list protocols``); None: the student's own, as its ``dts_hf.json`` or its run
            has it. A foreign model, and prepared sets, have ``minillm`` in the template of the student's training.
        seeds: sample once per seed.
        template: name of the prompt template; None: the protocol's. Of a foreign model: ``auto``, its chat template where
            it has one.
        max_new_tokens: longest answer, in tokens.
        no_repeat_ngram_size: no n-gram of prompt and answer twice; 0: no rule.
        rows: answer the first so many of each set; None: all, of a run's own rows as many as its ``evaluation.rows`` says.
        batch_size: prompts answered at once.
        dtype: of the weights; None: the run's ``evaluation.dtype``, else its ``student.dtype``; float32 for a foreign model.
            There is no autocast: a run with ``training.bf16`` answers under it, and scores differ in near-ties.
        output: folder for metrics, predictions and what a killed evaluation needs to go on; None: nothing is written.
        overwrite: begin anew where ``output`` holds another evaluation.
        backend: ``dts_hf``, or ``vllm`` (a variant of the protocol: other samples, no n-gram rule).
        data_dir: folder of the prepared sets; None: the default of ``benchmark_sets.resolve_set``.

    Raises:
        UserError: there is no such dtype.
    """

    sets: Sequence[str] = ()
    data: str | None = None
    protocol: str | None = None
    seeds: Sequence[int] | None = None
    template: str | None = None
    max_new_tokens: int | None = None
    no_repeat_ngram_size: int | None = None
    rows: int | None = None
    batch_size: int = 32
    dtype: str | None = None
    output: str | Path | None = None
    overwrite: bool = False
    backend: str = "dts_hf"
    data_dir: str | Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            expected = f"expected one of {', '.join(DTYPES)}.{nearest(str(self.dtype), DTYPES)}"
            raise UserError(f"dtype: got {self.dtype!r}, {expected}")

    def protocol_changes(self) -> dict[str, Any]:
        """What these options change in a protocol, for ``Protocol.changed``; None: nothing. Seeds mean sampling."""
        names = ("seeds", "template", "max_new_tokens", "no_repeat_ngram_size", "backend")
        return {**{name: getattr(self, name) for name in names}, "do_sample": True if self.seeds else None}
