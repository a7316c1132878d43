"""Each rule of rollout servers fires alone and says how to mend it."""

from __future__ import annotations

import pytest

from conf.load import load
from conf.validate import violations

ONE = "rl.servers.urls=http://h:8000"


def found(argv: str, stage: str = "grpo") -> list[str]:
    return violations(load([f"+stage={stage}", *argv.split()]).config, 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (f"rl.engine=vlm {ONE}", "rl.engine=vlm is not known: did you mean vllm?"),
        ("rl.engine=vllm", "rl.engine=vllm has no server to ask: give rl.servers.urls=http://HOST:PORT"),
        (ONE, "rl.servers.urls=http://h:8000 are not asked by rl.engine=native: give rl.engine=vllm or sglang"),
        (
            "rl.engine=vllm rl.servers.urls=h:8000",
            "rl.servers.urls=h:8000 is no address: give http://HOST:PORT",
        ),
        (
            "rl.engine=sglang rl.servers.urls=http://a:1,http://b:2,http://a:1",
            "rl.servers.urls names http://a:1 2 times: give it once",
        ),
        (
            "rl.engine=vllm rl.servers.urls=http://a..b:8000",
            "rl.servers.urls=http://a..b:8000 is no address: give http://HOST:PORT",
        ),
        (
            "rl.engine=vllm rl.servers.urls=http://h:80a",
            "rl.servers.urls=http://h:80a is no address: give http://HOST:PORT",
        ),
        (
            "rl.engine=vllm rl.servers.urls=http://h:80000",
            "rl.servers.urls=http://h:80000 is no address: give http://HOST:PORT",
        ),
        (
            "rl.engine=vllm rl.servers.urls=http://:80",
            "rl.servers.urls=http://:80 is no address: give http://HOST:PORT",
        ),
        (
            "rl.engine=vllm rl.servers.urls=http://a:1,http://a:1/",
            "rl.servers.urls names http://a:1 2 times: give it once",
        ),
        (
            "rl.engine=vllm rl.servers.urls=http://h:8000/v1",
            "rl.servers.urls=http://h:8000/v1 holds a path, and the paths are the protocol's: give http://h:8000",
        ),
        (
            "rl.engine=vllm rl.servers.urls=http://me:secret@h:8000",
            "rl.servers.urls holds a name, a key or a query, which would be written down: keys go into"
            " rl.servers.key_env",
        ),
        (
            f"rl.engine=vllm {ONE} rl.rollout_copy=false",
            "rl.rollout_copy=false has the ranks decode in lock-step, and with rl.engine=vllm servers decode: leave it"
            " out",
        ),
        (
            f"rl.engine=vllm {ONE} rl.keep_selection=true",
            "rl.keep_selection=true needs the positions that the indexer selected, which vLLM does not return: set it"
            " to false, or give rl.engine=sglang",
        ),
        (
            f"rl.engine=vllm {ONE} rl.record_selection=true",
            "rl.record_selection=true needs the positions that the indexer selected, which vLLM does not return: set"
            " it to false, or give rl.engine=sglang",
        ),
        (
            f"rl.engine=sglang {ONE} rl.top_p=0.95",
            "rl.top_p=0.95 alone is more than SGLang can say the kept words of: give rl.top_k as well, up to the"
            " servers' --sampling-mask-max-tokens (4096)",
        ),
        (f"rl.engine=vllm {ONE} rl.servers.sync=nccl", "rl.servers.sync=nccl is not known: valid: disk, broadcast"),
        (f"rl.engine=vllm {ONE} rl.servers.dead_s=0", "rl.servers.dead_s=0 is outside (0, inf): give a value inside"),
    ],
)
def test_rule_fires_alone_and_says_how_to_mend_it(argv: str, message: str) -> None:
    assert found(argv) == [message]


def test_servers_draw_for_grpo_alone() -> None:
    line = "rl.engine=vllm draws for +stage=grpo alone: give rl.engine=native"
    assert found(f"rl.engine=vllm {ONE}", stage="evaluate") == [line]


@pytest.mark.parametrize(
    "argv",
    [
        f"rl.engine=vllm {ONE} rl.top_p=0.95",
        f"rl.engine=vllm {ONE} rl.one_step_off=true",
        f"rl.engine=vllm {ONE} rl.rollout_tokens=8 rl.servers.retries=0",
        "rl.engine=vllm rl.servers.urls=https://a:1/,http://b:2 rl.servers.sync=broadcast",
        f"rl.engine=sglang {ONE} rl.top_p=0.95 rl.top_k=64 rl.keep_selection=true",
        f"rl.engine=vllm {ONE} parallel.zero=3 rl.eval_every=5 rl.beta=0.1",
    ],
)
def test_the_border_is_allowed(argv: str) -> None:
    assert found(argv) == []
