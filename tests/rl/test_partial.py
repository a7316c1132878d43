"""Partial rollouts, piece by piece: a sample that goes on, the groups that wait, their way through a file, their places
in the stream and their cost."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import RLConfig
from data.prompts import Prompt
from data.tokenizer import load_tokenizer
from rl.buffer import Buffer
from rl.ledger import iteration_flops
from rl.messages import CUT, RolloutRequest, Sample, Stretch
from rl.prompts import PromptStream
from rl.rollout.native import NativeEngine
from rl.stored import from_tensors, to_tensors
from tests.rl.samples import make_sample
from tests.train import tiny
from train import shards
from train.stages import STAGES

RL = RLConfig(record_selection=True, top_p=0.9, temperature=0.9, rollout_tokens=7)
REQUESTS = [
    RolloutRequest(i // 2, i % 2, "math", f"p{i}", "42", ids, seed=i, max_new_tokens=20, rubric="r", task="t")
    for i, ids in enumerate([(3, 5), (3, 5), (7, 8, 9), (7, 8, 9), tuple(range(30, 50)), (1,)])
]


def engine(rl: RLConfig = RL, seed: int = 0) -> NativeEngine:
    net = tiny.build(vocab_size=256)
    net.init_weights(seed)
    tokenizer = load_tokenizer("bytes")
    with torch.no_grad():  # a few words, again and again, and an end after some
        net.lm_head.weight[[ord(letter) for letter in "abc </"]] *= 20
        net.lm_head.weight[tokenizer.eos_token_id] *= 8
    return NativeEngine(net, tokenizer, rl)


def rounds(engine: NativeEngine, limit: int) -> tuple[list[Sample], int]:
    """Every request in pieces, each round one weight version later -> (samples, rounds)."""
    samples = engine.generate(REQUESTS, limit=limit)
    for version in count(1):
        begun = [sample for sample in samples if sample.finish_reason == CUT]
        if not begun:
            return samples, version
        engine.weight_version = version
        on = iter(engine.generate([], begun=begun, limit=limit))
        samples = [next(on) if sample.finish_reason == CUT else sample for sample in samples]


@pytest.mark.parametrize("limit", [1, 7, 19])
def test_in_pieces_as_at_once_where_the_weights_stay(limit: int) -> None:
    whole = engine().generate(REQUESTS)
    pieces, made = rounds(engine(), limit)
    assert made == math.ceil(max(s.num_sampled for s in whole) / limit)
    assert {s.finish_reason for s in whole} == {"stop", "length"}
    for one, other in zip(whole, pieces, strict=True):
        mine, theirs = one.tokens, other.tokens
        assert mine.ids == theirs.ids and mine.loss_mask == theirs.loss_mask and mine.turns == theirs.turns
        assert (one.request, one.text, one.finish_reason) == (other.request, other.text, other.finish_reason)
        assert mine.kept_sets == theirs.kept_sets and mine.kept_sets is not None
        assert theirs.behaviour_logprobs == pytest.approx(mine.behaviour_logprobs, abs=1e-4)
        assert torch.equal(mine.routed_experts, theirs.routed_experts)
        assert torch.equal(mine.selected, theirs.selected)
        prompt = len(one.request.prompt_ids)
        assert theirs.weight_versions == [0] * prompt + [n // limit for n in range(one.num_sampled)]


def test_what_was_drawn_stays_as_it_was_and_the_rest_is_of_the_new_weights() -> None:
    old, new = engine(), engine(seed=1)
    new.weight_version = 1
    first = [s for s in old.generate(REQUESTS, limit=7) if s.finish_reason == CUT]
    assert len(first) >= 3 and all(s.num_sampled == 7 for s in first)
    changed = 0
    for before, after in zip(first, new.generate([], begun=first), strict=True):
        size = len(before.tokens)
        for name in ("ids", "loss_mask", "behaviour_logprobs", "weight_versions", "turns", "kept_sets"):
            assert getattr(after.tokens, name)[:size] == getattr(before.tokens, name), name
        assert set(after.tokens.weight_versions[size:]) == {1}
        # the last token had not run: its row is the new weights', as what it leads to
        fresh = replace(before.request, prompt_ids=tuple(before.tokens.ids))
        (read,) = new.generate([fresh], limit=1)
        for name in ("routed_experts", "selected"):
            mine, then, now = (getattr(each, name) for each in (after.tokens, before.tokens, read.tokens))
            assert torch.equal(mine[: size - 1], then[: size - 1]) and torch.equal(mine[size - 1], now[size - 1])
            changed += not torch.equal(mine[: size - 1], now[: size - 1])
    assert changed


def test_a_stop_string_may_lie_across_the_cut() -> None:
    plain = engine()
    free = plain.generate(REQUESTS)
    string = free[0].text[5:9]
    rl = replace(RL, stop=(string,))
    whole = engine(rl).generate(REQUESTS)
    assert whole[0].num_sampled > 7 and whole[0].text == free[0].text[: free[0].text.index(string)]
    pieces, _ = rounds(engine(rl), 7)
    assert [(s.text, s.finish_reason, s.tokens.ids) for s in pieces] == [
        (s.text, s.finish_reason, s.tokens.ids) for s in whole
    ]


def sample(place: int, member: int, reason: str, size: int = 2) -> Sample:
    made = make_sample([1], [2] * size, [-1.0] * size, prompt_index=place, sample_index=member)
    return replace(made, finish_reason=reason)


def test_a_group_waits_for_its_last_sample() -> None:
    buffer = Buffer(prompts=4, group_size=2)
    one = buffer.take([sample(3, 0, "stop"), sample(3, 1, CUT), sample(1, 0, "stop"), sample(1, 1, "length")])
    assert one == [sample(1, 0, "stop"), sample(1, 1, "length")]
    assert buffer.places == [3] and buffer.unfinished == [sample(3, 1, CUT)]
    assert buffer.take([sample(3, 1, CUT, 4), sample(4, 0, CUT), sample(4, 1, CUT)]) == []  # place 0, by a replacement
    assert buffer.places == [0, 3]
    assert buffer.unfinished == [sample(4, 0, CUT), sample(4, 1, CUT), sample(3, 1, CUT, 4)]
    assert buffer.take([sample(3, 1, "stop", 6), *buffer.unfinished[:2]]) == [
        sample(3, 0, "stop"),
        sample(3, 1, "stop", 6),
    ]
    assert buffer.places == [0]


def assert_same(mine: Sample, theirs: Sample) -> None:
    assert repr(replace(mine, tokens=None)) == repr(replace(theirs, tokens=None))  # type: ignore[arg-type]
    for name, column in vars(mine.tokens).items():
        other = getattr(theirs.tokens, name)
        if isinstance(column, torch.Tensor):
            assert column.dtype == other.dtype and torch.equal(column, other), name
        else:
            assert repr(column) == repr(other), name  # NaN and -0.0 as well


def test_samples_come_back_from_a_checkpoints_file_to_the_bit(tmp_path: Path) -> None:
    """With and without what a sampler records, with a missing log-prob, a group of which one is finished."""
    drawn = engine().generate(REQUESTS[:4], limit=9)
    drawn[2].tokens.behaviour_logprobs[-1] = math.nan
    assert {s.finish_reason for s in drawn} == {CUT, "stop"} or all(s.finish_reason == CUT for s in drawn)
    bare = engine(replace(RL, record_selection=False, top_p=1.0)).generate(
        [replace(r, prompt_index=3) for r in REQUESTS[4:]]
    )
    bare = [replace(s, tokens=replace(s.tokens, routed_experts=None)) for s in bare]
    held = [*drawn, *(replace(s, finish_reason=CUT, text="\ud7ff🙂\n\0") for s in bare)]
    written = shards.write(tmp_path, 0, to_tensors(held))
    reader = shards.Reader(tmp_path, [written.name])
    found = from_tensors({name: reader.tensor(name) for name in reader.whole})
    for mine, theirs in zip(held, found, strict=True):
        assert_same(mine, theirs)
    assert shards.damage(tmp_path, written) is None
    assert to_tensors([]) == {} and from_tensors({}) == []
    with pytest.raises(AssertionError, match="graded"):
        to_tensors([replace(held[0], reward=1.0)])


def test_a_buffer_comes_back() -> None:
    buffer, other = Buffer(4, 2), Buffer(4, 2)
    buffer.take([sample(6, 0, CUT), sample(6, 1, "stop"), sample(1, 0, CUT), sample(1, 1, CUT)])
    other.load(buffer.tensors())
    assert other.groups == buffer.groups and other.places == [1, 2]
    other.load({})
    assert other.places == []


def stream(rl: RLConfig) -> PromptStream:
    def source(start: int) -> Any:
        return (Prompt(prompt="x", answer=str(i), domain="d", key=str(i)) for i in count(start))

    found = PromptStream(source, lambda prompt: [1], rl, seed=5, room=80)
    found.go_to(0, 0, 0)
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_free_places_get_the_next_prompts_whoever_owns_them(world: int) -> None:
    rl = RLConfig(prompts_per_step=6, group_size=2, rollout_tokens=4)
    streams = [stream(rl) for _ in range(world)]
    for taken in ([], [0, 1, 4], [2], list(range(6))):
        parts = [s.requests(rank, world, taken) for rank, s in enumerate(streams)]
        assert all(r.prompt_index % world == rank for rank, part in enumerate(parts) for r in part)
        found = sorted((r.prompt_index, int(r.answer)) for part in parts for r in part if r.sample_index == 0)
        first = streams[0].position - (6 - len(taken))
        assert found == list(zip([p for p in range(6) if p not in taken], count(first), strict=False))
    parts = [s.replacements([1, 2, 8], rank, world) for rank, s in enumerate(streams)]
    assert all(r.prompt_index % 6 % world == rank for rank, part in enumerate(parts) for r in part)
    assert sorted({r.prompt_index for part in parts for r in part}) == [7, 8, 14]


def test_a_sample_that_goes_on_costs_what_a_new_one_of_that_prompt_would() -> None:
    """Which tests/rl/test_ledger.py holds against torch's counter; not the whole sample once more."""
    after = make_sample([1, 2, 3], [4] * 9, [0.0] * 9, sample_index=1)
    fresh = make_sample([1, 2, 3, 4, 4, 4, 4], [4] * 5, [0.0] * 5, sample_index=0)

    def cost(sample: Sample, start: int) -> float:
        return iteration_flops(tiny.MODEL, STAGES["grpo"], [Stretch(sample, start)], [], False)["rollout"]

    assert cost(after, 7) == cost(fresh, 7) > 0
    first = replace(after, tokens=make_sample([1, 2, 3], [4] * 4, [0.0] * 4).tokens)
    assert cost(first, 3) + cost(after, 7) > cost(after, 3)  # the prefix was read again
