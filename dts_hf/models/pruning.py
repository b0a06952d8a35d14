"""A student cut out of its teacher: some of the layers, each with its own weights and of its own kind.

What kind a layer is (sliding or full attention, dense or routed, attention or Mamba) stands in the configuration, in a
list over the layers, in a list of layer numbers, as a threshold or as a period. All of it is renumbered with the layers,
and the result is compared, layer by layer, with what the teacher's configuration makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from dts_hf.distributed.sharding import unsharded_init
from dts_hf.errors import UserError

#: Keys of configurations that list layer numbers.
NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "full_attn_idxs",
    "attn_layer_indices",
    "hybrid_layer_ids",
    "cross_attention_layers",
)
#: Keys that count the leading layers of a kind.
LEADING = ("first_k_dense_replace", "num_dense_layers")
#: Keys that count the last layers of a kind.
TRAILING = ("num_kv_shared_layers",)
#: Keys that make layer i of a kind where i % period == offset.
PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
#: Lists that may by chance be as long as there are layers.
NOT_OF_LAYERS = ("architectures", "keys_to_ignore_at_inference", "time_step_limit")
#: Attributes that hold a layer's own number, or that training switches.
OWN_NUMBER = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx", "training", "gradient_checkpointing")
#: Makes a model from a configuration.
Build = Callable[..., Any]
#: One layer without its weights: per module its path, its class, the shapes of its weights and its plain attributes.
Kind = dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]]


def prune_layers(teacher: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """A copy of ``teacher`` that keeps some of its layers.

    The copy is built from a config with the new depth, so every layer knows its own index: a stale ``layer_idx`` would
    write the KV cache of one layer over another's. Of a model that wraps a language model, as
    ``Gemma3ForConditionalGeneration`` does, the language model alone is copied, into transformers' class for it
    (``Gemma3ForCausalLM``).

    Args:
        teacher: any causal language model or sequence classifier whose layers sit in a ``ModuleList`` of
            ``num_hidden_layers``.
        layers: how many (evenly spaced, first and last included), or which, in ascending order from 0.

    Raises:
        UserError: too many, none, out of range, repeated or unordered; or the configuration cannot say that they are of
            the kinds that they are, and then the nearest choice that it can say is named.
    """
    classifies, text_config = _classifies(teacher), teacher.config.get_text_config()
    wraps = text_config is not teacher.config
    build = build_of(teacher)
    config = pruned_config(teacher.config, layers, build)
    if wraps and classifies:
        for key in ("id2label", "label2id", "problem_type"):
            setattr(config, key, getattr(teacher.config, key))
    elif wraps:
        embeddings, output = teacher.get_input_embeddings(), teacher.get_output_embeddings()
        config.tie_word_embeddings = output is not None and output.weight is embeddings.weight
    student = empty_like(teacher, config, build)
    fill(
        student, _state_for(student, teacher, kept_layers(layers, _depth(text_config)), wraps), type(teacher).__name__
    )
    return student


def _classifies(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def build_of(model: PreTrainedModel) -> Build:
    """What makes a model of the kind of ``model`` from a configuration; of one that wraps a language model, that alone."""
    auto_class: Any = AutoModelForSequenceClassification if _classifies(model) else AutoModelForCausalLM
    wraps = model.config.get_text_config() is not model.config
    build: Build = auto_class.from_config if wraps else type(model)._from_config
    return build


def empty_like(model: PreTrainedModel, config: Any, build: Build) -> PreTrainedModel:
    """A new model of ``config``, with random weights, of the dtype, device and mode of ``model``.

    Args:
        model: it is taken after.
        config: of the new one.
        build: makes it.

    Raises:
        UserError: transformers will not save a model of ``config``; said here, and not behind a whole training.
    """
    if problem := unsaveable(config):
        raise UserError(f"student.init: no student can be saved so: {problem}. Ask for other layers or widths")
    with unsharded_init():
        made: PreTrainedModel = build(config, dtype=next(model.parameters()).dtype)
    if not _classifies(model):
        made.generation_config = copy.deepcopy(model.generation_config)
    made.config.name_or_path = ""
    made.train(model.training)  # a model built from its configuration would drop out
    made.to(next(model.parameters()).device)  # type: ignore[arg-type]
    return made


def unsaveable(config: Any) -> str:
    """Why transformers will not save a model of ``config``, in words; empty where it will.

    It looks at a configuration when it is made and when it is saved, and not when a value of it changes.
    """
    try:
        config.validate()
    except StrictDataclassError as error:
        return " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return ""


def fill(student: PreTrainedModel, state: dict[str, torch.Tensor], name: str) -> None:
    """Give ``student`` the weights ``state``, all of them and no others.

    Args:
        student: takes them.
        state: by name.
        name: of the model that they come from.

    Raises:
        UserError: a weight is missing, or of another shape.
    """
    shapes = {key: weight.shape for key, weight in student.state_dict().items()}
    for key in sorted(shapes.keys() | state.keys()):
        ours, theirs = shapes.get(key), state[key].shape if key in state else None
        if ours != theirs:
            raise UserError(
                f"student.init: {name} cannot be pruned: {key} is {_describe_shape(theirs)} in the "
                f"teacher and {_describe_shape(ours)} in the student. Give student.model instead"
            )
    student.load_state_dict(state, strict=True)


def _describe_shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a number"


def _state_for(
    student: PreTrainedModel, teacher: PreTrainedModel, kept: Sequence[int], wraps: bool
) -> dict[str, torch.Tensor]:
    """The teacher's weights under the student's names, the layers ``kept`` alone and under their new numbers."""
    state: dict[str, torch.Tensor] = teacher.state_dict()
    language_model: nn.Module = teacher
    prefix = ""
    if wraps:  # without the other parts, and under the names of the text-only class
        language_model = teacher.get_decoder()
        outer, prefix = (f"{_path(model, model.get_decoder())}." for model in (teacher, student))
        ends = {name: weight for name, weight in state.items() if name in student.state_dict()}
        inside = {prefix + name[len(outer) :]: weight for name, weight in state.items() if name.startswith(outer)}
        state = {**ends, **inside}
    stacks = [prefix + name for name in find_stacks(language_model, _depth(teacher.config.get_text_config()))]
    renumbered = {f"{stack}.{old}.": f"{stack}.{new}." for stack in stacks for new, old in enumerate(kept)}
    result = {}
    for name, weight in state.items():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is None:
            result[name] = weight
            continue
        layer = f"{stack}.{name[len(stack) + 1 :].split('.', 1)[0]}."
        if layer in renumbered:
            result[renumbered[layer] + name[len(layer) :]] = weight
    return result


def _path(model: nn.Module, part: nn.Module) -> str:
    return next(str(name) for name, module in model.named_modules() if module is part)


def _depth(text_config: Any) -> int:
    depth = getattr(text_config, "num_hidden_layers", None)
    if depth is None:
        raise UserError(
            f"student.init: {type(text_config).__name__} has no num_hidden_layers, so there are no layers to keep. "
            "Give student.model instead"
        )
    return int(depth)


def find_stacks(model: nn.Module, depth: int) -> list[str]:
    """Names of the lists of ``depth`` layers in ``model``, but not of lists inside a layer."""
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def evenly_spaced(count: int, total: int) -> list[int]:
    """``count`` of the indices 0 .. total - 1, as far apart as possible, first and last included."""
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def kept_layers(layers: int | Sequence[int], total: int) -> list[int]:
    """Which of ``total`` layers ``student.init.layers`` means.

    Raises:
        UserError: too many, none, out of range, repeated or unordered.
    """
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise UserError(
                f"student.init.layers: got {layers}, expected a number from 1 to {total}, the teacher's layers"
            )
        return evenly_spaced(layers, total)
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= total:
        raise UserError(
            f"student.init.layers: got {kept}, expected different indices in ascending order from 0 to {total - 1}"
        )
    return kept


# ------------------------------------------------------------------------------------------------------ configuration


def pruned_config(config: Any, layers: int | Sequence[int], build: Build = AutoModelForCausalLM.from_config) -> Any:
    """The configuration of a language model that keeps ``layers`` of the one that ``config`` describes.

    Of a configuration that wraps a language model's, the language model's alone.

    Args:
        config: of a language model, or of a model that wraps one.
        layers: how many, or which.
        build: makes a model from a configuration; it is called without memory (meta device).

    Raises:
        UserError: see ``prune_layers``.
    """
    text_config = config.get_text_config()
    total = _depth(text_config)
    kept = kept_layers(layers, total)
    try:
        before = _kinds(build, text_config)
    except ValueError as error:  # transformers has no class for the language model alone
        raise UserError(
            f"student.init: {type(config).__name__} wraps {type(text_config).__name__}, and transformers has no model class "
            "for that alone. Give student.model instead"
        ) from error
    if not before:
        raise UserError(
            f"student.init: {type(text_config).__name__} describes no stack of {total} layers to prune. "
            "Give student.model instead"
        )
    pruned, problem = _moved(build, text_config, before, kept)
    if problem:
        choice = _nearest_choice(before, kept)
        works = not _moved(build, text_config, before, choice)[1]
        advice = f"student.init.layers: {choice} can be kept" if works else "Choose others, or give student.model"
        raise UserError(f"student.init.layers: got {layers}, but {problem}. {advice}")
    return pruned


def fitting(config: Any, build: Build) -> Callable[[Sequence[int]], list[int] | None]:
    """What makes of some layers those nearest to them that the configuration can describe; None: there are none.

    Args:
        config: of a language model, or of a model that wraps one.
        build: as ``pruned_config`` takes it.
    """
    text_config = config.get_text_config()
    before = _kinds(build, text_config)

    def fit(kept: Sequence[int]) -> list[int] | None:
        for choice in (list(kept), _nearest_choice(before, kept)):
            if not _moved(build, text_config, before, choice)[1]:
                return choice
        return None

    return fit


def _moved(build: Build, config: Any, before: Sequence[Kind], kept: Sequence[int]) -> tuple[Any, str]:
    """The configuration for the layers ``kept`` alone, and in words why it will not do; empty where it will."""
    name = type(config).__name__.removesuffix("Config")
    try:
        pruned = _renumbered(config, kept)
        # As it is now, and as it will be read from the student's folder
        after = [_kinds(build, read) for read in (pruned, type(pruned).from_dict(pruned.to_dict()))]
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError, StrictDataclassError) as error:
        return None, f"{name} cannot be made of them alone: {' '.join(str(error).split()) or type(error).__name__}"
    for new, old in enumerate(kept):
        for kinds in after:
            if difference := _difference(before[old], kinds[new]):
                return pruned, (
                    f"layer {old} of {name} cannot become layer {new} of {len(kept)}: its configuration makes that one "
                    f"another kind of layer ({difference})"
                )
    attending = _attending(config)
    if attending and not set(attending) & set(kept):  # transformers asks their cache how far it has come
        return (
            pruned,
            f"no attention layer of {name} ({', '.join(map(str, attending))}) is among them to answer prompts",
        )
    return pruned, ""


def _attending(config: Any) -> list[int]:
    """The layers that attend to the tokens before them, where the configuration tells."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return [k for k, kind in enumerate(kinds) if kind == "hybrid" or ("attention" in kind and "linear" not in kind)]


