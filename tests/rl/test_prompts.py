"""Which samples an iteration draws is a pure function of seed, iteration and global index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import pytest

from conf.errors import UserError
from conf.schema import DomainConfig, RLConfig, RunConfig
from data.prompts import Prompt
from rl.prompts import PATIENCE, PromptStream, refuse_unknown_domains, sample_seed

RL = RLConfig(prompts_per_step=6, group_size=3)


def numbers(*lengths: int) -> Callable[[int], Iterator[Prompt]]:
    """Prompts 0, 1, 2, ... whose texts take the lengths in turn."""

    def source(start: int) -> Iterator[Prompt]:
        for index in count(start):
            yield Prompt(prompt="x" * lengths[index % len(lengths)], answer=str(index), domain="d", key=str(index))

    return source


def stream(source: Callable[[int], Iterator[Prompt]], longest: int = 8) -> PromptStream:
    room = longest + RL.max_new_tokens
    found = PromptStream(source, lambda prompt: [ord(c) for c in prompt.prompt], RL, seed=5, room=room)
    found.go_to(0, 0, 0)
    return found


def test_ranks_share_out_what_one_rank_would_draw():
    alone = stream(numbers(1))
    shared = [stream(numbers(1)) for _ in range(3)]
    for _ in range(2):
        whole = alone.requests(0, 1)
        parts = [r for rank, s in enumerate(shared) for r in s.requests(rank, 3)]
        assert sorted(parts, key=lambda r: (r.prompt_index, r.sample_index)) == whole
        assert len(whole) == 18


def test_going_on_is_the_same_as_having_drawn():
    walked, jumped = stream(numbers(1, 2, 9)), stream(numbers(1, 2, 9))
    for _ in range(2):
        walked.requests(1, 2)
    jumped.go_to(2, walked.position, walked.too_long)
    assert jumped.requests(1, 2) == walked.requests(1, 2)
    assert walked.too_long == jumped.too_long > 0


def test_replacements_are_the_next_prompts_in_the_places_of_those_left_out():
    """Indices 1 and 4 of six: 7 and 10 take their places; whichever rank draws them, they and what follows are the
    same."""
    alone, shared = stream(numbers(1)), [stream(numbers(1)) for _ in range(2)]
    first = alone.requests(0, 1)
    more = alone.replacements([1, 4], 0, 1)
    assert [(r.prompt_index, r.answer) for r in more if r.sample_index == 0] == [(7, "6"), (10, "7")]
    assert not {r.seed for r in first} & {r.seed for r in more}
    assert more[0].seed == sample_seed(5, 0, 7, 0)
    for s, rank in zip(shared, range(2), strict=True):
        s.requests(rank, 2)
    assert [r for rank, s in enumerate(shared) for r in s.replacements([1, 4], rank, 2)] == more
    assert alone.position == shared[0].position == 8
    assert alone.requests(0, 2) == shared[0].requests(0, 2)
    jumped = stream(numbers(1))
    jumped.go_to(1, 8, 0)
    assert jumped.requests(0, 2) == shared[1].requests(0, 2)


def test_settings_for_a_domain_without_prompts_are_the_users_mistake():
    def run(*names: str) -> RunConfig:
        rl = replace(RL, tasks=("words", "sorting"), domains={name: DomainConfig(beta=0.1) for name in names})
        return RunConfig("grpo", "x", rl=rl)

    refuse_unknown_domains(run("words"))
    with pytest.raises(UserError, match=r"names word, a domain without any prompt: did you mean words\?"):
        refuse_unknown_domains(run("sorting", "word"))


def test_no_two_samples_share_a_seed():
    seeds = {sample_seed(s, i, p, g) for s in range(3) for i in range(20) for p in range(10) for g in range(8)}
    assert len(seeds) == 3 * 20 * 10 * 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3, 4) == sample_seed(1, 2, 3, 4)


def test_long_prompts_are_passed_over_and_counted():
    found = stream(numbers(9, 2)).requests(0, 1)
    assert [r.answer for r in found if r.sample_index == 0] == ["1", "3", "5", "7", "9", "11"]


def test_only_long_prompts_or_none_is_the_users_mistake():
    with pytest.raises(UserError, match=rf"{PATIENCE} prompts in a row are longer than 8 tokens.*raise rl.pack_len"):
        stream(numbers(9)).requests(0, 1)
    with pytest.raises(UserError, match="holds no prompt"):
        stream(lambda start: iter([]))
