"""`python -m bench [NAME ...]`: all benchmarks, or those named."""

import sys

import bench.ablation  # noqa: F401  (each registers itself)
import bench.async_rl  # noqa: F401
import bench.cost  # noqa: F401
import bench.cost_curve  # noqa: F401
import bench.data  # noqa: F401
import bench.domains  # noqa: F401
import bench.fp8  # noqa: F401
import bench.http_client  # noqa: F401
import bench.layer  # noqa: F401
import bench.length  # noqa: F401
import bench.memory  # noqa: F401
import bench.needles  # noqa: F401
import bench.oracle  # noqa: F401
import bench.parity  # noqa: F401
import bench.pipeline  # noqa: F401
import bench.plan  # noqa: F401
import bench.rollout  # noqa: F401
import bench.sandbox  # noqa: F401
import bench.save  # noqa: F401
import bench.speciale  # noqa: F401
import bench.tool_use  # noqa: F401
from bench.registry import BENCHMARKS, run

if __name__ == "__main__":
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"bench: no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    sys.exit(0 if all([run(name) for name in names]) else 1)
