"""Stages strung together by a recipe, resumable: the whole way, or an ablation, in one command.

    python launch/pipeline.py RECIPE [--dir DIR] [--ranks N] [--only NAME] [--list | --dry-run] [key=value ...]
        [--launch COMMAND]

RECIPE is a YAML file or the name of one under conf/recipes (launch/recipe.py says what it holds; docs/pipeline.md).
Settings on the command line go to every stage, `init_from` to those that start from no other. Each stage is an ordinary
command line, echoed so that it can be copied, and writes to DIR/NAME; DIR/pipeline.json says how far all have come.
Started again, the same command skips what is finished and goes on with the rest. SIGTERM and Ctrl-C reach the running
stage, which saves first.

Exit status: 0 all finished, 2 the user's mistake (told before anything runs), 3 a gate is closed (launch/gates.py), 143
stopped and saved, else the status of the stage that failed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conf.errors import UserError, nearest  # noqa: E402  (needs the path above when run from a bare checkout)
from conf.outcome import PREEMPTED_STATUS, finished  # noqa: E402
from launch.gates import CLOSED, shown  # noqa: E402
from launch.pipeline_state import State, stamp  # noqa: E402
from launch.recipe import Recipe, Run, find_recipe, plan, read_recipe  # noqa: E402
from launch.runner import Runner  # noqa: E402


def refuse_stale(runs: Sequence[Run], state: State) -> None:
    """UserError with a line for every run that is."""
    wrong = [
        f"{run.name} was made from an earlier {run.start}: remove {run.folder} to make it anew, or give another --dir"
        for run in runs
        if state.stale(run)
    ]
    if wrong:
        raise UserError("\n".join(wrong))


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def select(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs that `--only` names, by stage or by run; all where it names none."""
    names = {run.name for run in runs} | {run.step for run in runs}
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: this recipe has no such stage: {nearest(name, sorted(names))}")
    chosen = [run for run in runs if not only or run.name in only or run.step in only]
    folders = {run.name: run.folder for run in runs}
    made = {run.name for run in chosen}
    for run in chosen:
        if run.start is not None and run.start not in made and not finished(folders[run.start]):
            raise UserError(f"--only {run.step}: it starts from {run.start}, which has not finished: run that first")
        for gate in run.gates:
            if gate.of not in made and not finished(folders[gate.of]):
                raise UserError(f"--only {run.step}: its gate judges {gate.of}, which has not finished: run that first")
    return chosen


def execute(runs: Sequence[Run], state: State, launch: str = "") -> int:
    """Runs one after another and stops at the first that does not finish, or whose gate is closed -> exit status."""
    names = [run.name for run in runs]
    with Runner(shlex.split(launch)) as runner:
        for i, name in enumerate(names, 1):
            run, label = state.runs[name], f"[{i}/{len(runs)} {name}]"
            refuse_stale([run], state)  # what it starts from may have been trained on just now
            if state.done(run):
                print(f"{label} finished before", flush=True)
                continue
            code = pass_gates(run, names, state, runner, label) or start(run, state, runner, label)
            if code:
                return code
    print(f"\n{len(runs)} stages finished, {duration(time.monotonic() - state.began)}", flush=True)
    return 0


def start(run: Run, state: State, runner: Runner, label: str) -> int:
    """One run, from its checkpoint where it has one -> exit status."""
    if runner.stopped is not None:
        return runner.stopped
    before, started = state.stages[run.name], time.time()
    print(f"\n{label} {before['command']}", flush=True)
    begun_from = None if run.start is None else stamp(run.folder.parent / run.start)
    state.set(run.name, status="running", exit_code=None, start_written=begun_from)
    ended = runner.run(run.arguments, run.ranks)
    status, code = outcome(run, ended.status, runner.stopped, started)
    state.set(run.name, status=status, exit_code=code, seconds=round(before["seconds"] + ended.seconds, 2))
    if status == "done":
        so_far = duration(time.monotonic() - state.began)
        print(f"{label} done in {duration(ended.seconds)}, {so_far} so far", flush=True)
        return 0
    next_step = "the same command goes on" if status == "preempted" else "mend it and start the same command"
    print(
        f"pipeline: {run.name} {status} after {duration(ended.seconds)} (exit status {code}): {next_step}",
        file=sys.stderr,
    )
    return code


