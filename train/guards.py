"""The loss guards: a step whose loss or gradient is not finite, or whose loss jumps, is left out; too many end the run.

The verdict is a function of global values, so all ranks agree without asking. The window of accepted losses is part of
the checkpoint: a resumed run judges as the uninterrupted one would.
"""

from __future__ import annotations

import math
import statistics

WINDOW, FEWEST = 64, 16  # losses that the median is taken over, and how many it needs before it judges


class TooManySkips(RuntimeError):
    """The run lost `train.max_skipped_steps` steps to the guards."""


class Guard:
    """`judge` every step, then `count_skip` or `accept`."""

    def __init__(self, spike_factor: float, max_skipped: int) -> None:
        self.spike_factor, self.max_skipped = spike_factor, max_skipped
        self.window: list[float] = []
        self.skipped = 0

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Why this step must be left out, or None. `loss` and `grad_norm` are global."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm {grad_norm} (loss {loss:.4g})"
        if len(self.window) >= FEWEST:
            median = statistics.median(self.window)
            if median > 0 and loss > self.spike_factor * median:
                return f"loss {loss:.4g} above {self.spike_factor:g} x the running median {median:.4g}"
        return None

    def accept(self, loss: float) -> None:
        self.window = [*self.window, loss][-WINDOW:]

    def count_skip(self, step: int, reason: str) -> None:
        """Raises TooManySkips once more than `max_skipped` steps of the whole run were left out."""
        self.skipped += 1
        if self.skipped > self.max_skipped:
            raise TooManySkips(
                f"step {step}: {reason}; {self.skipped} steps were left out, more than"
                f" train.max_skipped_steps={self.max_skipped}: lower optim.lr or look at the data"
            )

    def state(self) -> dict[str, object]:
        return {"window": self.window, "skipped": self.skipped}

    def load_state(self, state: dict) -> None:
        self.window, self.skipped = [float(x) for x in state["window"]], int(state["skipped"])
