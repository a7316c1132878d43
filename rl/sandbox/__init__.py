"""Where model-written code runs: sandboxes that it cannot leave, a pool of them, and a Python session in one.

    async with SandboxPool(Limits()) as pool:
        session = await pool.session()
        print((await session.run("x = 6 * 7\\nx")).output)
        await session.close()

What is promised and what is not: docs/sandbox.md.
"""

from rl.sandbox.limits import Execution, Limits
from rl.sandbox.pool import SandboxBusy, SandboxPool, Session, run_program
from rl.sandbox.protection import UNPROTECTED, Protection, find_protection

__all__ = [
    "UNPROTECTED",
    "Execution",
    "Limits",
    "Protection",
    "SandboxBusy",
    "SandboxPool",
    "Session",
    "find_protection",
    "run_program",
]
