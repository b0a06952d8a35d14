"""What a bug report should say of a machine: versions, devices, memory. No host, path, user or token."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

import torch

from dts_hf.console import gb
from dts_hf.runs.environment import installed_packages
from dts_hf.runs.memory import available_bytes, total_bytes

#: Extras for people who work on the package itself.
FOR_DEVELOPERS = ("benchmark", "dev", "docs", "lint", "test")


def describe_machine() -> dict[str, str]:
    """One line for each thing, by its name."""
    packages = installed_packages()
    cards = range(torch.cuda.device_count())
    kind = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    return {
        "dts-hf": packages.pop("dts-hf", "not installed"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "torch": f"{packages.pop('torch')}, built for {kind}",
        **packages,
        "extras": ", ".join(_extras()) or "none",
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        "memory": f"{gb(available_bytes())} free of {gb(total_bytes())}",
        **{f"gpu {index}": _card(index) for index in cards},
        **({} if cards else {"gpu": _without_cards()}),
        "disk": f"{gb(shutil.disk_usage(Path.cwd()).free)} free in the current folder",
        "hub cache": _cache(),
    }


def _card(index: int) -> str:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, {gb(free)} free of {gb(total)}, compute capability {major}.{minor}"


def _without_cards() -> str:
    return "Apple's (mps)" if torch.backends.mps.is_available() else "none that torch sees"


def _extras() -> list[str]:
    """The extras of this package whose packages are all there."""
    wanted: dict[str, list[str]] = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("dts-hf") or ():
            extra, name = re.search(r"extra == ['\"](\w+)['\"]", line), re.match(r"[\w.-]+", line)
            if extra and name and extra[1] not in FOR_DEVELOPERS:
                wanted.setdefault(extra[1], []).append(name[0])
    return sorted(extra for extra, names in wanted.items() if all(_is_installed(name) for name in names))


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cache() -> str:
    offline = ", offline" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    try:
        from huggingface_hub import scan_cache_dir

        found = scan_cache_dir()
    except Exception:  # there is none yet, or it cannot be read
        return f"none{offline}"
    return f"{len(found.repos)} repositories, {gb(found.size_on_disk)}{offline}"
