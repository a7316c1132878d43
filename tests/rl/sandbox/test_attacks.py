"""Hostile code that wants to use things up: time, processes, memory, disk, output, under every way to isolate.

`attack` checks what holds for all: within its time, the next call works, nothing is left behind.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
import uuid
from pathlib import Path

import pytest

from rl.sandbox import SandboxPool
from tests.rl.sandbox.attack import attack, attack_in, home_of, members
from tests.rl.sandbox.conftest import LIMITS

MIB = 1 << 20


# -- time


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', 'while True: pass'])",
        "10 ** 10 ** 8",
    ],
    ids=["loop", "sleep", "child", "arithmetic"],
)
def test_an_endless_call_ends(pool: SandboxPool, code: str) -> None:
    done = attack(pool, code, timeout_s=0.5)
    assert done.timed_out and "TimeoutError" in (done.error or "")


def test_a_call_that_obeys_the_interrupt_keeps_its_state(pool: SandboxPool) -> None:
    async def go() -> None:
        session = await pool.session()
        await session.run("x = 5")
        late = await session.run("while True: pass", 0.3)
        assert late.timed_out and late.killed is None
        assert (await session.run("x")).output == "5\n"
        await session.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    "code",
    [
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        "import time\nwhile True:\n  try:\n    while True: time.sleep(0.01)\n  except BaseException: pass",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import itertools\nsum(itertools.repeat(1))",
        "import time\nclass R:\n  def __repr__(self):\n    while True:\n      try: time.sleep(9)\n"
        "      except BaseException: pass\nR()",
        "class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E",
    ],
    ids=["ignores", "blocks", "catches", "stops itself", "holds the lock", "hostile repr", "hostile error"],
)
def test_a_call_that_does_not_obey_is_killed_and_the_next_says_so(pool: SandboxPool, code: str) -> None:
    async def go() -> None:
        session = await pool.session()
        await session.run("x = 5")
        started = time.monotonic()
        done = await session.run(code, 0.3)
        assert time.monotonic() - started < 1.3
        assert done.timed_out and done.killed == "time", done
        after = await session.run("x", 5.0)
        assert after.output.startswith("[the session was restarted, its variables are lost: time]\n"), after
        assert (after.error or "").startswith("NameError")
        assert (await session.run("x = 6\nx")).output == "6\n"
        await session.close()

    asyncio.run(go())


# -- processes


@pytest.mark.parametrize("exits", [False, True], ids=["stay", "chain"])
def test_fork_bomb(pool: SandboxPool, exits: bool) -> None:
    ends = "os._exit(0) if os.fork() else None" if exits else "os.fork()"
    code = f"""
    import os
    while True:
        try:
            {ends}
        except OSError:
            pass
    """
    done = attack(pool, code, timeout_s=0.7)
    assert done.timed_out or done.killed in ("exited", "processes"), done


def test_processes_and_threads_stay_below_the_limit(pool: SandboxPool) -> None:
    code = """
    import os, threading, time
    made = 0
    try:
        for _ in range(500):
            if made % 2:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            elif os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            made += 1
    except (OSError, RuntimeError) as error:
        print(type(error).__name__, made)
    """
    done = attack(pool, code)
    found = re.search(r"(BlockingIOError|RuntimeError) (\d+)", done.output)
    assert done.killed == "processes" or found, done
    if found:
        assert int(found[2]) <= LIMITS.processes


def test_killing_everyone_reaches_nobody_else(pool: SandboxPool) -> None:
    code = f"""
    import os, signal
    reached = []
    for pid in [1, os.getppid(), {os.getpid()}, {os.getppid()}]:
        for number in range(1, 65):
            try:
                os.kill(pid, number)
                reached.append(pid)
            except OSError:
                pass
    print(sorted(set(reached)))
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        print('nobody')
    os.kill(0, signal.SIGTERM)
    """
    done = attack(pool, code)
    # its own group dies of the last line, the first process (1, deaf) does not
    assert done.killed == "exited" and done.output == "[1]\nnobody\n", done


def test_other_processes_are_not_visible(pool: SandboxPool) -> None:
    code = f"""
    import os
    print([int(name) for name in os.listdir('/proc') if name.isdigit()], os.getpid())
    print(os.path.exists('/proc/{os.getpid()}/status') and open('/proc/{os.getpid()}/comm').read())
    """
    done = attack(pool, code)
    pids = [int(number) for number in re.findall(r"\d+", done.output.splitlines()[0])]
    assert len(pids) == 3 and max(pids) < 100, done.output


def test_zombies_are_reaped_and_orphans_do_not_count_for_ever(pool: SandboxPool) -> None:
    code = """
    import os, time
    for _ in range(300):
        while True:
            try:
                child = os.fork()
                break
            except OSError:
                time.sleep(0.01)
        if child == 0:
            try:
                os.fork()  # the parent leaves: an orphan
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    print('made')
    """
    done = attack(pool, code, timeout_s=8.0)
    assert done.output == "made\n" and done.error is None, done
    unwaited = "import os\nfor _ in range(500):\n  try:\n    os.fork() or os._exit(0)\n  except OSError: pass"
    assert attack(pool, unwaited).killed in (None, "processes")


DAEMON = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in set(range(1, 65)) - {9, 19, 32, 33}:
            signal.signal(number, signal.SIG_IGN)
        beats = 0
        while True:
            beats += 1
            with open('/tmp/beats', 'w') as file:
                file.write(str(beats))
            time.sleep(0.001)
    os._exit(0)
os.wait()
time.sleep(0.1)
"""


