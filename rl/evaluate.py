"""The evaluate stage: held-out losses with dense and sparse attention, the indexer's health, and generative accuracy.

    torchrun launch/stage.py +stage=evaluate init_from=runs/grpo output_dir=runs/grpo_eval

Trains nothing. Accuracy is one sample a held-out problem at temperature 1, from the whole distribution, graded like an
outcome reward; a failed grade is left out and counted. The results are the run's one metrics row and `evaluation.json`.
"""

from __future__ import annotations

import json
import time

from conf.errors import UserError
from data.chat import encode_prompt
from data.prompts import prompts
from data.stream import TokenStream
from data.tokenizer import chat_ids
from model import Transformer
from model.generate import Sampling
from rl.groups import grade, judge
from rl.messages import RolloutRequest
from rl.prompts import asked, needed_columns, sample_seed
from rl.rewards import part_names
from rl.rewards.client import open_judge
from rl.rewards.pool import RewardPool
from rl.rollout.native import NativeEngine
from rl.summary import add_over_ranks, experience_metrics, experience_sums
from train import distributed
from train.evaluate import evaluate_losses
from train.metrics import clean_row
from train.precision import autocast_dtype
from train.progress import Progress
from train.run import RunContext, peak_memory_bytes

EVALUATION = -1  # the "iteration" of the seeds here: no training sample shares them


def run(context: RunContext) -> None:
    """Measures `init_from` and writes metrics.jsonl and evaluation.json."""
    net = context.build_net().requires_grad_(False)
    row = held_out_losses(context, net)
    try:
        chat_ids(context.tokenizer())
    except UserError as error:
        context.say(f"no accuracy is measured: {error}")
    else:
        row |= accuracy(context, net)
    context.log(0, row)
    row["perf/peak_memory_bytes"] = int(distributed.max_over_ranks(peak_memory_bytes(context.device)))
    if context.is_main:
        partial = context.folder / ".evaluation.json"
        partial.write_text(json.dumps(clean_row(row), indent=2) + "\n", encoding="utf-8")
        partial.replace(context.folder / "evaluation.json")


def held_out_losses(context: RunContext, net: Transformer) -> dict[str, float]:
    """`train.evaluate.evaluate_losses` on `train.eval_sequences` held-out sequences, and tokens/s of it."""
    config, cp = context.config, context.cp
    stream, count = open_heldout(context), config.train.eval_sequences
    start = time.monotonic()
    with Progress(
        len(range(cp.replica, count, cp.replicas)), "held-out loss", context.is_main, unit="sequence"
    ) as progress:
        found = evaluate_losses(net, stream, count, cp, config.precision.name, progress.update)
    seconds = distributed.max_over_ranks(time.monotonic() - start)
    return found | {"perf/tokens_per_s": count * config.data.seq_len / seconds}


def open_heldout(context: RunContext) -> TokenStream:
    """The held-out sequences; rank 0 prepares them first, the others find them on disk."""
    config, tokenizer = context.config, context.tokenizer()

    def build() -> TokenStream:
        return TokenStream(
            config.data, tokenizer, config.train.seed, "heldout", cache_dir=context.cache, progress=context.is_main
        )

    first = build() if context.is_main else None
    distributed.barrier()
    return first or build()


def accuracy(context: RunContext, net: Transformer) -> dict[str, float]:
    """Share of held-out problems that one sample at temperature 1 answers right, and the rollout's figures."""
    config, rl = context.config, context.config.rl
    requests, too_long = heldout_requests(context)
    autocast = autocast_dtype(config.precision.name)
    engine = NativeEngine(net, context.tokenizer(), rl, context.stage.attention, autocast, Sampling())
    mine = requests[distributed.rank() :: distributed.world_size()]
    start = time.monotonic()
    with Progress(len(mine), "held-out problems", context.is_main, unit="answer") as progress:
        samples = engine.generate(mine, progress.update)
    seconds = distributed.max_over_ranks(time.monotonic() - start)
    opened_judge = open_judge(rl, context.folder, distributed.rank(), distributed.world_size())
    with RewardPool(rl.reward_workers, rl.reward_timeout_s) as pool, opened_judge as client:
        samples, failures = grade(samples, pool, rl, client)
    asked_judge = {} if client is None else client.take_counts()
    sums = add_over_ranks(experience_sums(judge(samples, failures, rl), part_names(rl)) | asked_judge)
    row = experience_metrics(sums, seconds)
    del row["reward/zero_spread_frac"], row["reward/failed_groups"]  # one sample a problem: no groups
    row |= {"reward/accuracy": row[f"reward/{rl.outcome}"], "reward/num_problems": sums["graded"]}
    return row | {"rollout/prompts_too_long": too_long}


def heldout_requests(context: RunContext) -> tuple[list[RolloutRequest], int]:
    """One request a held-out problem, up to `rl.eval_prompts`, and how many prompts were too long for the model."""
    config, tokenizer = context.config, context.tokenizer()
    rl, data, seed = config.rl, config.data, config.train.seed
    source = prompts(
        rl.path, "heldout", seed, data.operand_digits, data.heldout, max_bad_rows=data.max_bad_rows,
        needs=needed_columns(rl), tasks=rl.tasks or data.tasks, hf_split=data.split,
    )  # fmt: skip
    longest = config.model.max_position_embeddings - rl.max_new_tokens
    found: list[RolloutRequest] = []
    too_long = 0
    for prompt in source:
        ids = tuple(encode_prompt(asked(prompt.prompt, rl), tokenizer))
        if len(ids) > longest:
            too_long += 1
            continue
        index = len(found)
        draw = sample_seed(seed, EVALUATION, index, 0)
        found.append(RolloutRequest(index, 0, prompt.domain, prompt.prompt, prompt.answer, ids, draw, prompt.rubric))
        if len(found) == rl.eval_prompts:
            break
    if not found:
        raise UserError(f"every held-out prompt is longer than {longest} tokens: give shorter ones in rl.path")
    return found, too_long
