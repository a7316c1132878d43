"""Rollout engines behind one small protocol: `native` in this process; servers on a cluster come beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rl.messages import RolloutRequest, Sample

__all__ = ["RolloutEngine"]


class RolloutEngine(Protocol):
    """Draws samples from the policy as it stands."""

    weight_version: int  # iteration of the weights it samples from; stamped on every token

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        done: Callable[[int], object] = lambda finished: None,
        *,
        begun: Sequence[Sample] = (),
        limit: int | None = None,
    ) -> list[Sample]:
        """One ungraded sample a request, in their order, then those of `begun`, which go on from where they were cut.

        done: hears, as sampling goes on, how many have finished since its last call, and may end it by an exception.
        limit: tokens that a sample may draw in this call; one that is not finished then is returned as `CUT`.
        """
        ...
