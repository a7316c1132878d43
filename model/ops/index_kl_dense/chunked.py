"""Dense attention and the warm-up loss through the Triton kernels, chunk by chunk of query rows.

Flash attention gives the output and the log-sum-exp; then a chunk's scores and target are two kernels, the softmax and
the KL a few operations of torch on [rows, keys], and the indexer's gradients two kernels more. A chunk costs one more
product of queries and keys than the streaming form, and keeps every product on the tensor cores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import Hidden, Scratch, positions, query_blocks
from model.ops.index_kl_dense import kernel
from model.ops.index_kl_dense.loss import learn_block, new_sums, selection_rows
from model.ops.mla_dense import kernel as attention
from model.ops.settings import OpSettings

BYTES_PER_PAIR = 8 * 4  # scores, target, log-softmax, its gradient, and what the statistics select from
MAX_ROWS = 4096


def attend_and_learn(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    q_index: Tensor,
    k_index: Tensor,
    w: Tensor,
    doc_start: Tensor,
    q_pos: Tensor | None,
    topk: int | None,
    with_grad: bool,
    settings: OpSettings,
    block: int | None = None,
    row_topk: tuple[int, ...] = (),
) -> tuple[Tensor | None, dict[str, Tensor], tuple[Tensor, Tensor, Tensor] | None]:
    """As streaming.attend_and_learn; products run in the dtypes of q and q_index, whatever keys and values came in."""
    first, last = doc_start.int(), positions(doc_start, q_pos).int()
    k, k_index = k.to(q.dtype), k_index.to(q_index.dtype)
    q, k, q_index, k_index, w = (t.contiguous() for t in (q, k, q_index, k_index, w))
    values = (
        k.new_empty(*k.shape[:2], 0) if v is None else v.to(q.dtype).contiguous()
    )  # without values: the log-sum-exp alone
    out, lse = attention.forward(q, k, values, scale, first, last)
    sums = new_sums(topk, lse)
    if row_topk:
        sums["by_row"] = torch.zeros(len(row_topk), 3, q.shape[0], dtype=sums["kl"].dtype, device=q.device)
    gradients = None
    if with_grad:
        d_q, d_k, d_w = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q_index, k_index, w))
        gradients = d_q, d_k, d_w
    scratch = Scratch(torch.float32, q.device)
    for b in query_blocks(doc_start, q_pos, BYTES_PER_PAIR, settings, block, MAX_ROWS):
        q_b, w_b, lse_b = q_index[b.rows], w[b.rows], lse[b.rows]
        window = first[b.rows], last[b.rows], b.key_start, b.key_stop
        scores = kernel.scores(q_b, k_index, w_b, *window)
        p = kernel.target(q[b.rows], k, lse_b, scale, *window)
        hidden = Hidden(doc_start, q_pos, b)
        for place, count in enumerate(row_topk):
            sums["by_row"][place, :, b.rows] = selection_rows(scores, p, hidden, count, scratch)
        d_scores = learn_block(sums, scores, p, hidden, topk, scratch)
        if gradients is not None:
            gradients[0][b.rows], gradients[2][b.rows] = kernel.backward(
                q_b, k_index, w_b, d_scores, b.key_start, gradients[1]
            )
    return (None if v is None else out), sums, gradients
