"""The whole model: packing, padding, multi-token prediction, isolation of the two losses, memory, checkpointing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model import ForwardOutput, Transformer
from model.ops.settings import OpSettings
from model.transformer import INDEXER_INIT
from tests.model.ops.cases import LargestTensor
from tests.model.tiny import CONFIG, batch, tiny_net

LENGTHS = [19, 7, 1, 14]
MODES = {
    "dense": {"attention": "dense"},
    "warmup": {"attention": "dense", "indexer_loss": "dense", "stats": True},
    "sparse": {"attention": "sparse"},
    "adapt": {"attention": "sparse", "indexer_loss": "selected", "stats": True},
}


def total_loss(out: ForwardOutput) -> torch.Tensor:
    loss = out.balance * 0.1
    if out.token_logprobs is not None and out.mtp_logprobs is not None:
        loss = loss - out.token_logprobs.sum() - 0.3 * out.mtp_logprobs.sum()
    return loss if out.indexer_kl is None else loss + out.indexer_kl.sum()


def slices(lengths: list[int]) -> list[slice]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("mode", MODES)
def test_packed_documents_equal_the_documents_alone_and_padding_adds_nothing(mode: str) -> None:
    net = tiny_net()
    packed = batch(LENGTHS, padding=5)
    together = net(**packed, **MODES[mode])
    assert int(together.num_rows) == sum(LENGTHS)
    apart = []
    for rows in slices(LENGTHS):
        alone = {name: field[rows] for name, field in packed.items()}
        alone["doc_start"] = torch.zeros_like(alone["doc_start"])
        apart.append(net(**alone, **MODES[mode]))
    for name in ("token_logprobs", "mtp_logprobs"):
        # a document too short for an MTP target runs without MTP when alone
        expected = torch.cat(
            [
                getattr(out, name) if getattr(out, name) is not None else torch.zeros(rows.stop - rows.start)
                for out, rows in zip(apart, slices(LENGTHS), strict=True)
            ]
        )
        torch.testing.assert_close(getattr(together, name)[: sum(LENGTHS)], expected, rtol=0, atol=2e-5)
        assert not getattr(together, name)[sum(LENGTHS) :].any()
    if together.indexer_kl is not None:
        torch.testing.assert_close(together.indexer_kl, sum(out.indexer_kl for out in apart), rtol=2e-5, atol=2e-5)
        for key, value in together.stats.items():
            torch.testing.assert_close(value, sum(out.stats[key] for out in apart), rtol=2e-5, atol=2e-5)
    main = CONFIG.num_hidden_layers - CONFIG.first_k_dense_replace
    counted = sum(out.expert_counts[:main] for out in apart)
    assert torch.equal(together.expert_counts[:main], counted)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_finite_with_padding_and_a_batch_of_padding_alone_is_zero(mode: str) -> None:
    net = tiny_net()
    total_loss(net(**batch(LENGTHS, padding=9), **MODES[mode])).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    empty = net(**batch([], padding=8), **MODES[mode])
    assert int(empty.num_rows) == 0 and not empty.token_logprobs.any() and float(empty.balance.detach()) == 0
    assert empty.indexer_kl is None or not empty.indexer_kl.any()


def test_dense_equals_sparse_when_every_token_is_selected() -> None:
    net = tiny_net(dataclasses.replace(CONFIG, index_topk=64))
    fields, grads = batch(LENGTHS, padding=3), []
    for attention in ("dense", "sparse"):
        net.zero_grad()
        out = net(**fields, attention=attention)
        total_loss(out).backward()
        grads.append((out.token_logprobs, {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=2e-5)
    assert grads[0][1].keys() == grads[1][1].keys()
    for name, grad in grads[0][1].items():
        torch.testing.assert_close(grad, grads[1][1][name], rtol=2e-4, atol=2e-5, msg=name)


def test_sparse_differs_from_dense_past_topk_rows_only() -> None:
    net, fields = tiny_net(), batch([20])
    dense, sparse = (net(**fields, attention=a).token_logprobs for a in ("dense", "sparse"))
    torch.testing.assert_close(dense[: CONFIG.index_topk], sparse[: CONFIG.index_topk], rtol=0, atol=1e-5)
    assert float((dense[CONFIG.index_topk :] - sparse[CONFIG.index_topk :]).abs().max().detach()) > 1e-3


def test_adaptation_keeps_the_two_gradients_apart_exactly() -> None:
    """LM loss into the indexer and KL into the trunk: no gradient at all, not a small one."""
    net, fields = tiny_net(), batch([25])
    out = net(**fields, attention="sparse", indexer_loss="selected")
    indexer = {name for name, _ in net.indexer_parameters()}
    out.indexer_kl.sum().backward(retain_graph=True)
    reached = {name for name, p in net.named_parameters() if p.grad is not None}
    assert reached == indexer
    net.zero_grad()
    (-out.token_logprobs.sum() - out.mtp_logprobs.sum()).backward()
    assert not {name for name, p in net.named_parameters() if p.grad is not None} & indexer


def test_warmup_reaches_the_indexer_alone_and_leaves_the_trunk_outside_autograd() -> None:
    net, fields = tiny_net(), batch([25])
    out = net(**fields, attention="dense", indexer_loss="dense", lm_loss=False, trunk_grad=False)
    assert out.token_logprobs is None
    out.indexer_kl.sum().backward()
    indexer = {name for name, _ in net.indexer_parameters()}
    assert {name for name, p in net.named_parameters() if p.grad is not None} == indexer
    assert all(bool(p.grad.any()) for name, p in net.named_parameters() if name in indexer)


def test_activation_checkpointing_changes_no_bit() -> None:
    net, fields, grads = tiny_net(), batch([21, 6]), []
    for on in (False, True):
        net.activation_checkpointing = on
        net.zero_grad()
        total_loss(net(**fields, attention="sparse", indexer_loss="selected")).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_activation_checkpointing_runs_each_layer_once_more() -> None:
    """The indexer's loss has a graph of its own in the forward: to use that up must not run the layer again."""
    net, calls = tiny_net(), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    net.activation_checkpointing = True
    net.layers[1].self_attn.q_a_proj.register_forward_hook(count)
    loss = total_loss(net(**batch([21, 6]), attention="sparse", indexer_loss="selected"))
    assert calls == 1
    loss.backward()
    assert calls == 2


