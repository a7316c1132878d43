"""The picture of what a token costs by its position: dense against sparse, prefill and decode, predicted and measured.

    python -m bench cost_curve && python launch/cost_curve.py [--out runs/cost_curve.html]

Draws bench/results/cost_curve.json (what stands there: bench/cost_curve.py; what it means: docs/cost.md) as one page
without scripts, for light and dark.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.report_charts import COLOURS, Panel, Series, line_chart  # noqa: E402  (needs the path above)
from launch.report_html import card, document, swatch, table, text  # noqa: E402

TITLE = "What a token costs by its position"
RESULT = ROOT / "bench" / "results" / "cost_curve.json"
KINDS = {"dense": 0, "sparse": 1}  # colours
PARTS = {  # of a token: name, colour of the bars
    "linear": ("attention's projections, dense MLP, shared expert", 7),
    "experts": ("routed experts", 3),
    "head": ("head", 6),
    "attention": ("core attention", 5),
    "index_linear": ("indexer's projections", 1),
    "index_scores": ("indexer's scores", 4),
    "topk": ("top-k", 2),
}
CSS = """
.grid-of { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.bar { fill: currentColor; }
tbody th { white-space: normal; min-width: 220px; }
ul.verdict { margin: 14px 0 0; padding-left: 20px; max-width: 80ch; }
"""


def chart(title: str, unit: str, series: Sequence[Series], x_label: str, note: str = "", markers: bool = False) -> str:
    """A chart with its title, unit and legend."""
    panel = Panel(title, title, list(series), x_label=x_label, markers=markers)
    return framed(title, unit, [(s.name, s.colour) for s in series], line_chart(panel), note)


def framed(title: str, unit: str, legend: Sequence[tuple[str, int]], drawing: str, note: str) -> str:
    named = "".join(f"<li>{swatch(colour, COLOURS)}{text(name)}</li>" for name, colour in legend)
    return card(title, unit, drawing, named, [note] if note else [])


def predicted(result: Mapping[str, Any], phase: str) -> str:
    rows = [row for row in result["rows"] if row["phase"] == phase]
    series = [
        Series(kind, colour, [(row["position"] / 1024, row[kind]["dollars"]) for row in rows])
        for kind, colour in KINDS.items()
    ]
    note = f"128K: sparse costs {rows[-1]['sparse_over_dense']:.0%} of dense."
    return chart(
        f"{phase.capitalize()}, predicted", "$ per million tokens", series, "position in the sequence, K tokens", note
    )


def measured(result: Mapping[str, Any], phase: str) -> str:
    rows = [row for row in result["cpu_rows"] if row["phase"] == phase]
    series = [
        Series(kind, colour, [(row["position"] / 1024, row[kind] / 1e3) for row in rows])
        for kind, colour in KINDS.items()
    ]
    last = rows[-1]
    note = f"{last['position'] / 1024:g}K: sparse takes {last['sparse_over_dense']:.0%} of dense."
    title = f"{phase.capitalize()}, measured on a CPU"
    return chart(title, "CPU milliseconds per token", series, "position in the sequence, K tokens", note, markers=True)


def kernels(result: Mapping[str, Any]) -> str:
    series = []
    for kind, colour in KINDS.items():
        for key, name, dashed in ((kind, "measured", 0), (f"{kind}_roofline", "roofline", COLOURS)):
            points = [(row["T"] / 1024, row[key]) for row in result["h100_rows"]]
            series.append(Series(f"{kind}, {name}", colour + dashed, points))
    note = (
        "Forward, mean over a causal sequence: cuDNN; indexer in FP8 with its top-k, then sparse attention, in Triton."
    )
    title = "One layer's attention, measured on an H100"
    return chart(title, "GPU microseconds per token", series, "sequence length T, K tokens", note, markers=True)


def parts(result: Mapping[str, Any]) -> str:
    """Stacked bars: where the GPU time of a token at 128K goes."""
    last = {row["phase"]: row for row in result["rows"]}  # rows go up in position
    bars = [(f"{phase}, {kind}", last[phase][kind]) for phase in last for kind in KINDS]
    longest = max(bar["dollars"] for _, bar in bars)
    width, left, height = 380, 92, 218
    wide = width - left - 48
    out = []
    for i, (name, bar) in enumerate(bars):
        y, x, whole = 16 + i * 50, float(left), sum(bar["us"].values())
        out.append(f'<text x="{left - 8}" y="{y + 18}" text-anchor="end">{text(name)}</text>')
        for part, (said, colour) in PARTS.items():
            share = bar["us"][part] / whole * bar["dollars"]
            drawn = share / longest * wide
            if drawn > 0:
                told = f"<title>{text(f'{name}: {said} ${share:.3f}')}</title>"
                place = f'x="{x:.1f}" y="{y}" width="{drawn:.1f}" height="28"'
                out.append(f'<g class="s{colour}"><rect class="bar" {place}>{told}</rect></g>')
            x += drawn
        out.append(f'<text x="{x + 6:.1f}" y="{y + 18}">${bar["dollars"]:.2f}</text>')
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="cost at 128K by part">{"".join(out)}</svg>'
    seen = [(name, colour) for key, (name, colour) in PARTS.items() if any(bar["us"][key] > 0 for _, bar in bars)]
    return framed("At 128K by part, predicted", "$ per million tokens", seen, drawing, "")


def assumptions(result: Mapping[str, Any]) -> str:
    """The ratio at 128K when an assumption is another."""
    rows = []
    for case in result["scenarios"]:
        cells = [text(case["name"])]
        for phase in ("prefill", "decode"):
            found = case[phase]
            cells += [f"${found['dense']:.2f}", f"${found['sparse']:.2f}", f"{1 - found['ratio']:.0%}"]
        rows.append(cells)
    heads = [f"{phase}, {what}" for phase in ("prefill", "decode") for what in ("dense", "sparse", "saved")]
    return table(["at 128K, $ per million tokens", *heads], rows)


def page(result: Mapping[str, Any]) -> str:
    gpu, cpu = result["config"]["cluster"]["gpu"], result["config"]["cpu_model"]
    figures = [
        *(predicted(result, phase) for phase in ("prefill", "decode")),
        *(measured(result, phase) for phase in ("prefill", "decode")),
        parts(result),
        kernels(result),
    ]
    lead = (
        f"Predicted: DeepSeek-V3.2 on {gpu['name']} at ${gpu['dollars_per_hour']:g} a GPU-hour, from FLOPs and bytes."
        f" Measured on a CPU: {cpu['num_hidden_layers']} layers, {cpu['num_attention_heads']} heads,"
        f" k = {cpu['index_topk']:,}, one thread ({result['device']}). Measured on a GPU: {result['h100']['device']}."
    )
    said = "".join(f"<li>{text(line)}</li>" for line in result["verdict"])
    body = (
        f'<header><p class="brand">Winnow</p><h1>{TITLE}</h1><p class="lead">{text(lead)}</p></header>'
        f'<div class="grid-of">{"".join(figures)}</div>'
        f'<ul class="verdict">{said}</ul>{assumptions(result)}'
        f"<footer>{text(result['command'])} · commit {text(result['commit'][:10])} · {text(result['date'])}</footer>"
    )
    return document(TITLE, body, CSS)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cost_curve.html"))
    parser.add_argument("--result", type=Path, default=RESULT, help="another machine's cost_curve.json")
    options = parser.parse_args(argv)
    if not options.result.is_file():
        parser.error(f"--result {options.result} is no file: python -m bench cost_curve writes one")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(json.loads(options.result.read_text(encoding="utf-8"))), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
