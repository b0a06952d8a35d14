"""Answers from a server with the doors of vLLM's: the weights it has, what it is asked, and what is refused when."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dts_hf.errors import RunError, UserError
from dts_hf.generation.engine import GenerationSettings, generate
from dts_hf.on_policy import vllm_server
from dts_hf.on_policy.rollout import prompt_length
from dts_hf.on_policy.vllm_server import VllmServer, log_probs_of
from tests.support.families import FAMILIES
from tests.support.tiny import tiny_gpt2, tiny_llama
from tests.support.trainers import trainer_for
from tests.support.vllm_server import Vllm, serving

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
KEYS = ["a", "b", "c"]
VARIABLE = "DTS_TEST_VLLM_KEY"


def answers(server, model, prompts=PROMPTS, **settings):
    chosen = GenerationSettings(**{"max_new_tokens": 6, "do_sample": True, **settings})
    return server(model, prompts, chosen, eos_token_ids=[2], pad_token_id=0, row_keys=KEYS[: len(prompts)])


def greedy(model):
    settings = GenerationSettings(max_new_tokens=6)
    return generate(model, PROMPTS, settings, eos_token_ids=[2], pad_token_id=0)


def moved(model, seed, by=0.5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model


def met(url, folder, **options):
    """A server that no question was asked yet."""
    server = VllmServer(url, str(folder), **options)
    server.model = "student"
    return server


def checked(url, folder, longest=None, **options):
    server = VllmServer(url, str(folder), **options)
    server.check(tiny_llama(seed=0), longest, patience=0.1)
    return server


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("shard", [1, 4 << 30])
def test_it_answers_with_the_weights_of_now(tmp_path, monkeypatch, build, shard):
    monkeypatch.setattr(vllm_server, "_SHARD", shard)  # 1: a file for each weight
    model, vllm = build(seed=0), Vllm(build(seed=99))
    said = []
    with serving(vllm) as url:
        server = met(url, tmp_path / "weights")
        for seed in range(3):
            moved(model, seed)
            found = answers(server, model)
            assert found == greedy(model)
            said.append([one.tokens for one in found])
    assert said[0] != said[1] != said[2]
    assert vllm.resets == 3
    assert len(set(vllm.folders)) == 3  # a file that is mapped must not change
    assert not list((tmp_path / "weights").iterdir())


def test_what_a_row_is_asked_for(tmp_path):
    """All that a model's generation_config.json would else decide is said; each row has a seed of its own."""
    vllm = Vllm(tiny_llama(seed=0))
    with serving(vllm) as url:
        server = met(url, tmp_path, at_once=2)
        for _ in range(2):
            answers(server, tiny_llama(seed=0), temperature=0.7, top_p=0.9, seed=5)
    first, again = vllm.asked[:3], vllm.asked[3:]
    assert sorted(body["prompt"] for body in first) == sorted(PROMPTS)
    assert len({body["seed"] for body in first}) == 3
    assert {tuple(body["prompt"]): body["seed"] for body in first} == {
        tuple(body["prompt"]): body["seed"] for body in again
    }
    salts = [{body["cache_salt"] for body in asked} for asked in (first, again)]
    assert len(salts[0]) == len(salts[1]) == 1 and salts[0] != salts[1]
    told = {name: first[0][name] for name in first[0].keys() - {"prompt", "seed", "cache_salt"}}
    assert told == {
        "model": "student", "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "n": 1,
        "ignore_eos": True, "stop_token_ids": [2], "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip


def test_a_server_that_keeps_its_old_weights_is_found_out(tmp_path):
    """It says that it has read them (vllm#32718): without a look at its answers nobody would know."""
    with serving(Vllm(tiny_llama(seed=0), reads=False)) as url:
        server = met(url, tmp_path)
        answers(server, tiny_llama(seed=0))  # the same by chance
        with pytest.raises(RunError, match=r"answers with other weights than the student's: .* nats"):
            answers(server, moved(tiny_llama(seed=0), 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["LLaMA", "GPT-2", "Gemma 2", "Cohere", "Granite", "Mixtral"])
def test_what_the_student_says_of_an_answer(family):
    """In pieces, with what the family does to its logits; whole logits of a long row would not fit."""
    model, widths = FAMILIES[family].build(), []
    prompt, answer = [5, 6, 7], [8, 9, 10, 11, 2]
    logits = model(torch.tensor([prompt + answer])).logits[0, 2:-1].float()
    model.train().get_output_embeddings().register_forward_hook(lambda _, __, out: widths.append(out.shape[-1]))
    expected = logits.log_softmax(-1)[range(len(answer)), answer]
    assert torch.allclose(log_probs_of(model, prompt, answer), expected, rtol=0, atol=1e-5)
    assert model.training and widths == [model.config.hidden_size]


def test_rounding_is_not_taken_for_other_weights(tmp_path):
    model = moved(tiny_llama(seed=0), 0)
    with serving(Vllm(tiny_llama(seed=1).to(torch.bfloat16))) as url:
        assert len(answers(met(url, tmp_path), model)) == 3


def test_a_server_that_cannot_read_the_folder_ends_the_run(tmp_path):
    with (
        serving(Vllm(tiny_llama(seed=0, layers=3))) as url,
        pytest.raises(RunError, match="did not read the student's"),
    ):
        answers(met(url, tmp_path), tiny_llama(seed=0))
    assert not list(tmp_path.iterdir())


def test_runs_with_one_server_take_turns(tmp_path):
    """Else one would learn from answers of the other's weights, or, where those are near, not even notice."""
    models = [moved(tiny_llama(seed=0), seed) for seed in (1, 2)]
    expected = [greedy(model) for model in models]
    assert expected[0] != expected[1]
    with serving(Vllm(tiny_llama(seed=99), slow=0.3)) as url, ThreadPoolExecutor() as threads:
        servers = [met(url, tmp_path) for _ in models]
        assert list(threads.map(answers, servers, models)) == expected


def test_what_a_killed_run_has_left_is_removed(tmp_path):
    """In shared memory it would be gone with the machine alone; what is somebody else's stays."""
    for name in ("dts_hf-weights-0123456789abcdef", "weights-of-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1234")
    with serving(Vllm(tiny_llama(seed=1))) as url:
        answers(met(url, tmp_path), tiny_llama(seed=0))
    assert [file.name for file in tmp_path.iterdir()] == ["weights-of-mine"]


@pytest.mark.parametrize(("mask", "modes"), [(0o022, {"0o755", "0o644"}), (0o077, {"0o700", "0o600"})])
def test_who_may_read_the_weights(tmp_path, mask, modes):
    """Whom the umask lets: a server of another user too, where it does."""
    vllm = Vllm(tiny_llama(seed=1))
    before = os.umask(mask)
    try:
        with serving(vllm) as url:
            answers(met(url, tmp_path), tiny_llama(seed=0))
    finally:
        os.umask(before)
    assert vllm.modes == modes


def test_a_prefix_cache_that_cannot_be_reset(tmp_path):
    """vLLM says 200 all the same, while it answers anybody: what is in it is of older weights."""
    model = tiny_llama(seed=0)
    with serving(Vllm(tiny_llama(seed=99), keeps=True)) as url:
        server = met(url, tmp_path)
        for seed in range(2):
            assert answers(server, moved(model, seed)) == greedy(model)


def test_its_own_ends_are_not_ours(tmp_path):
    """A model's folder may have other ends than the run: what our engine goes past is no end on a server either."""
    model = tiny_llama(seed=0)
    expected = greedy(model)
    own = {one.tokens[0] for one in expected}
    with serving(Vllm(tiny_llama(seed=1), ends=tuple(own))) as url:
        assert answers(met(url, tmp_path), model) == expected


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ({"most": 3}, "has cut an answer after 3 tokens, asked for 6"),
        ({"spoil": lambda choice: choice.update(finish_reason="abort")}, "for the reason 'abort'; expected 1 to 6"),
        (
            {"spoil": lambda choice: choice.update(finish_reason="stop")},
            r"which is no end here; expected one of \[2\]",
        ),
        ({"spoil": lambda choice: choice["token_ids"].append(5)}, "of 7 tokens and 6 log-probabilities"),
        ({"spoil": lambda choice: choice["token_ids"].clear()}, "an answer of 0 tokens"),
        ({"spoil": lambda choice: choice["token_ids"].__setitem__(1, 99_999)}, "no token of the student's vocabulary"),
        ({"spoil": lambda choice: choice["token_ids"].__setitem__(1, -1)}, "no token of the student's vocabulary"),
        ({"spoil": lambda choice: choice["token_ids"].__setitem__(1, "a")}, "no token of the student's vocabulary"),
        ({"spoil": lambda choice: choice.update(token_ids="abcdef")}, "without token_ids or logprobs"),
        (
            {"spoil": lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, None)},
            "without a log-probability",
        ),
        (
            {"spoil": lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, float("nan"))},
            "or with one that is non-finite",
        ),
    ],
)
def test_an_answer_of_another_kind_ends_the_run(tmp_path, made, match):
    """Each would be learned in silence, or end one process of several alone."""
    with serving(Vllm(tiny_llama(seed=0), **made)) as url, pytest.raises(RunError, match=match):
        answers(met(url, tmp_path), tiny_llama(seed=0))


