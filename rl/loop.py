"""GRPO (arXiv 2512.02556, sec. 3.1): sample -> reward -> advantage -> pack -> (mini-batches) loss, backward, step ->
metrics.

    torchrun launch/stage.py +stage=grpo init_from=runs/sparse_adapt rl.group_size=8

A step of the run is one iteration: every rank rolls out its share of the prompts in whole groups and all ranks take
the same `rl.mini_batches` optimiser steps on them. pi_old is what the sampler returned. The indexer stays as
adaptation left it, and so do the router's bias and the MTP module, which has no loss here.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial

from conf.schema import RLConfig
from model import Transformer
from model.generate import Sampling
from rl.ahead import AheadRollouts
from rl.groups import Experience, grade, judge
from rl.heldout import Heldout
from rl.ledger import add, iteration_flops, ledger_metrics, pretrain_flops
from rl.messages import Sample
from rl.offer import Offer
from rl.prompts import PromptStream, refuse_unknown_domains, train_prompts
from rl.reference import Reference
from rl.rewards.client import JudgeClient, open_judge
from rl.rewards.pool import RewardPool
from rl.rollout import RolloutEngine
from rl.rollout.lock_step import LockStep
from rl.rollout.native import NativeEngine
from rl.rollout.rollout_copy import RolloutCopy
from rl.rollout.tool_loop import ToolLoop
from rl.rollouts import Rollouts
from rl.samples import COLUMNS, MOST_ROWS, TABLE, SamplesWriter, cells, places_shown, sample_rows
from rl.summary import (
    add_over_ranks,
    domain_kl,
    domain_names,
    of_all_ranks,
    off_policy_metrics,
    rollout_row,
)
from rl.update import mini_batch, mini_batches_of, row_logprobs, run_mini_batch
from train import checkpoint, distributed
from train.checkpoint import TrainState
from train.engine import Engine
from train.guards import Guard
from train.optim import build_optimizer, rates, select_trainable
from train.precision import autocast_dtype
from train.run import RunContext
from train.tracker import table_due


def run(context: RunContext) -> None:
    """Trains the policy for `train.steps` iterations and writes `hf/`."""
    config, rl = context.config, context.config.rl
    context.guard = Guard(math.inf, config.train.max_skipped_steps)  # a policy loss has no scale for a spike
    offer = Offer(rl, context.tokenizer(), context.folder, distributed.rank())
    offer.open()
    stream = open_prompts(context, offer)
    opened_judge = open_judge(rl, context.folder, distributed.rank(), distributed.world_size())
    served = None
    if rl.engine != "native":
        from rl.rollout.served import Served

        served = Served(context)
    net = context.build_net()
    freeze(net, context)
    autocast = autocast_dtype(config.precision.name)
    optimizer = build_optimizer(net, config.optim, fused=config.parallel.offload != "none")
    engine = Engine(net, optimizer, config.optim, config.parallel, config.precision.name)
    cut = config.parallel.zero == 3 or config.parallel.ep > 1
    if served is None:
        apart = rl.one_step_off or (cut and rl.rollout_copy)
    else:
        apart = cut and rl.needs_reference
    copy = RolloutCopy(config.model, context.ops, context.device) if apart else None
    whole = net if copy is None else copy.net  # the policy as one rank can run it by itself, but for lock-step
    reference = None
    if rl.needs_reference:
        if copy is not None:
            copy.refresh(engine, 0)  # what the run starts from, also where it goes on
        reference = Reference(whole, context.folder, autocast, rl.reference_on_cpu)
    state = context.restore(engine)
    if copy is not None:
        copy.step = None
    if reference is not None:
        reference.restore(int(state.extra.get("reference_step", 0)))
    open_ledger(context, state)
    if rl.record_selection is None and not rl.records_selection(config.model):
        size = rl.selection_bytes(config.model) / 2**30
        context.say(
            f"mismatch/index_overlap is not logged, its records may take {size:.0f} GiB: rl.record_selection=true"
        )
    attention = context.stage.attention
    lock_step = LockStep(net, attention) if cut and copy is None and served is None else None
    engine_of_one: RolloutEngine = NativeEngine(
        whole, context.tokenizer(), rl, attention, autocast, lock_step=lock_step
    )
    measured_by: RolloutEngine = NativeEngine(whole, context.tokenizer(), rl, attention, autocast, Sampling())
    if served is not None:
        engine_of_one, measured_by = served.engine, served.plain
    player = ToolLoop(engine_of_one, context.tokenizer(), rl, offer, stream.room)
    steps = config.train.steps
    rollouts = AheadRollouts(player, stream, rl, steps) if rl.max_staleness else Rollouts(player, stream, rl)
    rollouts.load(context.held(), state.step, state.data_position, int(state.extra.get("prompts_too_long", 0)))
    heldout = Heldout(config, context.tokenizer(), measured_by, offer) if rl.eval_every else None

    def give_weights() -> None:
        """To whoever draws apart from the trainer's own."""
        if served is not None:
            served.give(engine, state.step)
        elif copy is not None:
            copy.refresh(engine, state.step)

    writer = open_samples(context, state) if context.is_main else None
    pool = RewardPool(rl.reward_workers, rl.reward_timeout_s)
    with (
        offer,
        pool,
        opened_judge as client,
        served or nullcontext(),
        rollouts,
        context.progress(state, "iteration") as progress,
    ):
        if heldout is not None and state.step == 0:
            give_weights()
            context.log(0, heldout.curve(pool, client))
        while state.step < config.train.steps:
            start = time.monotonic()
            give_weights()
            rollouts.start_iteration(state.step)
            samples = rollouts.groups()
            if rl.one_step_off and state.step + 1 < config.train.steps:
                rollouts.begin_next()
            experience, row = gather_experience(context, rollouts, samples, pool, client, state)
            members = share_out(experience, rl)
            row |= improve(context, engine, experience, members, reference, state)
            rollouts.end_next()
            state.step += 1
            row["tokens"] = state.tokens
            seconds = time.monotonic() - start
            row["perf/tokens_per_s"] = row.pop("new_tokens") / seconds
            row |= account(context, rollouts, experience, members, state, seconds)
            if served is not None:
                row |= served.take_metrics()
            measured = heldout is not None and (state.step % rl.eval_every == 0 or state.step == config.train.steps)
            if heldout is not None and measured:
                give_weights()
                row |= heldout.curve(pool, client)
            if measured or context.logs(state.step):
                context.log(state.step, row)
            if context.logs(state.step):
                show(context, writer, experience, state.step)
            context.watchdog.beat(f"iteration {state.step}")
            progress.update(1, reward=row["reward/mean"], length=row["rollout/length_mean"])
            finish_iteration(context, engine, reference, copy, rollouts, state)
    context.export(engine)
    engine.close()


