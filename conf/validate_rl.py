"""The rules of RL (`rl.*`): prompts and domains, environments and tools, batches, rewards, rollouts, the judge; see
validate.py."""

from __future__ import annotations

import re
from collections.abc import Iterator

from conf.address import holds_secret, is_host
from conf.errors import nearest
from conf.schema import ENVIRONMENT_LEVELS, RunConfig

THINK_END = "</think>"  # graders read what follows it
VERIFIERS = "verifiers"  # rl.env=verifiers:ID, an environment of that package
DOMAIN_NAME = re.compile(r"[\w.-]+")


def rl_domains(config: RunConfig, world_size: int) -> Iterator[str]:
    rl = config.rl
    for name, own in rl.domains.items():
        if not DOMAIN_NAME.fullmatch(name):
            yield f"rl.domains has the name {name!r}, which is part of a metric's: give letters, digits, _ - and ."
        if rl.mixes and own.path is None and not own.tasks and own.env is None:
            yield f"rl.domains.{name} has no prompts while others bring theirs: give it a path, tasks or env as well"
        if not rl.mixes and own.share != 1:
            yield (
                f"rl.domains.{name}.share={own.share:g} cannot choose among the rows of one file: leave it out, or give"
                " every domain a path, tasks or env of its own"
            )
        if own.share <= 0:
            yield f"rl.domains.{name}.share={own.share:g} is outside (0, inf): leave the domain out"
    if rl.mixes and (rl.path is not None or rl.tasks or rl.env is not None):
        tasks = f"rl.tasks={','.join(rl.tasks)}" if rl.tasks else f"rl.env={rl.env}"
        named = f"rl.path={rl.path}" if rl.path is not None else tasks
        yield f"{named} is not read beside rl.domains, which bring their own prompts: leave one of them out"


def environments(config: RunConfig, world_size: int) -> Iterator[str]:
    rl = config.rl
    if rl.env is not None:
        name, colon, level = rl.env.partition(":")
        hardest = ENVIRONMENT_LEVELS.get(name, 0)
        known = level.isascii() and level.isdigit() and len(level) <= 2
        # MODULE:CLASS, which rl/env/registry.py looks up
        own = name not in ENVIRONMENT_LEVELS and bool(level) and not level[0].isdigit()
        if name == VERIFIERS and not level:
            yield f"rl.env={rl.env} names no taskset: give verifiers:ID"
        elif name not in (*ENVIRONMENT_LEVELS, VERIFIERS) and not own:
            yield f"rl.env={rl.env} is not known: {nearest(name, [*ENVIRONMENT_LEVELS, VERIFIERS])}"
        elif name != VERIFIERS and not own and colon and not (known and 1 <= int(level) <= hardest):
            yield f"rl.env={rl.env} has no such level: give {name}:1 to {name}:{hardest}"
        for key, given in (("rl.path", rl.path), ("rl.tasks", ",".join(rl.tasks))):
            if given:
                yield f"{key}={given} is not read beside rl.env={rl.env}: leave one of them out"
    if config.stage not in ("grpo", "evaluate") or rl.mixes:
        return
    if rl.env is not None and rl.outcome != "environment":
        yield f"rl.env={rl.env} has a verifier of its own: give rl.outcome=environment instead of {rl.outcome}"
    if rl.env is None and rl.outcome == "environment":
        yield "rl.outcome=environment has no environment to ask: give rl.env=NAME, or another outcome"


def tools_fit(config: RunConfig, world_size: int) -> Iterator[str]:
    rl = config.rl
    if config.stage not in ("grpo", "evaluate") or not (rl.offers_tools or rl.env is not None):
        return
    if rl.rollout_tokens is not None:
        yield (
            f"rl.rollout_tokens={rl.rollout_tokens} would cut a trajectory in the middle, whose tools no checkpoint can"
            " keep: set it to null"
        )
    if rl.stop:
        yield "rl.stop would end a message before its end of sequence, behind which tools answer: leave it out"
    if config.stage == "grpo" and not rl.rollout_copy and (config.parallel.zero == 3 or config.parallel.ep > 1):
        yield (
            "rl.rollout_copy=false has all ranks decode in step, and trajectories with tools have not the same number"
            " of messages: give rl.rollout_copy=true"
        )
    searches = [name for name in rl.tools.names if name in ("search", "open")]
    if searches and rl.env is None and rl.tools.corpus is None and rl.tools.search_url is None:
        yield (
            f"rl.tools.names has {searches[0]} and nothing to look in: give rl.tools.corpus=FILE or"
            " rl.tools.search_url=http://HOST/search"
        )
    if rl.tools.corpus is not None and rl.tools.search_url is not None:
        yield "rl.tools.corpus and rl.tools.search_url are both given: search looks in one of them"


