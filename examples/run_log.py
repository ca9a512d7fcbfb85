"""What a training run tells: lines of JSON, a picture of the loss, TensorBoard, memory."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax

GREY, BLUE, RED = "#b8bec6", "#2f6db3", "#c8402f"


class RunLog:
    """A file of JSON lines, each an event with the step after which it came.

    Attributes:
      path: of the file.
      events: all of them, an earlier run's too.
    """

    def __init__(self, path: Path, resumed_at: int | None, tensorboard: Path | None = None):
        """Begins a file; with `resumed_at`, goes on with what an earlier run logged until then."""
        self.path, self.events = path, []
        if resumed_at is not None and path.exists():
            self.events = [e for e in _read(path) if e.get("step", 0) <= resumed_at]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(json.dumps(event) + "\n" for event in self.events))
        os.replace(part, path)
        self._board: Any = None
        if tensorboard is not None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise SystemExit("error: --tensorboard needs: pip install tensorboardX") from None
            self._board = SummaryWriter(str(tensorboard))

    def __call__(self, event: str, step: int, **values: Any) -> None:
        self.events.append({"event": event, "step": step, **values})
        with self.path.open("a") as file:
            file.write(json.dumps(self.events[-1]) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """Its lines; a killed run may have left half of the last one."""
    events = []
    for line in path.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def peak_memory() -> int:
    """The most that was in use so far, in bytes: of the accelerator, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def draw(log: RunLog, title: str, path: Path) -> None:
    """The loss of each step, a geometric mean over the last ones, and that of held-out rows."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train, held_out = log.of("train"), log.of("eval")
    steps, losses = [e["step"] for e in train], [e["loss"] for e in train]
    mean: list[float] = []
    for loss in losses:
        mean.append(loss if not mean else mean[-1] ** 0.85 * loss**0.15)
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    axes.plot(steps, losses, color=GREY, linewidth=1, label="training, each step")
    axes.plot(steps, mean, color=BLUE, linewidth=1.8, label="training, running mean")
    points = [e["step"] for e in held_out], [e["loss"] for e in held_out]
    line = ":" if len(held_out) > 2 else ""
    axes.plot(*points, color=RED, marker="o", linestyle=line, label="held-out rows")
    for x, y in zip(*points, strict=True):
        axes.annotate(f"{y:.3g}", (x, y), (6, 3), textcoords="offset points", color=RED, fontsize=9)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    if losses and max(losses) > 10 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.margins(x=0.06)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
