"""The same as ``dts-hf prepare glue``, for commands of earlier versions."""

import sys

from dts_hf.data_prep.glue import main

if __name__ == "__main__":
    sys.exit(main())
