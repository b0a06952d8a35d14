"""docs/log_columns.md, from the table in dts_hf/loss/statistics.py; ``python docs/generate.py`` writes it."""

from __future__ import annotations

from dts_hf.loss.statistics import STATISTICS, Statistic

HEAD = """# Columns of the log

<!-- Written by docs/generate.py from the table in dts_hf/loss/statistics.py; edit that. -->

`log.jsonl` of a run has one JSON object a line. What the loss adds to the lines of training and of held-out rows is here:
sums over labelled rows, over all micro-batches and ranks, divided once by the number of rows. So each number is a mean over
the labels since the last line, and not a mean of means. T_s and T_t are the temperatures of student and teacher; everything
else is at T = 1, so that runs with different temperatures can be compared by it.
"""

TAIL = """
- **Held-out lines** put `eval_` before the names, at T = 1 throughout. They also have `eval_loss` (its parts weighed by
  the recipe's `kd_ratio`), `eval_rows` and `eval_labels`.
- **Without a teacher** the log has the rows marked "student" alone.
- **Of several teachers** each has `labels/NAME` and the means over its own rows: [several teachers](several_teachers.md).
- **A teacher with another tokenizer** ([page](other_tokenizers.md)) adds the columns from `aligned_share` on, the last two
  with `dual_space` alone. `kl`, `reverse_kl`, `top1_agreement`, temperatures, the teacher's entropies and those at T are
  then means over the labels that are the same for both, and there is no `teacher_ece`.
- **A regression** (STS-B) has squared errors in the place of cross-entropies, under the names of the last column, and none
  of the others.
- **A policy** adds what it wants shown: `temperature_cosine`, the schedule it is compared with, `kd_ratio` where it sets
  that too, and what its section in [temperature.md](temperature.md) says.
- **A gap of held-out rows** (`gap_source: held_out`) is `held_out_gap`, as it is in force; `probe_seconds` is what measuring
  it has taken since the last line. See [the gap](gap.md).
- **Text of the student's own** ([on-policy](on_policy.md)) has columns of its own, `generated_...`. `ce_loss`, `teacher_ce`
  and `gap` are then of the labels of the data alone, and a line over generated steps alone has none of them; the others are
  of both kinds of steps. Such a run also logs `generation_seconds`, those that the first process has spent on answers.
- A line with both kinds of steps also has the data's part of `kd_loss` and `kl`, as `data_kd_loss` and `data_kl`.
- Training lines also have what the Trainer logs (`loss`, `grad_norm`, `learning_rate`, `epoch`) and `tokens_per_second`.
"""


def log_columns_page() -> str:
    """The whole page."""
    head = "| column | unit | what it is | needs | held-out | regression |\n|---|---|---|---|---|---|"
    return f"{HEAD}\n{head}\n" + "\n".join(map(_line, STATISTICS)) + "\n" + TAIL


def _line(statistic: Statistic) -> str:
    cells = (
        f"`{statistic.log}`",
        statistic.unit,
        statistic.meaning,
        "teacher" if statistic.needs_teacher else "student",
        "yes" if statistic.held_out else "",
        f"`{statistic.regression}`" if statistic.regression else "",
    )
    return f"| {' | '.join(cells)} |"
