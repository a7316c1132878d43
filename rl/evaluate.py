"""The evaluate stage: held-out losses with dense and sparse attention, the indexer's health, and generative accuracy.

    torchrun launch/stage.py +stage=evaluate init_from=runs/grpo output_dir=runs/grpo_eval

Trains nothing. Accuracy is one sample a held-out problem at temperature 1, from the whole distribution, graded like an
outcome reward; a failed grade is left out and counted. The results are the run's one metrics row and `evaluation.json`,
which holds tables beside them (losses and recall by position, speed, the harness) and ends with a verdict:
docs/evaluation.md.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from conf.errors import UserError
from conf.schema import RunConfig
from data.long_stream import LongProblems
from data.stream import TokenStream
from data.tokenizer import chat_ids, load_tokenizer
from model import Transformer
from model.generate import Sampling
from rl.harness import HarnessModel, require_harness, run_harness, side_by_side
from rl.heldout import Heldout
from rl.offer import Offer
from rl.prompts import refuse_unknown_domains
from rl.rewards.client import open_judge
from rl.rewards.pool import RewardPool
from rl.rollout.native import NativeEngine
from train import distributed
from train.by_position import ByPosition, Report, bucket_ends
from train.evaluate import add_other, evaluate_losses
from train.long_tasks import Row, accuracy_row, cells, task_accuracy
from train.metrics import clean_row, clean_tables
from train.precision import autocast_dtype
from train.progress import Progress
from train.run import RunContext, peak_memory_bytes
from train.speed import generation_speed
from train.start import weights_folder
from train.verdict import verdict


def run(context: RunContext) -> None:
    """Measures `init_from` and writes metrics.jsonl and evaluation.json."""
    asked = context.config.eval
    if asked.harness:
        require_harness()  # a mistake is told before the model is read
    other = None if asked.compare_with is None else Other(context)
    problems = long_problems(context)
    net = context.build_net().requires_grad_(False)
    row, tables = held_out_losses(context, net, other)
    try:
        chat_ids(context.tokenizer())
    except UserError as error:
        context.say(f"no accuracy is measured: {error}")
    else:
        row |= accuracy(context, net)
    tables |= long_tasks(context, net, problems)
    row |= accuracy_row(tables.get("tasks", []))
    context.log(0, row)
    row["perf/peak_memory_bytes"] = int(distributed.max_over_ranks(peak_memory_bytes(context.device)))
    # below, nothing adds to the row, and `speed` counts peaks of its own
    if asked.speed_lengths:
        tables["speed"] = speed(context, net)
    tables = clean_tables(tables)
    tables["verdict"] = verdict(tables, asked.margin)
    context.say(tables["verdict"]["words"] or "nothing was measured by position")
    write(context, row, tables)
    if asked.harness:  # the one part that may fail for reasons outside, such as a set that cannot be fetched
        write(context, row, tables | clean_tables({"harness": harness(context, net)}))


def write(context: RunContext, row: dict[str, float], tables: dict[str, Any]) -> None:
    """evaluation.json, whole or not at all."""
    if context.is_main:
        partial = context.folder / ".evaluation.json"
        partial.write_text(json.dumps(clean_row(row) | tables, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(context.folder / "evaluation.json")


class Other:
    """The checkpoint of `eval.compare_with`, looked at before anything is measured.

    UserError where it cannot be compared: another vocabulary or tokenizer, too few positions, no indexer.
    """

    def __init__(self, context: RunContext) -> None:
        from model.hf import read_config
        from model.hf_files import Checkpoint

        self.context, config = context, context.config
        key, given = "eval.compare_with", str(config.eval.compare_with)
        self.folder = weights_folder(given, key)
        self.model = read_config(self.folder, mtp="drop")
        if self.model.vocab_size != config.model.vocab_size:
            theirs, mine = self.model.vocab_size, config.model.vocab_size
            raise UserError(
                f"{key}={given} has a vocabulary of {theirs} and not {mine}: compare models of one tokenizer"
            )
        if self.model.max_position_embeddings < config.data.seq_len:
            longest = self.model.max_position_embeddings
            raise UserError(f"{key}={given} ends at {longest} positions: give data.seq_len={longest} or less")
        if (self.folder / "tokenizer.json").is_file():
            if load_tokenizer(str(self.folder)).get_vocab() != context.tokenizer().get_vocab():
                raise UserError(f"{key}={given} has another tokenizer: compare models of one tokenizer")
        learned = any(".indexer." in name for name in Checkpoint(self.folder).entries)
        if config.eval.compare_attention == "sparse" and not learned:
            raise UserError(f"{key}={given} has no indexer to select with: give eval.compare_attention=dense")

    def measure(self, stream: TokenStream, count: int, by_position: ByPosition) -> None:
        """Its losses on the same sequences, under `other`."""
        from model.hf import load_weights

        config, cp = self.context.config, self.context.cp
        with torch.device("meta"):
            net = Transformer(self.model)
        load_weights(net, self.folder, progress=self.context.listed("reading the other weights"))
        net.use(self.context.ops)
        net = net.to(self.context.device).requires_grad_(False)
        mine = len(range(cp.replica, count, cp.replicas))
        with Progress(mine, "the other checkpoint", self.context.is_main, unit="sequence") as progress:
            add_other(
                net, config.eval.compare_attention, stream, count, cp, config.precision.name, by_position,
                progress.update,
            )  # fmt: skip


def held_out_losses(
    context: RunContext, net: Transformer, other: Other | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """`train.evaluate.evaluate_losses` on `train.eval_sequences` held-out sequences, with tokens/s of it, and the
    tables of `train.by_position` where `eval.by_position` asks for them."""
    config, cp = context.config, context.cp
    stream, count = open_heldout(context), config.train.eval_sequences
    by_position = new_tables(config, count, context.device) if config.eval.by_position else None
    if stream.corpus is not None and count * config.data.seq_len > stream.corpus.num_tokens:
        context.say(
            f"note: the held-out text has {stream.corpus.num_tokens} tokens and {count} sequences are more: they repeat"
            " it, and intervals come out too narrow"
        )
    start = time.monotonic()
    with Progress(
        len(range(cp.replica, count, cp.replicas)), "held-out loss", context.is_main, unit="sequence"
    ) as progress:
        found = evaluate_losses(net, stream, count, cp, config.precision.name, progress.update, by_position)
    seconds = distributed.max_over_ranks(time.monotonic() - start)
    found["perf/tokens_per_s"] = count * config.data.seq_len / seconds
    if by_position is None:
        return found, {}
    if other is not None:
        other.measure(stream, count, by_position)
    by_position.reduce()
    return found, tables_of(by_position, config.eval.short_context)


def new_tables(config: RunConfig, count: int, device: torch.device) -> ByPosition:
    """Empty ones, for `count` sequences."""
    model, topk = config.model, config.model.index_topk
    ends = bucket_ends(config.data.seq_len, topk, per_octave=config.eval.buckets_per_octave)
    topks = (topk, *(k for k in sorted(config.eval.k_sweep) if k != topk))
    return ByPosition(ends, count, model.num_hidden_layers, topks, device)


def tables_of(by_position: ByPosition, short_context: int) -> dict[str, Any]:
    """Reduced sums -> the tables of evaluation.json."""
    report = Report(by_position)
    if not report.filled:
        return {}
    return {
        "loss_by_position": report.loss(),
        "recall_by_position": report.recall(),
        "short_context": report.parity(short_context),
        "loss_by_topk": report.by_topk(),
    }


def speed(context: RunContext, net: Transformer) -> list[dict[str, Any]]:
    """`train.speed.generation_speed` on rank 0, alone on its machine; the same rows on every rank."""
    config, rows = context.config, None
    if context.is_main:
        lengths = sorted(config.eval.speed_lengths)
        with Progress(2 * len(lengths), "generation speed", True, unit="length") as progress:
            rows = generation_speed(net, lengths, config.precision.name, progress.update)
    return distributed.gather_objects(rows)[0] or []


def harness(context: RunContext, net: Transformer) -> list[dict[str, Any]]:
    """A row a task and metric of lm-evaluation-harness, dense and sparse attention side by side."""
    config = context.config
    own, autocast = config.eval, autocast_dtype(config.precision.name)
    found = {}
    for attention in ("dense", "sparse"):
        model = HarnessModel(net, context.tokenizer(), attention, autocast, config.train.seed)
        found[attention] = run_harness(model, own.harness, own.harness_path, own.harness_limit)
        cut = sum(distributed.gather_objects(model.truncated))
        if cut:
            context.say(f"note: {cut} requests of the harness lost their beginning under {attention} attention")
    return side_by_side(found["dense"], found["sparse"])


def long_problems(context: RunContext) -> LongProblems:
    """What `eval.tasks` asks. UserError where the shortest length holds no problem of a task."""
    config = context.config
    problems = LongProblems(config.data, context.tokenizer(), config.train.seed, "heldout")
    lengths = config.eval.lengths
    problems.check(
        config.eval.tasks, min(lengths or (config.data.seq_len,)), "eval.lengths" if lengths else "data.seq_len"
    )
    return problems


def long_tasks(context: RunContext, net: Transformer, problems: LongProblems) -> dict[str, list[Row]]:
    """`train.long_tasks.task_accuracy` of `eval.tasks`; nothing where none is named."""
    config, cp = context.config, context.cp
    if not config.eval.tasks:
        return {}
    count = len(cells(config.eval, config.data.seq_len)) * config.eval.problems
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
    engine = NativeEngine(net, context.tokenizer(), rl, context.stage.attention, autocast, Sampling())
    heldout = Heldout(config, context.tokenizer(), engine, offer)
    opened_judge = open_judge(rl, context.folder, distributed.rank(), distributed.world_size())
    with (
        offer,
        RewardPool(rl.reward_workers, rl.reward_timeout_s) as pool,
        opened_judge as client,
        Progress(len(heldout.mine()), "held-out problems", context.is_main, unit="answer") as progress,
    ):
        row = heldout.measure(pool, client, progress.update)
    return row | {"rollout/prompts_too_long": heldout.too_long}
