"""Stop strings: found where decoding everything after each token finds them, at a cost that does not grow."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from conf.schema import RLConfig
from data.tokenizer import load_tokenizer
from model.generate import Sampling
from rl.groups import attempt_of
from rl.messages import RolloutRequest
from rl.rewards.exact_match import exact_match
from rl.rewards.format import well_formed
from rl.rollout.native import NativeEngine, text_of
from rl.stop import StopStrings
from tests.rl.samples import make_sample
from tests.train import tiny

TEXT = "Wägen: 你好, naïve 🙂 ok.\n\nUser: more 🙂🙂 words\n\n\nEnd. "


@pytest.fixture(scope="module", params=["bytes", "train:400"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return load_tokenizer(request.param, corpus=[TEXT * 20, "the user and the end of the words " * 20])


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("strings", [("\n\n",), ("🙂🙂",), ("End", "好, na"), ("s",), ("never there",)])
def test_a_string_is_found_at_the_token_that_completes_it(strings: tuple[str, ...], tokenizer: Any) -> None:
    """Also in ids that are no text: bytes that belong to no character, special tokens, ids past the tokenizer's."""
    decode, drawn = decoder(tokenizer), random.Random(0)
    stop, last = StopStrings(strings, decode), 0
    plain = tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]
    noise = [drawn.randrange(len(tokenizer) + 40) for _ in range(120)]
    mixed = [drawn.choice((plain[i % len(plain)], noise[i % 120])) for i in range(300)]
    for ids in (plain, noise, noise + plain, mixed, [len(tokenizer) + 5] * 60 + plain):
        brute = next((n for n in range(1, len(ids) + 1) if any(s in decode(ids[:n]) for s in strings)), None)
        found = next((n for n in range(1, len(ids) + 1) if stop.ended_by_last(ids[:n])), None)
        assert found == brute
        last += found or 0
    assert (last > 0) == (strings != ("never there",))


def test_the_text_ends_before_the_first_string() -> None:
    stop = StopStrings(("End", "\n\n"), lambda ids: "")
    assert stop.cut("a\nb\n\nEnd c") == "a\nb" and stop.cut("aEnd\n\n") == "a" and stop.cut("whole") == "whole"
    assert StopStrings((), lambda ids: "").cut("whole") == "whole"


def test_what_is_decoded_after_a_token_does_not_grow_with_the_sample(tokenizer: Any) -> None:
    decode, sizes = decoder(tokenizer), []
    stop = StopStrings(("never there",), lambda ids: sizes.append(len(ids)) or decode(ids))
    ids = tokenizer(TEXT * 80, add_special_tokens=False)["input_ids"]
    for n in range(1, len(ids) + 1):
        stop.ended_by_last(ids[:n])
    assert len(ids) > 1000 and max(sizes) <= 160


def engine(rl: RLConfig, **more: Any) -> NativeEngine:
    net = tiny.build(vocab_size=256)
    with torch.no_grad():  # a few words, again and again
        net.lm_head.weight[[ord(letter) for letter in "abc </"]] *= 20
    return NativeEngine(net, load_tokenizer("bytes"), rl, **more)


REQUESTS = [
    RolloutRequest(i // 2, i % 2, "", "", "", ids, seed=i, max_new_tokens=40)
    for i, ids in enumerate([(3, 5), (3, 5), (7, 8, 9), (7, 8, 9), tuple(range(30, 50)), (1,)])
]


def test_a_sample_ends_at_the_string_whatever_shares_its_batch() -> None:
    rl = RLConfig()
    free = engine(rl).generate(REQUESTS)
    strings = (free[0].text[5:7], free[2].text[9:12])
    stopping = engine(replace(rl, stop=strings))
    made = stopping.generate(REQUESTS)
    for sample, whole in zip(made, free, strict=True):
        ids = whole.tokens.ids[len(whole.request.prompt_ids) :]
        ends = [n for n in range(1, len(ids) + 1) if any(s in text_of(stopping.tokenizer, ids[:n]) for s in strings)]
        size = len(whole.request.prompt_ids) + (ends[0] if ends else len(ids))
        assert sample.tokens.ids == whole.tokens.ids[:size]  # the string's tokens are trained on: they were drawn
        assert sample.tokens.behaviour_logprobs == pytest.approx(whole.tokens.behaviour_logprobs[:size], abs=1e-5)
        assert sample.finish_reason == ("stop" if ends else whole.finish_reason)
        assert not any(s in sample.text for s in strings) and whole.text.startswith(sample.text)
    assert made[0].finish_reason == made[2].finish_reason == "stop" and made[0].num_sampled < 40
    for requests in ([REQUESTS[i]] for i in range(6)):
        (alone,) = stopping.generate(requests)
        assert alone in [replace(each, tokens=alone.tokens) for each in made]
        assert any(alone.tokens.ids == each.tokens.ids for each in made)
    backwards = stopping.generate(REQUESTS[::-1])[::-1]
    assert [(s.text, s.finish_reason, s.tokens.ids) for s in backwards] == [
        (s.text, s.finish_reason, s.tokens.ids) for s in made
    ]


def test_a_stopped_sample_is_graded_as_one_that_ended_by_itself() -> None:
    """The reward sees neither the string nor what the last token brought behind it."""
    rl = RLConfig()
    sample = make_sample([1], [2, 3], [-1.0, -1.0], text="thought</think> 42 ", answer="42")
    attempt = attempt_of(sample, rl)
    assert attempt.finished and exact_match(attempt) == well_formed(attempt) == 1.0
    assert exact_match(attempt_of(replace(sample, finish_reason="length"), rl)) == 0.0


def test_eos_before_the_string_ends_the_sample_as_ever() -> None:
    rl = RLConfig(stop=("zzz",))
    plain = engine(replace(rl, stop=()), sampling=Sampling(temperature=3.0)).generate(REQUESTS)
    assert engine(rl, sampling=Sampling(temperature=3.0)).generate(REQUESTS) == plain
