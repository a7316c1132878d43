"""Files on disk -> rows: which files a path means, and the rows of .jsonl(.gz/.zst) and .parquet, each with its line.

A row that is no row (bad UTF-8, bad JSON, not an object) goes to `BadRows`, which says where it stands, counts, and
stops the run past its limit. A file that breaks off (cut gzip, foreign parquet) is an error at once: what it lacks is
not known.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from conf.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = TEXT_SUFFIXES + ROW_SUFFIXES
ZST_CHUNK = 4096  # compressed bytes at a time: a frame of zeros grows 30,000-fold
log = logging.getLogger("winnow.data")


class BadRows:
    """Counts malformed rows, names each in the log, and raises UserError when there are more than `limit`."""

    def __init__(self, limit: int, key: str = "data.max_bad_rows") -> None:
        self.limit, self.key, self.count = limit, key, 0

    def report(self, origin: str, reason: str) -> None:
        """`origin` is file:line."""
        self.count += 1
        if self.count > self.limit:
            raise UserError(
                f"{origin}: {reason}; more than {self.key}={self.limit} malformed rows: mend them or raise the limit"
            )
        log.warning("%s: row skipped: %s", origin, reason)


def suffix(path: Path) -> str:
    """The supported suffix that the file ends with, or ''."""
    return next((known for known in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(known)), "")


def find_files(path: str, key: str = "data.path", suffixes: Iterable[str] = SUFFIXES) -> list[Path]:
    """The files that `path` (a file, a glob, a folder) means, sorted; a glob's or folder's other files are left out.

    UserError: nothing there, or nothing of a suffix in `suffixes`.
    """
    wanted = tuple(suffixes)
    readable = " ".join(wanted)
    if os.path.isdir(path):
        found = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    elif os.path.exists(path):
        found = [Path(path)]
    else:
        found = [Path(name) for name in glob.glob(os.path.expanduser(path), recursive=True) if os.path.isfile(name)]
        if not found:
            raise UserError(f"{key}={path} matches no file: give a file, a glob or a folder with {readable}")
    files = sorted(file for file in found if suffix(file) in wanted)
    if not files:
        what = f"has an unknown suffix {found[0].suffix!r}" if found == [Path(path)] else "holds no file we read"
        raise UserError(f"{key}={path} {what}: use {readable}")
    if len(files) < len(found):
        log.info("%s: %d files of other kinds left out", path, len(found) - len(files))
    return files


def read_rows(
    path: Path, columns: Iterable[str], bad: BadRows, beside: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, row) of one row file, lines from 1. Of a parquet file only `columns` are read, of which it must
    have one, and `beside`."""
    if suffix(path) == ".parquet":
        yield from _parquet_rows(path, list(columns), bad, beside)
        return
    for line_number, line in enumerate(_lines(path), 1):
        origin = f"{path}:{line_number}"
        try:
            text = line.decode("utf-8-sig").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError:
            bad.report(origin, "not UTF-8")
            continue
        except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, and numbers too long for int()
            bad.report(origin, f"not JSON ({error})")
            continue
        if not text:
            continue
        if isinstance(row, dict):
            yield origin, row
        else:
            bad.report(origin, f"a {type(row).__name__}, not an object")


def read_text(path: Path, bad: BadRows) -> Iterator[tuple[str, str]]:
    """(`file:1`, text) of a text file; nothing where it is empty or not UTF-8 (which is reported)."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad.report(f"{path}:{error.object.count(10, 0, error.start) + 1}", "not UTF-8")
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if text:
        yield f"{path}:1", text


def _zst_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Lines of zstd frames laid end to end. EOFError where the last one is cut, which the library's own reader passes
    over in silence."""
    import zstandard

    frame = None
    line: list[bytes] = []  # parts of the line that is not whole yet
    while compressed := stream.read(ZST_CHUNK):
        while compressed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            first, *others = frame.decompress(compressed).split(b"\n")
            line.append(first)
            if others:
                yield b"".join(line)
                yield from others[:-1]
                line = others[-1:]
            compressed = frame.unused_data
            if frame.eof:
                frame = None
    if any(line):
        yield b"".join(line)
    if frame is not None:
        raise EOFError("the last zstd frame is cut")


def _lines(path: Path) -> Iterator[bytes]:
    """Raw lines, decompressed. UserError naming the line after which a file breaks."""
    kind = suffix(path)
    broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if kind == ".jsonl.zst":
        import zstandard

        broken += (zstandard.ZstdError,)
    number = 0
    try:
        with path.open("rb") as raw, ExitStack() as stack:
            lines: Iterable[bytes] = raw
            if kind == ".jsonl.gz":
                lines = stack.enter_context(gzip.open(raw))
            elif kind == ".jsonl.zst":
                lines = _zst_lines(raw)
            for line in lines:
                number += 1
                yield line
    except broken as error:
        raise UserError(f"{path} breaks off after line {number} ({error}): fetch or write it anew") from error


def _parquet_rows(
    path: Path, columns: list[str], bad: BadRows, beside: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            present = [name for name in columns if name in names]
            if not present:
                raise UserError(f"{path} has no column {' or '.join(columns)}: its columns are {', '.join(names)}")
            present += [name for name in beside if name in names]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=present):
                for values in zip(*(batch.column(name) for name in present), strict=True):
                    number += 1
                    origin = f"{path}:{number}"
                    try:
                        row = {name: value.as_py() for name, value in zip(present, values, strict=True)}
                    except UnicodeDecodeError:
                        bad.report(origin, "not UTF-8")
                        continue
                    yield origin, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({' '.join(str(error).split())}): write it anew") from error
