"""How fast a model generates behind a context of a given length, and what its cache takes: prefill, decode, bytes.

One sample at a time, greedy, through the sampler's own decoder (model/generate.py). A cached token is a latent with its
rotated key and, for the indexer, one index key in fp32: `cache_bytes` is that formula, beside what was allocated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from conf.schema import ModelConfig
from conf.validate_eval import DECODED
from model import Transformer
from model.generate import Decoder
from train.precision import autocast_dtype

WARM_UP = 32  # tokens of a first prefill, which pays for what is made once
Row = dict[str, float | int | str | None]


def cache_bytes(model: ModelConfig, tokens: int, itemsize: int) -> tuple[int, int]:
    """Bytes of the latents (values of `itemsize` bytes) and of the index keys (fp32) that `tokens` take."""
    layers = model.num_hidden_layers
    latents = layers * tokens * (model.kv_lora_rank + model.qk_rope_head_dim) * itemsize
    return latents, layers * tokens * model.index_head_dim * 4


@torch.no_grad()
def generation_speed(
    net: Transformer, lengths: Sequence[int], precision: str, done: Callable[[], None] = lambda: None
) -> list[Row]:
    """A row a length and attention: prefill_s, prefill_tokens_per_s, decode_tokens_per_s, kv_bytes, index_key_bytes
    (allocated), the same `_by_formula`, and on a GPU peak_memory_bytes (weights included), else None."""
    weight = net.embed_tokens.weight
    autocast = autocast_dtype(precision)
    rows: list[Row] = []
    with torch.autocast(weight.device.type, autocast, enabled=autocast is not None):
        for attention in ("dense", "sparse"):
            _timed(net, min(WARM_UP, min(lengths)), attention)
            for length in lengths:
                rows.append(_timed(net, length, attention))
                done()
    return sorted(rows, key=lambda row: (row["length"], row["attention"]))


def _timed(net: Transformer, length: int, attention: str) -> Row:
    weight = net.embed_tokens.weight
    device, capacity = weight.device, length + DECODED
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, net.config.vocab_size, (length,), generator=generator).tolist()
    decoder = Decoder(net, 1, capacity, attention)
    start = _now(device)
    last = decoder.prefill([prompt])
    prefilled = _now(device)
    for position in range(length, capacity):
        token = net.lm_head(last).argmax(-1, keepdim=True)
        last = decoder.hidden(token, torch.full((1, 1), position, device=device)).squeeze(1)
    decoded = _now(device)
    kv, index = (
        sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        for tensors in ([c.kv for c in decoder.cache], [c.index_k for c in decoder.cache])
    )
    kv_formula, index_formula = cache_bytes(net.config, capacity, weight.element_size())
    return {
        "length": length,
        "attention": attention,
        "prefill_s": prefilled - start,
        "prefill_tokens_per_s": length / (prefilled - start),
        "decode_tokens_per_s": DECODED / (decoded - prefilled),
        "kv_bytes": kv,
        "index_key_bytes": index,
        "kv_bytes_by_formula": kv_formula,
        "index_key_bytes_by_formula": index_formula,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