def freeze(net: Transformer, context: RunContext) -> None:
    """Trains what the stage declares, less the MTP module: a zero gradient would still let weight decay shrink it."""
    select_trainable(net, context.stage)
    net.mtp.requires_grad_(False)


def open_prompts(context: RunContext, offer: Offer) -> PromptStream:
    """The run's prompts as they are asked, with what they are offered."""
    config = context.config
    refuse_unknown_domains(config)
    room = min(config.rl.pack_len, config.model.max_position_embeddings)
    return PromptStream(
        partial(train_prompts, config),
        lambda prompt: offer.encode(offer.messages(prompt)),
        config.rl,
        config.train.seed,
        room,
    )


def gather_experience(
    context: RunContext,
    rollouts: Rollouts,
    samples: list[Sample],
    pool: RewardPool,
    client: JudgeClient | None,
    state: TrainState,
) -> tuple[Experience, dict[str, float]]:
    """Samples -> reward -> advantage on this rank; the metrics are those of all ranks.

    With dynamic sampling groups of equal rewards are left out and further prompts rolled out in their places, in as
    many rounds as all ranks together need, up to `rl.max_resample`.
    """
    rl, stream = context.config.rl, rollouts.stream
    experience, resampled = Experience([]), 0
    for left in reversed(range(rl.max_resample + 1 if rl.dynamic_sampling else 1)):
        found = judge(*grade(samples, pool, rl, client), rl)
        experience.add(found)
        if not left:
            break
        equal = sorted(of_all_ranks(found.zero_spread))
        if not equal:
            break
        experience.leave_out(equal)
        samples = rollouts.replacements(equal)
        resampled += len(equal)
    for reason, count in Counter(experience.failures).items():
        context.say(f"iteration {state.step + 1}: {count} grade(s) failed, their groups are left out: {reason}")
    asked_judge = {} if client is None else client.take_counts()
    row, sums = rollout_row(experience, rl, rollouts.seconds, asked_judge)
    state.tokens += int(sums["tokens"])
    state.data_position, state.extra["prompts_too_long"] = stream.position, stream.too_long
    if rl.dynamic_sampling:
        row["rollout/resampled_groups"] = resampled
    row |= rollouts.metrics(experience, state.step)
    return experience, row | {"rollout/prompts_too_long": stream.too_long, "new_tokens": sums["tokens"]}


