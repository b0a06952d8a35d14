"""The folder that is uploaded: what may be in it, what is taken out of it, and what it is refused for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save_file

from dts_hf.errors import UserError, is_connection
from dts_hf.hub.faults import is_transient
from dts_hf.hub.push import end_tokens
from dts_hf.hub.staging import ALLOWED, is_allowed, public_recipe, stage
from dts_hf.recipe.schema import Recipe
from dts_hf.reporting.facts import without_folders
from dts_hf.reporting.licences import Inherited, Origin, inherited
from tests.support.fake_hub import FakeHub, Repository, fake_hub
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.tokens import PLANTED


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(student: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(student, tmp_path / "copy"))


def staged(student: Path, target: Path, **options: Any) -> list[str]:
    return stage(student, target, **{"card": "# card\n", **options}).names


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("where", ["README.md", "chat_template.jinja", "config.json", "tokenizer.json"])
def test_a_planted_secret_is_refused_by_name(copy: Path, tmp_path: Path, kind: str, where: str) -> None:
    secret, options = PLANTED[kind], {}
    if where == "README.md":
        options = {"card": f"# card\n\n{secret}\n"}
    elif where.endswith(".jinja"):
        (copy / where).write_text("{# one #}\n{# " + secret + " #}\n")
    else:
        (copy / where).write_text(json.dumps({"one": 1, "deep": [secret]}, indent=2))
    if where == "config.json":  # ours to clean: it is masked
        staged(copy, tmp_path / "target", **options)
        assert secret not in (tmp_path / "target" / where).read_text()
        return
    with pytest.raises(UserError, match=rf"^{re.escape(where)}, line \d+: holds what looks like {kind}") as caught:
        staged(copy, tmp_path / "target", **options)
    assert secret not in str(caught.value)


def test_the_value_of_a_token_variable_is_refused(student: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "looks-like-nothing")
    with pytest.raises(
        UserError, match=r"README.md, line 1: holds what looks like a token of this machine's environment"
    ):
        staged(student, tmp_path / "target", card="looks-like-nothing")


def test_only_names_of_the_list_are_staged(copy: Path, tmp_path: Path) -> None:
    for name in (
        "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", ".lock", "log.jsonl",
        "environment.json", "data_manifest.json", "complete.json", "pytorch_model.bin", "modeling_mine.py", "scores.json",
        "predictions/student.jsonl", "runs/events.out", "figures/other.png", "model.safetensors.bak", "global_step1/x.json",
    ):  # fmt: skip
        assert not is_allowed(name), name
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("x")
    (copy / "recipe.yaml").write_text("# a comment\n")  # of the folder; the effective one is given
    (copy / "metrics.json").write_text("{}")
    assert staged(copy, tmp_path / "target") == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert all(is_allowed(name.replace("*", "00001")) for name in ALLOWED)
    assert not is_allowed("a/model.safetensors") and not is_allowed("model-1/of-2.safetensors")


def test_weights_are_linked_and_what_is_rewritten_is_not_the_original(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/anna/models/small"}))
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "name_or_path": "/home/anna/models/small"}))
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    target = tmp_path / "target"
    staged(copy, target, end_tokens=[7])
    assert (target / "model.safetensors").stat().st_ino == (copy / "model.safetensors").stat().st_ino
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert json.loads((target / "config.json").read_text()) == {**config, "_name_or_path": "small"}
    assert json.loads((target / "tokenizer_config.json").read_text()) == {**tokenizer, "name_or_path": "small"}
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [7, 2]


def test_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("of somebody")
    (copy / "vocab.txt").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match=r"vocab.txt: is a link to a file elsewhere"):
        staged(copy, tmp_path / "target")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("rows in /home/anna/acme/rows.jsonl, and", "rows in rows.jsonl, and"),
        ("at /home/anna.", "at ~."),
        ("(~/acme/x)", "(x)"),
        ("~/x", "x"),
        ("see file:///Users/anna/a/b/", "see b"),
        ("C:\\Users\\anna\\x.txt", "x.txt"),
        ("https://host/home/anna/x and/or ~5/10 of a/b, ~~c/d~~, /think", None),
    ],
)
def test_paths_within_a_text_lose_their_folders(text: str, cleaned: str | None) -> None:
    assert without_folders(text) == (text if cleaned is None else cleaned)


def test_what_nobody_looks_at_carries_nothing_out(copy: Path, tmp_path: Path) -> None:
    """Keys that are none of ours, and paths in the middle of a text."""
    facts = {
        "format": 1,
        "prompt_template": "chat",
        "note": "rows of Ruritania",
        "protocol": {"name": "in /home/anna/x"},
    }
    (copy / "dts_hf.json").write_text(json.dumps(facts))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "note": ["from /home/anna/x"]}))
    metrics = {
        "models": {"student": {"parameters": 1}, "Ruritania": {}},
        "training": {"steps": 2, "rows": "Ruritania"},
    }
    target = tmp_path / "target"
    staged(copy, target, metrics={**metrics, "rows": ["Ruritania"]})
    texts = "".join(path.read_text() for path in target.iterdir() if path.suffix in (".json", ".md", ".jinja"))
    assert "anna" not in texts and "Ruritania" not in texts
    made = json.loads((target / "dts_hf.json").read_text())
    assert made == {"format": 1, "prompt_template": "chat", "protocol": {"name": "in x"}}
    expected = {"models": {"student": {"parameters": 1}}, "training": {"steps": 2}}
    assert json.loads((target / "metrics.json").read_text()) == expected


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "dts_hf.json"])
def test_json_that_is_no_object_is_not_sent_as_it_is(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).write_text('["/home/anna"]')
    with pytest.raises(UserError, match=f"^{name}: expected a JSON object, got list"):
        staged(copy, tmp_path / "target")


def test_text_in_the_head_of_the_weights_is_refused(copy: Path, tmp_path: Path) -> None:
    weights = {"a": torch.zeros(2)}
    save_file(
        weights, copy / "model.safetensors", metadata={"format": "pt", "b": "a"}
    )  # as save_model notes tied ones
    staged(copy, tmp_path / "target")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt", "note": "rows of Ruritania"})
    with pytest.raises(UserError, match=r"^model.safetensors: its head holds 'note' beside the format"):
        staged(copy, tmp_path / "other")


def test_generation_ends_where_the_chat_template_ends_a_turn(student: Path) -> None:
    assert end_tokens(student, "auto") == end_tokens(student, "chat") == [2]  # <|im_end|>
    assert end_tokens(student.parent, "auto") == []


def test_the_end_of_a_turn_goes_with_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert "generation_config.json" in staged(tmp_path, tmp_path / "target", end_tokens=[2, 5])
    assert json.loads((tmp_path / "target" / "generation_config.json").read_text()) == {"eos_token_id": [2, 5]}


def test_nobody_waits_for_a_machine_that_is_to_stay_offline() -> None:
    offline = OfflineModeIsEnabled("HF_HUB_OFFLINE=1")
    assert is_connection(offline) and not is_transient(offline) and is_transient(ConnectionError())


def test_the_recipe_has_no_folders_no_tokens_and_is_one() -> None:
    recipe = Recipe.from_dict(
        {
            "student": {"model": "org/small"},
            "teacher": {"model": "/home/anna/big"},
            "data": {
                "train": ["~/secret/a.jsonl", "org/rows:de"],
                "validation": "C:\\anna\\b.jsonl",
                "on_policy": {"backend": "vllm", "vllm_url": "http://gpu-7.secret", "vllm_folder": "w", "top_p": 0.9},
            },
            "training": {"run_name": "x", "max_steps": 1},
            "output": {"dir": "../runs/x"},
        }
    )
    text = public_recipe(recipe.model_dump(mode="json"))
    made = yaml.safe_load(text)
    assert made["student"]["model"] == "org/small" and made["teacher"]["model"] == "big"
    assert made["data"]["train"] == ["a.jsonl", "org/rows:de"] and made["data"]["validation"] == "b.jsonl"
    assert made["data"]["on_policy"]["top_p"] == 0.9 and "vllm_" not in text
    assert made["output"]["dir"] == "x" and "anna" not in text and "secret" not in text
    assert Recipe.from_dict(made).student.model == "org/small"


# --------------------------------------------------------------------------------------------------------- licences


def card(folder: Path, **values: Any) -> str:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(values)}---\n# It\n")
    return str(folder)


@pytest.mark.parametrize(
    ("student", "teacher", "expected", "warnings"),
    [
        ("mit", "mit", {"license": "mit"}, []),
        ("apache-2.0", "mit", {"license": "apache-2.0"}, []),
        (None, "apache-2.0", {"license": "apache-2.0"}, []),
        (None, None, {}, []),
        ("apache-2.0", "gemma", {"license": "gemma"}, ["Google's Gemma terms"]),
        ("cc-by-nc-4.0", "mit", {"license": "cc-by-nc-4.0"}, ["no commercial use"]),
        (
            "llama3.2",
            "gemma",
            {"license": "other", "license_name": "llama3.2-and-gemma"},
            ["Built with Llama", "Gemma"],
        ),
    ],
)
def test_the_licence_is_inherited_and_the_one_that_restricts_wins(
    tmp_path: Path, student: Any, teacher: Any, expected: dict[str, str], warnings: list[str]
) -> None:
    models = [
        (card(tmp_path / name, **({"license": licence} if licence else {})), None)
        for name, licence in (("student", student), ("teacher", teacher))
    ]
    found = inherited(models)
    assert found.metadata() == expected and len(found.warnings) == len(warnings)
    assert all(words in said for words, said in zip(warnings, found.warnings, strict=True))
    assert str(tmp_path) not in " ".join(found.sentences())


def test_a_licence_of_its_own_keeps_its_name_and_languages_add_up(tmp_path: Path) -> None:
    own = {"license": "other", "license_name": "acme-research", "license_link": "https://acme/licence"}
    one = card(tmp_path / "one", **own, language=["en", "de"])
    found = inherited([(one, None), (card(tmp_path / "two", license="mit", language="fr"), None)])
    assert found.metadata() == {**own, "language": ["en", "de", "fr"]} and "research alone" in found.warnings[0]
    (tmp_path / "one" / "README.md").write_text("---\n: [broken\n---\n")
    assert inherited([(one, None), ("not/here", None)]) == Inherited((Origin(one), Origin("not/here")))


def test_a_gguf_file_says_its_licence_at_a_push(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = str(tmp_path / "small.gguf")
    assert inherited([(model, None)], online=True).metadata() == {"license": "apache-2.0", "language": ["en"]}
    assert (
        inherited([(model, None)]).metadata()
        == {}
        == inherited([("package:no_such/x.gguf", None)], online=True).metadata()
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, tmp_path / "home") as running:
        yield running


def test_the_hub_is_asked_only_where_a_push_goes_on(hub: FakeHub) -> None:
    text = b"---\nlicense: llama3.2\nlanguage: en\n---\n"
    hub.repositories["org/teacher"] = Repository(False, {"main": {"README.md": text}})
    assert inherited([("org/teacher", None)]).metadata() == {} and not hub.requests
    assert inherited([("org/teacher", None)], online=True).metadata() == {"license": "llama3.2", "language": ["en"]}
    assert inherited([("org/gone", None)], online=True).metadata() == {}


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: other\nlicense_name: 1.1", {"license": "other", "license_name": "1.1"}),
        ("license: other\nlicense_name: [a, b]", {"license": "other", "license_name": "a"}),
        ("license: {a: b}\nlanguage: 5", {}),
        ("language: {a: 1}", {}),
        ("language: no", {"language": ["no"]}),
        ("license: 'x` <b>\n\n  # Evil\n\n  '", {"license": "x b"}),
        ("license: other\nlicense_name: |\n  a\n  # Evil", {"license": "other", "license_name": "a"}),
        ("license: other\nlicense_link: /home/anna/LICENSE", {"license": "other"}),
    ],
)
def test_a_strangers_card_neither_ends_a_run_nor_writes_ours(
    tmp_path: Path, head: str, expected: dict[str, str]
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    found = inherited([(str(tmp_path), None)])
    assert found.metadata() == expected
    said = "\n".join((*found.sentences(), *found.warnings))
    assert not re.search(r"[<>]|Evil|anna", said)
