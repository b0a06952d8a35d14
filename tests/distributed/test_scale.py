"""The launch lines of docs/scale.md and the SLURM script, run dry: accelerate's own parser and launcher up to the point
where processes would start, dts-hf's own parser, and a SLURM of four small scripts."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dts_hf.cli.app import app
from dts_hf.recipe.loading import load_recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "recipes" / "slurm" / "train.sbatch"
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S) for line in block.splitlines()]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """accelerate's launcher hands its arguments here instead of to torchrun, and the environment that it has made."""
    import torch.distributed.run

    seen: list[Any] = []
    monkeypatch.setattr(torch.distributed.run, "run", lambda run: seen.append((run, dict(os.environ))))
    monkeypatch.chdir(ROOT)
    return seen


def launch(words: list[str], launched: list[Any]) -> tuple[Any, list[str], dict[str, str]]:
    """Run ``accelerate launch ...`` dry: (what torchrun would get, the words after ``-m dts_hf``, the environment)."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    assert words[:2] == ["accelerate", "launch"]
    config = yaml.safe_load((ROOT / words[words.index("--config_file") + 1]).read_text(encoding="utf-8"))
    if config["distributed_type"] == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    launch_command(launch_command_parser().parse_args(words[2:]))
    assert len(launched) == 1, "it was handed over to something else than torchrun"
    run, made = launched[0]
    assert run.training_script == "dts_hf" and run.module
    return run, list(run.training_script_args), made


def parse_train(words: list[str]) -> dict[str, Any]:
    """The words after ``dts-hf``, read by its own command line."""
    command: Any = typer.main.get_command(app)
    assert words[0] == "train"
    train = command.commands["train"]
    return dict(train.make_context("train", words[1:]).params)


def check_recipe(params: dict[str, Any]) -> None:
    """Its changes fit a recipe; RECIPE.yaml stands for any."""
    name = str(params["recipe"])
    path = ROOT / ("recipes/dolly/gpt2-xl_to_gpt2/dts_gap.yaml" if name == "RECIPE.yaml" else name)
    load_recipe(path, list(params["overrides"] or []))


# ---------------------------------------------------------------------------------------------------------- the tables


def test_the_models_of_the_tables_are_the_published_ones() -> None:
    """The page counts their weights by hand, so that it can be made in no time; here transformers does."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from _scale_page import CASES
    finally:
        sys.path.remove(str(ROOT / "docs"))
    from transformers import GPT2Config, LlamaConfig

    from dts_hf.training.model_shape import ModelShape

    def llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocab,
        )  # fmt: skip

    assert CASES["gpt2"].student == ModelShape.from_config(GPT2Config())
    assert CASES["gpt2"].teacher == ModelShape.from_config(GPT2Config(n_layer=48, n_embd=1600, n_head=25))
    assert CASES["7b"].teacher == ModelShape.from_config(llama(32, 4096, 11008, 32, 32, 32000))
    assert CASES["70b"].student == ModelShape.from_config(llama(32, 4096, 14336, 32, 8, 128256))
    counts = {name: (case.student.parameters, case.teacher.parameters) for name, case in CASES.items()}
    assert counts["7b"] == (1_100_048_384, 6_738_415_616)  # as on the cards of TinyLlama and Llama 2
    assert counts["70b"] == (8_030_261_248, 70_553_706_496)  # Llama 3


