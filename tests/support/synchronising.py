"""Which operations would make the host wait for a GPU, counted on a CPU by the code that asks for them.

A copy of a tensor to the host (``item``, ``tolist``, ``float``, ``if tensor``), an operation whose result has a size that
only the device knows (``nonzero``, a boolean index, ``unique``), and a tensor made of Python numbers on the device
(``torch.tensor``), which is copied there from memory that is not pinned.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Calls from Python. On a CPU some of them are no operation of torch's: they read the memory.
CALLS = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__", "cpu", "numpy", "equal", "is_nonzero",
    "tensor", "as_tensor", "allclose",
}  # fmt: skip
#: Operations of torch's own that other ones are made of (``x[mask]``, ``masked_select``).
OPERATIONS = {
    "nonzero", "_unique2", "unique_consecutive", "unique_dim", "masked_select", "bincount", "repeat_interleave",
    "is_nonzero",
}  # fmt: skip


class Synchronising:
    """While it is entered, ``counts`` fills: (module, function, what was called) -> how often."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self._calls, self._operations = _Calls(self), _Operations(self)

    def __enter__(self) -> Synchronising:
        self._calls.__enter__()
        self._operations.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._operations.__exit__(kind, error, trace)
        self._calls.__exit__(kind, error, trace)

    def note(self, what: str) -> None:
        """Count it for the innermost function that is neither torch's nor ours of this file."""
        frame = sys._getframe(2)
        while frame.f_back is not None:
            path = Path(frame.f_code.co_filename)
            if "torch" not in path.parts and path != Path(__file__) and path.name != "_python_dispatch.py":
                break
            frame = frame.f_back
        self.counts[Path(frame.f_code.co_filename).stem, frame.f_code.co_name, what] += 1


class _Calls(TorchFunctionMode):
    def __init__(self, owner: Synchronising) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # Of a tensor that lies there already ``as_tensor`` is a cast
        if name in CALLS and not (name == "as_tensor" and isinstance(args[0], torch.Tensor)):
            self.owner.note(name)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, owner: Synchronising) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in OPERATIONS or by_mask:
            self.owner.note(name)
        return func(*args, **(kwargs or {}))
