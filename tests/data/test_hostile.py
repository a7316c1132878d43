"""What nobody would write on purpose: each is counted and named, and skipped or refused by one rule."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import UserError
from conf.schema import DataConfig
from data.files import _walk, find_files, suffix
from data.lines import split_lines
from data.rows import BadRows
from data.sources import documents, fingerprint


def config(path: Path, **settings: object) -> DataConfig:
    return replace(DataConfig(source="files", path=str(path), heldout=1e-9), **settings)


def read(cfg: DataConfig) -> tuple[list[str | None], dict[str, tuple[int, list[str]]]]:
    bad = BadRows(cfg.max_bad_rows)
    return [document.text for document in documents(cfg, "train", bad=bad)], bad.skipped


@given(
    lines=st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=8),
    cuts=st.lists(st.integers(0, 100), max_size=6),
    limit=st.integers(0, 12),
    end=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_lines_are_those_of_the_whole_wherever_chunks_are_cut(lines, cuts, limit: int, end: bool) -> None:
    content = b"\n".join(lines) + (b"\n" if end and lines else b"")
    edges = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    chunks = [content[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    expected = content.split(b"\n")
    expected = expected[:-1] if not expected[-1] else expected
    assert list(split_lines(chunks, limit)) == [line if len(line) <= limit else None for line in expected]


def test_a_line_longer_than_the_limit_is_never_held() -> None:
    import tracemalloc

    def stream() -> Iterator[bytes]:
        yield b"before\n"
        for _ in range(200):
            yield b"x" * (1 << 18)
        yield b"\nafter\n"

    tracemalloc.start()
    assert list(split_lines(stream(), 1 << 20)) == [b"before", None, b"after"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20, "50 MB of one line"


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_huge_lines_are_skipped_and_named(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    content = b'{"text": "a"}\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "b"}\n'
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(kind[6:], bytes)
    path = tmp_path / f"rows{kind}"
    path.write_bytes(pack(content))
    texts, skipped = read(config(path, max_document_bytes=1000, max_bad_rows=0))
    assert texts == ["a", "b"] and skipped == {"too_long": (1, [f"{path}:2"])}
    assert f"{path}:2: skipped: more than 1000 bytes" in caplog.text


def test_huge_values_of_a_table_and_huge_files_are_skipped(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "ü" * 600, "b" * 1000]}), tmp_path / "rows.parquet")
    (tmp_path / "z.txt").write_text("z" * 1001)
    texts, skipped = read(config(tmp_path, max_document_bytes=1000))
    assert texts == ["a", "b" * 1000]
    assert skipped == {"too_long": (2, [f"{tmp_path}/rows.parquet:2", f"{tmp_path}/z.txt:1"])}


def test_binary_and_empty_files_of_a_code_tree_are_counted_not_malformed(tmp_path: Path) -> None:
    (tmp_path / "a.c").write_text("int main;")
    (tmp_path / "b.js").write_bytes(b"MZ\0\1\2")
    (tmp_path / "c.rs").write_bytes("utf-16".encode("utf-16"))
    (tmp_path / "d.go").write_bytes(b"")
    (tmp_path / "e.lean.gz").write_bytes(gzip.compress(b"theorem"))
    texts, skipped = read(config(tmp_path, max_bad_rows=0))
    assert texts == ["int main;", "theorem"]
    assert skipped == {
        "binary": (2, [f"{tmp_path}/b.js:1", f"{tmp_path}/c.rs:1"]),
        "empty": (1, [f"{tmp_path}/d.go:1"]),
    }


def test_nuls_and_bad_utf8_are_malformed_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    chat = {"messages": [{"role": "user", "content": "a\0"}, {"role": "assistant", "content": "b"}]}
    rows = [b'{"text": "a\\u0000b"}', b'{"text": "a\0b"}', b'{"text": "\xff"}', json.dumps(chat).encode()]
    path.write_bytes(b"\n".join([*rows, b'{"text": "fine"}']))
    texts, skipped = read(config(path))
    assert texts == ["fine"] and skipped["malformed"] == (4, [f"{path}:{line}" for line in (1, 2, 3, 4)])
    assert '"text" holds NUL characters' in caplog.text and "messages hold NUL characters" in caplog.text
    with pytest.raises(UserError, match="more than data.max_bad_rows=3"):
        read(config(path, max_bad_rows=3))


def test_a_cut_text_file_is_refused_like_a_cut_row_file(tmp_path: Path) -> None:
    content = os.urandom(4000).hex().encode()
    for name, packed in (("a.txt.gz", gzip.compress(content)), ("a.txt.zst", zstandard.compress(content))):
        (tmp_path / name).write_bytes(packed[:-30])
        with pytest.raises(UserError, match=rf"{name} cannot be read .*: mend it or leave it out"):
            read(config(tmp_path / name))


def test_links_lead_to_each_file_once_and_loops_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree, beside = tmp_path / "tree", tmp_path / "beside"
    (tree / "deep").mkdir(parents=True)
    beside.mkdir()
    (tree / "deep" / "a.py").write_text("a")
    (beside / "b.py").write_text("b")
    (tree / "deep" / "loop").symlink_to(tree)
    (tree / "linked").symlink_to(beside)
    (tree / "again.py").symlink_to(tree / "deep" / "a.py")
    (tree / "nowhere.py").symlink_to(tree / "missing")
    os.mkfifo(tree / "pipe.py")
    (tree / ".git").mkdir()
    (tree / ".git" / "c.py").write_text("hidden")
    assert len(list(_walk(str(tree)))) == 5, "no folder is walked twice: two loops would be walked 2^40 times"
    for path in (str(tree), f"{tree}/**/*.py"):
        assert sorted(file.read_text() for file in find_files(path)) == ["a", "b"], path
    assert "nowhere.py: left out, no regular file" in caplog.text and "pipe.py: left out" in caplog.text


def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')

    def denied(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    for name, reason in (("a.txt", "cannot be read .Permission denied"), ("b.jsonl", "breaks off after line 0")):
        with pytest.raises(UserError, match=f"{name} {reason}"):
            read(config(tmp_path / name))
    monkeypatch.setattr(os, "scandir", lambda path: denied(Path(path)))
    with pytest.raises(UserError, match="cannot be listed .Permission denied.: mend it"):
        find_files(str(tmp_path))
    monkeypatch.setattr(Path, "is_file", denied)  # a file behind a folder that may not be entered
    with pytest.raises(UserError, match="a.txt cannot be opened .Permission denied.: mend it"):
        find_files(str(tmp_path / "a.txt"))


def test_a_home_that_no_shell_expanded_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/texts", "~/texts/a.txt", "~/texts/*.txt"):
        assert find_files(path) == [tmp_path / "texts" / "a.txt"], path


def test_a_file_replaced_by_one_of_the_same_size_and_time_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before, stat = fingerprint(config(path)), path.stat()
    assert fingerprint(config(path)) == before
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(config(path)) != before


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.PY", ".py"),
        ("a.txt.gz", ".txt.gz"),
        ("x.jsonl.zst", ".jsonl.zst"),
        ("x.parquet.gz", ""),
        ("py", ""),
        (".py", ""),
        ("a.tar.gz", ""),
        ("a.d.ts", ".ts"),
    ],
)
def test_suffixes(name: str, found: str) -> None:
    assert suffix(Path(name)) == found
