"""The evaluate stage: held-out losses with dense and sparse attention, the indexer's health, and generative accuracy.

    torchrun launch/stage.py +stage=evaluate init_from=runs/grpo output_dir=runs/grpo_eval

Trains nothing. Accuracy is one sample a held-out problem at temperature 1, from the whole distribution, graded like an
outcome reward; a failed grade is left out and counted. The results are the run's one metrics row and `evaluation.json`.
"""

from __future__ import annotations

import json
import time

from conf.errors import UserError
from data.long_stream import LongProblems
from data.stream import TokenStream
from data.tokenizer import chat_ids
from model import Transformer
from rl.heldout import Heldout
from rl.offer import Offer
from rl.prompts import refuse_unknown_domains
from rl.rewards.client import open_judge
from rl.rewards.pool import RewardPool
from train import distributed
from train.evaluate import evaluate_losses
from train.long_tasks import Row, accuracy_row, cells, task_accuracy
from train.metrics import clean_row
from train.precision import autocast_dtype
from train.progress import Progress
from train.run import RunContext, peak_memory_bytes


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
    tables = long_tasks(context, net)
    row |= accuracy_row(tables.get("tasks", []))
    context.log(0, row)
    row["perf/peak_memory_bytes"] = int(distributed.max_over_ranks(peak_memory_bytes(context.device)))
    if context.is_main:
        partial = context.folder / ".evaluation.json"
        partial.write_text(json.dumps(clean_row(row) | tables, indent=2) + "\n", encoding="utf-8")
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


def long_tasks(context: RunContext, net: Transformer) -> dict[str, list[Row]]:
    """`train.long_tasks.task_accuracy` of `eval.tasks`; nothing where none is named."""
    config, cp = context.config, context.cp
    if not config.eval.tasks:
        return {}
    count = len(cells(config.eval, config.data.seq_len)) * config.eval.problems
    problems = LongProblems(config.data, context.tokenizer(), config.train.seed, "heldout")
    with Progress(
        len(range(cp.replica, count, cp.replicas)), "long-context tasks", context.is_main, unit="problem"
    ) as progress:
        return task_accuracy(net, config.eval, problems, cp, config.precision.name, progress.update)


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
    refuse_unknown_domains(config)
    autocast = autocast_dtype(config.precision.name)
    offer = Offer(rl, context.tokenizer(), context.folder, distributed.rank())
    offer.open()
    heldout = Heldout(config, context.tokenizer(), net, context.stage.attention, autocast, offer)
    opened_judge = open_judge(rl, context.folder, distributed.rank(), distributed.world_size())
    with (
        offer,
        RewardPool(rl.reward_workers, rl.reward_timeout_s) as pool,
        opened_judge as client,
        Progress(len(heldout.mine()), "held-out problems", context.is_main, unit="answer") as progress,
    ):
        row = heldout.measure(pool, client, progress.update)
    return row | {"rollout/prompts_too_long": heldout.too_long}