def open_ledger(context: RunContext, state: TrainState) -> None:
    """Finds the compute of pre-training once, at the start of the run; checkpoints keep it."""
    if "pretrain_flops" in state.extra:
        return
    known, reason = pretrain_flops(context.config)
    state.extra["pretrain_flops"] = known
    if known is None:
        context.say(f"flops/rl_over_pretrain is not logged, {reason}: rl.pretrain_tokens=N would give it")


def account(
    context: RunContext,
    rollouts: Rollouts,
    experience: Experience,
    members: list[list[int]],
    state: TrainState,
    seconds: float,
) -> dict[str, float]:
    """The ledger with this iteration of all ranks, and the rates at which its FLOPs were done and its tokens drawn."""
    config, rl = context.config, context.config.rl
    drawn, trained = rollouts.drawn, experience.trained
    scored: list[Sample] = []
    if rl.old_logprobs == "trainer":  # see `improve`
        scored = [trained[i] for inside in members[1:] for i in inside]
    spent = iteration_flops(config.model, context.stage, drawn, trained, rl.needs_reference, scored)
    spent = add_over_ranks(spent | {"tokens": sum(part.num_tokens for part in drawn)})
    tokens = spent.pop("tokens")
    state.extra["flops"] = add(state.extra.get("flops", {}), spent)
    found = ledger_metrics(state.extra["flops"], state.extra["pretrain_flops"])
    seconds_drawn = distributed.max_over_ranks(rollouts.seconds)
    if seconds_drawn:  # the last iteration of one-step-off draws nothing
        found["rollout/tokens_per_s"] = tokens / seconds_drawn
    return found | {"perf/model_tflops": sum(spent.values()) / seconds / 1e12}


def share_out(experience: Experience, rl: RLConfig) -> list[list[int]]:
    """Numbers of this rank's trained samples by mini-batch. All ranks call it."""
    trained = of_all_ranks(list({sample.request.prompt_index for sample in experience.trained}))
    return mini_batches_of(experience.trained, trained, rl)


