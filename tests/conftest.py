"""What all tests share: fixtures, and whether they see the card of this machine.

Tests marked ``shared_data`` use real rows laid beside the checkout and skip where they are absent. Tests marked ``gpu``
need a CUDA device: ``pytest -m gpu`` runs them, and every other run hides the card, so that it is the same everywhere.
"""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.browser import Tab

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# `make fuzz`: see test_fuzz.py
settings.register_profile("fuzz", print_blob=True)

SHARED_DATA = Path(os.environ.get("DTS_HF_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def sees_card(config: pytest.Config) -> bool:
    """Whether this is the run of the tests marked ``gpu``, and of no others."""
    asked_for = re.sub(r"\bnot\s*(\([^()]*\)|\w+)", "", config.option.markexpr)
    return re.search(r"\bgpu\b", asked_for) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports torch; what the tests launch inherits it.

    A Trainer takes every card that it sees: none here, or the first one alone, for several would be ``nn.DataParallel``.
    """
    if sees_card(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is defined
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell that runs pytest in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that take ``device`` are for the card, too, and all that need one are skipped where there is none to see."""
    card = sees_card(config)
    for item in items:
        of_its_own = "device" in getattr(getattr(item, "callspec", None), "params", ())
        if card and "device" in getattr(item, "fixturenames", ()) and not of_its_own:
            item.add_marker("gpu")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reason = "needs a CUDA device, which pytest -m gpu alone may see"
    if card:
        import torch

        if torch.cuda.is_available():
            return
        reason = f"torch {torch.__version__} sees no CUDA device"
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


#: So many modules more are worth a look at all objects there are.
MODULES = 50
_frozen = {"modules": 0}


@pytest.hookimpl(tryfirst=True)  # before a fixture makes what should be collected later
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test draws the same random numbers, whatever ran before it, and the garbage collector is kept out of modules.

    Every training ends with ``gc.collect``, which walked through half a million objects of torch, transformers and the
    collected tests: 0.3 to 0.5 s, more than its tiny steps took.
    """
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)  # torch.manual_seed takes a traceback for the card
    if len(sys.modules) > _frozen["modules"] + MODULES:
        _frozen["modules"] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the test computes: "cuda" under ``pytest -m gpu``, which runs every test that takes it, else "cpu".

    On the CPU Triton's kernels are interpreted (``TRITON_INTERPRET=1``): the same test stands for both.
    """
    return "cuda" if sees_card(request.config) else "cpu"


@pytest.fixture(scope="session")
def shared_data_dir() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are not beside this checkout")
    return SHARED_DATA


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder for this test, with the teacher and the rows that ``tests.support.recipes.recipe`` names."""
    from tests.support.recipes import write_rows
    from tests.support.tiny import tiny_llama, tiny_tokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    tiny_llama(seed=0, layers=4).save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    write_rows(tmp_path / "train.jsonl", 0, 12)
    write_rows(tmp_path / "valid.jsonl", 50, 5)
    return tmp_path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the campaigns of `make soak` did: the property ``campaign`` of each test; of tests that say the same, a count."""
    passed: dict[str, list[bool]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for text in (value for name, value in report.user_properties if name == "campaign"):
                    passed.setdefault(str(text), []).append(report.passed)
    if passed:
        terminalreporter.section("campaigns")
    for text, ones in sorted(passed.items()):
        count = f"{sum(ones)} of {len(ones)} tests passed: " if len(ones) > 1 else "" if ones[0] else "FAILED: "
        terminalreporter.write_line(f"{count}{text}")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are named by their argument: pytest would spell them out, and a gzip header holds the clock.

    Workers that disagree on a name run nothing. What else names depend on is for test_collection.py to find.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab of a headless Chromium, for tests with ``MARKS``."""
    from tests.support.browser import browser_tab, find_browser

    browser = find_browser()
    assert browser is not None
    with browser_tab(browser, tmp_path_factory.mktemp("profile")) as found:
        yield found