def test_what_passes_is_waited_for(tmp_path):
    vllm = Vllm(tiny_llama(seed=1), busy=2)
    with serving(vllm) as url:
        assert len(answers(met(url, tmp_path), tiny_llama(seed=0))) == 3
    assert vllm.busy == 0


def test_a_process_without_prompts_still_pushes(tmp_path):
    vllm = Vllm(tiny_llama(seed=1))
    with serving(vllm) as url:
        assert answers(met(url, tmp_path), tiny_llama(seed=0), []) == []
    assert vllm.resets == 1


def test_the_model_comes_back_as_it_was(tmp_path):
    model = tiny_llama(seed=0).train()
    with serving(Vllm(tiny_llama(seed=1))) as url:
        answers(met(url, tmp_path), model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------------------------------- refused before training


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ({"develops": False}, r"vllm_url: .* takes no weights: start it with .* VLLM_SERVER_DEV_MODE=1"),
        ({"model": tiny_llama(seed=1, layers=3)}, r"did not read .* must be vLLM 0\.16 or later, see this folder"),
        ({"reads": False}, "answers with other weights than the student's"),
        ({"ids": False}, r"without token_ids .* expected vLLM 0\.16 or later"),
        ({"most": 3}, "has cut an answer after 3 tokens, asked for 4"),
        ({"longest": 20}, r"may have 64 tokens, and .* takes 20 \(its --max-model-len\)"),
        ({"token": "correct-horse-battery"}, "vllm_url: .*401.* Set the variable that on_policy.vllm_token_env names"),
    ],
)
def test_a_server_that_will_not_do(tmp_path, made, match):
    with serving(Vllm(**{"model": tiny_llama(seed=1), **made})) as url, pytest.raises(UserError, match=match):
        checked(url, tmp_path, 64)
    assert not list(tmp_path.iterdir())


