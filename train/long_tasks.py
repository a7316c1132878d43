"""Accuracy of the long-context tasks by length and depth, with dense and with sparse attention of the same weights.

A problem counts as right where the likeliest token is the answer's at every one of its places, the right ones before
it given. That is the case exactly where greedy decoding says the whole answer: up to the first wrong token both have
read the same. So one forward each measures what would take a decoding of every answer, and memory is that of a
forward without losses: of the vocabulary only the answer's rows are made.

Problems are shared out over replicas and counted, so any number of ranks finds the same numbers; counts stay
with them, for intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import EvalConfig
from data.long_stream import LongProblems
from data.packing import Piece, assemble
from data.tasks.long import choose_long
from model import Transformer
from train import distributed
from train.parallel.cp import ContextParallel
from train.precision import autocast_dtype

Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Cell:
    """One task (as the run names it) at one length and depth; None: it has no depth."""

    task: str
    length: int
    depth: float | None


def cells(cfg: EvalConfig, seq_len: int) -> list[Cell]:
    """What `eval.*` asks for, in order."""
    steps = max(1, cfg.depths - 1)
    depths = [place / steps for place in range(cfg.depths)] if cfg.depths > 1 else [0.5]
    return [
        Cell(task, length, depth)
        for task in cfg.tasks
        for length in cfg.lengths or (seq_len,)
        for depth in (depths if choose_long(task)[0].has_depth else [None])
    ]


@torch.no_grad()
def task_accuracy(
    net: Transformer,
    cfg: EvalConfig,
    problems: LongProblems,
    cp: ContextParallel,
    precision: str = "fp32",
    done: Callable[[], None] = lambda: None,
) -> dict[str, list[Row]]:
    """Held-out problems of every cell, `cfg.problems` each, shared out over the replicas of `cp`; the same result on
    every rank.

    tasks: rows of task, length, depth, n and the numbers of them that `dense` and `sparse` attention answer right;
    k_sweep: rows of task, length, k, n and `sparse`, over all depths. UserError where a length holds no problem of a
    task. `done` is called after each of this replica's problems.
    """
    asked, device = cells(cfg, problems.cfg.seq_len), next(net.parameters()).device
    topk = net.config.index_topk
    modes = [("dense", topk), ("sparse", topk), *(("sparse", k) for k in cfg.k_sweep)]
    right = torch.zeros(len(asked), len(modes), dtype=torch.float64, device=distributed.device())
    autocast = autocast_dtype(precision)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        for number in range(cp.replica, len(asked) * cfg.problems, cp.replicas):
            at, index = divmod(number, cfg.problems)
            batch = {name: field.to(device) for name, field in _batch(problems, asked[at], index, cp).items()}
            for column, (attention, k) in enumerate(modes):
                right[at, column] += _is_right(net, batch, cp, attention, k)
            done()
    counts = distributed.sum_over_ranks(right).div(cp.size).long().tolist()  # the ranks of a replica counted alike
    n = cfg.problems
    tasks: list[Row] = [
        {"task": cell.task, "length": cell.length, "depth": cell.depth, "n": n, "dense": row[0], "sparse": row[1]}
        for cell, row in zip(asked, counts, strict=True)
    ]
    sweep: list[Row] = []
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in asked):
        rows = [row for cell, row in zip(asked, counts, strict=True) if (cell.task, cell.length) == (task, length)]
        for column, k in enumerate(cfg.k_sweep, 2):
            found = sum(row[column] for row in rows)
            sweep.append({"task": task, "length": length, "k": k, "n": n * len(rows), "sparse": found})
    return {"tasks": tasks} | ({"k_sweep": sweep} if sweep else {})


def _batch(problems: LongProblems, cell: Cell, index: int, cp: ContextParallel) -> dict[str, Tensor]:
    """A problem as one sequence, padded to what `cp` can cut."""
    problem = problems.problem(cell.task, index, cell.length, cell.depth)
    ids, targets = problems.asked(problem)
    parts = 2 * cp.size if cp.size > 1 else 1
    return assemble([Piece(ids, targets, len(ids))], -(-len(ids) // parts) * parts).tensors()


def _is_right(net: Transformer, batch: dict[str, Tensor], cp: ContextParallel, attention: str, k: int) -> bool:
    fields, context = cp.share(batch)
    with net.selecting(k):
        out = net(**fields, context=context, attention=attention, lm_loss=False, mtp=False, greedy=True)
    labels = fields["labels"]
    assert out.greedy is not None
    wrong = context.add((out.greedy != labels)[labels >= 0].sum())
    return int(wrong) == 0


def accuracy_row(rows: Sequence[Row]) -> dict[str, float]:
    """Means for a metrics row: `tasks/NAME/dense` and `/sparse` over all lengths and depths."""
    found: dict[str, float] = {}
    for task in dict.fromkeys(str(row["task"]) for row in rows):
        mine = [row for row in rows if row["task"] == task]
        n = sum(int(row["n"] or 0) for row in mine)
        for kind in ("dense", "sparse"):
            found[f"tasks/{task}/{kind}"] = sum(int(row[kind] or 0) for row in mine) / n
    return found