def rl_batch(config: RunConfig, world_size: int) -> Iterator[str]:
    rl = config.rl
    longest = config.model.max_position_embeddings
    if config.stage in ("grpo", "evaluate") and rl.max_new_tokens >= longest:
        yield f"rl.max_new_tokens={rl.max_new_tokens} is past model.max_position_embeddings={longest}: give less"
    if config.stage != "grpo":
        return
    if rl.group_size == 1:
        yield "rl.group_size=1 has no advantage, which is the reward less its group's mean: give 2 or more"
    if rl.max_new_tokens >= rl.pack_len:
        yield f"rl.max_new_tokens={rl.max_new_tokens} leaves rl.pack_len={rl.pack_len} no prompt room: raise it"
    cp = config.parallel.cp
    if cp > 1 and rl.pack_len % (2 * cp):
        multiple = -(-rl.pack_len // (2 * cp)) * 2 * cp
        yield f"rl.pack_len={rl.pack_len} does not divide by 2*parallel.cp={2 * cp}: give rl.pack_len={multiple}"
    if rl.prompts_per_step % world_size:
        fix = -(-rl.prompts_per_step // world_size) * world_size
        yield (
            f"rl.prompts_per_step={rl.prompts_per_step} does not divide by the world of {world_size} processes:"
            f" give rl.prompts_per_step={fix}"
        )
    if rl.keep_selection and not rl.records_selection(config.model):
        given = "null, which records none past 1 GiB" if rl.record_selection is None else "false"
        yield f"rl.keep_selection=true has nothing to repeat with rl.record_selection={given}: set that to true as well"
    samples = rl.prompts_per_step // world_size * rl.group_size
    if rl.mini_batches > samples > 0:
        yield f"rl.mini_batches={rl.mini_batches} is more than a process has samples, {samples}: give {samples} or less"


def rl_rewards(config: RunConfig, world_size: int) -> Iterator[str]:
    rl = config.rl
    if config.stage not in ("grpo", "evaluate"):
        return
    if rl.length_shape == "soft_overlong" and rl.overlong_cache > rl.max_new_tokens:
        yield (
            f"rl.overlong_cache={rl.overlong_cache} is more than rl.max_new_tokens={rl.max_new_tokens}, whose last"
            f" tokens it is: give {rl.max_new_tokens} or less"
        )
    if rl.language_weight > 0 and rl.language == "none":
        yield f"rl.language_weight={rl.language_weight:g} rewards no language: give rl.language=latin or another script"


def rollouts_fit(config: RunConfig, world_size: int) -> Iterator[str]:
    rl = config.rl
    if config.stage == "grpo" and rl.one_step_off and rl.dynamic_sampling:
        yield (
            "rl.one_step_off=true draws an iteration's samples before rl.dynamic_sampling=true knows which groups to"
            " replace: set one of them to false"
        )
    if config.stage != "grpo" or rl.rollout_copy:
        return
    if rl.one_step_off:
        yield "rl.one_step_off=true draws from a copy of the weights: give rl.rollout_copy=true"
    if config.parallel.zero < 3 and config.parallel.ep == 1:
        return
    if rl.needs_reference:
        yield (
            "rl.rollout_copy=false spares no rank a whole model, for the KL keeps its reference whole: give"
            " rl.rollout_copy=true, or rl.beta=0 in all domains"
        )
    if rl.eval_every:
        every = f"rl.eval_every={rl.eval_every}"
        yield f"{every} measures a copy of the weights: give rl.rollout_copy=true or rl.eval_every=0"
    if config.parallel.offload_parameters:
        yield (
            "rl.rollout_copy=false would move every parameter from the CPU for every token with"
            " parallel.offload_parameters=true: set one of them the other way"
        )


def stop_strings(config: RunConfig, world_size: int) -> Iterator[str]:
    for string in config.rl.stop:
        if not string:
            yield "rl.stop holds an empty string, which every text begins with: leave it out"
        elif string in THINK_END or THINK_END in string:
            yield (
                f"rl.stop={string} ends at {THINK_END}, so no sample would come to its answer: give a string that"
                " follows the answer"
            )


def judge_is_given(config: RunConfig, world_size: int) -> Iterator[str]:
    rl = config.rl
    own = rl.outcome in ("judge", "proof") or rl.judge_weight > 0
    if config.stage not in ("grpo", "evaluate") or not own or rl.mixes:
        return
    asks = f"rl.outcome={rl.outcome}" if rl.outcome in ("judge", "proof") else f"rl.judge_weight={rl.judge_weight:g}"
    if rl.outcome == "judge" and rl.judge_weight > 0:
        yield f"rl.judge_weight={rl.judge_weight:g} counts rl.outcome=judge twice: give rl.judge_weight=0"
    if rl.judge_url is None or not rl.judge_model:
        yield f"{asks} has no judge to ask: give rl.judge_url=http://HOST:PORT/v1 and rl.judge_model=NAME"
    if rl.path is None:
        columns = "prompt" if rl.outcome == "proof" else "prompt and rubric"
        yield f"{asks} cannot judge the generated additions: give rl.path=PATH with rows of {columns}"
    if rl.judge_budget is not None and rl.judge_budget < world_size:
        yield f"rl.judge_budget={rl.judge_budget} is less than a request for each of {world_size} processes: give more"


def judge_url_is_safe(config: RunConfig, world_size: int) -> Iterator[str]:
    url = config.rl.judge_url
    if url is None:
        return
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    if holds_secret(url):
        yield "rl.judge_url holds a name, a key or a query, which would be written down: keys go into rl.judge_key_env"
    elif scheme not in ("http", "https") or not is_host(host) or any(c.isspace() or not c.isprintable() for c in url):
        yield f"rl.judge_url={url} is no address: give http://HOST:PORT/v1 or https://HOST/v1"
    elif url.rstrip("/").endswith("/chat/completions"):
        base = url.rstrip("/").removesuffix("/chat/completions")
        yield f"rl.judge_url={url} holds the path that is added to it: give rl.judge_url={base}"


def rl_weights(config: RunConfig, world_size: int) -> Iterator[str]:
    cap = config.rl.importance_cap
    if config.stage == "grpo" and cap is not None and config.rl.old_logprobs == "sampler":
        yield (
            f"rl.importance_cap={cap:g} has nothing to weigh with rl.old_logprobs=sampler, where pi_old is the"
            " sampler's own: add rl.old_logprobs=trainer, or give rl.importance_cap=null"
        )


RL_RULES = (
    rl_domains,
    environments,
    tools_fit,
    rl_batch,
    rl_rewards,
    rollouts_fit,
    stop_strings,
    judge_is_given,
    judge_url_is_safe,
    rl_weights,
)
