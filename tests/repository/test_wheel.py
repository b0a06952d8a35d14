"""The wheel alone, in a virtual environment of its own and outside the repository: everything a newcomer types works.

The environment sees the packages that are installed here (nothing is downloaded) but neither the repository nor its
editable installation.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
#: Of the processor, over init, doctor, train and chat together.
USER_SECONDS = 300

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


class Installed:
    """``dts-hf`` of the wheel, run in ``work``."""

    def __init__(self, environment: Path, work: Path) -> None:
        self.environment, self.work = environment, work
        self.bin = environment / ("Scripts" if os.name == "nt" else "bin")

    def run(self, *command: str | Path, answer: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
        hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        variables |= {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "HF_HOME": str(self.work / "hf"),
        }
        done = subprocess.run(
            [str(self.bin / str(command[0])), *map(str, command[1:])], cwd=self.work, env=variables, input=answer,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
    dts_hf = Installed(folder / "venv", folder / "work")
    dts_hf.work.mkdir()
    pip = [sys.executable, "-m", "pip", "--python", str(dts_hf.bin / "python"), "--disable-pip-version-check"]
    install = [*pip, "install", "-q", "--no-deps", "--no-index", *map(str, folder.glob("*.whl"))]
    subprocess.run(install, check=True, capture_output=True)
    # Behind the wheel's own folder. The .pth files in there (the editable installation) are not read again.
    purelib = dts_hf.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *_site_folders()}
    (Path(purelib) / "others.pth").write_text("".join(f"{path}\n" for path in sorted(others)))
    return dts_hf


def _site_folders() -> Iterator[str]:
    """Where this process finds packages, when its environment sees those of the system."""
    yield from (path for path in sys.path if path.endswith(("site-packages", "dist-packages")))


def test_it_is_the_wheel_and_not_the_repository(installed: Installed) -> None:
    where = installed.run("python", "-c", "import dts_hf; print(dts_hf.__file__)").stdout
    assert Path(where.strip()).is_relative_to(installed.environment)


def test_it_carries_recipes_and_their_rows(installed: Installed) -> None:
    listed = json.loads(installed.run("dts-hf", "list", "recipes", "--json").stdout)["recipes"]
    shipped = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in _recipes()}
    assert {row["name"] for row in listed} == shipped
    code = "from dts_hf import load_recipe; r = load_recipe('quickstart'); print(r.data.train); open(r.data.train)"
    assert "site-packages" in installed.run("python", "-c", code).stdout
    installed.run("dts-hf", "prepare", "recipes", "--output", "copied")
    assert (installed.work / "copied" / "slurm" / "train.sbatch").is_file()


def _recipes() -> list[Path]:
    from dts_hf.recipe.shipped import find_recipes

    return list(find_recipes(ROOT / "recipes"))


def test_it_prepares_data(installed: Installed) -> None:
    (installed.work / "vicuna.jsonl").write_text(json.dumps({"instruction": "Do", "output": "Done"}) + "\n")
    installed.run("dts-hf", "prepare", "vicuna", "--source", "vicuna.jsonl", "--allow-other-counts")
    assert (installed.work / "data" / "vicuna" / "manifest.json").is_file()
    installed.run("dts-hf", "prepare", "quickstart", "--output", "rows")
    assert (installed.work / "rows" / "quickstart_train.jsonl").is_file()  # made of lists that the wheel carries


def test_schema_and_help(installed: Installed) -> None:
    assert json.loads(installed.run("dts-hf", "schema").stdout)["title"]
    assert "dts-hf" in installed.run("dts-hf", "--help").stdout
    assert "vicuna" in installed.run("dts-hf", "list", "sets").stdout


ROWS = [
    {"prompt": f"Name {n} things that are {colour}.", "completion": f"Here are {n} things that are {colour}."}
    for n in ("two", "three", "four", "five") for colour in ("red", "blue", "green", "white", "black")
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(installed: Installed) -> str:
    """A folder with a small model that has read the rows: `doctor` refuses a teacher that knows nothing of them."""
    model, tokenizer = tiny_llama(layers=4, hidden=64, max_positions=512), tiny_tokenizer(pad="own")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}],
            tokenize=False,
        )
        for row in ROWS
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(60):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(installed.work / "teacher")
    tokenizer.save_pretrained(installed.work / "teacher")
    return "teacher"


def test_the_quickstart_trains_by_name(installed: Installed, teacher: str) -> None:
    """The shipped recipe with its own rows, on a small teacher and for two steps."""
    changes = [
        "student.init.layers=2", f"teacher.model={teacher}", "teacher.dtype=float32", "training.bf16=false",
        "training.max_steps=2", "training.warmup_steps=0", "data.max_train_rows=16", "data.teacher_max_new_tokens=4",
        "data.max_length=400", "data.max_prompt_length=300", "training.eval_steps=2", "evaluation.every_steps=null",
        "evaluation.rows=2", "evaluation.max_new_tokens=4", "output.dir=runs/quickstart",
    ]  # fmt: skip
    shown = installed.run("dts-hf", "train", "quickstart", *changes).stdout
    assert "runs/quickstart/report.html" in shown
    assert (installed.work / "runs" / "quickstart" / "final" / "model.safetensors").is_file()
    again = installed.run("dts-hf", "report", "runs/quickstart").stdout
    assert "report.html" in again


def test_own_data_to_own_student_in_five_minutes(installed: Installed, teacher: str) -> None:
    """``init``, ``doctor``, ``train``, ``chat``: what the README promises for a file of one's own."""
    commands = installed.run("dts-hf", "--help").stdout
    if " init " not in commands or " chat " not in commands:
        pytest.skip("this version has neither init nor chat")
    (installed.work / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    before = _user_seconds()
    installed.run(
        "dts-hf", "init", "--teacher", teacher, "--data", "my.jsonl", "--output", "my.yaml", "--preset", "quick"
    )
    installed.run("dts-hf", "doctor", "my.yaml")
    installed.run("dts-hf", "train", "my.yaml", "--output", "runs/mine", "evaluation.max_new_tokens=8")
    student = installed.work / "runs" / "mine" / "final"
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in student.iterdir()
    }
    said = installed.run("dts-hf", "chat", "runs/mine", "--max-new-tokens", "8", answer="Name two things.\n").stdout
    assert said.strip()
    assert _user_seconds() - before < USER_SECONDS


def _user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
