"""A narrower student: fewer channels inside its MLPs, or fewer channels of its states (Minitron, arXiv 2407.14679).

Which weights have such a channel is not looked up in a list of families: two models are built without memory, of the
configuration as it is and of the narrower one, and what differs between them in shape is what must be cut. What is
wider or narrower in a way that no linear layer explains (routed experts, state space models) is refused by name.
Shapes: ``I`` width of an MLP, ``H`` hidden.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dts_hf.distributed.sharding import unsharded_init
from dts_hf.errors import UserError
from dts_hf.models.calibration import Calibration
from dts_hf.models.pruning import Build, build_of, empty_like, fill, find_stacks, unsaveable

#: Keys of configurations that are the width of an MLP; a family has one of them.
MLP_KEYS = ("ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size")
#: Families whose hidden width is cut: their norms are RMSNorms with a plain weight, and ``head_dim`` is a key of its own.
HIDDEN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
T = TypeVar("T")


class Mlp(NamedTuple):
    """The MLP of one layer.

    Attributes:
        down: name, inside the layer, of the module that reads the I channels.
        up: names of the modules that make them, gates included, and how many times I each makes (2: gate and up in one).
        width: I.
    """

    down: str
    up: dict[str, int]
    width: int


# ------------------------------------------------------------------------------------------------------ configuration


def narrower_config(config: Any, mlp: int | None, hidden: int | None) -> Any:
    """A copy of a text configuration with MLPs of ``mlp`` channels and states of ``hidden``; None: as they are.

    Raises:
        UserError: the family has no such key, or its hidden width is not cut, or not to this one.
    """
    config, name = copy.deepcopy(config), type(config).__name__.removesuffix("Config")
    if mlp is not None:
        key = next((key for key in MLP_KEYS if hasattr(config, key)), None)
        if key is None or isinstance(getattr(config, key), (list, tuple)):
            raise UserError(
                f"student.init.mlp: the configuration of {name} has no width of its MLPs to change. Leave it out, or give "
                "student.model"
            )
        setattr(config, key, mlp)
        if hasattr(config, "block_auto_adjust_ff_dim"):  # LFM2 would make another width of it
            config.block_auto_adjust_ff_dim = False
    if hidden is not None:
        if config.model_type not in HIDDEN_FAMILIES:
            raise UserError(
                f"student.init.hidden: the hidden width of {name} cannot be changed, only that of "
                f"{', '.join(HIDDEN_FAMILIES)}. Leave it out (mlp and layers make a student smaller, too)"
            )
        if not getattr(config, "head_dim", None):  # else the heads would become narrower with the states
            config.head_dim = config.hidden_size // config.num_attention_heads
        before, config.hidden_size = config.hidden_size, hidden
        if problem := unsaveable(config):  # LLaMA's is a multiple of its heads, although these do not share it out
            heads = config.num_attention_heads
            nearest = [size for size in (hidden // heads * heads, -(-hidden // heads) * heads) if 0 < size <= before]
            advice = f"The nearest that may do: {' or '.join(f'{size:,}' for size in dict.fromkeys(nearest))}"
            raise UserError(f"student.init.hidden: got {hidden:,}, which {name} does not take: {problem}. {advice}")
    return config


def _shapes(build: Build, config: Any) -> tuple[Any, dict[str, torch.Size]]:
    with unsharded_init(), torch.device("meta"):
        model = build(copy.deepcopy(config))
    return model, {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}


def parameters_of(build: Build, config: Any) -> int:
    """Weights of the model of ``config``, each once; nothing is loaded."""
    return sum(weight.numel() for weight in _shapes(build, config)[0].parameters())


def find_mlps(build: Build, config: Any) -> dict[int, Mlp]:
    """The MLP of every layer, by its number: what changes its shape with the width of the MLPs.

    Args:
        build: makes the model from its configuration.
        config: of a language model alone.

    Raises:
        UserError: something else than linear layers does, or a layer has no such MLP, or several.
    """
    name = type(config).__name__.removesuffix("Config")
    refused = f"student.init.mlp: the MLPs of {name} cannot be cut: "
    probe = 8  # any width but the real one
    try:
        model, before = _shapes(build, config)
        after = _shapes(build, narrower_config(config, probe, None))[1]
    except UserError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{refused}{' '.join(str(error).split())}. Leave mlp out") from error
    depth = int(config.num_hidden_layers)
    stacks = find_stacks(model, depth)
    downs: dict[int, list[str]] = {layer: [] for layer in range(depth)}
    ups: dict[int, dict[str, int]] = {layer: {} for layer in range(depth)}
    widths = set()
    for key, shape in before.items():
        if shape == after.get(key):
            continue
        owner_name, _, kind = key.rpartition(".")
        stack = next((stack for stack in stacks if key.startswith(f"{stack}.")), None)
        dims = (
            [] if key not in after else [k for k, (a, b) in enumerate(zip(shape, after[key], strict=True)) if a != b]
        )
        reads = _reading_dim(model.get_submodule(owner_name))
        if stack is None or reads is None or len(dims) != 1 or kind not in ("weight", "bias"):
            raise UserError(f"{refused}{key} has their width, too, and is no linear layer. Leave mlp out")
        number, _, inside = owner_name[len(stack) + 1 :].partition(".")
        if kind == "weight" and dims[0] == reads:
            downs[int(number)].append(inside)
            widths.add(shape[dims[0]])
        else:
            ups[int(number)][inside] = after[key][dims[0]] // probe
    lacking = [layer for layer in range(depth) if len(downs[layer]) != 1 or not ups[layer]]
    if lacking or len(widths) != 1:
        what = f"layer {lacking[0]} has {len(downs[lacking[0]]) or 'none'}" if lacking else "they differ in width"
        raise UserError(f"{refused}{what}, expected one in every layer, of one width. Leave mlp out")
    width = widths.pop()
    return {layer: Mlp(downs[layer][0], ups[layer], width) for layer in range(depth)}


def _reading_dim(module: nn.Module) -> int | None:
    """Which dimension of the weight of a linear layer its inputs are on; None: it is no linear layer."""
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None


# ---------------------------------------------------------------------------------------------------------- importance


def importance(
    model: nn.Module, calibration: Calibration, modules: Mapping[T, nn.Module], inputs: bool
) -> dict[T, Tensor]:
    """How much each channel says: mean over the real tokens of abs, squared, summed over rows, root (Minitron, 2.2).

    Args:
        model: runs once over the rows.
        calibration: the rows.
        modules: those whose channels are weighed up, by any names.
        inputs: the channels that go in, else those that come out.

    Returns:
        by the same names, ``[channels]`` in fp32.
    """
    sums: dict[T, Tensor] = {}
    mask: list[Tensor] = []

    def watch(name: T) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            real = mask[0].float()
            values = (args[0] if inputs else output).detach().float().abs().reshape(*real.shape, -1)
            means = (values * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
            sums[name] = sums.get(name, 0) + means.square().sum(0)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        calibration.run(model, mask)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value.sqrt() for name, value in sums.items()}


@contextmanager
def masked(modules: Mapping[int, nn.Module], kept: Mapping[int, Tensor]) -> Iterator[None]:
    """Within it ``modules`` read zeros where a channel is not ``kept``, as if it had been cut."""

    def without(channels: Tensor) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            mask = torch.zeros(args[0].shape[-1], dtype=args[0].dtype, device=args[0].device)
            mask[channels.to(mask.device)] = 1
            return (args[0] * mask, *args[1:])

        return hook

    handles = [module.register_forward_pre_hook(without(kept[layer])) for layer, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def largest(values: Tensor, count: int) -> Tensor:
    """Places of the ``count`` largest ``values [channels]``, in ascending order; of equal ones the first."""
    return torch.sort(torch.sort(values.cpu(), descending=True, stable=True).indices[:count]).values


# ------------------------------------------------------------------------------------------------------------- cutting


def check_width(key: str, asked: int, width: int) -> None:
    """Refuse a width above the one that there is.

    Raises:
        UserError: names ``key``.
    """
    if not 1 <= asked <= width:
        raise UserError(
            f"student.init.{key}: got {asked:,}, expected a number from 1 to {width:,}, the teacher's width"
        )


def cut_mlps(model: PreTrainedModel, channels: Sequence[Tensor]) -> PreTrainedModel:
    """A copy of ``model`` whose MLPs have some of their channels alone.

    Args:
        model: a causal language model, full.
        channels: by layer the channels that are kept, in ascending order; equally many in each.

    Raises:
        UserError: see ``find_mlps``.
    """
    build, config = build_of(model), model.config.get_text_config()
    mlps = find_mlps(build, config)
    stack = find_stacks(model, int(config.num_hidden_layers))[0]
    state = dict(model.state_dict())
    for layer, kept in enumerate(channels):
        mlp = mlps[layer]
        for inside, times in {mlp.down: 1, **mlp.up}.items():
            name = f"{stack}.{layer}.{inside}"
            index = torch.cat([kept + k * mlp.width for k in range(times)])
            reads = int(_reading_dim(model.get_submodule(name)) or 0)
            dims = {"weight": reads} if inside == mlp.down else {"weight": 1 - reads, "bias": 0}
            for kind, dim in dims.items():
                if (weight := state.get(f"{name}.{kind}")) is not None:
                    state[f"{name}.{kind}"] = weight.index_select(dim, index.to(weight.device))
    narrow = empty_like(model, narrower_config(config, len(channels[0]), None), build)
    fill(narrow, state, type(model).__name__)
    return narrow


def norms_of(layers: Sequence[nn.Module], hidden: int) -> dict[str, nn.Module]:
    """The norms over states of ``hidden`` channels inside ``layers``: before attention, before the MLP."""
    return {
        f"{number}.{name}": module
        for number, layer in enumerate(layers)
        for name, module in layer.named_children()
        if getattr(getattr(module, "weight", None), "shape", None) == (hidden,)
    }


def cut_hidden(model: PreTrainedModel, kept: Tensor) -> PreTrainedModel:
    """A copy of ``model`` whose states have the channels ``kept`` alone, in every layer.

    An RMSNorm divides by a mean over all channels, which is larger over fewer of them where those that go are small:
    its weights grow by sqrt(H / kept), so that what is left keeps its size.

    Args:
        model: a causal language model of ``HIDDEN_FAMILIES``, full.
        kept: in ascending order.

    Raises:
        UserError: it is of another family.
    """
    build, config = build_of(model), model.config.get_text_config()
    narrow_config = narrower_config(config, None, len(kept))
    before, after = _shapes(build, config)[1], _shapes(build, narrow_config)[1]
    factor = math.sqrt(config.hidden_size / len(kept))
    state = dict(model.state_dict())
    for name, shape in before.items():
        weight = state[name]
        for dim, (old, new) in enumerate(zip(shape, after[name], strict=True)):
            if old != new:
                weight = weight.index_select(dim, kept.to(weight.device))
        if shape != after[name] and len(shape) == 1 and "norm" in name:
            weight = weight * factor
        state[name] = weight
    narrow = empty_like(model, narrow_config, build)
    fill(narrow, state, type(model).__name__)
    return narrow
