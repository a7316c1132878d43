"""What a person wants to be told of while a run goes: rules from the history of metrics rows to alerts.

    alerts(rows, AlertsConfig())     # pure: the same rows give the same alerts

A rule turns the last logged rows of a key into a severity; 1 is its limit. An alert comes when the severity reaches 1
and not again before it was below `CLEARED`: a run that stays in trouble says so once. Most rules read medians over
`window` rows, so that one odd batch alarms nobody. Limits are `tracker.alerts.*`; a limit of 0 switches its rule off.
What was said is a function of metrics.jsonl alone, so a resumed run rewrites alerts.jsonl from the rows it keeps.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.schema import AlertsConfig

FILE_NAME = "alerts.jsonl"
CLEARED = 0.8  # severity below which a rule may speak again
Row = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Alert:
    """`value`: what the rule read, null where it is not finite; `text`: one line with the value, the limit and what
    to look at."""

    step: int
    rule: str
    key: str
    value: float | None
    text: str
    level: str = "warn"  # warn | error


class Series:
    """The past of one key, as much of it as rules need: O(window) memory for a run of any length."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.recent: deque[float | None] = deque(maxlen=2 * window)
        self.first: float | None = None  # median of the first whole window
        self.best: float | None = None  # largest median of a window

    def add(self, value: float | None) -> None:
        self.recent.append(value)
        now = self.median()
        if now is not None:
            self.first = now if self.first is None else self.first
            self.best = now if self.best is None else max(self.best, now)

    def median(self, back: int = 0) -> float | None:
        """Of the window that ends `back` rows before the last; None where it is not whole or has nothing finite."""
        stop = len(self.recent) - back
        if stop < self.window:
            return None
        values = [self.recent[i] for i in range(stop - self.window, stop)]
        finite = [value for value in values if value is not None]
        return statistics.median(finite) if finite else None


Finding = tuple[float, float | None, str]  # severity, value read, what is wrong
QUIET: Finding = (0.0, None, "")


def not_finite(series: Series, cfg: AlertsConfig) -> Finding:
    lost = series.recent[-1] is None
    return (math.inf, None, "is not finite: look at the data and optim.lr") if lost else QUIET


def kl_rising(series: Series, cfg: AlertsConfig) -> Finding:
    hint = "raise rl.beta, lower optim.lr, or look at what is rewarded"
    return _rising(series, cfg.kl_ref, cfg.kl_rise, series.median(cfg.window), "the window before", hint)


def mismatch_growing(series: Series, cfg: AlertsConfig) -> Finding:
    hint = "trainer and sampler compute other numbers: see docs/grpo.md on mismatch/*"
    return _rising(series, cfg.mismatch_k3, cfg.mismatch_rise, series.first, "the run's start", hint)


def _rising(series: Series, limit: float, rise: float, before: float | None, when: str, hint: str) -> Finding:
    """Past a limit, or many times what it was; below a tenth of the limit a multiple means nothing."""
    now = series.median()
    if now is None or not limit:
        return QUIET
    found: Finding = (now / limit, now, f"is {now:.3g}, limit {limit:g}: {hint}")
    if rise and before and now > 0.1 * limit and now / before / rise > found[0]:
        return now / before / rise, now, f"is {now:.3g}, {now / before:.1f} times {when} ({before:.3g}): {hint}"
    return found


def recall_falling(series: Series, cfg: AlertsConfig) -> Finding:
    """The window's best row below the run's best median: what is recalled differs from batch to batch, downwards."""
    window, best = [value for value in list(series.recent)[-series.window :] if value is not None], series.best
    if best is None or not window or not cfg.recall_drop:
        return QUIET
    now = max(window)
    hint = "the indexer finds less of the attention: lower optim.lr or raise optim.indexer_lr"
    return (best - now) / cfg.recall_drop, now, f"fell to {now:.3g} from {best:.3g}: {hint}"


