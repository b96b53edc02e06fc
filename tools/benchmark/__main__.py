"""`python -m tools.benchmark`: see `tools.benchmark.command`."""

import sys

from tools.benchmark.command import main

if __name__ == "__main__":
    sys.exit(main())
