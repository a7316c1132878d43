"""The entry: one stage from its command line.

    torchrun [--nproc-per-node N] launch/stage.py +stage=S [output_dir=DIR] [init_from=PATH] [key=value ...]

Plain `python launch/stage.py ...` is one process. Exit status: 0 finished, 2 the user's mistake, 143 preempted
(SIGTERM, saved), 1 a fault. Rank 0 writes the reason to stderr and to `DIR/error.txt`; the others are silent, their
faults go to `DIR/error_rank_N.txt`. What is heavy is imported after the command line was understood, so a typo is
answered at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a bare checkout

from conf.errors import UserError  # noqa: E402  (needs the path above)

USER_MISTAKE, FAULT = 2, 1
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # full, or closed to this user
GRACE_S = 5.0  # the launcher ends rank 0 as soon as another rank has ended: first it may write the reason


def run(argv: list[str]) -> None:
    """Parses, prepares and runs one stage. Raises UserError, Preempted (SystemExit) or whatever went wrong."""
    from conf.load import load

    loaded = load(argv)
    from train import distributed
    from train.run import open_run

    with distributed.process_group():
        context = open_run(loaded.config, loaded.overrides)
        if context is None:
            if distributed.rank() == 0:
                (Path(loaded.config.output_dir) / "error.txt").unlink(missing_ok=True)
                print(f"{loaded.config.output_dir} has finished: nothing to do (another output_dir starts anew)")
            return
        with context:
            if context.stage.runner == "train":
                from train.loop import train as runner
            elif context.stage.runner == "rl":
                from rl.loop import run as runner
            else:
                from rl.evaluate import run as runner
            runner(context)
            if distributed.rank() == 0:
                afterwards(context.config.stage, Path(loaded.config.output_dir))


def afterwards(stage: str, folder: Path) -> None:
    """The evaluation's page; after an adaptation, how to learn what it costs by length."""
    if stage == "evaluate":
        from launch.evaluation import write_evaluation

        print(write_evaluation(folder, folder / "report"), flush=True)
    elif stage == "sparse_adapt":
        measure = f"torchrun launch/stage.py +stage=evaluate init_from={folder} output_dir={folder}_eval"
        print(f"what sparse attention costs here, by length: {measure}", flush=True)


def output_dir(argv: list[str]) -> Path | None:
    """Where `error.txt` goes, read without the configuration that may be what is wrong."""
    given = dict(arg.lstrip("+").split("=", 1) for arg in argv if "=" in arg)
    if given.get("output_dir"):
        return Path(given["output_dir"])
    return Path("runs") / given["stage"] if given.get("stage", "").isidentifier() else None


def mistake_in(error: Exception) -> str | None:
    """The one line of what the user has to set right; None for a fault."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: make room or give the permission there, and start again"
    return None


def report(argv: list[str], rank: int, line: str, details: str) -> None:
    """The reason of a failure: `line` on rank 0's stderr, `details` into the run's folder."""
    folder = output_dir(argv)
    if rank == 0:
        print(line, file=sys.stderr, flush=True)
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("error.txt" if rank == 0 else f"error_rank_{rank}.txt")).write_text(details + "\n", encoding="utf-8")
    except OSError as error:
        if rank == 0 and details != line:  # else stderr has all there is to say
            print(f"{folder}/error.txt cannot be written: {error.strerror}\n{details}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    # notes go to stdout, so that a user's mistake is the only line on stderr
    level = logging.WARNING if rank == 0 else logging.CRITICAL
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=level)
    try:
        run(argv)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the process boundary: whatever it is, it is written down
        mistake = mistake_in(error)
        if mistake is not None:
            if rank != 0:
                time.sleep(GRACE_S)  # a mistake that all ranks see is rank 0's to tell
            folder = output_dir(argv)
            if rank == 0 or (folder is not None and not (folder / "error.txt").exists()):
                report(argv, rank, mistake, mistake)
            return USER_MISTAKE
        reason = " ".join(str(error).split())[:500]
        line = f"{type(error).__name__}: {reason} (see error.txt in the run's folder)"
        report(argv, rank, line, traceback.format_exc())
        return FAULT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
