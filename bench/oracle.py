"""transformers' DeepseekV32ForCausalLM against ours on the same weights: forward and backward of the LM loss.

A tiny model (3 layers, 64 wide, k = 256, with 4 index heads and with 16) written by us in V3.2's format and read by
both. Every contestant and length is a process of its own, on one thread: CPU time of the step and the high-water mark
it adds. Ours takes the indexer's loss and gradients in the same step; transformers does not train its indexer at all.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bench.memory import apart, peak_bytes, tiny
from bench.registry import benchmark
from conf.schema import ModelConfig
from model import Transformer, from_pretrained, save_pretrained

LENGTHS = (4096, 8192)
MIN_SPEEDUP, MAX_MEMORY_SHARE = 10.0, 1 / 20  # the latter at the last length
MAX_LOSS_ERROR = 1e-5  # relative, at the first length, with transformers' ties broken as ours
MIB = 2**20


INDEX_HEADS = (4, 16)


def oracle_model(index_heads: int = 4) -> ModelConfig:
    return replace(
        tiny(), hidden_size=64, num_hidden_layers=3, num_nextn_predict_layers=0, index_n_heads=index_heads,
        index_topk=256, vocab_size=512, max_position_embeddings=LENGTHS[-1],
    )  # fmt: skip


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(0, oracle_model().vocab_size, (length + 1,), generator=torch.Generator().manual_seed(length))


def ours(folder: Path, length: int) -> dict[str, Any]:
    net = from_pretrained(folder, dtype=torch.float32)

    def step(tokens: torch.Tensor) -> float:
        ids, rows = tokens[:-1], len(tokens) - 1
        positions, doc_start = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
        masked = torch.full_like(ids, -100)
        out = net(
            ids, tokens[1:], tokens[1:], masked, positions, doc_start, attention="sparse", indexer_loss="selected"
        )
        assert out.token_logprobs is not None and out.indexer_kl is not None
        loss = -out.token_logprobs.sum() / rows
        (loss + out.indexer_kl.sum() / rows).backward()
        return loss.item()

    return _measure(step, length)


def theirs(folder: Path, length: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    net.train()

    def step(tokens: torch.Tensor) -> float:
        ids = tokens[None, :-1]
        loss = net(input_ids=ids, labels=ids, shift_labels=tokens[None, 1:], use_cache=False).loss
        loss.backward()
        return loss.item()

    return _measure(step, length)


class StableTopk(TorchFunctionMode):
    """Ranks with ties to the lowest index, as we do; torch.topk leaves them open."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.topk and args[0].is_floating_point():
            ranked = args[0].sort(dim=-1, descending=True, stable=True)
            return torch.return_types.topk((ranked.values[..., : args[1]], ranked.indices[..., : args[1]]))
        return func(*args, **(kwargs or {}))


def theirs_with_our_ties(folder: Path, length: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = _tokens(length)
    ids = tokens[None, :-1]
    with torch.no_grad(), StableTopk():
        loss = net(input_ids=ids, labels=ids, shift_labels=tokens[None, 1:], use_cache=False).loss
    return {"loss": loss.item()}


def _measure(step: Any, length: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    step(_tokens(2 * oracle_model().index_topk))  # loads what is loaded once
    before, start = peak_bytes(), time.process_time()
    loss = step(_tokens(length))
    seconds = time.process_time() - start
    extra = peak_bytes() - before
    return {"cpu_seconds": round(seconds, 2), "extra_bytes": extra, "loss": loss}


@benchmark
def oracle() -> dict[str, Any]:
    """Our step against transformers' with the same weights at 4K and 8K, one thread."""
    rows, broken = [], []
    for index_heads in INDEX_HEADS:
        net = Transformer(oracle_model(index_heads))
        net.init_weights(0)
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(net, folder)
            for length in LENGTHS:
                mine, other = (apart("bench.oracle", who, folder, str(length)) for who in ("ours", "theirs"))
                row: dict[str, Any] = {"index_heads": index_heads, "T": length, "ours": mine, "transformers": other}
                row["speedup"] = round(other["cpu_seconds"] / mine["cpu_seconds"], 1)
                row["memory_share"] = round(mine["extra_bytes"] / other["extra_bytes"], 4)
                # relu leaves exact zeros on the border of a selection: transformers takes them as torch.topk does
                row["loss_difference"] = abs(mine["loss"] - other["loss"]) / abs(other["loss"])
                share = f"1/{1 / row['memory_share']:.0f} of the memory"
                where = f"{index_heads} index heads, T={length}"
                print(
                    f"{where}: {mine['cpu_seconds']} CPU s and {mine['extra_bytes'] / MIB:.0f} MiB extra against "
                    f"{other['cpu_seconds']} and {other['extra_bytes'] / MIB:.0f}: {row['speedup']}x faster, {share}; "
                    f"losses {row['loss_difference']:.1e} apart",
                    flush=True,
                )
                if row["speedup"] < MIN_SPEEDUP:
                    broken.append(f"{where}: {row['speedup']}x faster, wanted {MIN_SPEEDUP:.0f}x")
                if length == LENGTHS[-1] and row["memory_share"] > MAX_MEMORY_SHARE:
                    broken.append(f"{where}: {share}, wanted 1/{1 / MAX_MEMORY_SHARE:.0f}")
                if length == LENGTHS[0]:
                    same = apart("bench.oracle", "theirs_with_our_ties", folder, str(length))["loss"]
                    row["loss_error"] = abs(mine["loss"] - same) / abs(same)
                    print(f"{where}: with ties broken alike the losses are {row['loss_error']:.1e} apart", flush=True)
                    if row["loss_error"] > MAX_LOSS_ERROR:
                        broken.append(f"{where}: losses {row['loss_error']:.1e} apart, at most {MAX_LOSS_ERROR}")
                rows.append(row)
    for line in broken:
        print(f"not kept: {line}")
    config = {"model": asdict(oracle_model()), "index_heads": INDEX_HEADS, "threads": 1}
    return {"config": config, "rows": rows, "not_kept": broken, "passed": not broken}


if __name__ == "__main__":
    who = {"ours": ours, "theirs": theirs, "theirs_with_our_ties": theirs_with_our_ties}[sys.argv[1]]
    print(json.dumps(who(Path(sys.argv[2]), int(sys.argv[3]))))
