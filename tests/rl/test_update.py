"""Sampler against trainer, and a mini-batch's gradient under any layout of rows and ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import DomainConfig, OptimConfig, ParallelConfig, RLConfig
from model import Transformer
from model.context import Context
from rl.groups import Experience
from rl.messages import CUT, RolloutRequest, Sample, TokenColumns, Trace, extended
from rl.packing import empty_row, pack_samples
from rl.reference import Reference
from rl.rollout.native import NativeEngine
from rl.update import mini_batch, mini_batches_of, model_inputs, policy_tokens, row_logprobs, run_mini_batch
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train import distributed
from train.engine import Engine
from train.optim import SkippableAdamW, parameter_groups
from train.parallel.cp import ContextParallel

PROMPTS, GROUP, NEW = 4, 3, 14
RL = RLConfig(prompts_per_step=PROMPTS, group_size=GROUP, max_new_tokens=NEW, record_selection=True)


class _Alone:
    """Context parallelism of one rank, for tests without a process group."""

    size = 1

    def share(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Context]:
        return batch, Context.whole(batch["doc_start"])


ALONE: ContextParallel = _Alone()  # type: ignore[assignment]


class Numbers:
    """A tokenizer whose text is its ids."""

    eos_token_id = 1

    def decode(self, ids: list[int], **_: bool) -> str:
        return " ".join(str(i) for i in ids)


def draw(net: Transformer, indices: range, rl: RLConfig = RL) -> list[Sample]:
    """Samples of prompts of unequal lengths, a prompt longer than index_topk among them."""
    requests = [
        RolloutRequest(p, s, f"domain {p}", "", "", tuple(range(2, 4 + 3 * p)), 100 * p + s, rl.max_new_tokens)
        for p in indices
        for s in range(GROUP)
    ]
    return NativeEngine(net, Numbers(), rl).generate(requests)  # type: ignore[arg-type]


def experience(samples: list[Sample]) -> Experience:
    advantages = [float(s.request.sample_index - 1 + 0.5 * s.request.prompt_index) for s in samples]
    return Experience(samples, trained=samples, advantages=advantages)


def test_samples_hold_what_was_drawn():
    net = tiny.build()
    samples = draw(net, range(PROMPTS))
    assert [(s.request.prompt_index, s.request.sample_index) for s in samples] == [
        (p, s) for p in range(PROMPTS) for s in range(GROUP)
    ]
    for sample in samples:
        prompt = len(sample.request.prompt_ids)
        assert tuple(sample.tokens.ids[:prompt]) == sample.request.prompt_ids
        assert sample.tokens.loss_mask == [False] * prompt + [True] * (len(sample.tokens) - prompt)
        ended = sample.tokens.ids[-1] == 1
        assert sample.finish_reason == ("stop" if ended else "length")
        said = sample.tokens.ids[prompt:-1] if ended else sample.tokens.ids[prompt:]
        assert sample.text == " ".join(map(str, said))


def test_trainer_and_sampler_agree_on_every_log_prob():
    net = tiny.build()
    samples = draw(net, range(PROMPTS))
    assert max(len(s.tokens) for s in samples) > net.config.index_topk
    for row in pack_samples(samples, [0.0] * len(samples), 64):
        out = net(**row.inputs(), attention="sparse")
        drawn = row.sequence >= 0
        torch.testing.assert_close(out.token_logprobs[drawn], row.behaviour[drawn], rtol=0, atol=1e-5)


WAYS = {  # name -> how is sampled
    "whole": {},
    "hot": {"temperature": 1.7},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 5, "temperature": 0.6},
}


def log_probs(net: Transformer, samples: list[Sample], rl: RLConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(trainer's, sampler's) of every token drawn, and how much of the record the trainer would have chosen, [2]."""
    mine, theirs, counts = [], [], {}
    for row in pack_samples(samples, [0.0] * len(samples), 64):
        out, drawn = net(**model_inputs(row, rl, ALONE), attention="sparse"), row.sequence >= 0
        mine.append(out.token_logprobs[drawn].detach())
        theirs.append(row.behaviour[drawn])
        for name, value in out.replay.items():
            counts[name] = counts.get(name, 0) + value.sum(0)
    return torch.cat(mine), torch.cat(theirs), counts


@pytest.mark.parametrize("way", WAYS)
def test_with_what_the_sampler_did_repeated_the_trainer_agrees_with_it(way: str):
    rl, net = replace(RL, keep_selection=True, **WAYS[way]), tiny.build()
    samples = draw(net, range(PROMPTS), rl)
    mine, theirs, counts = log_probs(net, samples, rl)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert all(same == counted > 0 for same, counted in counts.values())
    if way.startswith("top"):
        without, _, _ = log_probs(net, samples, replace(rl, keep_sampling_mask=False))
        assert (without < theirs - 1e-3).sum() > 0.5 * len(theirs)  # the whole vocabulary: an off-policy trainer


