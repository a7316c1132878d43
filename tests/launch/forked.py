"""launch/pipeline.py with its real stages as forks of one process, which imports the libraries once.

Run as a script with the pipeline's arguments; `Runner.run` is the one thing replaced."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import transformers  # noqa: E402, F401  (once, before the forks)

import rl.evaluate  # noqa: E402, F401
import rl.loop  # noqa: E402, F401
import train.loop  # noqa: E402, F401
from launch import pipeline, runner, stage  # noqa: E402
from tests.distributed.helper import import_deepspeed  # noqa: E402


def run(self: runner.Runner, arguments: Sequence[str], ranks: int = 1, *_: Any, **__: Any) -> runner.Ended:
    start = time.monotonic()
    child = os.fork()
    if not child:
        status = 1
        try:
            status = stage.main(list(arguments))
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return runner.Ended(status if status >= 0 else 128 - status, time.monotonic() - start)


if __name__ == "__main__":
    import_deepspeed()
    runner.Runner.run = run  # type: ignore[method-assign]
    sys.exit(pipeline.main(sys.argv[1:]))
