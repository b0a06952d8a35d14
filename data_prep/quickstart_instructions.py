"""The same as ``dts-hf prepare quickstart``, for commands of earlier versions."""

import sys

from dts_hf.data_prep.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