def test_the_prose_says_what_the_tables_say() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from _scale_estimates import estimate_communication, estimate_host, floor_seconds
        from _scale_page import CARD_GB, CASES, USABLE, cells
    finally:
        sys.path.remove(str(ROOT / "docs"))
    from dts_hf.training.memory_estimate import estimate_memory
    from dts_hf.training.workload import Plan

    def peak(name: str, plan: Plan) -> float:
        case = CASES[name]
        return estimate_memory(case.student, case.teacher, case.workload, plan).total / 1e9

    assert peak("gpt2", Plan()) < 16  # one GPU is enough
    assert peak("7b", Plan()) < CARD_GB and peak("7b", Plan()) > 40
    assert max(peak("7b", Plan(teacher="4bit")), peak("7b", Plan("zero2", 8))) < USABLE * 40
    assert f"{USABLE * CARD_GB:.0f} of its {CARD_GB} GB" in PAGE
    assert peak("70b", Plan("zero3", 8)) > CARD_GB > peak("70b", Plan("zero3", 8, "sharded"))
    case, plan = CASES["70b"], Plan("zero3", 16, "sharded")
    sent = estimate_communication(case.student, case.teacher, case.workload, plan)
    assert sent / 40e9 > floor_seconds(case.student, case.teacher, case.workload, plan, 400e12)  # between nodes
    inside = estimate_communication(case.student, case.teacher, case.workload, Plan("zero3", 8, "sharded"))
    assert inside / 300e9 < 0.5 * floor_seconds(case.student, case.teacher, case.workload, plan, 400e12)

    def traffic(strategy: Any) -> float:
        return estimate_communication(case.student, None, case.workload, Plan(strategy, 8))

    assert traffic("zero1") == traffic("zero2") == 1.5 * traffic("ddp")  # both have bf16 gradients here
    shrunk = {}
    for name, pair in CASES.items():
        works = [replace(pair.workload, gradient_checkpointing=on) for on in (True, False)]
        few, all_kept = (estimate_memory(pair.student, pair.teacher, work, Plan()).activations for work in works)
        shrunk[name] = few / all_kept
    assert shrunk == {
        name: pytest.approx(ratio, abs=0.03) for name, ratio in (("gpt2", 0.25), ("7b", 0.25), ("70b", 0.1))
    }
    host = [estimate_host(case.student, case.teacher, case.workload, Plan(name, 8)) for name in ("zero3", "fsdp2")]
    assert host[1] - host[0] == 8 * 4 * case.student.parameters
    student, teacher = CASES["7b"].student.parameters, CASES["7b"].teacher.parameters
    row = cells(CASES["7b"], Plan("ddp", 8))
    assert f"| {' | '.join(row.values())} |" in PAGE
    in_bf16 = 8 * 2 * teacher  # of fp16 files; each process holds one
    assert row["host GB a node"] == f"{(4 * student + in_bf16) / 1e9:.0f}"


# -------------------------------------------------------------------------------------------------------- launch lines


def test_the_page_has_lines_to_check() -> None:
    assert len([line for line in COMMANDS if line.startswith("accelerate launch")]) >= 5
    for name in STRATEGIES:
        assert f"`{name}`" in PAGE


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("accelerate")])
def test_launch_lines_of_the_page(line: str, launched: list[Any]) -> None:
    run, words, _ = launch(shlex.split(line), launched)
    machines = int(run.nnodes) if "--num_machines" in line else 1
    assert int(run.nproc_per_node) * machines == int(re.search(r"--num_processes (\d+)", line)[1])  # type: ignore[index]
    check_recipe(parse_train(words))


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("dts-hf")])
def test_other_lines_of_the_page(line: str) -> None:
    check_recipe(parse_train(shlex.split(line)[1:]))


@pytest.mark.parametrize("line", [line for line in COMMANDS if "sbatch" in line])
def test_the_script_that_the_page_names_is_there(line: str) -> None:
    assert [word for word in line.split() if word.endswith("train.sbatch")] == ["recipes/slurm/train.sbatch"]


def test_jobs_that_may_be_killed_keep_checkpoints_that_they_can_resume_from() -> None:
    """Recipes of the papers keep weights alone, from which no run can go on."""
    header = SCRIPT.read_text(encoding="utf-8")
    called = re.compile(r" sbatch (--nodes \d+ )?recipes/slurm/train\.sbatch ")
    lines = [line for line in [*COMMANDS, *header.splitlines()] if called.search(line)]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        place = next(place for place, word in enumerate(words) if word.endswith("train.sbatch"))
        params = parse_train(["train", *words[place + 1 :]])
        name = str(params["recipe"]).replace("RECIPE.yaml", "recipes/dolly/gpt2-xl_to_gpt2/dts_gap.yaml")
        assert not load_recipe(ROOT / name, list(params["overrides"] or [])).training.get("save_only_model"), line


