"""The rules of rollouts beside the updates (`rl.max_staleness`): what goes with them; see validate.py."""

from __future__ import annotations

from collections.abc import Iterator

from conf.schema import RunConfig


def draws_beside_updates(config: RunConfig, world_size: int) -> Iterator[str]:
    rl = config.rl
    if config.stage != "grpo" or not rl.max_staleness:
        return
    asked = f"rl.max_staleness={rl.max_staleness}"
    if rl.engine == "native":
        yield (
            f"{asked} has servers draw beside the updates, and rl.engine=native draws in this process: give"
            " rl.engine=vllm or sglang, or rl.one_step_off=true in its place"
        )
    if rl.one_step_off:
        yield f"rl.one_step_off=true draws one iteration ahead, and {asked} does so as well: leave one of them out"
    if rl.rollout_tokens is not None:
        yield (
            f"rl.rollout_tokens={rl.rollout_tokens} cuts samples at the end of an iteration, and with {asked} they are"
            " drawn through it: leave one of them out"
        )


ASYNC_RULES = (draws_beside_updates,)
