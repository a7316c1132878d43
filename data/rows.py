"""Files -> rows: those of .jsonl(.gz/.zst) and .parquet, each with its line, and text files as one row each.

A row that is no row (bad UTF-8, bad JSON, not an object) goes to `BadRows`, which says where it stands, counts, and
stops the run past its limit. What is left out by rule (empty, binary, too long) is counted and named there too. A file
that breaks off (cut gzip, foreign parquet) is an error at once: what it lacks is not known.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data.files import suffix
from data.lines import read_lines, read_whole

MAX_BYTES = 8 << 20  # of a row, where the caller has no limit of its own
NAMED = 20  # of each kind of what was left out
BINARY_PROBE = 8000  # bytes in which a NUL makes a file binary, as git has it
log = logging.getLogger("winnow.data")


class BadRows:
    """Counts malformed rows, names each in the log, and raises UserError when there are more than `limit`.

    `skipped`: kind -> [count, the first few origins] of all that was left out: malformed, too_long, binary, empty.
    """

    def __init__(self, limit: int, key: str = "data.max_bad_rows") -> None:
        self.limit, self.key, self.count = limit, key, 0
        self.skipped: dict[str, tuple[int, list[str]]] = {}

    def report(self, origin: str, reason: str) -> None:
        """`origin` is file:line."""
        self.count += 1
        if self.count > self.limit:
            raise UserError(
                f"{origin}: {reason}; more than {self.key}={self.limit} malformed rows: mend them or raise the limit"
            )
        self.skip("malformed", origin)
        log.warning("%s: row skipped: %s", origin, reason)

    def skip(self, kind: str, origin: str) -> None:
        """What is left out by rule, without limit."""
        count, named = self.skipped.get(kind, (0, []))
        self.skipped[kind] = (count + 1, [*named, origin] if count < NAMED else named)

    def too_long(self, origin: str, limit: int) -> None:
        self.skip("too_long", origin)
        log.warning("%s: skipped: more than %d bytes (data.max_document_bytes)", origin, limit)


def read_rows(
    path: Path, columns: Iterable[str], bad: BadRows, beside: Sequence[str] = (), max_bytes: int = MAX_BYTES
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, row) of one row file, lines from 1. Of a parquet file only `columns` are read, of which it must
    have one, and `beside`. Lines of more than `max_bytes` are skipped."""
    if suffix(path) == ".parquet":
        yield from _parquet_rows(path, list(columns), bad, beside)
        return
    for line_number, line in enumerate(read_lines(path, max_bytes), 1):
        origin = f"{path}:{line_number}"
        if line is None:
            bad.too_long(origin, max_bytes)
            continue
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


def read_text(path: Path, bad: BadRows, max_bytes: int = MAX_BYTES) -> Iterator[tuple[str, str]]:
    """(`file:1`, text) of a text file; nothing where it is empty, binary, too long or not UTF-8, which is reported."""
    content = read_whole(path, max_bytes)
    origin = f"{path}:1"
    if content is None:
        bad.too_long(origin, max_bytes)
    elif not content:
        bad.skip("empty", origin)
    elif b"\0" in content[:BINARY_PROBE]:
        bad.skip("binary", origin)
        log.info("%s: skipped: a binary file", path)
    else:
        try:
            yield origin, content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            bad.report(f"{path}:{error.object.count(10, 0, error.start) + 1}", "not UTF-8")


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
            for batch in file.iter_batches(batch_size=128, columns=present):
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
