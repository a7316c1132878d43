"""Rollout engines behind one small protocol: `native` in this process; servers on a cluster come beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rl.messages import RolloutRequest, Sample

__all__ = ["RolloutEngine"]


class RolloutEngine(Protocol):
    """Draws samples from the policy as it stands."""

    weight_version: int  # iteration of the weights it samples from; stamped on every token

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Sample]:
        """One ungraded sample a request, in their order."""
        ...
