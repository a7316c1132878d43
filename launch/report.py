"""An HTML report of one run, or of several laid over each other: one self-contained file, no network, no script.

    python launch/report.py RUN [RUN ...] [out=FOLDER]
    python launch/report.py [RUN or FOLDER OF RUNS ...] --serve [PORT]

RUN is the output_dir of a stage; what it measured is read from its metrics.jsonl. The page goes to FOLDER/index.html,
by default RUN/report/index.html of the first run. `--serve` writes nothing: it shows the runs on
http://127.0.0.1:PORT (8000; 0 takes a free one) until Ctrl-C, kept up while they go (launch/live.py), with their
reports and samples; by default all below runs/. Nothing else of the machine is served and no other machine can ask.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run from a bare checkout

from launch import live, samples_page  # noqa: E402
from launch.page_command import run_command, write_whole  # noqa: E402
from launch.report_data import load_runs  # noqa: E402
from launch.report_page import page  # noqa: E402


def write_report(runs: list[Path], out: Path, summary: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Writes `out/index.html`, whole or not at all, and returns its path.

    `runs` are output folders; a run's colour follows their order. `summary` opens the page with a table: row name (a
    run's name takes that run's colour) -> metric key -> value. Raises UserError where a run has no metrics.
    """
    viewer = samples_page.FILE_NAME if (Path(out) / samples_page.FILE_NAME).is_file() else None
    return write_whole(Path(out) / "index.html", page(load_runs([Path(run) for run in runs]), summary, viewer))


def main(arguments: list[str]) -> int:
    return run_command(arguments, "report", __doc__, write_report, live.serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
