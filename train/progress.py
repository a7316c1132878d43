"""How far a long job is: a bar on a terminal, a plain line every few seconds elsewhere (a log file, CI).

Writes to stderr only, and nothing where it is not enabled (every rank but the first).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

FIRST_INTERVAL_S, LAST_INTERVAL_S = 5.0, 60.0


def duration(seconds: float) -> str:
    """Seconds -> `42s`, `3m07s`, `2h05m`, `3d04h`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def short(value: Any) -> str:
    """A metric in a few characters: `2.134`, `3.00e-05`, `12`."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


class Progress:
    """`with Progress(total, "dense_warmup", enabled=is_main) as progress: progress.update(1, loss=2.1)`.

    `initial` is where a resumed job starts, so that rate and remaining time count this process's work alone. Plain
    lines come at most every 5 s, in a long job every 60 s, and once at the end.
    """

    def __init__(
        self,
        total: int,
        desc: str,
        enabled: bool = True,
        *,
        initial: int = 0,
        unit: str = "step",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.desc, self.initial, self.unit = total, desc, initial, unit
        self.done = initial
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = self._shown_at = clock()
        self._shown = -1
        self._postfix: dict[str, Any] = {}
        self._plain = enabled and not self._stream.isatty()
        self._bar: tqdm | None = None
        if enabled and not self._plain:
            self._bar = tqdm(total=total, desc=desc, initial=initial, unit=unit, file=self._stream, dynamic_ncols=True)

    def update(self, n: int = 1, **postfix: Any) -> None:
        """`n` more are done; `postfix` are values to show, kept until the next ones."""
        self.done += n
        self._postfix.update(postfix)
        if self._bar is not None:
            if postfix:
                self._bar.set_postfix({key: short(value) for key, value in self._postfix.items()}, refresh=False)
            self._bar.update(n)
        elif self._plain:
            now = self._clock()
            interval = min(LAST_INTERVAL_S, max(FIRST_INTERVAL_S, 0.02 * (now - self._start)))
            if now - self._shown_at >= interval:
                self._line(now)

    def _line(self, now: float) -> None:
        self._shown_at, self._shown = now, self.done
        elapsed, made = now - self._start, self.done - self.initial
        parts = [f"{self.desc}: {self.unit} {self.done}/{self.total}"]
        if made > 0 and elapsed > 0:
            rate = made / elapsed
            parts.append(f"{rate:.2f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.2f} s/{self.unit}")
            left = self.total - self.done
            parts.append(f"{duration(left / rate)} left" if left > 0 else f"{duration(elapsed)} in all")
        parts += [f"{key} {short(value)}" for key, value in self._postfix.items()]
        print("  ".join(parts), file=self._stream, flush=True)

    def close(self) -> None:
        """Shows where the job ended. Safe to call twice."""
        if self._bar is not None:
            self._bar.close()
        elif self._plain and self._shown != self.done:
            self._line(self._clock())
        self._plain = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
