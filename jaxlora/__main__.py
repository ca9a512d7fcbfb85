"""python -m jaxlora: see docs/command_line.md."""

import signal
import sys

from jaxlora.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half-written goes
    sys.exit(main())
