"""The cost of dense, warm-up and sparse attention by length: formula beside measurement.

`work` counts the multiplications of one layer's attention, from the READMEs under model/ops; 1 multiply-add is 2 FLOP.
The benchmark puts it beside what `python -m bench layer` measured, adds DeepSeek-V3.2's own sizes, which no machine
here can hold, by formula alone, and writes the generated half of docs/cost.md and its picture. It measures nothing
itself; its promise is that the formula explains how the measured time grows.

    python -m bench layer cost
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any
from xml.sax.saxutils import escape

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
            share = -math.log(low) / math.log(high / low)
            return round(before["T"] * (after["T"] / before["T"]) ** share)
    return None


@benchmark
def cost() -> dict[str, Any]:
    """FLOPs by formula beside what `layer` measured; writes docs/cost.md's tables and docs/cost.svg."""
    layer = json.loads((RESULTS / "layer.json").read_text())
    sizes = {
        "heads": HEADS, "latent": LATENT, "rope": ROPE, "nope": NOPE, "value": VALUE,
        "index_heads": INDEX_HEADS, "index_dim": INDEX_DIM, "topk": TOPK,
    }  # fmt: skip
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
    last, cross, model = result["v3_2"][-1], result["v3_2_crossover"], result["config"]["v3_2"]
    part, step = last["gflop_per_token"], last["training"]["sparse"]
    absorbed = part["absorbed_forward"] / part["dense_forward"]
    return [
        "## DeepSeek-V3.2 by formula\n",
        f"{model['num_attention_heads']} heads, latent {model['kv_lora_rank']} + {model['qk_rope_head_dim']}, indexer "
        f"{model['index_n_heads']} x {model['index_head_dim']}, k = {model['index_topk']:,}. GFLOP per token and "
        "layer, averaged over a causal sequence:\n",
        table(head, lines),
        f"**Where sparse becomes cheaper**: from T = {cross['forward']:,} in the forward pass and "
        f"{cross['training']:,} in a training step. Below that, too little is\nleft out to pay for the "
        f"absorbed form, which costs {absorbed:.1f}x the decompressed one for every pair that it reads.\n",
        "**What dominates**: the indexer's scores are the only part of sparse that stays quadratic. At "
        f"{size(last['T'])} they are {last['index_share']:.0%} of the sparse step\n({part['index']:.2f} of {step:.2f} "
        f"GFLOP); the backward pass over the selection is {part['sparse_backward'] / step:.0%}. Dense costs "
        f"{last['dense_over_sparse']}x as much, and a warm-up step\n{last['warmup_over_dense']} of a dense one, "
        "at every length: the trunk has no backward.\n",
    ]


def _measured_text(result: dict[str, Any]) -> list[str]:
    rows, by = result["rows"], result["measured_by"]
    head = ["T"] + [f"{TITLES[kind]}: GFLOP, s, GFLOP/s" for kind in KINDS]
    head += ["dense / sparse (formula)", "warm-up / dense (formula)"]
    lines = []
    for row in rows:
        cells = [
            f"{row['gflop'][kind]:.1f}, {row['seconds'][kind]:.2f}, {row['gflop_per_second'][kind]:.0f}"
            for kind in KINDS
        ]
        for ratio in ("dense_over_sparse", "warmup_over_dense"):
            cells.append(f"{row[ratio]:.2f} ({row[ratio + '_formula']:.2f})")
        lines.append([size(row["T"]), *cells])
    last, before = rows[-1], rows[-2]
    spent = sum(last["sparse_parts"].values())
    shares = sorted(((value / spent, name) for name, value in last["sparse_parts"].items()), reverse=True)
    crossed = result["crossover_measured"]
    if crossed is not None:
        where = f"at about T = {round(crossed, -2):,}, read off between the two measured lengths around it"
    elif rows[0]["dense_over_sparse"] >= 1:
        where = f"below the shortest length measured, {size(rows[0]['T'])}"
    else:
        where = f"at none of the lengths measured, up to {size(last['T'])}"
    grown = ", ".join(
        f"{TITLES[kind]} {one['time']}x in time and {one['formula']}x in FLOP" for kind, one in result["growth"].items()
    )
    dominant = ", ".join(f"{name} {share:.0%}" for share, name in shares)
    model, rate = result["config"]["measured"], last["gflop_per_second"]
    return [
        "## Measured on a CPU\n",
        f"One layer, {model['num_attention_heads']} heads, latent {model['kv_lora_rank']} + "
        f"{model['qk_rope_head_dim']}, indexer {model['index_n_heads']} x {model['index_head_dim']}, k = "
        f"{model['index_topk']}, fp32, one thread ({by['device']}; torch {by['torch']}; {by['date']},\n"
        f"`{by['command']}`). GFLOP over the whole sequence by the formula, CPU seconds measured, GFLOP/s from both:\n",
        table(head, lines),
        f"**Where sparse becomes cheaper**: {where}.\n",
        f"**Growth** from {size(before['T'])} to {size(last['T'])}: {grown}.\n",
        f"**What dominates** the sparse layer at {size(last['T'])}: {dominant}.\nIt runs at {rate['sparse']:.0f} "
        f"GFLOP/s where dense reaches {rate['dense']:.0f}: every query has keys of its own, so a product is "
        f"{model['num_attention_heads']} rows high, one a\nhead; rows are gathered and scattered; the top-k counts "
        f"no FLOP at all. So it wins by {last['dense_over_sparse']}x where the formula alone says "
        f"{last['dense_over_sparse_formula']}x.\n",
    ]


