"""An HTML report of one run, or of several laid over each other: one self-contained file, no network, no script.

    python launch/report.py RUN [RUN ...] [out=FOLDER] [--serve [PORT]]

RUN is the output_dir of a stage; what it measured is read from its metrics.jsonl. The page goes to FOLDER/index.html,
by default RUN/report/index.html of the first run. `--serve` then shows that folder on http://127.0.0.1:PORT (8000; 0
takes a free one) until Ctrl-C; nothing else of the machine is served and no other machine can ask.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run from a bare checkout

from conf.errors import UserError, nearest  # noqa: E402
from launch.report_data import load_runs  # noqa: E402
from launch.report_html import POLICY  # noqa: E402
from launch.report_page import page  # noqa: E402


def write_report(runs: list[Path], out: Path, summary: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Writes `out/index.html`, whole or not at all, and returns its path.

    `runs` are output folders; a run's colour follows their order. `summary` opens the page with a table: row name (a
    run's name takes that run's colour) -> metric key -> value. Raises UserError where a run has no metrics.
    """
    content = page(load_runs([Path(run) for run in runs]), summary)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path, partial_path = out / "index.html", out / f".index.html.{os.getpid()}"
    partial_path.write_text(content, encoding="utf-8")
    partial_path.replace(path)
    return path


class ReportHandler(SimpleHTTPRequestHandler):
    """Serves the plain files of one folder: no listings, no links out of it, no foreign Host (DNS rebinding)."""

    def send_head(self) -> Any:
        host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if host not in ("127.0.0.1", "localhost"):
            self.send_error(403, "only for this machine")
            return None
        folder = Path(self.directory).resolve()
        asked = Path(self.translate_path(self.path))
        asked = (asked / "index.html" if asked.is_dir() else asked).resolve()
        if not asked.is_relative_to(folder) or not asked.is_file():
            self.send_error(404)
            return None
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet: one reader, one page."""


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` that listens on this machine alone. Raises UserError where the port cannot be had."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(ReportHandler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on port {port}: {error}; give another with --serve PORT, 0 takes any") from error


@dataclass
class Options:
    runs: list[Path] = field(default_factory=list)
    out: Path | None = None
    port: int | None = None


def parse(arguments: list[str]) -> Options:
    """The command line. Raises UserError, one line, for what it does not know."""
    options, rest = Options(), list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--serve":
            options.port = int(rest.pop(0)) if rest and rest[0].isdecimal() else 8000
        elif word.startswith("out="):
            options.out = Path(word.removeprefix("out="))
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}: {nearest(word, ['--serve', '--help'])}")
        elif "=" in word and not Path(word).exists():
            raise UserError(f"unknown setting {word}: {nearest(word.split('=')[0] + '=', ['out='])}")
        else:
            options.runs.append(Path(word))
    if not options.runs:
        raise UserError("no run given: python launch/report.py RUN [RUN ...] [out=FOLDER] [--serve [PORT]]")
    return options


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        options = parse(arguments)
        path = write_report(options.runs, options.out or options.runs[0] / "report")
        print(path, flush=True)
        if options.port is not None:
            with server(path.parent, options.port) as serving:
                print(f"http://127.0.0.1:{serving.server_address[1]}/  (Ctrl-C ends it)", flush=True)
                serving.serve_forever()
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
