"""The recipe: what is accepted, what the message says when it is not, and that nothing is lost on the way to disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dts_hf.cli.app import app
from dts_hf.data.columns import FIELDS
from dts_hf.distill import distill
from dts_hf.doctor.run import diagnose
from dts_hf.errors import UserError
from dts_hf.recipe.editor_schema import editor_schema
from dts_hf.recipe.loading import load_recipe
from dts_hf.recipe.schema import Recipe, Source, recipe_json_schema
from dts_hf.recipe.shipped import find_recipes
from dts_hf.recipe.training_arguments import training_arguments

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MINIMAL = """\
student: {init: {from: teacher, layers: 12}}
teacher: {model: some/teacher}
data: {train: rows.jsonl}
output: {dir: runs/x}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


# ---------------------------------------------------------------------------------------------------- what is accepted


def test_defaults(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.student.init is not None and recipe.student.init.layers == 12
    assert recipe.temperature.name == "dts" and recipe.temperature.options == {"rule": "gap"}
    assert recipe.loss.divergence.name == "forward_kl" and recipe.loss.kd_ratio == 0.5
    assert recipe.evaluation.models == ["teacher", "student_before", "student"]
    assert recipe.training == {}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-04", "0.0001", ".1e-3"])
def test_scientific_notation_is_a_number(minimal: Path, text: str) -> None:
    value = load_recipe(minimal, [f"training.learning_rate={text}"]).training["learning_rate"]
    assert isinstance(value, float) and value == pytest.approx(1e-4)


def test_words_that_old_yaml_turns_into_something_else_stay_words(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["training.eval_strategy=no", "student.init=null", "student.model=2026-01-01"])
    assert recipe.training["eval_strategy"] == "no"
    assert recipe.student.model == "2026-01-01"


def test_a_name_alone_is_short_for_a_mapping(minimal: Path) -> None:
    recipe = load_recipe(minimal, ["loss.divergence=reverse_kl", "temperature=constant"])
    assert recipe.loss.divergence.model_dump() == {"name": "reverse_kl"}
    assert recipe.temperature.model_dump() == {"name": "constant"}
    assert Recipe.from_dict(recipe.model_dump()) == recipe


@pytest.mark.parametrize("order", [1, -1])
def test_another_name_drops_the_options_of_the_old_one(minimal: Path, order: int) -> None:
    overrides = ["temperature.name=constant", "temperature.value=4"][::order]
    assert load_recipe(minimal, overrides).temperature.model_dump() == {"name": "constant", "value": 4}


def test_yaml_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = MINIMAL + "training: &t {seed: 1, max_steps: 3}\nevaluation: {rows: 2}\n"
    recipe = load_recipe(write(tmp_path, text.replace("{seed: 1", "{<<: {seed: 9, warmup_steps: 2}, seed: 1")))
    assert recipe.training == {"seed": 1, "max_steps": 3, "warmup_steps": 2}


# ---------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student.init=null", "student.model=./local", "student.lora={r: 4}", "data.train=[a.jsonl, ../b.jsonl]"],
        ["training.learning_rate=1e-5", "training.eval_strategy=no", "training.report_to=[a, b]", "data.packing=true"],
        ["data.packing={tokens: 8192}"],
        ["student.init.layers=[0, 3, 7]", "temperature={name: constant, value: 2}", "loss.kd_ratio=1"],
        ["teacher.revision='12e4567'", "student.revision='007'", "teacher.tokenizer='null'", "output.dir='a: b # c'"],
        [
            "evaluation.rows=null",
            "evaluation.seeds=[10, 20]",
            "evaluation.do_sample=true",
            "evaluation.dtype=bfloat16",
        ],
        ["loss.divergence={name: jsd, beta: 0.1}", "data.validation='ünïcode ✓.jsonl'", "training.run_name='1_0'"],
    ],
)
def test_effective_recipe_loads_again_to_an_equal_one(minimal: Path, tmp_path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(minimal, overrides)
    saved = write(tmp_path, recipe.to_yaml(), "saved.yaml")
    again = load_recipe(saved)
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    # Plain PyYAML reads the same values: other tools need no special loader.
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_every_field_is_written_with_unset_ones_as_null(minimal: Path) -> None:
    written = yaml.safe_load(load_recipe(minimal).to_yaml())
    assert set(written) == set(Recipe.model_fields)
    assert written["student"]["lora"] is None and written["student"]["init"]["from"] == "teacher"
    assert written["evaluation"]["rows"] == 64


def test_recipes_are_frozen(minimal: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(minimal).loss.kd_ratio = 0.1  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------------- paths and bases


def test_dot_paths_belong_to_the_file_and_overrides_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "recipes", MINIMAL.replace("rows.jsonl", "./data/rows.jsonl, validation: v.jsonl"))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/recipe.yaml", ["teacher.tokenizer=./tok", "evaluation.sets=[dolly, ../x.jsonl]"])
    assert (recipe.data.train, recipe.data.validation) == ("recipes/data/rows.jsonl", "v.jsonl")
    assert recipe.teacher.tokenizer == "tok" and recipe.evaluation.sets == ["dolly", str(tmp_path.parent / "x.jsonl")]
    sets = write(tmp_path / "recipes", "extends: recipe.yaml\nevaluation: {sets: [./x.jsonl, y.jsonl]}\n", "sets.yaml")
    assert load_recipe(sets).evaluation.sets == ["recipes/x.jsonl", "y.jsonl"]
    mixed = "extends: recipe.yaml\ndata: {train: [{source: ./a.jsonl, weight: 2}, ../b.jsonl], validation: {source: ./c}}\n"
    data = load_recipe(write(tmp_path / "recipes", mixed, "mixed.yaml")).data
    assert data.train == [Source(source="recipes/a.jsonl", weight=2), "b.jsonl"]
    assert data.validation == Source(source="recipes/c")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe("../recipes/recipe.yaml").data.train == str(tmp_path / "recipes/data/rows.jsonl")


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write(
        tmp_path / "bases", MINIMAL + "training: {seed: 1, max_steps: 5}\nevaluation: {seeds: [1, 2]}\n", "_base.yaml"
    )
    write(tmp_path, "extends: bases/_base.yaml\ntraining: {seed: 2}\nevaluation: {seeds: [3]}\n", "middle.yaml")
    top = write(tmp_path, "extends: middle.yaml\nstudent: {init: null, model: m}\ntemperature: cosine\n", "top.yaml")
    recipe = load_recipe(top, ["training.max_steps=7"])
    assert recipe.training == {"seed": 2, "max_steps": 7}
    assert recipe.evaluation.seeds == [3]
    assert recipe.student.model == "m" and recipe.student.init is None
    assert recipe.temperature.model_dump() == {"name": "cosine"}


def test_extends_cycle(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "extends itself through" in message(tmp_path / "a.yaml")


def test_problems_name_the_file_that_brought_them(tmp_path: Path) -> None:
    base = write(tmp_path, MINIMAL + "loss: {kd_ratio: 3}\n", "base.yaml")
    top = write(tmp_path, "extends: base.yaml\nevaluation: {rows: 0}\n", "top.yaml")
    lines = message(top, "teacher.dtype=int8").splitlines()
    assert f"{base}: loss.kd_ratio: got 3, expected a number between 0 and 1" in lines
    assert f"{top}: evaluation.rows: got 0, expected a whole number of at least 1 or null" in lines
    assert any(line.startswith('command line: teacher.dtype: got "int8", expected one of "float32"') for line in lines)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainning.seed=1", "trainning: unknown key. Did you mean 'training'?"),
        ("data.max_lenght=1", "data.max_lenght: unknown key. Did you mean 'max_length'?"),
        ("student.lora={alpah: 1}", "student.lora.alpah: unknown key. Did you mean 'alpha'?"),
        ("learning_rate=1", "Did you mean 'training.learning_rate'?"),
        ("data.logits_budget_mb=1", "Did you mean 'loss.logits_budget_mb'?"),
        ("loss.kd_ratio=1.5", "loss.kd_ratio: got 1.5, expected a number between 0 and 1"),
        ("loss.kd_ratio=.nan", "loss.kd_ratio: got NaN, expected a number between 0 and 1"),
        ("loss.kd_ratio='0.5'", 'loss.kd_ratio: got "0.5", expected a number between 0 and 1'),
        ("loss.kd_ratio=true", "loss.kd_ratio: got true, expected a number between 0 and 1"),
        ("data.max_length=0", "data.max_length: got 0, expected a whole number of at least 1"),
        ("data.max_length=12.5", "data.max_length: got 12.5, expected a whole number of at least 1"),
        ("data.max_length=200", "data: max_prompt_length is 256, expected less than max_length (200)"),
        ("data.packing=yes", 'data.packing: got "yes", expected true or false or a mapping with tokens'),
        ("data.packing={tokens: 0}", "data.packing.tokens: got 0, expected a whole number between 1 and 1,000,000"),
        ("data.packing={tokens: 9, token: 9}", "data.packing.token: unknown key. Did you mean 'tokens'?"),
        ("data.packing={}", "data.packing.tokens: is missing, expected a whole number"),
        ("data.prompt_template=alpacca", "\"plain\". Did you mean 'alpaca'?"),
        ("data.train=5", "data.train: got 5, expected text or a list of at least one item, each text"),
        ("data.train=[]", "data.train: got [], expected text or a list of at least one item, each text"),
        ("data.train=null", "data.train: got null, expected text"),
        ("data.train=[{source: a, wieght: 2}]", "data.train.0.wieght: unknown key. Did you mean 'weight'?"),
        ("data.train=[a, {weight: 2}]", "data.train.1.source: is missing, expected text that is not empty"),
        (
            "data.train=[{source: a, weight: 0}]",
            "data.train.0.weight: got 0, expected a number above 0 and of at most 1000",
        ),
        ("data.train={source: a, columns: {promt: x}}", "data.train.columns: 'promt' is no field of ours"),
        (
            "data.validation={source: a, weight: 2}",
            "data: validation: the weight of a is 2, but held-out rows count once",
        ),
        ("data.columns={promt: x}", "data.columns: 'promt' is no field of ours, expected one of instruction, "),
        ("data.columns={promt: x}", "Did you mean 'prompt'?"),
        ("data.columns.prompt=5", "data.columns.prompt: got 5, expected text or null. Put it in quotes."),
        ("data.columns=[prompt]", 'data.columns: got ["prompt"], expected a mapping'),
        ("data=null", "data: got null, expected a mapping with train, validation"),
        ("data=rows.jsonl", 'data: got "rows.jsonl", expected a mapping with train, validation'),
        ("teacher.revision=1234567", "teacher.revision: got 1234567, expected text or null. Put it in quotes."),
        ("student.init.layers=[1, a]", 'student.init.layers.1: got "a", expected a whole number of at least 0'),
        ("student.init.layers=0", "student.init.layers: got 0, expected a whole number of at least 1 or a list"),
        ("student.model=m", "student: give exactly one of 'model' and 'init', got both"),
        ("student.init=null", "student: give exactly one of 'model' and 'init', got neither"),
        ("student.lora={r: 0}", "student.lora.r: got 0, expected a whole number of at least 1"),
        ("evaluation.protocol=chat", 'evaluation.protocol: got "chat", expected one of "minillm", "no_ngram"'),
        ("evaluation.seeds=[]", "evaluation.seeds: got [], expected a list of at least one item"),
        ("evaluation.models=[studnt]", "Did you mean 'student'?"),
        ("evaluation.every_steps=5", "evaluation.every_steps needs validation rows"),
        ("temperature.name=dtss", "temperature.name: got 'dtss'"),
        ("temperature={name: dts, t_int: 1}", "temperature.t_int: unknown option"),
        ("temperature={name: dts, t_min: 0}", "temperature.t_min: got 0"),
        ("temperature={rule: gap, name: null}", "temperature.name: got null, expected text"),
        ("loss.divergence=forward_k", "Did you mean 'forward_kl'?"),
        ("loss.divergence={name: jsd, bta: 0.5}", "loss.divergence.bta: unknown option"),
        ("training=fast", 'training: got "fast", expected a mapping'),
        ("training.lerning_rate=1", "training.lerning_rate: transformers.TrainingArguments has no such key."),
        ("training.lerning_rate=1", "Did you mean 'learning_rate'?"),
        ("training.kd_ratio=1", "Did you mean 'loss.kd_ratio'?"),
        ("training.learning_rate=fast", 'training.learning_rate: got "fast", expected a number'),
        ("training.learning_rate=-1", "training.learning_rate: got -1, expected a number between 0 and 1,000"),
        ("training.per_device_train_batch_size=0", "got 0, expected a whole number of at least 1"),
        ("training.per_device_train_batch_size=1.5", "got 1.5, expected a whole number"),
        ("training.bf16=1", "training.bf16: got 1, expected true or false"),
        ("training.lr_scheduler_type=cosin", "Did you mean 'cosine'?"),
        ("training.train_sampling_strategy=randm", "Did you mean 'random'?"),
        ("training.output_dir=x", "training.output_dir: not allowed here: it is the run directory, set output.dir"),
        ("training.hub_token=hf_x", "training.hub_token: not allowed here"),
        ("training.group_by_length=true", "use train_sampling_strategy: group_by_length"),
    ],
)
def test_wrong_values(minimal: Path, override: str, expected: str) -> None:
    text = message(minimal, override)
    assert expected in text
    assert text.startswith(("command line: ", f"{minimal}: ")) and "\n" not in text


