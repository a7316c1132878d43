"""Charts as inline SVG: lines over steps, values by layer, and heat maps of layers over steps. No script, no library.

Colours are CSS classes (`s0`..`s7` for the series), so that light and dark need no second drawing. Every chart takes a
`Panel`, which says what is drawn; text from outside goes through `report_html.text`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from launch.report_html import text
from launch.report_names import bytes_unit, number, quantity

WIDTH, HEIGHT = 380, 218  # a card is about this wide, so text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36
PLOT_W, PLOT_H = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
COLOURS = 8
MOST_POINTS, MOST_HOVERS, MOST_COLUMNS = 400, 30, 48
Point = tuple[float, float | None]


@dataclass
class Series:
    """One line: `colour` is the index of its run, so a run has one colour on the whole page."""

    name: str
    colour: int
    points: list[Point]

    def finite(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None]


@dataclass
class Panel:
    """What one chart shows; `share` bounds the y axis by 1, `markers` draws the points of a line."""

    key: str
    title: str
    series: list[Series]
    unit: str = ""
    log: bool = False
    share: bool = False
    x_label: str = "step"
    markers: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Axis:
    """Values -> pixels from `start` to `end`, with labelled ticks inside the range."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: list[tuple[float, str]]

    def at(self, value: float) -> float:
        clamped = min(max(value, self.low), self.high)
        bend = math.log if self.log else float
        share = (bend(clamped) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return self.start + share * (self.end - self.start)


def nice_step(span: float, about: int) -> float:
    """1, 2 or 5 times a power of ten, so that `span` holds about that many."""
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if raw <= m * power * 1.0001)


def _linear_ticks(low: float, high: float, about: int) -> list[float]:
    step = nice_step(high - low, about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _labels(ticks: list[float]) -> list[str]:
    """Tick labels with as many decimals as their distance needs, all alike."""
    if len(ticks) < 2:
        return [number(tick) for tick in ticks]
    step, largest = ticks[1] - ticks[0], max(abs(tick) for tick in ticks)
    if largest >= 1e4 or largest < 2e-3:
        exponent = math.log10(largest) + 1e-9
        power = math.floor(exponent) if largest < 1 else 3 * math.floor(exponent / 3)
        suffix = {3: "k", 6: "M", 9: "G", 12: "T"}.get(power, f"e{power}")
        scale = 10.0**power
        return [label + suffix if label.strip("0.") else "0" for label in _labels([t / scale for t in ticks])]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{decimals}f}" for tick in ticks]


def linear_axis(
    low: float, high: float, start: float, end: float, about: int, per: float = 1.0, whole: bool = False
) -> Axis:
    """`per` is the size of the unit that ticks are counted in; `whole` allows no fractions between ticks."""
    ticks = next(t for n in range(about, about + 6) if len(t := _linear_ticks(low / per, high / per, n)) > 2 or n > 8)
    if whole:
        ticks = [tick for tick in ticks if abs(tick - round(tick)) < 1e-9]
    labelled = [(tick * per, label) for tick, label in zip(ticks, _labels(ticks), strict=True)]
    return Axis(low, high, start, end, False, labelled)


