"""The same as ``dts-hf prepare vicuna``, for commands of earlier versions."""

import sys

from dts_hf.data_prep.vicuna import main

if __name__ == "__main__":
    sys.exit(main())
