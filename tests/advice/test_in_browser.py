"""``advice.html`` as a person sees it: in a real browser, on a screen and on a phone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from dts_hf.advice.advise import advise
from dts_hf.advice.report import write_report
from tests.support import advised
from tests.support.browser import Tab, browser_tab, find_browser

BROWSER = find_browser()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        BROWSER is None,
        reason="no Chromium here: install one (apt-get install chromium) or name it in DTS_HF_CHROMIUM",
    ),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    assert BROWSER is not None
    with browser_tab(BROWSER, tmp_path_factory.mktemp("profile")) as found:
        yield found


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
