"""The maps of dual-space distillation in training: they are no part of the student, and are trained beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from dts_hf.distributed.launch import strategy_of
from dts_hf.errors import UserError
from dts_hf.loss.dual_space import Projectors
from dts_hf.models.head import Head, gather_head

#: Their file in a checkpoint.
PROJECTORS_FILE = "projectors.safetensors"
_KEY = "teacher.alignment: dual_space"


class Projection(TrainerCallback):
    """Puts ``Projectors`` into the optimizer, averages their gradients over processes, and clears them for each step.

    They have the student's learning rate and schedule, no weight decay (it would pull the maps away from where they belong),
    and no part in ``max_grad_norm``, which is about the student.

    Args:
        student: its head, whole.
        teacher: its head, whole or in shares.
        common: the ids that mean the same, of the student and of the teacher, ``[C]`` each.
        device: of the maps.
    """

    def __init__(self, student: Head, teacher: Head, common: tuple[Tensor, Tensor], device: torch.device) -> None:
        dtype = torch.promote_types(torch.float32, student.weight.dtype)
        self.common = common
        self.projectors = Projectors(student.weight.shape[1], teacher.weight.shape[1], device, dtype)
        self.start(student, teacher)

    def start(self, student: Head, teacher: Head) -> None:
        """Begin from these heads; the first process's maps are those of all."""
        with gather_head(teacher) as whole:
            assert whole is not None
            self.projectors.start_from_heads(student, whole, *self.common)
        if torch.distributed.is_initialized():
            for weight in self.weights:
                torch.distributed.broadcast(weight.data, 0)

    @property
    def weights(self) -> list[nn.Parameter]:
        """W and W'."""
        return list(self.projectors.parameters())

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Give ``optimizer`` a group of its own for them, once."""
        known = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if id(self.weights[0]) not in known:
            optimizer.add_param_group({"params": self.weights, "weight_decay": 0.0})

    def reduce(self) -> None:
        """The mean of the gradients over all processes, which all call it after the last micro-batch of a step.

        DDP does it for the student alone; a process without an aligned row has no gradient, and takes part with zeros.
        """
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            torch.distributed.all_reduce(weight.grad)
            weight.grad /= torch.distributed.get_world_size()

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self.projectors.zero_grad()  # the Trainer clears those of its model

    def state(self) -> dict[str, Tensor]:
        """For ``PROJECTORS_FILE``."""
        return {name: weight.detach().cpu().contiguous() for name, weight in self.projectors.named_parameters()}

    def load(self, path: Path) -> None:
        """Take the weights of ``PROJECTORS_FILE`` at ``path``.

        Raises:
            UserError: the run of that checkpoint had none.
        """
        if not path.is_file():
            raise UserError(f"{path}: missing; the checkpoint was written by a run without {_KEY}")
        self.projectors.load_state_dict(load_file(str(path)))


def check_projectable(accelerator: Any, optimizer: Any) -> None:
    """Refuse what would not train the maps.

    Args:
        accelerator: of the trainer.
        optimizer: that the user has given; None: the trainer makes it.

    Raises:
        UserError: weights are sharded over processes, or the optimizer is the user's.
    """
    strategy = strategy_of(accelerator)
    if strategy not in ("single", "ddp") or accelerator.distributed_type.value == "DEEPSPEED":
        raise UserError(
            f"{_KEY} does not go with {strategy}, whose optimizer knows the student's weights alone; expected one process "
            "or DDP, or teacher.alignment: overlap"
        )
    if optimizer is not None:
        raise UserError(
            f"optimizers: got one beside {_KEY}, whose maps it does not know; expected args.optim to name the optimizer"
        )
