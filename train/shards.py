"""The form of a checkpoint's tensors: each rank writes the stretches it holds, any other layout of ranks reads them.

A trainable parameter is seen as one flat vector (experts one behind the other, all of the layer's). ZeRO cuts that
vector somewhere, expert parallelism somewhere else, and neither matters here: a rank's file holds stretches named
`PARAMETER|START|KIND` (kind: weight, exp_avg, exp_avg_sq), and a reader takes from all files whatever overlaps the
stretch that it needs. DeepSpeed's own checkpoints are bound to the number of ranks and to the ZeRO stage, and are
pickles; these are safetensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError

READ = 1 << 24  # bytes at once for a checksum


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


def key_of(name: str, start: int, kind: str) -> str:
    return f"{name}|{start}|{kind}"


def write(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> Written:
    """This rank's file; OSError where it cannot be written. The caller syncs it."""
    from safetensors.torch import save

    content = save(dict(tensors))
    path = folder / f"rank_{rank:05d}.safetensors"
    path.write_bytes(content)
    return Written(path.name, len(content), zlib.crc32(content))


def damage(folder: Path, written: Written) -> str | None:
    """What is wrong with a file, or None."""
    path = folder / written.name
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != written.num_bytes:
        return f"{path} has {path.stat().st_size} bytes and {written.num_bytes} were written"
    found = 0
    with open(path, "rb") as file:
        while block := file.read(READ):
            found = zlib.crc32(block, found)
    return None if found == written.crc32 else f"{path} does not have the checksum that it was written with"


class Reader:
    """The stretches of a checkpoint's files."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        from safetensors import safe_open

        self.pieces: dict[tuple[str, str], list[_Piece]] = {}
        self.whole: dict[str, Path] = {}  # tensors that are no stretch: buffers, random states
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
