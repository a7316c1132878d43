"""The traces command: verified rows of the train split, the same for the same command, whole or not at all, and one
line with status 2 for a mistake."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from data.calls import ToolCall
from data.split import is_heldout
from launch import traces as command
from launch.traces import main
from rl.env.environment import EnvProblem, Said, Solution
from rl.env.registry import ENVIRONMENTS
from rl.env.traces import AGAIN
from tests.rl.env.local_pool import LocalPool, install


@pytest.fixture(autouse=True)
def local_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    out = tmp_path / "traces.jsonl"
    assert main([*arguments, "--out", str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"]
    return rows(out)


def test_rows_of_several_environments_in_equal_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = write(tmp_path, "calculator:2", "search", "tickets:3", "--num", "61", "--seed", "3")
    assert len(found) == 61 and all(set(row) == {"messages", "tools"} for row in found)
    names = [row["tools"][0]["function"]["name"] for row in found]
    assert [names.count(name) for name in ("calculator", "search", "list_events")] == [21, 20, 20]
    assert "61 traces of" in capsys.readouterr().out


def test_the_same_command_writes_the_same_and_another_seed_does_not(tmp_path: Path) -> None:
    arguments = ["calculator:1", "search:2", "--num", "40", "--slips", "0.5"]
    first = write(tmp_path, *arguments)
    assert write(tmp_path, *arguments) == first != write(tmp_path, *arguments, "--seed", "1")


def test_only_the_train_split_is_shown(tmp_path: Path) -> None:
    """At a share of a half, a mistake here would show in every second row."""
    found = write(tmp_path, "calculator:3", "--num", "40", "--heldout", "0.5")
    environment = ENVIRONMENTS["calculator"]
    problems = {(one := environment.problem_at(i, "train", 0, 3, 0.5)).prompt: one for i in range(40)}
    assert [row["messages"][0]["content"] for row in found] == list(problems)
    assert not any(is_heldout(problem.key, 0.5) for problem in problems.values())


def test_slips_come_in_the_share_that_is_asked_for(tmp_path: Path) -> None:
    def slipped(row: dict[str, Any]) -> bool:
        return any(message.get("reasoning_content") in AGAIN for message in row["messages"])

    assert not any(map(slipped, write(tmp_path, "calculator:2", "--num", "60")))
    some = sum(map(slipped, write(tmp_path, "calculator:2", "--num", "200", "--slips", "0.4")))
    assert 30 < some < 90  # 0.4 of 200, of which one in four has two calls and slips at neither


def test_some_traces_answer_at_once(tmp_path: Path) -> None:
    def calls(row: dict[str, Any]) -> bool:
        return any("tool_calls" in message for message in row["messages"])

    whole = write(tmp_path, "search:1", "--num", "100")
    some = write(tmp_path, "search:1", "--num", "100", "--at-once", "0.4")
    assert all(map(calls, whole)) and 20 < sum(not calls(row) for row in some) < 60
    for mine, theirs in zip(some, whole, strict=True):
        said = theirs["messages"]
        assert mine == theirs if calls(mine) else mine == {**theirs, "messages": [said[0], said[-1]]}


def test_what_only_calls_can_do_is_never_answered_at_once(tmp_path: Path) -> None:
    rows = write(tmp_path, "tickets:1", "--num", "40", "--at-once", "0.5")
    assert 5 < len(rows) < 35 and all(any("tool_calls" in message for message in row["messages"]) for row in rows)


def test_bare_rows_lack_the_schemas_and_nothing_else(tmp_path: Path) -> None:
    whole = write(tmp_path, "calculator:1", "--num", "40")
    some = write(tmp_path, "calculator:1", "--num", "40", "--bare", "0.5")
    assert [row["messages"] for row in some] == [row["messages"] for row in whole]
    assert all("tools" in row for row in whole) and 8 < sum("tools" in row for row in some) < 32
    assert not any("tools" in row for row in write(tmp_path, "calculator:1", "--num", "20", "--bare", "1"))


def test_programs_are_given_a_pool_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    class Watched(LocalPool):
        def __init__(self, limits: Any = None, mode: str = "auto", warm: int = 0) -> None:
            modes.append(mode)
            super().__init__(limits, mode, warm)

    import importlib

    monkeypatch.setattr(importlib.import_module("rl.sandbox"), "SandboxPool", Watched)
    found = write(tmp_path, "programs:1", "programs:2", "--num", "6", "--sandbox", "namespaces")
    assert len(found) == 6 and modes == ["namespaces"]
    assert ENVIRONMENTS["programs"].pool is None  # type: ignore[attr-defined]


def test_what_the_verifier_refuses_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = type(ENVIRONMENTS["calculator"])
    solve = environment.solve

    def sometimes(self: Any, problem: EnvProblem) -> Solution:
        return solve(self, problem) if int(problem.answer) % 2 else _seven()

    def _seven() -> Solution:
        yield Said("Try.", calls=(ToolCall("calculator", {"expression": "3+4"}),))
        return Said("It is 7.", "7")

    monkeypatch.setattr(environment, "solve", sometimes)
    found = write(tmp_path, "calculator:1", "--num", "60")
    assert 0 < len(found) < 60 and all(int(row["messages"][-1]["content"]) % 2 for row in found)
    assert f"{60 - len(found)} left out" in capsys.readouterr().out
    monkeypatch.setattr(environment, "solve", lambda self, problem: _seven())
    assert main(["calculator:1", "--num", "5", "--out", str(tmp_path / "none.jsonl")]) == 2
    assert "not one of 5 traces is right" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


def test_an_old_file_stays_where_the_new_one_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path, "calculator:1", "--num", "5")
    played = 0

    async def dies(*arguments: Any) -> Any:
        nonlocal played
        played += 1
        if played > 20:
            raise RuntimeError("the machine went down")
        return await play(*arguments)

    play = command.play
    monkeypatch.setattr(command, "play", dies)
    with pytest.raises(RuntimeError, match="went down"):
        main(["calculator:1", "--num", "100", "--out", str(tmp_path / "traces.jsonl")])
    assert played > 20 and rows(tmp_path / "traces.jsonl") == before
    assert [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["calculater"], "did you mean calculator?"),
        (["search:9"], "search has 1 to 3"),
        ([], "the following arguments are required: ENV[:LEVEL]"),
        (["search", "--num", "0"], "--num 0 writes nothing"),
        (["search", "--num", "many"], "invalid int value: 'many'"),
        (["search", "--slips", "1.5"], "--slips 1.5 is no share"),
        (["search", "--at-once", "1"], "--at-once 1 is no share: give 0 or more, less than 1"),
        (["search", "--bare", "1.5"], "--bare 1.5 is no share: give 0 to 1"),
        (["search", "--heldout", "nan"], "--heldout nan is no share"),
        (["search", "--sede", "1"], "unrecognized arguments: --sede 1"),
        (["search", "--out", "traces.json"], "is no .jsonl"),
        (["verifiers:nothing", "--num", "1"], "verifiers:nothing"),
    ],
)
def test_mistakes_are_one_line_with_status_2(
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("traces: ") and reason in said and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_file_that_cannot_be_written_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for out, reason in (
        (tmp_path / "file" / "a.jsonl", "cannot be written"),
        (tmp_path / "folder.jsonl", "is a folder"),
    ):
        assert main(["search", "--num", "1", "--out", str(out)]) == 2
        assert reason in capsys.readouterr().err


def test_more_environments_than_traces(tmp_path: Path) -> None:
    given = command.parse(["calculator", "search", "--num", "1", "--out", str(tmp_path / "one.jsonl")])
    assert asyncio.run(command.write_traces(given)) == (1, 1, 0)
