"""Held-out losses of a model: LM loss with dense and with sparse attention, and what the indexer captures of attention.

The indexer is measured against dense attention over all causal positions, so a run before and after adaptation is read
on the same scale. On request the same forwards fill a `ByPosition`, with sparse attention over other numbers of tokens
and another checkpoint beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from data.packing import PackedBatch
from model import ForwardOutput, Transformer
from model.context import Context
from train.by_position import ByPosition
from train.losses import Sums, add_sums, indexer_metrics, reduce_sums
from train.parallel.cp import ContextParallel
from train.precision import autocast_dtype

STATS = ("kl_uniform", "mass", "oracle_mass", "rows")


class Sequences(Protocol):
    """The i-th packed sequence, the same on every rank."""

    def sequence(self, index: int) -> PackedBatch: ...


@torch.no_grad()
def evaluate_losses(
    net: Transformer,
    sequences: Sequences,
    num_sequences: int,
    cp: ContextParallel,
    precision: str = "fp32",
    done: Callable[[], None] = lambda: None,
    by_position: ByPosition | None = None,
) -> dict[str, float]:
    """The first `num_sequences` of `sequences`, shared out over the replicas of `cp`; the same result on every rank.

    Returns loss/lm_dense and loss/lm_sparse (nats a token), loss/mtp_dense where there is MTP, and the keys of
    `losses.indexer_metrics` for all causal positions. `done` is called after each of this replica's
    sequences. `by_position` is filled with this rank's part and left for the caller to reduce.
    """
    device = next(net.parameters()).device
    layers = net.config.num_hidden_layers + len(net.mtp)
    total: Sums = {}
    autocast = autocast_dtype(precision)
    with _frozen(net), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for index in range(cp.replica, num_sequences, cp.replicas):
            batch, context = cp.share(_on(device, sequences.sequence(index)))
            dense, sparse = both_forwards(net, batch, context, () if by_position is None else by_position.topks)
            add_sums(total, {name: value.double() for name, value in sequence_sums(batch, dense, sparse).items()})
            if by_position is not None:
                by_position.add_sequence(index, batch, context, dense, sparse)
                for topk in by_position.topks[1:]:
                    with net.selecting(topk):
                        other = net(**batch, context=context, attention="sparse", mtp=False)
                    by_position.add_loss(f"sparse@{topk}", index, batch, other.token_logprobs)
            done()
    scalars = ("lm_dense", "lm_sparse", "mtp_dense", "lm_tokens", "mtp_tokens", "positions")
    shapes: dict[str, tuple[int, ...]] = {name: () for name in scalars} | {"kl": (layers,)}
    found = reduce_sums(total, shapes | {f"stat/{name}": (layers,) for name in STATS})
    tokens = max(float(found["lm_tokens"]), 1.0)
    result = {"loss/lm_dense": float(found["lm_dense"]) / tokens, "loss/lm_sparse": float(found["lm_sparse"]) / tokens}
    if found["mtp_tokens"] > 0:
        result["loss/mtp_dense"] = float(found["mtp_dense"] / found["mtp_tokens"])
    stats = {name: found[f"stat/{name}"] for name in STATS}
    rows = max(float(found["positions"]), 1.0)
    return result | indexer_metrics(found["kl"], stats, rows, net.config.num_hidden_layers, "dense")


@torch.no_grad()
def add_other(
    net: Transformer,
    attention: str,
    sequences: Sequences,
    num_sequences: int,
    cp: ContextParallel,
    precision: str,
    by_position: ByPosition,
    done: Callable[[], None] = lambda: None,
) -> None:
    """The losses of another checkpoint on the same sequences, under the name `other`."""
    device, autocast = next(net.parameters()).device, autocast_dtype(precision)
    with _frozen(net), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for index in range(cp.replica, num_sequences, cp.replicas):
            batch, context = cp.share(_on(device, sequences.sequence(index)))
            out = net(**batch, context=context, attention=attention, mtp=False)
            by_position.add_loss("other", index, batch, out.token_logprobs)
            done()


def _on(device: torch.device, sequence: PackedBatch) -> dict[str, Tensor]:
    return {name: field.to(device) for name, field in sequence.tensors().items()}


def both_forwards(
    net: Transformer, batch: dict[str, Tensor], context: Context, row_topk: tuple[int, ...]
) -> tuple[ForwardOutput, ForwardOutput]:
    """Of one sequence: dense with the indexer's loss, and sparse."""
    dense = net(**batch, context=context, attention="dense", indexer_loss="dense", stats=True, row_topk=row_topk)
    return dense, net(**batch, context=context, attention="sparse", mtp=False)


def sequence_sums(batch: dict[str, Tensor], dense: ForwardOutput, sparse: ForwardOutput) -> Sums:
    """Sums over the rows of one sequence."""
    assert dense.indexer_kl is not None and dense.token_logprobs is not None and sparse.token_logprobs is not None
    sums = {
        "lm_dense": -dense.token_logprobs.sum(),
        "lm_sparse": -sparse.token_logprobs.sum(),
        "lm_tokens": (batch["labels"] >= 0).sum(),
        "positions": dense.num_rows,
        "kl": dense.indexer_kl,
    }
    if dense.mtp_logprobs is not None:
        sums |= {"mtp_dense": -dense.mtp_logprobs.sum(), "mtp_tokens": (batch["mtp_labels"] >= 0).sum()}
    return sums | {f"stat/{name}": dense.stats[name] for name in STATS}


@contextmanager
def _frozen(net: Transformer) -> Iterator[None]:
    """No parameter asks for gradients: the indexer's loss would otherwise make its own, even under no_grad."""
    asked = [p for p in net.parameters() if p.requires_grad]
    for p in asked:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
