"""Configuration -> DeepSpeed's dictionary, as a pure function.

DeepSpeed sees plain data parallelism with fp32 parameters and one accumulation step: mixed precision is autocast inside
the forward, and the engine marks the border of a step itself, because the number of micro-batches may change from step
to step.
"""

from __future__ import annotations

from typing import Any

from conf.schema import OptimConfig, ParallelConfig

MAX_BUCKET = 1 << 26  # elements reduced at once: 256 MB of fp32


def ds_config(optim: OptimConfig, parallel: ParallelConfig, trainable: int, world_size: int) -> dict[str, Any]:
    """`trainable`: number of values in the optimiser; no bucket is made larger than that."""
    bucket = max(1, min(MAX_BUCKET, trainable))
    stage3 = {"stage3_param_persistence_threshold": parallel.persist_below} if parallel.zero == 3 else {}
    offload: dict[str, Any] = {}
    if parallel.offload != "none":
        offload["offload_optimizer"] = {"device": parallel.offload}
    if parallel.offload == "nvme":
        offload["offload_optimizer"]["nvme_path"] = parallel.nvme_path
        # a flat tensor of its own for every parameter: it reads a gradient from disk to where it lies in its flat
        # tensor, and where that is no multiple of 512 bytes it reads nothing and says nothing (measured with 0.19.8)
        offload["sub_group_size"] = 1
    if parallel.offload_parameters:
        offload["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": optim.clip,
        "zero_optimization": {
            "stage": parallel.zero,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **stage3,
            **offload,
        },
        "zero_allow_untested_optimizer": True,  # ours is torch's AdamW with a switch
        "zero_force_ds_cpu_optimizer": False,  # under offload too, and nothing is compiled
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
