"""What a run is about to read, before it reads it: documents, tokens, lengths, padding, cuts, what was left out.

`summarise` is plain JSON; `one_line` is what a stage says at its start, `table` what `launch/corpus.py` prints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from data.stream import LONG, WORKED, Text, TokenStream, chosen_documents

BAR = 40  # characters of the longest bar
PERCENTILES = (50, 90, 99)


def summarise(stream: TokenStream) -> dict[str, Any]:
    """Of every source of the stream, and the shares that they have."""
    long, worked = stream.shares[LONG], (1 - stream.shares[LONG]) * stream.shares[WORKED]
    return {
        "split": stream.split,
        "seq_len": stream.cfg.seq_len,
        "packing": stream.cfg.packing,
        "problems": {"long-context": long, "worked": worked},
        "sources": [_of_text(text) | {"share": (1 - long - worked) * text.part.weight} for text in stream.texts],
    }


def _of_text(text: Text) -> dict[str, Any]:
    lengths, seq_len, figures = np.diff(text.corpus.offsets), text.part.cfg.seq_len, text.layout.figures()
    lengths = lengths[chosen_documents(text.part, lengths)]
    meta, cfg = text.corpus.meta, text.part.cfg
    return {
        "name": text.part.name,
        "source": cfg.source,
        "path": cfg.path,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "lengths": {
            "shortest": int(lengths.min()),
            **{f"p{at}": int(np.percentile(lengths, at)) for at in PERCENTILES},
            "longest": int(lengths.max()),
        },
        "longer_than_a_sequence": float((lengths > seq_len).mean()),
        "histogram": list(_histogram(lengths)),
        "epoch": {"sequences": figures.sequences, "padding": figures.padding, "cut": figures.cut},
        "left_out": meta["left_out"],
        "evaluation_rows": meta["evaluation_rows"],
        "seconds_to_tokenise": meta["seconds"],
    }


def _histogram(lengths: np.ndarray) -> Iterator[dict[str, int]]:
    """Documents and tokens of lengths from 2^n to below 2^(n+1)."""
    power = np.frexp(lengths)[1] - 1  # of the highest bit
    documents, tokens = np.bincount(power), np.bincount(power, lengths)
    for bit in range(int(power.min()), len(documents)):
        yield {"from": 2**bit, "documents": int(documents[bit]), "tokens": int(tokens[bit])}


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _left_out(source: dict[str, Any]) -> str:
    return ", ".join(f"{one['count']:,} {kind.replace('_', ' ')}" for kind, one in source["left_out"].items())


def one_line(summary: dict[str, Any]) -> str:
    """What is read, on one line."""
    said = []
    for one in summary["sources"]:
        share = f"{one['name']} ({one['share']:.0%} of tokens): " if len(summary["sources"]) > 1 else ""
        epoch = one["epoch"]
        said.append(
            f"{share}{one['documents']:,} documents, {_count(one['tokens'])} tokens,"
            f" {epoch['sequences']:,.0f} sequences of {summary['seq_len']} an epoch ({epoch['padding']:.1%} padding,"
            f" {epoch['cut']:.1%} of documents that fit are cut)"
        )
        said[-1] += f", left out: {_left_out(one)}" if one["left_out"] else ""
    said += [f"{share:.0%} {kind} problems" for kind, share in summary["problems"].items() if share > 0]
    return f"data ({summary['packing']}): " + "; ".join(said)


def table(summary: dict[str, Any], sequences: int | None = None) -> str:
    """The same at length. `sequences`: what one replica takes in all, for how often it passes over each source."""
    lines = [f"{summary['split']} split in sequences of {summary['seq_len']} tokens, data.packing={summary['packing']}"]
    for kind, share in summary["problems"].items():
        lines += [f"{kind + ' problems':<26}{share:.1%} of sequences"] if share > 0 else []
    for one in summary["sources"]:
        epoch, lengths = one["epoch"], one["lengths"]
        rows = {
            "share of sequences": f"{one['share']:.1%}",
            "documents": f"{one['documents']:,}",
            "tokens": f"{one['tokens']:,}",
            "tokens a document": ", ".join(f"{name} {value:,}" for name, value in lengths.items()),
            "longer than a sequence": f"{one['longer_than_a_sequence']:.2%} of documents",
            "sequences an epoch": f"{epoch['sequences']:,.0f}",
            "padding": f"{epoch['padding']:.2%}",
            "documents that fit, cut": f"{epoch['cut']:.2%}",
            "left out": _left_out(one) or "nothing",
        }
        if sequences is not None:
            rows["passes of one replica"] = f"{sequences * one['share'] / epoch['sequences']:.3g}"
        if one["evaluation_rows"]:
            looked = one["evaluation_rows"]
            rows["evaluation rows"] = f"{looked['looked_for']:,} looked for, {looked['too_short']:,} too short for it"
        lines += ["", f"{one['name']} ({one['path'] or one['source']})"]
        lines += [f"  {name:<24}{value}" for name, value in rows.items()]
        lines += [f"  {'':8}{kind.replace('_', ' ')}: {place}" for kind, place in _named(one)]
        lines += ["", *_bars(one["histogram"])]
    return "\n".join(lines)


def _named(source: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The first few of what was left out."""
    for kind, one in source["left_out"].items():
        yield from ((kind, place) for place in one["first"][:3])


def _bars(histogram: list[dict[str, int]]) -> Iterator[str]:
    yield f"  {'tokens from':>12}{'documents':>12}{'tokens':>12}  share of tokens"
    total, most = (function(one["tokens"] for one in histogram) for function in (sum, max))
    for one in histogram:
        bar = "#" * round(BAR * one["tokens"] / most)
        share = one["tokens"] / total
        yield f"  {one['from']:>12,}{one['documents']:>12,}{_count(one['tokens']):>12}  {share:>6.1%} {bar}".rstrip()
