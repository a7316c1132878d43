"""The loss guards: a step whose loss or gradient is not finite, or whose loss jumps, is left out; many end the run.

A jump is seen against what the data themselves do. A step may hold text or solved sums, whose losses differ tenfold,
and which of them are more frequent changes on the way, so losses are held against the high ones of the last steps, left
out or not: another kind of data is let in after a few steps. A loss far below where the run began is no jump.

The verdict is a function of global values, so all ranks agree without asking. What it is held against is part of the
checkpoint: a resumed run judges as the uninterrupted one would.
"""

from __future__ import annotations

import math
import statistics

WINDOW, FEWEST = 64, 16  # finite losses that are looked back on, and how many it needs before it judges
SHARE = 0.9  # of them that lie below the high ones
FLOOR = 0.1  # of the first losses' median: lower ones count as that much


class TooManySkips(RuntimeError):
    """The run lost `train.max_skipped_steps` steps to the guards."""


class Guard:
    """`judge` every step once, and `count_skip` what it finds."""

    def __init__(self, spike_factor: float, max_skipped: int) -> None:
        self.spike_factor, self.max_skipped = spike_factor, max_skipped
        self.window: list[float] = []
        self.first: float | None = None  # median of the first FEWEST
        self.skipped = 0

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must be left out, or None. `loss` and `grad_norm` are global."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        level, self.window = self.level(), [*self.window, loss][-WINDOW:]
        if self.first is None and len(self.window) >= FEWEST:
            self.first = statistics.median(self.window[:FEWEST])
        if not math.isfinite(grad_norm):
            return f"gradient norm {grad_norm} (loss {loss:.4g})"
        if level > 0 and loss > self.spike_factor * level:
            return f"loss {loss:.4g} above {self.spike_factor:g} x {level:.4g}, the high losses of the last steps"
        return None

    def level(self) -> float:
        """What a loss is held against; infinite before there are enough of them."""
        if self.first is None:
            return math.inf
        return max(sorted(self.window)[int(SHARE * len(self.window))], FLOOR * self.first)

    def count_skip(self, step: int, reason: str) -> None:
        """Raises TooManySkips once more than `max_skipped` steps of the whole run were left out."""
        self.skipped += 1
        if self.skipped > self.max_skipped:
            raise TooManySkips(
                f"step {step}: {reason}; {self.skipped} steps were left out, more than"
                f" train.max_skipped_steps={self.max_skipped}: lower optim.lr or look at the data"
            )

    def state(self) -> dict[str, object]:
        return {"window": self.window, "first": self.first, "skipped": self.skipped}

    def load_state(self, state: dict) -> None:
        self.window, self.skipped = [float(x) for x in state["window"]], int(state["skipped"])
        self.first = state.get("first")  # earlier states have none
