"""Protection is tried, never assumed; and what comes out of a sandbox is not believed."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from conf.errors import UserError
from rl.sandbox import UNPROTECTED, Limits, SandboxPool, find_protection, run_program
from rl.sandbox import protection as protection_module
from rl.sandbox.box import Box, BoxLost
from rl.sandbox.inside import seccomp
from rl.sandbox.probe import probe, weaknesses
from rl.sandbox.protection import Protection, environment, view


def test_a_mode_that_is_not_known_is_named() -> None:
    with pytest.raises(UserError, match=r"rl\.tools\.sandbox=bublewrap is not known: did you mean bubblewrap\?"):
        find_protection("bublewrap")


def test_auto_takes_the_first_that_works(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_protection(mode).name == mode
    if mode == "namespaces":
        monkeypatch.setenv("PATH", "/nowhere")
        assert find_protection("auto").name == "namespaces"
        with pytest.raises(UserError, match="no bwrap on PATH"):
            find_protection("bubblewrap")
    else:
        assert find_protection("auto").name == "bubblewrap"


def test_without_any_it_refuses_in_one_line_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.sandbox.probe.probe", lambda protection: "unshare: Operation not permitted\n")
    with pytest.raises(UserError) as refused:
        find_protection("auto")
    message = str(refused.value)
    assert "\n" not in message and "namespaces: unshare: Operation not permitted" in message
    assert f"rl.tools.sandbox={UNPROTECTED}" in message
    with pytest.raises(UserError):
        SandboxPool(mode="auto").open()


@pytest.fixture
def fake_bwrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    program = tmp_path / "bwrap"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    yield program


# Something called bwrap that runs the command without isolating it: what a broken installation would be.
FAKE = """#!{python}
import json, os, sys
words = sys.argv[1:]
info = int(words[words.index('--info-fd') + 1])
os.write(info, json.dumps({{'child-pid': os.getpid()}}).encode())
os.close(info)
command = words[words.index('--') + 1:]
os.execv(command[0], [word.replace('/sandbox', {inside!r}) for word in command])
"""


def test_a_bwrap_that_does_not_isolate_is_refused(fake_bwrap: Path) -> None:
    inside = str(protection_module.INSIDE.parent)
    fake_bwrap.write_text(FAKE.format(python=sys.executable, inside=inside))
    fake_bwrap.chmod(0o755)
    with pytest.raises(UserError, match="bubblewrap: "):
        find_protection("bubblewrap")
    fake_bwrap.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    with pytest.raises(UserError, match="setting up uid map: Permission denied"):
        find_protection("bubblewrap")


def test_the_probe_sees_each_weakness() -> None:
    found = weaknesses(os.getpid())
    for part in ("mnt", "pid", "net", "ipc", "uts", "user"):
        assert f"it shares the {part} namespace" in found
    assert {"it may gain privileges", "its system calls are not filtered"} <= set(found)
    assert "it is not the first process of its namespace" in found
    if os.geteuid() == 0:
        assert "it is root" in found and any("capabilities" in each for each in found)


@pytest.mark.parametrize("missing", ["--unshare-net", "--unshare-ipc"])
def test_a_bubblewrap_with_one_namespace_less_fails_the_probe(mode: str, missing: str, monkeypatch) -> None:
    if mode != "bubblewrap":
        pytest.skip("this takes a word out of bubblewrap's command line")
    whole = Protection._bubblewrap
    monkeypatch.setattr(
        Protection, "_bubblewrap", lambda self, *rest: [word for word in whole(self, *rest) if word != missing]
    )
    assert f"it shares the {missing.removeprefix('--unshare-')} namespace" in (probe(Protection(mode, view())) or "")


def test_a_private_folder_among_the_libraries_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    view()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="a sandbox would show your home"):
        view()


def test_the_environment_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    monkeypatch.setenv("LD_PRELOAD", "x")
    assert "x" not in environment().values()


@pytest.mark.parametrize("field", ["timeout_s", "memory_mib", "processes", "cpu_s"])
def test_a_limit_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(UserError, match=f"{field}=0 must be above 0"):
        replace(Limits(), **{field: 0})


HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0),
    "aarch64": ("/usr/include/asm-generic/unistd.h", 1),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_call_numbers_are_the_kernels(machine: str) -> None:
    path, column = HEADERS[machine]
    if not os.path.exists(path):
        pytest.skip(f"the kernel's headers are not installed: {path}")
    numbers: dict[str, int] = {}
    for line in Path(path).read_text().splitlines():
        words = line.split()
        if len(words) >= 3 and words[0] == "#define" and words[1].startswith("__NR") and words[2].isdigit():
            numbers[words[1].removeprefix("__NR3264_").removeprefix("__NR_")] = int(words[2])
    table = {name: pair[column] for name, pair in seccomp.REFUSED.items()}
    table |= {n.lower(): getattr(seccomp, n)[column] for n in ("CLONE", "CLONE3", "SOCKET", "SOCKETPAIR", "MMAP")}
    table |= {n.lower(): getattr(seccomp, n)[column] for n in ("PRLIMIT64", "SETPRIORITY")}
    table |= seccomp.ONLY_X86 if machine == "x86_64" else {}
    assert table == {name: numbers[name] for name in table}


# -- a sandbox that lies


@dataclass(frozen=True)
class Liar(Protection):
    """A supervisor that greets and then says whatever it likes."""

    script: str = ""

    @property
    def isolated(self) -> bool:
        return False

    def command(self, limits: Limits, info_fd: int) -> list[str]:
        greet = "import os, struct, sys, time, json\ndef pack(b): return struct.pack('>I', len(b)) + b\n"
        greet += "os.read(0, 65536)\nos.write(0, pack(b'{\"ready\": true}'))\nos.read(0, 65536)\n"
        return [sys.executable, "-S", "-c", greet + self.script]


LIES = {
    "closes": "",
    "garbage": "os.write(0, b'\\xff' * 100)",
    "endless": "while True: os.write(0, b'\\x00\\x00\\x10\\x00' + b'x' * 4096)",
    "huge": "os.write(0, b'\\x7f\\xff\\xff\\xff')\nwhile True: os.write(0, b'x' * 65536)",
    "half": "os.write(0, b'\\x00\\x00\\x10\\x00xx')\ntime.sleep(60)",
    "silent": "time.sleep(60)",
    "list": "os.write(0, pack(b'[1]'))",
    "deep": "os.write(0, pack(b'[' * 60000))",
    "deep object": "os.write(0, pack(b'{\"a\":' * 10000))",
    "wrong types": 'os.write(0, pack(b\'{"output": 1, "error": null, "killed": null}\'))',
    "missing": 'os.write(0, pack(b\'{"output": ""}\'))',
    "binary": "os.write(0, pack(b'\\xff\\xfe\\x00'))",
    "huge int": "os.write(0, pack(b'{\"output\": ' + b'9' * 60000 + b'}'))",
}


@pytest.mark.parametrize("lie", LIES)
def test_whatever_a_sandbox_says_is_a_lost_box_and_no_other_error(lie: str) -> None:
    async def go() -> None:
        box = await Box.start(Liar(UNPROTECTED, view(), LIES[lie]), Limits(output_bytes=1000))
        try:
            started = time.monotonic()
            with pytest.raises(BoxLost):
                await box.ask({"do": "cell", "code": "1", "timeout_s": 1.0}, 1.0)
            assert time.monotonic() - started < 2.0
            box.process.wait(1.0)  # TimeoutExpired: it was left alive
        finally:
            await box.close()
        assert box.process.poll() is not None

    asyncio.run(go())


def test_an_answer_of_the_right_shape_is_taken() -> None:
    answer = json.dumps({"output": "a", "error": None, "killed": None, "timed_out": 1}).encode()
    script = f"os.write(0, {struct.pack('>I', len(answer)) + answer!r})\ntime.sleep(60)"

    async def go() -> None:
        box = await Box.start(Liar(UNPROTECTED, view(), script), Limits())
        done = await box.ask({"do": "cell", "code": "1", "timeout_s": 1.0}, 5.0)
        assert (done.output, done.error, done.timed_out) == ("a", None, False)  # 1 is not True
        await box.close()

    asyncio.run(go())


# -- without protection, by its own name only


def test_unprotected_works_limits_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINNOW_PLANTED_SECRET", "x")

    async def go() -> tuple[str, int]:
        async with SandboxPool(Limits(timeout_s=1.0, memory_mib=128), UNPROTECTED, warm=0) as pool:
            session = await pool.session()
            assert (await session.run("x = 1\nx")).output == "1\n"
            assert (await session.run("import os\n'WINNOW_PLANTED_SECRET' in os.environ")).output == "False\n"
            late = await session.run("while True: pass", 0.3)
            assert late.timed_out and late.killed is None
            stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
            assert (await session.run(stubborn, 0.3)).killed == "time"
            folder = (await session.run("import os; print(os.getcwd())")).output.splitlines()[-1]
            fork = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(600)\nprint(os.getpid())"
            pid = int((await session.run(fork)).output)
            assert (await run_program(pool, "print(input())", "7", 2.0)).output == "7\n"
            children = [p for p in os.listdir("/proc") if p.isdigit() and parent(p) == pid]
            assert len(children) == 1
            await session.close()
            return folder, int(children[0])

    folder, child = asyncio.run(go())
    assert not os.path.exists(folder) and not os.path.exists(f"/proc/{child}")


def parent(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1
