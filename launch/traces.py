"""Verified traces of environments for the cold start (SFT), each with tool calls and their real results.

    python launch/traces.py ENV[:LEVEL] ... [--num 4000] [--seed 0] [--heldout 0.1] [--slips 0.1] [--at-once 0.5]
        [--bare 0.5] [--out FILE.jsonl]

ENV: calculator, search, programs, tickets (docs/environments.md), in equal shares; twice named, twice the share. The
problems are of the train split at `--heldout` (give it as data.heldout later). `--slips`: share of traces in which one
call fails first; `--at-once`: share that says its end at once, without a call. Only what the verifier accepts is
written, a row {"messages", "tools"} a line, the whole file or none. `programs` runs in the sandbox; `--sandbox` is
rl.tools.sandbox. `--bare`: share of rows without the schemas, which are most of a short trace's tokens: for a first
phase, in which a small model learns calls and results as such. Exit status: 0 done, 2 the user's mistake.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run from a bare checkout

from conf.errors import UserError  # noqa: E402
from rl.env.environment import Environment, EnvProblem  # noqa: E402
from rl.env.registry import choose  # noqa: E402
from rl.env.traces import Trace, at_once, play  # noqa: E402

USER_MISTAKE = 2
SIDE_BY_SIDE = 16  # traces that are played


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises UserError, one line, for what it does not know."""
    parser = _Parser(prog="traces", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="+", metavar="ENV[:LEVEL]")
    parser.add_argument("--num", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=float, default=0.1)
    parser.add_argument("--slips", type=float, default=0.0)
    parser.add_argument("--at-once", type=float, default=0.0)
    parser.add_argument("--bare", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("runs/traces.jsonl"))
    parser.add_argument("--sandbox", default="auto")
    given = parser.parse_args(arguments)
    if given.num < 1:
        raise UserError(f"--num {given.num} writes nothing: give 1 or more")
    for name, share in (("heldout", given.heldout), ("slips", given.slips), ("at-once", given.at_once)):
        if not 0 <= share < 1:
            raise UserError(f"--{name} {share:g} is no share: give 0 or more, less than 1")
    if not 0 <= given.bare <= 1:
        raise UserError(f"--bare {given.bare:g} is no share: give 0 to 1")
    if given.out.suffix != ".jsonl":
        raise UserError(f"--out {given.out} is no .jsonl: the rows are JSON, a line each")
    if given.out.is_dir():
        raise UserError(f"--out {given.out} is a folder: give a file in it")
    return given


@asynccontextmanager
async def _sandbox(environments: Sequence[Environment], mode: str) -> AsyncIterator[None]:
    """A pool for those that run programs, while it is open."""
    wanting = [one for one in environments if one.wants_pool]
    if not wanting:
        yield
        return
    from rl.sandbox import Limits, SandboxPool

    async with SandboxPool(Limits(), mode=mode) as pool:
        for environment in wanting:
            environment.pool = pool
        try:
            yield
        finally:
            for environment in wanting:
                environment.pool = None


@contextmanager
def _whole(out: Path) -> Iterator[TextIO]:
    """A file that becomes `out` where the block ends well, and is gone where it does not."""
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): give another file") from error
    try:
        with file:
            yield file
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


async def write_traces(given: argparse.Namespace) -> tuple[int, int, int]:
    """(traces written, different problems among them, problems whose trace the verifier refused)."""
    from train.progress import Progress

    chosen = [choose(name) for name in given.environments]
    for environment, level in chosen:  # mistakes that a problem brings to light, before anything is shown or written
        environment.solve(environment.problem_at(0, "train", given.seed, level, given.heldout))
    written, refused, keys = 0, 0, set()
    with _whole(given.out) as file:
        async with _sandbox([environment for environment, _ in chosen], given.sandbox):
            with Progress(given.num, "traces", unit="trace") as progress:
                for start in range(0, given.num, SIDE_BY_SIDE):
                    numbers = range(start, min(start + SIDE_BY_SIDE, given.num))
                    for problem, trace in await asyncio.gather(*(_one(number, chosen, given) for number in numbers)):
                        if trace.verdict < 1:
                            refused += 1
                            continue
                        bare = random.Random(f"bare/{given.seed}/{problem.key}").random() < given.bare
                        file.write(json.dumps(trace.row(bare), ensure_ascii=False) + "\n")
                        keys.add(problem.key)
                        written += 1
                    progress.update(len(numbers))
        if not written:
            raise UserError(f"not one of {refused} traces is right by its verifier: nothing is written")
    return written, len(keys), refused


async def _one(
    number: int, chosen: Sequence[tuple[Environment, int]], given: argparse.Namespace
) -> tuple[EnvProblem, Trace]:
    """Trace `number`: the environments take turns; one that is named twice has two of them."""
    environment, level = chosen[number % len(chosen)]
    problem = environment.problem_at(number, "train", given.seed, level, given.heldout)
    rng = random.Random(f"slip/{given.seed}/{number}")
    trace = await play(environment, problem, rng if rng.random() < given.slips else None)
    if random.Random(f"at once/{given.seed}/{number}").random() < given.at_once:
        trace = await at_once(environment, problem, trace)
    return problem, trace


def main(arguments: Sequence[str]) -> int:
    try:
        given = parse(arguments)
        written, problems, refused = asyncio.run(write_traces(given))
    except UserError as error:
        print(f"traces: {error}", file=sys.stderr)
        return USER_MISTAKE
    left_out = f", {refused} left out" if refused else ""
    print(f"{given.out}: {written} traces of {problems} problems{left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