def test_a_daemon_is_frozen_between_calls_and_dies_with_the_session(pool: SandboxPool) -> None:
    async def go() -> str:
        session = await pool.session()
        home = home_of(session)
        await session.run(DAEMON)
        assert len(members(home)) == 3
        # on both sides of the pause in one cell each: the daemon runs while a cell does
        before = int((await session.run("int(open('/tmp/beats').read())")).output)
        await asyncio.sleep(0.5)
        after = int((await session.run("int(open('/tmp/beats').read())")).output)
        assert 0 < before <= after < before + 100, "it ran between the calls"
        await session.close()
        return home

    assert members(asyncio.run(go())) == []


# -- memory


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(1 << 33)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "x = 'a'\nwhile True: x += x",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(bytearray(1 << 14))\nf(0)",
        "import ctypes\nctypes.CDLL(None).malloc.restype = ctypes.c_void_p\n"
        "if not ctypes.CDLL(None).malloc(ctypes.c_size_t(1 << 34)): raise MemoryError",
    ],
    ids=["at once", "by steps", "doubling", "recursion", "malloc"],
)
def test_one_process_cannot_fill_the_memory(pool: SandboxPool, code: str) -> None:
    done = attack(pool, code, timeout_s=8.0)
    text = f"{done.output} {done.error}"
    assert (
        "MemoryError" in text
        or done.killed in ("memory", "exited")
        or "RecursionError" in text
        or "SystemError" in text
    ), done


class MemoryWatch:
    """The largest sum of proportional shares of a namespace's processes, in bytes."""

    def __init__(self, home: str) -> None:
        self.home, self.peak, self.over = home, 0, threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> MemoryWatch:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(0.01):
            total = 0
            for pid in members(self.home):
                try:
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                except OSError:
                    continue
                total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
            self.peak = max(self.peak, total)


def test_many_processes_together_cannot_fill_it_either(pool: SandboxPool) -> None:
    code = """
    import os, time
    for _ in range(16):
        if os.fork() == 0:
            held = []
            while True:
                held.append(b'x' * (1 << 20))
                time.sleep(0.002)
    time.sleep(60)
    """

    async def go() -> tuple[str | None, int]:
        session = await pool.session()
        with MemoryWatch(home_of(session)) as watch:
            done = await attack_in(session, code, 4.0)
        await session.close()
        return done.killed, watch.peak

    killed, peak = asyncio.run(go())
    assert killed == "memory"
    assert peak > LIMITS.memory_mib * MIB / 4, "the attack did not come near the limit"
    assert peak < 1.5 * LIMITS.memory_mib * MIB


def test_memory_shared_by_forks_is_counted_once(pool: SandboxPool) -> None:
    code = """
    import os, time
    held = b'x' * (60 << 20)
    for _ in range(8):
        if os.fork() == 0:
            time.sleep(0.5)
            os._exit(0)
    time.sleep(0.4)
    print(len(held))
    """
    assert attack(pool, code).output == f"{60 * MIB}\n"


def test_memory_that_no_process_shows_cannot_be_had(pool: SandboxPool) -> None:
    code = """
    import ctypes, mmap, os
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    got = []
    def is_refused(name, result):
        if result not in (-1, 2 ** 64 - 1, None):
            got.append(name)
    try:
        os.memfd_create('x')
        got.append('memfd')
    except OSError:
        pass
    try:
        mmap.mmap(-1, 1 << 20)
        got.append('shared mapping')
    except OSError:
        pass
    is_refused('shm', libc.shmget(0, ctypes.c_size_t(1 << 20), 0o1600))
    is_refused('msg', libc.msgget(0, 0o1600))
    is_refused('sem', libc.semget(0, 1, 0o1600))
    is_refused('mq', libc.mq_open(b'/x', os.O_CREAT | os.O_RDWR, 0o600, None))
    for name, flags in {'shared': 0x21, 'validated': 0x23, 'growing': 0x122}.items():
        is_refused(name, libc.mmap(None, ctypes.c_size_t(1 << 20), 3, flags, -1, ctypes.c_long(0)))
    is_refused('lock', libc.mlockall(3))
    print(got)
    for name in ('zero', 'shm/x', 'fuse', 'kvm', 'mem', 'tty', 'ptmx', 'fb0', 'sda', 'vda', 'net/tun'):
        if os.path.exists('/dev/' + name):
            print('there is', name)
    """
    assert attack(pool, code).output == "[]\n"


