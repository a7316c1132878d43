"""Compressed bytes -> chunks -> lines, with a bound on what one line may cost: a longer one comes as None.

A file that breaks off (a cut gzip or zstd frame) is an error that names the line: what it lacks is not known.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from conf.errors import UserError

CHUNK = 1 << 18
ZST_CHUNK = 4096  # compressed bytes at a time: a frame of zeros grows 30,000-fold
COMPRESSED = (".gz", ".zst")


def read_lines(path: Path, limit: int) -> Iterator[bytes | None]:
    """Raw lines without their end, None for one of more than `limit` bytes, which is never held whole. UserError
    naming the line after which the file breaks."""
    number = 0
    try:
        for line in split_lines(chunks(path), limit):
            number += 1
            yield line
    except breakages(path) as error:
        raise UserError(f"{path} breaks off after line {number} ({error}): fetch or write it anew") from error


def read_whole(path: Path, limit: int) -> bytes | None:
    """All bytes of a file, decompressed; None where they are more than `limit`. UserError where it cannot be read."""
    parts, size = [], 0
    try:
        for chunk in chunks(path):
            size += len(chunk)
            if size > limit:
                return None
            parts.append(chunk)
    except breakages(path) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): mend it or leave it out") from error
    return b"".join(parts)


def breakages(path: Path) -> tuple[type[Exception], ...]:
    """What reading a broken file raises."""
    if path.name.lower().endswith(".zst"):
        import zstandard

        return (OSError, EOFError, zlib.error, zstandard.ZstdError)
    return (OSError, EOFError, zlib.error)


def chunks(path: Path) -> Iterator[bytes]:
    """The decompressed content, a piece at a time."""
    name = path.name.lower()
    with path.open("rb") as raw, ExitStack() as stack:
        if name.endswith(".zst"):
            yield from _zst_chunks(raw)
            return
        stream = stack.enter_context(gzip.open(raw)) if name.endswith(".gz") else raw
        while chunk := stream.read1(CHUNK):  # of a cut file everything up to the cut
            yield chunk


def _zst_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """Of zstd frames laid end to end. EOFError where the last one is cut, which the library's own reader passes over in
    silence."""
    import zstandard

    frame = None
    while compressed := stream.read(ZST_CHUNK):
        while compressed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(compressed)
            compressed = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the last zstd frame is cut")


def split_lines(found: Iterable[bytes], limit: int) -> Iterator[bytes | None]:
    parts: list[bytes] = []  # of the line that is not whole yet, as far as it is within the limit
    held = 0
    for chunk in found:
        first, *others = chunk.split(b"\n")
        held += len(first)
        if held <= limit:
            parts.append(first)
        else:
            parts.clear()
        if others:
            yield b"".join(parts) if held <= limit else None
            yield from (line if len(line) <= limit else None for line in others[:-1])
            parts, held = others[-1:], len(others[-1])
    if held:
        yield b"".join(parts) if held <= limit else None
