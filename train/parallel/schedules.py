"""The schedules of `torch.distributed.pipelining`: how they are made, and their tables of actions.

A table says for every rank which pass of which micro-batch through which part follows which. F is a forward, B a whole
backward, I and W its two halves: the gradient of what came in, which the part before waits for, and that of the
weights, which nobody does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from conf.validate_pipeline import PARTS

_MULTI = {"interleaved": ScheduleInterleaved1F1B, "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}


class Action(NamedTuple):
    """`kind`: F | B | I | W."""

    kind: str
    part: int
    micro_batch: int


def make_schedule(name: str, stages: Sequence[Any], micro_batches: int, loss: Callable[..., Tensor] | None) -> Any:
    """`stages`: this rank's PipelineStages. Without `loss` forwards alone run: torch's tables have the backwards in
    them, and its V schedules hand on gradients that were never made, so they are left out here."""
    if name == "1f1b":
        (stage,) = stages
        return Schedule1F1B(stage, micro_batches, loss, scale_grads=False)
    made = _MULTI[name](list(stages), micro_batches, loss, scale_grads=False)
    if loss is None:
        for rank, actions in made.pipeline_order_with_comms.items():
            flat = [each for action in actions for each in (action.sub_actions or (action,))]
            made.pipeline_order_with_comms[rank] = [
                each for each in flat if each.computation_type.value in ("F", "SEND_F", "RECV_F")
            ]
    return made


def table(name: str, pp: int, micro_batches: int) -> list[list[Action]]:
    """The actions of each of `pp` ranks, in order; what a rank does without waiting for another is not in it."""
    count = pp * PARTS[name]
    stages = [
        SimpleNamespace(num_stages=count, group_size=pp, group_rank=0, stage_index=i, is_last=False, submod=nn.Module())
        for i in range(PARTS[name])
    ]
    made = make_schedule(name, stages, micro_batches, lambda output, _: output)
    ranks = []
    for rank in range(pp):
        actions = [each for each in made.pipeline_order[rank] if each is not None]
        flat = [each for action in actions for each in (action.sub_actions or (action,))]
        ranks.append(
            [
                Action(each.computation_type.value, each.stage_index, each.microbatch_index)
                for each in flat
                if each.computation_type.value in ("F", "B", "I", "W")
            ]
        )
    return ranks
