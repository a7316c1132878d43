"""Decoding against the full forward, and sampling against its definition."""

from __future__ import annotations

import pytest
import torch

from model.generate import Decoder, generate, sample
from model.ops.settings import OpSettings
from tests.model.tiny import CONFIG, tiny_net

PROMPTS = [[3, 5, 7], [11] * 17 + [2, 4, 9], [1, 2], list(range(20, 33))]


def run(net, prompts=PROMPTS, seeds=(0, 1, 2, 3), temperature=1.0, top_p=1.0, eos_id=0, attention="sparse", steps=24):
    return generate(
        net, prompts, steps, temperature=temperature, top_p=top_p, eos_id=eos_id, seeds=list(seeds), attention=attention
    )


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
    token, logp = sample(logits.expand(20_000, -1), uniform, temperature=2.0, top_p=1.0)
    p = (logits[0] / 2.0).softmax(-1)
    torch.testing.assert_close(token.bincount(minlength=4) / 20_000, p, rtol=0, atol=1e-3)
    torch.testing.assert_close(logp, p.log()[token])


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_renormalises() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(1000) + 0.5) / 1000
    token, logp = sample(p.log().expand(1000, -1), uniform, temperature=1.0, top_p=0.8)
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
    made = generate(
        net, PROMPTS, 24, temperature=0, top_p=1.0, eos_id=eos, seeds=[0, 1, 2, 3], done=lambda n: heard.append(n)
    )
    assert sum(heard) == len(PROMPTS) and len(heard) == max(len(g.ids) for g in made)
    assert sum(heard[:6]) == sum(len(g.ids) <= 6 for g in made) >= 1
