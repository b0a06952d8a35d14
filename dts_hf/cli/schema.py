"""``dts-hf schema``: the JSON schema of a recipe."""

from __future__ import annotations

from dts_hf.cli.printing import print_json

EPILOG = "Example: [bold]dts-hf schema > recipe.schema.json[/bold]"


def command() -> None:
    """Print the JSON schema of a recipe, for the completion and checks of an editor."""
    from dts_hf.recipe.editor_schema import editor_schema

    print_json(editor_schema())
