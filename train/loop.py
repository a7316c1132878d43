"""The training loop of pretrain, dense_warmup, sparse_adapt and sft: it reads the stage's declaration and knows no
stage.

A step takes `replicas x micro_batches` packed sequences by their global index, so another layout of the same number
gives the same step; under context parallelism cp ranks are one replica. Everything that decides about a step (loss,
gradient norm, a request to stop) is global, so all ranks agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from conf.schema import RunConfig
from data.packing import PackedBatch
from model import Transformer
from model.context import Context
from train import distributed
from train.engine import Engine
from train.engine_base import EngineBase
from train.flops import flops_per_token
from train.losses import (
    Counts,
    Sums,
    add_losses,
    add_sums,
    global_counts,
    mean_losses,
    micro_batch_loss,
    reduce_sums,
    step_metrics,
    step_shapes,
)
from train.optim import build_optimizer, rates, select_trainable
from train.parallel.ep import ExpertParallel
from train.parallel.pp import PipelineParallel
from train.pipeline_engine import PipelineEngine
from train.run import Clock, RunContext

STATS = {"dense": ("kl_uniform", "mass", "oracle_mass", "rows"), "selected": ("kl_uniform", "rows"), None: ()}


class Stream(Protocol):
    """The run's training sequences in order, the same step for every layout of ranks (`data/stream.py`)."""

    position: int  # global index of the next sequence

    def take(self, count: int, rank: int = 0, world: int = 1) -> list[PackedBatch]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Step:
    """What one step came to, the same on all ranks."""

    sums: Sums
    counts: Counts
    loss: float
    grad_norm: float
    stop: bool


def open_stream(context: RunContext) -> Stream:
    """The run's training data; rank 0 prepares it first, the others find it on disk."""
    from data.stream import TokenStream

    config, tokenizer = context.config, context.tokenizer()

    def build() -> TokenStream:
        return TokenStream(
            config.data,
            tokenizer,
            config.train.seed,
            cache_dir=context.cache,
            conversations=context.stage.conversations,
            progress=context.is_main,
        )

    first = build() if context.is_main else None
    if first is not None:
        from data.summary import one_line, summarise

        context.say(one_line(summarise(first)))
    distributed.barrier()
    return first or build()


def train(context: RunContext) -> None:
    """Trains the stage to `train.steps` and writes `hf/`."""
    config, stage = context.config, context.stage
    stream = open_stream(context)
    net = context.build_net()
    select_trainable(net, stage)
    optimizer = build_optimizer(net, config.optim, fused=config.parallel.offload != "none")
    engine = make_engine(net, optimizer, config, context.pp, context.ep)
    state = context.restore(engine)
    if "data" in state.extra:
        stream.load_state(state.extra["data"])
    clock, fresh_tokens = Clock(), 0.0
    losses: dict[str, float] = state.extra.setdefault("losses", {})  # since the last row
    with context.progress(state) as progress:
        while state.step < config.train.steps:
            clock.start()
            logged = context.logs(state.step + 1)
            batches = take_sequences(context, stream)
            step = run_step(context, engine, batches, logged)
            values = rates(state.step, config.train.steps, config.optim)
            reason = context.guard.judge(step.loss, step.grad_norm)
            engine.step(values, skip=reason is not None)
            state.step += 1
            state.data_position, state.extra["data"] = stream.position, stream.state()
            state.tokens += int(step.counts.rows)
            fresh_tokens += step.counts.rows
            if reason is not None:
                context.say(f"step {state.step} left out: {reason}")
                context.guard.count_skip(state.step, reason)
            else:
                add_losses(losses, step.sums, step.counts)
                if stage.router_bias:
                    engine.update_router_bias(step.sums["expert_counts"], config.train.bias_update_speed)
            clock.stop()
            if logged:
                speed = fresh_tokens / clock.read()
                row = metrics_row(context, step, values, state.tokens, speed) | mean_losses(losses)
                context.log(state.step, row)
                losses.clear()
                fresh_tokens = 0.0
            context.watchdog.beat(f"step {state.step}")
            progress.update(1, loss=step.loss)
            if context.save_due(state.step):
                context.save(engine, state)
            if step.stop and state.step < config.train.steps:
                context.preempt(engine, state)
    context.export(engine)
    engine.close()


