"""Decoding against the full forward, and sampling against its definition."""

from __future__ import annotations

import pytest
import torch

from model.generate import Ask, Decoder, Sampling, generate, sample
from model.ops.settings import OpSettings
from model.ops.vocab_loss import KeptSets
from model.replay import Replay
from tests.model.tiny import CONFIG, tiny_net

PROMPTS = [[3, 5, 7], [11] * 17 + [2, 4, 9], [1, 2], list(range(20, 33))]


def run(net, prompts=PROMPTS, seeds=(0, 1, 2, 3), eos_id=0, attention="sparse", steps=24, more=None, **sampling):
    asks = [Ask(prompt, seed, steps) for prompt, seed in zip(prompts, seeds, strict=True)]
    return generate(net, asks, Sampling(**sampling), eos_id, attention, **(more or {}))


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_reported_logprobs_are_those_of_the_full_forward(attention: str) -> None:
    """Ragged prompts, past index_topk: the cache and the gathered rows must give what one forward pass gives."""
    net = tiny_net()
    for prompt, made in zip(PROMPTS, run(net, attention=attention), strict=True):
        ids = torch.tensor([prompt + made.ids])
        logp = net.logits(ids, attention=attention)[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logp.gather(1, torch.tensor(made.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(made.logprobs), expected, rtol=0, atol=2e-5)


def test_decoding_selects_in_fp8_as_the_full_forward_does() -> None:
    net = tiny_net()
    net.use(OpSettings(fp8_index=True))
    for prompt, made in zip(PROMPTS, run(net), strict=True):
        logp = net.logits(torch.tensor([prompt + made.ids]), attention="sparse")[0].log_softmax(-1)[
            len(prompt) - 1 : -1
        ]
        expected = logp.gather(1, torch.tensor(made.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(made.logprobs), expected, rtol=0, atol=2e-5)
    decoded = Decoder(net, 4, 40).prefill(PROMPTS)
    net.use(OpSettings())
    assert (Decoder(net, 4, 40).prefill(PROMPTS) - decoded).abs().max() > 1e-3  # another selection


def test_prefill_in_chunks_equals_prefill_at_once(monkeypatch) -> None:
    net = tiny_net()
    whole = Decoder(net, 4, 40).prefill(PROMPTS)
    monkeypatch.setattr("model.generate.PREFILL_CHUNK", 4)
    torch.testing.assert_close(Decoder(net, 4, 40).prefill(PROMPTS), whole, rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    net = tiny_net()
    together = run(net)
    for i, prompt in enumerate(PROMPTS):
        assert run(net, [prompt], [i])[0].ids == together[i].ids
    assert run(net, PROMPTS[::-1], [3, 2, 1, 0])[::-1] == together


def test_seeds_decide_and_repeat() -> None:
    net = tiny_net()
    assert run(net) == run(net)
    assert [g.ids for g in run(net, seeds=(9, 8, 7, 6))] != [g.ids for g in run(net)]


def test_stops_at_eos_and_reports_why() -> None:
    net = tiny_net()
    free = run(net, temperature=0, eos_id=-1)
    assert all(g.finish_reason == "length" and len(g.ids) == 24 for g in free)
    eos = free[0].ids[5]
    stopped = run(net, temperature=0, eos_id=eos)[0]
    assert stopped.ids == free[0].ids[: free[0].ids.index(eos) + 1] and stopped.finish_reason == "stop"
    assert len(stopped.logprobs) == len(stopped.ids)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    token, logp, kept = sample(logits.expand(20_000, -1), uniform, Sampling(temperature=2.0))
    assert kept is None
    p = (logits[0] / 2.0).softmax(-1)
    torch.testing.assert_close(token.bincount(minlength=4) / 20_000, p, rtol=0, atol=1e-3)
    torch.testing.assert_close(logp, p.log()[token])


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_renormalises() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(1000) + 0.5) / 1000
    token, logp, kept = sample(p.log().expand(1000, -1), uniform, Sampling(top_p=0.8))
    assert kept[0].tolist() == [True, True, False, False]
    assert set(token.tolist()) == {0, 1}
    torch.testing.assert_close(logp.exp(), torch.tensor([0.625, 0.375])[token])


def test_refuses_an_empty_prompt_and_one_past_the_window() -> None:
    net = tiny_net()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        run(net, [[1], []], [0, 1])
    with pytest.raises(ValueError, match=f"exceeds max_position_embeddings={CONFIG.max_position_embeddings}"):
        run(net, [[1] * CONFIG.max_position_embeddings], [0])


def test_finished_samples_are_told_as_they_finish_each_once() -> None:
    net, heard = tiny_net(), []
    eos = run(net, temperature=0, eos_id=-1)[0].ids[5]
    made = run(net, temperature=0, eos_id=eos, more={"done": heard.append})
    assert sum(heard) == len(PROMPTS) and len(heard) == max(len(g.ids) for g in made)
    assert sum(heard[:6]) == sum(len(g.ids) <= 6 for g in made) >= 1


def test_top_k_keeps_the_likeliest_and_renormalises() -> None:
    p = torch.tensor([0.15, 0.3, 0.3, 0.05, 0.2])
    uniform = (torch.arange(1000) + 0.5) / 1000
    token, logp, kept = sample(p.log().expand(1000, -1), uniform, Sampling(top_k=2))
    assert set(token.tolist()) == {1, 2} and kept[0].nonzero().flatten().tolist() == [1, 2]
    torch.testing.assert_close(logp, torch.full_like(logp, 0.5).log())
    # top-p counts the mass that top-k has left: 0.3 / 0.8 + 0.3 / 0.8 = 0.75
    *_, kept = sample(p.log()[None], uniform[:1], Sampling(top_k=3, top_p=0.74))
    assert kept[0].nonzero().flatten().tolist() == [1, 2]


def test_places_are_filled_again_at_once(monkeypatch) -> None:
    """Three places for nine samples of three prompts: the same samples as with a place for each, in fewer steps than
    one batch after another would take, and every prompt is read once."""
    net, prompts, lengths = tiny_net(), [PROMPTS[i % 3] for i in range(9)], [3, 24, 8, 15, 4, 20, 1, 9, 12]
    asks = [Ask(prompt, seed, size) for seed, (prompt, size) in enumerate(zip(prompts, lengths, strict=True))]
    alone = generate(net, asks, Sampling(), eos_id=-1)
    assert [len(g.ids) for g in alone] == lengths
    prefilled: list[int] = []
    real = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, each: prefilled.append(len(each)) or real(self, each))
    heard: list[int] = []
    together = generate(net, asks, Sampling(), eos_id=-1, max_batch=3, done=heard.append)
    assert [g.ids for g in together] == [g.ids for g in alone] and sum(heard) == 9
    assert sum(prefilled) == 3
    by_prompt = sorted(range(9), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    one_after_another = sum(max(lengths[i] for i in by_prompt[start : start + 3]) for start in (0, 3, 6))
    assert len(heard) < one_after_another


def test_a_sample_goes_on_where_it_was_cut() -> None:
    net = tiny_net()
    (whole,) = run(net, PROMPTS[:1], [5], steps=20)
    (first,) = generate(net, [Ask(PROMPTS[0], 5, 8)], Sampling(), 0)
    (rest,) = generate(net, [Ask([*PROMPTS[0], *first.ids], 5, 12, drawn=8)], Sampling(), 0)
    assert first.ids + rest.ids == whole.ids
    torch.testing.assert_close(torch.tensor(first.logprobs + rest.logprobs), torch.tensor(whole.logprobs))


def test_whoever_stops_samples_ends_them() -> None:
    net = tiny_net()
    free = run(net, temperature=0, eos_id=-1)
    pair = free[1].ids[3:5]
    made = run(net, temperature=0, eos_id=-1, more={"stopped": lambda number, ids: ids[-2:] == pair})
    for each, whole in zip(made, free, strict=True):
        ends = [n for n in range(2, 25) if whole.ids[n - 2 : n] == pair]
        assert each.ids == whole.ids[: ends[0]] if ends else each.ids == whole.ids
        assert each.finish_reason == ("stop" if ends else "length")
    assert made[1].finish_reason == "stop" and any(each.finish_reason == "length" for each in made)


@pytest.mark.parametrize("max_batch", [1, 2, 4])
def test_whoever_stops_samples_is_asked_once_a_token_with_what_was_drawn(max_batch: int) -> None:
    """Also where places are filled again and the batch shrinks; not after eos, which ends a sample by itself."""
    net, lengths, told = tiny_net(), [3, 24, 8, 15], []
    asks = [Ask(prompt, seed, size) for seed, (prompt, size) in enumerate(zip(PROMPTS, lengths, strict=True))]

    def stopped(number: int, ids: list[int]) -> bool:
        told.append((number, list(ids)))
        return number == 1 and len(ids) == 5

    free = generate(net, asks, Sampling(), -1)
    eos = free[3].ids[6]
    made = generate(net, asks, Sampling(), eos, stopped=stopped, max_batch=max_batch)
    whole = [each.ids[: each.ids.index(eos) + 1] if eos in each.ids else each.ids for each in free]
    whole[1] = whole[1][:5]
    assert [each.ids for each in made] == whole and made[1].finish_reason == "stop"
    expected = [(i, ids[:n]) for i, ids in enumerate(whole) for n in range(1, len(ids) + 1) if ids[n - 1] != eos]
    assert sorted(told) == sorted(expected)


RECORD = frozenset({"experts", "selected"})


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_records_are_what_the_full_forward_chooses(batch: int) -> None:
    """Experts and positions of every row that ran, ragged and past index_topk, against a forward that is asked to
    repeat them: it would have chosen the same, and its log-probs over the kept words are the sampler's."""
    net = tiny_net()
    made = run(net, top_p=0.9, temperature=0.8, record=RECORD, more={"max_batch": batch})
    for prompt, each in zip(PROMPTS, made, strict=True):
        ids, size = [*prompt, *each.ids], len(prompt)
        assert len(each.experts) == len(each.selected) == len(ids) - 1 and len(each.kept) == len(each.ids)
        assert (each.experts >= 0).all() and (each.selected[:, :, 0] == 0).any()
        inputs = torch.tensor(ids[:-1])
        labels = torch.full_like(inputs, -100)
        labels[size - 1 :] = torch.tensor(each.ids)
        zeros = torch.zeros_like(inputs)
        out = net(
            inputs, zeros, labels, zeros - 100, torch.arange(len(inputs)), zeros, mtp=False,
            replay=Replay(each.experts.transpose(0, 1), each.selected.transpose(0, 1)),
            temperature=0.8, kept=KeptSets.of([[]] * (size - 1) + each.kept),
        )  # fmt: skip
        assert all(token in kept for token, kept in zip(each.ids, each.kept, strict=True))
        torch.testing.assert_close(out.token_logprobs[size - 1 :], torch.tensor(each.logprobs), rtol=0, atol=2e-5)
        agreeing, recorded = out.replay["routes"].unbind(1)
        assert torch.equal(agreeing, recorded) and (recorded == len(inputs)).all()
        shared, rows = out.replay["selection"].unbind(1)
        assert torch.equal(shared, rows) and (rows == max(0, len(inputs) - CONFIG.index_topk)).all()
