"""python -m jaxlora: see docs/command_line.md."""

import sys

from jaxlora.cli import main

sys.exit(main())
