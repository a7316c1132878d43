"""docs/pipeline.svg: who runs what when, under each schedule, drawn from the tables of actions with F = I = W."""

from __future__ import annotations

from conf.validate_pipeline import PARTS
from train.parallel.schedules import Timed, bubble, simulate, table, unit_cost

LEFT, RIGHT, ROW, GAP, HEAD = 56, 16, 20, 34, 54
WIDTH = 1180
COLOURS = {  # pass -> the first and the second part of a floor
    "F": ("#9ec5f8", "#5b9bf0"),
    "B": ("#a8dcb5", "#5fb878"),
    "I": ("#f9d58c", "#f0b03f"),
    "W": ("#d9c8ef", "#b295dc"),
}
NAMES = {"F": "forward", "B": "backward", "I": "of inputs", "W": "of weights"}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600;font-size:14px}"
    ".pass{font-size:9px;text-anchor:middle}.floor{text-anchor:end}"
)


def picture(pp: int, micro_batches: int) -> str:
    """An SVG with a panel a schedule. A part takes its share of a floor's time, so the panels have one scale; in each
    pass stands its micro-batch, the darker ones are those of the floor's second part."""
    runs = {name: simulate(table(name, pp, micro_batches), unit_cost) for name in PARTS}
    longest = {name: max(each.end for mine in ranks for each in mine) / PARTS[name] for name, ranks in runs.items()}
    whole = (WIDTH - LEFT - RIGHT) / max(longest.values())  # pixels of a pass through all that a floor holds
    body = [f'<text class="title" x="{LEFT}" y="22">{pp} floors, {micro_batches} micro-batches, F = I = W</text>']
    for i, (kind, (light, _)) in enumerate(COLOURS.items()):
        x = LEFT + 380 + 110 * i
        body.append(f'<rect x="{x}" y="11" width="14" height="14" fill="{light}"/>')
        body.append(f'<text x="{x + 20}" y="22">{kind} {NAMES[kind]}</text>')
    top = HEAD
    for name, ranks in runs.items():
        scale = whole / PARTS[name]
        body.append(f'<text class="title" x="{LEFT}" y="{top}">{name}: idle {100 * bubble(ranks):.1f}%</text>')
        for floor, mine in enumerate(ranks):
            y = top + 8 + floor * ROW
            body.append(f'<text class="floor" x="{LEFT - 8}" y="{y + 13}">floor {floor}</text>')
            body += [_box(each, min(other.action.part for other in mine), y, scale) for each in mine]
        top += 8 + pp * ROW + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - 14}" width="{WIDTH}" height="{top - 14}">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{top - 14}" rx="8" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def _box(each: Timed, first: int, y: int, scale: float) -> str:
    x, width = LEFT + each.start * scale, (each.end - each.start) * scale
    colour = COLOURS[each.action.kind][each.action.part != first]
    label = f'<text class="pass" x="{x + width / 2:.1f}" y="{y + 12}">{each.action.micro_batch}</text>'
    return f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.8, 0.5):.1f}" height="{ROW - 3}" fill="{colour}"/>{label}'
