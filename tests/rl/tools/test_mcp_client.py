"""MCP servers as real processes (mcp_server.py): calls, deaths, hangs, their environment and their logs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.errors import UserError
from data.calls import ToolCall
from rl.tools import mcp_client
from rl.tools.mcp_client import McpServers
from rl.tools.runner import CallLimits, CallRecord, ToolBox

SERVER = f"{sys.executable} {Path(__file__).with_name('mcp_server.py')}"
DIED = "Error: the tool's server died in this call; the next call starts it anew"


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[McpServers]:
    opened = McpServers([SERVER], tmp_path / "run", rank=3, timeout_s=1.0)
    try:
        yield opened
    finally:
        opened.close()


async def play(servers: McpServers, *calls: ToolCall, timeout_s: float = 5.0) -> list[CallRecord]:
    """One after another."""
    box = ToolBox(servers.tools(), CallLimits(timeout_s=timeout_s, max_calls=100))
    records = [(await box.run([call]))[0] for call in calls]
    await box.close()
    return records


def told(servers: McpServers, *calls: ToolCall) -> list[str]:
    return [record.result for record in asyncio.run(play(servers, *calls))]


def loops() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mcp"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ended(pid: int, seconds: float = 8.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def test_tools_and_schemas_are_the_servers(servers: McpServers) -> None:
    tools = {tool.name: tool for tool in servers.tools()}
    assert set(tools) == {"add", "count", "who", "die", "fail", "sleep", "hang", "variable"}
    assert tools["add"].description == "Adds two integers."
    assert tools["add"].parameters["required"] == ["a", "b"]
    assert told(servers, ToolCall("add", {"a": 1, "b": 2}), ToolCall("add", {"a": "x", "b": 2})) == [
        "3",
        "Error: bad arguments for add: a: 'x' is not of type 'integer'",
    ]


def test_one_process_serves_all_loops_and_threads_and_ends(servers: McpServers) -> None:
    assert not loops() and servers.tools() and len(loops()) == 1
    pids = set(told(servers, ToolCall("who")) + told(servers, ToolCall("who")))
    thread = threading.Thread(target=lambda: pids.update(told(servers, ToolCall("who"))))
    thread.start()
    thread.join()
    assert len(pids) == 1
    began = time.monotonic()
    servers.close()
    assert time.monotonic() - began < 8
    assert ended(int(pids.pop()), 0.5)
    assert not loops()


def test_a_tool_that_raises(servers: McpServers) -> None:
    failed, good = asyncio.run(play(servers, ToolCall("fail"), ToolCall("count")))
    assert failed.error and "fail" in failed.result
    assert good.result == "1"


def test_a_death_costs_the_calls_under_way_and_the_next_starts_the_server(servers: McpServers) -> None:
    async def go() -> list[list[CallRecord]]:
        sleeper = play(servers, ToolCall("sleep", {"seconds": 0.8}), ToolCall("count"))
        await asyncio.sleep(0)
        killer = play(servers, ToolCall("count"), ToolCall("die"), ToolCall("count"), ToolCall("count"))
        return list(await asyncio.gather(sleeper, killer))

    sleeper, killer = asyncio.run(go())
    assert [record.result for record in killer][:2] == ["1", DIED]
    assert killer[1].error and killer[1].seconds < 1
    assert sleeper[0].result == DIED
    assert sorted([sleeper[1].result, *(record.result for record in killer[2:])]) == ["1", "2", "3"]  # one new server


def test_a_server_killed_in_a_call(servers: McpServers) -> None:
    pid = int(told(servers, ToolCall("who"))[0])
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    results = told(servers, ToolCall("sleep", {"seconds": 0.9}), ToolCall("who"))
    timer.join()
    assert results[0] == DIED
    assert results[1].isdecimal() and results[1] != str(pid)


def test_a_slow_call_costs_itself_alone(servers: McpServers) -> None:
    pid, late, after = told(servers, ToolCall("who"), ToolCall("sleep", {"seconds": 2}), ToolCall("who"))
    assert late == "Error: the tool's server gave no result within 1 s"
    assert after == pid


def test_a_hung_server_is_replaced(servers: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_client, "PROBE_S", 0.3)
    pid, late = told(servers, ToolCall("who"), ToolCall("hang"))
    assert late.startswith("Error: the tool's server gave no result")
    time.sleep(0.6)
    (after,) = told(servers, ToolCall("who"))
    assert after.isdecimal() and after != pid
    assert ended(int(pid))


def test_a_call_cut_off_by_the_runner(servers: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's deadline comes first: the hung server is found out all the same."""
    monkeypatch.setattr(mcp_client, "PROBE_S", 0.3)
    (pid,) = told(servers, ToolCall("who"))
    (late,) = asyncio.run(play(servers, ToolCall("hang"), timeout_s=0.2))
    assert late.result == "Error: hang was cut off: no result within 0.2 s"
    time.sleep(0.6)
    (after,) = told(servers, ToolCall("who"))
    assert after.isdecimal() and after != pid


