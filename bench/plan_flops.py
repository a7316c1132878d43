"""What torch's counter sees of a step, and what plain torch runs beyond the formulas of train/flops.py, part by part,
where one query row is taken at a time. tests/train/test_flops.py and `python -m bench plan` use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import ModelConfig
from model import Transformer
from model.ops.settings import OpSettings
from train.flops import (
    Row,
    pair_flops,
    row_flops,
    score_flops,
    score_gradient_flops,
    selected_pairs,
    visible_pairs,
)
from train.optim import select_trainable
from train.stages import STAGES

EXACT = OpSettings(workspace=1)  # one query row at a time: exactly the visible keys


def grouped(mat_a: Any, mat_b: Any, *_: Any, **__: Any) -> int:
    """x [N, K] in groups against [E, K, M], and its gradient of the weight [K, N] x [N, M] in groups: 2 N K M."""
    return 2 * mat_a[0] * mat_a[1] * mat_b[-1]


GROUPED = {torch.ops.aten._grouped_mm: grouped}


def count(net: Transformer, stage: str, batch: dict[str, Tensor], backward: bool, **forward: Any) -> int:
    """What the counter sees of a packed row."""
    declared = STAGES[stage]
    select_trainable(net, declared)
    if not backward:  # not no_grad: the counter's hooks on modules want gradients to be recorded
        net.requires_grad_(False)
    with (
        FlopCounterMode(display=False, custom_mapping=GROUPED) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        out = net(
            **batch,
            attention=declared.attention,
            indexer_loss=declared.indexer_loss,
            lm_loss=declared.lm_loss,
            trunk_grad=declared.trunk_grad,
            **forward,
        )
        if backward:
            terms = [x.sum() for x in (out.token_logprobs, out.mtp_logprobs, out.indexer_kl) if x is not None]
            torch.stack(terms).sum().backward()
    return counter.get_total_flops()


def beyond(model: ModelConfig, stage: str, row: Row, rows: int, backward: bool, mtp: bool) -> dict[str, int]:
    """What plain torch runs beyond the formula for a row of `rows` tokens, padding included, at a workspace of 1."""
    declared, heads, topk = STAGES[stage], model.num_attention_heads, model.index_topk
    layers = model.num_hidden_layers + mtp
    chosen, padding = selected_pairs(row.lengths, topk), rows - sum(row.lengths)
    latent, width = model.kv_lora_rank, model.kv_lora_rank + model.qk_rope_head_dim
    trains = backward and declared.trunk_grad and declared.trains_trunk
    found = {}
    if padding:  # padded rows pass through every projection
        one = row_flops(model, declared, Row((1,), 0), mtp=mtp, backward=backward)
        found["padding"] = padding * (one["linear"] + one["index_linear"])
    if trains and declared.lm_loss:
        tokens = row.targets + (row.mtp_targets if mtp else 0)
        found["logits again"] = 2 * model.hidden_size * model.vocab_size * tokens
    if declared.attention == "sparse":
        # a row that sees fewer than k keys is filled up to k
        found["filled up"] = layers * pair_flops(model, "sparse") * (rows * topk - chosen)
        if trains:
            # per pair: [d_out, 0; q] . row, d_logits . row, [d_logits; p] . [q; d_out, 0], all `width` wide
            executed = 2 * heads * 5 * width * rows * topk
            found["backward: probabilities again, zeros"] = layers * (
                executed - 2 * pair_flops(model, "sparse") * chosen
            )
            found["absorbed again"] = layers * 2 * heads * model.qk_nope_head_dim * latent * rows
    if declared.indexer_loss == "selected":
        found["scores of the selection again"] = layers * score_flops(model) * rows * topk
        if backward:
            found["their gradients, filled up"] = layers * score_gradient_flops(model) * (rows * topk - chosen)
    if declared.attention == "dense" and declared.indexer_loss is None:
        # torch's math SDPA: the whole square of every document, values padded to the width of the keys
        square = sum(length**2 for length in row.lengths)
        executed = 2 * heads * 2 * max(model.qk_head_dim, model.v_head_dim) * square
        needed = pair_flops(model, "dense") * visible_pairs(row.lengths)
        found["square"] = layers * (executed - needed) * (3 if trains else 1)
    return found
