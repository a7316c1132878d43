"""One optimiser step of an iteration: the mini-batch's packed rows, forward, loss, backward.

The loss is a share of the mean over the sequences or the tokens of the whole mini-batch, of all ranks, so the gradient
depends on neither their number nor on how the samples fell into rows. Ranks run the same number of backward passes:
short ones add empty rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from conf.schema import RLConfig
from model.replay import Replay
from model.transformer import ForwardOutput
from rl.groups import Experience
from rl.loss import LossSettings, PolicyLoss, PolicyTokens, Seen, Totals, grpo_loss, sequence_means
from rl.messages import Sample, Trace
from rl.packing import TrainingRow, empty_row, pack_samples
from rl.summary import add_over_ranks
from train import distributed
from train.engine import Engine
from train.parallel.cp import ContextParallel

REPEATED = {"routes": "mismatch/route_agree", "selection": "mismatch/index_overlap"}  # ForwardOutput.replay -> metric


@dataclass(frozen=True)
class Update:
    """What a mini-batch came to, the same on all ranks; its gradients wait for `engine.step`."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    num_sequences: int
    off_policy: list[tuple[float, bool]]  # of this rank's sequences: the measure of eq. 9, whether A < 0
    kl: list[tuple[str, float]] = field(default_factory=list)  # of them: domain, KL to the reference, if there is one
    traces: dict[int, Trace] = field(default_factory=dict)  # place in `Experience.trained` -> what was asked for