def test_its_token_is_sent_and_never_said(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "correct-horse-battery")
    with serving(Vllm(tiny_llama(seed=0), token="correct-horse-battery")) as url:
        assert len(answers(checked(url, tmp_path, token_env=VARIABLE), tiny_llama(seed=0))) == 3
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UserError, match=rf"vllm_token_env: the environment variable {VARIABLE} is not set"):
        VllmServer("http://127.0.0.1:1", str(tmp_path), token_env=VARIABLE)


def test_nobody_there(tmp_path):
    with pytest.raises(UserError, match=r"on_policy\.vllm_url: http://127\.0\.0\.1:1/v1/models: no answer in 0\.1 s"):
        checked("http://127.0.0.1:1", tmp_path)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://me:secret@127.0.0.1", "ftp://host", "http://host:8000/v1/"])
def test_an_address_that_is_none(tmp_path, url):
    with pytest.raises(UserError, match=r"on_policy\.vllm_url: ") as raised:
        VllmServer(url, str(tmp_path))
    assert "secret" not in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_takes_nothing(tmp_path):
    tmp_path.chmod(0o500)
    with (
        serving(Vllm(tiny_llama(seed=0))) as url,
        pytest.raises(UserError, match="vllm_folder: the student's weights could not be written"),
    ):
        checked(url, tmp_path)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        serving(Vllm(tiny_llama(seed=0))) as url,
        pytest.raises(UserError, match="vllm_folder: the student's weights could not be written"),
    ):
        checked(url, tmp_path / "file")