# The picture: two panels side by side, both axes logarithmic. launch's charts are out of bench's reach.
COLOURS = {"dense": "#2563eb", "warmup": "#d97706", "sparse": "#15803d"}
PANEL_W, PANEL_H, LEFT, TOP, GAP = 340, 260, 58, 88, 80
WIDTH, HEIGHT = LEFT + 2 * PANEL_W + GAP + 24, TOP + PANEL_H + 84
STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#475569}"
    ".title{font-size:16px;font-weight:600;fill:#0f172a}.head{font-size:13px;font-weight:600;fill:#0f172a}"
    ".grid{stroke:#e2e8f0}.axis{stroke:#94a3b8}.mark{stroke:#64748b;stroke-dasharray:3 3}"
    ".curve{fill:none;stroke-width:2}"
)
Points = Sequence[tuple[float, float]]


def _text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def panel(
    left: float, title: str, unit: str, lines: Mapping[str, Points], dots: Mapping[str, Points], mark: int | None
) -> str:
    """One frame: a line and dots for every kind over T; `mark`: a length that is pointed out."""
    every = [point for curves in (lines, dots) for points in curves.values() for point in points]
    (x_low, x_high), (lowest, highest) = ((min(values), max(values)) for values in zip(*every, strict=True))
    y_low, y_high = lowest / 1.25, highest * 1.25

    def x_at(value: float) -> float:
        return left + PANEL_W * math.log(value / x_low) / math.log(x_high / x_low)

    def y_at(value: float) -> float:
        return TOP + PANEL_H * math.log(y_high / value) / math.log(y_high / y_low)

    base, out = TOP + PANEL_H, [_text(left, TOP - 14, f"{title}: {unit} per token", "head")]
    decades = range(math.floor(math.log10(y_low)), math.ceil(math.log10(y_high)))
    for tick in (m * 10.0**p for p in decades for m in (1, 2, 5)):
        if y_low <= tick <= y_high:
            out.append(f'<path class="grid" d="M{left} {y_at(tick):.1f}h{PANEL_W}"/>')
            out.append(_text(left - 8, y_at(tick) + 4, f"{tick:g}", anchor="end"))
    for power in range(math.ceil(math.log2(x_low)), math.floor(math.log2(x_high)) + 1):
        out.append(f'<path class="axis" d="M{x_at(2**power):.1f} {base}v5"/>')
        out.append(_text(x_at(2**power), base + 20, size(2**power), anchor="middle"))
    out.append(f'<path class="axis" d="M{left} {base}h{PANEL_W}"/>')
    out.append(_text(left + PANEL_W / 2, base + 40, "T, tokens in the sequence", anchor="middle"))
    if mark is not None:
        out.append(f'<path class="mark" d="M{x_at(mark):.1f} {TOP}V{base}"/>')
        out.append(_text(x_at(mark) + 6, base - 10, f"sparse below dense from {size(mark)}"))
    for kind, points in lines.items():
        path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points)
        out.append(f'<path class="curve" stroke="{COLOURS[kind]}" d="M{path}"/>')
    for kind, points in dots.items():
        place = [f'cx="{x_at(x):.1f}" cy="{y_at(y):.1f}"' for x, y in points]
        out += [f'<circle {at} r="4.5" fill="{COLOURS[kind]}" stroke="#fff" stroke-width="1.5"/>' for at in place]
    return "".join(out)


def picture(result: dict[str, Any]) -> str:
    """docs/cost.svg: V3.2 by formula; the measured layer, with the formula at the rate of its last length."""
    published, small, rows = v3_2(), measured_sizes(), result["rows"]
    first, last = rows[0]["T"], rows[-1]["T"]
    fine = [2 ** (n / 8) for n in range(8 * 20)]
    wide = [round(t) for t in fine if LENGTHS[0] <= t <= LENGTHS[-1]]
    narrow = [round(t) for t in fine if first <= t <= last]
    rate = {kind: rows[-1]["gflop_per_second"][kind] * 1e9 for kind in KINDS}
    formula = {kind: [(t, totals(published, t, True)[kind] / t / 1e9) for t in wide] for kind in KINDS}
    expected = {kind: [(t, totals(small, t, False)[kind] / rate[kind] / t * 1e6) for t in narrow] for kind in KINDS}
    measured = {kind: [(row["T"], row["seconds"][kind] / row["T"] * 1e6) for row in rows] for kind in KINDS}
    right = LEFT + PANEL_W + GAP
    body = [_text(LEFT, 26, "Attention of one layer, one training step: cost per token by sequence length", "title")]
    for i, kind in enumerate(KINDS):
        body.append(f'<path class="curve" stroke="{COLOURS[kind]}" d="M{LEFT + 100 * i} 46h22"/>')
        body.append(_text(LEFT + 100 * i + 29, 50, TITLES[kind]))
    body.append(panel(LEFT, "DeepSeek-V3.2", "GFLOP", formula, {}, result["v3_2_crossover"]["training"]))
    heads, k = small.num_attention_heads, small.index_topk
    body.append(panel(right, f"{heads} heads, k = {k}, one CPU thread", "µs", expected, measured, None))
    body.append(_text(LEFT, HEIGHT - 12, "lines: formula", anchor="start"))
    body.append(_text(right, HEIGHT - 12, f"dots: measured; lines: formula at the rate of {size(last)}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>{"".join(body)}</svg>\n'
    )
