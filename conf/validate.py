"""The rules that a typed config must still keep: ranges, names from a list, and everything that spans two fields.

A rule is a small pure function `(config, world_size) -> messages` in `RULES`; none sees another's result, so one run of
the program shows every violation. Every domain of `rl.domains` is held against them as a run with its settings. A
message is one line: the value, the reason, the fix. What is legal but surely not meant is a warning. `NOT_YET` holds
what the schema can say and the code cannot do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from conf.convert import leaf_types, to_dict
from conf.errors import UserError, nearest
from conf.schema import ENVIRONMENT_LEVELS, LONG_LEVELS, STAGES, TASK_LEVELS, RunConfig
from conf.validate_async import ASYNC_RULES
from conf.validate_data import DATA_RULES
from conf.validate_eval import EVAL_RULES, eval_warnings
from conf.validate_long import LONG_RULES
from conf.validate_pipeline import PARTS, PIPELINE_RULES
from conf.validate_servers import SERVER_RULES
from conf.validate_tracker import alert_limits

Rule = Callable[[RunConfig, int], Iterator[str]]

THINK_END = "</think>"  # graders read what follows it
LANGUAGES = (
    "none", "latin", "han", "japanese", "hangul", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai",
)  # fmt: skip

CHOICES: dict[str, tuple[str, ...]] = {
    "stage": STAGES,
    "resume": ("auto", "never"),
    "kernels": ("auto", "torch", "triton", "cudnn"),
    "model.mtp": ("keep", "drop"),
    "data.source": ("stdlib", "synthetic", "files", "hf", "mix"),
    "data.packing": ("concat", "best_fit"),
    "optim.schedule": ("cosine", "constant"),
    "parallel.offload": ("none", "cpu", "nvme"),
    "parallel.pp_schedule": tuple(PARTS),
    "precision.name": ("fp32", "bf16", "fp8"),
    "tracker.name": ("wandb", "none"),
    "rl.engine": ("native", "vllm", "sglang"),
    "rl.servers.sync": ("disk", "broadcast"),
    "rl.outcome": ("exact_match", "math_verify", "task", "environment", "judge", "proof"),
    "rl.tools.reasoning": ("v3_2", "keep", "v4", "drop"),
    "rl.tools.context": ("none", "summary", "discard_75", "discard_all"),
    "rl.tools.sandbox": ("auto", "bubblewrap", "namespaces", "unprotected_model_code_runs_as_me"),
    "rl.length_shape": ("linear", "soft_overlong", "group_relative"),
    "rl.language": LANGUAGES,
    "rl.loss_mean": ("sequence", "token"),
    "rl.kl_estimator": ("unbiased", "k3"),
    "rl.old_logprobs": ("sampler", "trainer"),
    "eval.compare_attention": ("dense", "sparse"),
}

MAY_BE_ZERO = {  # whole numbers that count from 0; every other one is a size and starts at 1
    "model.n_shared_experts",
    "model.first_k_dense_replace",
    "model.num_nextn_predict_layers",
    "data.max_bad_rows",
    "data.workers",
    "train.seed",
    "train.max_skipped_steps",
    "train.threads",
    "optim.warmup_steps",
    "parallel.zero",
    "parallel.persist_below",
    "rl.reference_refresh",
    "rl.eval_every",
    "rl.top_k",
    "rl.judge_retries",
    "rl.servers.retries",
    "rl.max_staleness",
}

INTERVALS: dict[str, str] = {  # of the fractional numbers; every other one is at least 0
    "model.routed_scaling_factor": "(0, inf)",
    "model.rms_norm_eps": "(0, 1)",
    "model.initializer_range": "(0, inf)",
    "model.rope.theta": "(1, inf)",
    "model.rope.factor": "[1, inf)",
    "model.rope.beta_fast": "(0, inf)",
    "model.rope.beta_slow": "(0, inf)",
    "data.heldout": "[0, 1)",
    "data.synthetic_share": "[0, 1)",
    "data.worked_share": "[0, 1]",
    "data.long_share": "[0, 1]",
    "data.max_split": "[0, 1]",
    "data.dedup": "(0, 0.99]",
    "train.balance_weight": "[0, inf)",
    "train.spike_factor": "(1, inf)",
    "optim.lr": "(0, inf)",
    "optim.indexer_lr": "(0, inf)",
    "optim.beta1": "[0, 1)",
    "optim.beta2": "[0, 1)",
    "optim.eps": "(0, 1)",
    "optim.final_lr_share": "[0, 1]",
    "rl.temperature": "(0, inf)",
    "rl.top_p": "(0, 1]",
    "rl.clip_low": "(0, 1]",
    "rl.clip_high": "(0, inf)",
    "rl.importance_cap": "(0, inf)",
    "rl.length_penalty": "[0, inf)",
    "rl.reward_timeout_s": "(0, inf)",
    "rl.judge_timeout_s": "(0, inf)",
    "rl.pretrain_tokens": "(0, inf)",
    "rl.servers.request_s": "(0, inf)",
    "rl.servers.health_s": "(0, inf)",
    "rl.servers.dead_s": "(0, inf)",
    "rl.servers.sync_s": "(0, inf)",
    "rl.tools.timeout_s": "(0, inf)",
    "rl.tools.seconds": "(0, inf)",
    "rl.tools.context_share": "(0, 1)",
}

NOT_YET: dict[str, tuple[Callable[[Any], bool], str]] = {  # key -> (which values, what to use instead)
    "kernels": (lambda value: value == "cudnn", "kernels=auto, kernels=triton or kernels=torch"),
    "model.tie_word_embeddings": (lambda value: value is True, "model.tie_word_embeddings=false"),
}
VERIFIERS = "verifiers"  # rl.env=verifiers:ID, an environment of that package
DOMAIN_NAME = re.compile(r"[\w.-]+")
BYTE_LEVEL_FLOOR = 256 + 8  # a trained tokenizer holds every byte and eight special tokens


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, down to the schema's fields: one that holds a mapping keeps it whole."""
    leaves = leaf_types()
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        flat |= flatten(value, f"{key}.") if isinstance(value, dict) and key not in leaves else {key: value}
    return flat


