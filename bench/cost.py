"""The cost of dense, warm-up and sparse attention by length: formula beside measurement.

`work` counts the multiplications of one layer's attention, from the READMEs under model/ops; 1 multiply-add is 2 FLOP.
The benchmark puts it beside what `python -m bench layer` measured, adds DeepSeek-V3.2's own sizes, which no machine
here can hold, by formula alone, and writes the generated half of docs/cost.md and its picture. It measures nothing
itself; its promise is that the formula explains how the measured time grows.

    python -m bench layer cost
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.chart import Curve, Panel, draw
from bench.layer import HEADS, INDEX_DIM, INDEX_HEADS, LATENT, NOPE, ROPE, TOPK, VALUE
from bench.length import two_layers
from bench.registry import RESULTS, benchmark
from conf.load import load
from conf.schema import ModelConfig

DOCS = RESULTS.parents[1] / "docs"
BEGIN, END = "<!-- written by `python -m bench cost` -->\n", "<!-- end -->\n"
LENGTHS = tuple(2**n for n in range(12, 18))  # of V3.2's table: 4K to 128K
MAX_GROWTH_ERROR = 1.3  # of measured time over the formula, from the last length but one to the last, either way
KINDS = ("dense", "warmup", "sparse")
TITLES = {"dense": "dense", "warmup": "warm-up", "sparse": "sparse"}


def v3_2() -> ModelConfig:
    return load(["+stage=pretrain", "model=deepseek_v3_2"]).config.model


def measured_sizes() -> ModelConfig:
    """The sizes that `bench.layer` measures."""
    return replace(
        two_layers(), num_attention_heads=HEADS, kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE,
        v_head_dim=VALUE, index_n_heads=INDEX_HEADS, index_head_dim=INDEX_DIM, index_topk=TOPK,
    )  # fmt: skip


def pairs(length: int, topk: int) -> tuple[int, int]:
    """Visible and selected (query, key) pairs of one causal sequence: sum of t and of min(t, k) for t = 1..T."""
    k = min(topk, length)
    return length * (length + 1) // 2, k * (k + 1) // 2 + (length - k) * k


def work(model: ModelConfig, length: int) -> dict[str, int]:
    """FLOPs of one layer over a whole sequence, by part. Backward passes make the probabilities again."""
    visible, selected = pairs(length, model.index_topk)
    heads, qk, v = model.num_attention_heads, model.qk_head_dim, model.v_head_dim
    latent, row = model.kv_lora_rank, model.kv_lora_rank + model.qk_rope_head_dim
    index = 2 * model.index_n_heads * model.index_head_dim
    return {
        "dense_forward": 2 * heads * (qk + v) * visible,
        "dense_backward": 2 * heads * (3 * qk + 2 * v) * visible,
        "absorbed_forward": 2 * heads * (row + latent) * visible,  # dense attention in sparse attention's form
        "absorbed_backward": 2 * heads * (3 * row + 2 * latent) * visible,
        "index": index * visible,
        "sparse_forward": 2 * heads * (row + latent) * selected,
        "sparse_backward": 2 * heads * (3 * row + 2 * latent) * selected,
        "sparse_target": 2 * heads * row * selected,
        "sparse_index_loss": 3 * index * selected,  # scores, dq, dk
        "warmup_target": 2 * heads * qk * visible,
        "warmup_index_loss": 3 * index * visible,
        "warmup_index_again": index * visible,
    }


def totals(model: ModelConfig, length: int, kernels: bool) -> dict[str, int]:
    """FLOPs of a training step of one layer's attention. `kernels`: a fused forward keeps no probabilities, so the
    target is a product of its own, and in warm-up the scores are made once more for their log-sum-exp; the plain torch
    form has both at hand."""
    part = work(model, length)
    again = ("sparse_target",) if kernels else ()
    warmup_again = ("warmup_target", "warmup_index_again") if kernels else ()
    counted = {
        "dense": ("dense_forward", "dense_backward"),
        "warmup": ("dense_forward", "warmup_index_loss", *warmup_again),
        "sparse": ("index", "sparse_forward", "sparse_backward", "sparse_index_loss", *again),
    }
    return {kind: sum(part[name] for name in names) for kind, names in counted.items()}


def first_length(cheaper: Callable[[int], bool], most: int = 2**20) -> int:
    """The shortest length from which on `cheaper` holds."""
    low, high = 1, most
    assert cheaper(high), "never cheaper"
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cheaper(middle) else (middle + 1, high)
    return low


def crossover(model: ModelConfig) -> dict[str, int]:
    """Where sparse becomes cheaper than dense, in the forward pass and in a training step."""

    def forward(length: int) -> bool:
        part = work(model, length)
        return part["index"] + part["sparse_forward"] < part["dense_forward"]

    def training(length: int) -> bool:
        total = totals(model, length, kernels=True)
        return total["sparse"] < total["dense"]

    return {"forward": first_length(forward), "training": first_length(training)}


def formula_row(model: ModelConfig, length: int) -> dict[str, Any]:
    """GFLOP per token and layer, part by part and in total."""
    per_token = 1e9 * length
    part, total = work(model, length), totals(model, length, kernels=True)
    return {
        "T": length,
        "gflop_per_token": {name: round(flops / per_token, 4) for name, flops in part.items()},
        "training": {kind: round(flops / per_token, 3) for kind, flops in total.items()},
        "dense_over_sparse": round(total["dense"] / total["sparse"], 2),
        "warmup_over_dense": round(total["warmup"] / total["dense"], 2),
        "index_share": round(part["index"] / total["sparse"], 3),
    }


def measured_row(model: ModelConfig, row: dict[str, Any]) -> dict[str, Any]:
    """One length of bench/results/layer.json: CPU seconds, GFLOP by the formula, and the rate that both give."""
    flops = totals(model, row["T"], kernels=False)
    seconds = {kind: row["cpu_seconds"][kind] for kind in KINDS}
    return {
        "T": row["T"],
        "seconds": seconds,
        "gflop": {kind: round(flops[kind] / 1e9, 3) for kind in KINDS},
        "gflop_per_second": {kind: round(flops[kind] / seconds[kind] / 1e9, 1) for kind in KINDS},
        "dense_over_sparse": round(seconds["dense"] / seconds["sparse"], 2),
        "dense_over_sparse_formula": round(flops["dense"] / flops["sparse"], 2),
        "warmup_over_dense": round(seconds["warmup"] / seconds["dense"], 2),
        "warmup_over_dense_formula": round(flops["warmup"] / flops["dense"], 2),
        "sparse_parts": row["sparse_parts"],
    }


def growths(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How time and formula grow from one length to the next, by kind."""
    found = {}
    for kind in KINDS:
        time, formula = (after[key][kind] / before[key][kind] for key in ("seconds", "gflop"))
        found[kind] = {"time": round(time, 2), "formula": round(formula, 2), "off": round(time / formula, 2)}
    return found


