"""The page of an evaluation: what sparse attention costs by length, in pictures, with a verdict. One file, no script.

    python launch/evaluation.py RUN [out=FOLDER] [--serve [PORT]]

RUN is the output_dir of an evaluate stage, which wrote the page already: RUN/report/evaluation.html. This command makes
it again from evaluation.json, with the verdict that is in there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run from a bare checkout

from conf.errors import UserError  # noqa: E402
from launch.evaluation_page import page  # noqa: E402
from launch.page_command import run_command, write_whole  # noqa: E402

FILE_NAME = "evaluation.html"


def write_evaluation(run: Path, out: Path) -> Path:
    """Writes `out/evaluation.html`, whole or not at all, and returns its path. UserError where nothing was measured."""
    path = run / "evaluation.json"
    if not path.is_file():
        raise UserError(f"{run} holds no evaluation.json: give the output_dir of +stage=evaluate")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:80]}): evaluate again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no evaluation: evaluate again")
    return write_whole(out / FILE_NAME, page(run.resolve().name, found))


def _write(runs: list[Path], out: Path) -> Path:
    if len(runs) > 1:
        raise UserError(f"{len(runs)} runs given: the page is of one, and launch/report.py lays several side by side")
    return write_evaluation(runs[0], out)


def main(arguments: list[str]) -> int:
    return run_command(arguments, "evaluation", __doc__, _write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
