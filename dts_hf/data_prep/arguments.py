"""The options that every set has, and how a script of its own ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from dts_hf.console import show
from dts_hf.data_prep.lengths import GPT2
from dts_hf.data_prep.upstream import Upstream
from dts_hf.errors import UserError


def described(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the first line of ``doc`` as its description, and the rest, examples first, below the options."""
    first, _, rest = (doc or "").partition("\n")
    return argparse.ArgumentParser(
        description=first, epilog=rest.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parser(doc: str | None, upstream: Upstream) -> argparse.ArgumentParser:
    """The arguments that every set has.

    Args:
        doc: the module's docstring; its first line is the description, the examples and the rest stand below the options.
        upstream: where the set comes from unless ``--source`` says otherwise.
    """
    made = described(doc)
    made.add_argument(
        "--source", default=upstream.source, help="local file or folder, URL, or Hub name (default: %(default)s)"
    )
    made.add_argument("--output", type=Path, default=Path("data"), help="data folder (default: %(default)s)")
    made.add_argument("--revision", help="branch, tag or commit on the Hub")
    made.add_argument("--checksum", help="SHA-256 or git blob id that the source file must have")
    made.add_argument(
        "--allow-other-counts", action="store_true", help="accept row counts other than the published ones"
    )
    return made


def with_tokenizer(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--tokenizer``, for the sets with a length rule."""
    made.add_argument(
        "--tokenizer",
        default=GPT2,
        metavar="NAME|FOLDER|none",
        help="counts the tokens of the length rules: Hub name or local folder (vocab.json, merges.txt); 'none' applies"
        " no length rule, and the manifest says so (default: %(default)s)",
    )
    return made


def run(prepare: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Call ``prepare``; wrong input is one message on stderr and status 2."""
    try:
        prepare(arguments)
    except UserError as error:
        show(f"Error: {error}", error=True)
        return 2
    except OSError as error:
        show(f"Error: {error.filename or arguments.output}: {error.strerror or error}", error=True)
        return 2
    return 0
