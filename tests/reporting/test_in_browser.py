"""``report.html`` as a person sees it: in a real browser, on a screen, on a phone, in the dark."""

from __future__ import annotations

from pathlib import Path

import pytest

from dts_hf.reporting import report
from tests.support.browser import MARKS, Tab
from tests.support.made_run import make_log, make_predictions, make_run

pytestmark = MARKS


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with what strains a layout: long words, wide numbers, steep curves, long answers."""
    predictions = {model: make_predictions(model) for model in ("teacher", "student_before", "student")}
    for row in predictions["student"][::3]:
        row["prediction"] = "x" * 400 + " " + "a word and another " * 200 + "\n\tdef f():\n" + " " * 200 + "return 1"
        row["id"] = "a-very-long-identifier-of-a-row-" * 4
    log = make_log(300)
    log[0]["kd_loss"] = 900.0
    name = "a-run-with-a-name-that-is-far-too-long-for-the-window-of-any-telephone-that-was-ever-sold"
    run = make_run(tmp_path_factory.mktemp("page") / name, log=log, predictions=predictions, seeds=(10, 20, 30))
    return report.write_report(run)


@pytest.mark.parametrize("width", [1280, 800, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_silently_and_nothing_overflows(tab: Tab, page: Path, width: int, dark: bool) -> None:
    opened = tab.open(page, width, dark)
    assert opened.complaints == [] and opened.requests == [] and opened.broken_images == []
    assert opened.window == width and opened.width <= width
    assert opened.sticking_out == [] and opened.cut_off == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(16, 18, 22)" if dark else "rgb(246, 247, 249)")


def test_unfolded_everything_still_fits_a_phone(tab: Tab, page: Path) -> None:
    before = tab.open(page, 390).height
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate("document.documentElement.scrollHeight") > before + 500, "explanations were folded"


def test_the_figures_are_those_of_the_readers_colour_scheme_and_have_words(tab: Tab, page: Path) -> None:
    light, dark = tab.open(page, 1280).shown, tab.open(page, 1280, dark=True).shown
    assert len(light) == 4 and not set(light) & set(dark)
    alts = tab.evaluate("[...document.images].map(i => i.alt)")
    assert all(len(alt) > 60 for alt in alts)


def test_every_entry_of_the_contents_leads_somewhere(tab: Tab, page: Path) -> None:
    tab.open(page, 1280)
    assert tab.evaluate("document.querySelectorAll('nav a').length") == 9
    lost = "[...document.querySelectorAll('nav a')].map(a => a.hash).filter(h => !document.querySelector(h))"
    assert tab.evaluate(lost) == []


def test_on_paper_it_is_light_and_unfolded(tab: Tab, page: Path) -> None:
    light = tab.open(page, 1280).shown
    opened = tab.open(page, 800, dark=True, media="print")
    assert opened.shown == light and opened.width <= 800
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert tab.evaluate("document.querySelector('.scores details p').getBoundingClientRect().height") > 10


def test_the_check_itself_sees_what_is_wrong(tab: Tab, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><body>"
        "<div style='width: 700px'>wide</div><img src='missing.png' alt='gone'>"
        "<script>console.error('loud'); throw new Error('thrown')</script>"
    )
    opened = tab.open(bad, 390)
    assert opened.width > 390 and opened.sticking_out and opened.broken_images == ["gone"]
    assert any("missing.png" in address for address in opened.requests)
    assert any("loud" in words for words in opened.complaints) and any("Uncaught" in w for w in opened.complaints)