def test_a_server_that_keeps_dying_is_left_alone_for_a_while(
    servers: McpServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    die = ToolCall("die")
    results = told(servers, die, die, die, die, ToolCall("who"))
    left_alone = "Error: the tool's server keeps dying and is left alone for a while: try other tools"
    assert results == [DIED] * 3 + [left_alone] * 2
    for server in {server for server, _ in servers._listed}:
        monkeypatch.setattr(server, "retry_at", 0.0)  # the while is over
    first, died, last = told(servers, ToolCall("who"), die, ToolCall("who"))
    assert died == DIED and first.isdecimal() and last.isdecimal()  # a result ends the row of deaths


def test_the_environment_is_a_list_of_allowed_names(servers: McpServers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cret")
    monkeypatch.setenv("TZ", "UTC")
    names = ("SOME_API_KEY", "TZ", "PATH")
    results = told(servers, *(ToolCall("variable", {"name": name}) for name in names))
    assert results == ["(unset)", "UTC", os.environ["PATH"]]


def test_stderr_goes_to_the_log_of_the_rank(
    servers: McpServers, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told(servers, ToolCall("die"))
    servers.close()
    assert "dying as told" in (tmp_path / "run" / "mcp.0.rank_3.log").read_text()
    assert "dying as told" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no_such_program_anywhere", "FileNotFoundError"),
        (f"{sys.executable} -c 'raise SystemExit(3)'", "Connection closed"),
        (f"{sys.executable} -c 'unclosed", "No closing quotation"),
        ("", "not enough values"),
        (f"{sys.executable} -c 'import time; time.sleep(60)'", "Timeout"),
    ],
)
def test_a_server_that_does_not_start(
    tmp_path: Path, command: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_client, "START_S", 2.0)
    servers = McpServers([command], tmp_path)
    with pytest.raises(UserError, match=f"the server does not start .*{reason}.*mcp.0.rank_0.log") as caught:
        servers.tools()
    assert "\n" not in str(caught.value)
    assert not loops()
    servers.close()


def test_no_commands_start_nothing(tmp_path: Path) -> None:
    servers = McpServers([], tmp_path / "run")
    assert servers.tools() == []
    servers.close()
    assert not (tmp_path / "run").exists()


def test_64_trajectories_on_a_server_that_dies(servers: McpServers, caplog: pytest.LogCaptureFixture) -> None:
    """Every eighth kills it in the middle of the others' calls. All end, each call within its limit."""
    caplog.set_level(logging.ERROR)

    async def trajectory(number: int) -> list[CallRecord]:
        await asyncio.sleep(0.01 * (number % 8))
        first = ToolCall("die") if number % 8 == 7 else ToolCall("sleep", {"seconds": 0.3})
        return await play(servers, ToolCall("count"), first, ToolCall("add", {"a": number, "b": 1}), timeout_s=8.0)

    async def go() -> list[list[CallRecord]]:
        return await asyncio.gather(*(trajectory(number) for number in range(64)))

    servers.tools()
    began = time.monotonic()
    all_records = asyncio.run(go())
    assert time.monotonic() - began < 20
    for records in all_records:
        assert len(records) == 3 and all(record.seconds < 8.5 for record in records)
    assert all_records[7][1].error
    assert any(not records[-1].error for records in all_records)
    assert told(servers, ToolCall("add", {"a": 1, "b": 1})) == ["2"]