def truncated(series: Series, cfg: AlertsConfig) -> Finding:
    now = series.median()
    if now is None or not cfg.truncated:
        return QUIET
    hint = "raise rl.max_new_tokens or rl.length_penalty"
    return now / cfg.truncated, now, f"is {now:.2f}, limit {cfg.truncated:g}: {hint}"


def skipped(series: Series, cfg: AlertsConfig) -> Finding:
    """`optim/skipped_steps` counts from the run's start."""
    *_, now = series.recent
    at = len(series.recent) - 1 - series.window
    before = series.recent[at] if at >= 0 else 0.0
    lost = (now or 0.0) - (before or 0.0)
    hint = "the guards left steps out: lower optim.lr or look at the data"
    return lost / cfg.skipped_steps, now, f"rose by {lost:g} within {series.window} rows: {hint}"


RULES: dict[str, tuple[Callable[[str], bool], Callable[[Series, AlertsConfig], Finding]]] = {  # name -> (keys, rule)
    "not_finite": (lambda key: key.startswith("loss/") or key == "optim/grad_norm", not_finite),
    "kl_rising": (lambda key: key == "policy/kl_ref", kl_rising),
    "recall_falling": (
        lambda key: key in ("indexer/mass_recall", "indexer/recall_of_oracle", "indexer/kl_captured_selected"),
        recall_falling,
    ),
    "mismatch_growing": (lambda key: key == "mismatch/k3", mismatch_growing),
    "rollouts_truncated": (lambda key: key == "rollout/truncated_frac", truncated),
    "steps_skipped": (lambda key: key == "optim/skipped_steps", skipped),
}
ERRORS = ("not_finite",)


class Watch:
    """Sees a run's rows one after another."""

    def __init__(self, cfg: AlertsConfig) -> None:
        self.cfg = cfg
        self._series: dict[str, Series] = {}
        self._rules: dict[str, list[str]] = {}  # key -> names of its rules
        self._raised: set[tuple[str, str]] = set()

    def see(self, row: Row) -> list[Alert]:
        """The alerts that this row brings. `row`: as in metrics.jsonl, what is not finite is None."""
        if not self.cfg.on:
            return []
        found = []
        for key, value in row.items():
            if key not in self._rules:
                self._rules[key] = [name for name, (takes, _) in RULES.items() if takes(key)]
            if self._rules[key]:
                series = self._series.setdefault(key, Series(self.cfg.window))
                series.add(value)
                found += [alert for name in self._rules[key] if (alert := self._judge(name, key, series, row))]
        return found

    def _judge(self, name: str, key: str, series: Series, row: Row) -> Alert | None:
        severity, value, text = RULES[name][1](series, self.cfg)
        was_raised = (name, key) in self._raised
        if severity < CLEARED:
            self._raised.discard((name, key))
        if severity < 1 or was_raised:
            return None
        self._raised.add((name, key))
        return Alert(int(row["step"] or 0), name, key, value, f"{key} {text}", "error" if name in ERRORS else "warn")


def alerts(rows: Iterable[Row], cfg: AlertsConfig) -> list[Alert]:
    """All alerts of a history."""
    watch = Watch(cfg)
    return [alert for row in rows for alert in watch.see(row)]


class AlertWriter:
    """A Watch that appends to `folder/alerts.jsonl`; rank 0 makes one. `kept`: the rows that the run goes on from."""

    def __init__(self, folder: Path, cfg: AlertsConfig, kept: Iterable[Row] = ()) -> None:
        self.path, self.watch = folder / FILE_NAME, Watch(cfg)
        earlier = [alert for row in kept for alert in self.watch.see(row)]
        if earlier or self.path.exists():
            partial = self.path.with_name(f".{FILE_NAME}.{os.getpid()}")
            partial.write_bytes(b"".join(map(_encode, earlier)))
            partial.replace(self.path)

    def see(self, row: Row) -> list[Alert]:
        found = self.watch.see(row)
        if found:
            with open(self.path, "ab") as file:
                file.writelines(map(_encode, found))
        return found


def _encode(alert: Alert) -> bytes:
    return json.dumps(asdict(alert)).encode() + b"\n"