def make_engine(
    net: Transformer, optimizer: Optimizer, config: RunConfig, pp: PipelineParallel, ep: ExpertParallel
) -> EngineBase:
    """The engine that the layout asks for, of a `net` that `pp` and `ep` have cut."""
    if config.parallel.pp > 1:
        return PipelineEngine(net, optimizer, config, pp, ep)
    return Engine(net, optimizer, config.optim, config.parallel, config.precision.name)


def take_sequences(context: RunContext, stream: Stream) -> list[dict[str, Tensor]]:
    """The micro-batches of this rank's replica in the next step, whole sequences on its device."""
    cp = context.cp
    found = stream.take(context.config.train.micro_batches, cp.replica, cp.replicas)
    return [{name: field.to(context.device) for name, field in batch.tensors().items()} for batch in found]


def run_step(context: RunContext, engine: EngineBase, batches: list[dict[str, Tensor]], stats: bool) -> Step:
    """Forward and backward of all micro-batches; the gradients then wait for `engine.step`."""
    stage, model = context.stage, context.config.model
    counts = global_counts(batches, context.cp.copies)
    shares = [context.cp.share(batch) for batch in batches]
    if isinstance(engine, PipelineEngine):
        total = engine.run(shares, counts, stats)
    else:
        assert isinstance(engine, Engine)
        total = accumulate(context, engine, shares, counts, stats)
    total["stop"] = total["loss"].new_tensor(float(context.stop_asked))
    mtp = model.num_mtp_layers
    routers = model.num_hidden_layers - model.first_k_dense_replace + mtp
    names = STATS[stage.indexer_loss] if stats else ()
    shapes = step_shapes(stage, model.num_hidden_layers + mtp, routers, model.n_routed_experts, names)
    found = reduce_sums(total, shapes)
    return Step(found, counts, float(found["loss"]), engine.grad_norm(), bool(found["stop"] > 0))


def accumulate(
    context: RunContext, engine: Engine, shares: list[tuple[dict[str, Tensor], Context]], counts: Counts, stats: bool
) -> Sums:
    """One micro-batch after the other, forward and backward."""
    stage, config = context.stage, context.config
    total: Sums = {}
    for j, (rows, place) in enumerate(shares):
        out = engine.forward(
            **rows,
            context=place,
            attention=stage.attention,
            indexer_loss=stage.indexer_loss,
            lm_loss=stage.lm_loss,
            trunk_grad=stage.trunk_grad,
            stats=stats and stage.indexer_loss is not None,
        )
        loss, sums = micro_batch_loss(out, counts, stage, config.train)
        add_sums(total, sums)
        engine.backward(loss, last=j == len(shares) - 1)
    return total


def metrics_row(
    context: RunContext, step: Step, values: Mapping[str, float], tokens: int, tokens_per_s: float
) -> dict[str, float]:
    """One row of metrics.jsonl; `values` are the step's rates, `tokens` those the run has seen."""
    stage, model = context.stage, context.config.model
    found = {"tokens": tokens} | step_metrics(step.sums, step.counts, stage, model)
    found["optim/grad_norm"] = step.grad_norm
    found["optim/lr"] = values["trunk"] if stage.trains_trunk else values["indexer"]
    if stage.trains_indexer:
        found["optim/indexer_lr"] = values["indexer"]
    found["optim/skipped_steps"] = context.guard.skipped
    found["perf/tokens_per_s"] = tokens_per_s
    found["perf/model_tflops"] = tokens_per_s * flops_per_token(model, stage, context.config.data.seq_len) / 1e12
    return found
