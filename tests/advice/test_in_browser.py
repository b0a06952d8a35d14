"""``advice.html`` as a person sees it: in a real browser, on a screen and on a phone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dts_hf.advice.advise import advise
from dts_hf.advice.report import write_report
from tests.support import advised
from tests.support.browser import MARKS, Tab

pytestmark = MARKS


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTS_HF_CACHE", str(tmp_path / "cache"))
    advice = dataclasses.replace(
        advise(advised.workplace(3.0)), name="a-name-that-is-far-too-long-for-a-telephone/" * 4
    )
    return write_report(tmp_path / "advice", advice)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_silently_and_nothing_overflows(tab: Tab, page: Path, width: int, dark: bool) -> None:
    opened = tab.open(page, width, dark)
    assert opened.complaints == [] and opened.requests == [] and opened.broken_images == []
    assert opened.window == width and opened.width <= width and opened.sticking_out == [] and opened.cut_off == []
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
