"""What the data cost: tokenising, screening, packing and taking a step's sequences, against what a model eats.

100 MB of text: the standard library, installed packages (a code tree), generated rows (.jsonl.gz), mixed by weight. It
is tokenised by one process and by two, to the same bytes; then the ranks of worlds of 1, 2 and 4, each a process of its
own, resume at three random points, and their sequences are hashed: one token stream whatever the layout. `cpu_s` is of
all processes: where others use the machine too it is steadier than `seconds`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench.memory import apart
from bench.registry import benchmark
from conf.schema import DataConfig, MixConfig
from data.corpus import open_corpus
from data.files import find_files
from data.layout import BestFit, Concat
from data.sources import generated, parts, source_files, tokenizer_corpus
from data.stream import TokenStream
from data.summary import summarise
from data.tokenizer import load_tokenizer

TINY_TOKENS_PER_S = 6_700  # what the tiny model trains on one CPU core (bench/results/layer.json's machine)
TIMES = 10  # faster than that the data must come
PACKAGES_MB, GENERATED_MB = 70, 18  # beside the standard library's 12
POINTS, STEPS, SEQUENCES, WORLDS = 3, 3, 4, (1, 2, 4)
SEED = 7


def write_rows(path: Path, num_bytes: int) -> None:
    """Worked problems as plain text, a few hundred to a row."""
    problems = generated(DataConfig(tasks=("arithmetic", "words", "sorting")), "train", SEED)
    written, number = 0, random.Random(SEED)
    with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as stream:
        while written < num_bytes:
            some = islice(problems, number.randint(1, 400))
            text = "\n\n".join(f"{one.prompt}\n{one.working}\n{one.answer}" for one in some)
            written += stream.write(json.dumps({"text": text}) + "\n")


def make_config(folder: Path, packages_mb: float, generated_mb: float) -> tuple[DataConfig, float]:
    """(the mix, megabytes of its text). Writes the generated rows into `folder`."""
    rows, packages = folder / "rows.jsonl.gz", sysconfig.get_paths()["purelib"]
    write_rows(rows, int(generated_mb * 1e6))
    sizes = np.cumsum([file.stat().st_size for file in find_files(f"{packages}/**/*.py")])
    count = int(np.searchsorted(sizes, packages_mb * 1e6)) + 1
    library = sum(file.stat().st_size for file in source_files(DataConfig()))
    mix = {
        "library": MixConfig(source="stdlib", weight=1.0),
        "packages": MixConfig(path=f"{packages}/**/*.py", weight=2.0),
        "generated": MixConfig(path=str(rows), weight=1.0),
    }
    cfg = DataConfig(source="mix", mix=mix, seq_len=8192, packing="best_fit", max_documents=count)
    return cfg, float(sizes[min(count, len(sizes)) - 1] + library) / 1e6 + generated_mb


def hashes(stream: TokenStream, points: list[int], rank: int, world: int) -> dict[str, str]:
    """Index of a sequence -> hash of all its fields, for what this rank takes in the steps after each point."""
    found = {}
    count = SEQUENCES // world
    for point in points:
        stream.load_state(stream.state() | {"next_sequence": point})
        for step in range(STEPS):
            first = point + step * SEQUENCES + rank * count
            for index, batch in enumerate(stream.take(count, rank, world), first):
                content = hashlib.sha256()
                for field in batch.tensors().values():
                    content.update(field.numpy().tobytes())
                found[str(index)] = content.hexdigest()
    return found


def resumed(folder: Path, cfg: DataConfig, points: list[int]) -> dict[int, dict[str, str]]:
    """World -> hashes of what its ranks, each a fresh process, took together."""
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    (folder / "points.json").write_text(json.dumps(points))
    found: dict[int, dict[str, str]] = {}
    for world in WORLDS:
        taken = [apart("bench.data", str(folder), str(rank), str(world)) for rank in range(world)]
        found[world] = {index: one for rank in taken for index, one in rank.items()}
        assert len(found[world]) == sum(map(len, taken)), "no sequence is taken twice"
    return found


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def speeds(cfg: DataConfig, tokenizer: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Tokens/s of tokenising, by one process and by two."""
    digests: list[str]
    for workers in (1, 2):
        start, busy, tokens, digests = time.monotonic(), cpu_seconds(), 0, []
        for part in parts(replace(cfg, workers=workers)):
            found = open_corpus(part.cfg, tokenizer, "train", cache_dir=folder / f"cache_{workers}")
            tokens, digests = tokens + found.num_tokens, [*digests, found.digest]
        seconds = time.monotonic() - start
        yield {
            "what": "tokenise", "workers": workers, "seconds": round(seconds, 1),
            "cpu_s": round(cpu_seconds() - busy, 1), "tokens": tokens,
            "tokens_per_s": round(tokens / seconds), "digests": digests,
        }  # fmt: skip


