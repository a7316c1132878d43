"""Tools by name, what they share, and the mistakes of those who name them."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from conf.schema import ToolsConfig
from data.calls import ToolCall
from rl.tools import search, shared
from rl.tools.python import PythonTool
from rl.tools.registry import open_tools
from rl.tools.runner import CallLimits, ToolBox
from rl.tools.shared import Shared
from tests.rl.tools.own_tools import Echo
from tests.rl.tools.test_python_tool import Execution, FakePool

OWN = "tests.rl.tools.own_tools"
SERVER = f"{sys.executable} {Path(__file__).with_name('mcp_server.py')}"


@pytest.fixture
def corpus_path(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"id": "a", "title": "Alpha", "text": "one two"}) + "\n")
    return str(path)


class Pool(FakePool):
    closed = 0

    def shut(self) -> None:
        self.closed += 1


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool(lambda code: Execution("ran"))
    monkeypatch.setattr(shared, "_open_pool", lambda config: made)
    return made


def opened(tmp_path: Path, *names: str, **config: Any) -> list[str]:
    with Shared(ToolsConfig(names=names, **config), tmp_path) as run:
        return [tool.name for tool in open_tools(names, run)]


def test_every_built_in_tool_opens_and_has_a_sound_schema(tmp_path: Path, corpus_path: str, pool: Pool) -> None:
    names = ("calculator", "python", "search", "open", "submit")
    with Shared(ToolsConfig(names=names, corpus=corpus_path), tmp_path) as run:
        tools = open_tools(names, run)
        assert tuple(tool.name for tool in tools) == names
        assert json.loads(json.dumps([tool.schema() for tool in tools]))[0]["function"]["name"] == "calculator"
        ToolBox(tools, run.limits)


def test_tools_are_a_trajectorys_own_and_what_is_dear_is_shared(tmp_path: Path, corpus_path: str, pool: Pool) -> None:
    names = ("search", "python")
    with Shared(ToolsConfig(names=names, corpus=corpus_path), tmp_path) as run:
        assert run._source is None and run._pool is None  # nothing is made before it is wanted
        first, second = open_tools(names, run), open_tools(names, run)
        assert all(a is not b for a, b in zip(first, second, strict=True))
        assert first[0].source is second[0].source  # type: ignore[attr-defined]
        assert first[1].pool is second[1].pool is pool  # type: ignore[attr-defined]
        assert pool.opened == []  # a session is taken at the first call
    assert pool.closed == 1


def test_the_index_is_built_once_by_many_threads(
    tmp_path: Path, corpus_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    read = search.Corpus.read
    monkeypatch.setattr(search.Corpus, "read", lambda path: (built.append(path), read(path))[1])
    with Shared(ToolsConfig(corpus=corpus_path), tmp_path) as run, ThreadPoolExecutor(8) as threads:
        barrier = threading.Barrier(8)

        def go() -> object:
            barrier.wait()
            return open_tools(("search",), run)[0].source  # type: ignore[attr-defined]

        assert len({id(future.result()) for future in [threads.submit(go) for _ in range(8)]}) == 1
    assert built == [corpus_path]


def test_what_the_config_says_reaches_the_tools(tmp_path: Path, pool: Pool) -> None:
    config = ToolsConfig(timeout_s=50.0, max_calls=7, seconds=90.0, result_chars=123)
    with Shared(config, tmp_path) as run:
        assert run.limits == CallLimits(timeout_s=50.0, max_calls=7, total_seconds=90.0, max_result_chars=123)
        (python,) = open_tools(("python",), run)
        assert isinstance(python, PythonTool)
        assert (python.timeout_s, python.max_executions) == (47.0, 7)  # before the runner's own deadline
    with Shared(ToolsConfig(timeout_s=1.0), tmp_path) as run:
        (python,) = open_tools(("python",), run)
        assert isinstance(python, PythonTool) and python.timeout_s == 0.75


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    with Shared(ToolsConfig(), tmp_path) as run:
        (tool,) = open_tools((f"{OWN}:Echo",), run)
        assert type(tool) is Echo
        assert asyncio.run(ToolBox([tool], run.limits).run([ToolCall("echo", {"text": "a"})]))[0].result == "a"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("calculater", "there is no tool calculater: did you mean calculator"),
        ("", "there is no tool : valid: calculator"),
        ("no_such_module_x:Echo", "No module named 'no_such_module_x': is its folder on PYTHONPATH"),
        (f"{OWN}:Ecko", "Ecko does not exist: did you mean Echo"),
        (f"{OWN}:NotATool", r"NotATool is no class that extends rl\.tools\.tool\.Tool"),
        (f"{OWN}:A_VALUE", "A_VALUE is no class that extends"),
        ("json:JSONDecoder", "json holds no such class"),
        (f"{OWN}:NoCall", "NoCall has no method call"),
        (f"{OWN}:NotAsync", "its method call is no coroutine"),
        (f"{OWN}:Nameless", "the class has no `name`"),
        (f"{OWN}:BadName", "'no name' is no name for a tool"),
        (f"{OWN}:BadSchema", "the tool echo: parameters are no JSON schema .*sting"),
        (f"{OWN}:NoObject", 'the tool echo: parameters are no JSON schema .*its "type" is not "object"'),
        (f"{OWN}:Unmakeable", r"Unmakeable\(\) raised RuntimeError: no luck"),
        ("tests.rl.tools.test_registry.no:X", "No module named"),
    ],
)
def test_a_bad_name_is_one_line(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        opened(tmp_path, name)
    assert "\n" not in str(caught.value)


def test_two_tools_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are both tools named submit"):
        opened(tmp_path, "submit", "calculator", "submit")


def test_tools_of_mcp_servers_come_last(tmp_path: Path) -> None:
    assert opened(tmp_path, "submit", mcp=(SERVER,))[:3] == ["submit", "add", "count"]
    with pytest.raises(UserError, match=r"rl\.tools\.mcp: add and rl\.tools\.mcp: add are both tools named add"):
        opened(tmp_path, mcp=(SERVER, SERVER))
    with pytest.raises(UserError, match="the server does not start"):
        opened(tmp_path, mcp=("no_such_program_anywhere",))
    assert not [thread for thread in threading.enumerate() if thread.name == "mcp"]


def test_search_needs_one_place_to_look_in(tmp_path: Path, corpus_path: str) -> None:
    with pytest.raises(UserError, match=r"give rl\.tools\.corpus or rl\.tools\.search_url"):
        opened(tmp_path, "search")
    with pytest.raises(UserError, match="are both given"):
        opened(tmp_path, "open", corpus=corpus_path, search_url="http://127.0.0.1:1/")
    with pytest.raises(UserError, match="search_url=nowhere is no http"):
        opened(tmp_path, "search", search_url="nowhere")
    assert opened(tmp_path, "search", "open", search_url="http://127.0.0.1:1/") == ["search", "open"]


def test_a_pool_that_cannot_be_made_ends_the_run_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: ToolsConfig) -> None:
        raise UserError("no protection here")

    monkeypatch.setattr(shared, "_open_pool", refuse)
    with pytest.raises(UserError, match="no protection here"):
        opened(tmp_path, "python")


def test_it_closes_inside_a_running_loop(tmp_path: Path, pool: Pool) -> None:
    async def go() -> None:
        opened(tmp_path, "python")

    asyncio.run(go())
    assert pool.closed == 1
