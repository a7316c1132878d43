"""Rules of the `tracker` group, called by conf/validate.py."""

from __future__ import annotations

from collections.abc import Iterator

from conf.schema import RunConfig


def alert_limits(config: RunConfig, world_size: int) -> Iterator[str]:
    alerts = config.tracker.alerts
    for name, share in (("recall_drop", alerts.recall_drop), ("truncated", alerts.truncated)):
        if share > 1:
            yield f"tracker.alerts.{name}={share:g} is no share: give a value in [0, 1], 0 is off"
    for name, factor in (("kl_rise", alerts.kl_rise), ("mismatch_rise", alerts.mismatch_rise)):
        if 0 < factor <= 1:
            yield f"tracker.alerts.{name}={factor:g} is no rise: give a factor above 1, 0 is off"
