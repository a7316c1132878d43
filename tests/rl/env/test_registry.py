"""Environments as a run names them, and their problems as prompts."""

from __future__ import annotations

from itertools import islice

import pytest

from conf.errors import UserError
from data.split import is_heldout
from rl.env.registry import ENVIRONMENTS, choose
from rl.prompts import env_prompts


def test_built_in_and_own_environments_are_found():
    assert choose("search") == (ENVIRONMENTS["search"], 1) and choose("tickets:3") == (ENVIRONMENTS["tickets"], 3)
    own, level = choose("tests.rl.test_tool_loop:EchoWorld:1")
    assert own.name == "echo" and level == 1
    assert choose("tests.rl.test_tool_loop:EchoWorld") == (own, 1), "made once"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("serch", "did you mean search?"),
        ("search:4", "search has 1 to 3"),
        ("search:0", "search has 1 to 3"),
        ("verifiers", "names no taskset: give verifiers:ID"),
        ("nowhere.at_all:World", "is its folder on PYTHONPATH?"),
        ("rl.env.search:Nothing", "is no class that fills in"),
        ("rl.env.environment:Environment", "is no class that fills in"),
        ("tests.rl.test_tool_loop:EchoWorld:2", "has 1 to 1"),
    ],
)
def test_what_is_not_there_is_one_line(given: str, reason: str):
    with pytest.raises(UserError) as caught:
        choose(given)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("env", ["calculator:2", "search"])
def test_problems_as_prompts_keep_to_their_split_and_can_be_reached_at_once(env: str):
    train = list(islice(env_prompts(env, "train", 3, 0.2), 30))
    assert list(islice(env_prompts(env, "train", 3, 0.2, start=12), 18)) == train[12:]
    held = list(islice(env_prompts(env, "heldout", 3, 0.2), 30))
    assert len({prompt.key for prompt in held}) == 30, "each once"
    assert all(is_heldout(p.key, 0.2) for p in held) and not any(is_heldout(p.key, 0.2) for p in train)
    assert {prompt.env for prompt in train + held} == {env} and {p.domain for p in train} == {env.partition(":")[0]}
    assert all(prompt.state and prompt.prompt for prompt in train)
