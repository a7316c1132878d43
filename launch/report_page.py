"""The report's page: header, tables, one section a family of metrics, configuration and samples.

A metric that several runs logged is one chart with a line a run, in the run's colour. Per-layer metrics
(`indexer/layer_03/kl`) become a profile over depth at the last step and a heat map a run, metrics by domain
(`domain/math/accuracy`) a chart a run with a line a domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launch.report_charts import COLOURS, Panel, Series, line_chart
from launch.report_data import Run
from launch.report_heat import Shade, heat_map
from launch.report_html import document, section, swatch, text
from launch.report_names import DOMAIN_KEY, LAYER_KEY, METRICS, SECTIONS, bytes_unit, metric, quantity, section_of
from launch.report_tables import config_table, evaluation_table, glance_table, runs_table, samples_of, summary_table

NEW_ROW = ""
LayerValues = dict[int, list[tuple[int, float | None]]]  # layer -> (step, value)


def figure(panel: Panel, drawing: str, legend: bool) -> str:
    """A chart in its card: title, unit, key, and a legend with the last values where there are several lines."""
    lasts = [(series, series.finite()) for series in panel.series]
    unit = panel.unit
    if unit == "bytes":
        unit = bytes_unit(max((abs(y) for _, finite in lasts for _, y in finite), default=0.0))[1]
    under = f"{panel.key} · {unit}" if unit else panel.key
    now = ""
    if not legend and lasts and lasts[0][1] and not panel.markers:
        now = f'<span class="now">{text(quantity(panel.key, lasts[0][1][-1][1]))}</span>'
    items = "".join(
        f"<li>{swatch(series.colour, COLOURS)}{text(series.name)}"
        + (f" <b>{text(quantity(panel.key, finite[-1][1]))}</b>" if finite and not panel.markers else "")
        + "</li>"
        for series, finite in lasts
    )
    lost = sum(y is None for series in panel.series for _, y in series.points)
    notes = [*panel.notes, f"{lost} step{'s' * (lost > 1)} without a finite value, marked red"] if lost else panel.notes
    return (
        f"<figure><figcaption><b>{text(panel.title)}</b>{now}"
        f'<span class="key">{text(under)}</span></figcaption>'
        f"{f'<ul class=legend>{items}</ul>' if legend else ''}{drawing}"
        f"{''.join(f'<p class=notes>{text(note)}</p>' for note in notes)}</figure>"
    )


def metric_figure(runs: list[Run], key: str) -> str:
    """One metric over steps, a line a run; nothing but a note where no run has a finite value."""
    known = metric(key)
    series = [Series(run.name, i, list(run.series(key))) for i, run in enumerate(runs) if key in run.keys()]
    title = known.label if key in METRICS else key.split("/", 1)[-1]
    panel = Panel(key, title, series, known.unit, known.log, known.share)
    if not any(one.finite() for one in series):
        return figure(panel, '<p class="notes">no step has a finite value</p>', legend=False)
    panel.series = [one for one in series if one.finite()]
    return figure(panel, line_chart(panel), legend=len(runs) > 1)


def layer_values(run: Run, group: str, name: str) -> LayerValues:
    """The finite or missing values of one per-layer metric."""
    found: LayerValues = {}
    for key in run.keys():
        match = LAYER_KEY.match(key)
        if match and match["group"] == group and match["name"] == name:
            found[int(match["layer"])] = run.series(key)
    return {layer: points for layer, points in found.items() if any(value is not None for _, value in points)}


def layer_figures(runs: list[Run], group: str, name: str) -> list[str]:
    """The profile over depth, then one heat map a run, all on one scale."""
    by_run = {i: values for i, run in enumerate(runs) if (values := layer_values(run, group, name))}
    if not by_run:
        return []
    known, key = metric(name), f"{group}/layer_*/{name}"
    profiles = []
    for i, values in by_run.items():
        last = {layer: [v for _, v in points if v is not None][-1] for layer, points in values.items()}
        profiles.append(Series(runs[i].name, i, [(layer, last[layer]) for layer in sorted(last)]))
    unit, log, share = known.unit, known.log, known.share
    profile = Panel(key, f"{known.label} by layer, last step", profiles, unit, log, share, "layer", markers=True)
    drawn = [figure(profile, line_chart(profile), legend=len(runs) > 1)]
    every = [v for values in by_run.values() for points in values.values() for _, v in points if v is not None]
    shade = Shade.over(every, log)
    for i, values in by_run.items():
        if len({step for points in values.values() for step, _ in points}) < 2:
            continue  # one step is what the profile shows
        title = f"{known.label} by layer"
        panel = Panel(key, title, [Series(runs[i].name, i, [])], unit)
        drawing = f'<div class="s{i % COLOURS}">{heat_map(title, values, shade)}</div>'
        drawn.append(figure(panel, drawing, legend=len(runs) > 1))
    return drawn


def domain_figures(runs: list[Run], group: str, name: str) -> list[str]:
    """One chart a run, with a line for each of its domains."""
    drawn, known = [], metric(name)  # the name alone: the lines say which domain
    for run in runs:
        keys = sorted(run.keys() - run.evaluation.keys())  # the table of evaluations has the others
        matches = [match for key in keys if (match := DOMAIN_KEY.match(key))]
        found = [match for match in matches if (match["group"], match["name"]) == (group, name)]
        lines = [Series(match["domain"], i, list(run.series(match.string))) for i, match in enumerate(found)]
        if any(line.finite() for line in lines):
            title = f"{known.label} by domain" + (f", {run.name}" if len(runs) > 1 else "")
            panel = Panel(f"{group}/*/{name}", title, lines, known.unit, known.log, known.share)
            drawn.append(figure(panel, line_chart(panel), legend=True))
    return drawn


def grids(figures: list[str]) -> str:
    """Cards side by side, as many as fit; a new grid from every NEW_ROW on."""
    rows: list[list[str]] = [[]]
    for drawn in figures:
        if drawn == NEW_ROW:
            rows.append([])
        else:
            rows[-1].append(drawn)
    return "".join(f'<div class="grid-of">{"".join(row)}</div>' for row in rows if row)


def section_bodies(runs: list[Run]) -> dict[str, str]:
    """Prefix of a section -> its figures; known metrics in the order of METRICS, then the others by name."""
    known = {key: i for i, key in enumerate(METRICS)}
    cards: dict[str, list[str]] = {}
    layered: dict[tuple[str, str], None] = {}
    by_domain: dict[tuple[str, str], None] = {}
    for key in sorted({key for run in runs for key in run.keys()}, key=lambda k: (known.get(k, len(known)), k)):
        match = LAYER_KEY.match(key)
        if match is not None:
            layered[match["group"], match["name"]] = None
        elif (match := DOMAIN_KEY.match(key)) is not None:
            by_domain[match["group"], match["name"]] = None
        elif not all(key in run.evaluation for run in runs if key in run.keys()):  # the table of evaluations has it
            cards.setdefault(section_of(key), []).append(metric_figure(runs, key))
    for group, name in sorted(layered, key=lambda pair: (known.get(pair[1], len(known)), pair)):
        drawn = layer_figures(runs, group, name)
        # Of several runs each metric gets rows of its own, so that their maps stand side by side.
        cards.setdefault(section_of(f"{group}/"), []).extend(drawn if len(runs) == 1 else [NEW_ROW, *drawn])
    for group, name in sorted(by_domain, key=lambda pair: (known.get(pair[1], len(known)), pair)):
        cards.setdefault(section_of(f"{group}/"), []).extend(domain_figures(runs, group, name))
    return {prefix: grids(figures) for prefix, figures in cards.items()}


def header(runs: list[Run], anchors: list[tuple[str, str]]) -> str:
    """Title, what is compared, links to the sections, and what went wrong."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"
    stages = [str(run.config["stage"]) for run in runs if "stage" in run.config]
    lead = " · ".join(dict.fromkeys(stages)) if stages else ""
    links = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name in anchors)
    alarms = "".join(f'<p class="alarm">{text(run.name)}: {text(run.error)}</p>' for run in runs if run.error)
    alarms += "".join(f'<p class="alarm">{text(run.name)}, {text(said)}</p>' for run in runs for said in run.alerts)
    notes = "".join(f'<p class="notes">{text(run.name)}: {text(note)}</p>' for run in runs for note in run.notes)
    return (
        f'<header><p class="brand">Winnow</p><h1>{text(title)}</h1><p class="lead">{text(lead)}</p>'
        f"<nav>{links}</nav>{alarms}{notes}</header>"
    )


