"""The roofline: its FLOPs are those of train/flops.py, its bytes and seconds follow from numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.hardware import Cluster, load_cluster
from conf.load import load
from conf.schema import ModelConfig
from train.flops import Row, expert_weights, row_flops, sampler_flops, visible_pairs
from train.roofline import KINDS, PARTS, Part, dollars_per_million, requests_that_fit, token_parts, token_seconds
from train.stages import STAGES


@pytest.fixture(scope="module")
def v3_2() -> ModelConfig:
    return load(["+stage=pretrain", "model=deepseek_v3_2"]).config.model


@pytest.fixture(scope="module")
def h800() -> Cluster:
    return load_cluster("h800")


def flops(model: ModelConfig, cluster: Cluster, kind: str, phase: str, position: int) -> dict[str, float]:
    """Under the names of train/flops.py, which does not tell experts from the rest."""
    found = {name: part.flops for name, part in token_parts(model, cluster, kind, phase, position).items()}
    assert tuple(found) == PARTS and found.pop("topk") == 0
    return found | {"linear": found["linear"] + found.pop("experts")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 2047, 2048, 131071])
def test_a_decoded_token_is_the_samplers(v3_2: ModelConfig, h800: Cluster, kind: str, position: int) -> None:
    expected = sampler_flops(v3_2, kind, position, position + 1, 1)
    if kind == "dense":  # the sampler runs an indexer that a dense model does not have
        expected |= {"index_linear": 0, "index_scores": 0}
    assert flops(v3_2, h800, kind, "decode", position) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefilled_sequence_is_the_forward_of_training(h800: Cluster, kind: str) -> None:
    model, length = ModelConfig(index_topk=16), 50
    absorbed = replace(h800, rates=replace(h800.rates, dense_prefill=1e-9)) if kind == "sparse" else h800
    tokens = [flops(model, absorbed, kind, "prefill", position) for position in range(length)]
    stage = STAGES["pretrain" if kind == "dense" else "evaluate"]
    expected = row_flops(model, stage, Row((length,), 0), mtp=False, backward=False)
    if kind == "sparse":  # serving scores nothing where all keys are selected
        spared = visible_pairs([model.index_topk]) / visible_pairs([length])
        expected["index_scores"] = round(expected["index_scores"] * (1 - spared))
    assert {name: sum(token[name] for token in tokens) for name in expected} == expected


def test_short_prefill_reads_all_keys_under_a_mask(v3_2: ModelConfig, h800: Cluster) -> None:
    """Absorbed, a pair costs 3.4 times a decompressed one: up to some 6K keys reading all is quicker than 2,048."""
    for position, masked in ((100, True), (5000, True), (9000, False)):
        dense, sparse = (token_parts(v3_2, h800, kind, "prefill", position)["attention"] for kind in KINDS)
        assert (sparse == dense) == masked


def test_bytes_of_a_decoded_token_at_128k(v3_2: ModelConfig, h800: Cluster) -> None:
    dense, sparse = (token_parts(v3_2, h800, kind, "decode", 131071) for kind in KINDS)
    assert dense["attention"].bytes == 61 * 1152 * 131072
    assert sparse["attention"].bytes == 61 * 656 * 2048
    assert sparse["index_scores"].bytes == 61 * 132 * 131072 and dense["index_scores"].bytes == 0
    assert sparse["topk"].bytes == 61 * 3 * 4 * 131072
    assert sparse["head"].bytes == 7168 * 129280 / 128  # one byte a parameter, 128 requests share them
    experts = 58 * 256 * 3 * 7168 * 2048
    assert expert_weights(v3_2) == (experts // 32, experts)
    assert sparse["experts"].bytes == pytest.approx(experts / 144 / 128)


def test_no_key_is_scored_where_all_are_selected(v3_2: ModelConfig, h800: Cluster) -> None:
    before, after = (token_parts(v3_2, h800, "sparse", "decode", position) for position in (2047, 2048))
    assert before["index_scores"] == replace(after["index_scores"], flops=0, bytes=0.0)
    assert before["topk"].bytes == 0 < after["topk"].bytes and after["index_scores"].bytes > 0


def test_a_part_takes_as_long_as_the_slower_of_products_and_reads(h800: Cluster) -> None:
    slow = replace(h800, gpu=replace(h800.gpu, memory_gb_per_s=10.0), rates=replace(h800.rates, memory=0.5))  # 5 GB/s
    assert Part(flops=4e12, bytes=5e9, tflops=2.0).seconds(slow) == 2.0
    assert Part(flops=1e12, bytes=15e9, tflops=2.0).seconds(slow) == 3.0


def test_halving_a_rate_doubles_what_it_bounds_and_nothing_else(v3_2: ModelConfig, h800: Cluster) -> None:
    halved = replace(h800, rates=replace(h800.rates, index_scores=h800.rates.index_scores / 2))
    before, after = (token_seconds(v3_2, cluster, "sparse", "prefill", 131071) for cluster in (h800, halved))
    assert after["index_scores"] == pytest.approx(2 * before["index_scores"])
    assert {name for name in PARTS if after[name] != before[name]} == {"index_scores"}


def test_dollars_and_memory(v3_2: ModelConfig, h800: Cluster) -> None:
    assert dollars_per_million(h800, 0.0036) == pytest.approx(2.0)  # 3,600 GPU seconds
    row = 1152 * 61
    free = (requests_that_fit(v3_2, h800, "dense", 1000) + 0.5) * row * 1000
    # GB at a byte each: 61 x MLA 11.413, 3 MLPs 1.189, 58 shared experts 2.554 and routers 0.106, embedding and head
    # 1.853, a 144th of the experts 4.542
    assert 0.9 * 80e9 - free == pytest.approx(21.657e9, abs=row * 1000)
    roomy = replace(h800, gpu=replace(h800.gpu, memory_gb=h800.gpu.memory_gb + row * 1000 / 0.9e9))
    assert requests_that_fit(v3_2, roomy, "dense", 1000) == requests_that_fit(v3_2, h800, "dense", 1000) + 1