def test_mtp_predicts_from_the_state_at_t_and_the_embedding_of_t_plus_1() -> None:
    """Against V3's eq. 21-23 written out: M [RMSNorm(Emb(t+1)); RMSNorm(h_t)], a layer, the shared head."""
    net, fields = tiny_net(), batch([12])
    out = net(**fields, attention="dense")
    captured: list[torch.Tensor] = []
    net.mtp[0].layer.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    hidden: list[torch.Tensor] = []
    net.norm.register_forward_hook(lambda _, __, result: hidden.append(result))
    again = net(**fields, attention="dense")
    torch.testing.assert_close(out.mtp_logprobs, again.mtp_logprobs, rtol=0, atol=0)

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight

    module = net.mtp[0]
    embedded = net.embed_tokens.weight[fields["next_ids"]]
    joined = torch.cat([rms(embedded, module.enorm.weight), rms(hidden[0], module.hnorm.weight)], -1)
    torch.testing.assert_close(captured[0], joined @ module.eh_proj.weight.T, rtol=1e-5, atol=1e-5)
    assert fields["mtp_labels"][:10].equal(fields["input_ids"][2:]) and not out.mtp_logprobs[10:].any()


@pytest.mark.parametrize("mode", ["warmup", "adapt"])
def test_no_step_holds_a_tensor_of_length_squared_or_length_by_vocabulary(mode: str, monkeypatch) -> None:
    monkeypatch.setattr("model.ops.vocab_loss.streaming.TILE_BYTES", 1 << 14)
    length = 1024
    config = dataclasses.replace(CONFIG, vocab_size=1024, num_hidden_layers=2)
    net = tiny_net(config)
    net.use(OpSettings(workspace=1 << 18))
    with LargestTensor() as seen:
        total_loss(net(**batch([length]), **{**MODES[mode], "stats": False})).backward()
    assert 0 < seen.elements < length * length, seen.elements


def test_a_fresh_indexer_is_n_0_02_with_an_identity_norm() -> None:
    net = tiny_net()
    trunk = {name: p.clone() for name, p in net.named_parameters() if ".indexer." not in name}
    net.init_indexer(seed=3)
    for name, p in net.indexer_parameters():
        if p.dim() == 1:
            assert p.eq(0.0 if name.endswith("bias") else 1.0).all()
        else:
            assert abs(float(p.detach().std()) / INDEXER_INIT - 1) < 0.15, name
    assert all(p.equal(trunk[name]) for name, p in net.named_parameters() if name in trunk)


def test_logits_refuse_what_they_cannot_mean() -> None:
    net = tiny_net()
    with pytest.raises(ValueError, match=r"\[B, T\], got shape \(4,\)"):
        net.logits(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="'dense' or 'sparse', got 'topk'"):
        net.logits(torch.zeros(1, 4, dtype=torch.int64), attention="topk")
    with pytest.raises(ValueError, match="indexer_loss='dense' cannot be taken under attention='sparse'"):
        net(**batch([4]), attention="sparse", indexer_loss="dense")


def test_the_full_size_model_builds_on_meta_and_counts_its_parameters() -> None:
    from conf.load import load

    config = load(["+stage=evaluate", "model=deepseek_v3_2"]).config.model
    with torch.device("meta"):
        net = Transformer(dataclasses.replace(config, num_nextn_predict_layers=0))
    indexer = sum(p.numel() for _, p in net.indexer_parameters())
    assert indexer == 61 * 13_959_424
    # DeepSeek-V3's 671,026,419,200 without the routers' biases, which are buffers here (58 layers of 256)
    assert sum(p.numel() for p in net.parameters()) - indexer + 58 * 256 == 671_026_419_200
