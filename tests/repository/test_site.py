"""The documentation builds as a site without a warning, and every public name has its place in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dts_hf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_page_is_there(site: Path) -> None:
    sources = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    for source in sources:
        folder = source.parent if source.name == "index" else source
        assert (site / folder / "index.html").is_file(), source


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "api").rglob("index.html"))
    anchors = set(re.findall(r'id="(dts_hf\.[\w.]+)"', pages))
    missing = [name for name in dts_hf.__all__ if not any(anchor.endswith(f".{name}") for anchor in anchors)]
    assert not missing
    assert len(anchors) > 100


def test_links_to_source_files_lead_to_the_repository(site: Path) -> None:
    page = (site / "architecture" / "index.html").read_text(encoding="utf-8")
    assert 'href="https://github.com/dts-hf/dts_hf/blob/main/dts_hf/models/head.py"' in page
    assert 'href="https://github.com/dts-hf/dts_hf/tree/main/dts_hf/loss"' in page
    assert not re.findall(r'href="[^"]*\.(?:py|yaml)"', re.sub(r'href="https://[^"]*"', "", page))


def test_the_schema_of_recipes_is_published(site: Path) -> None:
    from dts_hf.recipe.editor_schema import SCHEMA_URL

    assert SCHEMA_URL.startswith(re.findall(r"^site_url: (.*)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)[0])
    schema = json.loads((site / "recipe.schema.json").read_text(encoding="utf-8"))
    names = [name for kind in schema["properties"]["temperature"]["oneOf"] for name in kind.get("enum", ())]
    assert schema["$id"] == SCHEMA_URL and "dts" in names
