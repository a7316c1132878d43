"""Safetensors folders: a reader that checks every header before it reads data, and a writer that leaves a whole
folder or none.

A checkpoint is `model.safetensors`, or shards under `model.safetensors.index.json`. A safetensors file is 8 bytes
(length of the header), the header (JSON: name -> dtype, shape, byte range) and the data, so a cut-off shard is found,
and the tensor named, without touching the data. Tensors, or some rows of them, are then read one at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from model.fp8 import BLOCK, dequantize, scale_shape

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
FP8 = "F8_E4M3"
_FLOATS = ("F64", "F32", "F16", "BF16", FP8)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip
_REFETCH = "fetch or write the file again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it is, from its file's header."""

    file: Path
    dtype: str  # safetensors' name: BF16, F32, F8_E4M3, ...
    shape: tuple[int, ...]


def _read_header(path: Path, expected: str | None) -> dict[str, Entry]:
    """name -> Entry. `expected`: a tensor that the index puts there, for the message when not even the header is
    whole."""
    holds = f" (tensor {expected})" if expected else ""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= size - 8 else None
    except OSError as error:
        raise UserError(f"{path} cannot be read{holds} ({error.strerror}): {_REFETCH}") from error
    if header is None:
        raise UserError(f"{path} is truncated within its header{holds}: {_REFETCH}")
    try:
        raw = json.loads(header)
        raw.pop("__metadata__", None)
        ends = {name: 8 + length + info["data_offsets"][1] for name, info in raw.items()}
        entries = {
            name: Entry(path, raw[name]["dtype"], tuple(raw[name]["shape"]))
            for name in sorted(ends, key=ends.__getitem__)
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file{holds}, its header cannot be read: {_REFETCH}") from error
    for name in entries:
        if ends[name] > size:
            raise UserError(
                f"{path} is truncated: tensor {name} ends at byte {ends[name]}, the file at {size}: {_REFETCH}"
            )
    return entries


class Checkpoint:
    """The tensors of a folder: `entries` by name, `scales` of the FP8 weights among them apart; `read` one."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        index = folder / INDEX
        self.listing = index if index.is_file() else folder / SINGLE  # what says which tensors there are
        found = self._from_index(folder) if index.is_file() else self._from_single(folder)
        self.scales = {name: entry for name, entry in found.items() if name.endswith(SCALE_SUFFIX)}
        self.entries = {name: entry for name, entry in found.items() if name not in self.scales}
        self._check_scales()

    def _from_index(self, folder: Path) -> dict[str, Entry]:
        try:
            weight_map = json.loads(self.listing.read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{self.listing} is no index of safetensors (it needs a weight_map): {_REFETCH}") from error
        outside = [file for file in weight_map.values() if Path(file).name != file]
        if outside:
            raise UserError(f"{self.listing} names {outside[0]!r}, which is no file of this folder: {_REFETCH}")
        first_of = {file: name for name, file in reversed(weight_map.items())}
        headers = {file: _read_header(folder / file, name) for file, name in sorted(first_of.items())}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise UserError(f"{folder / file} lacks tensor {name}, which {INDEX} puts there: {_REFETCH}")
        return {name: headers[file][name] for name, file in weight_map.items()}

    def _from_single(self, folder: Path) -> dict[str, Entry]:
        if not self.listing.is_file():
            raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}: give a folder with safetensors weights")
        return _read_header(self.listing, None)

    def _check_scales(self) -> None:
        for name, entry in self.scales.items():
            weight = self.entries.get(name.removesuffix(SCALE_SUFFIX))
            if weight is None or weight.dtype != FP8:
                raise UserError(f"{entry.file}: tensor {name} scales no FP8 weight: {_REFETCH}")
            if entry.shape != scale_shape(weight.shape):
                wanted = list(scale_shape(weight.shape))
                raise UserError(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, 128x128 blocks need {wanted}"
                )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises UserError, naming file and tensor, unless the checkpoint has it as floats of this shape."""
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"{self.listing} lacks tensor {name}: give a complete checkpoint")
        if entry.shape != shape:
            raise UserError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json makes it {list(shape)}:"
                " they do not belong together"
            )
        if entry.dtype not in _FLOATS:
            raise UserError(f"{entry.file}: tensor {name} has dtype {entry.dtype}: only {', '.join(_FLOATS)} are read")
        if entry.dtype == FP8 and name + SCALE_SUFFIX not in self.scales:
            raise UserError(
                f"{self.listing} lacks tensor {name + SCALE_SUFFIX}, the scales of an FP8 weight: {_REFETCH}"
            )

    def read(self, name: str) -> Tensor:
        """The tensor; an FP8 weight as dequantised fp32."""
        shape = self.entries[name].shape
        return self.read_flat(name, 0, math.prod(shape)).view(shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Values `start` to `stop` of the flat tensor; no more than the rows that hold them is read."""
        entry = self.entries[name]
        width = math.prod(entry.shape[1:])
        first, last = start // width, -(-stop // width)
        if entry.dtype == FP8:
            first -= first % BLOCK  # whole blocks, as their scales come
            scale = self.scales[name + SCALE_SUFFIX]
            rows = self._rows(entry.file, name, first, last)
            scales = self._rows(scale.file, name + SCALE_SUFFIX, first // BLOCK, -(-last // BLOCK))
            found = dequantize(rows, scales)
        else:
            found = self._rows(entry.file, name, first, last)
        return found.reshape(-1)[start - first * width : stop - first * width]

    def _rows(self, file: Path, name: str, first: int, last: int) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            # opened anew for each: what was touched of a mapped file counts as this process's memory until it is closed
            with safe_open(file, framework="pt", device="cpu") as opened:
                return opened.get_slice(name)[first:last]
        except SafetensorError as error:
            raise UserError(
                f"{file}: tensor {name} cannot be read ({' '.join(str(error).split())}): {_REFETCH}"
            ) from error


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name, its size in bytes and how it is made."""

    name: str
    num_bytes: int
    make: Callable[[], Tensor]


def shards(planned: Iterable[Planned], max_bytes: int) -> list[list[Planned]]:
    """Cuts the list, in order, into files of at most `max_bytes`; a larger tensor has a file to itself."""
    files: list[list[Planned]] = []
    room = 0
    for tensor in planned:
        if not files or tensor.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(tensor)
        room -= tensor.num_bytes
    return files


def write_folder(
    folder: str | Path,
    config: dict[str, Any],
    planned: list[Planned],
    max_bytes: int,
    tokenizer_folder: str | Path | None,
    progress: Callable[[list[list[Planned]]], Iterable[list[Planned]]],
) -> None:
    """Writes weights, config.json and tokenizer files beside `folder`, then renames: the folder is whole or not there.

    One file's tensors are in memory at a time. A checkpoint that is there already is replaced; a folder that holds
    anything else is refused with UserError.
    """
    folder = Path(folder).absolute()
    _refuse_foreign(folder)
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)  # an earlier write was killed between its two renames
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(partial, planned, max_bytes, progress)
        _write_json(partial / "config.json", config)
        for file in _tokenizer_files(tokenizer_folder):
            shutil.copyfile(file, partial / file.name)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _write_weights(
    folder: Path,
    planned: list[Planned],
    max_bytes: int,
    progress: Callable[[list[list[Planned]]], Iterable[list[Planned]]],
) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    files = shards(planned, max_bytes)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(progress(files), 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        try:
            save_file({tensor.name: tensor.make() for tensor in tensors}, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # its kind for a full disk too
            reason = " ".join(str(error).split())
            raise UserError(f"{folder / name} could not be written ({reason}): make room and start again") from error
        weight_map |= {tensor.name: name for tensor in tensors}
    if len(files) > 1:
        total = sum(tensor.num_bytes for tensor in planned)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give a new folder to write a checkpoint to")
    for path in folder.iterdir():
        is_shard = path.name.startswith("model") and path.suffix == ".safetensors"
        if not is_shard and path.name not in (INDEX, "config.json", *_TOKENIZER_FILES):
            raise UserError(
                f"{folder} holds {path.name}, which no export wrote: give a new folder to write a checkpoint to"
            )


def _sync(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk: renames must not overtake data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tokenizer_files(folder: str | Path | None) -> list[Path]:
    candidates = [] if folder is None else [Path(folder) / name for name in _TOKENIZER_FILES]
    return [file for file in candidates if file.is_file()]


def special_token_ids(tokenizer_folder: str | Path | None) -> dict[str, int | None]:
    """`bos_token_id` and `eos_token_id` by the tokenizer's own files; null where they name none."""
    names = {"bos_token_id": "bos_token", "eos_token_id": "eos_token"}
    if tokenizer_folder is None:
        return dict.fromkeys(names)
    folder = Path(tokenizer_folder)
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{folder} holds no tokenizer ({error}): give a folder with tokenizer.json") from error
    ids = {token["content"]: token["id"] for token in added}
    contents = {key: settings.get(name) for key, name in names.items()}
    # older files hold a token as an object
    plain = {key: value["content"] if isinstance(value, dict) else value for key, value in contents.items()}
    return {key: ids.get(value) for key, value in plain.items()}


def torch_dtype_of(entry: Entry) -> torch.dtype:
    """fp32 for what is stored in at least fp32, else bf16: the dtype that an export keeps by default."""
    return torch.float32 if entry.dtype in ("F32", "F64") else torch.bfloat16
