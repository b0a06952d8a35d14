"""What the fuzz tests share: a fence that notices writes and started programs, a limit on time, nasty values, mutations.

Mutations start from real recipes and real rows, so that most cases get past the first check.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st

from dts_hf.console import secrets_in
from dts_hf.errors import UserError
from tests.support.tokens import FAKE_TOKENS

ALL = settings.get_current_profile_name() == "fuzz"
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
CPU_SECONDS = 10  # of one case; they take milliseconds


class TookTooLong(BaseException):
    """No ``Exception``: nothing in the package may catch it."""


# --------------------------------------------------------------------------------------------------------- the fence

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event -> which of its arguments are paths that it changes.
_CHANGES = {
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
}
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
_NETWORK = ("socket.connect", "socket.getaddrinfo")


class Fence:
    """What happened in this process while the fence was up.

    The audit hook sees what Python does, and names it although it was undone. What Rust and C++ write (safetensors,
    pyarrow) it does not see: there two listings of the files, one before and one after, tell.

    Attributes:
        touched: paths that were made, changed or removed outside of ``allowed``.
        started: programs that were started, hosts that were asked for.
    """

    def __init__(self) -> None:
        self.up = False
        self.allowed: tuple[str, ...] = ()
        self.touched: list[str] = []
        self.started: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.up:
            return
        if event in _PROGRAMS or event in _NETWORK:
            self.started.append(f"{event} {arguments[:2]}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES:
                self._touch(path)
        elif event in _CHANGES:
            for index in _CHANGES[event]:
                self._touch(arguments[index])

    def _touch(self, path: Any) -> None:
        if isinstance(path, int):  # a descriptor that is open already
            return
        real = os.path.realpath(os.fsdecode(path))
        if real != os.devnull and not self._is_allowed(real):
            self.touched.append(real)

    def _is_allowed(self, path: str) -> bool:
        return any(path == root or path.startswith(root + os.sep) for root in self.allowed)

    def listing(self, folder: Path) -> dict[str, tuple[int, int] | None]:
        """Path -> size and time of change of each file below ``folder`` that is not allowed; None of a folder."""
        found: dict[str, tuple[int, int] | None] = {}
        waiting = [os.path.realpath(folder)]
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if self._is_allowed(entry.path):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        found[entry.path] = None  # its time changes with a probe that is made and removed
                    else:
                        about = entry.stat(follow_symlinks=False)
                        found[entry.path] = (about.st_size, about.st_mtime_ns)
        return found


_fence = Fence()


@contextmanager
def fence(watched: Path, *allowed: Path) -> Iterator[Fence]:
    """Within it every write outside of ``allowed``, every started program and every use of the network is noted.

    Args:
        watched: also the folder whose files are compared before and after; small.
        allowed: where everything may be written.
    """
    if not hasattr(sys, "_dts_hf_fence"):
        sys.addaudithook(_fence.hook)  # for the rest of the process
        sys._dts_hf_fence = True  # type: ignore[attr-defined]
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _fence.allowed, _fence.touched, _fence.started = tuple(os.path.realpath(path) for path in allowed), [], []
    before = _fence.listing(watched)
    _fence.up = True
    try:
        yield _fence
    finally:
        _fence.up = False
        sys.dont_write_bytecode = bytecode
        after = _fence.listing(watched)
        _fence.touched += sorted(path for path, _ in before.items() ^ after.items())


@contextmanager
def limited(cpu_seconds: float = CPU_SECONDS) -> Iterator[None]:
    """Raise ``TookTooLong`` after so much CPU time; a process that waits for ever is ended by pytest-timeout."""

    def stop(*_: object) -> None:
        raise TookTooLong(f"more than {cpu_seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def cases(count: int) -> Callable[[Any], Any]:
    """``count`` cases of the 11,000."""
    return settings(
        max_examples=count if ALL else count // 10,
        deadline=None,
        derandomize=not ALL,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def survive(read: Callable[[], Any]) -> Any:
    """What ``read`` returns, None where it refuses; nothing is left behind, and the message can be shown."""
    with fence(Path.cwd().parent) as seen, limited():
        try:
            result = read()
        except UserError as error:
            result = None
            message = str(error)
            event("refused")
            assert message and len(message) < 150_000 and not UNPRINTABLE.search(message), repr(message)
            assert not list(secrets_in(message, urls=False)), message
    assert not seen.touched and not seen.started
    return result


# ---------------------------------------------------------------------------------------------------------- nasty values

NUMBERS = (0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.0, 0.5, 1.0, -0.5, 1e-320)
NUMBERS += (1e308, -1e308, float("inf"), float("-inf"), float("nan"))
WORDS = (
    *(
        "",
        " ",
        "\n",
        "\t",
        "a",
        "x" * 300,
        "y" * 5000,
        "é",
        "naïve",
        "汉字",
        "🙂" * 40,
        "\u202egnp.exe",
        "\ufeff",
        "\u2028",
    ),
    *(
        "\x00",
        "a\x00b.jsonl",
        "\ud800",
        "\udc80x",
        "\x1b]0;owned\x07",
        "\x1b[2J",
        "\r",
        "\x7f",
        "\x85",
        "a\u2066b\u200f",
        "%s%n%x",
        "{0}",
    ),
    *(
        ".",
        "..",
        "/",
        "//",
        "~",
        "~root/x",
        "~nobody_at_all/x",
        "-",
        "-rf",
        "--help",
        "*",
        "**",
        "**/**",
        "a**",
        "[",
        "[!",
    ),
    *(
        "../../../../tmp/escaped",
        "/tmp/escaped.jsonl",
        "/etc/passwd",
        "/dev/zero",
        "/dev/null",
        "/proc/self/mem",
        "a/b/c",
    ),
    *(
        "./rows.jsonl",
        "../rows.jsonl",
        "rows.jsonl",
        "rows.jsonl/",
        "rows.jsonl/x",
        "empty",
        "con",
        "$HOME",
        "$(touch p)",
    ),
    *("`touch p`", "; touch p", "| touch p", "__import__('os').system('touch p')", "!!python/object/apply:os.system"),
    *("{{ 7 * 7 }}", "{% for x in range(10**9) %}{% endfor %}", "<script>alert(1)</script>", "' OR 1=1", "\\", "a\\b"),
    *(
        "file:///etc/passwd",
        "https://u:p@h/x.jsonl",
        "hf://datasets/a/b",
        "s3://a/b.parquet",
        "owner/name",
        "owner/name:x",
    ),
    *("a:b:c", ":", "name:", "text", "json", "pandas", "package:os/x.gguf", "package:../x.gguf", "package:", "x.gguf"),
    *(
        "null",
        "true",
        "no",
        "1e-4",
        "0x10",
        "1_000",
        ".inf",
        "teacher",
        "student",
        "validation",
        "all-linear",
        "jsd",
        "dts",
    ),
    *(
        "alpaca",
        "chat",
        "plain",
        "forward_kl",
        *(f"a {examples[0]} b" for examples in FAKE_TOKENS.values()),
        "constant",
        "ctkd",
        "minillm",
        "dolly",
        "glue/sst2",
        "bfloat16",
        "steps",
    ),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), inner, max_size=4),
    ),
    max_leaves=6,
)

# ------------------------------------------------------------------------------------------------------------- mutations

Path_ = tuple[Any, ...]


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place in nested mappings and lists, parents before children."""
    inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def get(tree: Any, path: Path_) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path_, value: Any) -> None:
    """Set ``value``; a parent that is no mapping (or list that long) is replaced by one."""
    for key, following in zip(path, [*path[1:], None]):
        if following is None:
            tree[key] = value
            return
        child = tree.get(key) if isinstance(tree, dict) else tree[key]
        if not isinstance(child, dict) and not (
            isinstance(child, list) and isinstance(following, int) and following < len(child)
        ):
            child = tree[key] = {}
        tree = child


