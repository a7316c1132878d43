"""The evaluation page's drawings, as inline SVG: curves with bands over a logarithmic axis, and grids of shaded cells.

Colours are the classes of report.css (`s0`...), so light and dark need no second drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.report_charts import Axis, linear_axis, log_axis
from launch.report_html import card, text
from launch.report_names import number

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 38
CELL, LEGEND = 22, 52  # pixels: height of a row of cells; what lies under the grid
STRONGEST = 0.66  # opacity of the largest value: a number on it stays readable
PALEST = 0.05
MOST_LABELS, LABEL_WIDTH = 7, 34


@dataclass
class Line:
    """points: (x, y); band: (x, low, high), drawn under it. `dashed` tells a formula from a measurement."""

    name: str
    colour: int
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]] = field(default_factory=list)
    dashed: bool = False


@dataclass
class Curve:
    """A chart over tokens or k, x logarithmic. `limit`: a line that values should stay below, `mark`: (x, its name)."""

    title: str
    key: str
    lines: list[Line]
    x_label: str
    y_label: str
    zero: bool = False
    limit: tuple[float, str] | None = None
    mark: tuple[float, str] | None = None
    log_y: bool = False
    share: bool = False
    notes: list[str] = field(default_factory=list)


def tokens(value: float) -> str:
    """512, 2K, 128K, 1M: as context lengths are said; other numbers in full."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if value >= size and value % (size / 4) == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def token_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Logarithmic, with a tick at powers of two, or at the values themselves where they are few."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low / 2, high * 2
    ticks = sorted(set(values))
    powers = [2.0**p for p in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    if len(ticks) > MOST_LABELS and powers:
        ticks = powers[:: -math.ceil(len(powers) / MOST_LABELS)][::-1]  # the longest has a tick
    return Axis(low, high, start, end, True, [(tick, tokens(tick)) for tick in _apart(ticks, low, high, start, end)])


def _apart(ticks: Sequence[float], low: float, high: float, start: float, end: float) -> list[float]:
    """Ticks whose labels do not touch, the last one among them."""
    kept: list[float] = []
    last = math.inf  # pixels
    for tick in reversed(ticks):
        at = start + (end - start) * math.log(tick / low) / math.log(high / low)
        if last - at > LABEL_WIDTH:
            kept.append(tick)
            last = at
    return kept[::-1]


def _y_axis(curve: Curve) -> Axis:
    values = [y for line in curve.lines for _, y in line.points]
    values += [y for line in curve.lines for _, *bounds in line.band for y in bounds]
    values += [0.0] * curve.zero + ([curve.limit[0]] if curve.limit else [])
    low, high = min(values), max(values)
    start, end = HEIGHT - BOTTOM, TOP
    if curve.log_y and low > 0 and high / low > 12:
        return log_axis(low / 1.2, high * 1.2, start, end)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 0.5
    floor, ceiling = low - pad, high + pad
    if low >= 0 and (low < 0.25 * high or curve.share):
        floor = 0.0
    if curve.share:
        ceiling = 1.0
    return linear_axis(floor, ceiling, start, end, 4)


def curve_card(curve: Curve) -> str:
    """The chart in its card. At least one line has a point."""
    x = token_axis([x for line in curve.lines for x, _ in line.points], LEFT, WIDTH - RIGHT)
    y = _y_axis(curve)
    base, out = HEIGHT - BOTTOM, []
    for value, label in y.ticks:
        at = y.at(value)
        out.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 3.8:.1f}" text-anchor="end">{text(label)}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    for value, label in x.ticks:
        at = x.at(value)
        out.append(f'<path class="axis" d="M{at:.1f} {base}v4"/>')
        out.append(f'<text class="tick" x="{at:.1f}" y="{base + 17}" text-anchor="middle">{text(label)}</text>')
    out.append(
        f'<text class="name" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{text(curve.x_label)}</text>'
    )
    if curve.zero:
        out.append(f'<path class="zero" d="M{LEFT} {y.at(0):.1f}H{WIDTH - RIGHT}"/>')
    out += [part for line in curve.lines for part in _line(line, curve, x, y)]
    if curve.limit:
        at = y.at(curve.limit[0])
        out.append(f'<path class="limit" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="limit-name" x="{LEFT + 4}" y="{at - 4:.1f}">{text(curve.limit[1])}</text>')
    if curve.mark:
        at = x.at(curve.mark[0])
        left = at < (LEFT + WIDTH) / 2
        side, height = ("start", 5) if left else ("end", -5), base - 8 if curve.share else TOP + 10
        place = f'x="{at + side[1]:.1f}" y="{height}" text-anchor="{side[0]}"'
        out.append(f'<path class="mark" d="M{at:.1f} {TOP}V{base}"/>')
        out.append(f'<text class="mark-name" {place}>{text(curve.mark[1])}</text>')
    said = text(f"{curve.title}, {curve.y_label} over {curve.x_label}")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{"".join(out)}</svg>'
    legend = "".join(
        f'<li><i class="swatch s{line.colour}{" dashed" if line.dashed else ""}"></i>{text(line.name)}</li>'
        for line in curve.lines
    )
    logs = ", logarithmic" if y.log else ""
    return card(curve.title, f"{curve.key} · {curve.y_label}{logs}", drawing, legend, curve.notes)