def test_a_task_has_no_columns_and_no_weights(minimal: Path) -> None:
    task = "task={name: glue, subset: rte}"
    assert "data.columns: belongs to generated answers" in message(minimal, task, "data.columns={prompt: x}")
    assert "data.train: got a mapping, but" in message(minimal, task, "data.train=[a, {source: b}]")
    assert "data.validation: got a mapping, but" in message(minimal, task, "data.validation={source: b}")


def test_columns_and_sources_in_the_editor(minimal: Path) -> None:
    """What an editor marks is what the loader refuses."""
    schema = recipe_json_schema()["$defs"]
    assert schema["Data"]["properties"]["columns"]["propertyNames"]["enum"] == list(FIELDS)
    assert all("description" in value for value in schema["Source"]["properties"].values())
    made = load_recipe(minimal, ["data.columns={prompt: question_text, completion: gold, images: null}"])
    assert made.data.columns == {"prompt": "question_text", "completion": "gold", "images": None}
    assert Recipe.from_dict(yaml.safe_load(made.to_yaml())) == made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", 'got ["a", "b"], expected a mapping of sections'),
        ("just words\n", "expected a mapping of sections"),
        ("student:\n  model: [a\nteacher: x\n", "line 3, column "),
        ("student:\n\tmodel: a\n", "line 2, column 1: broken YAML"),
        (MINIMAL + "data: {train: x}\n", 'line 5, column 1: broken YAML: key "data" appears twice'),
        (
            MINIMAL + "loss:\n  kd_ratio: 1\n  kd_ratio: 0\n",
            'line 7, column 3: broken YAML: key "kd_ratio" appears twice',
        ),
        (MINIMAL + "loss: {1: 2}\n", "key 1 is not a name"),
        (MINIMAL + "---\nstudent: 1\n", "broken YAML"),
        (MINIMAL + "loss: !!python/name:os.system\n", "broken YAML"),
        (MINIMAL + "extends: 3\n", "extends: got 3, expected the file name of another recipe"),
        (MINIMAL + "extends: nowhere.yaml\n", "nowhere.yaml: no such recipe file."),
        ("student: {model: m}\n", "data: is missing, expected a mapping with train"),
        (MINIMAL.replace("model: some/teacher", "dtype: float32"), "teacher.model: is missing, expected text"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(write(tmp_path, text))


def test_files_that_cannot_be_read(minimal: Path, tmp_path: Path) -> None:
    assert (
        message(tmp_path / "recpe.yaml")
        == f"{tmp_path / 'recpe.yaml'}: no such recipe file. Did you mean 'recipe.yaml'?"
    )
    assert "cannot read this recipe" in message(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"student: \xe9\n")
    assert "not UTF-8 text" in message(tmp_path / "latin.yaml")


@pytest.mark.parametrize("override", ["loss.kd_ratio", "=1", "loss..kd_ratio=1", ".a=1"])
def test_malformed_overrides(minimal: Path, override: str) -> None:
    assert f"override {override!r}: expected key=value" in message(minimal, override)


def test_override_with_broken_yaml(minimal: Path) -> None:
    assert "override 'data.train=[a': line 1" in message(minimal, "data.train=[a")


def test_all_problems_come_in_one_message(minimal: Path) -> None:
    text = message(minimal, "loss.kd_ratio=2", "training.sed=1", "temperature.rule=gapp", "data.trian=x")
    assert len(text.splitlines()) == 4


def test_from_dict_names_its_source_and_leaves_its_argument_alone() -> None:
    values: dict[str, Any] = yaml.safe_load(MINIMAL) | {"loss": {"kd_ratio": 2, "divergence": "jsd"}}
    before = copy.deepcopy(values)
    with pytest.raises(UserError, match=r"^my dict: loss.kd_ratio: got 2, expected a number between 0 and 1$"):
        Recipe.from_dict(values, "my dict")
    assert values == before


# ------------------------------------------------------------------------------------------------------------ training


def test_training_arguments_gets_our_defaults_and_the_recipe_wins(minimal: Path, tmp_path: Path) -> None:
    arguments = training_arguments(load_recipe(minimal, ["training.max_steps=3", "training.use_cpu=true"]), tmp_path)
    assert arguments.output_dir == str(tmp_path)
    assert (arguments.max_steps, arguments.report_to, arguments.remove_unused_columns) == (3, [], False)
    assert arguments.train_sampling_strategy == "group_by_length" and arguments.eval_strategy == "no"
    packed = load_recipe(minimal, ["data.packing=true", "data.validation=v.jsonl", "training.logging_steps=3"])
    arguments = training_arguments(packed, tmp_path)
    assert arguments.train_sampling_strategy == "random" and arguments.eval_strategy == "epoch"
    assert arguments.logging_steps == 3
    filled = load_recipe(minimal, ["data.packing.tokens=8192"])
    assert filled.data.pack_tokens == 8192 and packed.data.pack_tokens is None
    assert training_arguments(filled, tmp_path).train_sampling_strategy == "random"


def test_the_home_folder_of_a_run_directory(minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models and rows; a folder named ~ in the current one is never meant."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_recipe(minimal, ["output.dir=~/runs/x"]).output.dir == str(tmp_path / "home" / "runs" / "x")
    assert load_recipe(minimal, ["output.dir=./runs/x"]).output.dir == "./runs/x"


def test_a_tracker_without_its_package_is_refused_where_it_is_trained_alone(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded; a login node plans such runs, and needs no tracker."""
    import transformers.integrations

    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.chdir(tmp_path)
    reporting = ["training.report_to=[wandb, tensorboard]", "training.use_cpu=true"]
    asked = load_recipe(minimal, reporting)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Name a tree.", "output": "An oak."}))
    needed = "report_to: 'tensorboard' needs the package tensorboard: pip install tensorboard"
    with pytest.raises(UserError, match=needed):
        distill(asked)
    assert any(needed in problem.text for problem in diagnose(minimal, reporting).problems)
    varied = ["sweep", str(minimal), *reporting, "--set", "temperature=1,2", "--output", "out"]
    for how in (["--dry-run"], ["--print-commands"], ["--slurm", "array.sh"]):
        planned = CliRunner().invoke(app, [*varied, *how])
        assert planned.exit_code == 0, planned.output
    mistyped = CliRunner().invoke(app, [*varied[:2], "training.report_to=wandbb", *varied[4:], "--dry-run"])
    assert mistyped.exit_code == 2 and "Did you mean 'wandb'?" in mistyped.output


@pytest.mark.parametrize(("kind", "on_cpu"), [(None, True), ("cuda", False), ("xpu", False), ("mps", True)])
def test_a_recipe_takes_the_gpu_where_there_is_one(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None, on_cpu: bool
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
    cases = {"": on_cpu, "training.use_cpu=true": True, "training.use_cpu=false": False}
    recipes = [
        load_recipe(minimal, [given] if given else []) for given in cases
    ]  # it looks at the fields of the class
    monkeypatch.setattr("transformers.TrainingArguments", type("Arguments", (dict,), {"ddp_timeout": 1800}))
    for recipe, expected in zip(recipes, cases.values(), strict=True):
        assert training_arguments(recipe, tmp_path)["use_cpu"] is expected  # type: ignore[index]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training={fp16: true, bf16: true, use_cpu: true}", "fp16 and bf16"),
        (
            "training={load_best_model_at_end: true, save_strategy: steps, eval_strategy: epoch}",
            "load_best_model_at_end",
        ),
        ("training={deepspeed: nowhere.json}", "training: "),
    ],
)
def test_what_training_arguments_refuses_is_a_user_error(
    minimal: Path, tmp_path: Path, override: str, expected: str
) -> None:
    recipe = load_recipe(minimal, [override])
    with pytest.raises(UserError, match=r"^training: TrainingArguments refuses this: ") as caught:
        training_arguments(recipe, tmp_path)
    assert expected in str(caught.value)


# ----------------------------------------------------------------------------------------------------- schema, shipped


def test_every_field_has_a_description() -> None:
    schema = recipe_json_schema()
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        for field, node in section.get("properties", {}).items():
            assert node.get("description"), f"{name}.{field} has no description"


def test_editor_schema_knows_the_training_keys() -> None:
    schema = editor_schema()
    training = schema["properties"]["training"]["properties"]
    assert training["learning_rate"]["type"] == "number" and training["learning_rate"]["description"]
    assert "cosine" in training["lr_scheduler_type"]["enum"]
    assert "output_dir" not in training and "extends" in schema["properties"]
    # A recipe that extends another one leaves things out
    assert not any("required" in section for section in (schema, *schema["$defs"].values()))
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.name)) for path in find_recipes(RECIPES)])
def test_shipped_recipes_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_find_recipes_skips_bases_and_other_yaml(tmp_path: Path) -> None:
    write(tmp_path, "# A good one\n" + MINIMAL, "good.yaml")
    write(tmp_path, MINIMAL, "_base.yaml")
    write(tmp_path, "compute_environment: LOCAL_MACHINE\n", "accelerate.yaml")
    assert find_recipes(tmp_path) == {tmp_path / "good.yaml": "A good one"}


# ------------------------------------------------------------------------------------------------- runs that are replayed


def test_the_paths_of_recorded_runs_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    for temperature, place in (
        ("{name: replay, run: ../runs/a}", ("run",)),
        ("{name: cosine, match_mean_of: ./../runs/a}", ("match_mean_of",)),
        ("{name: dts, gap_source: {replay: ../runs/a, order: permuted}}", ("gap_source", "replay")),
    ):
        path = write(tmp_path / "recipes", f"{MINIMAL}\ntemperature: {temperature}\n")
        found: Any = load_recipe(path).temperature.options
        for key in place:
            found = found[key]
        assert found == "runs/a"
    overrides = [
        "temperature.name=dts",
        "temperature.gap_source={replay: runs/b}",
        "temperature.gap_source.order=blocks",
    ]
    assert load_recipe(path, overrides).temperature.options == {"gap_source": {"replay": "runs/b", "order": "blocks"}}
    given: dict[str, Any] = {"replay": "./x"}
    Recipe.from_dict({**yaml.safe_load(MINIMAL), "temperature": {"name": "dts", "gap_source": given}})
    assert given == {"replay": "./x"}  # the caller's own mapping stays as it was


def test_keys_of_gap_source_are_checked_by_name(minimal: Path) -> None:
    text = message(minimal, "temperature.name=dts", "temperature.gap_source={replay: a, ordr: permuted}")
    assert (
        "temperature.gap_source.ordr: unknown key, expected one of replay, order, block, held_out. Did you mean 'order'?"
        in text
    )
    for given in ("held_out", "{held_out: {every: 5}}"):
        text = message(minimal, "temperature.name=dts", f"temperature.gap_source={given}", "data.validation=null")
        assert "temperature.gap_source: got held_out, but there are no held-out rows; expected data.validation" in text
    text = message(minimal, "temperature.name=dts", "temperature.gap_source=shuffled")
    assert (
        "temperature.gap_source: got 'shuffled', expected measured, held_out, or {replay: RUN, order: permuted}"
        in text
    )
    mapping = recipe_json_schema()["$defs"]["NamedOptions"]["anyOf"][1]
    assert mapping["additionalProperties"] is True  # the options of a policy are its own matter


def test_a_missing_deepspeed_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"^training: DeepSpeed is asked for .* pip install 'dts-hf\[deepspeed\]'$"):
        training_arguments(load_recipe(RECIPES / "quickstart.yaml"), tmp_path)


def test_whole_numbers_may_be_written_as_floats(minimal: Path) -> None:
    overrides = ["training.max_steps=1e3", "training.seed=3.0", "data.max_length=400.0", "evaluation.seeds=[1.0, 2]"]
    recipe = load_recipe(minimal, [*overrides, "training.warmup_steps=2.0"])
    written = recipe.training["max_steps"], recipe.training["seed"], recipe.data.max_length, *recipe.evaluation.seeds
    assert written == (1000, 3, 400, 1, 2) and all(type(value) is int for value in written)
    assert type(recipe.training["warmup_steps"]) is float  # a share of all steps is one, too


@pytest.mark.parametrize(("value", "meant"), [("10%", "0.1"), ("'7.5 %'", "0.075"), ("'0.1'", "0.1")])
def test_a_share_that_is_no_number_is_not_taken_for_a_file(minimal: Path, value: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"data.validation: got .*, expected a share as a number .*: {meant}$"):
        load_recipe(minimal, [f"data.validation={value}"])


def test_a_mapping_extends_nothing(minimal: Path) -> None:
    with pytest.raises(UserError, match="extends: belongs to a recipe file") as caught:
        Recipe.from_dict({"extends": "base.yaml", **yaml.safe_load(minimal.read_text())})
    assert "Did you mean" not in str(caught.value)