def mini_batches_of(samples: Sequence[Sample], trained: Collection[int], rl: RLConfig) -> list[list[int]]:
    """Numbers of this rank's samples by the mini-batch they belong to.

    trained: `prompt_index` of the groups of all ranks. Their samples, in order of place, are shared out evenly;
    where there are fewer than `rl.mini_batches`, the last ones have none.
    """
    order = sorted(trained, key=lambda index: index % rl.prompts_per_step)
    start = {index: number * rl.group_size for number, index in enumerate(order)}
    total = len(order) * rl.group_size
    found: list[list[int]] = [[] for _ in range(rl.mini_batches)]
    for i, sample in enumerate(samples):
        place = start[sample.request.prompt_index] + sample.request.sample_index
        found[place * min(rl.mini_batches, total) // total].append(i)
    return found


def aligned_rows(
    samples: Sequence[Sample], advantages: Sequence[float], length: int, cp: ContextParallel
) -> list[TrainingRow]:
    """This replica's rows, as many as the replica with most has. The ranks of a replica bring what each has drawn, and
    then work on every row together."""
    parts = cp.gather_objects((list(samples), list(advantages)))
    rows = pack_samples([s for part, _ in parts for s in part], [a for _, part in parts for a in part], length)
    most = int(distributed.max_over_ranks(float(len(rows))))
    return rows + [empty_row(length) for _ in range(most - len(rows))]


@dataclass
class MiniBatch:
    """The samples `members` (numbers in `Experience.trained`) of this rank, packed. Of each row [T]: `reference` log
    pi_ref of its labels, None without a reference; `old` log pi_old of the trainer, None where those of the
    mini-batch's own forward are."""

    members: Sequence[int]
    rows: list[TrainingRow]
    reference: list[Tensor] | None = None
    old: list[Tensor] | None = None


def mini_batch(experience: Experience, members: Sequence[int], rl: RLConfig, cp: ContextParallel) -> MiniBatch:
    """All ranks make one with the members that they have."""
    samples = [experience.trained[i] for i in members]
    return MiniBatch(members, aligned_rows(samples, [experience.advantages[i] for i in members], rl.pack_len, cp))


@torch.no_grad()
def row_logprobs(
    forward: Callable[..., ForwardOutput],
    rows: Sequence[TrainingRow],
    rl: RLConfig,
    attention: str,
    cp: ContextParallel,
) -> list[Tensor]:
    """log pi [T] of each row's labels, by a model as it stands; by the words, experts and selections that training
    repeats, so that all log-probs are of one distribution."""
    found = []
    for row in rows:
        inputs = model_inputs(row, rl, cp)
        logprobs = forward(**inputs, attention=attention, mtp=False).token_logprobs
        assert logprobs is not None
        found.append(inputs["context"].gather(logprobs))
    return found


def run_mini_batch(
    engine: Engine,
    experience: Experience,
    batch: MiniBatch,
    rl: RLConfig,
    attention: str,
    cp: ContextParallel,
    shown: Collection[int] = (),
) -> Update | None:
    """Forward and backward of a mini-batch; None where no rank has a sample in it.

    `shown`: the members to trace; ranks may ask for different ones, and under context parallelism the first of a
    replica is told of its own.
    """
    members, rows = batch.members, batch.rows
    counts = {"sequences": len(members), "tokens": sum(experience.trained[i].num_sampled for i in members)}
    totals = Totals(**{name: int(value) for name, value in add_over_ranks(counts).items()})
    if totals.sequences == 0:
        return None
    sums = {f"{name}/{part}": 0.0 for name in REPEATED for part in ("same", "counted")}
    off_policy: list[tuple[float, bool]] = []
    kl: list[tuple[str, float]] = []
    traces: dict[int, dict[int, Trace]] = {}  # member -> row of the sample -> what was seen of it
    for number, row in enumerate(rows):
        inputs = model_inputs(row, rl, cp)
        gather = inputs["context"].gather
        out = engine.forward(**inputs, attention=attention, mtp=False)
        assert out.token_logprobs is not None
        reference = None if batch.reference is None else batch.reference[number]
        old = None if batch.old is None else batch.old[number]
        tokens = policy_tokens(row, gather(out.token_logprobs), rl, reference, old)
        loss, metrics, seen = row_loss(tokens, rl, totals, cp)
        engine.backward(loss, last=number == len(rows) - 1)
        for name, agreed in out.replay.items():
            metrics[f"{name}/same"], metrics[f"{name}/counted"] = agreed.sum(0).unbind()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        if cp.rank == 0:  # its own samples come first among the replica's
            off_policy += off_policy_of(tokens, seen)
            if seen.reference_kl is not None:
                kl += zip(row.domains, seen.reference_kl.tolist(), strict=True)
            for i, (place, part) in enumerate(row.packed):
                if place < len(members) and members[place] in shown:
                    traces.setdefault(members[place], {})[part] = trace_of(seen, i)
    found = add_over_ranks(sums)
    for name, metric in REPEATED.items():
        same, counted = found.pop(f"{name}/same"), found.pop(f"{name}/counted")
        if counted:  # no engine need record them
            found[metric] = same / counted
    whole = {member: joined([parts[part] for part in sorted(parts)]) for member, parts in traces.items()}
    return Update(found.pop("loss"), engine.grad_norm(), found, totals.sequences, off_policy, kl, whole)


def loss_settings(rl: RLConfig) -> LossSettings:
    return LossSettings(
        rl.clip_low, rl.clip_high, rl.off_policy_delta, rl.importance_cap, rl.loss_mean, rl.kl_estimator
    )


def model_inputs(row: TrainingRow, rl: RLConfig, cp: ContextParallel) -> dict[str, Any]:
    """What the forward is asked for on this rank: its share of the row, and what is repeated of the sampler."""
    device = distributed.device()
    whole = {name: field.to(device) for name, field in row.inputs().items()}
    found, place = cp.share(whole)
    kept = row.kept if rl.keep_sampling_mask else None
    experts, selected = row.experts, row.selected
    if place.q_pos is not None:
        mine = place.q_pos.cpu()
        kept = None if kept is None else kept.rows(mine)
        experts, selected = (None if part is None else part[:, mine] for part in (experts, selected))
    experts, selected = (None if part is None else part.to(device) for part in (experts, selected))
    replay = Replay(experts, selected, rl.keep_routing, rl.keep_selection)
    kept = None if kept is None else kept.to(device)
    return {**found, "context": place, "replay": replay, "temperature": rl.temperature, "kept": kept}


def policy_tokens(
    row: TrainingRow, logprobs: Tensor, rl: RLConfig, reference: Tensor | None, old: Tensor | None
) -> PolicyTokens:
    """The columns of the loss for a row, of whose labels `logprobs` are the policy's. The others: see `MiniBatch`."""
    device = logprobs.device
    if rl.old_logprobs == "trainer" and old is None:
        old = logprobs.detach()
    return PolicyTokens(
        logprobs=logprobs,
        behaviour=row.behaviour.to(device),
        advantages=row.advantages.to(device),
        sequence=row.sequence.to(device),
        num_sequences=row.num_sequences,
        reference=reference,
        beta=torch.tensor([rl.of(d).beta for d in row.domains], device=device) if rl.needs_reference else None,
        old=old,
        lengths=torch.tensor(row.lengths, device=device),
    )


def row_loss(tokens: PolicyTokens, rl: RLConfig, totals: Totals, cp: ContextParallel) -> PolicyLoss:
    """This rank's part. Of a shared row every rank has all log-probs and takes the whole loss, of which the cp-th part
    counts: sums over a sequence then need no thought of slices, and `gather` adds the gradients up."""
    loss, metrics, seen = grpo_loss(tokens, loss_settings(rl), totals)
    return PolicyLoss(loss / cp.size, {name: value / cp.size for name, value in metrics.items()}, seen)


def off_policy_of(tokens: PolicyTokens, seen: Seen) -> list[tuple[float, bool]]:
    """Of each sequence: the measure of eq. 9 and whether its advantage is negative."""
    advantages = sequence_means(tokens.advantages, tokens.sequence, tokens.num_sequences)
    return list(zip(seen.off_policy_kl.tolist(), (advantages < 0).tolist(), strict=True))


def trace_of(seen: Seen, number: int) -> Trace:
    """What the loss saw of sequence `number` of its row."""
    mine = seen.sequence == number
    return Trace(
        logprobs=seen.logprobs[mine].tolist(),
        ratios=seen.ratio[mine].tolist(),
        clipped=seen.clipped[mine].tolist(),
        masked=bool(seen.masked[mine].any()),
        off_policy_kl=float(seen.off_policy_kl[number]),
    )


def joined(parts: Sequence[Trace]) -> Trace:
    """The traces of a sample's rows as one."""
    if len(parts) == 1:
        return parts[0]
    return Trace(
        logprobs=[value for part in parts for value in part.logprobs],
        ratios=[value for part in parts for value in part.ratios],
        clipped=[value for part in parts for value in part.clipped],
        masked=any(part.masked for part in parts),
        off_policy_kl=max(part.off_policy_kl for part in parts),
    )