def _renumbered(config: Any, kept: Sequence[int]) -> Any:
    """A copy of a text configuration for the layers ``kept`` alone."""
    pruned, total, count = copy.deepcopy(config), int(config.num_hidden_layers), len(kept)
    values = config.to_dict()
    for key, value in values.items():
        if key in NUMBERS and value is not None:
            setattr(pruned, key, [new for new, old in enumerate(kept) if old in value])
        elif key in LEADING and value is not None:
            setattr(pruned, key, sum(old < value for old in kept))
        elif key in TRAILING and value is not None:
            setattr(pruned, key, sum(old >= total - value for old in kept))
        elif isinstance(value, list) and len(value) == total and not _is_of_tokens(key):  # such as layer_types
            setattr(pruned, key, [value[old] for old in kept])
    if (step := values.get("decoder_sparse_step")) and (dense := values.get("mlp_only_layers")) is not None:
        pruned.mlp_only_layers = [new for new, old in enumerate(kept) if old in dense or (old + 1) % step]
        pruned.decoder_sparse_step = 1
    for period, offset in PERIODS:
        if values.get(period):
            wanted = [old % values[period] == values[offset] for old in kept]
            found = (
                (p, o) for p in range(1, count + 2) for o in range(p) if [i % p == o for i in range(count)] == wanted
            )
            new_period, new_offset = next(found, (values[period], values[offset]))
            setattr(pruned, period, new_period)
            setattr(pruned, offset, new_offset)
    if "attention_types" in values and "attention_layers" in values:  # GPT-Neo makes the second out of the first
        pruned.attention_types = [[pruned.attention_layers, 1]]
    pruned.num_hidden_layers = count
    return pruned


