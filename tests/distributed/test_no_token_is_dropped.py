"""Every token reaches its experts in the worst imbalance: all rows choose the same one or two experts, and ranks that
hold none of those get no row. Steps, losses and gradients stay those of one plain process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conf.schema import ParallelConfig
from model import Transformer
from tests.distributed import test_equal_to_one_process as equality
from tests.distributed.helper import run_ranks
from tests.train import tiny

EXPERTS = tiny.MODEL.n_routed_experts


def skewed(build: Callable[..., Transformer], favourites: list[int]) -> Transformer:
    """A model whose routers choose `favourites` for every row: the bias outweighs any score."""
    net = build(num_experts_per_tok=len(favourites))
    for router in net.routers():
        router.e_score_correction_bias[favourites] = 10.0
    return net


@pytest.mark.parametrize(
    ("world", "zero", "ep", "cp", "favourites"),
    [
        (2, 1, 2, 1, [3]),  # rank 0 gets nothing
        (2, 3, 2, 2, [0, 1]),  # rank 1 gets nothing, and all that there is goes to rank 0
        (4, 2, 4, 1, [2]),  # three ranks of four get nothing
        (4, 3, 2, 1, [2, 3]),  # twice: ranks 0 and 2 get nothing, 1 and 3 hold the same experts
    ],
)
def test_all_rows_to_the_same_experts(
    world: int, zero: int, ep: int, cp: int, favourites: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tiny.build
    monkeypatch.setattr(tiny, "build", lambda: skewed(build, favourites))  # the ranks are forked with it
    counts = tiny.build()(**tiny.batch(0)).expert_counts
    assert all(row.nonzero().flatten().tolist() == favourites for row in counts)
    wanted = equality.reference("sparse_adapt", "sgd")
    parallel = ParallelConfig(zero, ep, cp, persist_below=0)
    for rank, found in enumerate(run_ranks(equality.train, world, "sparse_adapt", "sgd", parallel)):
        equality.assert_equal(found, wanted, parallel, rank)
        for name, gradient in found.gradients.items():
            if ".experts." in name:
                first = rank % ep * (EXPERTS // ep)
                used = [bool(expert.any()) for expert in gradient]
                assert used == [first + i in favourites for i in range(EXPERTS // ep)], name
