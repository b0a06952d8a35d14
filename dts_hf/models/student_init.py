"""``student.init``: what it comes to for a model and rows, recorded, and the student that is made of the record.

Whatever is measured is measured once, by the first process. All processes make their student of what it recorded, and so
does a run that is resumed: it never measures again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dts_hf.console import duration, say, working
from dts_hf.data.encoding import EncodedDataset
from dts_hf.distributed.processes import on_first_process, process
from dts_hf.errors import UserError
from dts_hf.models.calibration import Calibration, LayerSwitch
from dts_hf.models.layer_choice import Choice, choose_layers, passes
from dts_hf.models.pruning import build_of, empty_like, fitting, prune_layers
from dts_hf.models.sizes import plan_sizes, sized_config
from dts_hf.models.width import Mlp, cut_hidden, cut_mlps, find_mlps, importance, largest, masked, norms_of

if TYPE_CHECKING:
    from dts_hf.recipe.schema import Init

LOW = (torch.bfloat16, torch.float16)
FORMAT = 1


class StudentInit:
    """What becomes of ``student.init`` in one run.

    Args:
        init: the section; None: the student is loaded.
        data: the rows that will be trained on.
        device: where passes over them are made.
        recorded: ``student_init.json`` of an earlier attempt at the run, which is followed; empty: there is none.

    Attributes:
        values: for ``student_init.json``; empty where no row decides anything.
    """

    def __init__(
        self,
        init: Init | None,
        data: EncodedDataset | None,
        device: torch.device | str = "cpu",
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self.init, self.data, self.device = init, data, torch.device(device)
        self.values: dict[str, Any] = dict(recorded or {})

    def student(self, source: PreTrainedModel, seed: int) -> PreTrainedModel:
        """The student, in the dtype of ``source``. All processes call it.

        Args:
            source: the model that it is cut out of, or takes its shape from; full, and not changed.
            seed: of random weights.

        Raises:
            UserError: it cannot be made so; or the rows have changed since the choice was recorded.
        """
        init = self.init
        assert init is not None  # the caller has looked
        if init.from_ == "config":
            return random_student(init, source, seed)
        if not init.measures:
            return prune_layers(source, plan_sizes(init, source.config, build_of(source)).layers)
        calibration = self._calibration()
        if self.values:
            self._check_rows(calibration)
        else:
            self.values = on_first_process(lambda: choose(init, source, calibration), *process())
            if self.data is not None and self.data.digest is None:  # the template writes the date
                self.values["calibration"]["digest"] = None
        return made_of(self.values, source)

    def _calibration(self) -> Calibration:
        if self.data is None:
            raise UserError("student.init: there are no rows on which layers or channels could be weighed up")
        assert self.init is not None
        return Calibration.of(self.data, self.init.calibration_rows, self.device)

    def _check_rows(self, calibration: Calibration) -> None:
        """Refuse a record that was made on other rows.

        Raises:
            UserError: names both.
        """
        was = self.values.get("calibration", {}).get("digest")
        if was is not None and self.data is not None and self.data.digest is not None and was != calibration.digest:
            raise UserError(
                f"student_init.json: the student was chosen on other rows of data.train (their checksum was {was}, now "
                f"{calibration.digest}). Put the rows back as they were, or start again with --overwrite"
            )

    def summary(self) -> str:
        """What was chosen, in one line; empty where no row decided anything."""
        return summary(self.values) if self.values else ""


def summary(values: Mapping[str, Any]) -> str:
    """One line about a record."""
    parts = [f"layers {ranges(values['layers'])} of {values['layers_of_source']}"]
    if values.get("mlp"):
        parts.append(f"{values['mlp']['kept']:,} of {values['mlp']['of']:,} channels of each MLP")
    if values.get("hidden"):
        parts.append(f"{values['hidden']['kept']:,} of {values['hidden']['of']:,} channels of the states")
    found = f"{', '.join(parts)} ({values['choose']})"
    if values.get("nll") is not None:
        others = {name: one["nll"] for name, one in values["candidates"].items() if name != values["choose"]}
        told = "".join(f", {name} {nll:.2f}" for name, nll in others.items() if name != "all")
        found += (
            f": {values['nll']:.2f} nats per label before training{told}; all layers {values['nll_of_all_layers']:.2f}"
        )
    return found


def ranges(numbers: Sequence[int]) -> str:
    """``0-9, 12, 20-29``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# ------------------------------------------------------------------------------------------------------------ choosing


class _Cut(NamedTuple):
    """A choice with its width.

    Attributes:
        nll: mean nats per label.
        layers: kept.
        mlp: by layer of the source, the channels that its MLP keeps; empty: all.
    """

    nll: float
    layers: list[int]
    mlp: dict[int, Tensor]


def choose(init: Init, source: PreTrainedModel, calibration: Calibration) -> dict[str, Any]:
    """Decide by passes over the rows what is kept; the values are JSON's.

    Args:
        init: what is asked for.
        source: the model, full; it comes back as it was.
        calibration: the rows.

    Raises:
        UserError: a number is too large, the family cannot be cut so, or no layers can be kept so.
    """
    # The other processes, and a resumed run, build no models to look at: nothing may hang on what these have drawn
    with torch.random.fork_rng(devices=[]):
        return _choose(init, source, calibration)


