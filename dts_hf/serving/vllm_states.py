"""Final states out of vLLM, for a teacher that needs several GPUs. **Not run by our tests**: a stand-in is in its place.

Written against the documented interface (docs.vllm.ai, "Hidden State Extraction", 0.18 and later): the speculative
method ``extract_hidden_states``, with the layer id ``num_hidden_layers``, writes ``token_ids [L]`` and
``hidden_states [L, 1, H]`` of each prompt to a file. Those are the last layer's **before** the model's final norm; the norm
is applied here, with weights out of the checkpoint. Prefix caching and chunked prefill are off: with either, states may be
missing or others. What comes back is believed in nothing: tokens, shape and length are compared, and the log-probabilities
of the labels are the engine's own, so that the self-test finds states that the head does not read, whatever vLLM has come to
mean by them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dts_hf.errors import RunError, UserError
from dts_hf.models.head import backbone_of, head_of, output_module
from dts_hf.models.loading import loading
from dts_hf.teachers.self_test import compare_labels, judge
from dts_hf.teachers.wire import Answer, Question

INDEX = "model.safetensors.index.json"


class VllmStates:
    """Answers questions with an engine.

    Args:
        engine: of ``load_engine``: ``generate`` takes prompts of token ids.
        ends: of ``load_ends``: the final norm and the head are real, nothing else is.
        parameters: of the sampling: one token, and the log-probability of each token of the prompt.
        read: takes the path of an output's states, returns ``token_ids`` and ``hidden_states``.
        prenorm: the states are those before the final norm, as vLLM documents its own.
    """

    def __init__(
        self, engine: Any, ends: PreTrainedModel, parameters: Any, read: Callable[[str], dict[str, Tensor]],
        prenorm: bool = True,
    ) -> None:  # fmt: skip
        self.engine, self.ends, self.parameters, self.read, self.prenorm = engine, ends, parameters, read, prenorm
        self.norm = final_norm(ends)

    @torch.inference_mode()
    def __call__(self, question: Question) -> Answer:
        """States and log-probabilities of the labels, on the CPU.

        Raises:
            RunError: the engine gave states of other tokens, or not of all of them.
        """
        rows = question.rows()
        prompts = [{"prompt_token_ids": ids.tolist()} for ids, _ in rows]
        outputs = self.engine.generate(prompts, self.parameters, use_tqdm=False)
        if len(outputs) != len(rows):
            raise RunError(f"vLLM gave {len(outputs)} outputs for {len(rows)} rows")
        answers = [self._of_row(output, ids, mask.bool()) for output, (ids, mask) in zip(outputs, rows, strict=True)]
        return Answer(*(torch.cat(parts) for parts in zip(*answers, strict=True)))

    def _of_row(self, output: Any, ids: Tensor, mask: Tensor) -> Answer:
        path = str(output.kv_transfer_params["hidden_states_path"])
        found = self.read(path)
        for left in (path, f"{path}.lock"):
            Path(left).unlink(missing_ok=True)
        hidden = found["hidden_states"]
        expected = (len(ids), 1, head_of(self.ends).weight.shape[1])
        if hidden.shape != expected:  # fewer: a prefix came out of a cache
            raise RunError(
                f"vLLM gave states of the shape {tuple(hidden.shape)}, expected [tokens, layers, H] = {expected}"
            )
        if found["token_ids"].tolist() != ids.tolist():
            raise RunError("vLLM gave the states of other tokens than those that it was asked for")
        labels = mask.nonzero()[:, 0]
        states = hidden[labels - 1, 0].to(head_of(self.ends).weight)
        logprobs = [_logprob(output.prompt_logprobs[place], int(ids[place])) for place in labels.tolist()]
        return Answer((self.norm(states) if self.prenorm else states).cpu(), torch.tensor(logprobs))

    def check(self, dtype: str) -> None:
        """The self-test on a row of its own: ``prenorm`` and the head fit what the engine gives, or nothing is served.

        Args:
            dtype: of the states.

        Raises:
            UserError: they do not.
        """
        head = head_of(self.ends)
        ids = torch.randint(head.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
        answer = self(Question.of_rows([(ids, torch.arange(len(ids)) > 0)]))
        device = head.weight.device
        found = compare_labels(answer.label_logprob, answer.states.to(device), head, ids[1:].to(device))
        judge(found, dtype, "vLLM")


def _logprob(told: Any, token: int) -> float:
    """Of one token of the prompt; the engine has it under its id."""
    if told is None or token not in told:
        raise RunError("vLLM gave no log-probability of a token of the prompt")
    return float(told[token].logprob)


def load_engine(folder: str, dtype: str, layers: int, storage: str, **options: Any) -> tuple[Any, Any, Any]:
    """The engine, its sampling parameters, and what reads its files.

    Args:
        folder: of the model.
        dtype: torch's name of the type of the weights.
        layers: of the model: the id of the last one's states is their number.
        storage: folder that engine and server share, best in memory.
        options: ``tensor_parallel_size``, ``max_model_len`` and others of ``vllm.LLM``.

    Raises:
        UserError: vLLM is not installed, or too old.
    """
    try:
        from vllm import LLM, SamplingParams
        from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import load_hidden_states
    except ImportError as error:
        raise UserError(f"--engine: vllm needs vLLM 0.18 or later (pip install vllm): {error}") from None
    engine = LLM(
        model=folder,
        dtype=dtype,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [layers]}},
        },
        kv_transfer_config={
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": storage},
        },
        **options,
    )
    # 0: of the prompt's own token alone, the engine's answer to what the self-test asks
    return engine, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), load_hidden_states


def load_ends(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of which only the final norm and the head are in memory; the rest is on the meta device.

    Args:
        folder: with ``config.json`` and safetensors.
        dtype: of the weights.

    Raises:
        UserError: a weight is not in the files, or there is no such folder.
    """
    key = "teacher.model"
    with loading(folder, key):
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    wanted = {
        id(parameter) for module in (final_norm(model), output_module(model)) for parameter in module.parameters()
    }
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in wanted:
            aliases.setdefault(id(parameter), []).append(name)
    found: dict[str, Tensor] = {}
    for names in aliases.values():  # of tied weights one name is in the files
        tensor = _first_of(Path(folder), names)
        if tensor is None:
            raise UserError(
                f"{key}: the files of {folder!r} lack {names[0]}, expected safetensors made by save_pretrained"
            )
        found |= dict.fromkeys(names, tensor.to(dtype))
    with loading(folder, key):
        model.load_state_dict(found, strict=False, assign=True)
    model.requires_grad_(False).eval()
    return model


def _first_of(folder: Path, names: Sequence[str]) -> Tensor | None:
    """The tensor that has one of these names in the folder's files."""
    index = folder / INDEX
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [(folder / places[name], name) for name in names if name in places]
    else:
        files = [(path, name) for path in sorted(folder.glob("*.safetensors")) for name in names]
    for path, name in files:
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118  (it is no mapping)
                tensor: Tensor = file.get_tensor(name)
                return tensor
    return None


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last layer and the head.

    Raises:
        UserError: the backbone does not have exactly one.
    """
    width = head_of(model).weight.shape[1]
    norms = [
        child
        for child in backbone_of(model).children()
        if not isinstance(child, nn.Embedding) and getattr(getattr(child, "weight", None), "shape", None) == (width,)
    ]
    if len(norms) != 1:
        raise UserError(f"{type(model).__name__}: found {len(norms)} norms at the end of its backbone, expected one")
    return norms[0]