def log_axis(low: float, high: float, start: float, end: float) -> Axis:
    """Ticks at decades, and at 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    few = math.log10(high / low) < 2.5
    skip = max(1, (last - first) // 6)
    ticks = [m * 10.0**p for p in range(first, last + 1, skip) for m in ((1, 2, 5) if few else (1,))]
    inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
    return Axis(low, high, start, end, True, [(tick, f"{tick:g}".replace("e-0", "e-")) for tick in inside])


def y_axis(panel: Panel) -> Axis:
    """Bounds with a little air; logarithmic where the panel asks for it and the values span more than a decade."""
    values = [y for series in panel.series for _, y in series.finite()]
    low, high = min(values), max(values)
    start, end = TOP + PLOT_H, TOP
    if panel.log and low > 0 and high / low > 12:
        return log_axis(low / 1.15, high * 1.15, start, end)
    if panel.share and low < -0.25 < high:  # a fresh indexer may be far worse than uniform: keep the rest readable
        low = -0.25
        panel.notes.append("values below −0.25 are cut off")
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 0.5
    floor, ceiling = low - pad, high + pad
    if low >= 0:
        floor = max(floor, 0.0) if low > 0.25 * high else 0.0
    if panel.share and high <= 1:
        ceiling = min(ceiling, 1.0) if high < 1 else 1.0
    floor = min(floor, ceiling - 1e-9 * max(1.0, abs(ceiling)))
    per = bytes_unit(max(abs(low), abs(high)))[0] if panel.unit == "bytes" else 1.0
    return linear_axis(floor, ceiling, start, end, 4, per)


def _thinned(points: list[Point]) -> list[Point]:
    """At most `MOST_POINTS`: means over equal runs of points."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    thin: list[Point] = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        finite = [y for _, y in part if y is not None]
        thin.append((part[len(part) // 2][0], sum(finite) / len(finite) if finite else None))
    return thin


def smoothed(points: list[Point]) -> list[Point] | None:
    """A centred moving average, or None where the line is short or smooth as it is (a schedule must not be blurred)."""
    values = [y for _, y in points if y is not None]
    if len(values) < 30:
        return None
    travelled = sum(abs(b - a) for a, b in zip(values, values[1:], strict=False))
    if travelled < 5 * (max(values) - min(values)):
        return None
    reach = max(2, len(points) // 30)
    smooth: list[Point] = []
    for i, (x, y) in enumerate(points):
        near = min(reach, i)  # symmetric at the steep start, cut short at the end
        window = [v for _, v in points[i - near : i + near + 1] if v is not None]
        smooth.append((x, sum(window) / len(window) if y is not None else None))
    return smooth


def _path(points: list[Point], x: Axis, y: Axis) -> str:
    """An SVG path that breaks where a value is missing."""
    parts, pen_down = [], False
    for px, py in points:
        if py is None:
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{x.at(px):.1f} {y.at(py):.1f}")
        pen_down = True
    return "".join(parts)


def _frame(x: Axis, y: Axis, x_label: str) -> list[str]:
    out = []
    for value, label in y.ticks:
        py = y.at(value)
        out.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 7}" y="{py + 3.8:.1f}" text-anchor="end">{text(label)}</text>')
    base = TOP + PLOT_H
    out.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    for value, label in x.ticks:
        px = x.at(value)
        out.append(f'<path class="axis" d="M{px:.1f} {base}v4"/>')
        out.append(f'<text class="tick" x="{px:.1f}" y="{base + 17}" text-anchor="middle">{text(label)}</text>')
    out.append(f'<text class="name" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{text(x_label)}</text>')
    return out


def _line(series: Series, panel: Panel, x: Axis, y: Axis, hovers: int) -> list[str]:
    points, tone = _thinned(series.points), f"s{series.colour % COLOURS}"
    dash = ' stroke-dasharray="6 4"' if series.colour >= COLOURS else ""
    smooth = None if panel.markers else smoothed(points)
    out = [f'<g class="{tone}">']
    if smooth:
        out.append(f'<path class="raw" d="{_path(points, x, y)}"/>')
    out.append(f'<path class="line" d="{_path(smooth or points, x, y)}"{dash}/>')
    finite = [(px, py) for px, py in points if py is not None]
    if panel.markers or len(finite) == 1:
        out += [f'<circle class="dot" cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3"/>' for px, py in finite]
    for px, py in finite[:: math.ceil(len(finite) / hovers)]:
        said = text(f"{series.name}, {panel.x_label} {px:g}: {quantity(panel.key, py)}")
        place = f'cx="{x.at(px):.1f}" cy="{y.at(py):.1f}"'
        out.append(f'<circle class="hover" {place} r="5"><title>{said}</title></circle>')
    lost = [px for px, value in series.points if value is None]
    out += [f'<path class="lost" d="M{x.at(px):.1f} {TOP + PLOT_H}v-6"/>' for px in lost[:MOST_POINTS]]
    out.append("</g>")
    return out


def line_chart(panel: Panel) -> str:
    """All series of the panel in one frame. At least one value must be finite."""
    steps = [px for series in panel.series for px, _ in series.points]
    low, high = min(steps), max(steps)
    pad = 0.5 if panel.markers or low == high else 0.0
    x = linear_axis(low - pad, high + pad, LEFT, WIDTH - RIGHT, 6, whole=True)
    y = y_axis(panel)
    hovers = max(8, MOST_HOVERS // len(panel.series))
    body = _frame(x, y, panel.x_label)
    for series in panel.series:
        body += _line(series, panel, x, y, hovers)
    said = text(f"{panel.title} over {panel.x_label}" + (", logarithmic" if y.log else ""))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">{"".join(body)}</svg>'
