"""HTML building blocks of the pages. Every string from a run passes `text` on its way into the page.

Model output and data are hostile: beside the five characters of HTML, controls, invisible and direction-changing
characters are made visible, so that a sample cannot hide or reorder what a reader sees. The page carries a content
policy that loads nothing and runs no script but, in the sample viewer, the one whose hash it names, should an escape
ever be missed.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
DATA_ID = "data"
LONGEST_TEXT = 6000  # characters of one field of a sample, or one value of a config
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # controls, bidi, zero width, surrogates, private use
_SUSPECT = re.compile(r"[^\n\t\x20-\x7e\xa1-\xac\xae-\u02ff]")


def text(value: Any) -> str:
    """Any value -> safe as HTML text and inside a quoted attribute; hidden characters as `⟨U+202E⟩`."""
    string = str(value)
    if len(string) > LONGEST_TEXT:
        string = f"{string[:LONGEST_TEXT]} … ({len(string) - LONGEST_TEXT} more characters)"
    return html.escape(visible(string), quote=True)


def visible(string: str) -> str:
    """The string with hidden characters as `⟨U+202E⟩`; not yet safe in HTML."""
    return _SUSPECT.sub(_visible, string)


def _visible(match: re.Match[str]) -> str:
    character = match.group()
    return f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in _HIDDEN else character


def swatch(colour: int, colours: int) -> str:
    """The little line in a run's colour; dashed from the second round of colours on, as its lines are."""
    return f'<i class="swatch s{colour % colours}{" dashed" if colour >= colours else ""}"></i>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", marked: frozenset[int] = frozenset()
) -> str:
    """A table of ready-made HTML cells; the first cell of a row is its heading. `marked` rows stand out."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for i, (first, *rest) in enumerate(rows):
        opening = '<tr class="differs">' if i in marked else "<tr>"
        body.append(f'{opening}<th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>')
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f'<div class="scroll">{opening}<thead><tr>{cells}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def section(anchor: str, title: str, lead: str, body: str) -> str:
    """A part of the page. `title` and `lead` are ours; an empty body is no section."""
    if not body:
        return ""
    intro = f"<p>{text(lead)}</p>" if lead else ""
    return f'<section><h2 id="{anchor}">{text(title)}</h2>{intro}{body}</section>'


def asset(name: str) -> str:
    """A style sheet or a script of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def policy_for(script: str, asks: bool = False) -> str:
    """The content policy of a page that may run this script and no other; `asks`: it may ask its own server."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{POLICY}; script-src 'sha256-{digest}'" + ("; connect-src 'self'" if asks else "")


def json_block(data: Any) -> str:
    """Data for a page's script. Nothing in it can end the block, begin a tag or a comment: `<` stands escaped."""
    source = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{DATA_ID}">{source}</script>'


def document(title: str, body: str, css: str = "", script: str = "", asks: bool = False) -> str:
    """The whole page around `body`; `title` may come from outside, `css` and `script` are ours."""
    policy = policy_for(script, asks) if script else POLICY
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{text(title)} · Winnow</title>\n<style>\n{asset('report.css')}{css}</style></head>\n"
        f"<body><main>\n{body}\n</main>{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def card(title: str, key: str, drawing: str, legend: str = "", notes: Sequence[str] = ()) -> str:
    """A drawing in its card: title, key or unit, `legend` (ready-made list items), notes below."""
    said = "".join(f'<p class="notes">{text(note)}</p>' for note in notes)
    items = f'<ul class="legend">{legend}</ul>' if legend else ""
    under = f'<span class="key">{text(key)}</span>'
    return f"<figure><figcaption><b>{text(title)}</b>{under}</figcaption>{items}{drawing}{said}</figure>"
