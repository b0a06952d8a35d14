"""Compile the kernels of stdin (JSON, see tests/support/ahead_of_time.py) and print what they need of a card."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def named(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def resources(job: dict[str, Any], folder: Path) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        name: named(value["jit"]) if isinstance(value, dict) else value for name, value in job["constants"].items()
    }
    source = ASTSource(fn=named(job["name"]), signature=job["signature"], constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", job["capability"], 32), options=job["options"])
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"\b(REG|STACK):(\d+)", said))
    return {"registers": int(used["REG"]), "stack": int(used["STACK"]), "shared": compiled.metadata.shared}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TRITON_CACHE_DIR"] = temporary  # nothing is left in the home directory, and nothing is read there
        print(json.dumps([resources(job, Path(temporary)) for job in json.load(sys.stdin)]))
