"""Lightning-indexer scores and their deterministic top-k, streamed over query blocks (DeepSeek-V3.2, eq. 1 and sec.
2.1).

    I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])          S_t = top-k of I[t, :] over the keys that t may see

Ties go to the lowest index, which neither torch's nor transformers' top-k promises: relu makes exact zeros common, so
ties at the border decide whether two backends select the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.ops.common import MAX_ROWS, Hidden, Scratch, compute_dtype, query_blocks, topk_indices
from model.ops.index_topk.fp8 import rounded
from model.ops.settings import DEFAULT, OpSettings

CPU_ROWS = 64
PRODUCT_BYTES = 4 << 20  # of the heads' products on CPU: in the caches, and large enough for the matrix product


def index_scores_block(q: Tensor, k: Tensor, w: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Scores [rows, keys] of q [rows, Hi, di], k [keys, di], w [rows, Hi], and the relu'd products [rows, Hi, keys]."""
    rows, heads, _ = q.shape
    products = torch.mm(q.flatten(0, 1), k.T, out=scratch("products", rows * heads, len(k)))
    products = products.relu_().view(rows, heads, -1)
    scores = torch.bmm(w.unsqueeze(1), products, out=scratch("scores", rows, 1, len(k)))
    return scores.squeeze(1), products


def _scores(q: Tensor, k: Tensor, w: Tensor, scratch: Scratch, product_bytes: int) -> Tensor:
    """The same scores where the products are not needed after: these live for a tile of keys."""
    (rows, heads, _), keys = q.shape, len(k)
    scores, q = scratch("scores", rows, 1, keys), q.flatten(0, 1)
    tile = max(1, product_bytes // (rows * heads * q.itemsize))
    for start in range(0, keys, tile):
        part = slice(start, min(start + tile, keys))
        products = torch.mm(q, k[part].T, out=scratch("products", rows * heads, part.stop - start)).relu_()
        # a product written straight into the columns would run row by row
        scores[:, :, part] = torch.bmm(w.unsqueeze(1), products.view(rows, heads, -1))
    return scores.squeeze(1)


def topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    doc_start: Tensor,
    q_pos: Tensor | None,
    count: int,
    settings: OpSettings = DEFAULT,
    block: int | None = None,
) -> Tensor:
    """[R, count] int32 of q [R, Hi, di], k [S, di], w [R, Hi]. Workspace: scores of one block of rows, products of one
    tile of it."""
    dtype = compute_dtype(q, k, w)
    k = rounded(k.to(dtype)) if settings.fp8_index else k.to(dtype)
    indices = torch.full((q.shape[0], count), -1, dtype=torch.int32, device=q.device)
    scratch = Scratch(dtype, q.device)
    product_bytes = settings.workspace // 2
    if q.device.type == "cpu":
        product_bytes = min(product_bytes, PRODUCT_BYTES)
    # beside the products: the scores, a row's folded maxima and its candidates
    most = CPU_ROWS if q.device.type == "cpu" else MAX_ROWS
    for b in query_blocks(doc_start, q_pos, 4 * dtype.itemsize, settings, block, most):
        q_b = q[b.rows].to(dtype)
        q_b = rounded(q_b) if settings.fp8_index else q_b
        scores = _scores(q_b, k[b.keys], w[b.rows].to(dtype), scratch, product_bytes)
        Hidden(doc_start, q_pos, b).fill(scores, -torch.inf)
        indices[b.rows] = topk_indices(scores, count, b.key_start)
    return indices
