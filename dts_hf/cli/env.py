"""``dts-hf env``: what a bug report should say of this machine."""

from __future__ import annotations

from dts_hf.cli.printing import AsJson, print_json
from dts_hf.console import show

EPILOG = "Example: [bold]dts-hf env[/bold], to be pasted into a bug report: it names no host, path, user or token"


def command(as_json: AsJson = False) -> None:
    """Show versions, devices, free memory and which extras are installed."""
    from dts_hf.runs.machine import describe_machine

    machine = describe_machine()
    if as_json:
        print_json(machine)
    else:
        for name, value in machine.items():
            show(f"{name + ':':<17}{value}")