# ------------------------------------------------------------------------------------------------- through the trainer


def chosen(url, folder, **more):
    return {
        "fraction": 1.0, "max_new_tokens": 5, "backend": "vllm", "vllm_url": url, "vllm_folder": str(folder), **more
    }  # fmt: skip


def test_a_training_whose_student_answers_on_a_server(tmp_path):
    """Each generated step has the weights of now: the last that the server has read are those before the last step."""
    vllm = Vllm(tiny_llama(seed=99))
    options = {"max_steps": 3, "learning_rate": 0.05, "per_device_train_batch_size": 4}
    with serving(vllm) as url:
        trainer = trainer_for(
            tmp_path / "run", options=options, on_policy=chosen(url, tmp_path / "weights"), temperature=1.0
        )
        trainer.train()
        assert vllm.resets == 4 and trainer.state.log_history[0]["generated_share"] == 1.0
        answers(trainer.rollout.answer, trainer.model)
    pairs = zip(vllm.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not list((tmp_path / "weights").iterdir())


def test_a_server_needs_no_place_for_the_answers_of_the_data(tmp_path):
    """Its --max-model-len is for prompts and what the student says."""
    vllm = Vllm(tiny_llama(seed=99))
    with serving(vllm) as url:
        settings = chosen(url, tmp_path / "weights")
        rows = trainer_for(tmp_path / "run", on_policy=settings).train_dataset
        vllm.longest = max(prompt_length(rows[number]) for number in range(len(rows))) + 5
        assert vllm.longest < max(rows.lengths) + 5
        trainer_for(tmp_path / "run", on_policy=settings)
        vllm.longest -= 1
        with pytest.raises(UserError, match=f"may have {vllm.longest + 1} tokens, and .* takes {vllm.longest} "):
            trainer_for(tmp_path / "run", on_policy=settings)


def test_its_losses_are_those_of_our_engine(tmp_path):
    """With almost no sampling noise both say the same, and what is learned of it is the same."""
    logs = []
    options = {"max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 4, "logging_steps": 1}
    with serving(Vllm(tiny_llama(seed=99))) as url:
        for settings in (chosen(url, tmp_path / "weights", temperature=1e-6), {
            "fraction": 1.0, "max_new_tokens": 5, "temperature": 1e-6
        }):  # fmt: skip
            trainer = trainer_for(tmp_path / f"run{len(logs)}", options=options, on_policy=settings, temperature=1.0)
            trainer.train()
            logs.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)


def test_where_answers_are_made_is_no_other_objective_and_nobody_is_told(tmp_path):
    with serving(Vllm(tiny_llama(seed=99))) as url:
        trainer = trainer_for(tmp_path, on_policy=chosen(url, tmp_path / "weights"))
        told = str((trainer.describe_objective(), trainer.row_facts, trainer.on_policy.facts))
    assert "'backend': 'vllm'" in told
    assert url not in told and "weights" not in told


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"vllm_url": "http://a:1"}, "vllm_url: belongs to backend 'vllm', got backend 'own'"),
        ({"backend": "vllm", "vllm_folder": "x"}, "vllm_folder: belongs to a server, expected its address as well"),
        ({"backend": "vllm", "vllm_url": "http://a:1"}, "vllm_folder: is missing, expected a folder"),
        (
            {"backend": "vllm", "vllm_url": "http://a:1", "vllm_folder": "x", "vllm_token_env": "abc"},
            "vllm_token_env: expected the name of an environment variable in capitals",
        ),
    ],
)
def test_settings_that_do_not_go_are_named(tmp_path, given, match):
    with pytest.raises(UserError, match=rf"on_policy\.{match}"):
        trainer_for(tmp_path, on_policy=given)