def screening(tokenizer: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """What dedup and decontaminate take beside tokenising, of the standard library."""
    path = folder / "evaluation.jsonl"
    problems = islice(generated(DataConfig(tasks=("words:6",)), "heldout", SEED), 1000)
    path.write_text("\n".join(json.dumps({"prompt": one.prompt}) for one in problems), encoding="utf-8")
    settings: dict[str, dict[str, Any]] = {
        "none": {},
        "dedup": {"dedup": 0.8},
        "decontaminate": {"decontaminate": (str(path),)},
    }
    for name, one in settings.items():
        start, busy = time.monotonic(), cpu_seconds()
        found = open_corpus(DataConfig(workers=1, **one), tokenizer, "train")
        seconds, busy, left = time.monotonic() - start, cpu_seconds() - busy, found.meta["left_out"]
        dropped = sum(left.get(kind, {"count": 0})["count"] for kind in ("duplicate", "contaminated"))
        yield {"what": "screen", "by": name, "seconds": round(seconds, 1), "cpu_s": round(busy, 1), "dropped": dropped,
               "tokens_per_s": round(found.num_tokens / seconds)}  # fmt: skip


def packing(stream: TokenStream) -> Iterator[dict[str, Any]]:
    """Both ways to pack, of the corpus and of a million documents of log-normal lengths."""
    lengths = np.concatenate([np.diff(text.corpus.offsets) for text in stream.texts])
    million = np.clip(np.random.default_rng(SEED).lognormal(7, 1.6, 1_000_000), 1, 1e6).astype(np.int64)
    for name, one in (("100 MB", lengths), ("a million", million)):
        for seq_len in (8192, 131_072):
            for layout in ("concat", "best_fit"):
                start, chosen = time.monotonic(), np.arange(len(one))
                made = (
                    Concat(one, chosen, seq_len, SEED)
                    if layout == "concat"
                    else BestFit(one, chosen, seq_len, SEED, 0.02)
                )
                figures = made.figures()
                list(made.spans(0))
                yield {"what": "pack", "documents": len(one), "of": name, "seq_len": seq_len, "packing": layout,
                       "seconds": round(time.monotonic() - start, 2), "padding": round(figures.padding, 5),
                       "cut": round(figures.cut, 5), "longer": round(float((one > seq_len).mean()), 5)}  # fmt: skip


def taking(stream: TokenStream, tokenizer: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Tokens/s of `take`, by the length of a sequence."""
    for seq_len in (512, 8192, 131_072):
        cfg = replace(stream.cfg, seq_len=seq_len)
        one = TokenStream(cfg, tokenizer, SEED, cache_dir=folder / "cache_1")
        one.take(1)
        start, count = time.monotonic(), max(4, 2_000_000 // seq_len)
        for _ in range(count):
            one.take(1)
        seconds = time.monotonic() - start
        yield {"what": "take", "seq_len": seq_len, "ms_a_sequence": round(seconds / count * 1e3, 2),
               "tokens_per_s": round(count * seq_len / seconds)}  # fmt: skip


@benchmark
def data() -> dict[str, Any]:
    """Tokens/s of every part of the pipeline, and one token stream from every layout."""
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
        folder = Path(scratch)
        cfg, megabytes = make_config(folder, PACKAGES_MB, GENERATED_MB)
        tokenizer = load_tokenizer("train:1536", corpus=tokenizer_corpus(cfg, SEED))
        tokenizer.save_pretrained(str(folder / "tokenizer"))
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        rows = list(speeds(cfg, tokenizer, folder))
        stream = TokenStream(cfg, tokenizer, SEED, cache_dir=folder / "cache_1")
        rows += [*screening(tokenizer, folder), *packing(stream), *taking(stream, tokenizer, folder)]
        points = random.Random(SEED).sample(range(10_000), POINTS)
        found = resumed(folder, cfg, points)
        summary = summarise(stream)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items() if name != "digests"))
    slowest = min(row["tokens_per_s"] for row in rows if "tokens_per_s" in row)
    one, two = (row["digests"] for row in rows if row["what"] == "tokenise")
    same = found[1] == found[2] == found[4] and len(found[1]) == POINTS * STEPS * SEQUENCES
    padding = max(source["epoch"]["padding"] for source in summary["sources"])
    return {
        "config": {"megabytes": round(megabytes, 1), "vocabulary": len(tokenizer), "points": points, "worlds": WORLDS,
                   "tiny_tokens_per_s": TINY_TOKENS_PER_S, "times_wanted": TIMES},
        "rows": rows,
        "documents": sum(source["documents"] for source in summary["sources"]),
        "stream_hash": hashlib.sha256("".join(found[1].values()).encode()).hexdigest(),
        "same_stream_on_1_2_4_ranks": same,
        "times_tiny": round(slowest / TINY_TOKENS_PER_S, 1),
        "padding": padding,
        "passed": same and one == two and slowest >= TIMES * TINY_TOKENS_PER_S and padding < 0.02,
    }  # fmt: skip


def rank_of(folder: Path, rank: int, world: int) -> dict[str, str]:
    """One rank, resumed at each point."""
    values = json.loads((folder / "config.json").read_text())
    values["mix"] = {name: MixConfig(**one) for name, one in values["mix"].items()}
    values |= {"long_documents": DataConfig().long_documents, "tasks": (), "decontaminate": ()}
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    stream = TokenStream(DataConfig(**values), tokenizer, SEED, cache_dir=folder / "cache_1")
    return hashes(stream, json.loads((folder / "points.json").read_text()), rank, world)


if __name__ == "__main__":
    print(json.dumps(rank_of(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
