"""python -m jaxlora: see docs/command_line.md."""

import sys

from jaxlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
