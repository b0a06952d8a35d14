"""What a recipe or a command line wants to be answered: the protocol, and the rows of its evaluation sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dts_hf.data.rows import Row
from dts_hf.data.sources import load_rows
from dts_hf.errors import UserError
from dts_hf.evaluation.benchmark_sets import canonical_name, resolve_set
from dts_hf.evaluation.protocol import Protocol, custom_protocol, get_protocol
from dts_hf.recipe.schema import Recipe

#: The name of the recipe's own held-out rows among the sets.
VALIDATION = "validation"


def protocol_of(recipe: Recipe) -> Protocol:
    """The protocol that a recipe describes: its evaluation section, and the template and limit of its data section."""
    evaluation = recipe.evaluation
    values = {
        "template": recipe.data.prompt_template,
        "max_prompt_length": recipe.data.max_prompt_length,
        "max_new_tokens": evaluation.max_new_tokens,
        "do_sample": evaluation.do_sample,
        "no_repeat_ngram_size": evaluation.no_repeat_ngram_size,
        "seeds": evaluation.seeds,
    }
    if evaluation.protocol is None:
        return custom_protocol(**values)
    return get_protocol(evaluation.protocol).changed(**values)


def load_sets(
    names: Sequence[str],
    limit: int | None = None,
    data_dir: str | Path | None = None,
    *,
    key: str = "evaluation.sets",
) -> dict[str, list[Row]]:
    """Rows of evaluation sets, by name.

    Args:
        names: of prepared sets (``dts-hf list sets``), or row files.
        limit: the first so many rows of each; None: all.
        data_dir: folder of the prepared sets; None: the default of ``benchmark_sets.resolve_set``.
        key: what the user calls this choice, for messages.

    Raises:
        UserError: an unknown or unprepared set, one of GLUE, bad rows, or a name given twice.
    """
    rows: dict[str, list[Row]] = {}
    for name in names:
        family, _, task = (canonical_name(name) or "").partition("/")
        if family == "glue":
            raise UserError(
                f"{key}: {name!r} is a GLUE set: its rows have labels and no written answers. Scores on it are those of "
                f"a classifier, in the run of a recipe with task: {{name: glue, subset: {task}}}"
            )
        prepared = resolve_set(name, data_dir, key=key)
        if prepared.name in rows:
            raise UserError(f"{key}: {prepared.name!r} is there twice; give each set once, and files different names")
        rows[prepared.name] = load_rows(prepared.path, limit=limit)
    return rows


def batch_size_that_matters(dtypes: Iterable[str], batch_size: int) -> int | None:
    """``batch_size`` where a model answered below fp32: there the text depends on what is answered together."""
    return None if all(dtype == "float32" for dtype in dtypes) else batch_size
