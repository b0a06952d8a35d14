"""The typer application ``dts-hf``: its commands, and what becomes of an error.

Wrong input (``UserError``) is one message on stderr and exit status 2; ``errors.ExitCode`` has the others. Commands
import heavy modules when they are called, so that ``--help`` is fast.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from dts_hf.cli import (
    advise,
    cache_teacher,
    chat,
    compare,
    doctor,
    env,
    evaluate,
    export,
    generate,
    init,
    prepare,
    pull,
    pull_cache,
    push,
    push_cache,
    report,
    schema,
    score,
    serve_teacher,
    sweep,
    train,
)
from dts_hf.cli import list as list_
from dts_hf.cli.printing import is_main_process
from dts_hf.console import guarded_logs, printable, show
from dts_hf.errors import ExitCode, Interrupted, RunError, UploadError, UserError, too_long_name
from dts_hf.runs.failures import GO_ON, one_sentence
from dts_hf.runs.stopping import Stage, end_at_once, ends, stage

#: How much later than another process the first one may find the same wrong input, seconds.
SAME_INPUT_SECONDS = 5.0
#: In the order of ``--help``. A command is a module of this folder with a function ``command`` and an ``EPILOG``.
COMMANDS = (
    init, doctor, train, chat, generate, evaluate, score, report, advise, sweep, compare, export, push, pull, cache_teacher,
    push_cache, pull_cache, serve_teacher, prepare, list_, schema, env,
)  # fmt: skip


class CommandGroup(TyperGroup):
    """Turns the ways in which a command ends early into a message and an exit status; a bug keeps its traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read what stands before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            _make_harmless(error)
            raise

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Call the command; what it raises becomes one message, said by one process."""
        try:
            with stage(Stage.COMMAND), guarded_logs():
                return super().invoke(ctx)
        except UserError as error:
            _leave(ExitCode.WRONG_INPUT, "" if _is_said_elsewhere(error) else f"Error{_who()}: {error}")
        except UploadError as error:
            _leave(ExitCode.NOT_UPLOADED, f"Error: {error}")
        except Interrupted as error:
            _leave(ExitCode(int(str(error.code))), f"Stopped: {error}" if is_main_process() else "")
        except KeyboardInterrupt:
            train_again = f" {GO_ON}" if ctx.invoked_subcommand == "train" else ""
            _leave(ExitCode.CTRL_C, f"Stopped: Ctrl-C.{train_again}" if is_main_process() else "")
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                _make_harmless(error)
                raise  # typer's own
            if (name := too_long_name(error)) is not None:
                _leave(ExitCode.WRONG_INPUT, f"Error{_who()}: {name} is too long for a file. Choose a shorter name")
            sentence = str(error) if isinstance(error, RunError) else one_sentence(error)
            if sentence is not None:
                if ctx.invoked_subcommand == "train" and GO_ON not in sentence:
                    sentence += f". {GO_ON}"
                _leave(ExitCode.FAILED, "" if _is_said_elsewhere(error) else f"Error{_who()}: {sentence}")
            _leave(ExitCode.FAILED, traceback.format_exc())  # Python's own would show the terminal whatever is in it


def _make_harmless(error: Exception) -> None:
    """What typer says of a command line quotes it as it is: names of files may stand there (``dts-hf schema *``)."""
    if isinstance(message := getattr(error, "message", None), str):
        error.message = printable(message)  # type: ignore[attr-defined]


def _leave(code: ExitCode, message: str) -> NoReturn:
    """Print ``message`` on stderr and end with ``code``."""
    ends(code)
    if message:
        show(message.rstrip(), error=True)
    if _is_one_of_several():
        # The farewell of collective libraries may wait for processes that are gone or still at work.
        end_at_once(code)
    raise typer.Exit(int(code)) from None


def _who() -> str:
    return "" if is_main_process() else f" (process {os.environ.get('RANK')})"


def _is_said_elsewhere(error: Exception) -> bool:
    """Whether another process prints what this one has found."""
    everywhere = getattr(error, "everywhere", False)
    if is_main_process() or everywhere is not None:
        return not is_main_process() and bool(everywhere)
    torch = sys.modules.get("torch")
    if torch is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        # Before the processes are joined, those of a machine read the same files: the first one there speaks for them.
        return os.environ.get("LOCAL_RANK", "0") != "0"
    # Most wrong input is found by all: the launcher ends this process here as soon as the first one has said it.
    time.sleep(SAME_INPUT_SECONDS)
    return False


def _is_one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"dts-hf {version('dts-hf')}")
        raise typer.Exit()


app = typer.Typer(
    cls=CommandGroup,
    help="Distil large language models into small ones; the softmax temperature follows training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


for module in COMMANDS:
    app.command(
        module.__name__.rpartition(".")[2].replace("_", "-"),
        epilog=module.EPILOG,
        context_settings=getattr(module, "CONTEXT", None),
    )(module.command)