@st.composite
def mutated(draw: st.DrawFn, bases: Sequence[Any], keys: Sequence[Path_] = (), most: int = 3) -> Any:
    """One of ``bases`` with 1 to ``most`` things wrong.

    Args:
        keys: paths that may be set although the base does not have them.
    """
    tree = copy.deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, most))):
        found = list(places(tree))
        if not found:
            break
        path = draw(st.sampled_from(found))
        kind = draw(st.integers(0, 9))
        if kind < 4 or not isinstance(tree, dict):  # another value
            put(tree, path, draw(values))
        elif kind < 7 and keys:  # a key that this base may not have
            put(tree, draw(st.sampled_from(keys)), draw(values))
        elif kind == 7:  # no value
            holder = get(tree, path[:-1])
            del holder[path[-1]]
        elif kind == 8:  # another name
            holder = get(tree, path[:-1])
            new = draw(st.one_of(st.text(max_size=6), st.sampled_from(WORDS)))
            if isinstance(holder, dict):
                holder[new] = holder.pop(path[-1])
        else:  # a value that belongs somewhere else
            put(tree, path, copy.deepcopy(get(tree, draw(st.sampled_from(found)))))
    return tree


@st.composite
def damaged(draw: st.DrawFn, content: bytes, snippets: Sequence[bytes]) -> bytes:
    """``content`` after a damage that needs no knowledge of it: cut, flipped, doubled, something in between."""
    kind = draw(st.integers(0, 5))
    place = draw(st.integers(0, len(content)))
    if kind == 0:
        return content[:place]
    if kind == 1 and place < len(content):
        return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + content[place // 2 :]
    if kind == 3:
        return content[:place] + draw(st.binary(max_size=8)) + content[place:]
    lines = content.split(b"\n")
    lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(snippets)))
    return b"\n".join(lines)
