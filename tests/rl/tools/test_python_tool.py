"""The python tool over a pool that is scripted: what it asks of the sandbox, and what the model reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from data.calls import ToolCall
from rl.tools.python import PythonTool
from rl.tools.runner import CallLimits, CallRecord, ToolBox


@dataclass(frozen=True)
class Execution:
    output: str = ""
    error: str | None = None
    timed_out: bool = False
    killed: str | None = None
    seconds: float = 0.0


@dataclass
class FakePool:
    """`behave(code)` is an Execution, an exception to raise, or None to hang."""

    behave: Callable[[str], Execution | Exception | None]
    opened: list[FakeSession] = field(default_factory=list)

    async def session(self) -> FakeSession:
        self.opened.append(FakeSession(self))
        return self.opened[-1]


@dataclass
class FakeSession:
    pool: FakePool
    ran: list[tuple[str, float | None]] = field(default_factory=list)
    closed: int = 0

    async def run(self, code: str, timeout_s: float | None = None) -> Execution:
        self.ran.append((code, timeout_s))
        found = self.pool.behave(code)
        if found is None:
            await asyncio.sleep(600)
            raise AssertionError
        if isinstance(found, Exception):
            raise found
        return found

    async def close(self) -> None:
        self.closed += 1


def play(tool: PythonTool, *codes: str, limits: CallLimits | None = None) -> list[CallRecord]:
    async def go() -> list[CallRecord]:
        box = ToolBox([tool], limits or CallLimits(max_calls=100))
        records = [(await box.run([ToolCall("python", {"code": code})]))[0] for code in codes]
        await box.close()
        return records

    return asyncio.run(go())


def test_one_session_serves_a_trajectory_and_is_closed() -> None:
    pool = FakePool(lambda code: Execution(f"ran {code}\n"))
    records = play(PythonTool(pool, timeout_s=7.0), "a", "b")
    assert [record.result for record in records] == ["ran a", "ran b"]
    assert [session.ran for session in pool.opened] == [[("a", 7.0), ("b", 7.0)]]
    assert pool.opened[0].closed == 1


def test_no_call_opens_no_session() -> None:
    pool = FakePool(lambda code: Execution())
    assert play(PythonTool(pool)) == []
    assert pool.opened == []


def test_what_the_model_reads() -> None:
    answers = {
        "nothing": Execution(),
        "blank": Execution("\n"),
        "traceback": Execution("Traceback ...\nValueError: no\n", error="ValueError: no"),
        "no words": Execution("Traceback ...\nMemoryError\n", error="MemoryError: "),
        "bare error": Execution("before\n", error="ValueError: no"),
        "interrupted": Execution("part", error="KeyboardInterrupt", timed_out=True),
        "too long": Execution("part\n", timed_out=True, killed="time"),
        "memory": Execution("", killed="memory"),
    }
    records = play(PythonTool(FakePool(answers.__getitem__), timeout_s=2.0), *answers)
    assert [(record.error, record.result) for record in records] == [
        (False, "(no output)"),
        (False, "(no output)"),
        (False, "Traceback ...\nValueError: no"),
        (False, "Traceback ...\nMemoryError"),
        (False, "before\nValueError: no"),
        (True, "Error: part\nKeyboardInterrupt\nthe code ran for longer than 2 s and was ended; the state is kept"),
        (
            True,
            "Error: part\nthe code ran for longer than 2 s and was ended;"
            " variables and imports are lost, the next call starts afresh",
        ),
        (
            True,
            "Error: the interpreter was ended (memory); variables and imports are lost, the next call starts afresh",
        ),
    ]


def test_executions_are_counted() -> None:
    pool = FakePool(lambda code: Execution("ok"))
    records = play(PythonTool(pool, max_executions=2), "a", "b", "c")
    assert [record.error for record in records] == [False, False, True]
    assert records[-1].result == "Error: 2 executions are used up: answer without further ones"
    assert len(pool.opened[0].ran) == 2


def test_the_defaults_are_the_papers() -> None:
    tool = PythonTool(FakePool(lambda code: Execution()))
    assert (tool.timeout_s, tool.max_executions) == (120.0, 20)


def test_a_call_cut_off_from_outside_closes_its_session_and_the_next_says_so() -> None:
    pool = FakePool(lambda code: None if code == "hang" else Execution("ok"))
    records = play(PythonTool(pool), "x = 1", "hang", "x", "x", limits=CallLimits(timeout_s=0.05))
    assert [record.result for record in records] == [
        "ok",
        "Error: python was cut off: no result within 0.05 s",
        "(a fresh interpreter: earlier variables and imports are lost)\nok",
        "ok",
    ]
    assert [session.closed for session in pool.opened] == [1, 1]


def test_a_sandbox_that_fails_costs_the_call() -> None:
    pool = FakePool(lambda code: OSError("no room") if code == "bad" else Execution("ok"))
    records = play(PythonTool(pool), "bad", "good")
    assert records[0].result == "Error: OSError: no room"
    assert records[1].result.endswith("\nok") and not records[1].error
    assert [session.closed for session in pool.opened] == [1, 1]
