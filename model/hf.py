"""Hugging Face checkpoints, both ways: DeepSeek-V3 / V3.1 (dense) and V3.2 are read, V3.2 is written.

    net = from_pretrained("DeepSeek-V3.1-Base", dtype=torch.bfloat16, index_topk=2048)
    save_pretrained(net, "out", tokenizer_folder="DeepSeek-V3.1-Base")

Tensors are streamed one by one into their place (`model/fill.py`): beside the model itself, or this process's share
of it, there is never more than one of them. All
headers are checked first, so that a checkpoint that does not fit is refused before anything is read. An indexer that
is missing altogether is initialised (a dense checkpoint on its way to sparse attention); one that is missing in part
is an error.

MTP layers: DeepSeek's files hold them, files saved by transformers do not, though their config.json still announces
them. So a checkpoint that holds no tensor of its MTP layers is read without them, with a warning; asking for
`mtp="keep"` makes that an error, and `mtp="drop"` leaves out what is there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from conf.errors import UserError
from conf.schema import ModelConfig
from model.fill import Share, fill, materialise
from model.fp8 import quantize, scale_shape
from model.hf_config import load_config_json, parse_config, write_config
from model.hf_files import SCALE_SUFFIX, Checkpoint, Planned, special_token_ids, torch_dtype_of, write_folder
from model.hf_names import Slot, is_ignored, slots, stored_dtype
from model.transformer import INDEXER_INIT, Drawn, Transformer

__all__ = ["convert", "from_pretrained", "load_weights", "read_config", "save_pretrained", "write_config"]

log = logging.getLogger(__name__)
SHARD_BYTES = 4 * 1024**3
T = TypeVar("T")
Progress = Callable[[list[T]], Iterable[T]]  # wraps a list that is worked through: tqdm, or nothing


def _silent(items: list[T]) -> Iterable[T]:
    return items


def read_config(folder: str | Path, **overrides: Any) -> ModelConfig:
    """The architecture of a checkpoint folder. `overrides`: index_n_heads, index_head_dim, index_topk, mtp.

    Only a dense checkpoint takes another indexer; its index_* default to DeepSeek-V3.2's (64, 128, 2048). Raises
    UserError with one line naming the key and value that are not supported.
    """
    config = parse_config(load_config_json(folder), str(Path(folder) / "config.json"), **overrides)
    if config.num_mtp_layers == 0 or "mtp" in overrides:
        return config
    if any(_is_mtp(name, config) for name in Checkpoint(folder).entries):
        return config
    log.warning("%s announces a multi-token-prediction layer but holds none: continuing without it", folder)
    return replace(config, num_nextn_predict_layers=0)


def from_pretrained(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    progress: Progress[Slot] = _silent,
    **overrides: Any,
) -> Transformer:
    """Any supported checkpoint folder -> Transformer on the CPU. `seed`: of an indexer that the checkpoint lacks.

    `overrides` as for `read_config`. Built on the meta device first, so the weights exist once. Raises UserError
    naming file and tensor.
    """
    config = read_config(folder, **overrides)
    with torch.device("meta"):
        net = Transformer(config)
    load_weights(net, folder, dtype, seed=seed, progress=progress)
    return net


def load_weights(
    net: Transformer,
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    progress: Progress[Slot] = _silent,
    share: Share | None = None,
) -> None:
    """Fills `net` from a checkpoint folder. What is on the meta device is made on the CPU in `dtype` (routers and the
    indexer's small parts in fp32); what exists keeps its device and dtype. Of experts that other processes hold, and
    of what `share` leaves to others, nothing is read. Raises UserError before anything is changed."""
    checkpoint = Checkpoint(folder)
    wanted = _plan(net, checkpoint)
    parts: dict[str, list[Slot]] = {}
    for slot in wanted:
        parts.setdefault(slot.ours, []).append(slot)
    steps, drawn = iter(progress(wanted)), Drawn(_indexer_shapes(net.config), seed, INDEXER_INIT)

    def write(name: str, values: Tensor, start: int, length: int) -> None:
        if name not in parts:
            values[start : start + length] = drawn(name).view(-1)[start : start + length]
        for slot in parts.get(name, []):
            next(steps)
            size = math.prod(slot.shape)
            offset = 0 if slot.expert is None else (slot.expert - net.first_expert) * size
            low, high = max(start, offset), min(start + length, offset + size)
            if low < high:
                values[low:high] = checkpoint.read_flat(slot.hf_name, low - offset, high - offset)

    if not any(slot.is_indexer for slot in wanted):
        _say_fresh(folder)
    fill(net, dtype, write, share)
    next(steps, None)  # the end of what shows the progress


def _is_mtp(name: str, config: ModelConfig) -> bool:
    first = config.num_hidden_layers
    return any(name.startswith(f"model.layers.{first + j}.") for j in range(config.num_nextn_predict_layers))


def _plan(net: Transformer, checkpoint: Checkpoint) -> list[Slot]:
    """The tensors to read, in order. Raises UserError for what is missing, unexpected or of another shape."""
    config = net.config
    with torch.device("meta"):
        table = slots(Transformer(config), config)  # of the whole model, whatever part of it is here
    present = checkpoint.entries
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    if config.num_mtp_layers and not any(name.startswith(mtp_prefix) for name in present):
        raise UserError(
            f"{checkpoint.listing} lacks every tensor of the multi-token-prediction layer {mtp_prefix}* that"
            " config.json announces: set model.mtp=drop"
        )
    dense = not any(slot.is_indexer and slot.hf_name in present for slot in table)
    # DeepSeek's files repeat the embedding and the head in MTP layers; nothing is missing without
    optional = {slot.hf_name for slot in table if slot.is_copy or (dense and slot.is_indexer)}
    for slot in table:
        if slot.hf_name in present or slot.hf_name not in optional:
            checkpoint.check(slot.hf_name, slot.shape)
    known = {slot.hf_name for slot in table}
    for name, entry in present.items():
        if name not in known and not is_ignored(name, config):
            raise UserError(f"{entry.file}: tensor {name} is not expected by config.json: they do not belong together")
    here = net.state_dict(keep_vars=True).keys()
    return [slot for slot in table if slot.hf_name in present and not slot.is_copy and slot.ours in here]


def _indexer_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(config).indexer_parameters()}


def _say_fresh(folder: str | Path) -> None:
    log.warning("%s holds no lightning indexer: initialised at random, train it with +stage=dense_warmup", folder)


def save_pretrained(
    net: Transformer,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer_folder: str | Path | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress[list[Planned]] = _silent,
    read: Callable[[str, int | None], Tensor] | None = None,
    writes: bool = True,
) -> None:
    """Writes `net` as a DeepSeek-V3.2 checkpoint: sharded safetensors, config.json, the tokenizer's files.

    `dtype` None keeps the model's own; float8_e4m3fn writes DeepSeek's block FP8 (the rest bf16). The folder is
    whole or not there; an earlier checkpoint in it is replaced, a folder that holds anything else is refused with
    UserError. Where processes share the model out, all of them call it: `read` (our name, expert or None) brings a
    tensor together, and one of them `writes`.
    """
    state = net.state_dict()
    config = net.config
    with torch.device("meta"):
        blank = Transformer(config)  # the shapes, whatever part of the model is here

    def source(slot: Slot) -> Tensor:
        if read is not None:
            return read(slot.ours, slot.expert)
        tensor = state[slot.ours]
        return tensor if slot.expert is None else tensor[slot.expert]

    kept = dtype or net.lm_head.weight.dtype
    content = write_config(config, _name(kept), **special_token_ids(tokenizer_folder))
    planned = _planned(slots(blank, config), source, kept)
    if writes:
        write_folder(folder, content, planned, max_shard_bytes, tokenizer_folder, progress)
    else:
        for tensor in planned:
            tensor.make()


def convert(
    folder: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    *,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress[list[Planned]] = _silent,
    **overrides: Any,
) -> None:
    """One checkpoint folder -> another in V3.2 format, a file at a time: the model itself never exists.

    `dtype` None keeps fp32 where the source is fp32 and gives bf16 otherwise, float8_e4m3fn is block FP8. `seed`
    and `overrides` as `from_pretrained`.
    """
    config = read_config(folder, **overrides)
    with torch.device("meta"):
        net = Transformer(config)
    checkpoint = Checkpoint(folder)
    read = {slot.hf_name for slot in _plan(net, checkpoint)}
    if not any(".indexer." in name for name in read):
        for name, _ in net.indexer_parameters():
            owner, _, leaf = name.rpartition(".")
            materialise(net.get_submodule(owner), leaf, torch.float32)
        net.init_indexer(seed)
        _say_fresh(folder)
    made = {name: parameter.detach() for name, parameter in net.indexer_parameters()}
    names = {slot.ours: slot.hf_name for slot in slots(net, config) if not slot.is_copy}

    def source(slot: Slot) -> Tensor:
        # a copy is written from the original, whether or not the source has it
        name = names[slot.ours] if slot.is_copy else slot.hf_name
        return checkpoint.read(name) if name in read else made[slot.ours]

    kept = dtype or torch_dtype_of(checkpoint.entries["lm_head.weight"])
    raw = load_config_json(folder)
    content = write_config(config, _name(kept), raw.get("bos_token_id"), raw.get("eos_token_id"))
    write_folder(out, content, _planned(slots(net, config), source, kept), max_shard_bytes, folder, progress)


def _planned(table: list[Slot], source: Callable[[Slot], Tensor], dtype: torch.dtype) -> list[Planned]:
    scales: dict[str, Tensor] = {}  # made with their weights, which are written just before them

    def plan(slot: Slot) -> list[Planned]:
        kind, size = stored_dtype(slot.hf_name, dtype), math.prod(slot.shape)

        def make_fp8() -> Tensor:
            stored, scales[slot.hf_name] = quantize(source(slot).detach().to("cpu"))
            return stored

        if kind == torch.float8_e4m3fn:
            scale_bytes = 4 * math.prod(scale_shape(slot.shape))
            return [
                Planned(slot.hf_name, size, make_fp8),
                Planned(slot.hf_name + SCALE_SUFFIX, scale_bytes, lambda: scales.pop(slot.hf_name)),
            ]

        def make() -> Tensor:
            # the clone keeps tensors of one file from sharing memory, which safetensors refuses
            tensor = source(slot).detach().to("cpu", kind)
            return tensor.clone() if slot.is_copy else tensor.contiguous()

        return [Planned(slot.hf_name, kind.itemsize * size, make)]

    return [tensor for slot in table for tensor in plan(slot)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
