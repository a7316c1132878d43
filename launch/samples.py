"""The samples of a GRPO run, or of several, to read: one self-contained HTML file, no network.

    python launch/samples.py RUN [RUN ...] [out=FOLDER] [--serve [PORT]]

RUN is the output_dir of a GRPO run; the page shows its samples.jsonl: each answer with its tokens coloured by what the
sampler and the update made of them, how its reward adds up, and the rest of its group; to filter and to sort. It goes
to FOLDER/samples.html, by default RUN/report/samples.html of the first run, beside the report, which links to it.
`--serve` as for the report.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run from a bare checkout

from launch.page_command import run_command, write_whole  # noqa: E402
from launch.samples_data import load_samples  # noqa: E402
from launch.samples_page import FILE_NAME, page  # noqa: E402


def write_viewer(runs: list[Path], out: Path) -> Path:
    """Writes `out/samples.html`, whole or not at all, and returns its path. Raises UserError where a run has none."""
    report = "index.html" if (Path(out) / "index.html").is_file() else None
    return write_whole(Path(out) / FILE_NAME, page(load_samples([Path(run) for run in runs]), report))


def main(arguments: list[str]) -> int:
    return run_command(arguments, "samples", __doc__, write_viewer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
