"""What a micro-batch adds to the training loss, and the sums that become the logged metrics.

Every sum is divided by the GLOBAL count of what it sums over (all ranks and micro-batches of the step), so the loss
does not depend on how the step's sequences are laid out:

    loss = lm + mtp_weight * mtp + sum over layers of KL / rows + balance_weight * balance / sequences

The indexer's gradient is disjoint from the trunk's, so its sum over layers needs no weight of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import ModelConfig, TrainConfig
from model import ForwardOutput
from train import distributed
from train.stages import Stage

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Counts:
    """Of a whole step: target tokens of the LM and of MTP, rows that are not padding, sequences."""

    lm: float
    mtp: float
    rows: float
    sequences: float


def global_counts(batches: Iterable[Mapping[str, Tensor]], cp: int = 1) -> Counts:
    """Counts over this rank's micro-batches, summed over ranks. `batches`: fields of PackedBatch, [T] each; whole
    sequences, which `cp` ranks share."""
    total = torch.zeros(4, dtype=torch.float64, device=distributed.device())
    for batch in batches:
        rows = torch.arange(batch["doc_start"].shape[0], device=batch["doc_start"].device)
        real = (batch["doc_start"] <= rows).sum()
        targets, second = (batch["labels"] >= 0).sum(), (batch["mtp_labels"] >= 0).sum()
        total += torch.stack([targets, second, real, torch.ones_like(real)])
    return Counts(*(distributed.sum_over_ranks(total) / cp).clamp(min=1).tolist())


def micro_batch_loss(out: ForwardOutput, counts: Counts, stage: Stage, train: TrainConfig) -> tuple[Tensor, Sums]:
    """-> (this micro-batch's share of the loss, differentiable; sums for the metrics, detached)."""
    terms: list[Tensor] = []
    sums: Sums = {}
    if out.token_logprobs is not None:
        sums["lm"] = -out.token_logprobs.sum()
        terms.append(sums["lm"] / counts.lm)
    if out.mtp_logprobs is not None:
        sums["mtp"] = -out.mtp_logprobs.sum()
        terms.append(train.mtp_weight * sums["mtp"] / counts.mtp)
    if out.indexer_kl is not None:
        sums["kl"] = out.indexer_kl
        terms.append(out.indexer_kl.sum() / counts.rows)
    if stage.trunk_grad and stage.lm_loss:
        terms.append(train.balance_weight * out.balance / counts.sequences)
    loss = torch.stack(terms).sum()
    sums |= {"loss": loss, "expert_counts": out.expert_counts, **{f"stat/{name}": s for name, s in out.stats.items()}}
    return loss, {name: value.detach().double() for name, value in sums.items()}


def add_sums(total: Sums, part: Sums) -> None:
    """Adds `part` into `total`. A micro-batch without MTP has fewer rows of expert counts: they are the last ones."""
    for name, value in part.items():
        held = total.get(name)
        if held is not None and held.shape != value.shape:
            shorter, longer = sorted((held, value), key=lambda t: t.shape[0])
            total[name] = longer.clone()
            total[name][: shorter.shape[0]] += shorter
        else:
            total[name] = value.clone() if held is None else held + value


def add_losses(held: dict[str, float], sums: Sums, counts: Counts) -> None:
    """Adds a step's global losses and targets into `held`. Kinds of data take turns by steps, so the loss of a row is
    that of all steps since the last one: a single step would show whichever's turn it is."""
    for name in {"lm", "mtp"} & sums.keys():
        for key, value in ((name, float(sums[name])), (f"{name}_targets", float(getattr(counts, name)))):
            held[key] = held.get(key, 0.0) + value


def mean_losses(held: Mapping[str, float]) -> dict[str, float]:
    return {f"loss/{name}": held[name] / held[f"{name}_targets"] for name in ("lm", "mtp") if name in held}


def reduce_sums(sums: Sums, shapes: Mapping[str, tuple[int, ...]]) -> Sums:
    """Sums over all ranks in one collective.

    `shapes`: name -> full shape, the same on every rank. What is missing counts as zero, what is not named is left out.
    """
    where = distributed.device()
    full = {name: torch.zeros(shape, dtype=torch.float64, device=where) for name, shape in shapes.items()}
    for name in sums.keys() & full.keys():
        value = sums[name]
        full[name][tuple(slice(0, size) for size in value.shape)] = value
    flat = distributed.sum_over_ranks(torch.cat([full[name].flatten() for name in sorted(full)]))
    parts = flat.split([full[name].numel() for name in sorted(full)])
    return {name: part.view(full[name].shape) for name, part in zip(sorted(full), parts, strict=True)}


def step_shapes(
    stage: Stage, layers: int, routers: int, experts: int, stats: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Shapes of a step's sums. `layers`: with MTP's; `stats`: names that the forward reports on this step."""
    shapes: dict[str, tuple[int, ...]] = {"loss": (), "stop": (), "expert_counts": (routers, experts)}
    if stage.lm_loss:
        shapes |= {"lm": (), "mtp": ()}
    if stage.indexer_loss is not None:
        shapes |= {"kl": (layers,), **{f"stat/{name}": (layers,) for name in stats}}
    return shapes


def indexer_metrics(kl: Tensor, stats: Mapping[str, Tensor], rows: float, layers: int, kind: str) -> dict[str, float]:
    """Health of the indexer by layer and averaged over the `layers` main ones (MTP's indexer trains, but is left out).

    kl [L] and stats [L]: sums over `rows` real positions; `kind` is `dense` or `selected`: over S_t the reference is
    smaller, so what is captured goes by another name.
    """
    captured = "kl_captured" if kind == "dense" else "kl_captured_selected"
    columns: dict[str, Tensor] = {"kl": kl / rows}
    if "kl_uniform" in stats:
        uniform = stats["kl_uniform"]
        columns["kl_uniform"] = uniform / rows
        columns[captured] = 1.0 - kl / uniform.clamp(min=1e-30)
    if "mass" in stats:
        columns["mass_recall"] = stats["mass"] / stats["rows"].clamp(min=1)
        columns["recall_of_oracle"] = stats["mass"] / stats["oracle_mass"].clamp(min=1e-30)
    means = {f"indexer/{name}": float(column[:layers].mean()) for name, column in columns.items() if name != "kl"}
    by_layer = {
        f"indexer/layer_{i:02d}/{name}": float(column[i])
        for i in range(layers)
        for name, column in columns.items()
        if name != "kl_uniform"
    }
    return {"loss/indexer_kl": float(columns["kl"][:layers].mean())} | means | by_layer


def load_metrics(counts: Tensor, layers: int, first_moe: int) -> dict[str, float]:
    """Tokens of the busiest expert over the mean, averaged over all routers and by main layer.

    counts [MoE layers, E]: main layers `first_moe` to `layers - 1`, then MTP's, which has no number of its own and is
    left out where it did not run.
    """
    counts = counts[counts.sum(-1) > 0]
    if not len(counts):
        return {}
    load = counts.amax(-1) / counts.mean(-1)
    by_layer = zip(range(first_moe, layers), load.tolist(), strict=False)
    return {"moe/load_max_over_mean": float(load.mean())} | {
        f"moe/layer_{i:02d}/load_max_over_mean": value for i, value in by_layer
    }


def step_metrics(sums: Sums, counts: Counts, stage: Stage, model: ModelConfig) -> dict[str, float]:
    """The logged losses and health metrics of a step from its global sums."""
    found: dict[str, float] = {}
    layers = model.num_hidden_layers
    if stage.lm_loss:
        found["loss/lm"] = float(sums["lm"]) / counts.lm
        found["loss/mtp"] = float(sums["mtp"]) / counts.mtp
    if stage.indexer_loss is not None:
        stats = {name.removeprefix("stat/"): value for name, value in sums.items() if name.startswith("stat/")}
        found |= indexer_metrics(sums["kl"], stats, counts.rows, layers, stage.indexer_loss)
    return found | load_metrics(sums["expert_counts"], layers, model.first_k_dense_replace)