def _is_of_tokens(key: str) -> bool:
    return key in NOT_OF_LAYERS or key.endswith(("token_id", "token_ids"))


def _kinds(build: Build, config: Any) -> list[Kind]:
    """What each layer of the model of ``config`` is; empty where the model has no list of its layers."""
    with unsharded_init(), torch.device("meta"):
        model = build(copy.deepcopy(config))
    depth = int(config.num_hidden_layers)
    modules = dict(model.named_modules())
    kinds: list[Kind] = [{} for _ in range(depth)] if (stacks := find_stacks(model, depth)) else []
    for stack in stacks:
        for kind, layer in zip(kinds, modules[stack], strict=True):
            for name, module in layer.named_modules():
                weights = {key: tuple(weight.shape) for key, weight in module.named_parameters(recurse=False)}
                plain = {
                    key: value for key, value in vars(module).items()
                    if isinstance(value, (int, float, str, type(None))) and not key.startswith("_") and key not in OWN_NUMBER
                }  # fmt: skip
                kind[f"{stack}.{name}"] = (type(module).__name__, weights, plain)
    return kinds


def _difference(old: Kind, new: Kind) -> str:
    """What tells two kinds of layers apart, in words; empty where nothing does."""
    for place in dict.fromkeys([*old, *new]):
        was, made = old.get(place, ("nothing", {}, {})), new.get(place, ("nothing", {}, {}))
        where = place.rpartition(".")[2]
        if was[0] != made[0]:
            return f"{where}: {made[0]}, not {was[0]}" if where else f"{made[0]}, not {was[0]}"
        for found, wanted in zip(made[1:], was[1:], strict=True):
            for key in dict.fromkeys([*wanted, *found]):
                if found.get(key) != wanted.get(key):
                    return f"{where}.{key}: {found.get(key)}, not {wanted.get(key)}".lstrip(".")
    return ""


def _nearest_choice(kinds: Sequence[Kind], wanted: Sequence[int]) -> list[int]:
    """The layers nearest to ``wanted`` whose kinds follow each other as those of the first layers do.

    For them the configuration says the right thing with the new depth alone.
    """
    number = [kinds.index(kind) for kind in kinds]
    best: dict[int, tuple[int, list[int]]] = {-1: (0, [])}  # by the last layer: distance, and the layers so far
    for new, old in enumerate(wanted):
        best = {
            layer: min((far + abs(layer - old), [*path, layer]) for last, (far, path) in best.items() if last < layer)
            for layer, kind in enumerate(number)
            if kind == number[new] and min(best) < layer
        }
    return min(best.values())[1]
