"""vLLM's documented interface with a stand-in behind it: our side applies the norm, cuts to the labels, and checks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dts_hf.errors import RunError, UserError
from dts_hf.models.head import backbone_of, head_of
from dts_hf.recipe.schema import Teacher
from dts_hf.serving import vllm_states
from dts_hf.serving.serve import ServeOptions, load_served
from dts_hf.serving.vllm_states import VllmStates, final_norm, load_ends
from dts_hf.teachers.remote import RemoteTeacher
from tests.support.served import batch_of, running, served_tiny
from tests.support.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19]]


class StandIn:
    """What ``vllm.LLM`` does with these options, as its documentation says it: one file of states for each prompt."""

    def __init__(self, model, folder, change=lambda tensors: tensors):
        self.model, self.folder, self.change, self.count = model, Path(folder), change, 0

    @torch.no_grad()
    def generate(self, prompts, parameters, use_tqdm):
        return [self.output(torch.tensor([prompt["prompt_token_ids"]])) for prompt in prompts]

    def output(self, ids):
        kept = []
        hook = final_norm(self.model).register_forward_pre_hook(lambda module, given: kept.append(given[0]))
        log_probs = self.model(input_ids=ids).logits.float().log_softmax(-1)[0]
        hook.remove()
        self.count += 1
        path = self.folder / f"{self.count}.safetensors"
        tensors = {"token_ids": ids[0].clone(), "hidden_states": kept[0][0][:, None].contiguous()}
        save_file(self.change(tensors), path)
        path.with_suffix(".safetensors.lock").touch()
        told = [None] + [
            {int(ids[0, k]): SimpleNamespace(logprob=float(log_probs[k - 1, ids[0, k]]))}
            for k in range(1, ids.shape[1])
        ]
        return SimpleNamespace(kv_transfer_params={"hidden_states_path": str(path)}, prompt_logprobs=told)


def states_of(tmp_path, model, change=lambda tensors: tensors, **options):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "states").mkdir(exist_ok=True)
    ends = load_ends(str(tmp_path / "model"), torch.float32)
    return VllmStates(StandIn(model, tmp_path / "states", change), ends, None, load_file, **options)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("tie", [True, False])
def test_only_the_ends_are_loaded_and_they_are_the_models(tmp_path, build, tie) -> None:
    model = build(seed=1, tie=tie)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    ends = load_ends(str(tmp_path), torch.float32)
    assert torch.equal(head_of(ends).weight, head_of(model).weight)
    states = torch.randn(3, 32)
    assert torch.equal(final_norm(ends)(states), final_norm(model)(states))
    layers = backbone_of(ends).layers if build is tiny_llama else backbone_of(ends).h
    assert all(parameter.is_meta for parameter in layers.parameters())


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_states_behind_the_protocol_are_those_of_the_backbone(tmp_path, build, monkeypatch) -> None:
    model = build(seed=1)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    asked = {}

    def load_engine(folder, dtype, layers, storage, **options):
        asked.update(options, layers=layers)
        return StandIn(model, storage), None, load_file

    monkeypatch.setattr(vllm_states, "load_engine", load_engine)
    section = Teacher(model=str(tmp_path / "model"), dtype="float32")
    served = load_served(section, "auto", ServeOptions(engine="vllm", tensor_parallel=4, max_length=64))
    assert asked == {"layers": 2, "tensor_parallel_size": 4, "max_model_len": 65}
    batch, labels = batch_of(ROWS)
    with running(served) as url, running(served_tiny(model)) as own:
        found, expected = (RemoteTeacher(one, tokenizer=tiny_tokenizer()).states(batch, labels) for one in (url, own))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    storage = served.forward.engine.folder
    assert storage.is_dir() and not list(storage.iterdir())  # states do not pile up


def wrong_tokens(tensors):
    return {**tensors, "token_ids": tensors["token_ids"].roll(1)}


def fewer(tensors):  # a prefix came out of a cache (vllm#44485)
    return {**tensors, "hidden_states": tensors["hidden_states"][1:].contiguous()}


def transposed(tensors):
    return {**tensors, "hidden_states": tensors["hidden_states"].transpose(0, 1).contiguous()}


@pytest.mark.parametrize(
    ("change", "words"),
    [(wrong_tokens, "states of other tokens"), (fewer, "states of the shape"), (transposed, "states of the shape")],
)
def test_states_that_are_not_the_rows_are_refused(tmp_path, change, words) -> None:
    with pytest.raises(RunError, match=words):
        states_of(tmp_path, tiny_llama(seed=1), change).check("float32")


def test_a_wrong_word_about_the_norm_is_found_before_anything_is_served(tmp_path) -> None:
    states_of(tmp_path, tiny_llama(seed=1)).check("float32")
    with pytest.raises(UserError, match="vLLM: the self-test failed"):
        states_of(tmp_path, tiny_llama(seed=1), prenorm=False).check("float32")


def test_without_vllm_it_says_so(tmp_path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    section = Teacher(model=str(tmp_path), dtype="float32")
    with pytest.raises(UserError, match=r"--engine: vllm needs vLLM 0.18 or later"):
        load_served(section, "auto", ServeOptions(engine="vllm"))
    with pytest.raises(UserError, match="serves a folder with safetensors"):
        load_served(Teacher(model=str(tmp_path), quantization="8bit"), "auto", ServeOptions(engine="vllm"))
