"""The same as ``dts-hf prepare unni``, for commands of earlier versions."""

import sys

from dts_hf.data_prep.unni import main

if __name__ == "__main__":
    sys.exit(main())
