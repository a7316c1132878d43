"""DIR/pipeline.json: how far each run of a pipeline has come, so that the same command goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.load import load
from conf.outcome import FINISHED, finished
from launch.recipe import Run, merged

STATE = "pipeline.json"


class State:
    """Of each run its status (waiting, running, done, failed, preempted, held by a gate), command, seconds over all
    attempts, exit code, when the run that it started from was written, the reason of its closed gate, and the steps
    that gates of others gave it. Replaced whole after every change."""

    def __init__(self, folder: Path, recipe: Path, runs: Sequence[Run], entry: str, launch: str = "") -> None:
        self.path, self.recipe, self.launch = folder / STATE, str(recipe), (entry, launch)
        self.began = time.monotonic()
        before = self._read()
        self.stages: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, Run] = {}  # as they are to be made, with the steps that gates gave them
        for run in runs:
            entered = before.get(run.name, {"status": "waiting", "seconds": 0.0, "exit_code": None})
            run = self.runs[run.name] = _grown(run, entered.get("steps", 0))
            command = run.command(*self.launch)
            if entered["status"] == "running":  # the pipeline itself was killed
                entered["status"] = "failed"
            if entered.get("command", command) != command:  # the stage itself says what may differ
                entered["status"] = "waiting"
            self.stages[run.name] = entered | {"command": command}

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            stages: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} cannot be read ({error}): remove it, what is finished stays so") from error
        return stages

    def set(self, name: str, **changes: Any) -> None:
        self.stages[name] |= changes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{STATE}")
        text = json.dumps({"recipe": self.recipe, "stages": self.stages}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path)

    def grow(self, name: str, steps: int) -> Run:
        """The run with `train.steps=steps` from now on, also for a pipeline that is started again."""
        run = self.runs[name] = _grown(self.runs[name], steps)
        self.set(name, steps=steps, command=run.command(*self.launch))
        return run

    def done(self, run: Run) -> bool:
        """Whether it need not be started: it finished by this very command and its results are there."""
        return bool(self.stages[run.name]["status"] == "done") and finished(run.folder)

    def stale(self, run: Run) -> bool:
        """Whether what its folder holds, finished or not, was made from what is not there any more, or was written anew
        since."""
        written = self.stages[run.name].get("start_written")
        if run.start is None or written is None or not run.folder.is_dir():
            return False
        start = run.folder.parent / run.start
        return not finished(start) or stamp(start) != written


def _grown(run: Run, steps: int) -> Run:
    """With `steps`, where the recipe has fewer."""
    if steps <= 0 or steps <= load(run.arguments).config.train.steps:
        return run
    return replace(run, settings=merged(run.settings, [f"train.steps={steps}"]))


def stamp(folder: Path) -> float:
    """When the run's result was written (seconds since the epoch): a run made anew has another."""
    return next((folder / mark).stat().st_mtime for mark in FINISHED if (folder / mark).is_file())