def improve(
    context: RunContext,
    engine: Engine,
    experience: Experience,
    members: list[list[int]],
    reference: Reference | None,
    state: TrainState,
) -> dict[str, float]:
    """The iteration's optimiser steps, one a mini-batch; means over them (`mismatch/*`: of the first, before any
    step). Where no group is finished there is none, which is no fault."""
    config, rl = context.config, context.config.rl
    values = rates(state.step, config.train.steps, config.optim)
    attention, cp = context.stage.attention, context.cp
    batches = [mini_batch(experience, inside, rl, cp) for inside in members]
    if reference is not None:
        with reference.at_work(context.device) as forward:
            for batch in batches:
                batch.reference = row_logprobs(forward, batch.rows, rl, attention, cp)
    if rl.old_logprobs == "trainer":  # the first mini-batch has them from its own forward
        for batch in batches[1:]:
            batch.old = row_logprobs(engine.forward, batch.rows, rl, attention, cp)
    shown = places_shown(experience) if context.is_main else ()
    rows: list[dict[str, float]] = []
    off_policy: list[tuple[float, bool]] = []
    kl: list[tuple[str, float]] = []
    idle = True
    came = add_over_ranks({"trained": len(experience.trained), "failed_groups": experience.failed_groups})
    for number, batch in enumerate(batches):
        update = run_mini_batch(engine, experience, batch, rl, attention, cp, shown)
        if update is None and (came["trained"] or not came["failed_groups"]):
            continue  # fewer samples are trained than there are mini-batches
        idle = False
        if update is None:
            reason: str | None = "no group whose grades are whole" if number == 0 else None  # one fault, not one each
        else:
            reason = context.guard.judge(update.loss, update.grad_norm)
            engine.step(values, skip=reason is not None)
            rows.append({"loss/policy": update.loss, "optim/grad_norm": update.grad_norm, **update.metrics})
            off_policy += update.off_policy
            kl += update.kl
            experience.traces |= {} if reason else update.traces
        if reason is not None:
            context.say(f"iteration {state.step + 1}: mini-batch {number} left out: {reason}")
            context.guard.count_skip(state.step + 1, reason)
    found = mean_rows(rows)
    if rows:
        found = {name: value for name, value in found.items() if not name.startswith("mismatch/")}
        found |= {name: value for name, value in rows[0].items() if name.startswith("mismatch/")}
    found |= off_policy_metrics(of_all_ranks(off_policy), rl.off_policy_delta)
    if reference is not None:
        found |= domain_kl(of_all_ranks(kl), domain_names(experience.samples, rl))
    if idle:
        state.extra["idle_iterations"] = state.extra.get("idle_iterations", 0) + 1
        context.say(f"iteration {state.step + 1}: no optimiser step, every group is still unfinished")
    if rl.rollout_tokens is not None:
        found["rollout/idle_iterations"] = state.extra.get("idle_iterations", 0)
    return found | {"optim/lr": values["trunk"], "optim/skipped_steps": context.guard.skipped}


def mean_rows(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each key over the rows that have it."""
    found = {name: [row[name] for row in rows if name in row] for row in rows for name in row}
    return {name: sum(values) / len(values) for name, values in found.items()}


def open_samples(context: RunContext, state: TrainState) -> SamplesWriter:
    """samples.jsonl, cut back to where the run goes on, and the tracker's table with the same rows."""
    writer = SamplesWriter(context.folder, None if context.resumed is None else state.step)
    context.tracker.restore_table(TABLE, COLUMNS, (row for row in writer.table() if in_table(context, row[0])))
    return writer


def in_table(context: RunContext, step: int) -> bool:
    return table_due(context.config.tracker, step, context.config.train.steps, MOST_ROWS)


def show(context: RunContext, writer: SamplesWriter | None, experience: Experience, step: int) -> None:
    """A few of rank 0's samples into samples.jsonl, and now and then into the tracker's table."""
    if writer is None:
        return
    rows = sample_rows(experience, context.tokenizer(), context.config.rl)
    writer.write(step, rows)
    if in_table(context, step):
        context.tracker.table(TABLE, step, COLUMNS, [cells(row) for row in rows])


def finish_iteration(
    context: RunContext,
    engine: Engine,
    reference: Reference | None,
    copy: RolloutCopy | None,
    rollouts: Rollouts,
    state: TrainState,
) -> None:
    """Refreshes the reference, saves where it is due, and stops where any rank was asked to."""
    refresh = context.config.rl.reference_refresh
    net = engine.net
    assert isinstance(net, Transformer)
    if reference is not None and refresh and state.step % refresh == 0:
        if copy is not None:
            copy.refresh(engine, state.step)
        reference.refresh(net if copy is None else copy.net, state.step)
        state.extra["reference_step"] = state.step
    stop = distributed.max_over_ranks(float(context.stop_asked)) > 0
    if context.save_due(state.step):
        context.settle()  # no checkpoint comes or goes while their references are counted
        if reference is not None and context.is_main:
            reference.drop_unused(saved_references(context))
        context.save(engine, state, rollouts.tensors())
    if stop and state.step < context.config.train.steps:
        context.preempt(engine, state, rollouts.tensors())


def saved_references(context: RunContext) -> list[int]:
    """The references that the run's checkpoints need."""
    folders = checkpoint.step_folders(context.folder / "checkpoints").values()
    return [int(checkpoint.read_state(folder).extra.get("reference_step", 0)) for folder in folders]
