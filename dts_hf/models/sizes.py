"""How many layers and channels ``student.init`` asks for, counted without loading a weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dts_hf.errors import UserError
from dts_hf.models.pruning import Build, evenly_spaced, kept_layers, pruned_config
from dts_hf.models.width import check_width, find_mlps, narrower_config, parameters_of

if TYPE_CHECKING:
    from dts_hf.recipe.schema import Init

#: The narrowest MLP that a search looks at, as a share of the teacher's; steps of widths; and depths that it tries.
NARROWEST, STEP, DEPTHS = 0.25, 8, 5


class Sizes(NamedTuple):
    """What a student keeps.

    Attributes:
        layers: how many, or which.
        mlp: channels of each MLP; None: all.
        hidden: channels of the states; None: all.
        options: of a search for both: (layers, channels of each MLP) that have the wanted number of weights; else empty.
    """

    layers: int | list[int]
    mlp: int | None = None
    hidden: int | None = None
    options: tuple[tuple[int, int], ...] = ()


def sized_config(config: Any, sizes: Sizes, build: Build) -> Any:
    """The configuration of a student of these sizes.

    Args:
        config: of a language model, or of a model that wraps one.
        sizes: what it keeps.
        build: makes a model from a configuration.

    Raises:
        UserError: see ``pruned_config`` and ``narrower_config``.
    """
    return narrower_config(pruned_config(config, sizes.layers, build), sizes.mlp, sizes.hidden)


def plan_sizes(init: Init, config: Any, build: Build) -> Sizes:
    """The sizes that ``init`` asks for, of a model with ``config``; nothing is loaded.

    Args:
        init: the section of the recipe.
        config: of a language model, or of a model that wraps one.
        build: makes a model from a configuration.

    Raises:
        UserError: a number is larger than what there is, or one that the family does not take; or no student is so small.
    """
    text = config.get_text_config()
    total = int(getattr(text, "num_hidden_layers", None) or 0)
    layers: int | list[int] | None = init.layers
    if layers is not None:
        kept_layers(layers, total)
    if init.hidden is not None:
        check_width("hidden", init.hidden, int(text.hidden_size))
        narrower_config(text, None, init.hidden)
    if init.mlp is not None:
        check_width("mlp", init.mlp, next(iter(find_mlps(build, text).values())).width)
    if init.parameters is None:
        return Sizes(total if layers is None else layers, init.mlp, init.hidden)

    def weights(pruned: Any, mlp: int | None) -> int:
        return parameters_of(build, narrower_config(pruned, mlp, init.hidden))

    @cache
    def of(depth: int) -> Any:  # several probes share a depth, and each costs models without weights
        return pruned_config(config, depth, build)

    both = layers is None and init.mlp is None and init.choose == "search"
    if layers is None and not both:
        return Sizes(
            _deepest(total, init.parameters, lambda depth: weights(of(depth), init.mlp)), init.mlp, init.hidden
        )
    width = next(iter(find_mlps(build, text).values())).width
    if layers is not None:
        listed = pruned_config(config, layers, build)
        return Sizes(layers, _widest(width, init.parameters, partial(weights, listed)), init.hidden)
    narrow = max(STEP, int(width * NARROWEST) // STEP * STEP)
    deepest = _deepest(total, init.parameters, lambda depth: weights(of(depth), narrow))
    if weights(of(1), width) > init.parameters:
        shallowest = 1
    else:
        shallowest = _deepest(total, init.parameters, lambda depth: weights(of(depth), width))
    depths = sorted(
        {shallowest + k for k in evenly_spaced(min(DEPTHS, deepest - shallowest + 1), deepest - shallowest + 1)}
    )
    options = [(depth, _widest(width, init.parameters, partial(weights, of(depth)))) for depth in depths]
    return Sizes(depths[0], None, init.hidden, tuple(options))


def _deepest(total: int, limit: int, weights: Callable[[int], int]) -> int:
    """The largest number of layers, up to ``total``, with at most ``limit`` weights."""
    count = cache(weights)
    if count(1) > limit:
        raise UserError(
            f"student.init.parameters: got {limit:,}, but a student of one layer has {count(1):,} already. Give more, or a "
            "smaller mlp or hidden"
        )
    low, high = 1, total
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) <= limit else (low, middle - 1)
    return low


def _widest(width: int, limit: int, weights: Callable[[int], int]) -> int:
    """The largest MLP, up to ``width``, with at most ``limit`` weights; a multiple of ``STEP`` where it is smaller."""
    step = min(STEP, width)
    most, least = weights(width), weights(step)
    if most <= limit:
        return width
    if least > limit:
        raise UserError(
            f"student.init.parameters: got {limit:,}, but with MLPs of {step} channels there are {least:,} weights already. "
            "Give more, or fewer layers"
        )
    each = (most - least) / (width - step)  # exactly so many weights a channel
    return max(step, int(step + (limit - least) / each) // step * step)
