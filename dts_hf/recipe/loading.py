"""From a recipe file and its overrides to a checked ``Recipe``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dts_hf.recipe.schema import Recipe, validated
from dts_hf.recipe.shipped import resolve_recipe
from dts_hf.recipe.yaml_files import read_values


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: YAML file, or the name of a shipped recipe (``dts-hf list recipes``). Its key ``extends: other.yaml``
            (relative to it) names a recipe that it changes: mappings are merged, everything else is replaced. A data or
            model path that starts with ``./`` or ``../`` is taken from the folder of the file that says it, every other
            path from the current folder.
        overrides: ``"training.learning_rate=1e-4"``; the value is read as YAML, ``null`` unsets a key.

    Raises:
        UserError: one message with a line per problem: file, key, value, what was expected, the nearest right word.
    """
    path = resolve_recipe(path)
    values, origins = read_values(path, overrides)

    def source(dotted: str) -> str:
        while dotted and dotted not in origins:
            dotted = dotted.rpartition(".")[0]
        return origins.get(dotted, str(path))

    return validated(values, source, deep=True)
