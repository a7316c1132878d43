"""The four sources of documents: the standard library's own sources, files, a `datasets` set, generated problems.

A document is a text or a conversation with the key that the split goes by. Sources yield them in a fixed order; what
cannot be read is reported with file and line (`data.rows.BadRows`). Nothing is downloaded but a set that `hf` names.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from conf.schema import DataConfig
from data.chat import pieces_of
from data.check import check_messages
from data.context import ASKING
from data.pieces import plain_texts
from data.rows import TEXT_SUFFIXES, BadRows, find_files, read_rows, read_text, suffix
from data.split import digest, in_split
from data.tasks import Problem, arithmetic, choose, mixed_problems, task_key
from data.tasks.long import sample_texts

if TYPE_CHECKING:
    from datasets import Dataset

NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}  # folders of the library
MESSAGES, TOOLS = "messages", "tools"
TOKENIZER_PROBLEMS = 20_000  # in a tokenizer's corpus: enough beside 4 MB of text that their words become tokens


@dataclass(frozen=True)
class Document:
    """Either `text` or `messages`. `key` decides the split, `origin` says where it stands (file:line)."""

    key: str
    origin: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None


def question_key(question: str) -> str:
    """The key of whatever answers this question: a conversation's first user message, an RL prompt."""
    return task_key(question) or digest(" ".join(question.split()))


def _row_document(row: Mapping[str, Any], origin: str, text_key: str, conversations: bool) -> Document | None:
    """A row as a document, None where its text is empty; ValueError with the reason where it is malformed."""
    if conversations or (MESSAGES in row and row.get(text_key) is None):
        if row.get(MESSAGES) is None:
            raise ValueError(f'no "{MESSAGES}"')
        messages = check_messages(row[MESSAGES], row.get(TOOLS))
        question = next(message["content"] for message in messages if message["role"] in ASKING)
        return Document(question_key(question), origin, messages=messages)
    if row.get(text_key) is None:
        raise ValueError(f'no "{text_key}"')
    text = row[text_key]
    if not isinstance(text, str):
        raise ValueError(f'"{text_key}" is a {type(text).__name__}, not a string')
    return Document(digest(text), origin, text=text) if text else None