def with_results(net: Transformer, samples: list[Sample], rl: RLConfig) -> list[Sample]:
    """The samples, cut after four tokens, told something, and gone on with."""
    engine, short = NativeEngine(net, Numbers(), rl), []  # type: ignore[arg-type]
    for sample in samples:
        at = len(sample.request.prompt_ids) + 4
        columns = {n: c if c is None else c[:at] for n, c in vars(sample.tokens).items()}
        told = extended(TokenColumns(**columns), [5, 6, 7 + sample.request.sample_index, 8, 9, 10, 11], 0, 1)
        short.append(replace(sample, tokens=told, finish_reason=CUT))
    return engine.generate([], begun=short)


def test_what_a_tool_said_is_read_and_not_learnt():
    """Results stand in the row without a label; every token that was drawn, before and behind them, has the log-prob,
    the words, the experts and the positions that the trainer finds there."""
    rl, net = replace(RL, keep_selection=True, top_p=0.8), tiny.build()
    samples = with_results(net, [s for s in draw(net, range(PROMPTS), rl) if s.num_sampled > 4], rl)
    assert len(samples) > 6
    for sample in samples:
        tokens, prompt = sample.tokens, len(sample.request.prompt_ids)
        assert tokens.loss_mask[prompt:] == [True] * 4 + [False] * 7 + [True] * (len(tokens) - prompt - 11)
        assert tokens.turns[prompt:] == [0] * 4 + [1] * (len(tokens) - prompt - 4)
        assert sample.text.split() == [str(i) for i in tokens.ids[prompt + 11 :] if i != 1]
        assert tokens.routed_experts is not None and tokens.selected is not None
        assert (tokens.routed_experts[:-1] >= 0).all() and (tokens.selected[:-1, :, 0] >= 0).all(), "results ran too"
    mine, theirs, counts = log_probs(net, samples, rl)
    assert len(mine) == sum(sample.num_sampled for sample in samples)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert all(same == counted > 0 for same, counted in counts.values())


def test_luck_goes_on_behind_a_result():
    """The n-th token of a sample is drawn by the n-th number of its seed, whatever stands in between."""
    net = tiny.build()
    first = draw(net, range(1))
    again = [with_results(net, [s for s in first if s.num_sampled > 4], RL) for _ in range(2)]
    assert again[0] == again[1]
    others = [replace(s, request=replace(s.request, seed=s.request.seed + 1)) for s in first]
    changed = with_results(net, [s for s in others if s.num_sampled > 4], RL)
    assert [s.tokens.ids for s in changed] != [s.tokens.ids for s in again[0]]


def test_rows_of_a_sample_are_trained_on_as_one():
    """Packed as two sequences in rows of their own, with the length of both; its trace is that of both."""
    net = tiny.build()
    samples = draw(net, range(2))
    forked = replace(samples[0], earlier=(samples[4].tokens, samples[5].tokens))
    rows = pack_samples([samples[1], forked], [1.0, -1.0], 32)
    packed = [pair for row in rows for pair in row.packed]
    assert sorted(packed) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    for row in rows:
        for number, (place, part) in enumerate(row.packed):
            sample = (samples[1], forked)[place]
            drawn = row.sequence == number
            assert row.lengths[number] == sample.num_sampled
            ids = [i for i, m in zip(sample.rows[part].ids, sample.rows[part].loss_mask, strict=True) if m]
            assert row.labels[drawn].tolist() == ids and set(row.advantages[drawn].tolist()) == {1.0 - 2 * place}
    assert forked.num_sampled == sum(s.num_sampled for s in (samples[0], samples[4], samples[5]))


def test_other_weights_keep_routes_and_selections_where_they_are_told_to():
    """A router and an indexer that moved since: repeated, only gates and scores differ; not repeated, choices do."""
    net = tiny.build()
    samples = draw(net, range(PROMPTS), RL)
    with torch.no_grad():
        for router in net.routers():
            router.weight.add_(0.1 * torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1)))
    net.init_indexer(3)
    kept, theirs, counts = log_probs(net, samples, replace(RL, keep_selection=True))
    free, _, live = log_probs(net, samples, replace(RL, keep_routing=False))
    for name, (same, counted) in counts.items():  # what they would have chosen is counted, whatever is enforced
        assert 0 < same < counted, name
    assert set(live) == {"routes", "selection"} and live["routes"][0] < live["routes"][1]
    assert (kept - theirs).abs().mean() < 0.8 * (free - theirs).abs().mean()


