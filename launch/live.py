"""The live page: charts of running and finished runs, kept up while they go. Served to this machine alone.

    python launch/report.py runs --serve            # every run below runs/
    python launch/report.py runs/base runs/adapted --serve 8001

What it serves is named by runs, never by paths: a name is looked up among the runs below the folders given.

    /                             the page (live.js draws it; panels are those of launch/panels.py)
    /api/runs                     the runs there are, with state, last step and alerts
    /api/series?run=&x=&from=&to= a run's metrics, thinned to a chart's width
    /report?run=&run=             the report of these runs; /samples?run= their samples token by token
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from conf.errors import UserError
from launch import report_page, samples_page
from launch.live_data import AXES, Watched, declaration
from launch.panels import TITLES
from launch.report_data import load_runs
from launch.report_html import POLICY, asset, document, policy_for
from launch.samples_data import load_samples

MOST_RUNS = 16  # on one report
SCRIPT = asset("live_chart.js") + asset("live.js")
PAGE_POLICY = policy_for(SCRIPT, asks=True)

BODY = """
<header><p class="brand">Winnow</p><h1>Runs</h1>
<p class="lead" id="status" role="status">Looking for runs …</p></header>
<div class="bench">
<aside aria-label="Runs and settings">
<fieldset id="runs"><legend>Runs</legend></fieldset>
<fieldset><legend>Charts</legend>
<label>x axis<select id="axis"><option value="step">step</option><option value="tokens">tokens</option>
<option value="hours">hours of computing</option></select></label>
<label>sections<select id="group"><option value="stage">one a stage</option>
<option value="all">all stages in one</option></select></label>
<label class="tick"><input type="checkbox" id="smooth" checked>smooth noisy lines</label>
<button type="button" id="whole" disabled>Whole range</button></fieldset>
<p class="links" id="links"></p>
<p class="notes">Drag across a chart to zoom all. Keys on a chart: <kbd>←</kbd> <kbd>→</kbd> read values, <kbd>+</kbd>
<kbd>−</kbd> zoom, <kbd>Esc</kbd> whole range.</p>
</aside>
<div id="charts"></div>
</div>
<footer>Thin lines are the values as logged, bold ones a moving average; a band spans what a point stands for.</footer>
"""


def page() -> str:
    data = f'<script type="application/json" id="panels">{declaration()}</script>'
    titles = f'<script type="application/json" id="titles">{json.dumps(TITLES)}</script>'
    return document("Live", BODY + data + titles, asset("live.css"), SCRIPT, asks=True)


class NoSuchRun(Exception):
    """Asked for a run that is not among those served, or in a way that is not understood."""


class LiveHandler(BaseHTTPRequestHandler):
    """Answers GET from this machine's browser; nothing it does writes."""

    protocol_version = "HTTP/1.1"

    def __init__(self, watched: Watched, *arguments: Any, **more: Any) -> None:
        self.watched = watched
        super().__init__(*arguments, **more)

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if host not in ("127.0.0.1", "localhost"):
            self._send(403, b"only for this machine", "text/plain")
            return
        address = urlsplit(self.path)
        answers: dict[str, Callable[[dict[str, list[str]]], tuple[bytes, str, str]]] = {
            "/": self._page,
            "/api/runs": self._runs,
            "/api/series": self._series,
            "/report": self._report,
            "/samples": self._samples,
        }
        try:
            if address.path not in answers:
                raise NoSuchRun
            body, kind, policy = answers[address.path](parse_qs(address.query, max_num_fields=100))
        except (NoSuchRun, UserError, ValueError) as error:
            reason = str(error) if isinstance(error, UserError) else "there is no such run or page"
            self._send(404, reason.encode(errors="replace"), "text/plain")
        else:
            self._send(200, body, kind, policy)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the page was closed, or no longer wants the answer
            self.close_connection = True

    def _send(self, status: int, body: bytes, kind: str, policy: str = POLICY) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def _page(self, query: dict[str, list[str]]) -> tuple[bytes, str, str]:
        return page().encode(), "text/html", PAGE_POLICY

    def _runs(self, query: dict[str, list[str]]) -> tuple[bytes, str, str]:
        return _json({"runs": self.watched.told()})

    def _series(self, query: dict[str, list[str]]) -> tuple[bytes, str, str]:
        (folder,) = self._folders(query)
        axis = query.get("x", ["step"])[0]
        if axis not in AXES:
            raise NoSuchRun
        low = float(query.get("from", ["-inf"])[0])
        high = float(query.get("to", ["inf"])[0])
        if math.isnan(low) or math.isnan(high):
            raise NoSuchRun
        follower = self.watched.follower(folder)
        more = follower.refresh()
        return _json({"series": follower.series(axis, low, high), "rows": len(follower), "more": more})

    def _report(self, query: dict[str, list[str]]) -> tuple[bytes, str, str]:
        folders = self._folders(query)
        viewer = None
        having = [name for name, at in zip(query["run"], folders, strict=True) if (at / "samples.jsonl").is_file()]
        if having:
            viewer = "samples?" + "&".join(f"run={quote(name)}" for name in having)
        return report_page.page(load_runs(folders), None, viewer).encode(), "text/html", POLICY

    def _samples(self, query: dict[str, list[str]]) -> tuple[bytes, str, str]:
        source = samples_page.page(load_samples(self._folders(query)))
        return source.encode(), "text/html", samples_page.POLICY

    def _folders(self, query: dict[str, list[str]]) -> list[Path]:
        """The folders of the runs asked for."""
        there, names = self.watched.folders(), query.get("run", [])
        if len(names) > MOST_RUNS:
            raise UserError(f"{len(names)} runs on one page are too many: untick some, {MOST_RUNS} are the most")
        if not names or any(name not in there for name in names):
            raise NoSuchRun
        return [there[name] for name in names]

    def log_message(self, *_: Any) -> None:
        """Quiet: one reader, one page."""


def _json(values: Any) -> tuple[bytes, str, str]:
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode(), "application/json", POLICY


def live_server(folders: list[Path], port: int) -> ThreadingHTTPServer:
    """A server of the runs in `folders`, not yet serving. Raises UserError where a folder is none, or the port cannot
    be had."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder at {folder}: give the output_dir of a run, or a folder that holds runs")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(LiveHandler, Watched(folders)))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on port {port}: {error}; give another with --serve PORT, 0 takes any") from error


def serve(folders: list[Path], port: int) -> None:
    """Serves until Ctrl-C; prints the address."""
    with live_server(folders, port) as serving:
        print(f"http://127.0.0.1:{serving.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        serving.serve_forever()
