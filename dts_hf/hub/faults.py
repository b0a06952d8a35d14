"""What goes wrong between here and the Hub: tried again where that can help, else said in one sentence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

from dts_hf.console import say
from dts_hf.errors import chain, is_connection

T = TypeVar("T")
#: Seconds before the second and each later try. The client itself tries most requests again, within each of these.
WAITS = (2.0, 8.0, 30.0)
#: A Hub that asks for more patience than this is asked again by a person.
LONGEST_WAIT = 300.0
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_REASONS = {
    401: "the Hub does not know this login (401): run 'hf auth login', or set HF_TOKEN to a token that may write",
    402: "the Hub asks for payment (402): the account's storage is used up",
    403: "this login may not write there (403): use a token that may, or --repo with a name of your own",
    404: "there is no such repository or revision, or this login may not see it (404)",
    409: "somebody else changed the repository meanwhile (409)",
    413: "the Hub takes no files of this size (413): the account's storage may be used up",
    429: "the Hub has had too many requests (429)",
    507: "the account's storage is full (507)",
}


def patiently(call: Callable[[], T], what: str) -> T:
    """``call()``, again after a while where the Hub or the network fails for a moment.

    Args:
        call: may be repeated: what it has done already, it does not do twice.
        what: for the line that says that it is tried again.

    Returns:
        What it returns. The error of the last try is raised as it is.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            asked = retry_after(error)
            if not is_transient(error) or (asked is not None and asked > LONGEST_WAIT):
                raise
            pause = wait if asked is None else asked
            say(f"{what}: {explained(error)}; trying again in {pause:.0f} s")
            time.sleep(pause)
    return call()


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a while."""
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in chain(error)):
        return False  # a connection error by its class, which no waiting mends
    # A proxy in between answers with a page where JSON was expected
    return any(is_connection(link) or isinstance(link, json.JSONDecodeError) for link in chain(error))


def explained(error: BaseException) -> str:
    """``error`` in one sentence, with what to do where that is known."""
    status = status_of(error)
    if status in _REASONS:
        return _REASONS[status]
    if status is not None and status >= 500:
        return f"the Hub is out of order ({status})"
    links = list(chain(error))
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in links):
        return "this machine is offline (HF_HUB_OFFLINE is set)"
    if any(type(link).__name__ == "LocalTokenNotFoundError" for link in links):
        return "there is no login on this machine: run 'hf auth login', or set HF_TOKEN"
    if link := next((link for link in links if is_connection(link)), None):
        return f"the connection to the Hub broke off ({type(link).__name__}: {_first_line(link)})"
    first = links[-1] if error.__cause__ is not None else error  # a wrapper says which file, and not why
    about = f"{_first_line(error)} " if first is not error else ""
    return f"{about}{type(first).__name__}: {_first_line(first)}"


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind ``error``; None where no answer came."""
    for link in chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def retry_after(error: BaseException) -> float | None:
    """The seconds for which the Hub asks in ``Retry-After``; None where it names none."""
    for link in chain(error):
        value = getattr(getattr(link, "response", None), "headers", {}).get("retry-after", "")
        if value.isdigit():
            return float(value)
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else "no reason given"