def contains(interval: str, value: float) -> bool:
    """Whether `value` lies in an interval such as "(0, 1]"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def known_names(config: RunConfig, world_size: int) -> Iterator[str]:
    flat = flatten(to_dict(config))
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            yield f"{key}={flat[key]} is not known: {nearest(flat[key], choices)}"


def numbers_in_range(config: RunConfig, world_size: int) -> Iterator[str]:
    for key, value in flatten(to_dict(config)).items():
        if type(value) is int:
            least = 0 if key in MAY_BE_ZERO else 1
            if value < least:
                yield f"{key}={value} is too small: give {least} or more"
        elif type(value) is float:
            interval = INTERVALS.get(key, "[0, inf)")
            if not contains(interval, value):
                yield f"{key}={value:g} is outside {interval}: give a value inside"


def supported(config: RunConfig, world_size: int) -> Iterator[str]:
    flat = flatten(to_dict(config))
    for key, (refused, instead) in NOT_YET.items():
        if refused(flat[key]):
            yield f"{key}={str(flat[key]).lower()} is not supported yet: use {instead}"


def zero_stage(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.parallel.zero > 3:
        yield f"parallel.zero={config.parallel.zero} is no ZeRO stage: use 0, 1, 2 or 3"


def named_paths(config: RunConfig, world_size: int) -> Iterator[str]:
    if not config.output_dir.strip():
        yield "output_dir is empty: give output_dir=runs/NAME"
    paths = {"init_from": config.init_from, "data.path": config.data.path, "rl.path": config.rl.path}
    for key, value in (paths | {"parallel.nvme_path": config.parallel.nvme_path}).items():
        if value is not None and not value.strip():
            yield f"{key} is empty: give a path or leave it out"


def source_needs_path(config: RunConfig, world_size: int) -> Iterator[str]:
    data = config.data
    if data.source in ("files", "hf") and data.path is None:
        what = "a file, glob or folder" if data.source == "files" else "a `datasets` name or a local set"
        yield f"data.source={data.source} has nothing to read: give data.path=PATH, {what}"
    if data.source in ("stdlib", "synthetic") and data.path is not None:
        yield f"data.path={data.path} is not read by data.source={data.source}: add data.source=files (or hf)"


def known_tasks(config: RunConfig, world_size: int) -> Iterator[str]:
    given = (
        ("data.tasks", config.data.tasks, TASK_LEVELS),
        ("rl.tasks", config.rl.tasks, TASK_LEVELS),
        ("data.long_tasks", config.data.long_tasks, LONG_LEVELS),
        ("eval.tasks", config.eval.tasks, LONG_LEVELS),
    )
    for key, names, levels in given:
        for name in names:
            task, colon, level = name.partition(":")
            if task not in levels:
                yield f"{key}={name} is not known: {nearest(task, levels)}"
                continue
            hardest = levels[task]
            known = level.isascii() and level.isdigit() and len(level) <= 2
            if colon and not (known and 1 <= int(level) <= hardest):
                yield f"{key}={name} has no such level: give {task}:1 to {task}:{hardest}"


def tasks_are_graded(config: RunConfig, world_size: int) -> Iterator[str]:
    data, rl = config.data, config.rl
    if rl.path is not None and rl.tasks:
        yield f"rl.tasks={','.join(rl.tasks)} is not read beside rl.path={rl.path}: leave one of them out"
    if config.stage not in ("grpo", "evaluate") or rl.path is not None or rl.env is not None or rl.mixes:
        return
    asked, outcome = {name.partition(":")[0] for name in rl.tasks or data.tasks}, rl.of("countdown").outcome
    if "countdown" in asked and outcome in ("exact_match", "math_verify"):
        yield f"rl.outcome={outcome} cannot grade countdown, which has many right answers: give rl.outcome=task"


def sft_needs_conversations(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.stage == "sft" and config.data.source == "stdlib":
        yield "data.source=stdlib holds no conversations, which sft learns from: use data.source=files or synthetic"


def tokenizer_fits(config: RunConfig, world_size: int) -> Iterator[str]:
    spec, vocab_size = config.data.tokenizer, config.model.vocab_size
    if not spec.strip():
        yield "data.tokenizer is empty: use auto, bytes, train:VOCAB or a tokenizer folder"
    if not spec.startswith("train:"):
        return
    size = spec.removeprefix("train:")
    if not size.isdecimal() or int(size) < BYTE_LEVEL_FLOOR:
        yield f"data.tokenizer={spec} has no usable size: give train:VOCAB with VOCAB of {BYTE_LEVEL_FLOOR} or more"
    elif int(size) > vocab_size:
        yield f"data.tokenizer={spec} is larger than model.vocab_size={vocab_size}: give train:{vocab_size} or less"


def sequence_fits(config: RunConfig, world_size: int) -> Iterator[str]:
    longest, seq_len, cp = config.model.max_position_embeddings, config.data.seq_len, config.parallel.cp
    if seq_len > longest:
        yield f"data.seq_len={seq_len} is past model.max_position_embeddings={longest}: give {longest} or less"
    if cp > 1 and seq_len % (2 * cp):
        multiple = max(1, seq_len // (2 * cp)) * 2 * cp
        yield f"data.seq_len={seq_len} does not divide by 2*parallel.cp={2 * cp}: give data.seq_len={multiple}"


def heads_and_rope(config: RunConfig, world_size: int) -> Iterator[str]:
    rope, index = config.model.qk_rope_head_dim, config.model.index_head_dim
    if rope % 2:
        yield f"model.qk_rope_head_dim={rope} is odd but rotates pairs: give {rope + 1}"
    if rope > index:
        yield f"model.qk_rope_head_dim={rope} does not fit into model.index_head_dim={index}: give it {rope} or more"
    low, high = config.model.rope.beta_slow, config.model.rope.beta_fast
    if low >= high:
        yield f"model.rope.beta_slow={low:g} is not below model.rope.beta_fast={high:g}: YaRN's are 1 and 32"


def expert_groups(config: RunConfig, world_size: int) -> Iterator[str]:
    experts, groups, kept = config.model.n_routed_experts, config.model.n_group, config.model.topk_group
    chosen = config.model.num_experts_per_tok
    if groups < 1:
        return  # numbers_in_range says so
    if experts % groups:
        yield f"model.n_routed_experts={experts} does not divide by model.n_group={groups}: give a multiple of {groups}"
        return
    if groups > 1 and experts // groups < 2:
        yield f"model.n_group={groups} leaves one expert a group, which is scored by its best two: give fewer groups"
    if kept > groups:
        yield f"model.topk_group={kept} is more than model.n_group={groups}: give {groups} or less"
    reachable = min(kept, groups) * (experts // groups)
    if chosen > reachable:
        yield (
            f"model.num_experts_per_tok={chosen} is more than the {reachable} experts in model.topk_group={kept}:"
            f" give {reachable} or less, or a larger topk_group"
        )


def layers_fit(config: RunConfig, world_size: int) -> Iterator[str]:
    dense, layers = config.model.first_k_dense_replace, config.model.num_hidden_layers
    if dense > layers:
        yield f"model.first_k_dense_replace={dense} is more than model.num_hidden_layers={layers}: give less"


def world_divides(config: RunConfig, world_size: int) -> Iterator[str]:
    ep, cp, experts = config.parallel.ep, config.parallel.cp, config.model.n_routed_experts
    if ep > 1 and experts % ep:
        yield f"parallel.ep={ep} does not divide model.n_routed_experts={experts}: give a divisor of {experts}"
    pp = max(1, config.parallel.pp)
    for key, degree in (("parallel.ep", ep), ("parallel.cp", cp)):
        if degree > 1 and world_size % pp == 0 and world_size // pp % degree:
            of = f"the world of {world_size} processes" + (f" over parallel.pp={pp}" if pp > 1 else "")
            yield f"{key}={degree} does not divide {of}: start a multiple of {degree * pp}"


def stage_layout(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, stage = config.parallel, config.stage
    if parallel.zero == 0 and parallel.ep > 1:
        yield f"parallel.ep={parallel.ep} needs ZeRO, which clips by the norm over all experts: use parallel.zero=1"
    # a rank decodes on its own there: it has nobody to meet in a layer
    if parallel.ep > 1 and stage == "evaluate":
        yield f"parallel.ep={parallel.ep} is not supported yet in stage {stage}: use parallel.ep=1"
    if parallel.zero == 3 and stage == "evaluate":
        yield "parallel.zero=3 is not supported yet in stage evaluate, where every rank holds the model: use another"


def offload(config: RunConfig, world_size: int) -> Iterator[str]:
    zero, place, path = config.parallel.zero, config.parallel.offload, config.parallel.nvme_path
    if config.stage == "evaluate" and place != "none":
        yield f"parallel.offload={place} has nothing to move in stage evaluate, which trains nothing: use none"
    if place == "cpu" and zero == 0:
        yield "parallel.offload=cpu needs ZeRO, which keeps the optimiser's state apart: use parallel.zero=1, 2 or 3"
    if place == "nvme" and zero < 3:
        yield f"parallel.offload=nvme stays in CPU memory under parallel.zero={zero}: use parallel.zero=3"
    if place == "nvme" and path is None:
        yield "parallel.offload=nvme has nowhere to write: give parallel.nvme_path=FOLDER, on a disk of each machine"
    if place != "nvme" and path is not None:
        yield f"parallel.nvme_path={path} is not used by parallel.offload={place}: add parallel.offload=nvme"
    if config.parallel.offload_parameters and zero < 3:
        yield f"parallel.offload_parameters=true cannot move what parallel.zero={zero} keeps whole: use parallel.zero=3"
    if config.parallel.offload_parameters and place == "none":
        yield (
            "parallel.offload_parameters=true saves nothing under parallel.offload=none, whose optimiser holds the same"
            " weights: use parallel.offload=cpu"
        )


def heldout_to_measure(config: RunConfig, world_size: int) -> Iterator[str]:
    if config.stage == "evaluate" and config.data.heldout == 0:
        yield "data.heldout=0 leaves evaluate nothing to measure on: give the share that training left out"
    if config.stage == "grpo" and config.rl.eval_every and config.data.heldout == 0:
        yield f"data.heldout=0 leaves rl.eval_every={config.rl.eval_every} nothing to measure on: give a share above 0"


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
    if "@" in host or "?" in url or "#" in url:
        yield "rl.judge_url holds a name, a key or a query, which would be written down: keys go into rl.judge_key_env"
    elif scheme not in ("http", "https") or not host or any(c.isspace() or not c.isprintable() for c in url):
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


def index_fits_fp8(config: RunConfig, world_size: int) -> Iterator[str]:
    width = config.model.index_head_dim
    if config.ops.fp8_index and (width > 128 or width & (width - 1)):
        yield (
            f"ops.fp8_index=true cannot take model.index_head_dim={width}: one scale covers at most 128 channels and"
            " the Hadamard transform needs a power of two; give such a width or ops.fp8_index=false"
        )


RULES: tuple[Rule, ...] = (
    known_names,
    numbers_in_range,
    supported,
    zero_stage,
    named_paths,
    source_needs_path,
    *DATA_RULES,
    known_tasks,
    tasks_are_graded,
    sft_needs_conversations,
    tokenizer_fits,
    sequence_fits,
    heads_and_rope,
    index_fits_fp8,
    expert_groups,
    layers_fit,
    world_divides,
    stage_layout,
    offload,
    *PIPELINE_RULES,
    heldout_to_measure,
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
    *SERVER_RULES,
    *ASYNC_RULES,
    *LONG_RULES,
    alert_limits,
    *EVAL_RULES,
)


def violations(config: RunConfig, world_size: int = 1) -> list[str]:
    """Every broken rule as one line; empty if the run may start. `world_size`: processes of the whole run."""
    found = _broken(config, world_size)
    for name in config.rl.domains:
        of_domain = _broken(_of_domain(config, name), world_size)
        found += [f"domain {name}: {message}" for message in of_domain if message not in found]
    return found


def _of_domain(config: RunConfig, name: str) -> RunConfig:
    """The run as if all its prompts were of this domain."""
    rl, data = config.rl.of(name), config.data
    if not config.rl.mixes:  # it has one of the run's tasks, by its name
        mine = [tuple(task for task in tasks if task.partition(":")[0] == name) for tasks in (rl.tasks, data.tasks)]
        rl, data = replace(rl, tasks=mine[0]), replace(data, tasks=mine[1])
    return replace(config, rl=rl, data=data)


def _broken(config: RunConfig, world_size: int) -> list[str]:
    return [" ".join(message.splitlines()) for rule in RULES for message in rule(config, world_size)]


def warnings(config: RunConfig) -> list[str]:
    """What is legal but surely not meant, a line each."""
    found = []
    topk, seq_len = config.model.index_topk, config.data.seq_len
    if topk >= seq_len:
        found.append(f"model.index_topk={topk} is not below data.seq_len={seq_len}: sparse attention keeps every token")
    rl, model = config.rl, config.model
    if config.stage == "grpo" and rl.record_selection:
        size = rl.selection_bytes(model)
        if size > 1 << 30:
            found.append(f"rl.record_selection=true may hold {size / 2**30:.0f} GiB: set it to false")
    if config.rl.judge_url is not None and not config.rl.needs_judge:
        found.append(
            "rl.judge_url is given and nothing asks it: set rl.outcome=judge, rl.outcome=proof or rl.judge_weight"
        )
    longest = max(view.max_new_tokens for view in rl.views)
    if config.stage == "grpo" and rl.rollout_tokens is not None and rl.rollout_tokens >= longest:
        found.append(
            f"rl.rollout_tokens={rl.rollout_tokens} is not below rl.max_new_tokens={longest}: every sample finishes in"
            " its iteration"
        )
    optim, steps = config.optim, config.train.steps
    if config.stage != "evaluate" and optim.warmup_steps >= steps:
        found.append(f"optim.warmup_steps={optim.warmup_steps} is not below train.steps={steps}: lr never peaks")
    found += eval_warnings(config)
    return found


def check(config: RunConfig, world_size: int = 1) -> None:
    """Raises UserError with all violations, a line each."""
    found = violations(config, world_size)
    if found:
        raise UserError("\n".join(found))
