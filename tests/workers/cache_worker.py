"""What each process of test_cached_kills.py runs: ``cache-teacher`` with shards of a few rows."""

from __future__ import annotations

import sys
from pathlib import Path

from dts_hf.distributed.processes import process
from dts_hf.language_modeling.caching import CacheOptions, cache_teacher
from dts_hf.recipe.loading import load_recipe
from tests.support.launching import leave


def main(recipe: str, folder: str) -> None:
    cache_teacher(load_recipe(recipe), Path(folder), CacheOptions(shard_bytes=4000, batch_tokens=256))
    if process()[1] > 1:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
