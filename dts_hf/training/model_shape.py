"""``ModelShape``: the few numbers of a model that memory, communication and time depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dts_hf.distributed.sharding import unsharded_init
from dts_hf.errors import UserError
from dts_hf.models.loading import ModelSource
from dts_hf.models.sizes import plan_sizes, sized_config
from dts_hf.recipe.schema import Init, Recipe, Student, Teacher


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder-only language model in numbers; nothing is loaded.

    Attributes:
        parameters: all weights, each once.
        embedding: weights of the input embedding, V x H.
        layers: blocks.
        hidden: H.
        intermediate: width of the MLP.
        heads: attention heads.
        kv_heads: key and value heads; fewer than ``heads`` under grouped-query attention.
        vocab: V, padded width included.
        tied: input embedding and output layer are one weight.
        block: weights of one block; None: what is outside the embedding and the output layer, divided by ``layers``.
        activation: name of the MLP's activation function, as in the configuration.
        rms_norm: RMSNorm as LLaMA writes it, which keeps more for the backward pass than LayerNorm.
        dropout: masks are kept for the backward pass.
        head_width: width of an attention head; None: H / heads.
    """

    parameters: int
    embedding: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    block: int | None = None
    activation: str = "silu"
    rms_norm: bool = True
    dropout: bool = False
    head_width: int | None = None

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Count the weights of a ``transformers`` configuration by building the model without memory (meta device).

        Raises:
            UserError: the model has no attention heads or no embedding, so nothing here describes it.
        """
        with unsharded_init(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return cls._of(config, model)

    @classmethod
    def from_model(cls, model: nn.Module) -> ModelShape:
        """The same from a loaded causal language model: quantised, with adapters, or partitioned by ZeRO-3 as well."""
        owner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if getattr(owner, "is_quantized", False):  # its weights are packed: two or four in a byte or more
            return cls.from_config(owner.config)
        return cls._of(owner.config, owner)

    @classmethod
    def _of(cls, config: Any, model: Any) -> ModelShape:
        config = config.get_text_config()
        for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            if getattr(config, key, None) is None:
                raise UserError(
                    f"{type(model).__name__}: its configuration has no {key}, expected a transformer decoder; "
                    "its memory cannot be estimated"
                )
        layers = int(config.num_hidden_layers)
        stack = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        kv_heads = getattr(config, "num_key_value_heads", None)
        own_width = getattr(config, "head_dim", None)
        rates = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout")
        wide = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
        activations = ("hidden_act", "activation_function", "hidden_activation")
        return cls(
            parameters=_weights(model),
            embedding=_count(embedding.weight),
            layers=layers,
            hidden=hidden,
            intermediate=int(_first(config, wide) or 4 * hidden),
            heads=heads,
            kv_heads=int(kv_heads or heads),
            vocab=int(embedding.num_embeddings),
            tied=head is None or head.weight is embedding.weight,
            block=None if stack is None else _weights(stack[0]),
            activation=str(_first(config, activations) or "silu"),
            rms_norm=hasattr(config, "rms_norm_eps"),
            dropout=any(getattr(config, name, 0.0) for name in rates),
            head_width=None if own_width in (None, hidden // heads) else int(own_width),
        )

    @property
    def head(self) -> int:
        """Weights of the output layer, also where it is tied."""
        return self.vocab * self.hidden

    @property
    def backbone(self) -> int:
        """Weights of all blocks."""
        if self.block is not None:
            return self.layers * self.block
        return self.parameters - self.embedding - (0 if self.tied else self.head)

    @property
    def query_width(self) -> int:
        """Width of the queries, and of what attention gives."""
        return self.heads * (self.head_width or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        return self.query_width * self.kv_heads // self.heads

    @property
    def gated(self) -> bool:
        """The MLP has three matrices (SwiGLU) and not two."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return self.backbone / self.layers - attention > 2.5 * self.hidden * self.intermediate

    @property
    def block_weights(self) -> float:
        return self.backbone / self.layers


#: (student, teacher)
Shapes = tuple[ModelShape, ModelShape | None]


def shapes_from_configs(recipe: Recipe) -> Shapes | None:
    """Shapes without loading a weight; None where the files hold no plain configuration (GGUF)."""

    def config_of(model: Student | Teacher, key: str, name: str | None) -> Any:
        source = ModelSource.resolve(str(name), key)
        if source.gguf_file is not None:
            return None
        remote = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        return AutoConfig.from_pretrained(source.location, **remote)

    teacher, student = recipe.teacher if recipe.loads_teacher else None, recipe.student
    of_teacher = None if teacher is None else config_of(teacher, "teacher.model", teacher.model)
    if student.init is None:
        of_student = config_of(student, "student.model", student.model)
    else:
        name = student.init.source
        source = of_teacher if name is None else config_of(student, "student.init.from", name)
        of_student = None if source is None else planned_config(student.init, source)
    if of_student is None or (teacher is not None and of_teacher is None):
        return None
    if recipe.teacher is not None and recipe.teacher.kind == "self":
        return ModelShape.from_config(of_student), ModelShape.from_config(of_student)
    kept = of_teacher is not None and recipe.keeps_teacher  # else it gives the first weights and is let go
    return ModelShape.from_config(of_student), ModelShape.from_config(of_teacher) if kept else None


def planned_config(init: Init, config: Any) -> Any:
    """The configuration of the student that ``init`` makes, as far as it is known before rows are looked at.

    Where a search decides both, the one with the most layers that it may come to: all have about as many weights.

    Args:
        init: the section of the recipe.
        config: of the model that the student is cut out of.

    Raises:
        UserError: see ``plan_sizes`` and ``sized_config``.
    """
    build = AutoModelForCausalLM.from_config
    sizes = plan_sizes(init, config, build)
    if sizes.options:
        layers, mlp = sizes.options[-1]
        sizes = sizes._replace(layers=layers, mlp=mlp)
    return sized_config(config, sizes, build)


def _weights(module: nn.Module) -> int:
    """All weights of a module, each once, adapters left out."""
    return sum(_count(weight) for name, weight in module.named_parameters() if "lora_" not in name)


def _count(weight: Any) -> int:
    """Entries of a weight; ZeRO-3 leaves an empty tensor behind and keeps the number in ``ds_numel``."""
    return int(getattr(weight, "ds_numel", weight.numel()))


def _first(config: Any, names: Iterable[str]) -> Any:
    """The first of ``names`` that the configuration gives; families call the same thing differently."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
