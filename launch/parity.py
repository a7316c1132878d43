"""Two ways of training from one base, compared over seeds: means, spread, and the paired difference with its interval.

The comparison behind DeepSeek-V3.2-Exp against V3.1-Terminus: a control that goes on with dense attention, and DSA, on
the same tokens, measured on the same held-out ones. A pair is one seed: what both runs share (the order of the tokens)
drops out of their difference, what is left is the attention and chance. The interval is Student's t over the seeds, so
it speaks of other seeds, not of other held-out texts or other bases.

launch/pipeline.py writes DIR/parity.json, parity.md and parity.html where a recipe asks for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from conf.convert import load_yaml
from conf.errors import UserError
from launch.recipe import Parity, Run
from launch.report_html import document, text
from launch.report_html import table as html_table
from train.intervals import LEVEL, t_quantile

LOWER_IS_BETTER = ("loss/",)
HEAD = ("", "control", "DSA", "DSA - control", "95% interval", "verdict")


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over the seeds; None for a single one."""
    return stdev(values) if len(values) > 1 else None


def paired(control: Sequence[float], sparse: Sequence[float]) -> dict[str, Any]:
    """Difference seed by seed: mean, `low` and `high` of its 95% interval (None for a single seed), `relative` to the
    control's mean (None where that is 0), values."""
    values = [b - a for a, b in zip(control, sparse, strict=True)]
    middle, deviation = mean(values), spread(values)
    low = high = None
    if deviation is not None:
        half = t_quantile((1 + LEVEL) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
        low, high = middle - half, middle + half
    relative = middle / abs(mean(control)) if mean(control) else None
    return {"mean": middle, "low": low, "high": high, "relative": relative, "values": values}


def verdict(metric: str, difference: Mapping[str, Any]) -> str:
    """What the interval allows to say."""
    low, high = difference["low"], difference["high"]
    if low is None:
        return "one seed: no interval"
    if low <= 0 <= high:
        return "within noise"
    rises = low > 0
    return "DSA worse" if rises == metric.startswith(LOWER_IS_BETTER) else "DSA better"


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every finite number of a JSON object by its path; lists are left out."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[prefix + key] = float(value)
    return found


def compared(control: Mapping[str, float], sparse: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Of two evaluations, what is held against what: the control's dense figures against DSA's sparse ones, the same
    with DSA's weights read densely (which tells what training changed from what selection costs), and accuracies."""
    found = {}
    for key, value in control.items():
        if "_dense" in key and key.replace("_dense", "_sparse") in sparse:
            name = key.replace("_dense", "")
            found[name] = (value, sparse[key.replace("_dense", "_sparse")])
            if key in sparse:
                found[f"{name}, DSA read densely"] = (value, sparse[key])
        elif key.rsplit("/", 1)[-1] == "accuracy" and key in sparse:
            found[key] = (value, sparse[key])
    return found


def by_position(control: Mapping[str, Any], sparse: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The same for the losses of tokens with so much context, of the buckets that both evaluations have."""
    found = []
    for evaluation, key in ((control, "dense"), (sparse, "sparse")):
        rows = evaluation.get("loss_by_position", [])
        found.append({f"loss/lm, {row['from']} to {row['to']} tokens of context": row[key] for row in rows})
    return {name: (value, found[1][name]) for name, value in found[0].items() if name in found[1]}


def compare(pairs: Mapping[int | None, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Seed -> (the control's evaluation, DSA's) -> one row a metric that every seed has."""
    by_seed = [compared(numbers(a), numbers(b)) | by_position(a, b) for a, b in pairs.values()]
    rows = []
    for metric in by_seed[0]:
        if not all(metric in found for found in by_seed):
            continue
        sides = tuple(zip(*(found[metric] for found in by_seed), strict=True))
        difference = paired(*sides)
        control, sparse = ({"mean": mean(side), "sd": spread(side), "values": list(side)} for side in sides)
        row = {"metric": metric, "control": control, "sparse": sparse, "difference": difference}
        rows.append(row | {"verdict": verdict(metric, difference)})
    return rows


def read_pairs(parity: Parity, runs: Sequence[Run]) -> dict[int | None, tuple[dict[str, Any], dict[str, Any]]]:
    """Seed -> the control's evaluation and DSA's."""
    found: dict[str, dict[int | None, dict[str, Any]]] = {parity.control: {}, parity.sparse: {}}
    for run in runs:
        if run.step in found:
            found[run.step][run.seed] = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    return {seed: (found[parity.control][seed], found[parity.sparse][seed]) for seed in found[parity.control]}


def keys_that_answer(folder: Path) -> int | None:
    """The k with which the control's evaluation in `folder` sampled its answers, where that is fewer than all; its
    losses are dense in any case. None where it read every token."""
    config = load_yaml(folder / "config.yaml")
    topk = config.model.index_topk
    return None if topk >= config.data.seq_len else topk


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, under HEAD."""
    sides = []
    for side in (row["control"], row["sparse"]):
        sides.append(f"{side['mean']:.4f}" + ("" if side["sd"] is None else f" ± {side['sd']:.4f}"))
    difference = row["difference"]
    interval = "-" if difference["low"] is None else f"{difference['low']:+.4f} to {difference['high']:+.4f}"
    relative = "" if difference["relative"] is None else f" ({difference['relative']:+.2%})"
    return [row["metric"], *sides, f"{difference['mean']:+.4f}{relative}", interval, row["verdict"]]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_parity(parity: Parity, runs: Sequence[Run], out: Path) -> str:
    """Compares the evaluations of finished runs, writes the three files into `out` -> the table as text."""
    pairs = read_pairs(parity, runs)
    rows = compare(pairs)
    folder = next(run.folder for run in runs if run.step == parity.control)
    short = keys_that_answer(folder)
    if short is not None:
        rows = [row for row in rows if not row["metric"].endswith("accuracy")]
    if not rows:
        raise UserError(f"{parity.control} and {parity.sparse} have no metric in common: nothing to compare")
    seeds = list(pairs)
    body = [cells(row) for row in rows]
    named = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    note = (
        f"{named}: mean ± standard deviation over them; difference seed by seed, Student's t. Losses in nats a token."
    )
    if short is not None:
        note += (
            f" No accuracies: the control answered with {short} keys of an untrained indexer; evaluate it with k = T."
        )
    found = {"control": parity.control, "sparse": parity.sparse, "seeds": seeds, "note": note, "rows": rows}
    (out / "parity.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    lines = [HEAD, ["---"] * len(HEAD), *body]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (out / "parity.md").write_text(f"{markdown}\n\n{note}\n", encoding="utf-8")
    page = f"<h1>Parity of {text(parity.control)} and {text(parity.sparse)}</h1><p>{text(note)}</p>"
    page += html_table([text(cell) for cell in HEAD], [[text(cell) for cell in line] for line in body])
    (out / "parity.html").write_text(document("Parity", page), encoding="utf-8")
    return f"{aligned([HEAD, *body])}\n{note}\nwritten: {out}/parity.json, parity.md, parity.html"
