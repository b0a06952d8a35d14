"""The sums of a training: of the optimizer step that runs, of the evaluation that runs, and since the last log line."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dts_hf.data.samplers import real_tokens
from dts_hf.loss.logged_sums import LogColumns, MeanLog, SumMeter


class StepSums:
    """The meters that ``compute_loss`` fills and the callbacks read.

    Args:
        columns: the statistics that mean something in this kind of run, and what the log calls them.

    Attributes:
        step_meter: sums of the optimizer step that runs, this rank's.
        eval_meter: sums of the evaluation that runs, this rank's.
        mean_log: totals of all ranks since the last log line.
        tokens_seen: real tokens (no padding) of all ranks, up to the last log line.
    """

    def __init__(self, columns: LogColumns) -> None:
        self.columns = columns
        self.reset()

    def reset(self) -> None:
        """Start a run from nothing."""
        self.step_meter, self.eval_meter, self.mean_log = SumMeter(), SumMeter(), MeanLog(self.columns)
        self.tokens_seen = 0.0


def count_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Real tokens of a batch, as a 0-d tensor: neither padding nor dummy rows."""
    return real_tokens(inputs).sum()


def count_cells(inputs: Mapping[str, Tensor]) -> Tensor:
    """Tokens of a batch with its padding, but without dummy rows, as a 0-d tensor."""
    return count_tokens({name: value for name, value in inputs.items() if name != "attention_mask"})