def viewer_hint(runs: list[Run], viewer: str | None) -> str:
    """Where all samples can be read: the page beside this one, or the command that writes it."""
    if viewer is not None:
        return f'<p class="notes"><a href="{text(viewer)}">All samples, token by token</a></p>'
    folders = " ".join(str(run.folder) for run in runs if run.samples)
    return f'<p class="notes">All of them, token by token: <code>python launch/samples.py {text(folders)}</code></p>'


def page(runs: list[Run], summary: Mapping[str, Mapping[str, Any]] | None = None, viewer: str | None = None) -> str:
    """The whole document as a string. `summary`: rows of an opening table, e.g. the demo's checkpoints; `viewer`: the
    sample viewer's file, where there is one beside this page."""
    bodies = section_bodies(runs)
    chapters = [
        ("summary", "Summary", "Each checkpoint on held-out data.", summary_table(runs, summary) if summary else ""),
        ("runs", "Runs", "", runs_table(runs) + glance_table(runs)),
        ("evaluation", "Evaluation", "Measured on held-out documents and tasks.", evaluation_table(runs)),
    ]
    for prefix, title, lead in SECTIONS:
        chapters.append((prefix.rstrip("/") or "other", title, lead, bodies.get(prefix, "")))
    written = "Text as the model wrote it; hidden characters are made visible."
    shown_samples = samples_of(runs)
    hint = viewer_hint(runs, viewer) if shown_samples else ""
    chapters.append(("samples", "Samples", written, shown_samples and hint + shown_samples))
    chapters.append(("config", "Configuration", "", config_table(runs)))
    shown = [chapter for chapter in chapters if chapter[3]]
    parts = [header(runs, [(anchor, title) for anchor, title, _, _ in shown])]
    parts += [section(*chapter) for chapter in shown]
    parts.append("<footer>Thin lines are the values as logged, bold ones a centred moving average.</footer>")
    return document(runs[0].name if len(runs) == 1 else "Report", "\n".join(parts))
