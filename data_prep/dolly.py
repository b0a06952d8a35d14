"""The same as ``dts-hf prepare dolly``, for commands of earlier versions."""

import sys

from dts_hf.data_prep.dolly import main

if __name__ == "__main__":
    sys.exit(main())
