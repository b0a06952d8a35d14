"""The student's answers from vLLM, which gets its weights before each of them. **Not run by our tests**: stand-ins are.

Written against the documented interface of vLLM (``LLM.apply_model``, ``load_weights`` of its models,
``reset_prefix_cache``; of a server the endpoints of its weight transfer) and read beside TRL 1.16's client.

What is given up: vLLM draws from a generator of its own (one seed for each row), and its logits depend on what else it
answers at the time. So a text is no function of (seed, row, step) alone, and a run that is resumed does not say the same
again: it is another sample of the same training. The coin is still the run's own.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dts_hf.distributed.processes import process
from dts_hf.errors import RunError, UserError
from dts_hf.generation.engine import Generated, GenerationSettings
from dts_hf.generation.vllm_backend import vllm_generate
from dts_hf.models.head import without_adapters
from dts_hf.on_policy.whole_weights import whole_weights

logger = logging.getLogger(__name__)
#: Said once, at the first answer.
NOISE = (
    "on_policy.backend: vllm: its sampling noise and its batches are its own, so texts are no function of seed, row and "
    "step alone, and a run that is resumed does not repeat them"
)


class VllmRollouts:
    """vLLM in this process, beside the student on its device; stands where ``generation.engine.generate`` would.

    The engine is made of the student's configuration with the first answer; no weights are read from a disk.

    Args:
        memory: share of the device's memory that vLLM takes (``gpu_memory_utilization``).
        longest: tokens of a prompt and its answer (``max_model_len``); None: what the model takes.
        engine: one that is there already; None: it is made.
    """

    def __init__(self, memory: float, longest: int | None = None, engine: Any = None) -> None:
        self.memory, self.longest, self.engine = memory, longest, engine

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        row_keys: Sequence[str],
    ) -> list[Generated]:
        """Answer every prompt with the weights that ``model`` has now; arguments as of ``generation.engine.generate``.

        Raises:
            UserError: vLLM is not installed, or the adapter cannot be merged.
            RunError: vLLM did not take a weight.
        """
        if self.engine is None:
            logger.warning(NOISE)
            self.engine = make_engine(model, self.memory, self.longest)
        push_weights(self.engine, model)
        if not prompts:
            return []
        return vllm_generate(
            self.engine, prompts, settings, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id, row_keys=row_keys
        )


def check_installed() -> None:
    """Refuse, before anything is trained, a machine without vLLM.

    Raises:
        UserError: it is not installed.
    """
    # A worker process of its own could not be handed tensors of this one. Read when vllm is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        import vllm  # noqa: F401
    except ImportError:
        raise UserError(
            "on_policy.backend: vllm, but vLLM is not installed: pip install vllm, or backend: own"
        ) from None


def make_engine(model: nn.Module, memory: float, longest: int | None) -> Any:
    """An engine of the student's shape on this process's device; its weights are random until ``push_weights``.

    Args:
        model: the student.
        memory: share of the device's memory.
        longest: tokens of a prompt and its answer.

    Raises:
        UserError: vLLM is not installed.
    """
    check_installed()
    from vllm import LLM

    base, world = without_adapters(model), process()[1]
    # Several processes: each has an engine of its own, which must not start processes or groups
    several = {"distributed_executor_backend": "external_launcher"} if world > 1 else {}
    with tempfile.TemporaryDirectory() as folder:
        base.config.save_pretrained(folder)
        return LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, tensor_parallel_size=1,
            dtype=str(base.dtype).removeprefix("torch."), gpu_memory_utilization=memory, max_model_len=longest,
            trust_remote_code=False, **several,
        )  # fmt: skip


def push_weights(engine: Any, model: nn.Module) -> None:
    """Give ``engine`` the weights of ``model``, and have it forget what it has computed with older ones.

    Raises:
        UserError: see ``whole_weights``.
        RunError: vLLM did not take a weight: it would go on answering with an older one.
    """
    for name, weight in whole_weights(model):
        taken = engine.apply_model(functools.partial(_load, name=name, weight=weight))
        if any(loaded is not None and not loaded for loaded in taken):
            raise RunError(
                f"on_policy.backend: vllm did not take the weight {name}, so its answers would not be the student's; use "
                "backend: own"
            )
    engine.reset_prefix_cache()


def _load(module: Any, name: str, weight: Tensor) -> set[str] | None:
    """What a model of vLLM says that it has loaded of one weight; None of one that does not say."""
    with torch.no_grad():
        loaded = module.load_weights([(name, weight)])
    return None if loaded is None else set(loaded)
