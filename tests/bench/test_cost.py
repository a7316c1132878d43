"""The cost formulas: pair counts by brute force, published arithmetic of DeepSeek-V3.2, and the page made from them."""

from __future__ import annotations

import json

import pytest

from bench.cost import (
    DOCS,
    crossover,
    first_length,
    generated,
    growths,
    measured_crossover,
    measured_sizes,
    pairs,
    picture,
    totals,
    v3_2,
    with_generated,
    work,
)
from bench.length import layer_flops
from bench.registry import RESULTS


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 33])
@pytest.mark.parametrize("topk", [1, 7, 40])
def test_pairs_equal_brute_force(length: int, topk: int) -> None:
    visible = [(t, s) for t in range(length) for s in range(length) if s <= t]
    selected = [(t, s) for t, s in visible if sum(1 for u, r in visible if u == t and r < s) < topk]
    assert pairs(length, topk) == (len(visible), len(selected))


# GFLOP per token and layer at 8K, 32K and 128K, from a table made without this code: H = 128, nope 128, rope 64, v 128,
# latent 512, indexer 64 x 128, k = 2048, with T/2 visible and mean(min(k, t)) selected keys a row.
PUBLISHED = {
    "dense_forward": ("0.336", "1.34", "5.37"),
    "dense_backward": ("0.873", "3.49", "13.96"),
    "absorbed_forward": ("1.14", "4.56", "18.3"),
    "absorbed_backward": ("2.89", "11.5", "46.2"),
    "index": ("0.067", "0.268", "1.07"),
    "sparse_forward": ("0.50", "0.55", "0.57"),
    "sparse_backward": ("1.26", "1.40", "1.43"),
    "sparse_target": ("0.26", "0.29", "0.30"),
    "sparse_index_loss": ("0.09", "0.10", "0.10"),
    "warmup_target": ("0.20", "0.81", "3.22"),
}


@pytest.mark.parametrize("column, length", [(0, 8192), (1, 32768), (2, 131072)])
def test_v3_2_equals_published_arithmetic(column: int, length: int) -> None:
    part = {name: flops / length / 1e9 for name, flops in work(v3_2(), length).items()}
    for name, printed in PUBLISHED.items():
        digits = len(printed[column].split(".")[1])
        assert f"{part[name]:.{digits}f}" == printed[column], name
    again = part["warmup_index_loss"] + part["warmup_index_again"]
    assert f"{again:.2f}" == ("0.27", "1.07", "4.30")[column]


@pytest.mark.parametrize("length, forward, training", [(8192, 0.59, 0.55), (32768, 1.63, 1.85), (131072, 3.27, 5.57)])
def test_v3_2_ratios(length: int, forward: float, training: float) -> None:
    part, total = work(v3_2(), length), totals(v3_2(), length, kernels=True)
    assert part["dense_forward"] / (part["index"] + part["sparse_forward"]) == pytest.approx(forward, abs=0.01)
    assert total["dense"] / total["sparse"] == pytest.approx(training, abs=0.01)
    assert total["warmup"] / total["dense"] == pytest.approx(0.67, abs=0.01)


def test_v3_2_crosses_between_15_and_17_thousand() -> None:
    assert all(15_000 < length < 17_000 for length in crossover(v3_2()).values())


def test_first_length_is_where_the_answer_turns() -> None:
    assert [first_length(lambda length, edge=edge: length >= edge, most=64) for edge in (1, 2, 37, 64)] == [
        1,
        2,
        37,
        64,
    ]
    with pytest.raises(AssertionError, match="never cheaper"):
        first_length(lambda length: False)


@pytest.mark.parametrize("length", [100, 4096])
def test_agrees_with_the_formula_of_the_length_benchmark(length: int) -> None:
    model = measured_sizes()
    total = totals(model, length, kernels=False)
    for kind, stage in {"warmup": "dense_warmup", "sparse": "sparse_adapt"}.items():
        assert total[kind] == sum(layer_flops(model, stage, length).values())


def test_a_kernel_s_step_counts_more_than_plain_torch_s() -> None:
    plain, fused = (totals(v3_2(), 8192, kernels) for kernels in (False, True))
    part = work(v3_2(), 8192)
    assert fused["dense"] == plain["dense"]
    assert fused["sparse"] - plain["sparse"] == part["sparse_target"]
    assert fused["warmup"] - plain["warmup"] == part["warmup_target"] + part["index"]


def test_crossover_lies_on_the_line_between_two_lengths() -> None:
    def row(length: int, dense: float, sparse: float) -> dict:
        return {"T": length, "seconds": {"dense": dense, "sparse": sparse}}

    assert measured_crossover([row(1024, 0.5, 1.0), row(4096, 2.0, 1.0), row(8192, 9.0, 1.0)]) == 2048
    assert measured_crossover([row(1024, 2.0, 1.0), row(4096, 4.0, 1.0)]) is None
    assert measured_crossover([row(1024, 0.1, 1.0), row(4096, 0.5, 1.0)]) is None


def test_growth_says_how_far_time_is_off_the_formula() -> None:
    before, after = (
        {
            "seconds": dict.fromkeys(("dense", "warmup", "sparse"), s),
            "gflop": {"dense": 1.0, "warmup": 1.0, "sparse": g},
        }
        for s, g in ((1.0, 1.0), (3.0, 2.0))
    )
    assert growths(before, after)["sparse"] == {"time": 3.0, "formula": 2.0, "off": 1.5}


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = (DOCS / "cost.md").read_text()
    changed = with_generated(page, "new\n")
    assert with_generated(changed, "newer\n") == changed.replace("\nnew\n", "\nnewer\n")
    assert changed.splitlines()[0] == page.splitlines()[0] and "## Measured" in page and "## Measured" not in changed


def test_the_page_and_its_picture_are_those_of_the_result() -> None:
    result = json.loads((RESULTS / "cost.json").read_text())
    page = (DOCS / "cost.md").read_text()
    assert with_generated(page, generated(result)) == page
    assert (DOCS / "cost.svg").read_text() == picture(result)
