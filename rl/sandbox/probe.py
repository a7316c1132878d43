"""Whether a way to isolate works here: one sandbox is started, runs a line, and the kernel is asked what it is."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from rl.sandbox.box import Box, BoxLost
from rl.sandbox.limits import Limits
from rl.sandbox.protection import Protection

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "user")


def weaknesses(pid: int) -> list[str]:
    """What the process lacks of isolation, by what the kernel says of it outside. `pid`: a sandbox's first process."""
    found = [
        name for name in NAMESPACES if os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}")
    ]
    found = [f"it shares the {name} namespace" for name in found]
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    status = {key: value.split() for key, _, value in lines}
    if "0" in status["Uid"] + status["Gid"] + status["Groups"]:
        found.append("it is root")
    held = [name for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(status[name][0], 16)]
    if held:
        found.append(f"it has capabilities ({', '.join(held)})")
    if status["NoNewPrivs"] != ["1"]:
        found.append("it may gain privileges")
    if status["Seccomp"] != ["2"]:
        found.append("its system calls are not filtered")
    if status["NSpid"][-1] != "1":
        found.append("it is not the first process of its namespace")
    return found


async def _try(protection: Protection) -> str | None:
    try:
        box = await Box.start(protection, Limits(memory_mib=256))
    except BoxLost as error:
        return str(error)
    try:
        assert box.first is not None
        found = weaknesses(box.first)
        answer = await box.ask({"do": "cell", "code": "6 * 7", "timeout_s": 10.0}, 20.0)
        if answer.output.strip() != "42":
            found.append(f"6 * 7 gave {answer.output[:200]!r} ({answer.error})")
        return ", ".join(found) or None
    except (BoxLost, OSError) as error:
        return str(error)
    finally:
        await box.close()


def probe(protection: Protection) -> str | None:
    """Why `protection` does not work, or None. In a thread of its own: the caller may be in an event loop."""
    results: list[str | None] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(_try(protection))))
    thread.start()
    thread.join()
    return results[0] if results else "the trial itself failed"
