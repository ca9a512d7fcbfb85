"""What a benchmark measured, as a table for the terminal and as JSON to keep."""

import json
import os
import platform
import statistics
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness import TIME

COLUMNS = {
    "flops": ("MFLOP", 1e6),
    "bytes_accessed": ("MB moved", 1e6),
    "temp_bytes": ("MB temp", 1e6),
    "argument_bytes": ("MB in", 1e6),
    "output_bytes": ("MB out", 1e6),
}
"""Title and unit of a figure's column; any other figure but `JSON_ONLY` comes after, as it is."""

JSON_ONLY = {"alias_bytes"}


def table(measured: Mapping[str, Any]) -> str:
    """A row a contestant, then a line a limit.

    In brackets the ratio to the baseline; quartiles are those of the time's ratio over the rounds.
    """
    contestants: Mapping[str, Any] = measured["contestants"]
    present = {figure: None for c in contestants.values() for figure in c["figures"]}
    columns = [figure for figure in {**COLUMNS, **present} if figure in present]
    columns = [figure for figure in columns if figure not in JSON_ONLY]
    rows = [["", "min ms", "median ms", "quartiles", *(COLUMNS.get(f, (f, 1))[0] for f in columns)]]
    for name, c in contestants.items():
        times = [f(c["seconds"]) * 1e3 if c["seconds"] else None for f in (min, statistics.median)]
        spread = c["time_quartiles"]
        cells = [_cell(times[0]), _cell(times[1], c["ratios"][TIME])]
        cells.append("{:.3f}-{:.3f}".format(*spread) if spread else "-")
        for figure in columns:
            value, (_, unit) = c["figures"].get(figure), COLUMNS.get(figure, (figure, 1))
            cells.append(_cell(None if value is None else value / unit, c["ratios"].get(figure)))
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([*lines, *map(_limit_line, measured["limits"])])


def save(name: str, measured: Mapping[str, Any], folder: Path) -> None:
    """Write `folder/name.json`: what was measured, when, and on what kind of device."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": name, **environment(), **measured}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")


def environment() -> dict[str, Any]:
    """What places the figures; nothing that names the machine."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
    }


def _cell(value: float | None, ratio: float | None = None) -> str:
    number = "-" if value is None else f"{value:,.2f}"
    return number if ratio is None else f"{number} ({ratio:.3f})"


def _limit_line(limit: Mapping[str, Any]) -> str:
    value, at_most = limit["value"], limit["at_most"]
    verdict = "NOT MEASURED" if value is None else "within" if value <= at_most else "OVER"
    against = f" / {limit['baseline']}" if limit["baseline"] else ""
    claim = f"{limit['figure']} of {limit['contestant']}{against} at most {at_most:g}"
    return f"{verdict}: {claim}; it is {'-' if value is None else f'{value:.4g}'}"
