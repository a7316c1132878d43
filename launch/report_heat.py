"""Heat maps for the report: one row a layer, one column a stretch of steps; darker is more.

All runs of a metric share one scale, so that their maps can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launch.report_charts import HEIGHT, LEFT, MOST_COLUMNS, RIGHT, TOP, WIDTH, linear_axis
from launch.report_html import text
from launch.report_names import number

LEGEND = 46  # pixels under the map: steps, then the colour scale
PALEST = 0.06  # opacity of the lowest value, so that it differs from no value


@dataclass(frozen=True)
class Shade:
    """Values -> opacity; logarithmic where they are positive and span more than a decade."""

    low: float
    high: float
    log: bool

    @classmethod
    def over(cls, values: list[float], log: bool) -> Shade:
        low, high = min(values), max(values)
        return cls(low, high, log and low > 0 and high / low > 12)

    def at(self, value: float) -> float:
        low, high, v = (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return PALEST + (1 - PALEST) * ((v - low) / (high - low) if high > low else 0.5)


def heat_map(title: str, layers: dict[int, list[tuple[int, float | None]]], shade: Shade) -> str:
    """`layers`: layer -> (step, value). One rectangle a layer and stretch of steps, its mean on hover."""
    steps = sorted({step for points in layers.values() for step, _ in points})
    columns = min(MOST_COLUMNS, len(steps))
    column_of = {step: i * columns // len(steps) for i, step in enumerate(steps)}
    first_of = {column: step for step, column in sorted(column_of.items(), reverse=True)}
    height = max(2.6, min(36.0, (HEIGHT - TOP - LEGEND) / len(layers)))
    width = (WIDTH - LEFT - RIGHT) / columns
    gap = 1 if height > 10 else 0
    out = []
    every = math.ceil(len(layers) / (HEIGHT / 15))
    for row, (layer, points) in enumerate(sorted(layers.items())):
        top = TOP + row * height
        if row % every == 0:
            label_at = top + height / 2 + 3.8
            out.append(f'<text class="tick" x="{LEFT - 7}" y="{label_at:.1f}" text-anchor="end">{layer}</text>')
        cells: dict[int, list[float]] = {}
        for step, value in points:
            if value is not None:
                cells.setdefault(column_of[step], []).append(value)
        for column, values in cells.items():
            mean = sum(values) / len(values)
            said = text(f"layer {layer}, step {first_of[column]}: {number(mean)}")
            left = LEFT + column * width
            box = f'x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height - gap:.2f}"'
            out.append(f'<rect {box} fill-opacity="{shade.at(mean):.2f}"><title>{said}</title></rect>')
    bottom = TOP + height * len(layers)
    total = bottom + LEGEND
    return (
        f'<svg class="heat" viewBox="0 0 {WIDTH} {total:.0f}" role="img" aria-label="{text(title)}">'
        f"{''.join(out)}{_steps(steps, bottom)}{_scale(shade, total)}</svg>"
    )


def _steps(steps: list[int], bottom: float) -> str:
    high = steps[-1] if steps[-1] > steps[0] else steps[0] + 1
    axis = linear_axis(steps[0], high, LEFT, WIDTH - RIGHT, 6, whole=True)
    y = f"{bottom + 15:.1f}"
    labels = [
        f'<text class="tick" x="{axis.at(value):.1f}" y="{y}" text-anchor="middle">{text(label)}</text>'
        for value, label in axis.ticks
    ]
    return "".join(labels) + f'<text class="name" x="{LEFT - 7}" y="{y}" text-anchor="end">layer</text>'


def _scale(shade: Shade, total: float) -> str:
    """low, a strip of eight shades, high; at the right end the word step."""
    y, low, high = f"{total - 7:.1f}", text(number(shade.low)), text(number(shade.high) + (" log" if shade.log else ""))
    strip = "".join(
        f'<rect x="{LEFT + 50 + 11 * i}" y="{total - 15:.1f}" width="11" height="9" '
        f'fill-opacity="{PALEST + (1 - PALEST) * i / 7:.2f}"/>'
        for i in range(8)
    )
    return (
        f'<text class="tick" x="{LEFT + 44}" y="{y}" text-anchor="end">{low}</text>{strip}'
        f'<text class="tick" x="{LEFT + 144}" y="{y}">{high}</text>'
        f'<text class="name" x="{WIDTH - RIGHT}" y="{y}" text-anchor="end">step</text>'
    )
