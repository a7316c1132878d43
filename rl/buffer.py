"""Groups that are not finished: what partial rollouts (Kimi k1.5, arXiv 2501.12599, sec. 2.6.2) carry over into the
next iteration.

A sample that has drawn its `rl.rollout_tokens` of an iteration waits here, and so do the finished ones of its group,
which are graded together. A group keeps its place among the `rl.prompts_per_step` until it is done, and the place its
rank: a sample never moves, and which prompts come next does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from rl.messages import CUT, Sample
from rl.stored import from_tensors, to_tensors


class Buffer:
    """This rank's unfinished groups, `group_size` samples each; `prompts`: places of the whole world."""

    def __init__(self, prompts: int, group_size: int) -> None:
        self.prompts, self.group_size = prompts, group_size
        self.groups: dict[int, list[Sample]] = {}  # place -> samples by their place in the group

    @property
    def places(self) -> list[int]:
        return sorted(self.groups)

    @property
    def unfinished(self) -> list[Sample]:
        """The samples that go on, by place."""
        return [s for place in self.places for s in self.groups[place] if s.finish_reason == CUT]

    def take(self, samples: Iterable[Sample]) -> list[Sample]:
        """Takes in what was drawn, of new groups and of those here -> the samples of all groups that are now finished,
        by place; they leave."""
        for sample in samples:
            group = self.groups.setdefault(sample.request.prompt_index % self.prompts, [])
            others = [s for s in group if s.request.sample_index != sample.request.sample_index]
            group[:] = sorted([*others, sample], key=lambda s: s.request.sample_index)
        done = [place for place in self.places if self._finished(self.groups[place])]
        return [sample for place in done for sample in self.groups.pop(place)]

    def _finished(self, group: list[Sample]) -> bool:
        assert len(group) == self.group_size and len({s.request.prompt_index for s in group}) == 1
        return all(sample.finish_reason != CUT for sample in group)

    def tensors(self) -> dict[str, Tensor]:
        """Everything here, for a checkpoint."""
        return to_tensors([sample for place in self.places for sample in self.groups[place]])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `tensors` gave, in place of what is here."""
        self.groups = {}
        assert not self.take(from_tensors(tensors)), "a finished group was kept"
