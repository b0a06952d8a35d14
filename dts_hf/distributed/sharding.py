"""Weights that are sharded over processes: how a teacher is sharded, and how full weights are gathered.

A student is sharded by what trains it (DeepSpeed's ZeRO-3, FSDP2). A teacher only ever runs forward, so one way does
for every strategy: ``torch.distributed.fsdp.fully_shard`` (FSDP2).

Every function here that talks to other processes is called by all of them, in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dts_hf.distributed.processes import process
from dts_hf.errors import UserError, nearest

PLACEMENTS = ("replicated", "sharded")


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are sharded over processes (ZeRO-3, FSDP2; over one, too), so that a forward needs all of them."""
    # The cheap question first: a teacher is asked for every batch
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    return grouped and any(_is_shard(parameter) for parameter in model.parameters())


def parameter_count(model: nn.Module) -> int:
    """Number of weights, also of those that ZeRO-3 has put elsewhere (their own size is 0 then)."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters())


def _is_shard(tensor: Tensor) -> bool:
    # The mark of a parameter of ZeRO-3, and that of a DTensor (FSDP2)
    return hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh")


@contextlib.contextmanager
def unsharded_init() -> Iterator[None]:
    """Within it ``from_pretrained`` and ``from_config`` make ordinary models, as they do without DeepSpeed.

    While ``TrainingArguments`` with ZeRO-3 exist, transformers shards every model as it is made, before anything could
    be pruned, checked or compared. Weights of a safetensors file in its own dtype stay in the file (mapped), so full
    models cost the processes of a machine no memory; the trainer shards the student, ``shard_teacher`` the teacher.
    """
    from transformers.integrations import deepspeed

    # A weak reference: TrainingArguments own the object
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def shard_teacher(model: nn.Module, device: torch.device | str) -> None:
    """Shard the frozen weights of ``model`` over all processes, in place; its forward gathers a layer at a time.

    Layer by layer, so that no process ever has more on its device than its shard and one layer. Does nothing to a model
    that is sharded already.

    Args:
        model: a causal language model or classifier of transformers with its full weights, the same on every process.
        device: of this process.

    Raises:
        UserError: there is one process only, the weights are quantised, or the model has no stack of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
        return
    check_can_shard(getattr(model, "is_quantized", False))
    mesh = init_device_mesh(torch.device(device).type, (process()[1],))
    layers = stacked_layers(model)
    if not layers:
        raise UserError(
            f"teacher.placement: {type(model).__name__} has no stack of layers to shard layer by layer; "
            "use 'replicated'"
        )
    model.requires_grad_(False)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    embeddings = [module for module in embeddings if module is not None]
    if len({id(module.weight) for module in embeddings}) < len(embeddings):
        embeddings = []  # tied: one weight cannot be in two groups of FSDP2, so it goes into the model's
    # From the inside out: a group takes what the modules within it have left.
    for module in [*layers, *embeddings, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def place_teacher(model: nn.Module, placement: str, device: torch.device | str) -> None:
    """Put ``model`` where the recipe's ``teacher.placement`` wants it: full on ``device``, or sharded over all processes.

    Raises:
        UserError: see ``shard_teacher``.
    """
    if placement == "sharded":
        shard_teacher(model, device)
    # bitsandbytes has put it on its device, and refuses to move it
    elif not getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) == "torchao":
        model.to(device)


def check_placement(placement: str) -> None:
    """Refuse a word for where the teacher stands that nobody would act on.

    Raises:
        UserError: it is neither ``replicated`` nor ``sharded``.
    """
    if placement not in PLACEMENTS:
        raise UserError(
            f"teacher_placement: got {placement!r}, expected one of {', '.join(PLACEMENTS)}."
            f"{nearest(str(placement), PLACEMENTS)}"
        )


def check_can_shard(quantized: bool) -> None:
    """Refuse, before anything is loaded, what ``shard_teacher`` would refuse.

    Raises:
        UserError: see ``shard_teacher``.
    """
    world = process()[1]
    if world == 1:
        raise UserError(
            "teacher.placement: sharded, but there is one process only, so nothing to shard the teacher over; "
            "use 'replicated', or launch several: accelerate launch --num_processes N -m dts_hf train RECIPE.yaml"
        )
    if quantized:
        raise UserError(
            "teacher.placement: sharded, but the teacher is quantised, and neither DeepSpeed nor FSDP can shard the "
            "packed weights; use placement 'replicated' (a 4-bit teacher is a quarter of a bf16 one, an fp8 or int8 one a "
            "half), or quantization 'none'"
        )


def stacked_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformers model, one above the other; none where it keeps them in no list of that length."""
    depth = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[operator, union-attr]
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return [layer for stack in stacks for layer in stack]


@contextlib.contextmanager
def gathered_tensor(tensor: Any) -> Iterator[Any]:
    """Within it the full ``tensor`` of a shard (ZeRO-3, FSDP2); an ordinary tensor, or None, as it is."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The full weights of a sharded ``model``, on the CPU of the first process; None on the others.

    One weight at a time, so that no device ever holds the full model. Weights that are the same in the model (tied
    embeddings) are the same tensor here.
    """
    rank = process()[0]
    weights: dict[str, Tensor] = {}
    first_names: dict[int, str] = {}  # by weight, on every process: all gather the same ones
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = first_names.setdefault(id(tensor), name)
        if first == name:
            with gathered_tensor(tensor) as full:
                if rank == 0:  # a copy also on a CPU: what was gathered is freed or used again
                    weights[name] = full.detach().to("cpu", copy=True)
        elif rank == 0:
            weights[name] = weights[first]
    return weights if rank == 0 else None
