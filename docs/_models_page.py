"""docs/models.md, from the table of families in tests/support/families.py, every cell of which a test has measured."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.families import FAMILIES, Family

HEAD = """# Models

<!-- Written by docs/generate.py from tests/support/families.py; edit that. -->

Any decoder-only language model of transformers whose logits are a linear layer of its final states, times a constant,
soft-capped or not, can be teacher or student. Whether that is so is not looked up in a list: it is probed when the trainer
is built, and what does not fit is refused by one message before anything is trained.

The families below are tested from tiny random configurations, each through `DistillationTrainer`
([tests/training/test_families.py](../tests/training/test_families.py),
[tests/models/test_pruning.py](../tests/models/test_pruning.py),
[tests/models/test_packed_attention.py](../tests/models/test_packed_attention.py)):

- **Identity.** A copy of the teacher has KL 0 and gap 0 (to 1e-6, also with logits 60 times as large), and no
  distillation gradient under any policy that gives both models one temperature. Both compute in one precision here: with
  `bf16: true` and a float32 teacher the KL of a copy is the student's rounding and, in a mixture of experts, tokens that go
  to another expert.
- **Dense.** Loss and the gradient of every parameter of one step equal autograd on `model(...).logits` of each row alone:
  to 1e-9 in float64, or to 1e-6 where the family's own code goes down to float32 inside (norms, softmax, routers, state
  space models), whatever the weights are.
- **Pruning.** `student.init: {from: teacher, layers: N}` keeps the layers it says, each of its own kind, and the pruned
  model writes the same text with a KV cache as without. What layers and channels are worth is measured on rows
  ([student](student.md)); the student that is built has the cross-entropy that was measured.
- **Packing.** A packed row has the logits and gradients that it has alone: nothing of the row before it comes through.
"""

ALSO_REFUSED = """Also refused: adapters that put virtual tokens before a row (prompt and prefix tuning) or sit on the
output layer, a model that does anything else to its logits, a student that shares weights with its teacher, and, for
packing or pruning, what the probe or the configuration shows to be impossible; the message then names what would work.
"""

MIXTURES = """## Mixtures of experts

Where a model's configuration says `output_router_logits: true`, its own training loss adds `router_aux_loss_coef` times an
auxiliary loss that keeps the router from sending every token to the same experts (Switch Transformer, arXiv 2101.03961,
Eq. 4 to 6). So does ours: the log has it as `aux_loss`, without the coefficient. `loss.router_aux_loss: none`, or
`router_aux_loss="none"` in Python, leaves it out. Held-out losses never have it. Padding and the dummy rows that fill
the last batch of several processes do not enter it.

It is the one term that depends on how a step is split into micro-batches, because it multiplies the shares of a batch with
each other. Each micro-batch counts by its labels, so that one micro-batch in one process gives exactly what
transformers gives. The tests that prove a step independent of its split run without it.
"""


def models_page() -> str:
    """The whole page."""
    works = {name: family for name, family in FAMILIES.items() if family.trains}
    table = [
        ["Family", "Class", "Loss and gradient", "Pruning", "Packing"],
        ["---"] * 5,
        *(_row(name, family) for name, family in works.items()),
    ]
    refused = [["Model", "Why"], ["---"] * 2] + [
        [f"{name} (`{family.class_name}`)", family.note] for name, family in FAMILIES.items() if not family.trains
    ]
    parts = [HEAD, _markdown(table), "## Refused before training", _markdown(refused), ALSO_REFUSED, MIXTURES]
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def _row(name: str, family: Family) -> list[str]:
    exact = "1e-9" if family.inside == "float64" else "1e-6 (float32 inside)"
    note = f" ({family.note})" if family.note else ""
    return [name, f"`{family.class_name}`", exact, f"yes{note}" if family.prunes else f"refused{note}",
            "exact" if family.packs else "refused"]  # fmt: skip


def _markdown(table: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)
