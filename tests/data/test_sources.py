"""Files, tables and sets -> documents: formats, malformed rows by file and line, the split, the mistakes' messages."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import zstandard

from conf.errors import UserError
from conf.schema import DataConfig
from data import sources
from data.files import find_files
from data.rows import BadRows, read_rows
from data.sources import TOKENIZER_PROBLEMS, documents, fingerprint, question_key, source_files, tokenizer_corpus
from data.split import is_heldout
from data.tokenizer import SPECIAL_TOKENS

ROWS = [json.dumps({"text": f"document {n} ☃"}).encode() for n in range(40)]
LINES = b"\n".join(ROWS) + b"\n"
CHAT = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]


def files_config(path: Path, **settings: object) -> DataConfig:
    return replace(DataConfig(source="files", path=str(path), heldout=0.25), **settings)


def both_splits(cfg: DataConfig, **options: bool) -> list[sources.Document]:
    return [document for split in ("train", "heldout") for document in documents(cfg, split, **options)]


def write_all_formats(folder: Path) -> list[Path]:
    import pyarrow
    from pyarrow import parquet

    paths = [folder / f"rows{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")]
    paths[0].write_bytes(LINES)
    paths[1].write_bytes(gzip.compress(LINES))
    half = len(LINES) // 2  # two frames, as parallel compressors write
    frames = [zstandard.ZstdCompressor().compress(part) for part in (LINES[:half], LINES[half:])]
    paths[2].write_bytes(b"".join(frames))
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(row) for row in ROWS]), paths[3])
    return paths


def test_every_row_format_gives_the_same_documents(tmp_path: Path) -> None:
    expected = sorted(json.loads(row)["text"] for row in ROWS)
    for path in write_all_formats(tmp_path):
        found = both_splits(files_config(path))
        assert sorted(document.text for document in found) == expected, path
        assert {document.origin for document in found} == {f"{path}:{line}" for line in range(1, 41)}


def test_the_split_is_by_the_documents_hash_alone(tmp_path: Path) -> None:
    forward, backward = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    forward.write_bytes(LINES)
    backward.write_bytes(b"\n".join(reversed(ROWS)))
    held = {document.text for document in documents(files_config(forward), "heldout")}
    train = {document.text for document in documents(files_config(forward), "train")}
    assert held and train and not held & train and len(held | train) == 40
    assert held == {document.text for document in documents(files_config(backward), "heldout")}
    assert all(is_heldout(document.key, 0.25) for document in documents(files_config(forward), "heldout"))


def test_text_files_are_documents_and_other_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", "two"), ("a.md", "\ufeffone"), ("deep/c.py", "three"), ("d.csv", "no"), ("e.txt", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    cfg = files_config(tmp_path, heldout=1e-9)
    assert [(d.text, Path(d.origin).name) for d in documents(cfg, "train")] == [
        ("one", "a.md:1"),
        ("two", "b.txt:1"),
        ("three", "c.py:1"),
    ]
    assert [path.name for path in find_files(f"{tmp_path}/**/*.*")] == ["a.md", "b.txt", "c.py", "e.txt"]


MALFORMED = [
    (b'{"text": "x"', "not JSON"),
    (b'{"txt": "x"}', 'no "text"'),
    (b'{"text": null}', 'no "text"'),
    (b'{"text": 5}', '"text" is a int, not a string'),
    (b'["text"]', "a list, not an object"),
    (b"null", "a NoneType, not an object"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "surrogates not allowed"),
    (b'{"text": ' + b"[" * 100_000 + b"}", "not JSON"),
    (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', "not JSON"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "messages do not go"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED)
def test_a_malformed_row_is_named_with_file_and_line_and_skipped(
    line: bytes, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    cfg = files_config(path, heldout=1e-9, max_bad_rows=1)
    with caplog.at_level(logging.WARNING, "winnow.data"):
        assert [document.origin for document in documents(cfg, "train")] == [f"{path}:1", f"{path}:4"]
    (message,) = caplog.messages
    assert message.startswith(f"{path}:3: row skipped: ") and reason in message
    with pytest.raises(UserError, match="more than data.max_bad_rows=0 malformed rows: mend") as caught:
        list(documents(replace(cfg, max_bad_rows=0), "train"))
    assert str(caught.value).startswith(f"{path}:3: ") and reason in str(caught.value)


def test_malformed_rows_count_across_files(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"text": "good %s"}\nbad\n' % name.encode())
    assert len(list(documents(files_config(tmp_path, heldout=1e-9, max_bad_rows=3), "train"))) == 3
    with pytest.raises(UserError, match="c.jsonl:2: not JSON"):
        list(documents(files_config(tmp_path, heldout=1e-9, max_bad_rows=2), "train"))


def test_a_text_file_that_is_not_utf8_is_a_malformed_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xe9\n")
    (tmp_path / "b.txt").write_bytes(b"fine")
    assert [d.text for d in documents(files_config(tmp_path, heldout=1e-9), "train")] == ["fine"]
    assert "a.txt:2: row skipped: not UTF-8" in caplog.text


def test_bad_values_in_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import pyarrow
    from pyarrow import parquet

    raw = pyarrow.array([b"good", b"\xff", None, b"fine"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": raw}), path)
    found = list(documents(files_config(path, heldout=1e-9), "train"))
    assert [(d.text, d.origin) for d in found] == [("good", f"{path}:1"), ("fine", f"{path}:4")]
    assert f"{path}:2: row skipped: not UTF-8" in caplog.text and f'{path}:3: row skipped: no "text"' in caplog.text


def test_files_that_break_off_are_errors_at_once(tmp_path: Path) -> None:
    _, zipped, zst, table = write_all_formats(tmp_path)
    broken = {
        "cut.jsonl.gz": (zipped.read_bytes()[:-20], "breaks off after line .*end-of-stream marker"),
        "cut.jsonl.zst": (zst.read_bytes()[:-6], "breaks off after line .*last zstd frame is cut"),
        "junk.jsonl.zst": (b"\x28\xb5\x2f\xfd" + b"junk" * 9, "breaks off after line 0"),
        "foreign.jsonl.gz": (LINES, "breaks off after line 0"),
        "cut.parquet": (table.read_bytes()[:-20], "cannot be read as parquet"),
    }
    for name, (content, match) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=match) as caught:
            list(documents(files_config(tmp_path / name), "train"))
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_zst_lines_may_straddle_chunks_and_frames(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{n} " + hashlib.sha256(str(n).encode()).hexdigest() * (n % 90)}) for n in range(400)]
    content = "\n".join(lines).encode()
    frames = [zstandard.ZstdCompressor().compress(content[at : at + 50_001]) for at in range(0, len(content), 50_001)]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(frames))
    found = read_rows(tmp_path / "rows.jsonl.zst", ["text"], BadRows(0))
    assert [json.dumps(row) for _, row in found] == lines and len(frames) > 3


def test_mistakes_end_in_one_line_with_the_fix(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    with pytest.raises(UserError, match=r"matches no file: give a file, a glob or a folder with \.txt"):
        list(documents(files_config(tmp_path / "missing.txt"), "train"))
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"unknown suffix '\.csv': use \.txt \.md"):
        list(documents(files_config(tmp_path / "table.csv"), "train"))
    with pytest.raises(UserError, match=r"holds no file we read: use"):
        list(documents(files_config(tmp_path), "train"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="holds no document .0 malformed rows.: give data with text"):
        list(documents(files_config(tmp_path), "train"))
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(UserError, match="leaves none of the 1 documents of .* in the heldout split"):
        list(documents(files_config(tmp_path, heldout=1e-9), "heldout"))
    with pytest.raises(UserError, match="holds no conversations"):
        list(documents(files_config(tmp_path / "one.txt"), "train", conversations=True))
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="no column text or messages: its columns are body"):
        list(documents(files_config(tmp_path / "other.parquet"), "train"))


def test_conversations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join(json.dumps(row) for row in ({"messages": CHAT}, {"text": "plain"}, {"messages": CHAT, "text": "t"}))
    )
    cfg = files_config(path, heldout=1e-9)
    assert [d.messages for d in documents(cfg, "train", conversations=True)] == [CHAT, CHAT]
    assert f'{path}:2: row skipped: no "messages"' in caplog.text
    assert [(d.text, d.messages) for d in documents(cfg, "train")] == [(None, CHAT), ("plain", None), ("t", None)]


TOOL = {"type": "function", "function": {"name": "f", "description": "looks it up"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"key": "value"}'}}
WITH_TOOLS = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "T"},
    CHAT[1],
]


def test_tools_stand_beside_the_messages_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    row = {"messages": WITH_TOOLS, "tools": json.dumps([TOOL])}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    made = datasets.Dataset.from_list([row])
    made.to_parquet(tmp_path / "rows.parquet")
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "saved"))
    in_files = [files_config(tmp_path / name, heldout=1e-9) for name in ("rows.jsonl", "rows.parquet")]
    for cfg in (*in_files, replace(in_files[0], source="hf", path=str(tmp_path / "saved"))):
        (document,) = documents(cfg, "train", conversations=True)
        assert document.messages is not None and document.key == question_key("U")
        assert document.messages[0] == {"role": "system", "content": "", "tools": [TOOL]}
        assert document.messages[2]["tool_calls"][0]["function"]["arguments"] == {"key": "value"}


def test_a_tokenizer_learns_from_what_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": WITH_TOOLS, "tools": [TOOL]}))
    (text,) = tokenizer_corpus(files_config(path, heldout=1e-9))
    for part in ("looks it up", "You can invoke functions", 'invoke name="f"', 'string="true">value<', "<result>T<"):
        assert part in text
    assert not any(token in text for token in SPECIAL_TOKENS)


def test_a_question_has_one_key_in_every_stage(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    questions = ["  What   is it? ", "38 + 47 =", *map(str, range(20))]  # twenty more: no split is empty
    rows = [{"messages": [{"role": "user", "content": question}, CHAT[1]]} for question in questions]
    path.write_text("\n".join(map(json.dumps, rows)))
    keys = {document.key for document in both_splits(files_config(path, heldout=0.5, max_bad_rows=0))}
    assert keys == {question_key("What is it?"), "38+47", *(question_key(str(n)) for n in range(20))}


def test_stdlib_is_python_sources_without_tests_or_installed_packages() -> None:
    names = [path.as_posix() for path in source_files(DataConfig())]
    assert names == sorted(names) and any(name.endswith("/argparse.py") for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
    assert 5e6 < sum(os.path.getsize(name) for name in names) < 4e7


def test_hf_reads_a_saved_set_and_a_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"body": [f"text {n}" for n in range(30)] + [None], "other": list(range(31))}
    saved = datasets.DatasetDict({"validation": datasets.Dataset.from_dict(rows)})
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    saved["validation"].to_json(str(tmp_path / "folder" / "validation.jsonl"))
    for name in ("saved", "folder"):
        path = str(tmp_path / name)
        cfg = DataConfig(source="hf", path=path, split="validation", text_key="body", heldout=0.25)
        found = both_splits(cfg)
        assert sorted(d.text for d in found) == sorted(rows["body"][:30]), name
        assert min(d.origin for d in found) == f"{path}[validation]:1"
        assert fingerprint(cfg) == fingerprint(cfg) != fingerprint(replace(cfg, heldout=0.3))
        with pytest.raises(UserError, match="data.split=train is not in .* it has validation"):
            list(documents(replace(cfg, split="train"), "train"))
        with pytest.raises(UserError, match="no column text or messages: give data.text_key, one of body, other"):
            list(documents(replace(cfg, text_key="text"), "train"))
    with pytest.raises(UserError, match="cannot be loaded by datasets"):
        list(documents(replace(cfg, path=str(tmp_path / "nothing")), "train"))


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    cfg = files_config(tmp_path)
    before = fingerprint(cfg)
    assert fingerprint(cfg) == before
    path.write_text("other")
    assert fingerprint(cfg) != before


def test_tokenizer_corpus_is_training_text_only_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    cfg = files_config(path)
    train = [document.text for document in documents(cfg, "train")]
    assert sorted(tokenizer_corpus(cfg)) == sorted(train)
    short = tokenizer_corpus(cfg, max_chars=160)
    assert short == tokenizer_corpus(cfg, max_chars=160) and 100 < sum(map(len, short)) < 180
    mixed = tokenizer_corpus(replace(cfg, synthetic_share=0.2))
    keys = {text.split("=", 1)[0] for text in mixed if "=?" in text}
    assert len(mixed) == len(train) + TOKENIZER_PROBLEMS
    assert not any(is_heldout(question_key(f"{key}="), cfg.heldout) for key in islice(sorted(keys), 300))


def test_read_rows_numbers_lines_from_one_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\nbad\r\n')
    bad = BadRows(5)
    assert list(read_rows(path, ["text"], bad)) == [(f"{path}:1", {"text": "a"})] and bad.count == 1
