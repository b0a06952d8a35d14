"""The recipes that come with the package: in a wheel inside it, in a checkout beside it."""

from __future__ import annotations

import re
from pathlib import Path

from dts_hf.errors import UserError, nearest


def shipped_folder() -> Path:
    """The folder with the shipped recipes.

    Raises:
        UserError: this installation has none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_recipes", package.parent / "recipes"):  # pyproject.toml puts them into the wheel
        if (folder / "quickstart.yaml").is_file():
            return folder
    raise UserError(f"{package}: this installation has no recipes; install the wheel, or work in a checkout")


def find_recipes(folder: str | Path) -> dict[Path, str]:
    """Every recipe below ``folder`` with its first comment line. ``_name.yaml`` is a base that others extend."""
    found = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not path.name.startswith("_") and re.search(r"^(student|extends):", text, re.MULTILINE):
            comment = re.match(r"(?:# yaml-language-server:.*\n)?#+ *(.*)", text)
            found[path] = comment[1] if comment else ""
    return found


def shipped_recipes() -> dict[str, tuple[Path, str]]:
    """Name (``quickstart``, ``dolly/gpt2-xl_to_gpt2/kd``) -> file and first comment line."""
    folder = shipped_folder()
    return {
        path.relative_to(folder).with_suffix("").as_posix(): (path, comment)
        for path, comment in find_recipes(folder).items()
    }


def resolve_recipe(name: str | Path) -> Path:
    """The file that ``name`` means: a path, or the name of a shipped recipe where there is no such file.

    Raises:
        UserError: neither; the message has the nearest name.
    """
    path = Path(name)
    if path.exists() or path.is_symlink():
        return path
    plain = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    try:
        known = shipped_recipes()
    except UserError:
        known = {}
    if plain in known:
        return known[plain][0]
    if path.suffix in (".yaml", ".yml") or not known:
        return path  # who reads it looks for the nearest file beside it
    raise UserError(f"{name}: no such recipe file, and no name of `dts-hf list recipes`.{nearest(plain, known)}")