def _rows(cfg: DataConfig, bad: BadRows, conversations: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(origin, row) of the sources that are tables or text files."""
    columns = [MESSAGES] if conversations else [cfg.text_key, MESSAGES]
    if cfg.source == "hf":
        dataset = load_hf(cfg)
        present = [name for name in columns if name in dataset.column_names]
        if not present:
            wanted, names = " or ".join(columns), ", ".join(dataset.column_names)
            raise UserError(f"data.path={cfg.path} has no column {wanted}: give data.text_key, one of {names}")
        present += [TOOLS] if TOOLS in dataset.column_names else []
        for number, row in enumerate(dataset.select_columns(present), 1):
            yield f"{cfg.path}[{cfg.split}]:{number}", row
        return
    for path in source_files(cfg):
        if suffix(path) not in TEXT_SUFFIXES:
            yield from read_rows(path, columns, bad, (TOOLS,))
        elif conversations:
            raise UserError(f"{path} holds no conversations: give data.path=FILE of rows with {MESSAGES}")
        else:
            yield from ((origin, {cfg.text_key: text}) for origin, text in read_text(path, bad))


def source_files(cfg: DataConfig) -> list[Path]:
    """The files of `stdlib` and `files`, sorted. UserError where there are none."""
    if cfg.source == "files":
        assert cfg.path is not None, "validated: files has a path"
        return find_files(cfg.path)
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(path for path in root.rglob("*.py") if not NOT_PROSE & set(path.relative_to(root).parts))
    if not found:
        raise UserError(f"data.source=stdlib finds no sources in {root}: use data.source=files data.path=FOLDER")
    return found


def load_hf(cfg: DataConfig) -> Dataset:
    """The set that `data.path` names."""
    assert cfg.path is not None, "validated: hf has a path"
    return load_dataset(cfg.path, cfg.split, f"data.path={cfg.path}")


def load_dataset(path: str, split: str, given: str) -> Dataset:
    """One split of a `datasets` name, of a folder `save_to_disk` wrote, or of a folder of data files. `given`: the
    setting that names it, for the error."""
    import datasets

    try:
        if any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # OSError: no such set, no network
        raise UserError(
            f"{given} cannot be loaded by datasets: {' '.join(str(error).split())}; check name and network"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise UserError(f"data.split={split} is not in {given}: it has {', '.join(loaded)}")
    return loaded[split]


def generated(cfg: DataConfig, split: str, seed: int, start: int = 0) -> Iterator[Problem]:
    """The worked problems of a split from number `start` on, forever: of `cfg.tasks`, else additions."""
    if not cfg.tasks:
        return arithmetic.problems(split, seed, cfg.operand_digits, cfg.heldout, start)
    mixed = mixed_problems(choose(cfg.tasks, cfg.operand_digits), split, seed, cfg.heldout, start)
    return (problem for _, problem in mixed)


def documents(
    cfg: DataConfig, split: str, seed: int = 0, *, conversations: bool = False, start: int = 0
) -> Iterator[Document]:
    """The documents of a split, train or heldout, in a fixed order; `synthetic` has no end and alone uses `seed` and
    `start` (its first problem).

    `conversations`: every row must hold messages (SFT). Else a row holds `cfg.text_key`, or messages where it has no
    text. UserError: nothing there, too many malformed rows, no document in the split.
    """
    if cfg.source == "synthetic":
        for index, problem in enumerate(generated(cfg, split, seed, start), start):
            messages = problem.messages(arithmetic.is_worked(index, seed, cfg.worked_share))
            yield Document(problem.key, f"synthetic:{problem.prompt}", messages=messages)
        return
    bad = BadRows(cfg.max_bad_rows)
    seen = kept = 0
    for origin, row in _rows(cfg, bad, conversations):
        try:
            document = _row_document(row, origin, cfg.text_key, conversations)
        except ValueError as error:
            bad.report(origin, str(error))
            continue
        if document is None:
            continue
        seen += 1
        if in_split(document.key, split, cfg.heldout):
            kept += 1
            yield document
    if seen == 0:
        raise UserError(f"{cfg.path or cfg.source} holds no document ({bad.count} malformed rows): give data with text")
    if kept == 0:
        raise UserError(
            f"data.heldout={cfg.heldout:g} leaves none of the {seen} documents of {cfg.path or cfg.source} in the"
            f" {split} split, which goes by whole documents: give more of them or another share"
        )


def fingerprint(cfg: DataConfig) -> str:
    """Changes whenever the source may: names, sizes and times of its files, and what picks rows from them."""
    assert cfg.source != "synthetic"
    if cfg.source == "hf":
        dataset = load_hf(cfg)
        files = sorted(Path(entry["filename"]) for entry in dataset.cache_files)
        extra = [len(dataset), *dataset.column_names]
    else:
        files, extra = source_files(cfg), []
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    picked = [cfg.source, cfg.split, cfg.text_key, cfg.heldout, cfg.max_bad_rows]
    return hashlib.sha256(json.dumps([picked, extra, stats]).encode()).hexdigest()


def tokenizer_corpus(cfg: DataConfig, seed: int = 0, max_chars: int = 4_000_000) -> list[str]:
    """Training text for `train:VOCAB`: a deterministic sample of the training split, with worked problems where the
    run mixes them in; of conversations what is encoded of them, without special tokens. Looks at no more than eight
    times `max_chars`."""
    texts: list[tuple[str, str]] = []
    looked_at = 0
    if cfg.source != "synthetic":
        for document in documents(cfg, "train", seed):
            text = document.text or "\n".join(plain_texts(pieces_of(document.messages or [])))
            texts.append((document.key, text[: max_chars // 16]))
            looked_at += len(text)
            if looked_at > 8 * max_chars:
                break
    sample, length = [], 0
    for _, text in sorted(texts):  # keys are hashes: their order is a fair draw
        sample.append(text)
        length += len(text)
        if length > max_chars:
            break
    if cfg.long_tasks:
        sample += sample_texts(cfg.long_tasks, seed, cfg.heldout)
    if cfg.source == "synthetic" or cfg.synthetic_share > 0:
        worked = generated(cfg, "train", seed)
        sample += [
            f"{problem.prompt}\n{problem.working}\n{problem.answer}" for problem in islice(worked, TOKENIZER_PROBLEMS)
        ]
    return sample
