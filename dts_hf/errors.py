"""The one exception that means "the user's input is wrong", and the nearest right word to put into it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input. The message names the key, row or file, the value, what was expected and what to do next.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice closest to ``word``, or an empty string when none is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean '{by_lower[found[0]]}'?" if found else ""
