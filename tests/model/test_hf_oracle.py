"""Logits against transformers, both ways: DeepseekV3ForCausalLM dense, DeepseekV32ForCausalLM sparse, T > topk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conf.schema import ModelConfig, RopeConfig
from model.hf import from_pretrained, save_pretrained
from tests.model.hf_cases import (
    PLAIN,
    TOLERANCE,
    YARN,
    T,
    border_gaps,
    make_config,
    make_net,
    make_oracle,
    oracle_class,
    oracle_config,
    random_ids,
    watched_indexer,
)

ROPES = pytest.mark.parametrize("rope", [YARN, PLAIN], ids=["yarn", "plain"])


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.3, "logits too flat to compare"
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=TOLERANCE)


def assert_no_tie(seen: list[torch.Tensor], config: ModelConfig) -> None:
    assert len(seen) == config.num_hidden_layers
    for scores in seen:
        gaps = border_gaps(scores, config.index_topk)
        assert len(gaps) == len(scores) * (T - config.index_topk), "rows with a choice to make"
        assert gaps.min() > 2e-6, "a tie falls on the border: take another seed"


@ROPES
@torch.no_grad()
def test_reads_a_dense_checkpoint(rope: RopeConfig, tmp_path: Path) -> None:
    config = make_config(rope=rope)
    oracle, ids = make_oracle(config, "dense"), random_ids()
    oracle.save_pretrained(tmp_path)
    net = from_pretrained(tmp_path, index_n_heads=4, index_head_dim=16, index_topk=8)
    assert net.config.index_n_heads == 4
    assert_same_logits(net.logits(ids, attention="dense"), oracle(ids).logits)


@ROPES
@torch.no_grad()
def test_reads_a_sparse_checkpoint(rope: RopeConfig, tmp_path: Path) -> None:
    config = make_config(rope=rope)
    oracle, ids = make_oracle(config, "sparse"), random_ids()
    oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    with watched_indexer() as seen:
        theirs = oracle(ids).logits
    assert_no_tie(seen, config)
    net = from_pretrained(tmp_path)
    assert net.config == config
    assert_same_logits(net.logits(ids), theirs)
    assert (net.logits(ids, attention="dense") - theirs).abs().max() > 0.05, "the selection binds"


@ROPES
@torch.no_grad()
def test_writes_a_sparse_checkpoint(rope: RopeConfig, tmp_path: Path) -> None:
    config = make_config(rope=rope, num_nextn_predict_layers=1)
    net, ids = make_net(config, seed=1), random_ids()
    save_pretrained(net, tmp_path / "out", max_shard_bytes=200_000)
    from transformers import AutoModelForCausalLM

    oracle, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert type(oracle) is oracle_class("sparse")
    assert oracle.dtype == torch.float32
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # transformers has no MTP layer for V3.2
    assert {name.split(".")[2] for name in info["unexpected_keys"]} <= {str(config.num_hidden_layers)}
    with watched_indexer() as seen:
        theirs = oracle(ids).logits
    assert_no_tie(seen, config)
    assert_same_logits(net.logits(ids), theirs)


@ROPES
@torch.no_grad()
def test_writes_what_the_dense_class_reads(rope: RopeConfig, tmp_path: Path) -> None:
    config = make_config(rope=rope)
    net, ids = make_net(config, seed=2), random_ids()
    save_pretrained(net, tmp_path / "out")
    oracle, info = oracle_class("dense").from_pretrained(
        tmp_path / "out", config=oracle_config(config, "dense"), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert all(".indexer." in name for name in info["unexpected_keys"])
    assert_same_logits(net.logits(ids, attention="dense"), oracle(ids).logits)


@torch.no_grad()
def test_few_index_heads_tie_and_follow_a_stable_sort(tmp_path: Path) -> None:
    # With 4 heads, relu leaves many scores at exactly 0, at the border too: there the lowest index goes first.
    config = make_config(index_n_heads=4, num_hidden_layers=2)
    oracle, ids = make_oracle(config, "sparse"), random_ids(batch=4)
    oracle.save_pretrained(tmp_path)
    with watched_indexer(stable=True) as seen:
        theirs = oracle(ids).logits
    gaps = torch.cat([border_gaps(scores, config.index_topk) for scores in seen])
    assert (gaps == 0).sum() >= 5, "no tie to decide"
    assert gaps[gaps > 0].min() > 1e-6, "rounding decides: take another seed"
    net = from_pretrained(tmp_path)
    assert_same_logits(net.logits(ids), theirs)


@torch.no_grad()
def test_mtp_layer_against_transformers(tmp_path: Path) -> None:
    # transformers reads the MTP layer of V3 files alone, by a pattern of the main model (layer 61), dense
    from transformers.modeling_layers import MtpModel

    config = make_config(num_nextn_predict_layers=1, num_hidden_layers=2)
    net, ids = make_net(config, seed=4), random_ids(batch=1)
    save_pretrained(net, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 1
    oracle = oracle_class("dense").from_pretrained(
        tmp_path / "out", config=oracle_config(config, "dense"), attn_implementation="eager"
    )
    oracle._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]
    mtp = MtpModel.from_pretrained(oracle)
    hidden = oracle.model(ids).last_hidden_state
    positions = torch.arange(T - 1).unsqueeze(0)
    theirs = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=ids[:, 1:])
    expected = oracle.lm_head(theirs)[0, :-1].log_softmax(-1).gather(1, ids[0, 2:].unsqueeze(1)).squeeze(1)

    again = from_pretrained(tmp_path / "out")
    zeros = torch.zeros(T, dtype=torch.int64)
    next_ids, labels, mtp_labels = zeros.clone(), zeros - 100, zeros - 100
    next_ids[:-1], labels[:-1], mtp_labels[:-2] = ids[0, 1:], ids[0, 1:], ids[0, 2:]
    out = again(ids[0], next_ids, labels, mtp_labels, torch.arange(T), zeros, attention="dense")
    assert out.mtp_logprobs is not None
    torch.testing.assert_close(out.mtp_logprobs[:-2], expected, rtol=0, atol=TOLERANCE)