def measured_crossover(rows: list[dict[str, Any]]) -> int | None:
    """Where dense / sparse passes 1 on the straight line between two measured lengths, both axes logarithmic; None
    where sparse is the cheaper one from the first length on, or never."""
    for before, after in zip(rows, rows[1:], strict=False):
        low, high = (row["seconds"]["dense"] / row["seconds"]["sparse"] for row in (before, after))
        if low < 1 <= high:
            from math import log

            return round(before["T"] * (after["T"] / before["T"]) ** (-log(low) / log(high / low)))
    return None


@benchmark
def cost() -> dict[str, Any]:
    """FLOPs by formula beside what `layer` measured; writes docs/cost.md's tables and docs/cost.svg."""
    layer = json.loads((RESULTS / "layer.json").read_text())
    sizes = {"heads": HEADS, "latent": LATENT, "rope": ROPE, "nope": NOPE, "value": VALUE, "topk": TOPK}
    told = {name: layer["config"][name] for name in sizes}
    if told != sizes:
        raise ValueError(f"layer.json was measured at {told}, the code says {sizes}: run `python -m bench layer` first")
    rows = [measured_row(measured_sizes(), row) for row in layer["rows"]]
    growth = growths(rows[-2], rows[-1])
    published = v3_2()
    result = {
        "config": {"measured": asdict(measured_sizes()), "v3_2": asdict(published), "max_growth": MAX_GROWTH_ERROR},
        "measured_by": {key: layer[key] for key in ("command", "date", "commit", "device", "torch")},
        "rows": rows,
        "growth": growth,
        "crossover_measured": measured_crossover(rows),
        "v3_2": [formula_row(published, length) for length in LENGTHS],
        "v3_2_crossover": crossover(published),
        "passed": all(1 / MAX_GROWTH_ERROR <= one["off"] <= MAX_GROWTH_ERROR for one in growth.values()),
    }
    page = DOCS / "cost.md"
    page.write_text(with_generated(page.read_text(), generated(result)))
    (DOCS / "cost.svg").write_text(picture(result))
    return result


