"""What mkdocs does beside rendering pages: links out of docs/ become links to the repository, and the schema is published.

On GitHub ``[head.py](../dts_hf/models/head.py)`` leads to the file; a site holds the pages alone.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger("mkdocs.plugins.dts_hf")  # below this name a warning fails a strict build
ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]*)((?:#[^)]*)?\))")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def to_repository(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):  # from one folder of the pages to another
            return link[0]
        if not target.exists() or not target.is_relative_to(ROOT):
            logger.warning("%s: %s leads nowhere", page.file.src_uri, link[2])
            return link[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{link[1]}{config.repo_url}/{kind}/main/{target.relative_to(ROOT).as_posix()}{link[3]}"

    return LINK.sub(to_repository, markdown)


def on_post_build(*, config: Any, **_: Any) -> None:
    """Called by mkdocs at the end: writes the schema that the first line of every recipe names."""
    from dts_hf.recipe.editor_schema import SCHEMA_URL, editor_schema

    text = json.dumps(editor_schema(), indent=1, ensure_ascii=False)
    (Path(config.site_dir) / SCHEMA_URL.rpartition("/")[2]).write_text(text + "\n", encoding="utf-8")
