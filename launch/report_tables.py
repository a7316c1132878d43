"""The tables and texts of the report: runs at a glance, the summary, evaluations, configurations, samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.report_charts import COLOURS
from launch.report_data import Run
from launch.report_html import swatch, table, text
from launch.report_names import HEADLINES, LAYER_KEY, metric, number, quantity

SAMPLE_FACTS = ("step", "domain", "reward", "advantage", "finish_reason", "tokens")  # in the line above a sample
SAMPLE_TEXTS = ("prompt", "text", "answer")  # in this order, then whatever else there is


def run_name(runs: list[Run], name: str) -> str:
    """The name behind its colour, where it is the name of a run on the page."""
    index = next((i for i, run in enumerate(runs) if run.name == name), None)
    return f"{swatch(index, COLOURS) if index is not None else ''}{text(name)}"


def label(key: str, with_key: bool = False) -> str:
    """A metric's label for a table, its unit (and key) small under it."""
    known = metric(key)
    under = [key] * (with_key and known.label != key) + [known.unit] * (known.unit not in ("", "bytes", "×"))
    return text(known.label) + (f"<small>{text(' · '.join(under))}</small>" if under else "")


def cell(key: str, value: Any) -> str:
    """A value, and a small meter under it where it is a share of one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else text(value)
    if not metric(key).share:
        return text(quantity(key, value))
    filled = 100 * min(1.0, max(0.0, value))
    return f'{value:.3f}<span class="meter"><i style="width:{filled:.0f}%"></i></span>'


def summary_table(runs: list[Run], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The caller's rows as they are, e.g. the demo's: row name -> metric -> value."""
    keys = list(dict.fromkeys(key for row in summary.values() for key in row))
    rows = [[run_name(runs, name), *(cell(key, row.get(key)) for key in keys)] for name, row in summary.items()]
    return table(["", *(label(key) for key in keys)], rows)


def runs_table(runs: list[Run]) -> str:
    """One line a run: what it was and how it ended."""
    rows = []
    for run in runs:
        seen = run.rows[-1].get("tokens")
        state = f'<span class="alarm">{run.state}</span>' if run.state in ("failed", "preempted") else run.state
        stage = text(run.config.get("stage", "–"))
        precision = text(run.config.get("precision.name", "–"))
        tokens = "–" if seen is None else number(seen)
        rows.append([run_name(runs, run.name), stage, precision, state, number(run.last_step), tokens])
    return table(["Run", "Stage", "Precision", "State", "Steps", "Tokens"], rows)


def _first_last_best(run: Run, key: str) -> tuple[float, float, float] | None:
    values = [value for _, value in run.series(key) if value is not None]
    if not values:
        return None
    return values[0], values[-1], min(values) if metric(key).better == "low" else max(values)


def glance_table(runs: list[Run]) -> str:
    """Headline metrics: the last value of each run large, first and best under it (best as the metric is meant)."""
    keys = [key for key in HEADLINES if any(_first_last_best(run, key) for run in runs)]
    if not keys:
        return ""
    rows = []
    for key in keys:
        row = [label(key, with_key=True)]
        for run in runs:
            found = _first_last_best(run, key)
            if found is None:
                row.append("<small>–</small>")
                continue
            first, last, best = (text(quantity(key, value)) for value in found)
            beside = f"<span>first {first}</span>" + (f" <span>best {best}</span>" if metric(key).better else "")
            row.append(f"<b>{last}</b><small>{beside}</small>")
        rows.append(row)
    return table(["Last value", *(run_name(runs, run.name) for run in runs)], rows)


def evaluation_table(runs: list[Run]) -> str:
    """`evaluation.json` of the runs that have one; per-layer values apart, folded."""
    having = [run for run in runs if run.evaluation]
    keys = list(dict.fromkeys(key for run in having for key in run.evaluation))
    parts = []
    for per_layer in (False, True):
        chosen = [key for key in keys if bool(LAYER_KEY.match(key)) == per_layer]
        rows = [[label(key, with_key=True), *(cell(key, run.evaluation.get(key)) for run in having)] for key in chosen]
        if rows:
            drawn = table(["Held-out", *(run_name(runs, run.name) for run in having)], rows)
            parts.append(f"<details><summary>By layer</summary>{drawn}</details>" if per_layer else drawn)
    return "".join(parts)


def config_table(runs: list[Run]) -> str:
    """All settings, folded; where several runs are compared, those that differ come first and stand out."""
    having = [run for run in runs if run.config]
    if not having:
        return ""
    keys = list(dict.fromkeys(key for run in having for key in run.config))
    differing = [key for key in keys if len({str(run.config.get(key)) for run in having}) > 1]
    ordered = differing + [key for key in keys if key not in differing]
    rows = [
        [f"<code>{text(key)}</code>", *(text("" if run.config.get(key) is None else run.config[key]) for run in having)]
        for key in ordered
    ]
    said = f"{len(keys)} settings" + (f", {len(differing)} of them differ" if len(having) > 1 else "")
    head = ["", *(run_name(runs, run.name) for run in having)]
    drawn = table(head, rows, "config", frozenset(range(len(differing))))
    return f"<details><summary>{said}</summary>{drawn}</details>"


def _sample(sample: dict[str, Any]) -> str:
    facts = [(key, sample[key]) for key in SAMPLE_FACTS if sample.get(key) is not None]
    parts = sample.get("reward_parts")
    if isinstance(parts, dict):
        facts += [(f"reward/{key}", value) for key, value in list(parts.items())[:8]]
    line = " ".join(f"<span>{text(key)} <b>{_short(value)}</b></span>" for key, value in facts)
    known = {*SAMPLE_FACTS, "reward_parts", "per_token"}
    rest = [key for key in sample if key not in known and key not in SAMPLE_TEXTS]
    shown = [(key, sample[key]) for key in (*SAMPLE_TEXTS, *rest) if sample.get(key) is not None]
    blocks = "".join(f"<dt>{text(key)}</dt><dd><pre>{text(value)}</pre></dd>" for key, value in shown[:12])
    return f"<article><p>{line}</p><dl>{blocks}</dl></article>"


def _short(value: Any) -> str:
    plain = isinstance(value, float) and abs(value) < 1e300
    return text(number(value) if plain else str(value)[:200])


def samples_of(runs: list[Run]) -> str:
    """The first and last samples of each run, as the model wrote them."""
    parts = []
    for run in runs:
        if run.samples:
            shown = "".join(_sample(sample) for sample in run.samples)
            said = f"{len(run.samples)} of {text(run.name)}: the first and the last"
            parts.append(f'<details open><summary>{said}</summary><div class="samples">{shown}</div></details>')
    return "".join(parts)
