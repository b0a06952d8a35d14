"""docs/figures/run.svg: temperature and gap over a real run, from docs/quickstart_run.json.

python docs/_run_figure.py runs/quickstart    take the numbers of another run; then python docs/generate.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

from _line_chart import HEIGHT, WIDTH, Line, chart  # noqa: E402

NUMBERS = DOCS / "quickstart_run.json"
COLUMNS = ("step", "temperature", "temperature_cosine", "gap")


def run_figure() -> str:
    """Two panels: the temperature beside the cosine that it would follow without a gap, and the gap."""
    run = json.loads(NUMBERS.read_text(encoding="utf-8"))
    start = run["step"][0] / run["step"][-1]
    panels = (
        chart(
            [Line("DTS, rule gap", run["temperature"]), Line("cosine (gap 0)", run["temperature_cosine"])],
            "T", "Softmax temperature over the quickstart's run", start=start,
        ),
        chart(
            [Line("student CE - teacher CE, nats", run["gap"])],
            "gap", "Gap between student and teacher over the quickstart's run", start=start,
        ),
    )  # fmt: skip
    placed = [panel.replace("<svg ", f'<svg x="{number * WIDTH}" ', 1) for number, panel in enumerate(panels)]
    size = f'width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}"'
    title = "<title>Temperature and gap over the quickstart's run</title>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{title}\n{"".join(placed)}</svg>\n'


def numbers_of(run: Path) -> dict[str, Any]:
    """The columns of the training lines of a run, and where they come from."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [line for line in lines if all(line.get(name) is not None for name in COLUMNS)]
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    columns = {name: [round(row[name], 4) for row in rows] for name in COLUMNS}
    return {"commit": environment.get("git_commit"), "argv": environment["argv"][1:], **columns}


if __name__ == "__main__":
    NUMBERS.write_text(json.dumps(numbers_of(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
