"""Whether a step of training may leave weights without a gradient, which DistributedDataParallel has to be told."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def may_leave_unused(model: nn.Module) -> bool:
    """Whether some weights that are trained may take no part in a forward pass; True also where it cannot be found out.

    Experts of a mixture that are modules of their own, towers for images under rows of text, layers that are skipped at
    random: DDP would wait for their gradients for ever, and must search the graph of every step for them
    (``find_unused_parameters``). Everywhere else the search costs time and ends in a warning that it was for nothing.

    One token goes through the model: of several experts it meets as few as can be. No random number is drawn.
    """
    if any(_skips_layers(module) for module in model.modules()):
        return True
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            logits = model(input_ids=torch.ones((1, 1), dtype=torch.int64, device=device)).logits
        return not trained <= _leaves_of(logits)
    except Exception:  # whatever a model raises that asks for more than tokens, or for another device
        return True
    finally:
        model.train(was_training)


def _skips_layers(module: nn.Module) -> bool:
    """Whether it leaves layers out at random in training, as OPT's ``layerdrop`` does."""
    rates = (rate for name, rate in vars(module).items() if "layerdrop" in name.replace("_", ""))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _leaves_of(output: Tensor) -> set[int]:
    """The ids of the tensors that a backward pass from ``output`` would give a gradient to."""
    waiting, seen, leaves = [output.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad, at the end of every path
            leaves.add(id(node.variable))
        waiting.extend(parent for parent, _ in node.next_functions)
    return leaves
