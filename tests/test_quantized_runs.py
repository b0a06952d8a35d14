"""A run whose student is trained for its quantised form, and what ``dts-hf export`` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.distill import distill
from dts_hf.doctor.run import diagnose
from dts_hf.errors import RunError, UserError
from dts_hf.hub.staging import stage
from dts_hf.language_modeling import export
from dts_hf.language_modeling.export import ExportOptions, export_quantized
from dts_hf.models.fake_quantization import TRAINED_FOR, prepare_for_quantization
from dts_hf.models.loading import load_model
from dts_hf.models.quantization import stored
from dts_hf.recipe.schema import Recipe
from dts_hf.reporting.facts import describe_student, gather
from dts_hf.runs.directory import RunDirectory
from tests.support.quantized import INT4, SCHEMES, needs_torchao
from tests.support.recipes import recipe, write_rows
from tests.support.tiny import tiny_llama, tiny_tokenizer

IDS = torch.tensor([[5, 60, 290, 17, 9, 41, 8, 100], [7, 3, 12, 200, 31, 4, 99, 6]])
INT8 = {"scheme": "int8_weight_only", "group_size": 32}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def values(**student: Any) -> dict[str, Any]:
    return {
        "student": {"model": "m", **student},
        "teacher": {"model": "t"},
        "data": {"train": "rows.jsonl"},
        "output": {"dir": "run"},
    }


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture()
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_llama(layers=3, seed=1).save_pretrained("teacher")
    tiny_llama(seed=5).save_pretrained("student")
    for name in ("teacher", "student"):
        tiny_tokenizer().save_pretrained(name)
    write_rows(tmp_path / "train.jsonl", 0, 12)
    write_rows(tmp_path / "valid.jsonl", 50, 5)
    return tmp_path


def a_run(**student: Any) -> RunDirectory:
    sections: dict[str, Any] = {"training": {"max_steps": 2, "learning_rate": 1e-2}, "evaluation": {"rows": 2}}
    return distill(recipe(student={"model": "student", **student}, **sections))


# ------------------------------------------------------------------------------------------------------------ the recipe


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"quantize": {"scheme": "int4"}}, r"student.quantize.scheme: got .int4., expected one of .int4_weight_only."),
        (
            {"quantize": {"scheme": "int4_weight_only", "group_size": 1}},
            r"student.quantize.group_size: got 1, expected",
        ),
        ({"quantize": {}}, r"student.quantize.scheme: is missing"),
        (
            {"quantize": {"scheme": "int4_weight_only", "groupsize": 8}},
            r"groupsize: unknown key.*group_size",
        ),
        ({"quantize": INT4, "lora": {"r": 2}}, r"student: got quantize and lora.*train with lora first"),
    ],
)
def test_a_wrong_section_is_refused_by_key_and_value(student: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Recipe.from_dict(values(**student))


def test_a_classifier_has_no_quantised_form() -> None:
    sections = {**values(quantize=INT4), "task": {"name": "glue", "subset": "sst2"}}
    with pytest.raises(UserError, match=r"student.quantize: is for language models"):
        Recipe.from_dict(sections)


def test_defaults_are_said_once() -> None:
    section = Recipe.from_dict(values(quantize={"scheme": "int4_weight_only"})).student.quantize
    assert section is not None and section.model_dump() == INT4
    assert Recipe.from_dict(values()).student.quantize is None


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    tiny_llama(seed=5).save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_an_output_that_is_not_ours_is_left_alone(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    options = ExportOptions(scheme="int4_weight_only", overwrite=True)
    for out, expected in (
        (folder, "is not empty and holds no quantised student"),
        (folder / "config.json", "is a file, expected a folder"),
        (folder / ("x" * 300), "has 300 bytes"),
    ):
        with pytest.raises(UserError, match=f"--output: .*{expected}"):
            export_quantized(folder, out, options)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(UserError, match="is a link"):
        export_quantized(folder, tmp_path / "link", options)
    assert files(folder) == before


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_what_is_no_export_is_never_replaced(folder: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "mine"
    (out / ".git").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    expected = "holds '.git', which is of no export" if method == "torchao" else "holds no quantised student"
    with pytest.raises(UserError, match=expected):
        export_quantized(folder, out, ExportOptions(scheme="int4_weight_only", overwrite=True))
    with pytest.raises(UserError, match="is inside of"):
        export_quantized(folder, folder / "small", ExportOptions(scheme="int4_weight_only"))


def test_a_folder_says_what_it_is_for_or_the_command_does(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it was trained for no quantised form: give --scheme"):
        export_quantized(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"--quantized.scheme: got .int3., expected one of"):
        export_quantized(folder, tmp_path / "out", ExportOptions(scheme="int3"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, TRAINED_FOR: {"scheme": "other", "group_size": None}}))
    with pytest.raises(UserError, match="in a way that dts_hf does not know: give --scheme"):
        export_quantized(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(UserError, match="its weights are quantised already"):
        export_quantized(folder, tmp_path / "out", ExportOptions(scheme="int4_weight_only"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, expected whole weights"):
        export_quantized(folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no config.json"):
        export_quantized(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_form_is_asked_for(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(folder), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2 and "--quantized: is missing" in result.output


def test_without_torchao_nothing_is_loaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dts_hf.models.fake_quantization.is_torchao_available", lambda: False)
    with pytest.raises(UserError, match="needs the package torchao"):
        export_quantized(folder, tmp_path / "out", ExportOptions(scheme="int4_weight_only"))


# ------------------------------------------------------------------------------------------------------- run and export


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_and_its_export(scheme: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = {"scheme": scheme, "group_size": 32}
    run = a_run(quantize=section)
    final = run.final_path
    assert json.loads((final / "config.json").read_text())[TRAINED_FOR] == section
    assert scheme in describe_student(gather(run)) and scheme in run.card_path.read_text()
    before = files(run.path)
    result = CliRunner().invoke(app, ["export", str(run.path), "--quantized", "--output", "small", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["difference"] < 1e-5 and facts["trained_for"] and facts["quantize"] == section
    assert facts["size"] < facts["size_before"] and facts["rows"] == 5
    assert files(run.path) == before
    # As transformers loads it, bit for bit what training rounded in every forward
    loaded = AutoModelForCausalLM.from_pretrained("small")
    rounded = load_model(str(final), key="model")
    prepare_for_quantization(rounded, section)
    assert torch.allclose(logits(loaded), logits(rounded), atol=1e-5)
    packed = {name for name, weight in loaded.named_parameters() if stored(weight) is not weight}
    assert packed == {name for name, _ in loaded.named_parameters() if "_proj" in name}
    assert {path.suffix for path in Path("small").iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    # What is uploaded holds no path of this machine, and is evaluated as the run's student was
    staged = stage(Path("small"), Path("staged"), card=Path("small/README.md").read_text())
    assert "model.safetensors" in staged.names
    for name in staged.names:
        assert str(workplace).encode() not in (staged.folder / name).read_bytes(), name
    assert "## Quantised form" in Path("small/README.md").read_text()
    again = CliRunner().invoke(
        app, ["evaluate", "small", "--data", "valid.jsonl", "--output", "scores", "--rows", "2"]
    )
    assert again.exit_code == 0, again.output


@needs_torchao
def test_an_export_is_replaced_when_asked_and_whole_or_not_there(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = a_run(quantize=INT4), Path("small")
    export_quantized(run.path, out)
    before = files(out)
    with pytest.raises(UserError, match=r"holds a quantised student.*--overwrite"):
        export_quantized(run.path, out)
    # The loss of what would be written is another one: nothing of it is written
    with monkeypatch.context() as patched:
        patched.setattr(export, "CLOSE", -1.0)
        with pytest.raises(RunError, match="apart, so nothing is written"):
            export_quantized(run.path, out, ExportOptions(overwrite=True))
        with pytest.raises(RunError, match="apart"):
            export_quantized(run.path, Path("other"))
    assert files(out) == before and not Path("other").exists()

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("dts_hf.models.saving.flush_tree", full_disk)
        with pytest.raises(OSError, match="No space"):
            export_quantized(run.path, out, ExportOptions(overwrite=True))
    assert files(out) == before and [path.name for path in out.parent.glob(".small*")] == []
    found = export_quantized(run.path, out, ExportOptions(scheme="int8_weight_only", overwrite=True))
    assert not found.trained_for and files(out) != before
    with pytest.raises(UserError, match="its weights are quantised already"):
        export_quantized(out, Path("twice"), ExportOptions(scheme="int4_weight_only"))


@needs_torchao
def test_a_folder_without_its_run_needs_rows(workplace: Path) -> None:
    with pytest.raises(UserError, match="--data: student is no run directory"):
        export_quantized(Path("student"), Path("small"), ExportOptions(scheme="int4_weight_only"))
    options = ExportOptions(scheme="int4_weight_only", group_size=0, data=Path("valid.jsonl"), dtype="bfloat16")
    found = export_quantized(Path("student"), Path("small"), options)
    assert found.quantize.group_size is None and not found.trained_for and found.difference < 0.01
    assert "it was not trained for this form" in Path("small/README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained("small")
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16


@needs_torchao
@pytest.mark.parametrize(
    ("student", "key"),
    [({"model": "small"}, "student.model"), ({"init": {"from": "./small", "layers": 1}}, "init.from")],
)
def test_an_export_is_no_student(student: dict[str, Any], key: str, workplace: Path) -> None:
    options = ExportOptions(scheme="int4_weight_only", data=Path("valid.jsonl"))
    export_quantized(Path("student"), Path("small"), options)
    with pytest.raises(UserError, match=f"{key}: the weights of LlamaForCausalLM are quantised"):
        distill(recipe(student=student, training={"max_steps": 1}, evaluation={"rows": 1}))


@needs_torchao
def test_the_layers_that_are_converted_are_those_that_were_rounded(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TorchAoConfig

    def some(config: Any) -> Any:
        return TorchAoConfig(config, modules_to_not_convert=["lm_head", "model.layers.0.mlp.up_proj"])

    monkeypatch.setattr(export, "TorchAoConfig", some)
    options = ExportOptions(scheme="int4_weight_only", data=Path("valid.jsonl"))
    with pytest.raises(RunError, match=r"quantises other layers.*up_proj.weight, so nothing is written"):
        export_quantized(Path("student"), Path("small"), options)
    assert not Path("small").exists()


@needs_torchao
def test_a_head_that_says_more_than_torchao_does_is_not_uploaded(workplace: Path) -> None:
    options = ExportOptions(scheme="int4_weight_only", data=Path("valid.jsonl"))
    export_quantized(Path("student"), Path("small"), options)
    weights = load_file("small/model.safetensors")
    for number, planted in enumerate(
        (
            {"tensor_names": '["a text, with words"]'},
            {"note": '["x"]'},
            {"x": '{"_type": "Tensor", "said": "/home/me"}'},
        )
    ):
        save_file(weights, "small/model.safetensors", metadata={"format": "pt", **planted})
        with pytest.raises(UserError, match="its head holds"):
            stage(Path("small"), Path(f"staged{number}"), card="# card\n")


# ----------------------------------------------------------------------------------------------------------- the doctor


@needs_torchao
def test_the_doctor_says_what_rounding_costs(workplace: Path) -> None:
    def found(section: dict[str, Any]) -> Any:
        Path("recipe.yaml").write_text(recipe(student={"model": "student", "quantize": section}).to_yaml())
        check = diagnose(Path("recipe.yaml"))["quantized-student"]
        assert check.status == "ok"
        return check

    four, eight = found(INT4), found(INT8)
    assert 0 < eight.values["kl"] < four.values["kl"] and four.values["labels"] > 0
    assert four.summary.startswith("int4_weight_only, group 32: KL ") and "before training" in four.summary
