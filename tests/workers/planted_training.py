"""``dts-hf train RECIPE KEY=VALUE... --output FOLDER --resume`` that trains nothing: its scores go by the temperature."""

from __future__ import annotations

import sys
from pathlib import Path

from dts_hf.recipe.loading import load_recipe
from tests.support.planted_runs import plant

name, *overrides = sys.argv[1 : sys.argv.index("--output")]
recipe, folder = load_recipe(name, overrides), Path(sys.argv[sys.argv.index("--output") + 1])
value = float(recipe.temperature.options["value"])
with (folder.parents[1] / "began.txt").open("a") as file:
    file.write(f"{folder.name}\n")
if value == 9:
    sys.exit("RuntimeError: this one always fails")
plant(folder, value, int(recipe.training["seed"]), effect=value)
