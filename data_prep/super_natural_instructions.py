"""The same as ``dts-hf prepare s_ni``, for commands of earlier versions."""

import sys

from dts_hf.data_prep.s_ni import main

if __name__ == "__main__":
    sys.exit(main())
