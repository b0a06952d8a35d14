"""Names of files in a run directory: which are ours to remove, in which order, and which are nobody's."""

from __future__ import annotations

BROKEN_STEP_FILES = "broken_step-*.rank*.json"  # the rows of steps whose loss was non-finite
# What create(overwrite=True) removes, in this order: what is left when that is cut short must neither look finished nor
# like something to resume. Anything else in the folder is not ours and stays.
OUR_NAMES = (
    "metrics.json",
    "final.json",
    "checkpoint-#/complete.json",
    "interrupted/*/complete.json",
    "checkpoint-#",
    "interrupted",
    BROKEN_STEP_FILES,
    "scores.json",
    "log.jsonl",
    "environment.json",
    "data_manifest.json",
    "student_init.json",
    "final",
    "predictions",
    "figures",
    "report.html",
    "README.md",
    "recipe.yaml",
)
# What a killed process may leave: files that were not renamed yet, and the probe of check_can_create.
LEFTOVERS = (
    *(f".{name}.*.tmp" for name in OUR_NAMES if name.endswith((".json", ".yaml", ".html", ".md")) and "/" not in name),
    "predictions/.*.tmp",
    "figures/.*.tmp",
    ".final.*unfinished",
    ".dts_hf-*",
)
#: What file systems and programs put into any folder: one with nothing else in it is empty. Never ours to remove.
NOBODYS = (".DS_Store", ".nfs*", "lost+found", ".ipynb_checkpoints")