def test_an_empty_row_gives_zero_gradients_and_no_nan():
    net = tiny.build()
    out = net(**empty_row(16).inputs(), attention="sparse")
    out.token_logprobs.sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is None or bool((p.grad == 0).all()), name


@pytest.mark.parametrize("mini_batches", [1, 2, 5, 12])
def test_mini_batches_share_out_all_samples_in_order(mini_batches: int):
    samples = [
        Sample(RolloutRequest(p, s, "", "", "", (), 0, 1), None, "", "stop")  # type: ignore[arg-type]
        for p in range(PROMPTS)
        for s in range(GROUP)
    ]
    rl = replace(RL, prompts_per_step=PROMPTS, group_size=GROUP, mini_batches=mini_batches)
    members = mini_batches_of(samples, range(PROMPTS), rl)
    assert sum(members, []) == list(range(len(samples))) and all(members)
    sizes = [len(inside) for inside in members]
    assert max(sizes) - min(sizes) <= 1
    later = [replace(s, request=replace(s.request, prompt_index=s.request.prompt_index + PROMPTS)) for s in samples]
    assert mini_batches_of(later, range(PROMPTS, 2 * PROMPTS), rl) == members  # replacements


def test_mini_batches_share_out_what_is_trained_whoever_has_it():
    """Of places 0, 2 and 3, the last by a replacement; the first two are here."""
    samples = [
        Sample(RolloutRequest(p, s, "", "", "", (), 0, 1), None, "", "stop")  # type: ignore[arg-type]
        for p in (0, 6)
        for s in range(2)
    ]
    rl = replace(RL, prompts_per_step=4, group_size=2, mini_batches=3)
    assert mini_batches_of(samples, {6, 3, 0}, rl) == [[0, 1], [2, 3], []]
    assert mini_batches_of(samples, {6, 0}, replace(rl, mini_batches=6)) == [[0], [1], [2], [3], [], []]
    assert mini_batches_of([], {}, rl) == [[], [], []]


def _gradient(
    parallel: ParallelConfig, deal: list[list[int]], length: int, changes: dict[str, Any]
) -> tuple[np.ndarray, dict[str, float], list[tuple[float, bool]], dict[tuple[int, int], Trace]]:
    """All gradients of one mini-batch as the optimiser's step sees them (SGD at rate 1), with this rank's prompts.

    With a pi_old of the trainer that is taken between the sampler's weights and those of the gradient.
    """
    net = tiny.build()
    net.mtp.requires_grad_(False)
    for _, p in net.indexer_parameters():
        p.requires_grad_(False)
    mine = deal[distributed.rank()]
    found = experience([s for p in mine for s in draw(net, range(p, p + 1))])
    rl = replace(RL, clip_low=0.2, clip_high=0.3, pack_len=length, **changes)
    reference = Reference(net, Path()) if rl.needs_reference else None
    with torch.no_grad():  # off policy, so that ratio and clip matter; the same on every rank
        net.lm_head.weight.mul_(1.1)
    trained = [p for p in net.parameters() if p.requires_grad]
    before = torch.cat([p.detach().flatten().clone() for p in trained])
    optimizer = torch.optim.SGD(parameter_groups(net, 0.0), lr=1.0)
    engine = Engine(net, optimizer, OptimConfig(lr=1.0, clip=0.0), parallel)
    members = range(len(found.trained))
    head, cp = net.lm_head.weight, ContextParallel(parallel.cp)
    batch = mini_batch(found, members, rl, cp)
    if reference is not None:
        with reference.at_work(torch.device("cpu")) as forward:
            batch.reference = row_logprobs(forward, batch.rows, rl, "sparse", cp)
    if rl.old_logprobs == "trainer":
        now = head.detach().clone()
        head.data.mul_(0.97)
        batch.old = row_logprobs(engine.forward, batch.rows, rl, "sparse", cp)
        head.data.copy_(now)
    update = run_mini_batch(engine, found, batch, rl, "sparse", cp, members)
    assert update is not None
    engine.step({"trunk": 1.0, "indexer": 1.0})
    after = torch.cat([p.detach().flatten() for p in trained])
    found_metrics = {**update.metrics, "loss": update.loss, "sequences": update.num_sequences}
    asked = {i: found.trained[i].request for i in update.traces}
    traces = {(asked[i].prompt_index, asked[i].sample_index): trace for i, trace in update.traces.items()}
    return (before - after).numpy(), found_metrics, update.off_policy, traces


