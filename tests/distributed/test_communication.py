"""What travels between ranks in a step, counted on the collectives themselves, equals the formulas of docs/parallel.md.

Counted are the bytes of the larger buffer of a call: what an all-gather gives, what a reduce-scatter takes.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import TrainConfig
from model.context import documents
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.losses import global_counts, micro_batch_loss
from train.optim import select_trainable
from train.parallel.cp import ContextParallel
from train.parallel.ep import ExpertParallel
from train.stages import STAGES

T, FP32, INT64 = 16, 4, 8
MODEL = tiny.MODEL
LAYERS = MODEL.num_hidden_layers + MODEL.num_mtp_layers
MOE_LAYERS = LAYERS - MODEL.first_k_dense_replace
LATENT, KEY = MODEL.kv_lora_rank + MODEL.qk_rope_head_dim, MODEL.index_head_dim
CALLS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
}


class Bytes(TorchDispatchMode):
    """Collective -> bytes of its larger buffer, while active; any other collective is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = CALLS[function._schema.name.removeprefix("c10d::")]
            tensors = [t for arg in args[:2] for t in (arg if isinstance(arg, list) else [arg])]
            sizes = [t.numel() * t.itemsize for t in tensors if isinstance(t, torch.Tensor)]
            self.found[name] += max(sizes)
        return function(*args, **(kwargs or {}))


def count(stage_name: str, cp_size: int, ep_size: int) -> tuple[dict[str, int], list[int]]:
    """(bytes by collective of one forward and backward, tokens that each MoE layer sent and received)."""
    stage, net = STAGES[stage_name], tiny.build()
    cp, ep = ContextParallel(cp_size), ExpertParallel(ep_size)
    ep.cut(net)
    select_trainable(net, stage)
    batch = tiny.batch(cp.replica, T)
    counts = global_counts([batch], cp.size)
    rows, context = cp.share(batch)
    exchanged = [0]
    from train.parallel import ep as module

    real = module._exchange

    def exchange(x, sent, received, group):
        exchanged.append(max(sum(sent), sum(received)))
        return real(x, sent, received, group)

    module._exchange = exchange
    with Bytes() as counter:
        out = net(
            **rows,
            context=context,
            attention=stage.attention,
            indexer_loss=stage.indexer_loss,
            lm_loss=stage.lm_loss,
            trunk_grad=stage.trunk_grad,
        )
        micro_batch_loss(out, counts, stage, TrainConfig())[0].backward()
    return dict(counter.found), exchanged


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallelism_moves_latents_and_index_keys_alone(cp: int) -> None:
    num_documents = len(documents(tiny.batch(0, T)["doc_start"])[1])
    gathered = LAYERS * T * (LATENT + KEY) * FP32
    for found, _ in run_ranks(count, cp, "sparse_adapt", cp, 1):
        assert found == {
            "all-gather": gathered,
            "reduce-scatter": gathered,
            "all-reduce": MOE_LAYERS * num_documents * MODEL.n_routed_experts * FP32,
        }
    for found, _ in run_ranks(count, cp, "dense_warmup", cp, 1):  # a frozen trunk takes no gradient back
        assert found == {"all-gather": gathered, "reduce-scatter": LAYERS * T * KEY * FP32}


def test_expert_parallelism_moves_each_choice_there_and_back() -> None:
    answers = run_ranks(count, 2, "sparse_adapt", 1, 2)
    rows = MODEL.num_experts_per_tok * T  # of each rank
    passes = 4  # there and back, forward and backward
    for found, exchanged in answers:
        overhead = MOE_LAYERS * MODEL.n_routed_experts * INT64
        assert found == {"all-to-all": overhead + sum(exchanged) * MODEL.hidden_size * FP32}
        assert len(exchanged) - 1 == MOE_LAYERS * passes
        assert all(each >= rows for each in exchanged[1:])
    # what one rank receives beyond its own share the other lacks: nothing is dropped
    for first, second in zip(answers[0][1][1:], answers[1][1][1:], strict=True):
        assert rows == min(first, second) and max(first, second) <= 2 * rows
