"""Which files a path means: a file, a glob or a folder, by suffix; each regular file once, whatever links lead to it.

Of a folder (and a glob's) hidden files and folders are left out; links to folders are followed, loops once.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from conf.errors import UserError
from data.lines import COMPRESSED

TEXT_SUFFIXES = tuple(
    ".txt .md .py .rst .tex .org .adoc .html .xml .css .yaml .yml .toml .ini .cfg .pyi .pyx .c .h .cc .cpp .cxx"
    " .hh .hpp .cu .cuh .rs .go .java .kt .scala .swift .m .mm .js .jsx .mjs .ts .tsx .vue .rb .php .pl .pm .lua .r .jl"
    " .hs .ml .mli .ex .exs .erl .clj .lisp .el .sh .bash .zsh .ps1 .sql .cmake .mk .proto .cs .fs .dart .zig .v .sv"
    " .vhd .f90 .f95 .s .asm .lean .thy .agda".split()
)
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TEXT_FILES = frozenset(name + packed for name in TEXT_SUFFIXES for packed in ("", *COMPRESSED))
SUFFIXES = TEXT_FILES | set(ROW_SUFFIXES)
READABLE = ".txt .md .py and other source code, .jsonl, all of them plain, .gz or .zst, or .parquet"
log = logging.getLogger("winnow.data")


def suffix(path: Path) -> str:
    """The supported suffix that the file ends with, or ''."""
    name = path.name.lower()
    packed = next((end for end in COMPRESSED if name.endswith(end)), "")
    found = os.path.splitext(name.removesuffix(packed))[1] + packed
    return found if found in SUFFIXES else ""


def find_files(path: str, key: str = "data.path", suffixes: Iterable[str] | None = None) -> list[Path]:
    """The files that `path` (a file, a glob, a folder) means, sorted; a glob's or folder's other files are left out.

    UserError: nothing there, or nothing of a suffix in `suffixes` (None: all that `data.sources` reads).
    """
    path = os.path.expanduser(path)  # no shell does it behind a `=`
    wanted = SUFFIXES if suffixes is None else tuple(suffixes)
    readable = READABLE if suffixes is None else " ".join(wanted)
    if os.path.isdir(path):
        found = sorted(_walk(path))
    elif os.path.exists(path):
        found = [Path(path)]
    else:
        names = glob.glob(path, recursive=True)
        found = sorted(Path(name) for name in names if not os.path.isdir(name))
        if not found:
            raise UserError(f"{key}={path} matches no file: give a file, a glob or a folder with {readable}")
    known = [file for file in found if suffix(file) in wanted]
    files = sorted({os.path.realpath(file): file for file in reversed(known) if _is_regular(file)}.values())
    if not files:
        what = f"has an unknown suffix {found[0].suffix!r}" if found == [Path(path)] else "holds no file we read"
        raise UserError(f"{key}={path} {what}: use {readable}")
    if len(files) < len(found):
        log.info("%s: %d files of other kinds left out", path, len(found) - len(files))
    return files


def _is_regular(file: Path) -> bool:
    """UserError where that cannot be told: it is behind a folder that may not be entered."""
    try:
        if file.is_file():
            return True
    except OSError as error:
        raise UserError(f"{file} cannot be opened ({error.strerror}): mend it or leave it out") from error
    log.warning("%s: left out, no regular file (a link that leads nowhere, a pipe, a device)", file)
    return False


def _walk(folder: str) -> Iterator[Path]:
    """Every file below, without hidden ones. UserError where a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}): mend it or leave it out") from error

    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in names if not name.startswith("."))
