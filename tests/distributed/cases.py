"""What test_distributed.py and test_sharded.py train; their workers train it, the tests judge it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ROWS = [
    {
        "id": f"r{i}",
        "instruction": "Count" + " up" * (i % 5),
        "input": "",
        "output": "one " * (1 + 4 * (i % 4)) + "two",
    }
    for i in range(40)
]
POLICIES = {
    "gap": {"name": "dts", "rule": "gap"},
    "paper": {"name": "dts", "rule": "paper"},
    "code": {"name": "dts", "rule": "code"},
    "dtkd": {"name": "dtkd", "w_kd": 0.5},
    "ctkd": {"name": "ctkd", "ramp": 0.1},
    # What else travels from rows to the policy's state: row gaps, features of rows, the slope of the loss in T.
    "sequence": {"name": "dts", "granularity": "sequence"},
    "auto": {"name": "dts", "range": "auto"},
    "adakd": {"name": "adakd"},
    "silent": {"name": "adakd"},  # of two ranks, the second never has a label
    # Which tokens the next step trains on: a share, and one that moves with the loss
    "keep": {"name": "adakd", "keep": 0.4},
    "auto_keep": {"name": "adakd", "keep": "auto", "keep_step": 0.3, "keep_band": 0.0, "keep_warmup": 0.1},
}
MULTI = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
#: Of what has nothing to do with where gradients and optimizer states lie: ZeRO-1 and 2 are one way for it.
FEW = ("ddp", "zero2", "zero3", "fsdp2")
TIED = {"gap": True, "paper": False, "code": True, "dtkd": False, "ctkd": True}
CLASSIFIERS = ("single", "ddp", "zero3")  # strategies that train some
BATCH = 8  # rows of an optimizer step, however it is split
#: One rounding in fp32, relative.
ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Case:
    """One training; cases of one ``group`` must end in the same weights."""

    group: str
    policy: str = "gap"
    tie: bool = True
    accumulation: int = 1
    packing: bool | dict[str, int] = False
    steps: int = 6  # of the table; an epoch of 40 rows has 5
    lora: bool = False
    rows: int = 40  # of the data; not a multiple of BATCH: the last step of an epoch has fewer
    strategies: tuple[str, ...] = ("single", *MULTI)
    arguments: dict[str, Any] = field(default_factory=dict)
    rounded: bool = False  # its gradients are rounded as a sum in another order would be: see ``round_gradients``

    @property
    def name(self) -> str:
        return f"{self.group}-{self.accumulation}-{'packed' if self.packing else 'padded'}{'-rounded' * self.rounded}"


PADDED, PACKED = False, True
PACKS = {"tokens": 210}
RECOMPUTED = {"activation_checkpointing": True}
EPOCHS = {"max_steps": -1, "num_train_epochs": 3}
RANDOM, GROUPED = {"train_sampling_strategy": "random"}, {"train_sampling_strategy": "group_by_length"}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 0.0}
# The graph of a backward pass takes the most time, and matters where the weights are put together for it anew.
FORWARD = {"torch_compile": True, "torch_compile_backend": "eager"}
COMPILED = {**FORWARD, "torch_compile_backend": "aot_eager"}
CASES = [
    # The table. Plain SGD, because AdamW forgives a gradient of the wrong scale. One process takes each policy's step
    # whole; the strategies split it in another way, so that every strategy meets every policy, accumulation and layout.
    *(Case(policy, policy, tie, strategies=("single",)) for policy, tie in TIED.items() if policy != "gap"),
    Case("gap"),
    Case("gap", accumulation=2, packing=PACKED),
    Case("gap", accumulation=4, packing=PADDED),
    Case("paper", "paper", TIED["paper"], 1, PACKED, strategies=MULTI),
    Case("code", "code", TIED["code"], 2, PADDED, strategies=MULTI),
    Case("dtkd", "dtkd", TIED["dtkd"], 4, PACKED, strategies=MULTI),
    Case("ctkd", "ctkd", TIED["ctkd"], 2, PACKED, strategies=MULTI),
    # Adapters and recomputed activations, against one process that recomputes nothing.
    Case("recomputed", steps=5, strategies=("single",)),
    Case("recomputed", accumulation=2, steps=5, strategies=("single", *FEW), arguments=RECOMPUTED),
    Case("lora", tie=False, lora=True, steps=5, strategies=("single",)),
    Case("lora", tie=False, lora=True, accumulation=2, steps=5, strategies=FEW),
    Case("lora", tie=False, lora=True, packing=PACKED, steps=5, strategies=FEW, arguments=RECOMPUTED),
    # Shuffled epochs: 13 rows are 8, then 5 that two processes cannot share out evenly; of 9 one has a row at the end of
    # each epoch and the other dummy rows alone. The number of steps comes from that of the epochs.
    Case("random", tie=False, rows=13, steps=6, strategies=("single",), arguments=EPOCHS | RANDOM),
    Case("random", "gap", False, 4, PACKED, 6, rows=13, strategies=FEW, arguments=EPOCHS | RANDOM),
    Case("dummy_rows", tie=False, rows=9, steps=6, strategies=("single", "ddp", "zero3", "fsdp2"), arguments=EPOCHS),
    Case("grouped", tie=False, rows=13, steps=6, strategies=("single", "ddp"), arguments=EPOCHS | GROUPED),
    # Three packs an epoch: one process takes them by two, and of two processes the second has a dummy row in the last step.
    Case("packs", "gap", False, 2, PACKS, 6, rows=13, strategies=("single",), arguments=EPOCHS | RANDOM),
    Case("packs", "gap", False, 1, PACKS, 6, rows=13, strategies=("ddp", "zero3", "fsdp2"), arguments=EPOCHS | RANDOM),
    Case("bf16", steps=3, strategies=("ddp", "zero3", "fsdp2"), arguments={"bf16": True}),
    Case("adamw", tie=False, steps=5, strategies=MULTI, arguments=ADAMW),
    Case("compiled", steps=3, strategies=("single",)),
    Case("compiled", steps=3, strategies=("ddp",), arguments=FORWARD),
    Case("compiled", steps=3, strategies=("fsdp2",), arguments=COMPILED),
    *(
        Case(policy, policy, steps=5, strategies=("single", "ddp"))
        for policy in ("sequence", "auto", "adakd", "silent", "keep", "auto_keep")
    ),
]


# What rounding alone does to each group, to one process with its steps whole.
CASES += [
    replace(case, rounded=True, strategies=("single",))
    for place, case in enumerate(CASES)
    if "single" in case.strategies and case.group not in {earlier.group for earlier in CASES[:place]}
]

#: Of test_sharded.py: name, then (tied head, how the teacher is placed, LoRA, gradient checkpointing, packed)
SHARDED_TEACHERS: dict[str, tuple[bool, str, bool, bool, bool]] = {
    "tied": (True, "replicated", False, False, False),
    "tied-sharded": (True, "sharded", False, True, False),
    "untied-sharded": (False, "sharded", False, False, True),
    "lora-sharded": (True, "sharded", True, True, False),
}
#: What is trained under which strategy.
SHARDED_TRAININGS = {
    "single": tuple(SHARDED_TEACHERS),
    "ddp": ("tied", "tied-sharded"),
    "fsdp2": ("untied-sharded", "lora-sharded"),
    "zero3": ("tied-sharded", "untied-sharded", "lora-sharded"),
}