def metrics_of(traces: dict[tuple[int, int], Trace], metrics: dict[str, float] | None = None) -> dict[str, float]:
    """What the traces of all sequences say of the mini-batch's metrics, or what the metrics say."""
    told = {
        "policy/ratio_mean": np.mean([np.mean(trace.ratios) for trace in traces.values()]),
        "policy/clip_frac": np.mean([np.mean(trace.clipped) for trace in traces.values()]),
        "policy/off_policy_masked_frac": np.mean([trace.masked for trace in traces.values()]),
    }
    return told if metrics is None else {name: metrics[name] for name in told}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "loss_mean": "token",
            "off_policy_delta": 0.05,
            "domains": {"domain 1": DomainConfig(beta=0.5), "domain 2": DomainConfig(beta=1.5)},
        },
        {"old_logprobs": "trainer", "importance_cap": 1.05, "beta": 0.1},
    ],
    ids=["default", "token", "trainer"],
)
def test_the_gradient_depends_on_neither_rows_nor_ranks(changes: dict[str, Any]):
    """One rank with long rows against two dealt unequally, down to nothing, with short rows: one pads with empty rows.

    ZeRO-2 reduces in every backward pass, so ranks out of step would wait for one another for ever.
    """
    ((whole, metrics, spread, traces),) = run_ranks(_gradient, 1, ParallelConfig(zero=0), [[0, 1, 2, 3]], 256, changes)
    assert metrics["sequences"] == PROMPTS * GROUP == len(spread) and abs(whole).max() > 1e-3
    assert (metrics["policy/kl_ref"] > 0) if "policy/kl_ref" in metrics else not changes
    if "importance_cap" in changes:
        assert 0 < metrics["policy/importance_capped_frac"] < 1 and abs(metrics["policy/ratio_mean"] - 1) > 1e-3
    assert len(traces) == PROMPTS * GROUP and metrics_of(traces) == pytest.approx(metrics_of(traces, metrics))
    for deal in ([[3], [0, 2, 1]], [[0, 1, 2, 3], []]):
        for parallel in (ParallelConfig(zero=2), ParallelConfig(zero=2, cp=2), ParallelConfig(zero=2, offload="cpu")):
            parts = run_ranks(_gradient, 2, parallel, deal, 32, changes)
            for gradient, found, *_ in parts:
                np.testing.assert_allclose(gradient, whole, rtol=2e-4, atol=2e-6)
                assert found == pytest.approx(metrics, rel=1e-4, abs=1e-7)
            for rank, (*_, told) in enumerate(parts):
                own = deal[rank] if rank == 0 or parallel.cp == 1 else []
                assert sorted(told) == sorted((p, s) for p in own for s in range(GROUP))
                for place, trace in told.items():
                    assert trace.clipped == traces[place].clipped and trace.masked == traces[place].masked
                    assert trace.logprobs == pytest.approx(traces[place].logprobs, abs=1e-4)
                    assert trace.ratios == pytest.approx(traces[place].ratios, rel=1e-4)
                    assert trace.off_policy_kl == pytest.approx(traces[place].off_policy_kl, abs=1e-5)
            both = sorted(pair for _, _, mine, _ in parts for pair in mine)
            assert [negative for _, negative in both] == [negative for _, negative in sorted(spread)]
            assert [kl for kl, _ in both] == pytest.approx([kl for kl, _ in sorted(spread)], abs=1e-6)


def test_the_strength_of_the_kl_is_that_of_the_samples_domain():
    net = tiny.build()
    samples = draw(net, range(3))
    (row,) = pack_samples(samples, [0.0] * len(samples), 256)
    logprobs, rl = (
        torch.zeros(256),
        replace(RL, beta=0.25, domains={"domain 1": DomainConfig(beta=0.0), "domain 2": DomainConfig(beta=2.0)}),
    )
    tokens = policy_tokens(row, logprobs, rl, torch.zeros(256), None)
    assert tokens.beta is not None and tokens.old is None
    assert tokens.beta.tolist() == [0.25] * 3 + [0.0] * 3 + [2.0] * 3
    assert (
        policy_tokens(
            row, logprobs, replace(rl, beta=0.0, domains={"domain 1": DomainConfig(beta=0.0)}), None, None
        ).beta
        is None
    )
    first = policy_tokens(row, logprobs.requires_grad_(), replace(rl, old_logprobs="trainer"), torch.zeros(256), None)
    assert first.old is not None and not first.old.requires_grad


def _nothing_to_train() -> bool:
    net = tiny.build()
    engine = Engine(net, SkippableAdamW(parameter_groups(net, 0.0)), OptimConfig(lr=1.0), ParallelConfig(zero=1))
    nothing, cp = Experience([]), ContextParallel(1)
    return run_mini_batch(engine, nothing, mini_batch(nothing, [], RL, cp), RL, "sparse", cp) is None


def test_a_mini_batch_without_any_group_is_passed_over():
    assert run_ranks(_nothing_to_train, 2) == [True, True]
