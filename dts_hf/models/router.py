"""The auxiliary loss of a mixture of experts, which keeps its router from sending all tokens to a few experts.

It is the one term of a step that is no sum over rows: the shares of a batch are multiplied with each other, so it depends
on how a step is split into micro-batches. Everything else does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dts_hf.errors import UserError
from dts_hf.models.head import without_adapters


@dataclass(frozen=True)
class Router:
    """What the model's own training loss adds for its routers: ``coefficient`` times ``loss``.

    Args:
        top_k: experts that a token is sent to.
        coefficient: the model's ``router_aux_loss_coef``.
    """

    top_k: int
    coefficient: float

    def loss(self, router_logits: Sequence[Tensor], tokens: Tensor | None = None) -> Tensor:
        """E sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, Eq. 4-6), as transformers' families compute it.

        f_e is the share of assignments to expert e, P_e its mean probability, both over the tokens of all layers, and the
        f_e add up to ``top_k``, which is also the value of perfect balance; no gradient flows into f_e.

        Args:
            router_logits: of each layer with experts, ``[B * T, E]``.
            tokens: bool ``[B, T]``, which tokens count: neither padding nor dummy rows. None: all of them.

        Returns:
            ``[]``, fp32.
        """
        first = router_logits[0]
        experts = first.shape[-1]
        counts = torch.ones(first.shape[0]) if tokens is None else tokens.reshape(-1)
        counts = counts.to(first.device, torch.float32)
        chosen, mass = first.new_zeros(experts, dtype=torch.float32), first.new_zeros(experts, dtype=torch.float32)
        for layer in router_logits:
            probabilities = layer.to(first.device).softmax(-1)
            picked = probabilities.topk(self.top_k, dim=-1).indices
            chosen.scatter_add_(0, picked.reshape(-1), counts.repeat_interleave(self.top_k))
            mass = mass + (probabilities.float() * counts.unsqueeze(-1)).sum(0)
        total = (counts.sum() * len(router_logits)).clamp(min=1.0)  # a batch of dummy rows alone has no tokens
        return experts * (chosen / total * (mass / total)).sum()


def collects_router_logits(model: nn.Module) -> bool:
    """Whether the configuration of ``model`` asks for the logits of its routers, and so for their loss beside its own."""
    return bool(getattr(without_adapters(model).config.get_text_config(), "output_router_logits", False))


def router_of(model: nn.Module) -> Router | None:
    """How ``model`` would add its router's loss to its own; None where it adds none.

    Raises:
        UserError: it does so in a way that ``Router`` does not know.
    """
    if not collects_router_logits(model):
        return None
    owner = without_adapters(model)
    config = owner.config.get_text_config()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], device=owner.device)
    output = _probe(owner, mask)
    theirs, logits = getattr(output, "aux_loss", None), getattr(output, "router_logits", None)
    if theirs is None:  # DeepSeek-V3 has the setting and does nothing with it
        return None
    names = ("router_aux_loss_coef", "aux_loss_coef")
    found = [getattr(place, name, None) for place in (owner, config) for name in names]
    coefficient = next((value for value in found if value is not None), None)
    top_k = getattr(owner, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    if coefficient is not None and top_k is not None and logits:
        router = Router(int(top_k), float(coefficient))
        try:
            ours = router.loss(logits, mask.bool())
        except RuntimeError:  # logits of another shape (Doge's are of product keys)
            ours = torch.full_like(theirs, torch.nan)
        if torch.allclose(ours, theirs.to(ours), rtol=1e-3):
            return router
    raise UserError(
        f"router_aux_loss: {type(owner).__name__} is set to add an auxiliary loss for its routers (output_router_logits), "
        "one that dts_hf does not know; expected router_aux_loss 'none', which leaves it out"
    )


@torch.no_grad()
def _probe(model: Any, mask: Tensor) -> Any:
    """What ``model`` returns for a few tokens, one of them padding, when it is asked for its routers' logits."""
    ids = torch.arange(1, 1 + mask.numel(), device=model.device).view_as(mask)
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    finally:
        model.train(was_training)