def test_sockets_hold_the_kernels_memory_and_are_counted(pool: SandboxPool) -> None:
    code = """
    import os, socket, time
    for _ in range(10):
        if os.fork() == 0:
            held = []
            try:
                while True: held += socket.socketpair()
            except OSError: pass
            time.sleep(60)
    time.sleep(60)
    """
    assert attack(pool, code).killed == "sockets"


def test_the_kernel_kills_the_sandbox_before_the_trainer(pool: SandboxPool) -> None:
    code = """
    print(open('/proc/self/oom_score_adj').read().strip())
    try:
        open('/proc/self/oom_score_adj', 'wb', buffering=0).write(b'-1000')
    except OSError:
        print('refused')
    """
    assert attack(pool, code).output == "1000\nrefused\n"


# -- disk


def test_tmp_is_limited_and_files_are(pool: SandboxPool) -> None:
    code = """
    import errno, os
    errors = set()
    for number in range(30):
        try:
            with open(f'/tmp/{number}', 'wb', buffering=0) as file:
                while True:
                    if not file.write(b'x' * 65536): break
        except OSError as error:
            errors.add(errno.errorcode[error.errno])
    print(sorted(errors), sum(os.path.getsize(f'/tmp/{n}') for n in range(30)), os.path.getsize('/tmp/0'))
    """
    done = attack(pool, code)
    names, total, first = re.fullmatch(r"(\[.*\]) (\d+) (\d+)\n", done.output).groups()  # type: ignore[union-attr]
    assert names == "['EFBIG', 'ENOSPC']"
    assert int(total) <= LIMITS.tmp_mib * MIB and int(first) <= LIMITS.file_mib * MIB


def test_so_are_empty_files(pool: SandboxPool) -> None:
    code = """
    import os
    made = 0
    try:
        for number in range(200000):
            os.close(os.open(f'/tmp/{number}', os.O_CREAT))
            made += 1
    finally:
        print('made', made)
    """
    done = attack(pool, code, timeout_s=6.0)
    assert done.killed == "files" or (done.error or "").startswith("OSError"), done


def test_nothing_but_tmp_can_be_written(pool: SandboxPool) -> None:
    name = f"winnow_attack_{uuid.uuid4().hex}"
    code = f"""
    import os
    written = []
    for folder, folders, _ in os.walk('/', onerror=lambda error: None):
        if folder == '/':
            folders.remove('proc')
        if folder.count('/') > 4:
            folders.clear()
        try:
            with open(os.path.join(folder, {name!r}), 'w') as file:
                file.write('x')
            written.append(folder)
        except OSError:
            pass
    for path in [os.__file__, '/dev/null', '/sandbox/inside/worker.py', '/etc/ld.so.cache', '/usr/lib/x']:
        for flags in (os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT):
            try:
                os.close(os.open(path, flags))
                written.append(path)
            except OSError:
                pass
    for path in [os.__file__, '/sandbox']:
        for change in (os.remove, lambda p: os.chmod(p, 0o777), lambda p: os.rename(p, '/tmp/x'),
                       lambda p: os.utime(p), lambda p: os.link(p, '/tmp/y')):
            try:
                change(path)
                written.append(path)
            except OSError:
                pass
    print(sorted(set(written)))
    """
    assert attack(pool, code).output == "['/dev/null', '/tmp']\n"
    places = ["/", "/tmp", "/var/tmp", "/dev/shm", "/dev", "/etc", os.path.expanduser("~"), os.getcwd(), "/usr/lib"]
    assert not [place for place in places if (Path(place) / name).exists()]


# -- output


@pytest.mark.parametrize(
    "code",
    [
        "while True: print('x' * 1000)",
        "import os\nwhile True: os.write(2, b'\\xff\\x00' * 30000)",
        "import os, sys\n[os.fork() for _ in range(3)]\nwhile True: os.write(1, b'x' * 65536)",
        "import sys, subprocess\nsubprocess.run([sys.executable, '-S', '-c', 'while True: print(1)'])",
    ],
    ids=["print", "bytes", "many", "child"],
)
def test_endless_output(pool: SandboxPool, code: str) -> None:
    done = attack(pool, code, timeout_s=0.7)
    assert done.timed_out and "bytes left out" in done.output
    assert len(done.output.encode()) < 3 * LIMITS.output_bytes + 200  # a byte that is no text takes three


def test_the_host_keeps_no_more_than_it_shows(pool: SandboxPool) -> None:
    """A flood of gigabytes passes through the sandbox's own supervisor, not through the trainer."""
    used = time.process_time()
    attack(pool, "import os\nwhile True: os.write(1, b'x' * 65536)", timeout_s=1.5)
    assert time.process_time() - used < 0.75
