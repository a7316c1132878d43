"""What the commands that write a page share: the command line, a file that appears whole or not at all, and a server
of its folder for this machine alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from conf.errors import UserError, nearest
from launch import samples_page
from launch.report_html import POLICY

POLICIES = {samples_page.FILE_NAME: samples_page.POLICY}  # every other file may run nothing


def write_whole(path: Path, content: str) -> Path:
    """Writes the page and returns its path; a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(f".{path.name}.{os.getpid()}")
    partial_path.write_text(content, encoding="utf-8")
    partial_path.replace(path)
    return path


class PageHandler(SimpleHTTPRequestHandler):
    """Serves the plain files of one folder: no listings, no links out of it, no foreign Host (DNS rebinding)."""

    policy = POLICY

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
        self.policy = POLICIES.get(asked.name, POLICY)
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", self.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet: one reader, one page."""


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of `folder` that listens on this machine alone. Raises UserError where the port cannot be had."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(PageHandler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on port {port}: {error}; give another with --serve PORT, 0 takes any") from error


@dataclass
class Options:
    runs: list[Path] = field(default_factory=list)
    out: Path | None = None
    port: int | None = None

    @property
    def folder(self) -> Path:
        """Where the page goes."""
        return self.out or self.runs[0] / "report"


def parse(arguments: list[str], name: str, live: bool = False) -> Options:
    """The command line of launch/NAME.py; `live`: what it serves is written nowhere and needs no run named. Raises
    UserError, one line, for what it does not know."""
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
    if not options.runs and not (live and options.port is not None):
        raise UserError(f"no run given: python launch/{name}.py RUN [RUN ...] [out=FOLDER] [--serve [PORT]]")
    if live and options.port is not None and options.out is not None:
        raise UserError(f"out={options.out} with --serve: what is served is written nowhere; give one of them")
    return options


def run_command(
    arguments: list[str],
    name: str,
    said: str | None,
    write: Callable[[list[Path], Path], Path],
    live: Callable[[list[Path], int], None] | None = None,
) -> int:
    """The whole command; `said` is its help, `write`: (runs, folder) -> path of the page, `live`: serves (runs, port)
    itself in place of the written page's folder."""
    if "--help" in arguments or "-h" in arguments:
        print(said)
        return 0
    try:
        options = parse(arguments, name, live is not None)
        if live is not None and options.port is not None:
            live(options.runs or [Path("runs")], options.port)
            return 0
        path = write(options.runs, options.folder)
        print(path, flush=True)
        if options.port is not None:
            with server(path.parent, options.port) as serving:
                shown = "" if path.name == "index.html" else path.name
                print(f"http://127.0.0.1:{serving.server_address[1]}/{shown}  (Ctrl-C ends it)", flush=True)
                serving.serve_forever()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0
