"""Launches that are not what they claim are refused; the files for ``accelerate launch`` say what they mean."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from transformers import TrainingArguments

from dts_hf.distributed.launch import STRATEGIES, check_launch, strategy_of, zero_options
from dts_hf.errors import UserError
from tests.support.launching import ROOT, environment
from tests.support.tiny import tiny_llama

RECIPES = ROOT / "recipes" / "accelerate"
LAUNCH_VARIABLES = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "FSDP_VERSION",
    "FSDP_CPU_RAM_EFFICIENT_LOADING", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS",
)  # fmt: skip


def arguments(world: int = 1, kind: str = "NO", **values):
    """What ``check_launch`` reads of ``TrainingArguments`` that a launch with ``world`` processes would give."""
    state = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    default = {"world_size": world, "n_gpu": 0, "use_cpu": True, "fsdp": None, "fsdp_plugin_args": None}
    return SimpleNamespace(**{**default, "distributed_state": state, "deepspeed_plugin": None, **values})


@pytest.fixture
def launched(monkeypatch):
    """Set the variables of a launch; every other one of a launcher is unset."""

    def by(**variables: str) -> None:
        for name in LAUNCH_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    by()
    return by


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
FSDP = {**TORCHRUN, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


@pytest.mark.parametrize(
    ("variables", "args"),
    [
        ({}, arguments()),
        ({"MASTER_ADDR": "node1"}, arguments()),  # exported by a person, no launcher
        (TORCHRUN, arguments(2, "MULTI_CPU")),
        ({**TORCHRUN, **ACCELERATE}, arguments(2, "MULTI_GPU", use_cpu=False)),
        ({**TORCHRUN, **ACCELERATE, "WORLD_SIZE": "1"}, arguments(1)),
        # srun starts one torchrun per node, which starts eight processes each
        ({**TORCHRUN, "WORLD_SIZE": "16", "SLURM_STEP_NUM_TASKS": "2"}, arguments(16, "MULTI_GPU")),
        ({"SLURM_STEP_NUM_TASKS": "1"}, arguments()),
        (FSDP, arguments(2, "MULTI_GPU")),
        (TORCHRUN, arguments(2, "MULTI_CPU", deepspeed_plugin=object())),
    ],
)
def test_launches_that_are_what_they_claim(launched, variables, args):
    launched(**variables)
    check_launch(args)


@pytest.mark.parametrize(
    ("variables", "args", "message"),
    [
        ({}, arguments(n_gpu=4), "nn.DataParallel cannot carry this loss.*--num_processes 4.*CUDA_VISIBLE_DEVICES=0"),
        (TORCHRUN, arguments(1, use_cpu=False), "WORLD_SIZE asks for 2 processes.*training.use_cpu=true"),
        ({"WORLD_SIZE": "8"}, arguments(), "WORLD_SIZE asks for 8.*torchrun --nproc_per_node 8"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, arguments(), "SLURM_STEP_NUM_TASKS asks for 4 processes.*runs alone"),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, arguments(), "OMPI_COMM_WORLD_SIZE asks for 3"),
        (
            {**ACCELERATE, "MASTER_ADDR": "127.0.0.1"},
            arguments(),
            "accelerate launch was asked for several.*dts-hf train",
        ),
        ({}, arguments(deepspeed_plugin=object()), "DeepSpeed needs a launcher.*torchrun --nproc_per_node 1"),
        (FSDP, arguments(2, "MULTI_CPU"), "on a CPU accelerate runs DDP instead.*zero3.yaml"),
        ({**FSDP, "FSDP_VERSION": "1"}, arguments(2, "MULTI_GPU"), "fsdp_version: got 1, expected 2"),
        (TORCHRUN, arguments(2, "MULTI_GPU", fsdp=True, fsdp_plugin_args={"fsdp_version": 1}), "got 1, expected 2"),
        (
            {**FSDP, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
            arguments(2, "MULTI_GPU", optim="sgd", save_strategy="steps"),
            "expected SHARDED_STATE_DICT, another optimizer",
        ),
        ({**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, arguments(2, "MULTI_GPU"), "got true, expected false"),
    ],
)
def test_launches_that_are_refused(launched, variables, args, message):
    launched(**variables)
    with pytest.raises(UserError, match=message):
        check_launch(args)


def test_the_trainer_refuses_them_too(launched, monkeypatch, tmp_path):
    from dts_hf.training.trainer import DistillationTrainer
    from tests.support.tiny import tiny_tokenizer

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    launched(SLURM_STEP_NUM_TASKS="2")
    with pytest.raises(UserError, match="asks for 2 processes"):
        DistillationTrainer(tiny_llama(), tiny_llama(), args=args, processing_class=tiny_tokenizer())


@pytest.mark.slow
def test_the_silent_launch_of_accelerate_stops(tmp_path):
    """``accelerate launch --cpu --num_processes 2`` starts one process; a recipe that trains must not get that far."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    recipe = {"student": {"model": "nowhere"}, "teacher": {"model": "nowhere"}, "data": {"train": "rows.jsonl"},
              "training": {"use_cpu": True}, "output": {"dir": "run"}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--quiet",
         "-m", "dts_hf", "train", "recipe.yaml"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "started one, as it does" in done.stderr, done.stderr[-2000:]
    assert "nowhere" not in done.stderr and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- recipes/accelerate/*.yaml


def parsed(name: str, processes: int = 2):
    """(arguments of accelerate's own parser, environment that it would give the processes)."""
    line = [
        "--config_file",
        str(RECIPES / f"{name}.yaml"),
        "--num_processes",
        str(processes),
        "--main_process_port",
        "0",
    ]
    line += ["-m", "dts_hf", "train", "RECIPE.yaml"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    if args.use_deepspeed:
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args)


def test_there_is_a_file_for_every_strategy():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(STRATEGIES) - {"single"}


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "single"])
def test_accelerate_reads_them(name, launched):
    args, variables = parsed(name, processes=4)
    assert (args.num_processes, args.module, args.training_script) == (4, True, "dts_hf")
    assert args.training_script_args == ["train", "RECIPE.yaml"]
    # What the recipe says must decide: precision, clipping and accumulation are not in the files.
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no"
    assert not {"ACCELERATE_GRADIENT_CLIPPING", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"} & set(variables)
    assert (args.multi_gpu, args.use_deepspeed, args.use_fsdp) == (
        name == "ddp",
        name.startswith("zero"),
        name == "fsdp2",
    )
    if name.startswith("zero"):
        assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[-1]
    if name == "zero3":
        assert variables["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
        assert variables["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    if name == "fsdp2":
        assert (variables["FSDP_VERSION"], variables["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == ("2", "false")
        assert variables["FSDP_RESHARD_AFTER_FORWARD"] == "true"


def test_the_number_of_processes_must_be_given(launched):
    with pytest.raises(ValueError, match="num_processes"):
        _validate_launch_command(
            launch_command_parser().parse_args(["--config_file", str(RECIPES / "ddp.yaml"), "-m", "dts_hf"])
        )


# ----------------------------------------------------------------------------------------------- names and options


@pytest.mark.parametrize(
    ("kind", "stage", "processes", "name"),
    [
        ("NO", None, 1, "single"),
        ("MULTI_CPU", None, 1, "single"),
        ("MULTI_GPU", None, 8, "ddp"),
        ("DEEPSPEED", 0, 8, "ddp"),
        ("DEEPSPEED", 1, 8, "zero1"),
        ("DEEPSPEED", 3, 1, "zero3"),
        ("FSDP", None, 2, "fsdp2"),
    ],
)
def test_strategies_have_names(kind, stage, processes, name):
    accelerator = SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        num_processes=processes,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
    )
    assert strategy_of(accelerator) == name and name in STRATEGIES


def test_deepspeed_is_made_to_fit_the_student():
    model = tiny_llama()
    parameters = sum(weight.numel() for weight in model.parameters())
    assert zero_options(model, 2) == {"reduce_bucket_size": "auto"}
    live = zero_options(model, 3)["stage3_max_live_parameters"]
    assert 0.05 * parameters < live <= 0.1 * parameters
