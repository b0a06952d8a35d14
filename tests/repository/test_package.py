"""The wheel: what it carries, and that nothing of it needs the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dts_hf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("the tests run away from the repository")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_it_carries_the_package_alone(wheel):
    names = set(wheel.namelist())
    assert {"dts_hf/py.typed", "dts_hf/reporting/templates/report.html.jinja"} <= names
    assert {"dts_hf/data_prep/quickstart_lists/capitals.txt", "dts_hf/_recipes/accelerate/ddp.yaml"} <= names
    assert {name.split("/")[0] for name in names} == {"dts_hf", f"dts_hf-{dts_hf.__version__}.dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dts_hf").rglob("*.py")}
    assert sources <= names
    shipped = subprocess.run(["git", "ls-files", "recipes"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert {f"dts_hf/_{path}" for path in shipped.stdout.split()} <= names


def test_its_metadata(wheel):
    folder = f"dts_hf-{dts_hf.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"Version: {dts_hf.__version__}" in metadata and "License-Expression: Apache-2.0" in metadata
    assert "dts-hf = dts_hf.__main__:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_it_asks_for_few_packages(wheel):
    """And for no other than those that are imported: ``deptry``, in ``make lint``."""
    metadata = wheel.read(f"dts_hf-{dts_hf.__version__}.dist-info/METADATA").decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    always = [line for line in required if "extra ==" not in line]
    assert len(always) <= 17 < len(required), always
    assert any("gguf" in line for line in required) and not any("gguf" in line for line in always)


def test_public_names_load_and_unknown_ones_do_not():
    for name in dts_hf.__all__:
        assert getattr(dts_hf, name) is not None
    assert set(dts_hf.__all__) <= set(dir(dts_hf))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dts_hf.nonsense  # noqa: B018


def test_import_is_light() -> None:
    """Nothing heavy is imported, nor much that is light: about 30 modules of Python's own (0.03 s)."""
    code = (
        "import sys\nbefore = len(sys.modules)\nimport dts_hf\n"
        "heavy = {'torch', 'transformers', 'numpy', 'typer', 'rich', 'yaml', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(len(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    assert 0 < int(run.stdout) < 60


@pytest.mark.parametrize("extra", ["gguf", "quantization", "deepspeed"])
def test_a_missing_extra_is_named(extra: str) -> None:
    """Whoever lacks an optional package reads what to install; the tests of the rooms see the messages appear."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dts_hf").rglob("*.py"))
    assert f"pip install 'dts-hf[{extra}]'" in sources


def test_distill_is_the_function_also_once_its_module_is_loaded():
    """Python binds a submodule on its package, and this one has the name of a public function."""
    code = (
        "import dts_hf\n"
        "from dts_hf import distill\n"
        "assert callable(distill) and callable(dts_hf.distill) and dts_hf.distill is distill\n"
        "import dts_hf.distill as again\n"
        "from dts_hf.distill import distill as direct\n"
        "assert direct is distill is dts_hf.distill\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
