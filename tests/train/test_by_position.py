"""Loss and recall by position against brute force, alike on any layout of ranks, and the verdict on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from data.packing import PackedBatch
from model import Transformer
from model.ops.index_topk.reference import index_scores
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train import distributed
from train.by_position import ByPosition, Report, bucket_ends
from train.evaluate import add_other, evaluate_losses
from train.parallel.cp import ContextParallel
from train.verdict import verdict

NUM, LENGTH = 6, 48
ENDS = [2, 4, 8, 16, 32, 48]
TOPKS = (4, 2, 9)


class Batches:
    def sequence(self, index: int) -> PackedBatch:
        return PackedBatch(**tiny.batch(index, LENGTH))


class Whole:
    """One document a sequence."""

    def sequence(self, index: int) -> PackedBatch:
        ids = torch.randint(0, 64, (LENGTH + 2,), generator=torch.Generator().manual_seed(index))
        rows = torch.arange(LENGTH)
        return PackedBatch(ids[:-2], ids[1:-1], ids[1:-1], ids[2:], rows, torch.zeros(LENGTH, dtype=torch.int64))


def tables(net: Transformer, cp: ContextParallel, batches: object, other: bool = False) -> ByPosition:
    found = ByPosition(ENDS, NUM, 2, TOPKS, torch.device("cpu"))
    evaluate_losses(net, batches, NUM, cp, by_position=found)  # type: ignore[arg-type]
    if other:
        add_other(net, "dense", batches, NUM, cp, "fp32", found)  # type: ignore[arg-type]
    found.reduce()
    return found


def measured(cp: int = 1) -> tuple[list, list, list, dict]:
    report = Report(tables(tiny.build(), ContextParallel(cp), Batches(), other=True))
    return report.loss(), report.recall(), report.by_topk(), report.parity(16)


def bucket_of(context: int) -> int:
    return next(i for i, end in enumerate(ENDS) if context <= end)


def test_buckets_are_octaves_with_an_end_at_topk() -> None:
    assert bucket_ends(100, 64) == [16, 32, 64, 100]
    assert bucket_ends(256, 100) == [16, 32, 64, 100, 128, 256]
    assert bucket_ends(12, 64) == [12]
    assert bucket_ends(64, 64, per_octave=2) == [16, 23, 32, 45, 64]
    assert bucket_ends(131072, 2048)[-3:] == [32768, 65536, 131072]


def test_losses_by_position_are_sums_over_the_tokens_at_it() -> None:
    """Against logits, one token at a time, summed in fp64."""
    ((loss, _, sweep, parity),) = run_ranks(measured, 1)
    net = tiny.build()
    sums: dict[str, dict[int, list[float]]] = {}
    for index in range(NUM):
        batch = tiny.batch(index, LENGTH)
        kinds = {"dense": ("dense", 4), "sparse": ("sparse", 4)} | {f"k{k}": ("sparse", k) for k in TOPKS}
        for name, (attention, k) in kinds.items():
            with torch.no_grad(), net.selecting(k):
                logits = net.logits(batch["input_ids"][None], batch["doc_start"][None], attention)[0]
            for t in range(LENGTH):
                if batch["labels"][t] >= 0:
                    value = -float(logits[t].double().log_softmax(-1)[batch["labels"][t]])
                    at = bucket_of(t - int(batch["doc_start"][t]) + 1)
                    sums.setdefault(name, {}).setdefault(at, []).append(value)
    assert [row["to"] for row in loss] == [ENDS[i] for i in sorted(sums["dense"])]
    for row in loss:
        at = ENDS.index(row["to"])
        assert row["from"] == (1 if at == 0 else ENDS[at - 1] + 1)
        assert row["tokens"] == len(sums["dense"][at])
        for name in ("dense", "sparse"):
            assert row[name] == pytest.approx(math.fsum(sums[name][at]) / row["tokens"], rel=1e-5)
        assert row["difference"] == pytest.approx(row["sparse"] - row["dense"], abs=1e-9)
        assert row["other"] == pytest.approx(row["dense"], abs=1e-6)  # the same weights: another way of computing
        assert row["against_difference"] == pytest.approx(row["difference"], abs=1e-6)
        if row["to"] <= 4:
            assert abs(row["difference"]) < 1e-6
    assert abs(loss[-1]["difference"]) > 1e-3  # past topk the two are not the same
    for row in sweep:
        if not row["all"]:
            at = ENDS.index(row["to"])
            expected = math.fsum(sums[f"k{row['k']}"][at]) - math.fsum(sums["dense"][at])
            assert row["difference"] == pytest.approx(expected / len(sums["dense"][at]), abs=2e-6)
    assert [row["k"] for row in sweep if row["all"]] == [2, 4, 9]
    assert parity["up_to"] == 16 and parity["within_topk_largest_token"] < 1e-5


def test_recall_and_overlap_by_position_and_layer() -> None:
    """Layer 0 by brute force: its inputs are embeddings, so all that follows can be made here in fp64, row by row."""
    ((_, recall, _, _),) = run_ranks(measured, 1)
    net = tiny.build()
    sums = {i: [0.0, 0.0, 0.0, 0] for i in range(len(ENDS))}
    for index in range(NUM):
        batch = tiny.batch(index, LENGTH)
        for t, mass, oracle, overlap in rows_of_layer_0(net, batch):
            held = sums[bucket_of(t - int(batch["doc_start"][t]) + 1)]
            for i, value in enumerate((mass, oracle, overlap, 1)):
                held[i] += value
    mine = [row for row in recall if row["layer"] == 0]
    assert len(mine) == sum(held[3] > 0 for held in sums.values())
    for row in mine:
        mass, oracle, overlap, rows = sums[ENDS.index(row["to"])]
        assert row["rows"] == rows
        assert row["mass_recall"] == pytest.approx(mass / rows, rel=1e-4)
        assert row["recall_of_oracle"] == pytest.approx(mass / oracle, rel=1e-4)
        assert row["overlap"] == pytest.approx(overlap / rows, abs=1e-4)
    assert {row["layer"] for row in recall} == {0, 1}  # MTP's is left out
    assert mine[0]["overlap"] == 1.0 and mine[-1]["overlap"] < 0.9


def rows_of_layer_0(net: Transformer, batch: dict[str, Tensor]) -> list[tuple[int, float, float, float]]:
    from model.rope import rope_table

    layer, k = net.layers[0], TOPKS[0]
    table = rope_table(net.config.rope, net.config.qk_rope_head_dim, batch["positions"])
    with torch.no_grad():
        x = layer.input_layernorm(net.embed_tokens(batch["input_ids"]))
        attention = layer.self_attn
        p = attention.project(x, *table)
        index = attention.indexer.project(x, p.q_latent, *table)
        scores = index_scores(index.q.double(), index.k.double(), index.w.double())
        q, keys = (x.double() for x in attention.absorb(p))
    found = []
    for t, start in enumerate(batch["doc_start"].tolist()):
        if start > t:
            continue
        seen = range(start, t + 1)
        heads = (q[t] @ keys[start : t + 1].T * attention.scale).softmax(-1)
        target = dict(zip(seen, heads.mean(0).tolist(), strict=True))
        chosen = sorted(seen, key=lambda s: (-float(scores[t, s]), s))[:k]  # noqa: B023
        best = sorted(seen, key=lambda s: (-target[s], s))[:k]  # noqa: B023
        mass, oracle = (sum(target[s] for s in which) for which in (chosen, best))
        found.append((t, mass, oracle, len({*chosen} & {*best}) / min(k, len(seen))))
    return found


def test_any_layout_of_ranks_measures_the_same() -> None:
    (alone,) = run_ranks(measured, 1)
    for world, cp in ((2, 1), (2, 2), (4, 2)):
        found = run_ranks(measured, world, cp)
        assert all(each == found[0] for each in found)
        for mine, theirs in zip(found[0][:3], alone[:3], strict=True):
            for row, other in zip(mine, theirs, strict=True):
                assert row == pytest.approx(other, rel=1e-4, abs=2e-6), (world, cp)


def spoilt(beyond: int) -> dict:
    """The verdict on a model whose sparse attention is wrong for rows past `beyond` tokens of context."""
    torch.manual_seed(0)
    net = tiny.build(index_topk=64)  # everything is kept: sparse is dense
    true = type(net).forward

    def wrong(self: Transformer, *args: Tensor, attention: str = "sparse", **rest: object) -> object:
        out = true(self, *args, attention=attention, **rest)  # type: ignore[arg-type]
        if attention == "sparse":
            out.token_logprobs = out.token_logprobs - 0.2 * (rest["positions"] >= beyond)  # type: ignore[operator]
        return out

    type(net).forward = wrong  # type: ignore[method-assign]  (this process alone)
    found = ByPosition(ENDS, NUM, 2, (64,), torch.device("cpu"))
    evaluate_losses(net, Whole(), NUM, ContextParallel(1), by_position=found)
    found.reduce()
    report = Report(found)
    return verdict({"loss_by_position": report.loss(), "short_context": report.parity(8)}, 0.01)


def test_a_model_made_wrong_beyond_a_position_departs_there() -> None:
    (found,) = run_ranks(spoilt, 1, 16)
    assert found["departs_at"] == 17 and found["departs_in"] == [[17, 32], [33, 48]]
    assert found["holds_up_to"] == 16 and found["undecided_in"] == [] and found["short_context_holds"] is True
    assert "departs from dense attention at 17 tokens of context: +0.2000" in found["words"]
    assert "surely within it up to 16" in found["words"]


def test_equal_models_do_not_depart() -> None:
    (found,) = run_ranks(spoilt, 1, 10_000)
    assert found["departs_at"] is None and found["holds_up_to"] == 48
    assert "No departure from dense attention up to 48 tokens" in found["words"]


def test_a_rank_without_a_sequence_takes_part() -> None:
    def one() -> tuple[int, int]:
        found = ByPosition(ENDS, 1, 2, (4,), torch.device("cpu"))
        evaluate_losses(tiny.build(), Batches(), 1, ContextParallel(1), by_position=found)
        found.reduce()
        return distributed.rank(), int(found.tokens.sum())

    assert len({tokens for _, tokens in run_ranks(one, 2)}) == 1
