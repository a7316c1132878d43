"""The form of a checkpoint's tensors: each rank writes the stretches it holds, any other layout of ranks reads them.

A trainable parameter is seen as one flat vector (experts one behind the other, all of the layer's). ZeRO cuts that
vector somewhere, expert parallelism somewhere else, and neither matters here: a rank's file holds stretches named
`PARAMETER|START|KIND` (kind: weight, exp_avg, exp_avg_sq), and a reader takes from all files whatever overlaps the
stretch that it needs. DeepSpeed's own checkpoints are bound to the number of ranks and to the ZeRO stage, and are
pickles; these are safetensors.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError

BLOCK = 1 << 24  # bytes written or read at once
DTYPES = {  # of what is saved -> safetensors' name
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint as it left its writer."""

    name: str
    num_bytes: int
    crc32: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Piece:
    start: int
    length: int
    file: Path
    key: str


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def key_of(name: str, start: int, kind: str) -> str:
    return f"{name}|{start}|{kind}"


def write(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> Written:
    """This rank's file, on the disk when it returns; OSError where it cannot be written.

    Not by safetensors' `save`, which makes the whole file in memory first, nor by its `save_file`, which reports a full
    disk as an error of its own kind and leaves the checksum to a second reading.
    """
    path = folder / file_name(rank)
    num_bytes = crc32 = 0
    with open(path, "wb") as file:
        for block in _blocks(tensors):
            file.write(block)
            num_bytes, crc32 = num_bytes + len(block), zlib.crc32(block, crc32)
        file.flush()
        os.fsync(file.fileno())
    return Written(path.name, num_bytes, crc32)


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the length of the header (8 bytes), the header, the data without a copy."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each lies aligned
    header, end = {}, 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        kind, shape = DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        data = tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), BLOCK):
            yield data[start : start + BLOCK]


def damage(folder: Path, written: Written) -> str | None:
    """What is wrong with a file, or None."""
    path = folder / written.name
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != written.num_bytes:
        return f"{path} has {path.stat().st_size} bytes and {written.num_bytes} were written"
    found = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return None if found == written.crc32 else f"{path} does not have the checksum that it was written with"


class Reader:
    """The stretches of a checkpoint's files."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        from safetensors import safe_open

        self.pieces: dict[tuple[str, str], list[_Piece]] = {}
        self.whole: dict[str, Path] = {}  # tensors that are no stretch: buffers, random states, what a loop holds
        self._files: dict[Path, Any] = {}
        for name in names:
            file = self._files[folder / name] = safe_open(folder / name, framework="pt")
            for key in file.keys():  # noqa: SIM118  (no mapping)
                parts = key.split("|")
                if len(parts) == 1:
                    self.whole[key] = folder / name
                    continue
                length = file.get_slice(key).get_shape()[0]
                piece = _Piece(int(parts[1]), length, folder / name, key)
                self.pieces.setdefault((parts[0], parts[2]), []).append(piece)

    def parameters(self) -> set[str]:
        return {name for name, _ in self.pieces}

    def length(self, name: str) -> int:
        """Values of a parameter."""
        return max(piece.start + piece.length for piece in self.pieces[name, "weight"])

    def read(self, name: str, start: int, length: int, kind: str) -> Tensor:
        """[length] values of the flat parameter `name` from `start` on. UserError where the files lack some of them."""
        out = torch.empty(length, dtype=torch.float32)
        filled = 0
        for piece in self.pieces.get((name, kind), []):
            low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
            if low < high:
                stored = self._files[piece.file].get_slice(piece.key)
                out[low - start : high - start] = stored[low - piece.start : high - piece.start]
                filled += high - low
        if filled != length:
            raise UserError(
                f"the checkpoint holds {filled} of {length} values of {kind} of {name}: it belongs to another model"
            )
        return out

    def tensor(self, key: str) -> Tensor:
        """A tensor that is no stretch."""
        return self._files[self.whole[key]].get_tensor(key)
