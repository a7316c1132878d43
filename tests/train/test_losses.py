"""The loss of a step is the same number however its sequences are laid out, and each part is what it says."""

from __future__ import annotations

import pytest
import torch

from conf.schema import TrainConfig
from tests.distributed.helper import run_ranks
from tests.train import tiny
from train.losses import (
    Counts,
    add_sums,
    global_counts,
    indexer_metrics,
    load_metrics,
    micro_batch_loss,
    reduce_sums,
    step_metrics,
)
from train.stages import STAGES


def test_the_parts_are_means_over_their_own_counts() -> None:
    net, train = tiny.build(), TrainConfig(mtp_weight=0.25, balance_weight=0.5)
    out = net(**tiny.batch(0), indexer_loss="selected")
    counts = Counts(lm=10, mtp=8, rows=13, sequences=2)
    loss, sums = micro_batch_loss(out, counts, STAGES["sparse_adapt"], train)
    lm, mtp = -out.token_logprobs.sum(), -out.mtp_logprobs.sum()
    wanted = lm / 10 + 0.25 * mtp / 8 + out.indexer_kl.sum() / 13 + 0.5 * out.balance / 2
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float(sums["lm"]) == pytest.approx(float(lm.detach()))
    assert out.balance > 0 and out.indexer_kl.shape == (3,)


def test_warmup_has_the_indexers_loss_alone() -> None:
    out = tiny.build()(**tiny.batch(0), attention="dense", indexer_loss="dense", lm_loss=False, trunk_grad=False)
    loss, _ = micro_batch_loss(out, Counts(1, 1, 13, 1), STAGES["dense_warmup"], TrainConfig())
    assert float(loss.detach()) == pytest.approx(float(out.indexer_kl.detach().sum()) / 13, rel=1e-6)


def test_a_batch_without_mtp_targets_gives_zero_gradients() -> None:
    net = tiny.build()
    batch = tiny.batch(0)
    batch["mtp_labels"] = torch.full_like(batch["mtp_labels"], -100)
    loss, sums = micro_batch_loss(net(**batch), Counts(1, 1, 1, 1), STAGES["pretrain"], TrainConfig(balance_weight=0.0))
    loss.backward()
    assert sums["mtp"] == 0
    learns = [p for name, p in net.mtp.named_parameters() if ".indexer." not in name]
    assert all(p.grad is not None and not p.grad.any() for p in learns)  # another rank has targets and reduces them


def test_counts_and_sums_run_over_all_ranks() -> None:
    def count() -> tuple[Counts, dict]:
        rank = torch.distributed.get_rank()
        counts = global_counts([tiny.batch(rank), tiny.batch(rank + 2)])
        sums = {"a": torch.tensor(1.0 + rank).double(), "b": torch.ones(rank + 1, 2).double(), "unnamed": torch.ones(1)}
        return counts, reduce_sums(sums, {"a": (), "b": (3, 2), "missing": (2,)})

    batches = [tiny.batch(i) for i in range(4)]
    for counts, sums in run_ranks(count, 2):
        assert counts.lm == sum(int((b["labels"] >= 0).sum()) for b in batches)
        assert counts.mtp == sum(int((b["mtp_labels"] >= 0).sum()) for b in batches)
        assert (counts.rows, counts.sequences) == (4 * 13, 4)
        assert sums["a"] == 3.0
        assert sums["b"].tolist() == [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]  # a rank without MTP has fewer rows
        assert sums["missing"].tolist() == [0.0, 0.0] and "unnamed" not in sums


def test_micro_batches_add_up_with_and_without_mtp() -> None:
    total: dict = {}
    add_sums(total, {"expert_counts": torch.ones(3, 2)})
    add_sums(total, {"expert_counts": torch.ones(2, 2), "lm": torch.tensor(2.0)})
    add_sums(total, {"expert_counts": torch.ones(3, 2), "lm": torch.tensor(3.0)})
    assert total["expert_counts"].tolist() == [[3.0, 3.0], [3.0, 3.0], [2.0, 2.0]]
    assert total["lm"] == 5.0


def test_indexer_metrics_average_over_main_layers_and_name_the_selected_reference_apart() -> None:
    kl, rows = torch.tensor([2.0, 1.0, 9.0]), 4.0  # the third layer is MTP's
    stats = {"kl_uniform": torch.tensor([4.0, 10.0, 9.0]), "mass": torch.tensor([2.0, 3.0, 0.0])}
    stats |= {"oracle_mass": torch.tensor([4.0, 3.0, 1.0]), "rows": torch.full((3,), 4.0)}
    found = indexer_metrics(kl, stats, rows, 2, "dense")
    assert found["loss/indexer_kl"] == pytest.approx(1.5 / 4)
    assert found["indexer/kl_captured"] == pytest.approx((0.5 + 0.9) / 2)
    assert found["indexer/kl_uniform"] == pytest.approx(7 / 4)
    assert found["indexer/mass_recall"] == pytest.approx(0.625)
    assert found["indexer/recall_of_oracle"] == pytest.approx(0.75)
    assert found["indexer/layer_01/kl"] == 0.25 and "indexer/layer_02/kl" not in found
    selected = indexer_metrics(kl, {"kl_uniform": stats["kl_uniform"]}, rows, 2, "selected")
    assert selected["indexer/kl_captured_selected"] == found["indexer/kl_captured"]
    assert "indexer/kl_captured" not in selected and "indexer/mass_recall" not in selected


def test_load_is_named_by_the_layer_of_the_model() -> None:
    counts = torch.tensor([[6.0, 2.0], [4.0, 4.0], [8.0, 0.0]])  # layers 1 and 2 of 3, then MTP's
    found = load_metrics(counts, 3, 1)
    assert found == {
        "moe/load_max_over_mean": (1.5 + 1.0 + 2.0) / 3,
        "moe/layer_01/load_max_over_mean": 1.5,
        "moe/layer_02/load_max_over_mean": 1.0,
    }
    counts[2] = 0.0  # a step without MTP
    assert load_metrics(counts, 3, 1) == found | {"moe/load_max_over_mean": 1.25}
    assert load_metrics(torch.zeros(0, 2), 3, 3) == {}  # a model without experts


def test_a_step_logs_the_load_of_each_layer_with_experts() -> None:
    net, stage = tiny.build(num_hidden_layers=3), STAGES["pretrain"]  # layer 0 is dense
    with torch.no_grad():  # layer 2 sends every row to experts 0 and 1 of 4: twice the mean
        net.layers[2].mlp.gate.e_score_correction_bias[:2] = 10.0
    out = net(**tiny.batch(0))
    _, sums = micro_batch_loss(out, Counts(1, 1, 13, 1), stage, TrainConfig())
    found = step_metrics(sums, Counts(1, 1, 13, 1), stage, net.config)
    by_layer = {name: value for name, value in found.items() if name.startswith("moe/layer_")}
    assert list(by_layer) == ["moe/layer_01/load_max_over_mean", "moe/layer_02/load_max_over_mean"]
    assert by_layer["moe/layer_02/load_max_over_mean"] == 2.0
    assert 1.0 <= by_layer["moe/layer_01/load_max_over_mean"] < 2.0
