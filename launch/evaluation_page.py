"""The evaluation page from evaluation.json, which is untrusted: rows that are not as expected are left out and counted.

Sections appear where their table is there: losses by context, what the indexer finds, selections of other sizes, tasks
by length and depth, speed and memory, the harness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.evaluation_charts import Curve, Grid, Line, curve_card, grid_card, tokens
from launch.report_html import asset, document, section, table, text
from launch.report_names import bytes_unit, number

DENSE, SPARSE, OTHER = 0, 1, 2  # colours
COLOURS = {"dense": DENSE, "sparse": SPARSE}
CONTEXT = "tokens of context"
NO_DEPTH = -1.0  # of a task whose answer is spread over the context
POSITIVE = ("from", "to", "k", "length", "n")
Rows = list[dict[str, Any]]


def rows_of(found: Mapping[str, Any], key: str, numbers: Sequence[str], words: Sequence[str] = ()) -> Rows:
    """The rows of a table whose `numbers` are finite (lengths and counts positive) and whose `words` are strings."""
    value = found.get(key)
    return [
        row
        for row in (value if isinstance(value, list) else [])
        if isinstance(row, dict)
        and all(_finite(row.get(name)) for name in numbers)
        and all(row[name] > 0 for name in POSITIVE if name in numbers)
        and all(isinstance(row.get(name), str) for name in words)
    ]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _band(rows: Rows, x: str, low: str, high: str) -> list[tuple[float, float, float]]:
    return [(row[x], row[low], row[high]) for row in rows if _finite(row.get(low)) and _finite(row.get(high))]


def _line(rows: Rows, name: str, colour: int, y: str, x: str = "to", low: str = "", high: str = "") -> Line:
    return Line(name, colour, [(row[x], row[y]) for row in rows], _band(rows, x, low, high) if low else [])


def verdict_box(found: Mapping[str, Any]) -> str:
    """The words, a sentence a line, the first one large; red where anything departs."""
    given = found.get("verdict")
    if not isinstance(given, dict) or not isinstance(given.get("words"), str) or not given["words"]:
        return '<div class="verdict"><p>No verdict: nothing was measured by position.</p></div>'
    tasks = given.get("tasks")
    departs = given.get("departs_at") is not None or isinstance(tasks, dict) and tasks.get("departs_at") is not None
    lines = given["words"].replace(". ", ".\n").split("\n")
    return f'<div class="verdict{" alarm" * departs}">{"".join(f"<p>{text(line)}</p>" for line in lines)}</div>'


def losses(found: Mapping[str, Any]) -> str:
    rows = rows_of(found, "loss_by_position", ("from", "to", "dense", "sparse", "difference"))
    if not rows:
        return ""
    lines = [
        _line(rows, "dense", DENSE, "dense", low="dense_low", high="dense_high"),
        _line(rows, "sparse", SPARSE, "sparse", low="sparse_low", high="sparse_high"),
    ]
    compared = [row for row in rows if _finite(row.get("other")) and _finite(row.get("against_difference"))]
    if compared:
        lines.append(_line(compared, "other checkpoint", OTHER, "other", low="other_low", high="other_high"))
    band = "bands: 95% over sequences"
    drawn = [curve_card(Curve("Loss", "loss_by_position", lines, CONTEXT, "nats a token", notes=[band]))]
    drawn.append(_difference(rows, "Sparse less dense", "", SPARSE, found))
    if compared:
        drawn.append(_difference(compared, "Sparse less the other checkpoint", "against_", OTHER, found))
    head = ["Context", "Tokens", "Sequences", "Dense", "Sparse", "Difference", "95%", "95%, all lengths at once"]
    cells = [
        [
            f"{row['from']:,}–{row['to']:,}",
            *(f"{row[name]:,}" if _finite(row.get(name)) else "–" for name in ("tokens", "sequences")),
            number(row["dense"]),
            number(row["sparse"]),
            f"{row['difference']:+.4f}",
            _bounds(row, "low", "high"),
            _bounds(row, "low_all", "high_all"),
        ]
        for row in rows
    ]
    return _cards(drawn) + f"<details><summary>The numbers</summary>{table(head, cells)}</details>"


def _bounds(row: Mapping[str, Any], low: str, high: str) -> str:
    return f"{row[low]:+.4f} to {row[high]:+.4f}" if _finite(row.get(low)) and _finite(row.get(high)) else "–"


def _difference(rows: Rows, title: str, prefix: str, colour: int, found: Mapping[str, Any]) -> str:
    line = _line(rows, "difference", colour, f"{prefix}difference", low=f"{prefix}low_all", high=f"{prefix}high_all")
    note = "band: 95%, for all lengths at once; above 0, sparse loses"
    limit = _margin(found)
    return curve_card(
        Curve(title, f"{prefix}difference", [line], CONTEXT, "nats a token", zero=True, limit=limit, notes=[note])
    )


def _margin(found: Mapping[str, Any]) -> tuple[float, str] | None:
    given = found.get("verdict")
    margin = given.get("margin") if isinstance(given, dict) else None
    return (margin, "margin") if _finite(margin) else None  # type: ignore[return-value]


def recall(found: Mapping[str, Any]) -> str:
    rows = rows_of(found, "recall_by_position", ("layer", "to", "mass_recall", "recall_of_oracle", "overlap"))
    named = (
        ("mass_recall", "Attention mass recalled"),
        ("recall_of_oracle", "Recall of the oracle"),
        ("overlap", "Overlap of indexer's and attention's top-k"),
    )
    drawn = []
    for key, title in named:
        if rows:
            values = [row[key] for row in rows]
            bounds = (min([0.5, *values]) if min(values) < 0.5 else 0.5, 1.0)
            drawn.append(_map(rows, "layer", "to", key, title, f"{key} · share", bounds, "layer"))
    return _cards(drawn)


def _map(
    rows: Rows, row: str, column: str, key: str, title: str, said: str, bounds: tuple[float, float], row_label: str,
    colour: int = DENSE, diverging: bool = False, digits: int = 2,
) -> str:  # fmt: skip
    """Cells of a table by two of its columns; numbers in order, what is said of columns is tokens."""
    ups, across = (sorted({each[name] for each in rows}) for name in (row, column))
    by_place = {(each[row], each[column]): each[key] for each in rows}
    values = [[by_place.get((up, over)) for over in across] for up in ups]
    labels = [f"{up:g}" if row != "depth" else "all" if up == NO_DEPTH else f"{up:.0%}" for up in ups]
    grid = Grid(
        title, said, labels, [tokens(over) for over in across], values, row_label, CONTEXT, bounds, colour, diverging,
        digits,
    )  # fmt: skip
    return grid_card(grid)


def sweep(found: Mapping[str, Any]) -> str:
    rows = rows_of(
        found, "loss_by_topk", ("k", "to", "all", "difference", "mass_recall", "recall_of_oracle", "overlap")
    )
    total = sorted((row for row in rows if row["all"]), key=lambda row: row["k"])
    drawn = []
    given = found.get("verdict")
    enough = given.get("enough_topk") if isinstance(given, dict) else None
    mark = (enough, f"enough: {enough:,}") if _finite(enough) and enough is not None else None
    if len(total) > 1:
        line = _line(total, "sparse less dense", SPARSE, "difference", "k", "low", "high")
        band = "band: 95% over sequences; all tokens of all lengths"
        drawn.append(
            curve_card(
                Curve("Loss by k", "loss_by_topk", [line], "k, tokens selected", "nats a token", zero=True,
                      limit=_margin(found), mark=mark, notes=[band])
            )
        )  # fmt: skip
        names = (("mass_recall", "mass recalled"), ("recall_of_oracle", "recall of the oracle"), ("overlap", "overlap"))
        lines = [_line(total, name, i, key, "k") for i, (key, name) in enumerate(names)]
        note = "of dense attention, over all layers"
        drawn.append(
            curve_card(
                Curve("Recall by k", "loss_by_topk", lines, "k, tokens selected", "share", mark=mark, share=True,
                      notes=[note])
            )
        )  # fmt: skip
        each = [row for row in rows if not row["all"]]
        if each:
            most = max(max(abs(row["difference"]) for row in each), 1e-6)
            digits = 3 if most < 1 else 2
            drawn.append(
                _map(each, "k", "to", "difference", "Sparse less dense, by k and context", "nats a token",
                     (-most, most), "k", SPARSE, True, digits)
            )  # fmt: skip
    drawn += task_sweep(found)
    return _cards(drawn)


def task_sweep(found: Mapping[str, Any]) -> list[str]:
    """Accuracy by k, a chart a task with a line a length."""
    rows = rows_of(found, "k_sweep", ("length", "k", "n", "sparse"), ("task",))
    drawn = []
    for task in sorted({row["task"] for row in rows}):
        lines = []
        lengths = sorted({row["length"] for row in rows if row["task"] == task})
        for i, length in enumerate(lengths):
            mine = sorted(
                (row for row in rows if (row["task"], row["length"]) == (task, length)), key=lambda row: row["k"]
            )
            points = [(row["k"], row["sparse"] / row["n"]) for row in mine if row["n"]]
            if points:
                lines.append(Line(f"{tokens(length)} tokens", i % 8, points))
        if lines:
            drawn.append(
                curve_card(Curve(f"{task} by k", "k_sweep", lines, "k, tokens selected", "share right", share=True))
            )
    return drawn


def tasks(found: Mapping[str, Any]) -> str:
    rows = rows_of(found, "tasks", ("length", "n", "dense", "sparse"), ("task",))
    drawn = []
    for task in sorted({row["task"] for row in rows}):
        mine = [row for row in rows if row["task"] == task and row["n"]]
        shares = [
            {
                "depth": row["depth"] if _finite(row.get("depth")) else NO_DEPTH,
                "length": row["length"],
                **{name: row[name] / row["n"] for name in ("dense", "sparse")},
                "difference": (row["sparse"] - row["dense"]) / row["n"],
            }
            for row in mine
        ]
        n = ", ".join(str(count) for count in sorted({row["n"] for row in mine}))
        for key in ("dense", "sparse"):
            title, said = f"{task}, {key}", f"share right · {n} problems a cell"
            colour = DENSE if key == "dense" else SPARSE
            drawn.append(_map(shares, "depth", "length", key, title, said, (0.0, 1.0), "depth", colour))
        title = f"{task}, sparse less dense"
        most = max([0.1, *(abs(row["difference"]) for row in shares)])
        drawn.append(
            _map(shares, "depth", "length", "difference", title, "share right", (-most, most), "depth", DENSE, True)
        )
    return _cards(drawn)


def speed(found: Mapping[str, Any]) -> str:
    needed = ("length", "prefill_s", "decode_tokens_per_s", "kv_bytes", "index_key_bytes", "kv_bytes_by_formula")
    rows = [row for row in rows_of(found, "speed", needed, ("attention",)) if row["attention"] in COLOURS]
    if not rows:
        return ""
    both = {
        name: sorted((r for r in rows if r["attention"] == name), key=lambda r: r["length"])
        for name in ("dense", "sparse")
    }
    drawn = []
    for key, title, unit, log in (
        ("prefill_s", "Prefill", "seconds", True),
        ("decode_tokens_per_s", "Decoding", "tokens a second, one sample", False),
    ):
        lines = [_line(mine, name, COLOURS[name], key, "length") for name, mine in both.items() if mine]
        drawn.append(curve_card(Curve(title, key, lines, CONTEXT, unit, log_y=log)))
    mine = both["sparse"] or both["dense"]
    per, unit = bytes_unit(max(row["kv_bytes"] for row in mine))
    lines = []
    for i, (key, name) in enumerate((("kv_bytes", "latents"), ("index_key_bytes", "index keys"))):
        scaled = [row | {key: row[key] / per} for row in mine]
        lines.append(_line(scaled, f"{name}, allocated", i, key, "length"))
        formula = [
            (row["length"], row[f"{key}_by_formula"] / per) for row in mine if _finite(row.get(f"{key}_by_formula"))
        ]
        if formula:
            lines.append(Line(f"{name}, by formula", i + 4, formula, dashed=True))
    drawn.append(curve_card(Curve("Cache of one sample", "kv_bytes", lines, CONTEXT, unit)))
    peaks = {name: [r for r in each if _finite(r.get("peak_memory_bytes"))] for name, each in both.items()}
    if any(peaks.values()):
        per, unit = bytes_unit(max(row["peak_memory_bytes"] for each in peaks.values() for row in each))
        lines = [
            Line(name, COLOURS[name], [(row["length"], row["peak_memory_bytes"] / per) for row in each])
            for name, each in peaks.items()
            if each
        ]
        drawn.append(curve_card(Curve("Peak memory, weights included", "peak_memory_bytes", lines, CONTEXT, unit)))
    return _cards(drawn)


def harness(found: Mapping[str, Any]) -> str:
    rows = rows_of(found, "harness", ("dense", "sparse"), ("task", "metric"))
    cells = [
        [text(row["task"]), text(row["metric"]), *(number(row[name]) for name in ("dense", "sparse"))] for row in rows
    ]
    return table(["Task", "Metric", "Dense", "Sparse"], cells) if rows else ""


def _cards(drawn: Sequence[str]) -> str:
    return f'<div class="grid-of">{"".join(drawn)}</div>' if drawn else ""


def page(name: str, found: Mapping[str, Any]) -> str:
    """The whole document. found: evaluation.json as it was read."""
    chapters = [
        ("loss", "Loss by context", "Held-out tokens by how many tokens they can attend to.", losses(found)),
        ("tasks", "Tasks by length and depth", "Greedy answers to problems with one right answer.", tasks(found)),
        ("recall", "What the indexer finds", "By layer and context; a selection that holds all is 1.", recall(found)),
        ("topk", "How many tokens to select", "The same weights with another index_topk.", sweep(found)),
        ("speed", "Speed and memory", "One sample through the sampler's own decoder.", speed(found)),
        ("harness", "lm-evaluation-harness", "", harness(found)),
    ]
    shown = [chapter for chapter in chapters if chapter[3]]
    links = "".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title, _, _ in shown)
    header = (
        f'<header><p class="brand">Winnow</p><h1>Evaluation {text(name)}</h1>'
        '<p class="lead">sparse against dense attention of the same weights</p>'
        f"{verdict_box(found)}<nav>{links}</nav></header>"
    )
    footer = (
        "<footer>Intervals are Student's t over sequences, paired by sequence; a departure is an interval, corrected"
        " for all lengths, that lies above the margin. docs/evaluation.md has the details.</footer>"
    )
    return document(
        name, "\n".join([header, *(section(*chapter) for chapter in shown), footer]), asset("evaluation.css")
    )
