"""Our sampler against transformers' `generate` on the same exported checkpoint: greedy, batch 32, 64 new tokens.

The tiny preset (4 layers, 128 wide, 8 experts, k = 64) with random weights, prompts of one length, one thread. Both run
in turns in one process, and CPU time is compared, the least of the turns. Greedy tokens must be equal, with ties in
transformers' selection broken as ours; a row where the two part is excused only where rounding decided: the two
likeliest words of a full forward are that close, or the scores between which the first selections differ are.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.memory import tiny
from bench.oracle import StableTopk
from bench.registry import benchmark
from model import Transformer, from_pretrained, save_pretrained
from model.generate import Ask, Sampling, generate

BATCH, NEW = 32, 64
TURNS = {32: 3, 1024: 1}  # by context
MIN_SPEEDUP = {32: 1.0, 1024: 2.0}
CLOSE = 1e-4  # of two logits: above it both must choose alike
CLOSE_SCORES = 1e-5  # of two index scores, over the largest of the row


def least_cpu_seconds(turns: int, *steps: Callable[[], Any]) -> list[float]:
    """Of turns side by side."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(turns):
        for step, times in zip(steps, found, strict=True):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
    return [min(times) for times in found]


class RecordedTopk(StableTopk):
    """Keeps the scores and the choice of every selection, layer by layer: the calls with k = `topk` over a sequence."""

    def __init__(self, topk: int) -> None:
        super().__init__()
        self.topk = topk
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.topk and args[1] == self.topk:
            self.calls.append((args[0].reshape(-1, args[0].shape[-1]), found.indices.reshape(-1, self.topk)))
        return found


def selection_gap(net: Transformer, oracle: Any, ids: list[int]) -> float | None:
    """Reads `ids` with both models; None where all selections agree. Else, in the first layer in which they do not, the
    largest distance of two scores of the oracle between which the models chose differently: a layer below which all
    agrees has the same inputs in both, so only rounding may decide there."""
    ask = Ask(ids, 0, 1)
    (drawn,) = generate(net, [ask], Sampling(temperature=0, record=frozenset({"selected"})), eos_id=-1)
    assert drawn.selected is not None
    with torch.no_grad(), RecordedTopk(net.config.index_topk) as recorded:
        oracle(torch.tensor([ids]), use_cache=False)
    assert len(recorded.calls) == net.config.num_hidden_layers
    for layer, (scores, chosen) in enumerate(recorded.calls):
        gaps = []
        for row in range(net.config.index_topk, len(ids)):
            mine, theirs = set(drawn.selected[row, layer].tolist()), set(chosen[row].tolist())
            if mine != theirs:
                apart = scores[row, sorted(mine ^ theirs)]
                gaps.append(float(apart.max() - apart.min()) / float(scores[row, sorted(theirs)].abs().max()))
        if gaps:
            return max(gaps)
    return None


def parted(
    net: Transformer, oracle: Any, prompts: torch.Tensor, mine: torch.Tensor, theirs: torch.Tensor
) -> tuple[int, int, int]:
    """(rows that part, those of them where two words were close, where a selection was)."""
    rows = (mine != theirs).any(1).nonzero().squeeze(1).tolist()
    words = selections = 0
    for row in rows:
        first = int((mine[row] != theirs[row]).nonzero()[0])
        ids = torch.cat([prompts[row], mine[row, :first]])
        with torch.no_grad():
            best = net.logits(ids[None], attention="sparse")[0, -1].topk(2).values
        if best[0] - best[1] <= CLOSE:
            words += 1
        else:
            gap = selection_gap(net, oracle, ids.tolist())
            print(f"row {row}, token {first}: words {best[0] - best[1]:.1e} apart, selections {gap}", flush=True)
            selections += int(gap is not None and gap <= CLOSE_SCORES)
    return len(rows), words, selections


def measure(net: Transformer, oracle: Any, context: int) -> dict[str, Any]:
    prompts = torch.randint(
        2, net.config.vocab_size, (BATCH, context), generator=torch.Generator().manual_seed(context)
    )
    asks = [Ask(prompt.tolist(), i, NEW) for i, prompt in enumerate(prompts)]
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}

    def ours() -> torch.Tensor:
        return torch.tensor([each.ids for each in generate(net, asks, Sampling(temperature=0), eos_id=-1)])

    def theirs() -> torch.Tensor:
        return oracle.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)[:, context:]

    with StableTopk():
        rows, words, selections = parted(net, oracle, prompts, ours(), theirs())
    mine, other = least_cpu_seconds(TURNS[context], ours, theirs)
    return {
        "context": context,
        "ours_tokens_per_cpu_s": round(BATCH * NEW / mine),
        "theirs_tokens_per_cpu_s": round(BATCH * NEW / other),
        "speedup": round(other / mine, 2),
        "rows_that_part": rows,
        "of_them_close_words": words,
        "of_them_close_selections": selections,
        "passed": rows == words + selections and other / mine >= MIN_SPEEDUP[context],
    }


@benchmark
def rollout() -> dict[str, Any]:
    """Greedy decoding beside transformers' generate: batch 32, 64 new tokens, contexts of 32 and 1,024 (5 minutes)."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    net = Transformer(replace(tiny(), num_nextn_predict_layers=0))
    net.init_weights(0)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(net, folder)
        net = from_pretrained(folder).requires_grad_(False)
        oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for context in TURNS:
        rows.append(measure(net, oracle, context))
        print(rows[-1], flush=True)
    config = {"model": asdict(net.config), "batch": BATCH, "new_tokens": NEW, "turns": TURNS, "threads": 1}
    return {"config": config, "rows": rows, "passed": all(row["passed"] for row in rows)}
