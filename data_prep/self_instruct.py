"""The same as ``dts-hf prepare self_instruct``, for commands of earlier versions."""

import sys

from dts_hf.data_prep.self_instruct import main

if __name__ == "__main__":
    sys.exit(main())