def size(length: int) -> str:
    return f"{length / 1024:.3g}K"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def with_generated(page: str, text: str) -> str:
    """The page with what stands between its two marks replaced."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + text + END + after


def generated(result: dict[str, Any]) -> str:
    """Every figure of docs/cost.md: two tables and what they say, from the benchmark's JSON alone."""
    return "\n".join(["", *_v3_2_text(result), *_measured_text(result)])


def _v3_2_text(result: dict[str, Any]) -> list[str]:
    head = [
        "T", "dense fwd / bwd", "indexer", "sparse fwd / bwd", "KL: target / indexer", "warm-up: target / indexer",
        "training: dense", "warm-up", "sparse", "dense / sparse",
    ]  # fmt: skip
    lines = []
    for row in result["v3_2"]:
        part, total = row["gflop_per_token"], row["training"]
        warmup_index = part["warmup_index_loss"] + part["warmup_index_again"]
        cells = [
            size(row["T"]),
            f"{part['dense_forward']:.2f} / {part['dense_backward']:.2f}",
            f"{part['index']:.3f}",
            f"{part['sparse_forward']:.2f} / {part['sparse_backward']:.2f}",
            f"{part['sparse_target']:.2f} / {part['sparse_index_loss']:.2f}",
            f"{part['warmup_target']:.2f} / {warmup_index:.2f}",
            *(f"{total[kind]:.2f}" for kind in KINDS),
            f"{row['dense_over_sparse']:.2f}",
        ]
        lines.append(cells)
    last, cross = result["v3_2"][-1], result["v3_2_crossover"]
    model = result["config"]["v3_2"]
    attended = model["kv_lora_rank"] * 2 + model["qk_rope_head_dim"]
    decompressed = model["qk_nope_head_dim"] + model["qk_rope_head_dim"] + model["v_head_dim"]
    return [
        "## DeepSeek-V3.2 by formula\n",
        "GFLOP per token and layer, averaged over a causal sequence of T tokens:\n",
        table(head, lines),
        f"**Where sparse becomes cheaper**: from T = {cross['forward']:,} in the forward pass and {cross['training']:,} in"
        " a training step. Below that, top-k",
        f"leaves out too little to pay for the absorbed form, which costs {attended / decompressed:.1f}x the decompressed"
        " one for every pair that it does read.\n",
        f"**What dominates**: the indexer is the only part of sparse that stays quadratic. At {size(last['T'])} it takes "
        f"{last['index_share']:.0%} of the",
        f"sparse step ({last['gflop_per_token']['index']:.2f} of {last['training']['sparse']:.2f} GFLOP), the backward "
        f"pass over the selection {last['gflop_per_token']['sparse_backward'] / last['training']['sparse']:.0%}; dense "
        f"costs {last['dense_over_sparse']}x as much.",
        f"A warm-up step costs {last['warmup_over_dense']} of a dense one at every length: it has no backward through the "
        "trunk.\n",
    ]


