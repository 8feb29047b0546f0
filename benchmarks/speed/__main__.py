"""The command; see study.py."""

import sys

from benchmarks.speed.study import main

if __name__ == "__main__":
    sys.exit(main())
