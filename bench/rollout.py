"""Our sampler against transformers' `generate` on the same exported checkpoint: greedy, batch 32, 64 new tokens.

The tiny preset (4 layers, 128 wide, 8 experts, k = 64) with random weights, prompts of one length, one thread. Both run
in turns in one process, and CPU time is compared, the least of the turns. Greedy tokens must be equal, with ties in
transformers' selection broken as ours; a row where the two part is excused only where the two likeliest logits of a
full forward were closer than rounding.
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
CLOSE = 1e-4  # of two logits: above it greedy decoding must agree


def least_cpu_seconds(turns: int, *steps: Callable[[], Any]) -> list[float]:
    """Of turns side by side."""
    found: list[list[float]] = [[] for _ in steps]
    for _ in range(turns):
        for step, times in zip(steps, found, strict=True):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
    return [min(times) for times in found]


def parted(net: Transformer, prompts: torch.Tensor, mine: torch.Tensor, theirs: torch.Tensor) -> tuple[int, int]:
    """(rows that part, those of them without the excuse of a close call)."""
    rows = (mine != theirs).any(1).nonzero().squeeze(1).tolist()
    wrong = 0
    for row in rows:
        first = int((mine[row] != theirs[row]).nonzero()[0])
        ids = torch.cat([prompts[row], mine[row, :first]])[None]
        with torch.no_grad():
            best = net.logits(ids, attention="sparse")[0, -1].topk(2).values
        wrong += int(best[0] - best[1] > CLOSE)
    return len(rows), wrong


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
        rows, wrong = parted(net, prompts, ours(), theirs())
    mine, other = least_cpu_seconds(TURNS[context], ours, theirs)
    return {
        "context": context,
        "ours_tokens_per_cpu_s": round(BATCH * NEW / mine),
        "theirs_tokens_per_cpu_s": round(BATCH * NEW / other),
        "speedup": round(other / mine, 2),
        "rows_that_part": rows,
        "of_them_not_close": wrong,
        "passed": wrong == 0 and other / mine >= MIN_SPEEDUP[context],
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
