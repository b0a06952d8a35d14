"""``report.html`` of a comparison as a person sees it, and sorts it, in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from dts_hf.experiments.compare import compare_kinds
from dts_hf.experiments.kinds import read_kinds
from dts_hf.experiments.report import render_page
from tests.support.browser import MARKS, Tab
from tests.support.planted_runs import plant, with_answers

pytestmark = MARKS
COLUMN = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map(r => r.cells[{}].dataset.sort)"
HEAD = "document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells[{}]"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kinds with a very long name, one that failed, and answers with a script in them."""
    folder = tmp_path_factory.mktemp("page")
    runs = [
        with_answers(plant(folder / f"t{value}-s{seed}", float(value), seed, effect, optim_args="a" * 90))
        for value, effect in ((1, 0.0), (2, 3.0), (10, -3.0))
        for seed in (1, 2)
    ]
    runs.append(plant(folder / "other", 4.0, 1, optim_args="a=b-very-long-options-of-an-optimizer-" * 3))
    (runs[1] / "metrics.json").unlink()
    kinds = read_kinds(runs)
    path = folder / "report.html"
    path.write_text(render_page(kinds, compare_kinds(kinds, kinds[0])), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_silently_and_does_not_scroll_sideways(tab: Tab, page: Path, width: int, dark: bool) -> None:
    opened = tab.open(page, width, dark)
    assert opened.complaints == [] and opened.requests == [] and opened.broken_images == []
    assert opened.window == width and opened.width <= width
    assert opened.sticking_out == [] and opened.cut_off == []
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        tab.evaluate("typeof alert") == "function"
        and tab.evaluate("document.querySelectorAll('main script').length") == 0
    )


def test_a_click_sorts_numbers_as_numbers_and_what_is_missing_stays_below(tab: Tab, page: Path) -> None:
    tab.open(page, 1280)
    place = 2  # the difference, which the baseline has not
    tab.evaluate(HEAD.format(place) + ".querySelector('button').click()")
    assert tab.evaluate(HEAD.format(place) + ".getAttribute('aria-sort')") == "ascending"
    up = tab.evaluate(COLUMN.format(place))
    tab.evaluate(HEAD.format(place) + ".querySelector('button').click()")
    assert tab.evaluate(HEAD.format(place) + ".getAttribute('aria-sort')") == "descending"
    down = tab.evaluate(COLUMN.format(place))
    assert up[-1] == down[-1] == "" and len(up) == 4
    assert [float(value) for value in up[:-1]] == sorted(map(float, up[:-1]))
    assert up[:-1] == down[:-1][::-1]
    tab.evaluate(HEAD.format(0) + ".querySelector('button').click()")
    names = tab.evaluate(COLUMN.format(0))
    values = [name.removeprefix("temperature.value=").partition(",")[0] for name in names]
    assert values == ["1.0", "2.0", "4.0", "10.0"], "2 comes before 10"
    assert tab.evaluate(HEAD.format(place) + ".getAttribute('aria-sort')") == "none"


def test_the_keyboard_sorts_as_well(tab: Tab, page: Path) -> None:
    tab.open(page, 1280)
    tab.evaluate(HEAD.format(2) + ".querySelector('button').focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):
        tab.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    assert tab.evaluate(HEAD.format(2) + ".getAttribute('aria-sort')") == "ascending"
    assert tab.evaluate("document.activeElement.tagName") == "BUTTON", "whoever sorts stays where they are"


def test_every_entry_of_the_contents_leads_somewhere(tab: Tab, page: Path) -> None:
    tab.open(page, 1280)
    assert tab.evaluate("document.querySelectorAll('nav a').length") >= 7
    lost = "[...document.querySelectorAll('nav a')].map(a => a.hash).filter(h => !document.querySelector(h))"
    assert tab.evaluate(lost) == []
