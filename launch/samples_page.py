"""The sample viewer's page: a frame, the samples as data, samples.js, which lists, filters and sorts them, and
samples_flow.js, which draws one with its tokens coloured.

Only what is on the screen is drawn. The script puts text into the page as text, never as HTML, and the page's content
policy lets no other script run.
"""

from __future__ import annotations

from launch.report_html import asset, document, json_block, policy_for, text, visible
from launch.samples_data import Samples

FILE_NAME = "samples.html"
SCRIPT = asset("samples_flow.js") + asset("samples.js")
POLICY = policy_for(SCRIPT)

SORTS = {
    "step": "step",
    "reward": "reward",
    "advantage": "advantage",
    "tokens": "length",
    "num_calls": "calls",
    "max_log_ratio": "largest |log ratio|",
    "off_policy_kl": "d of eq. 9",
}


def _select(name: str, label: str, options: dict[str, str]) -> str:
    inside = "".join(f'<option value="{text(value)}">{text(shown)}</option>' for value, shown in options.items())
    return f'<label>{label}<select id="{name}">{inside}</select></label>'


def _range(name: str, label: str) -> str:
    ends = "".join(
        f'<input id="{name}_{end}" type="number" step="any" placeholder="{end}" aria-label="{label} {end}">'
        for end in ("min", "max")
    )
    return f"<label>{label}<span>{ends}</span></label>"


def _controls(samples: Samples) -> str:
    values = {
        name: sorted({row[name] for row in samples.rows if row[name]}) for name in ("domain", "env", "finish_reason")
    }
    choices = {name: {"": "all"} | {value: value for value in found} for name, found in values.items()}
    runs = {str(i): name for i, name in enumerate(samples.names)}
    return (
        '<div class="controls">'
        + (_select("run", "run", {"": "all"} | runs) if len(runs) > 1 else "")
        + _range("step", "step")
        + _select("domain", "domain", choices["domain"])
        + (_select("env", "environment", choices["env"]) if values["env"] else "")
        + _select("finish_reason", "ended by", choices["finish_reason"])
        + _range("reward", "reward")
        + '<label>text<input id="search" type="search" placeholder="in all its texts"></label>'
        + _select("sort", "sort by", SORTS)
        + _select("order", "order", {"down": "largest first", "up": "smallest first"})
        + '<label class="tick"><input id="grouped" type="checkbox"> by prompt</label>'
        + "</div>"
    )


def page(samples: Samples, report: str | None = None) -> str:
    """The whole document as a string. `report`: the report's file, where there is one beside this page."""
    title = f"Samples of {samples.names[0]}" if len(samples.names) == 1 else f"Samples of {len(samples.names)} runs"
    link = f'<p class="notes"><a href="{text(report)}">Report of the run</a></p>' if report else ""
    notes = "".join(f'<p class="notes">{text(note)}</p>' for note in samples.notes)
    body = (
        f'<header><p class="brand">Winnow</p><h1>{text(title)}</h1>'
        f'<p class="lead" id="count" aria-live="polite">{len(samples.rows)} samples</p>{link}{notes}</header>'
        "<noscript><p>This page lists its samples with a script of its own; it loads nothing.</p></noscript>"
        f'{_controls(samples)}<div class="split"><ol id="list"></ol><div id="detail"></div></div>'
        + json_block({"names": [visible(name) for name in samples.names], "rows": samples.rows})
    )
    return document(title, body, asset("samples.css"), SCRIPT)
