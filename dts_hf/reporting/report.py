"""Everything a person reads about a run, written into its directory: figures, model card, ``report.html``."""

from __future__ import annotations

from pathlib import Path

from dts_hf.files import write_text_atomic
from dts_hf.reporting.html import render_html
from dts_hf.reporting.model_card import render_model_card
from dts_hf.reporting.plots import write_figures
from dts_hf.runs.directory import RunDirectory


def write_report(run: RunDirectory) -> Path:
    """Write ``figures/*.png``, ``README.md`` (the model card) and ``report.html``; return the path of the page.

    Works for any run directory, also one without scores, log or figures: what is missing is left out, in words.
    """
    write_figures(run)
    write_text_atomic(run.card_path, render_model_card(run))  # after the figures, which it shows
    write_text_atomic(run.report_path, render_html(run))
    return run.report_path
