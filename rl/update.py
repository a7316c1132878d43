"""One optimiser step of an iteration: the mini-batch's packed rows, forward, loss, backward.

The loss is a share of the mean over the sequences of the whole mini-batch, of all ranks, so the gradient depends on
neither their number nor on how the samples fell into rows. Ranks run the same number of backward passes: short ones
add empty rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rl.groups import Experience
from rl.loss import LossSettings, PolicyTokens, grpo_loss
from rl.messages import Sample
from rl.packing import TrainingRow, empty_row, pack_samples
from rl.reference import Reference
from rl.summary import add_over_ranks
from train import distributed
from train.engine import Engine


@dataclass(frozen=True)
class Update:
    """What a mini-batch came to, the same on all ranks; its gradients wait for `engine.step`."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    num_sequences: int


def mini_batch_of(sample: Sample, prompts: int, group_size: int, mini_batches: int) -> int:
    """Number of the mini-batch that the sample belongs to, by its place in the whole world's iteration."""
    place = sample.request.prompt_index * group_size + sample.request.sample_index
    return place * mini_batches // (prompts * group_size)


def aligned_rows(samples: Sequence[Sample], advantages: Sequence[float], length: int) -> list[TrainingRow]:
    """This rank's rows, as many as the rank with most has."""
    rows = pack_samples(samples, advantages, length)
    most = int(distributed.max_over_ranks(float(len(rows))))
    return rows + [empty_row(length) for _ in range(most - len(rows))]


def run_mini_batch(
    engine: Engine,
    experience: Experience,
    members: Sequence[int],
    settings: LossSettings,
    reference: Reference | None,
    length: int,
    attention: str,
) -> Update | None:
    """Forward and backward of the samples `members` of the experience; None where no rank has any."""
    samples = [experience.trained[i] for i in members]
    total = int(add_over_ranks({"sequences": len(samples)})["sequences"])
    if total == 0:
        return None
    rows = aligned_rows(samples, [experience.advantages[i] for i in members], length)
    sums: dict[str, float] = {}
    for number, row in enumerate(rows):
        loss, metrics = _row_loss(engine, row, settings, reference, total, attention)
        engine.backward(loss, last=number == len(rows) - 1)
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    found = add_over_ranks(sums)
    return Update(found.pop("loss"), engine.grad_norm(), found, total)


def _row_loss(
    engine: Engine, row: TrainingRow, settings: LossSettings, reference: Reference | None, total: int, attention: str
) -> tuple[Tensor, dict[str, Tensor]]:
    device = distributed.device()
    inputs = {name: field.to(device) for name, field in row.inputs().items()}
    out = engine.forward(**inputs, attention=attention, mtp=False)
    assert out.token_logprobs is not None
    tokens = PolicyTokens(
        logprobs=out.token_logprobs,
        behaviour=row.behaviour.to(device),
        advantages=row.advantages.to(device),
        sequence=row.sequence.to(device),
        num_sequences=row.num_sequences,
        reference=None if reference is None else reference.logprobs(inputs, attention),
    )
    return grpo_loss(tokens, settings, total)
