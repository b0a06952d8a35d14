"""Which layers of a model a student keeps: evenly spaced, by block influence, without one block, or searched for.

Every choice is a function of model, rows and number of layers alone: nothing is drawn, and no clock is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dts_hf.errors import UserError
from dts_hf.models.calibration import LayerSwitch
from dts_hf.models.pruning import evenly_spaced

#: How many layers each step of the search tries to leave out: those that cost least when they were last tried.
TRIED = 8
#: Of contiguous blocks, ``search`` tries so many, evenly spaced.
BLOCKS = 8
#: Told of each pass, for the screen.
Advance = Callable[[], None]
#: What a choice of layers becomes if the configuration cannot say it; None: there is nothing near it either.
Fit = Callable[[Sequence[int]], "list[int] | None"]


@dataclass
class Choice:
    """What was chosen, and what it was chosen from.

    Attributes:
        layers: kept, in ascending order.
        nll: mean nats per label with them, on the calibration rows; of all layers: ``whole``.
        candidates: other choices and this one, by name: layers and NLL.
        path: of a search, the layers by their number, from all of them down.
        influence: by layer, see ``LayerSwitch.influence``.
    """

    layers: list[int]
    nll: float
    whole: float
    candidates: dict[str, tuple[list[int], float]] = field(default_factory=dict)
    path: dict[int, list[int]] = field(default_factory=dict)
    influence: Mapping[int, float] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layers": self.layers,
            "nll": self.nll,
            "nll_of_all_layers": self.whole,
            "candidates": {name: {"layers": kept, "nll": nll} for name, (kept, nll) in self.candidates.items()},
            "block_influence": {str(layer): value for layer, value in self.influence.items()},
        }


def passes(choose: str, total: int, count: int) -> int:
    """About how many passes ``choose_layers`` makes, for the screen."""
    blocks = max(total - count, 1)
    steps = {"even": 2, "block_influence": 3, "middle_block": 2 + count}
    return steps.get(choose, 5 + min(BLOCKS, count) + total + blocks * (TRIED + 1))


def choose_layers(switch: LayerSwitch, choose: str, count: int, fit: Fit, advance: Advance = lambda: None) -> Choice:
    """Choose ``count`` layers.

    Args:
        switch: makes the passes.
        choose: ``even``, ``block_influence``, ``middle_block`` or ``search``.
        count: how many are kept.
        fit: makes of a choice one that the configuration can say.
        advance: told of each pass.

    Raises:
        UserError: none of the choices can be said.
    """
    total = switch.depth
    whole = switch.base(range(total))
    advance()
    influence = dict(switch.influence)
    if count == total:
        every = list(range(total))
        return Choice(every, whole, whole, {"all": (every, whole)}, {total: every}, influence)
    wanted: dict[str, list[int]] = {"even": evenly_spaced(count, total)}
    if choose in ("block_influence", "search"):
        wanted["block_influence"] = by_influence(influence, count)
    if choose == "middle_block":
        wanted["middle_block"] = best_block(switch, count, range(1, count + 1), advance)
    path: dict[int, list[int]] = {}
    if choose == "search":
        few = [1 + place for place in evenly_spaced(min(BLOCKS, count), count)]
        wanted["middle_block"] = best_block(switch, count, few, advance)
        path = greedy_path(switch, count, whole, advance)
        wanted["search"] = path[count]
        switch.base(range(total))
        advance()
    found: dict[str, tuple[list[int], float]] = {}
    for name, kept in wanted.items():
        fitting = fit(kept)
        if fitting is not None:
            found[name] = (fitting, switch.score(fitting))
        advance()
    names = [choose] if choose != "search" else list(found)
    best = min((name for name in names if name in found), key=lambda name: (found[name][1], name), default=None)
    if best is None:
        raise UserError(
            f"student.init: {count} of {total} layers, chosen by {choose}: the configuration of {switch.name} cannot "
            "describe them, nor layers near them. Give a list of student.init.layers, or choose: even"
        )
    return Choice(*found[best], whole, found, path, influence)


def by_influence(influence: Mapping[int, float], count: int) -> list[int]:
    """The ``count`` layers that change their states most (ShortGPT, arXiv 2403.03853)."""
    return sorted(sorted(influence, key=lambda layer: (-influence[layer], layer))[:count])


def best_block(switch: LayerSwitch, count: int, starts: Sequence[int], advance: Advance) -> list[int]:
    """All layers but the one contiguous block whose absence costs least; the base is all layers.

    Args:
        switch: makes the passes.
        count: how many layers are kept.
        starts: first layers of blocks that are tried.
        advance: told of each pass.
    """
    total = switch.depth
    found: list[tuple[float, list[int]]] = []
    for start in starts:
        kept = [layer for layer in range(total) if not start <= layer < start + total - count]
        found.append((switch.score(kept), kept))
        advance()
    return min(found)[1]


def greedy_path(switch: LayerSwitch, count: int, whole: float, advance: Advance) -> dict[int, list[int]]:
    """Leave out one layer after the other, each time the one whose absence costs least; the base is all layers.

    After the first step only ``TRIED`` layers are tried: those that cost least when they were last tried. A layer costs
    more without its neighbours, so others come to the front by and by.

    Args:
        switch: makes the passes.
        count: how many layers are left in the end.
        whole: NLL of all layers.
        advance: told of each pass.

    Returns:
        the layers that are left, by their number.
    """
    kept = list(range(switch.depth))
    path = {len(kept): kept}
    cost = dict.fromkeys(kept, 0.0)
    tried, before = len(kept), whole
    while len(kept) > count:
        if len(kept) < switch.depth:
            before = switch.base(kept)
            advance()
        scores = {}
        for layer in sorted(kept, key=lambda layer: (cost[layer], layer))[:tried]:
            scores[layer] = switch.score([other for other in kept if other != layer])
            cost[layer] = scores[layer] - before
            advance()
        gone = min(scores, key=lambda layer: (scores[layer], layer))
        kept = [layer for layer in kept if layer != gone]
        path[len(kept)] = kept
        tried = TRIED
    return path
