"""The documentation says what the code does."""

from __future__ import annotations

import pathlib
import re

import jaxlora._apply  # noqa: F401  (enters all rules)
from jaxlora._rules import RULES

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def test_the_table_of_primitives_is_the_table_of_rules():
    rules, materializes = (DOCS / "primitives.md").read_text().split("| **materializes**")
    rows = [line.split("|")[1] for line in rules.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(RULES)
    rows = [line.split("|")[1] for line in materializes.splitlines() if line.startswith("| `")]
    without = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert without & set(RULES) == {"conv_general_dilated", "ragged_dot_general"}