def pass_gates(run: Run, chosen: Sequence[str], state: State, runner: Runner, label: str) -> int:
    """0 once all of the run's gates hold, after more steps of what they judge where they give them; else the exit
    status, with the reason on stderr and in the state."""
    for gate in run.gates:
        while True:
            found = gate.judge(state.runs[gate.of].folder)
            said = f"gate {gate.rule} of {gate.of}: {found.line}"
            if found.holds:
                print(f"{label} {said}", flush=True)
                break
            if found.steps is None or gate.of not in chosen:
                more = "" if found.steps is None else f"; without --only {gate.of} would go on"
                state.set(run.name, status="held", exit_code=CLOSED, gate=found.line)
                print(f"pipeline: {run.name} does not begin, {said}{more}", file=sys.stderr)
                return CLOSED
            print(f"{label} {said}: on to step {found.steps}", flush=True)
            code = start(state.grow(gate.of, found.steps), state, runner, f"[{gate.of}]")
            if code:
                return code
    refuse_stale([run], state)  # it had begun, and what it began from went on just now
    return 0


def outcome(run: Run, code: int, stopped: int | None, started: float) -> tuple[str, int]:
    """(status, exit code) of a run that ended. torchrun says 1 for any status of its ranks: what they left since
    `started` (seconds since the epoch) tells a run that saved and stopped from one that failed."""
    if code == 0:
        return ("done", 0) if finished(run.folder) else ("failed", 1)
    saved = run.folder / "preempted"
    if stopped is not None or code == PREEMPTED_STATUS or saved.is_file() and saved.stat().st_mtime >= started:
        return "preempted", stopped or PREEMPTED_STATUS
    reason = run.folder / "error.txt"
    mistake = reason.is_file() and len(reason.read_text(encoding="utf-8").splitlines()) == 1
    return "failed", 2 if run.ranks > 1 and mistake else code


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or the name of one under conf/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every stage")
    parser.add_argument("--dir", type=Path, default=None, help="folder of the runs (runs/NAME of the recipe)")
    parser.add_argument("--ranks", type=int, default=None, help="processes of every stage, whatever the recipe says")
    launch = "starts a stage on all its ranks, in place of torchrun here; launch/cluster/slurm.sbatch gives it"
    parser.add_argument("--launch", default="", metavar="COMMAND", help=launch)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this stage alone; may be repeated")
    dry = "check everything, print gates and commands and run nothing"
    parser.add_argument("--list", "--dry-run", action="store_true", dest="list", help=dry)
    options = parser.parse_intermixed_args(argv)
    if options.ranks is not None and options.ranks < 1:
        parser.error(f"--ranks {options.ranks}: give a number from 1")
    return options


def run(options: argparse.Namespace) -> int:
    """Raises UserError before anything runs."""
    path = find_recipe(options.recipe)
    recipe: Recipe = read_recipe(path)
    out = options.dir or Path("runs") / path.stem
    runs = plan(recipe, out, options.overrides, options.ranks)
    chosen = select(runs, options.only)
    entry = os.path.relpath(ROOT / "launch" / "stage.py")
    if options.list:
        for each in chosen:
            for gate in each.gates:
                print(f"[{each.name}] gate {shown(gate)}")
            print(f"[{each.name}] {each.command(entry, options.launch)}")
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--dir {out} cannot be written ({error.strerror}): give another folder") from error
    print(f"{path}: {len(chosen)} stages into {out}{f' ({recipe.title})' if recipe.title else ''}", flush=True)
    state = State(out, path, runs, entry, options.launch)
    chosen = [state.runs[each.name] for each in chosen]
    refuse_stale(chosen, state)
    status = execute(chosen, state, options.launch)
    if status == 0 and recipe.parity is not None and not options.only:
        from launch.parity import write_parity

        print(f"\n{write_parity(recipe.parity, runs, out)}", flush=True)
    return status


def main(argv: Sequence[str]) -> int:
    try:
        return run(parse(argv))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
