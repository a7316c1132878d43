"""Our settings in DeepSpeed's words."""

from __future__ import annotations

from typing import Any

import pytest

from conf.schema import OptimConfig, ParallelConfig
from train.ds_config import MAX_BUCKET, ds_config

CPU = {"offload_optimizer": {"device": "cpu"}}
CASES: list[tuple[ParallelConfig, dict[str, Any]]] = [
    (ParallelConfig(zero=2), {}),
    (ParallelConfig(zero=1, offload="cpu"), CPU),
    (ParallelConfig(zero=3, offload="cpu", persist_below=7), CPU | {"stage3_param_persistence_threshold": 7}),
    (
        ParallelConfig(zero=3, offload="cpu", offload_parameters=True, persist_below=7),
        CPU | {"offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 7},
    ),
    (
        ParallelConfig(zero=3, offload="nvme", nvme_path="/disk", offload_parameters=True, persist_below=7),
        {
            "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"},
            "offload_param": {"device": "cpu"},  # parameters on NVMe would be stored in bf16 (docs/log.md)
            "sub_group_size": 1,
            "stage3_param_persistence_threshold": 7,
        },
    ),
]


@pytest.mark.parametrize(("parallel", "wanted"), CASES)
def test_zero_and_offload(parallel: ParallelConfig, wanted: dict[str, Any]) -> None:
    found = ds_config(OptimConfig(clip=0.5), parallel, 100, 4)
    assert (found["gradient_clipping"], found["train_batch_size"]) == (0.5, 4)
    common = {"overlap_comm": False, "reduce_bucket_size": 100, "allgather_bucket_size": 100}
    assert found["zero_optimization"] == {"stage": parallel.zero, **common, **wanted}


def test_no_bucket_is_larger_than_what_trains_nor_than_256_mb() -> None:
    sizes = [ds_config(OptimConfig(), ParallelConfig(), n, 1)["zero_optimization"] for n in (0, 5, MAX_BUCKET + 1)]
    assert [size["reduce_bucket_size"] for size in sizes] == [1, 5, MAX_BUCKET]
