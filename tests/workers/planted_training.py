"""``dts-hf train RECIPE KEY=VALUE... --output FOLDER --resume`` that trains nothing: its scores go by the temperature."""

from __future__ import annotations

import sys
from pathlib import Path

from dts_hf.recipe.yaml_files import parse_yaml
from tests.support.planted_runs import plant

name, *overrides = sys.argv[1 : sys.argv.index("--output")]
folder = Path(sys.argv[sys.argv.index("--output") + 1])
value = float(parse_yaml(Path(name).read_text(), name)["temperature"]["value"])
(seed,) = [int(one.partition("=")[2]) for one in overrides if one.startswith("training.seed=")]
with (folder.parents[1] / "began.txt").open("a") as file:
    file.write(f"{folder.name}\n")
if value == 9:
    sys.exit("RuntimeError: this one always fails")
plant(folder, value, seed, effect=value)
