"""The sources of documents: the standard library's own sources, files, a `datasets` set, generated problems, a mix.

A document is a text or a conversation with the key that the split goes by. Sources yield them in a fixed order; what
cannot be read is reported with file and line (`data.rows.BadRows`). Nothing is downloaded but a set that `hf` names.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from conf.schema import DataConfig, MixConfig
from data.chat import pieces_of
from data.check import check_messages
from data.context import ASKING
from data.files import TEXT_FILES, find_files, suffix
from data.pieces import plain_texts
from data.rows import BadRows, read_rows, read_text
from data.split import digest, in_split
from data.tasks import Problem, arithmetic, choose, mixed_problems, task_key
from data.tasks.long import sample_texts

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

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

    def plain(self) -> str:
        """The text; of a conversation what is encoded of it, without special tokens."""
        return self.text or "\n".join(plain_texts(pieces_of(self.messages or [])))


@dataclass(frozen=True)
class Part:
    """One source of a run: all of it, or one of a mix. `cfg` is that of a run which has no other; `weight` its share of
    the text's tokens."""

    name: str
    cfg: DataConfig
    weight: float
    min_tokens: int = 1
    max_tokens: int | None = None


def parts(cfg: DataConfig) -> list[Part]:
    """The sources of a run that are read, in the order of the configuration; none of `synthetic`, which is made."""
    if cfg.source == "synthetic":
        return []
    if cfg.source != "mix":
        return [Part(cfg.source, cfg, 1.0)]

    def part(name: str, own: MixConfig) -> Part:
        alone = replace(cfg, source=own.source, path=own.path, split=own.split, text_key=own.text_key, mix={})
        return Part(name, alone, own.weight / total, own.min_tokens, own.max_tokens)

    total = sum(own.weight for own in cfg.mix.values())
    return [part(name, own) for name, own in cfg.mix.items()]


def question_key(question: str) -> str:
    """The key of whatever answers this question: a conversation's first user message, an RL prompt."""
    return task_key(question) or digest(" ".join(question.split()))


def _row_document(row: Mapping[str, Any], origin: str, text_key: str, conversations: bool) -> Document | None:
    """A row as a document, None where its text is empty; ValueError with the reason where it is malformed."""
    if conversations or (MESSAGES in row and row.get(text_key) is None):
        if row.get(MESSAGES) is None:
            raise ValueError(f'no "{MESSAGES}"')
        messages = check_messages(row[MESSAGES], row.get(TOOLS))
        if any("\0" in message["content"] for message in messages):
            raise ValueError("messages hold NUL characters")
        question = next(message["content"] for message in messages if message["role"] in ASKING)
        return Document(question_key(question), origin, messages=messages)
    if row.get(text_key) is None:
        raise ValueError(f'no "{text_key}"')
    text = row[text_key]
    if not isinstance(text, str):
        raise ValueError(f'"{text_key}" is a {type(text).__name__}, not a string')
    if "\0" in text:
        raise ValueError(f'"{text_key}" holds NUL characters')
    return Document(digest(text), origin, text=text) if text else None


def _rows(cfg: DataConfig, bad: BadRows, conversations: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(origin, row) of the sources that are tables or text files."""
    columns = [MESSAGES] if conversations else [cfg.text_key, MESSAGES]
    if cfg.source == "hf":
        for number, row in enumerate(_hf_rows(cfg, columns), 1):
            yield f"{cfg.path}[{cfg.split}]:{number}", row
        return
    for path in source_files(cfg):
        if suffix(path) not in TEXT_FILES:
            yield from read_rows(path, columns, bad, (TOOLS,), cfg.max_document_bytes)
        elif conversations:
            raise UserError(f"{path} holds no conversations: give data.path=FILE of rows with {MESSAGES}")
        else:
            found = read_text(path, bad, cfg.max_document_bytes)
            yield from ((origin, {cfg.text_key: text}) for origin, text in found)


def _hf_rows(cfg: DataConfig, columns: list[str]) -> Iterable[Mapping[str, Any]]:
    dataset = load_hf(cfg)
    names = dataset.column_names or list(next(iter(dataset), {}))  # a streamed set may know them by its rows alone
    present = [name for name in columns if name in names]
    if not present:
        wanted, given = " or ".join(columns), ", ".join(names)
        raise UserError(f"data.path={cfg.path} has no column {wanted}: give data.text_key, one of {given}")
    return dataset.select_columns(present + ([TOOLS] if TOOLS in names else []))


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


def load_hf(cfg: DataConfig) -> Dataset | IterableDataset:
    """The set that `data.path` names."""
    assert cfg.path is not None, "validated: hf has a path"
    given = f"data.path={cfg.path}"
    if cfg.streaming and not _is_saved(cfg.path):
        return _one_split(_hf_builder(cfg).as_streaming_dataset(), cfg.split, given)
    return load_dataset(cfg.path, cfg.split, given)


def _hf_builder(cfg: DataConfig) -> DatasetBuilder:
    """What knows the files of a set before anything is read of them."""
    import datasets

    assert cfg.path is not None, "validated: hf has a path"
    try:
        return datasets.load_dataset_builder(cfg.path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _not_loaded(f"data.path={cfg.path}", error) from error


def _is_saved(path: str) -> bool:
    """Whether `save_to_disk` wrote it: memory-mapped, so it needs no streaming."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _not_loaded(given: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{given} cannot be loaded by datasets: {reason}; check name and network")