def _measured_text(result: dict[str, Any]) -> list[str]:
    rows, by = result["rows"], result["measured_by"]
    head = ["T"] + [f"{TITLES[kind]}: GFLOP, s, GFLOP/s" for kind in KINDS]
    head += ["dense / sparse: measured (formula)", "warm-up / dense: measured (formula)"]
    lines = []
    for row in rows:
        cells = [
            f"{row['gflop'][kind]:.1f}, {row['seconds'][kind]:.2f}, {row['gflop_per_second'][kind]:.0f}" for kind in KINDS
        ]
        for ratio in ("dense_over_sparse", "warmup_over_dense"):
            cells.append(f"{row[ratio]:.2f} ({row[ratio + '_formula']:.2f})")
        lines.append([size(row["T"]), *cells])
    last, before = rows[-1], rows[-2]
    spent = sum(last["sparse_parts"].values())
    shares = sorted(((value / spent, name) for name, value in last["sparse_parts"].items()), reverse=True)
    crossed = result["crossover_measured"]
    if crossed is not None:
        where = f"at about T = {crossed:,}, read off between the two measured lengths around it"
    elif rows[0]["dense_over_sparse"] >= 1:
        where = f"below the shortest length measured, {size(rows[0]['T'])}"
    else:
        where = f"at none of the lengths measured, up to {size(last['T'])}"
    grown = "; ".join(
        f"{TITLES[kind]} x{one['time']} in time, x{one['formula']} by the formula"
        for kind, one in result["growth"].items()
    )
    model = result["config"]["measured"]
    return [
        "## Measured on a CPU\n",
        f"One layer, {model['num_attention_heads']} heads, latent {model['kv_lora_rank']} + {model['qk_rope_head_dim']}, "
        f"indexer {model['index_n_heads']} x {model['index_head_dim']}, k = {model['index_topk']}, fp32, one thread of "
        f"{by['device'].split(',')[0]},",
        f"torch {by['torch']}, {by['date']} (`{by['command']}`); GFLOP over the whole sequence:\n",
        table(head, lines),
        f"**Where sparse becomes cheaper**: {where}.\n",
        f"**Growth** from {size(before['T'])} to {size(last['T'])}: {grown}.\n",
        f"**What dominates** the sparse layer at {size(last['T'])}: "
        + ", ".join(f"{name} {share:.0%}" for share, name in shares)
        + ".\n",
    ]


def picture(result: dict[str, Any]) -> str:
    """docs/cost.svg: V3.2 by formula; the measured layer, with the formula at the rate of its last length."""
    published, small, rows = v3_2(), measured_sizes(), result["rows"]
    fine = [round(2 ** (n / 4)) for n in range(4 * 12, 4 * 17 + 1)]
    first, last = rows[0]["T"], rows[-1]["T"]
    between = [round(first * 2 ** (n / 4)) for n in range(100) if first * 2 ** (n / 4) <= last * 1.001]
    formula, measured = [], []
    for kind in KINDS:
        line = [(t, totals(published, t, kernels=True)[kind] / t / 1e9) for t in fine]
        formula.append(Curve(TITLES[kind], line, []))
        rate = rows[-1]["gflop_per_second"][kind] * 1e9
        line = [(t, totals(small, t, kernels=False)[kind] / rate / t * 1e6) for t in between]
        points = [(row["T"], row["seconds"][kind] / row["T"] * 1e6) for row in rows]
        measured.append(Curve(TITLES[kind], line, points))
    cross = result["v3_2_crossover"]["training"]
    return draw(
        "Cost of a training step of one layer's attention, by length",
        [
            Panel("DeepSeek-V3.2, by formula", "GFLOP per token", formula, marks=[(cross, f"{size(cross)}")]),
            Panel("8 heads, k = 256, one CPU thread", "µs per token", measured, marks=[]),
        ],
    )
