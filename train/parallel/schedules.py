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
    """`kind`: F | B | I | W. `paired`: the next action is meant to overlap with it (DualPipeV)."""

    kind: str
    part: int
    micro_batch: int
    paired: bool = False


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
    if name == "1f1b":  # torch's own table, which its 1F1B does not run by, starts the last rank at micro-batch 1
        return [_one_forward_one_backward(pp, rank, micro_batches) for rank in range(pp)]
    count = pp * PARTS[name]
    stages = [
        SimpleNamespace(num_stages=count, group_size=pp, group_rank=0, stage_index=i, is_last=False, submod=nn.Module())
        for i in range(PARTS[name])
    ]
    made = make_schedule(name, stages, micro_batches, lambda output, _: output)
    ranks = []
    for rank in range(pp):
        found: list[Action] = []
        for action in made.pipeline_order[rank]:
            passes: tuple[Any, ...] = () if action is None else (action.sub_actions or (action,))
            for each in passes:
                kind, paired = each.computation_type.value, each is not passes[-1]
                found.append(Action(kind, each.stage_index, each.microbatch_index, paired))
        ranks.append(found)
    return ranks


def _one_forward_one_backward(pp: int, rank: int, micro_batches: int) -> list[Action]:
    ahead = min(pp - rank, micro_batches)
    actions = [Action("F", rank, number) for number in range(ahead)]
    for number in range(micro_batches):
        actions.append(Action("B", rank, number))
        if number + ahead < micro_batches:
            actions.append(Action("F", rank, number + ahead))
    return actions


class Timed(NamedTuple):
    """An action with its start and end."""

    action: Action
    start: float
    end: float


def simulate(
    ranks: Sequence[Sequence[Action]], cost: Callable[[Action], float], pairs_send_last: bool = False
) -> list[list[Timed]]:
    """When each action runs if every rank takes its own in order, each as soon as what it needs is there, and what
    travels takes no time. ValueError where a table cannot be run to its end.

    `pairs_send_last`: of paired actions, which run one after the other, the first one's result leaves the rank with the
    second's: so torch 2.13 does.
    """
    done: dict[tuple[str, int, int], float] = {}  # (forward or backward, part, micro-batch) -> when
    last = max(action.part for actions in ranks for action in actions)
    found: list[list[Timed]] = [[] for _ in ranks]
    while any(len(mine) < len(actions) for mine, actions in zip(found, ranks, strict=True)):
        progress = False
        for mine, actions in zip(found, ranks, strict=True):
            while len(mine) < len(actions):
                action = actions[len(mine)]
                kind, part, number, _ = action
                needs = []
                if kind == "F" and part > 0:
                    needs = [("F", part - 1, number)]
                elif kind in ("B", "I"):
                    needs = [("F", part, number)] + ([("B", part + 1, number)] if part < last else [])
                if any(need not in done for need in needs):
                    break
                start = max([mine[-1].end if mine else 0.0, *(done[need] for need in needs)])
                mine.append(Timed(action, start, start + cost(action)))
                held = pairs_send_last and len(mine) > 1 and mine[-2].action.paired
                for sent in mine[-2:] if held else mine[-1:]:
                    if sent.action.kind != "W" and not (sent.action.paired and pairs_send_last and sent is mine[-1]):
                        way = "F" if sent.action.kind == "F" else "B"
                        done[way, sent.action.part, sent.action.micro_batch] = mine[-1].end
                progress = True
        if not progress:
            raise ValueError("the table waits for itself")
    return found


def bubble(timed: Sequence[Sequence[Timed]]) -> float:
    """Share of the ranks' time, from the first start to the last end, in which they do nothing."""
    span = max(each.end for mine in timed for each in mine)
    busy = sum(each.end - each.start for mine in timed for each in mine)
    return 1 - busy / (span * len(timed))


def unit_cost(action: Action) -> float:
    """A forward takes as long as either half of a backward."""
    return 2.0 if action.kind == "B" else 1.0


def formula(name: str, pp: int, micro_batches: int) -> float:
    """The closed form of `bubble` where F = I = W, no part is dearer than another, and there are 2 pp micro-batches or
    more (1f1b and interleaved: pp). Idle are, of a floor's work on one micro-batch, (pp - 1) times all of it (1f1b),
    half of it (interleaved: a part is half a floor) or one of the six passes that it comes to (the V schedules)."""
    idle = (pp - 1) / {"1f1b": 1, "interleaved": 2, "zbv": 6, "dualpipev": 6}[name]
    return idle / (micro_batches + idle)
