"""The scripts as modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.support.benchmarks import FOLDER


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of the folder as its neighbours do."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module
