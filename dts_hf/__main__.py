"""The command ``dts-hf``; ``python -m dts_hf`` and ``accelerate launch -m dts_hf`` are the same."""

from dts_hf.runs import stopping


def main() -> None:
    """Run the command line. Signals are caught before anything that takes a while is loaded, and until Python ends."""
    stopping.catch_signals()
    from dts_hf.cli.app import app

    status = 1  # of a bug, whose traceback Python prints
    try:
        app(prog_name="dts-hf")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        stopping.leave_group(status)
        raise
    finally:
        stopping.ends(status)


if __name__ == "__main__":
    main()