def _line(line: Line, curve: Curve, x: Axis, y: Axis) -> list[str]:
    out = [f'<g class="s{line.colour}">']
    if len(line.band) > 1:
        there = [f"{x.at(px):.1f} {y.at(high):.1f}" for px, _, high in line.band]
        back = [f"{x.at(px):.1f} {y.at(low):.1f}" for px, low, _ in reversed(line.band)]
        out.append(f'<path class="band" d="M{"L".join([*there, *back])}Z"/>')
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    path = "L".join(f"{x.at(px):.1f} {y.at(py):.1f}" for px, py in line.points)
    out.append(f'<path class="line" d="M{path}"{dash}/>')
    bounds = {px: (low, high) for px, low, high in line.band}
    for px, py in line.points:
        place = f'cx="{x.at(px):.1f}" cy="{y.at(py):.1f}"'
        about = f" ({number(bounds[px][0])} to {number(bounds[px][1])})" if px in bounds else ""
        said = text(f"{line.name}, {curve.x_label} {px:,.0f}: {number(py)}{about}")
        if not line.dashed:
            out.append(f'<circle class="dot" {place} r="2.6"/>')
        out.append(f'<circle class="hover" {place} r="6"><title>{said}</title></circle>')
    return [*out, "</g>"]


@dataclass
class Grid:
    """values[row][column], None where there is none; rows from the top. `bounds`: the values of the palest and the
    strongest shade; `diverging`: from 0 both ways, less than 0 in another colour, bounds (-most, most)."""

    title: str
    key: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    row_label: str
    column_label: str
    bounds: tuple[float, float]
    colour: int = 0
    diverging: bool = False
    digits: int = 2

    def opacity(self, value: float) -> float:
        low, high = (0.0, self.bounds[1]) if self.diverging else self.bounds
        share = ((abs(value) if self.diverging else value) - low) / (high - low) if high > low else 0.5
        return PALEST + (STRONGEST - PALEST) * min(max(share, 0.0), 1.0)

    def shown(self, value: float) -> str:
        return f"{value:+.{self.digits}f}" if self.diverging and value else f"{value:.{self.digits}f}"


def grid_card(grid: Grid) -> str:
    """The map in its card, with the values in its cells where they fit."""
    wide = (WIDTH - LEFT - RIGHT) / max(len(grid.columns), 1)
    high = min(CELL, max(5.0, 420 / max(len(grid.rows), 1)))
    room = 5.8 * (grid.digits + (4 if grid.diverging else 3))
    labels_every = math.ceil(13 / high)
    columns_every = math.ceil(30 / wide)
    out = []
    for r, (label, values) in enumerate(zip(grid.rows, grid.values, strict=True)):
        top = TOP + r * high
        if r % labels_every == 0:
            at = f'x="{LEFT - 7}" y="{top + high / 2 + 3.8:.1f}" text-anchor="end"'
            out.append(f'<text class="tick" {at}>{text(label)}</text>')
        for c, value in enumerate(values):
            if value is None:
                continue
            left = LEFT + c * wide
            said = text(f"{grid.row_label} {label}, {grid.column_label} {grid.columns[c]}: {grid.shown(value)}")
            less = ' class="less"' if grid.diverging and value < 0 else ""
            box = f'x="{left:.1f}" y="{top:.1f}" width="{wide - 1:.1f}" height="{high - (high > 10):.1f}"'
            out.append(f'<rect{less} {box} fill-opacity="{grid.opacity(value):.2f}"><title>{said}</title></rect>')
            if wide >= room and high >= 13:
                at = f'x="{left + wide / 2:.1f}" y="{top + high / 2 + 3.4:.1f}" text-anchor="middle"'
                out.append(f'<text class="cell" {at}>{grid.shown(value)}</text>')
    bottom = TOP + high * len(grid.rows)
    for c in range(len(grid.columns) - 1, -1, -columns_every):
        at = f'x="{LEFT + (c + 0.5) * wide:.1f}" y="{bottom + 15:.1f}" text-anchor="middle"'
        out.append(f'<text class="tick" {at}>{text(grid.columns[c])}</text>')
    total = bottom + LEGEND
    name = f'y="{bottom + 31:.1f}"'
    out.append(f'<text class="name" x="{WIDTH - RIGHT}" {name} text-anchor="end">{text(grid.column_label)}</text>')
    out.append(f'<text class="name" x="{LEFT - 7}" {name} text-anchor="end">{text(grid.row_label)}</text>')
    out += _scale(grid, total)
    said = text(f"{grid.title}: {grid.row_label} by {grid.column_label}")
    svg = f'<svg class="heat" viewBox="0 0 {WIDTH} {total:.0f}" role="img" aria-label="{said}">{"".join(out)}</svg>'
    return card(grid.title, grid.key, f'<div class="s{grid.colour}">{svg}</div>')


def _scale(grid: Grid, total: float) -> list[str]:
    """low, a strip of shades, high."""
    low, high = grid.bounds
    y, out = total - 12, []
    steps = [low + (high - low) * i / 8 for i in range(9)]
    for i, value in enumerate(steps):
        less = ' class="less"' if grid.diverging and value < 0 else ""
        place = f'x="{LEFT + 60 + 11 * i}" y="{y - 9:.1f}" width="11" height="9"'
        out.append(f'<rect{less} {place} fill-opacity="{grid.opacity(value):.2f}"/>')
    ends = ((LEFT + 54, "end", low), (LEFT + 165, "start", high))
    for x, anchor, value in ends:
        out.append(f'<text class="tick" x="{x}" y="{y:.1f}" text-anchor="{anchor}">{text(grid.shown(value))}</text>')
    return out
