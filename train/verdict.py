"""What an evaluation says in the end: at which length, if any, sparse attention falls outside the noise of dense.

Reads the plain values of evaluation.json, so that it can be had again from an old one. Loss: a bucket departs where the
interval of sparse - dense, corrected for all buckets (`low_all`, `high_all`), lies wholly above the margin; it holds
where it lies wholly below; else it is undecided, and more sequences would tell. Of losses that are not finite nothing
else is said. Tasks: where dense solves at least
`GOOD_DENSE`, a length departs where the interval of the difference in accuracy, corrected likewise, lies below 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.intervals import LEVEL, share_difference

GOOD_DENSE = 0.8  # where dense attention itself fails, sparse has nothing to lose
Rows = Sequence[Mapping[str, Any]]


def loss_verdict(rows: Rows, margin: float, prefix: str = "") -> dict[str, Any]:
    """rows: `loss_by_position`; `prefix` `against_` reads the difference from the other checkpoint."""
    kinds: dict[str, list[list[int]]] = {"departs_in": [], "undecided_in": [], "better_in": [], "not_finite_in": []}
    holds_up_to, held = 0, True
    for row in rows:
        low, high, place = row[f"{prefix}low_all"], row[f"{prefix}high_all"], [row["from"], row["to"]]
        if row[f"{prefix}difference"] is None:
            kinds["not_finite_in"].append(place)
        elif low is not None and low > margin:
            kinds["departs_in"].append(place)
        elif high is None or high > margin:
            kinds["undecided_in"].append(place)
        elif high < -margin:
            kinds["better_in"].append(place)
        held = held and high is not None and high <= margin
        holds_up_to = row["to"] if held else holds_up_to
    departs = kinds["departs_in"]
    return {"departs_at": departs[0][0] if departs else None, "holds_up_to": holds_up_to, **kinds}


def tasks_verdict(rows: Rows) -> dict[str, Any]:
    """rows: `tasks`; depths are taken together. `holds_up_to`: the longest length compared before one that departs;
    `worst`: the lowest bound of a difference in accuracy."""
    cells: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        cell = cells.setdefault((row["task"], row["length"]), [0, 0, 0])
        for i, name in enumerate(("n", "dense", "sparse")):
            cell[i] += row[name]
    good = {key: cell for key, cell in sorted(cells.items()) if cell[0] and cell[1] >= GOOD_DENSE * cell[0]}
    level = 1 - (1 - LEVEL) / max(len(good), 1)
    found = {key: share_difference(dense, sparse, n, level) for key, (n, dense, sparse) in good.items()}
    departs = [key for key, it in found.items() if it.high is not None and it.high < 0]
    departs_at = min((length for _, length in departs), default=None)
    return {
        "departs_at": departs_at,
        "departs_in": [{"task": task, "length": length} for task, length in departs],
        "compared": len(good),
        "dense_below": len(cells) - len(good),
        "holds_up_to": max((length for _, length in good if departs_at is None or length < departs_at), default=None),
        "worst": min((it.low for it in found.values() if it.low is not None), default=None),
    }


def enough_topk(rows: Rows, margin: float) -> int | None:
    """The smallest k of `loss_by_topk` whose loss over all tokens is surely within the margin, with no bucket that
    departs; None where none is, or too few sequences tell."""
    for k in sorted({row["k"] for row in rows}):
        own = [row for row in rows if row["k"] == k]
        total = [row["high"] for row in own if row["all"]]
        if total and total[0] is not None and total[0] <= margin:
            if not any(row["low_all"] is not None and row["low_all"] > margin for row in own if not row["all"]):
                return int(k)
    return None


def verdict(found: Mapping[str, Any], margin: float) -> dict[str, Any]:
    """found: evaluation.json as far as it is there -> `verdict` of it, `words` last."""
    rows = found.get("loss_by_position") or []
    result: dict[str, Any] = {"margin": margin, "level": LEVEL, "buckets": len(rows)}
    words = []
    if rows:
        loss = loss_verdict(rows, margin)
        result |= loss
        words.append(_loss_words(rows, loss, margin, "", "dense attention"))
    parity = found.get("short_context")
    if parity:
        high, low = parity["high"], parity["low"]
        within = _within(low, high, margin)
        result["short_context_holds"] = within
        said = {True: "the same", False: "not the same", None: "undecided"}[within]
        apart = parity["difference"]
        found_there = "losses are not finite" if apart is None else f"{apart:+.4f} nats a token{_between(low, high)}"
        words.append(f"Up to {parity['up_to']:,} tokens of context: {said} ({found_there}).")
    if rows and "against_difference" in rows[0]:
        result["against"] = loss_verdict(rows, margin, "against_")
        words.append(_loss_words(rows, result["against"], margin, "against_", "the other checkpoint"))
    if found.get("tasks"):
        result["tasks"] = tasks_verdict(found["tasks"])
        words.append(_task_words(result["tasks"]))
    sweep = found.get("loss_by_topk") or []
    if len({row["k"] for row in sweep}) > 1:
        result["enough_topk"] = enough_topk(sweep, margin)
        enough = result["enough_topk"]
        words.append(
            "Of no k tried is it certain that it would have been enough."
            if enough is None
            else f"Of the k tried, {enough:,} would have been enough."
        )
    return result | {"words": " ".join(words)}


def _held(loss: Mapping[str, Any]) -> str:
    return f" (surely within it up to {loss['holds_up_to']:,})" if loss["holds_up_to"] else ""


def _within(low: float | None, high: float | None, margin: float) -> bool | None:
    """Whether the interval lies within the margin on both sides; None where it cannot be told."""
    if low is None or high is None:
        return None
    if -margin <= low and high <= margin:
        return True
    return False if low > margin or high < -margin else None


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f", {LEVEL:.0%} interval {low:+.4f} to {high:+.4f}"


def _places(buckets: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{low:,} to {high:,}" for low, high in buckets)


def _loss_words(rows: Rows, loss: Mapping[str, Any], margin: float, prefix: str, than: str) -> str:
    if loss["not_finite_in"]:
        return (
            f"Nothing is said of {than}: losses are not finite at {_places(loss['not_finite_in'])} tokens of context."
        )
    longest = rows[-1]["to"]
    if loss["departs_at"] is not None:
        row = next(row for row in rows if row["from"] == loss["departs_at"])
        bounds = _between(row[f"{prefix}low_all"], row[f"{prefix}high_all"])
        found = f"{row[f'{prefix}difference']:+.4f} nats a token{bounds}"
        return (
            f"Sparse attention departs from {than} at {row['from']:,} tokens of context: {found} for {row['from']:,} to"
            f" {row['to']:,}, above the margin of {margin:g}{_held(loss)}."
        )
    if not loss["undecided_in"]:
        return (
            f"No departure from {than} up to {longest:,} tokens of context: at every length the interval of the"
            f" difference lies below the margin of {margin:g} nats a token."
        )
    held = (
        f"within the margin of {margin:g} nats a token up to {loss['holds_up_to']:,}; " if loss["holds_up_to"] else ""
    )
    where = _places(loss["undecided_in"])
    return (
        f"No departure from {than} seen up to {longest:,} tokens of context: {held}too few sequences to tell at {where}"
        " (train.eval_sequences)."
    )


def _task_words(tasks: Mapping[str, Any]) -> str:
    if not tasks["compared"]:
        return f"Tasks: dense attention solves {GOOD_DENSE:.0%} of none, so they tell nothing."
    if tasks["departs_at"] is None:
        return (
            f"Tasks: no departure in {tasks['compared']} cells of task and length where dense solves"
            f" {GOOD_DENSE:.0%}, up to {tasks['holds_up_to']:,} tokens (at worst {tasks['worst']:+.2f} of accuracy is"
            " not excluded)."
        )
    which = ", ".join(f"{cell['task']} at {cell['length']:,}" for cell in tasks["departs_in"])
    return f"Tasks: sparse attention answers fewer from {tasks['departs_at']:,} tokens on ({which})."
