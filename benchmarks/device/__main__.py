"""See study.py."""

import sys

from benchmarks.device.study import main

if __name__ == "__main__":
    sys.exit(main())
