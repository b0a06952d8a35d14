"""``python -m dts_hf`` and ``accelerate launch -m dts_hf``: the same as the command ``dts-hf``."""

from dts_hf.cli.app import app

if __name__ == "__main__":
    app(prog_name="dts-hf")