def test_every_line_of_the_page_is_of_a_kind_that_is_checked() -> None:
    assert all(re.search(r"^(accelerate launch|dts-hf) |recipes/slurm/train\.sbatch ", line) for line in COMMANDS)


def test_recipe_gives_the_same_rows_on_one_gpu_and_on_eight() -> None:
    plain, spread = (
        next(line for line in COMMANDS if line.startswith(start) and "dts_gap" in line)
        for start in ("dts-hf", "accel")
    )
    rows = []
    for line, processes in ((plain, 1), (spread, 8)):
        words = shlex.split(line)
        params = parse_train(words[words.index("train") :])
        training = load_recipe(ROOT / str(params["recipe"]), list(params["overrides"] or [])).training
        batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
        rows.append(batch * processes)
    assert rows[0] == rows[1]


# -------------------------------------------------------------------------------------------------------- the script


def tool(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """srun starts the step here, scancel signals its first process, scontrol writes down what it is asked for.

    So does SLURM where it tracks processes by cgroup: what a task starts itself gets no signal but SIGKILL.
    """
    tool(
        tmp_path,
        "srun",
        f'#!/bin/bash\nwhile [[ $1 == -* ]]; do echo "$1" >> {tmp_path}/options; shift; done\n'
        f'echo $$ > {tmp_path}/step\nSLURM_NODEID=0 exec "$@"\n',
    )
    tool(
        tmp_path,
        "scancel",
        f'#!/bin/bash\n[ "$*" = "--signal=USR1 77" ] && kill -USR1 "$(cat {tmp_path}/step)"\n',
    )
    tool(
        tmp_path,
        "scontrol",
        f'#!/bin/bash\n[ "$1" = show ] && printf "n1\\nn2\\n" || echo "$@" >> {tmp_path}/asked\n',
    )
    return tmp_path


def environment(cluster: Path, **more: str) -> dict[str, str]:
    values = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    return {**os.environ, "PATH": f"{cluster}:{os.environ['PATH']}", **values, **more}


def test_bash_can_read_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    directives = re.findall(r"^#SBATCH --([\w-]+)", SCRIPT.read_text(encoding="utf-8"), re.M)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time", "requeue", "signal"} <= set(directives)
    first_command = SCRIPT.read_text(encoding="utf-8").index("\nset -u")
    assert "#SBATCH" not in SCRIPT.read_text(encoding="utf-8")[first_command:]  # SLURM stops reading them there


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_its_launch_line(strategy: str, cluster: Path, launched: list[Any]) -> None:
    recipe = "recipes/dolly/gpt2-xl_to_gpt2/dts_gap.yaml"
    out = subprocess.run(
        ["bash", str(SCRIPT), recipe, "output.dir=runs/a b"],
        env=environment(cluster, DRY_RUN="1", STRATEGY=strategy), capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    words = ["1" if word == "${SLURM_NODEID:-0}" else word for word in shlex.split(out)]
    run, rest, made = launch(words, launched)
    assert (int(run.nproc_per_node), int(run.nnodes), int(run.node_rank)) == (4, 2, 1)
    assert run.rdzv_endpoint == "n1:29500" or (run.master_addr, int(run.master_port)) == ("n1", 29500)
    params = parse_train(rest)
    assert params["resume"] is True and params["overrides"] == ["output.dir=runs/a b"]
    check_recipe(params)
    assert made.get("ACCELERATE_USE_DEEPSPEED") == ("true" if strategy.startswith("zero") else None)
    assert made.get("ACCELERATE_USE_FSDP") == ("true" if strategy == "fsdp2" else None)


@pytest.mark.parametrize(("status", "asked"), [(0, False), (1, False), (2, False)])
def test_a_job_that_nobody_interrupts_ends_with_its_own_status(status: int, asked: bool, cluster: Path) -> None:
    tool(cluster, "accelerate", f'#!/bin/bash\necho "$@" > {cluster}/launched\nexit {status}\n')
    done = subprocess.run(["bash", str(SCRIPT), "recipe.yaml"], env=environment(cluster), cwd=ROOT, timeout=60)
    assert done.returncode == status
    assert (cluster / "launched").read_text().endswith("-m dts_hf train --resume recipe.yaml\n")
    assert (cluster / "asked").exists() == asked


def test_the_step_gets_all_cores_of_the_job(cluster: Path) -> None:
    tool(cluster, "accelerate", "#!/bin/bash\n")
    several = environment(cluster, SLURM_CPUS_PER_TASK="32")
    subprocess.run(["bash", str(SCRIPT), "recipe.yaml"], env=several, cwd=ROOT, timeout=60, check=True)
    assert "--cpus-per-task=32" in (cluster / "options").read_text().splitlines()


def test_pre_emption_reaches_the_processes_and_not_their_launcher(cluster: Path) -> None:
    """The launcher would kill them 30 seconds later. It leaves with 1 when they have left with 75."""
    work = f"trap 'sleep 1; touch {cluster}/saved; exit 75' TERM; touch {cluster}/ready; while :; do sleep 0.1; done"
    tool(
        cluster,
        "accelerate",
        f'#!/bin/bash\ntrap "touch {cluster}/launcher_asked" TERM\nbash -c {shlex.quote(work)} &\n'
        "wait $!\n[ $? = 75 ] && exit 1\n",
    )
    job = subprocess.Popen(
        ["bash", str(SCRIPT), "recipe.yaml"], env=environment(cluster), cwd=ROOT, start_new_session=True
    )
    try:
        until = time.monotonic() + 60
        while not (cluster / "ready").exists():
            assert time.monotonic() < until and job.poll() is None
            time.sleep(0.05)
        os.kill(int((cluster / "step").read_text()), signal.SIGTERM)
        assert job.wait(timeout=60) == 1
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert (cluster / "saved").exists() and not (cluster / "launcher_asked").exists()
    assert not (cluster / "asked").exists()  # SLURM itself puts the job back


@pytest.mark.slow
def test_an_interrupted_job_lets_its_processes_save_and_goes_back_into_the_queue(cluster: Path) -> None:
    """With the real torchrun: it must outlive the signal until its processes have ended by themselves."""
    (cluster / "worker.py").write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "here = Path(__file__).parent\nrank = os.environ['RANK']\n"
        "def save(*_):\n    time.sleep(2)\n    (here / f'saved.{rank}').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, save)\n(here / f'ready.{rank}').touch()\ntime.sleep(120)\n"
    )
    start = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 {cluster}/worker.py"
    tool(cluster, "accelerate", f"#!/bin/bash\nexec {start}\n")
    job = subprocess.Popen(
        ["bash", str(SCRIPT), "recipe.yaml"], env=environment(cluster), cwd=ROOT, start_new_session=True
    )
    try:
        until = time.monotonic() + 90
        while not all((cluster / f"ready.{rank}").exists() for rank in range(2)):
            assert time.monotonic() < until and job.poll() is None
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)  # SLURM, 10 minutes before the end: to the script alone
        assert job.wait(timeout=90) not in (0, 75)  # the launcher's own status
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert all((cluster / f"saved.{rank}").exists() for rank in range(2))
    assert (cluster / "asked").read_text() == "requeue 77\n"


def test_it_says_how_it_is_used_when_called_without_a_recipe() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: sbatch train.sbatch RECIPE.yaml" in done.stderr
