"""What a model sees of a session and a program when nobody attacks."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from rl.sandbox import Execution, Limits, SandboxPool, run_program
from tests.rl.sandbox.conftest import LIMITS


def cells(pool: SandboxPool, *codes: str) -> list[Execution]:
    async def go() -> list[Execution]:
        session = await pool.session()
        try:
            return [await session.run(code) for code in codes]
        finally:
            await session.close()

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2\n"),
        ("x = 3\nx * 'ab'", "'ababab'\n"),
        ("None", ""),
        ("x = 5", ""),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("print('a', end=''); import sys; print('b', file=sys.stderr); print('c')", "ab\nc\n"),
        ("import os\n_ = os.write(1, b'raw ')\nprint('then')", "raw then\n"),
        ("import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', 'print(7)']).returncode", "7\n0\n"),
        ("for i in range(2):\n    print(i)", "0\n1\n"),
        ("'é→😀'", "'é→😀'\n"),
        ("", ""),
        ("# nothing", ""),
        ("def f():\n    return 4\nf()\nf() + 1", "5\n"),
        ("__name__", "'__main__'\n"),
        ("input()", None),
        ("open('a.txt', 'w').write('kept')\nopen('/tmp/a.txt').read()", "'kept'\n"),
        ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))).__name__", "'A'\n"),
        ("import multiprocessing as m\nwith m.Pool(2) as p: print(p.map(abs, [-1, 2]))", "[1, 2]\n"),
        ("import asyncio\nasyncio.run(asyncio.sleep(0, 8))", "8\n"),
        ("import threading\nthreads = [threading.Thread(target=print, args=(1,)) for _ in range(3)]\n"
         "[t.start() for t in threads]; [t.join() for t in threads]; 0", "1\n1\n1\n0\n"),
        ("hash('a') == hash('a'), list({'b', 'a', 'c'})", None),
        ("import numpy\nint(numpy.arange(4).sum())", "6\n"),
        ("import zoneinfo, datetime\ndatetime.datetime.now().astimezone().tzname()", "'UTC'\n"),
    ],
)  # fmt: skip
def test_a_cell(pool: SandboxPool, code: str, output: str | None) -> None:
    (done,) = cells(pool, code)
    assert done.killed is None and not done.timed_out
    if output is not None:
        assert (done.output, done.error) == (output, None)


def test_state_is_kept_and_sets_print_the_same_everywhere(pool: SandboxPool) -> None:
    first = cells(pool, "x = 1", "import math", "x += 1", "x, math.floor(2.5)", "_[0]")
    assert [done.output for done in first] == ["", "", "", "(2, 2)\n", "2\n"]
    assert cells(pool, "set('qwerty')")[0].output == cells(pool, "set('qwerty')")[0].output


def test_a_fork_that_runs_on_and_closed_outputs_do_not_cost_the_session(pool: SandboxPool) -> None:
    forked, after = cells(pool, "import os, time\nif os.fork():\n  time.sleep(0.3)\n  x = 1", "x")
    assert forked.error is None and forked.killed is None and after.output == "1\n"
    _, closed, after = cells(pool, "x = 1", "import os\nprint(0)\nos.close(1), os.close(2)", "x")
    assert closed.output.startswith("0\n") and (closed.error or "").startswith("OSError")
    assert after.output == "1\n"


def test_errors_have_a_short_traceback_with_the_line(pool: SandboxPool) -> None:
    deep, syntax, after = cells(
        pool, "def f(n):\n    if n: f(n - 1)\n    else: raise ValueError('deep')\nf(50)", "x = (1,\n", "1"
    )
    assert deep.error == "ValueError: deep"
    assert "raise ValueError('deep')" in deep.output and deep.output.count("\n") < 40
    assert deep.output.endswith("ValueError: deep\n") and "/sandbox" not in deep.output
    assert (syntax.error or "").startswith("SyntaxError: '(' was never closed") and "/sandbox" not in syntax.output
    assert after.output == "1\n"


def test_long_output_keeps_head_and_tail(pool: SandboxPool) -> None:
    (done,) = cells(pool, "print('A' * 3000 + 'B' * 10000 + 'C' * 3000)")
    found = re.fullmatch(r"A{2000}\n\[\.\.\. (\d+) bytes left out \.\.\.\]\nC{1999}\n", done.output)
    assert found and int(found[1]) == 16001 - LIMITS.output_bytes
    (whole,) = cells(pool, "print('x' * 3999)")
    assert whole.output == "x" * 3999 + "\n"


def test_sessions_do_not_see_each_other(pool: SandboxPool) -> None:
    async def go() -> None:
        one, two = await pool.session(), await pool.session()
        await one.run("x = 1\nopen('/tmp/file', 'w').write('x')")
        assert ((await two.run("x")).error or "").startswith("NameError")
        assert (await two.run("import os; os.listdir('/tmp')")).output == "[]\n"
        await asyncio.gather(one.close(), two.close())

    asyncio.run(go())


def test_calls_of_one_session_take_turns(pool: SandboxPool) -> None:
    async def go() -> list[str]:
        session = await pool.session()
        await session.run("n = 0")
        done = await asyncio.gather(*(session.run("n += 1\nn") for _ in range(5)))
        await session.close()
        await session.close()
        with pytest.raises(RuntimeError, match="closed"):
            await session.run("1")
        return [each.output for each in done]

    assert asyncio.run(go()) == ["1\n", "2\n", "3\n", "4\n", "5\n"]


def test_code_that_cannot_be_sent_is_an_error_of_the_call(pool: SandboxPool) -> None:
    long, surrogate, nul, after = cells(pool, "x" * 1_000_001, "'\ud800'", "a\0b", "1")
    assert (long.error or "").startswith("ValueError") and long.killed is None
    assert surrogate.error and nul.error and after.output == "1\n"


def test_a_session_has_so_much_cpu_time_and_no_more(mode: str) -> None:
    async def go(pool: SandboxPool) -> None:
        session = await pool.session()
        burn = "import os, time\nfor _ in range(3): os.fork()\nwhile time.process_time() < 0.2: pass\nos._exit(0)"
        started = time.monotonic()
        done = await session.run("x = 1\n" + burn.replace("os._exit(0)", "time.sleep(2)"), 5.0)
        assert done.killed == "cpu" and time.monotonic() - started < 5.0, done
        spent = await session.run("1")
        assert (
            spent.killed == "cpu"
            and spent.error
            and spent.output == "[the session was restarted, its variables are lost: cpu]\n"
        )
        assert (await session.run("1")).error == spent.error
        await session.close()

    with SandboxPool(Limits(timeout_s=2.0, memory_mib=128, cpu_s=1.0), mode, warm=0) as pool:
        asyncio.run(go(pool))


# -- programs


def program(pool: SandboxPool, source: str, stdin: str = "", timeout_s: float = 3.0) -> Execution:
    return asyncio.run(run_program(pool, source, stdin, timeout_s))


def test_a_program_reads_stdin_and_writes_stdout(pool: SandboxPool) -> None:
    done = program(pool, "import sys\nn = int(input())\nprint(n * 2)\nprint('note', file=sys.stderr)", "21\n")
    assert (done.output, done.error, done.killed) == ("42\n", None, None)
    assert program(pool, "print(sum(map(int, open(0).read().split())))", "1 2\n3").output == "6\n"
    assert program(pool, "import os\nprint(os.read(0, 9))", "é").output == "b'\\xc3\\xa9'\n"
    assert program(pool, "import sys\nsys.stdout.write('no newline')").output == "no newline"
    assert program(pool, "if __name__ == '__main__': print(1)").output == "1\n"
    assert program(pool, "import atexit\natexit.register(print, 'late')").output == "late\n"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import sys; sys.exit('no good')", "no good"),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_program_that_fails_says_how(pool: SandboxPool, source: str, error: str) -> None:
    done = program(pool, f"print('before')\n{source}")
    assert done.error == error and done.killed is None
    assert program(pool, "import sys; sys.exit(0)").error is None


def test_a_program_past_its_time_or_memory_is_killed(pool: SandboxPool) -> None:
    late = program(pool, "print('x', flush=True)\nwhile True: pass", timeout_s=0.5)
    assert late.timed_out and late.killed == "time" and late.output == "x\n" and late.seconds < 1.5
    left = program(pool, "import os\nif os.fork(): print('done')\nelse:\n  while True: pass", timeout_s=2.0)
    assert (left.output, left.error) == ("done\n", None) and left.seconds < 1.0
    many = (
        "import os, time\nfor _ in range(8):\n  if not os.fork(): x = b'x' * (60 << 20); time.sleep(9)\ntime.sleep(9)"
    )
    assert program(pool, many).killed == "memory"


def test_a_program_finds_nothing_of_the_one_before(pool: SandboxPool) -> None:
    spy = "import os\nprint(os.listdir('/tmp'), [n for n in os.listdir('/proc') if n.isdigit()], os.environ.get('A'))\n"
    spy += "open('/tmp/left', 'w').write(input())\nos.environ['A'] = 'b'\nif os.fork() == 0:\n  while True: pass"
    first, second = program(pool, spy, "secret test"), program(pool, spy, "secret test")
    assert first.output == second.output == "[] ['1', '2'] None\n" or first.output == second.output
    assert "left" not in second.output


def test_what_is_too_long_is_an_error(pool: SandboxPool) -> None:
    assert (program(pool, "1", "x" * 2_000_000).error or "").startswith("ValueError")
