"""The rules that a typed config must still keep: ranges, names from a list, and everything that spans two fields.

A rule is a small pure function `(config, world_size) -> messages` in `RULES`; none sees another's result, so one run of
the program shows every violation. Every domain of `rl.domains` is held against them as a run with its settings. A
message is one line: the value, the reason, the fix. What is legal but surely not meant is a warning. `NOT_YET` holds
what the schema can say and the code cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from conf.convert import leaf_types, to_dict
from conf.errors import UserError, nearest
from conf.schema import LONG_LEVELS, STAGES, TASK_LEVELS, RunConfig
from conf.validate_async import ASYNC_RULES
from conf.validate_data import DATA_RULES
from conf.validate_eval import EVAL_RULES, eval_warnings
from conf.validate_long import LONG_RULES
from conf.validate_pipeline import PARTS, PIPELINE_RULES
from conf.validate_rl import RL_RULES
from conf.validate_servers import SERVER_RULES
from conf.validate_tracker import alert_limits

Rule = Callable[[RunConfig, int], Iterator[str]]

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
    *RL_RULES,
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
