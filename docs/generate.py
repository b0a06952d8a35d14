"""Writes the generated pages: docs/temperature.md with its figures, docs/divergences.md, docs/models.md,
docs/log_columns.md, docs/figures/run.svg, the tables of docs/scale.md and docs/trainer.md, and the
layers of docs/architecture.md.

python docs/generate.py            write them
python docs/generate.py --check    write nothing; exit 1 and name the files that are not up to date
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from _architecture_page import architecture_page  # noqa: E402
from _divergences_page import divergences_page  # noqa: E402
from _log_columns_page import log_columns_page  # noqa: E402
from _models_page import models_page  # noqa: E402
from _run_figure import run_figure  # noqa: E402
from _scale_page import scale_page  # noqa: E402
from _temperature_page import temperature_figures, temperature_page  # noqa: E402
from _trainer_page import trainer_page  # noqa: E402


def generated() -> dict[Path, str]:
    """Every generated file with its text."""
    figures = {DOCS / "figures" / name: text for name, text in temperature_figures().items()}
    figures[DOCS / "figures" / "run.svg"] = run_figure()
    pages = {
        "temperature.md": temperature_page(),
        "divergences.md": divergences_page(),
        "models.md": models_page(),
        "log_columns.md": log_columns_page(),
        "scale.md": scale_page(),
        "architecture.md": architecture_page(),
        "trainer.md": trainer_page(),
    }
    return {**{DOCS / name: text for name, text in pages.items()}, **figures}


def stale(files: dict[Path, str]) -> list[Path]:
    """Files that are missing, differ, or belong to a policy that is gone."""
    wrong = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return wrong + [path for path in sorted((DOCS / "figures").glob("temperature_*.svg")) if path not in files]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not up to date")
    check = parser.parse_args(arguments).check
    files = generated()
    wrong = stale(files)
    for path in wrong:
        print(
            f"{'not up to date' if check else 'written' if path in files else 'removed'}: {path.relative_to(DOCS.parent)}"
        )
    if check:
        return 1 if wrong else 0
    for path in wrong:
        if path not in files:
            path.unlink()
            continue
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(files[path], encoding="utf-8", newline="\n")
        os.replace(part, path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
