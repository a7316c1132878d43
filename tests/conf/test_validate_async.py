"""Each rule of rollouts beside the updates fires alone and says how to mend it."""

from __future__ import annotations

import pytest

from conf.load import load
from conf.validate import violations

SERVED = "rl.engine=vllm rl.servers.urls=http://h:8000"


def found(argv: str, stage: str = "grpo") -> list[str]:
    return violations(load([f"+stage={stage}", *argv.split()]).config, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "rl.max_staleness=2",
            "rl.max_staleness=2 has servers draw beside the updates, and rl.engine=native draws in this process: give"
            " rl.engine=vllm or sglang, or rl.one_step_off=true in its place",
        ),
        (
            f"{SERVED} rl.max_staleness=1 rl.one_step_off=true",
            "rl.one_step_off=true draws one iteration ahead, and rl.max_staleness=1 does so as well: leave one of them"
            " out",
        ),
        (
            f"{SERVED} rl.max_staleness=1 rl.rollout_tokens=8",
            "rl.rollout_tokens=8 cuts samples at the end of an iteration, and with rl.max_staleness=1 they are drawn"
            " through it: leave one of them out",
        ),
        (f"{SERVED} rl.max_staleness=-1", "rl.max_staleness=-1 is too small: give 0 or more"),
    ],
)
def test_rule_fires_alone_and_says_how_to_mend_it(argv: str, message: str) -> None:
    assert found(argv) == [message]


@pytest.mark.parametrize(
    "argv",
    [
        "rl.max_staleness=0 rl.one_step_off=true",
        f"{SERVED} rl.max_staleness=4 rl.dynamic_sampling=true rl.old_logprobs=trainer rl.off_policy_delta=0.1",
        f"{SERVED} rl.max_staleness=1 rl.env=calculator rl.outcome=environment",
    ],
)
def test_the_border_is_allowed(argv: str) -> None:
    assert found(argv) == []