def _choose(init: Init, source: PreTrainedModel, calibration: Calibration) -> dict[str, Any]:
    build, config = build_of(source), source.config.get_text_config()
    sizes, total = plan_sizes(init, source.config, build), int(config.num_hidden_layers)
    mlps = find_mlps(build, config) if sizes.mlp is not None or sizes.options else {}
    count = sizes.layers if isinstance(sizes.layers, int) else len(sizes.layers)
    title = f"choosing the student's layers and channels on {len(calibration.row_ids)} training rows"
    most = passes(init.choose, total, count) + 2 * len(sizes.options)
    say(f"{title}: {init.choose}, about {most} short passes, once")
    with working(title, most) as work, _ready(source, calibration.device):
        switch = LayerSwitch(source, calibration)
        if isinstance(sizes.layers, list):
            whole = switch.base(range(total))
            choice = Choice(sizes.layers, switch.score(sizes.layers), whole, influence=switch.influence)
        else:
            choice = choose_layers(switch, init.choose, count, fitting(source.config, build), work.advance)
        cuts = [_cut(switch, choice.layers, mlps, sizes.mlp)] if not sizes.options else []
        for depth, width in sizes.options:
            layers = choice.layers if depth == count else choice.path[depth]
            cuts.append(_cut(switch, layers, mlps, width))
            work.advance(2)
        cut = min(cuts, key=lambda cut: (cut.nll, len(cut.layers)))
        values = {
            "format": FORMAT, "choose": init.choose, **choice.facts(), "layers": cut.layers, "layers_of_source": total,
            "nll": cut.nll if cut.mlp else choice.nll, "calibration": calibration.facts(),
        }  # fmt: skip
        if cut.mlp:
            of, channels = mlps[0].width, [cut.mlp[layer] for layer in cut.layers]
            values["mlp"] = {"kept": len(channels[0]), "of": of, "channels": [as_hex(one, of) for one in channels]}
        if sizes.options:
            values["options"] = [
                {"layers": cut.layers, "mlp": len(cut.mlp[cut.layers[0]]), "nll": cut.nll} for cut in cuts
            ]
        if sizes.hidden is not None:
            kept, of = _hidden(switch, cut, mlps, sizes.hidden), int(config.hidden_size)
            # What is left without the other channels is not known before the student is there
            values |= {"nll": None, "hidden": {"kept": len(kept), "of": of, "channels": as_hex(kept, of)}}
    say(f"student: chosen in {duration(time.monotonic() - work.began)}: {summary(values)}")
    return values


def _downs(switch: LayerSwitch, layers: Sequence[int], mlps: Mapping[int, Mlp]) -> dict[int, nn.Module]:
    return {layer: switch.layers[layer].get_submodule(mlps[layer].down) for layer in layers}


def _cut(switch: LayerSwitch, layers: list[int], mlps: Mapping[int, Mlp], width: int | None) -> _Cut:
    """``layers`` with MLPs of the ``width`` channels that say most among them; None: as they are."""
    if width is None:
        return _Cut(0.0, layers, {})
    downs = _downs(switch, layers, mlps)
    with switch.only(layers):
        found = importance(switch.model, switch.calibration, downs, inputs=True)
        kept = {layer: largest(values, width) for layer, values in found.items()}
        with masked(downs, kept):
            return _Cut(switch.calibration.nll(switch.model), layers, kept)


def _hidden(switch: LayerSwitch, cut: _Cut, mlps: Mapping[int, Mlp], width: int) -> Tensor:
    """The channels of the states that say most, by the outputs of the norms, summed over the layers."""
    hidden = int(switch.model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
    norms = norms_of([switch.layers[layer] for layer in cut.layers], hidden)
    with switch.only(cut.layers), masked(_downs(switch, cut.layers, mlps) if cut.mlp else {}, cut.mlp):
        found = importance(switch.model, switch.calibration, norms, inputs=False)
    return largest(torch.stack([values.cpu() for values in found.values()]).sum(0), width)


@contextmanager
def _ready(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Within it ``model`` is on ``device``, and in fp32 where that cannot multiply fewer bits fast; then as it was."""
    home = next(model.parameters()).device
    low = {parameter: parameter.dtype for parameter in model.parameters() if parameter.dtype in LOW}
    model.to(device)  # type: ignore[arg-type]
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    slow = device.type == "cpu" and not fast
    try:
        for parameter in low if slow else ():
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in low.items() if slow else ():
            parameter.data = parameter.data.to(dtype)  # exactly what it was
        model.to(home)  # type: ignore[arg-type]


def as_hex(kept: Tensor, of: int) -> str:
    """Which of ``of`` channels are kept, a bit each, the first one the lowest, in hexadecimal."""
    return f"{sum(1 << channel for channel in kept.tolist()):0{-(-of // 4)}x}"


def from_hex(text: str) -> Tensor:
    """The channels ``as_hex`` has written, in ascending order."""
    bits = int(text, 16)
    return torch.tensor([channel for channel in range(bits.bit_length()) if bits >> channel & 1])


# ------------------------------------------------------------------------------------------------------------- making


def made_of(values: Mapping[str, Any], source: PreTrainedModel) -> PreTrainedModel:
    """The student that a record describes, cut out of ``source``.

    Raises:
        UserError: the model cannot be cut so, or the record is damaged.
    """
    try:
        student = prune_layers(source, values["layers"])
        if mlp := values.get("mlp"):
            student = cut_mlps(student, [from_hex(text) for text in mlp["channels"]])
        if hidden := values.get("hidden"):
            student = cut_hidden(student, from_hex(hidden["channels"]))
    except UserError:  # it is a ValueError, and says by itself what is wrong
        raise
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"student_init.json: damaged ({type(error).__name__}: {error}), expected what the run has written. Put the file "
            "back from a copy, or start again with --overwrite"
        ) from error
    return student


def random_student(init: Init, source: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A student with random weights, in the shape of ``source`` but for what ``init`` says.

    Args:
        init: the section of the recipe.
        source: a language model or a classifier.
        seed: of the weights.

    Raises:
        UserError: see ``plan_sizes``.
    """
    build = build_of(source)
    config = sized_config(source.config, plan_sizes(init, source.config, build), build)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return empty_like(source, config, build)