def _one_split(loaded: Any, split: str, given: str) -> Any:
    if split not in loaded:
        raise UserError(f"data.split={split} is not in {given}: it has {', '.join(loaded)}")
    return loaded[split]


def load_dataset(path: str, split: str, given: str) -> Dataset:
    """One split of a `datasets` name, of a folder `save_to_disk` wrote, or of a folder of data files. `given`: the
    setting that names it, for the error."""
    import datasets

    try:
        loaded = datasets.load_from_disk(path) if _is_saved(path) else datasets.load_dataset(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # OSError: no such set, no network
        raise _not_loaded(given, error) from error
    return loaded if isinstance(loaded, datasets.Dataset) else _one_split(loaded, split, given)


def generated(cfg: DataConfig, split: str, seed: int, start: int = 0) -> Iterator[Problem]:
    """The worked problems of a split from number `start` on, forever: of `cfg.tasks`, else additions."""
    if not cfg.tasks:
        return arithmetic.problems(split, seed, cfg.operand_digits, cfg.heldout, start)
    mixed = mixed_problems(choose(cfg.tasks, cfg.operand_digits), split, seed, cfg.heldout, start)
    return (problem for _, problem in mixed)


def documents(
    cfg: DataConfig,
    split: str,
    seed: int = 0,
    *,
    conversations: bool = False,
    start: int = 0,
    bad: BadRows | None = None,
    both: bool = False,
) -> Iterator[Document]:
    """The documents of a split, train or heldout, in a fixed order; `synthetic` has no end and alone uses `seed` and
    `start` (its first problem).

    `conversations`: every row must hold messages (SFT). Else a row holds `cfg.text_key`, or messages where it has no
    text. `bad` counts what is left out. `both`: those of the other split come as well. UserError: nothing there, too
    many malformed rows, no document in the split.
    """
    if cfg.source == "synthetic":
        for index, problem in enumerate(generated(cfg, split, seed, start), start):
            messages = problem.messages(arithmetic.is_worked(index, seed, cfg.worked_share))
            yield Document(problem.key, f"synthetic:{problem.prompt}", messages=messages)
        return
    bad = BadRows(cfg.max_bad_rows) if bad is None else bad
    seen = kept = 0
    for origin, row in _rows(cfg, bad, conversations):
        try:
            document = _row_document(row, origin, cfg.text_key, conversations)
        except ValueError as error:
            bad.report(origin, str(error))
            continue
        if document is None:
            bad.skip("empty", origin)
            continue
        if document.text is not None and _is_longer(document.text, cfg.max_document_bytes):
            bad.too_long(origin, cfg.max_document_bytes)  # of a table, whose rows have no bound
            continue
        seen += 1
        mine = in_split(document.key, split, cfg.heldout)
        kept += mine
        if mine or both:
            yield document
        if seen == cfg.max_documents:
            break
    if seen == 0:
        raise UserError(f"{cfg.path or cfg.source} holds no document ({bad.count} malformed rows): give data with text")
    if kept == 0:
        raise UserError(
            f"data.heldout={cfg.heldout:g} leaves none of the {seen} documents of {cfg.path or cfg.source} in the"
            f" {split} split, which goes by whole documents: give more of them or another share"
        )


def _is_longer(text: str, num_bytes: int) -> bool:
    return len(text) > num_bytes // 4 and len(text.encode("utf-8")) > num_bytes


def file_state(path: Path) -> list[Any]:
    """What changes whenever a file does: the time of its last change cannot be set back, that of its content can."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend it or leave it out") from error
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def fingerprint(cfg: DataConfig) -> str:
    """Changes whenever the documents of a source may: names, sizes and times of its files, and what picks rows."""
    assert cfg.source not in ("synthetic", "mix")
    extra: list[Any] = []
    if cfg.source == "hf" and cfg.streaming and not _is_saved(cfg.path or ""):
        builder, files = _hf_builder(cfg), []
        found = builder.config.data_files or {}
        extra = [builder.hash, {str(name): [list(listed), listed.origin_metadata] for name, listed in found.items()}]
    elif cfg.source == "hf":
        dataset = load_hf(cfg)
        files = sorted(Path(entry["filename"]) for entry in dataset.cache_files)
        extra = [len(dataset), *dataset.column_names]
    else:
        files = source_files(cfg)
    picked = [cfg.source, cfg.split, cfg.text_key, cfg.heldout, cfg.max_bad_rows, cfg.max_documents]
    picked += [cfg.max_document_bytes]
    return hashlib.sha256(json.dumps([picked, extra, [file_state(path) for path in files]]).encode()).hexdigest()


def tokenizer_corpus(cfg: DataConfig, seed: int = 0, max_chars: int = 4_000_000) -> list[str]:
    """Training text for `train:VOCAB`: a deterministic sample of the training split, with worked problems where the
    run mixes them in; of conversations what is encoded of them, without special tokens. Looks at no more than eight
    times `max_chars`."""
    texts: list[tuple[str, str]] = []
    for part in parts(cfg):
        looked_at = 0
        for document in documents(part.cfg, "train", seed):
            text = document.plain()
            texts.append((document.key, text[: max_chars // 16]))
            looked_at += len(text)
            if looked_at > 8 * max_chars * part.weight:
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
