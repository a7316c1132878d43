"""Held-out losses against direct sums over the same sequences, and shared out over ranks."""

from __future__ import annotations

import pytest
import torch

from data.packing import PackedBatch
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.evaluate import evaluate_losses
from train.parallel.cp import ContextParallel

NUM = 3


class Batches:
    def sequence(self, index: int) -> PackedBatch:
        return PackedBatch(**tiny.batch(index))


def evaluate(cp: int = 1) -> dict[str, float]:
    return evaluate_losses(tiny.build(), Batches(), NUM, ContextParallel(cp))


def test_losses_are_means_over_all_held_out_tokens() -> None:
    (found,) = run_ranks(evaluate, 1)
    net = tiny.build()
    sums = {"dense": 0.0, "sparse": 0.0}
    tokens = kl = uniform = rows = 0.0
    for i in range(NUM):
        batch = tiny.batch(i)
        tokens += int((batch["labels"] >= 0).sum())
        for attention in sums:
            loss = "dense" if attention == "dense" else None
            out = net(**batch, attention=attention, indexer_loss=loss, stats=True)
            sums[attention] -= float(out.token_logprobs.detach().sum())
            if loss:
                kl, uniform = kl + out.indexer_kl.detach()[0], uniform + out.stats["kl_uniform"][0]
                rows += float(out.num_rows)
    assert found["loss/lm_dense"] == pytest.approx(sums["dense"] / tokens, rel=1e-5)
    assert found["loss/lm_sparse"] == pytest.approx(sums["sparse"] / tokens, rel=1e-5)
    assert found["loss/lm_sparse"] != found["loss/lm_dense"]
    assert found["indexer/layer_00/kl"] == pytest.approx(float(kl) / rows, rel=1e-5)
    assert found["indexer/layer_00/kl_captured"] == pytest.approx(1 - float(kl / uniform), rel=1e-4)
    by_layer = [found[f"indexer/layer_{i:02d}/recall_of_oracle"] for i in range(2)]
    assert found["indexer/recall_of_oracle"] == pytest.approx(sum(by_layer) / 2)
    assert 0 < min(by_layer) <= max(by_layer) <= 1 + 1e-6
    assert "indexer/layer_02/kl" not in found  # MTP's indexer is left out


def test_ranks_share_the_sequences_and_agree() -> None:
    (alone,) = run_ranks(evaluate, 1)
    first, second = run_ranks(evaluate, 2)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)
    sliced, other = run_ranks(evaluate, 2, 2)
    assert sliced == other == pytest.approx(alone, rel=1e-5)


def test_parameters_keep_their_requires_grad() -> None:
    def check() -> tuple[bool, bool]:
        net = tiny.build()
        net.norm.weight.requires_grad_(False)
        evaluate_losses(net, Batches(), 1, ContextParallel(1))
        return net.norm.weight.requires_grad, net.lm_head.weight.requires_grad

    assert run_ranks(check, 1) == [(False, True)]
    assert torch.is_grad_enabled()
