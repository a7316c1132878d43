"""Times configurations of the Triton kernels on a GPU at DeepSeek-V3.2's geometry, to choose defaults.

    bash bench/gpu.sh sweep [seconds] [parts, comma-separated]      default: 150 seconds, every part of gpu_cases.PARTS

One JSON row a case: part, config, ms, TFLOP/s, the result's distance from the part's first case, or the error (out of
shared memory, say). The result is $OUT/gpu_sweep.json or bench/results/gpu_sweep.json. Everything is compiled first, in
as many processes as there are cores, on tensors without storage; what does not fit the time is marked as skipped.
bench/gpu.py decides whether a kernel is right; here a distance above 2^-6 only marks a row.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.gpu_cases import LENGTH, PARTS, Case, Results, World, cases
from bench.registry import RESULTS, provenance

MAX_ERROR = 2**-6

# Compilation


def _without_gpu() -> None:
    """Makes this process compile for Hopper and run nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    target.get_current_device, target.get_current_stream = lambda: 0, lambda device: 0
    driver.set_active(target)
    run = JITFunction.run
    JITFunction.run = lambda self, *a, **k: run(self, *a, **k | {"warmup": True})


def compile_case(number: int, parts: tuple[str, ...]) -> str | None:
    """The kernels of one case into Triton's cache -> the error, if any."""
    try:
        with torch.device("meta"):
            cases(World("meta"), parts)[number].run()
    except Exception as error:  # noqa: BLE001  (a row of the result)
        return f"{type(error).__name__}: {error}"[:300]
    return None


def compile_all(parts: tuple[str, ...], limit: float) -> list[str | None]:
    """Errors by case. What is not through in `limit` seconds is compiled when it is measured."""
    number = len(cases(World("meta"), parts))
    found: list[str | None] = [None] * number
    workers = min(number, os.cpu_count() or 1)
    with multiprocessing.get_context("fork").Pool(workers, _without_gpu) as pool:
        waiting = [pool.apply_async(compile_case, (i, parts)) for i in range(number)]
        end = time.monotonic() + limit
        for i, job in enumerate(waiting):
            try:
                found[i] = job.get(max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                continue
    return found


# Measurement


def distance(mine: Results, default: Results) -> float:
    """The largest |a - b| / |b| among the results; entries that are not finite must agree."""
    worst = 0.0
    for a, b in zip(mine, default, strict=False):
        if a.dtype == torch.int32:
            worst = max(worst, (a != b).float().mean().item())
            continue
        ends = b.isfinite()
        assert torch.equal(a.isfinite(), ends), "not finite in the same places"
        total = size = 0.0
        for x, y, real in zip(a.split(1024), b.split(1024), ends.split(1024), strict=True):
            total += (x.float() - y.float())[real].square().sum().item()
            size += y.float()[real].square().sum().item()
        worst = max(worst, (total / max(size, 1e-30)) ** 0.5)
    return worst


def milliseconds(run: Callable[[], Results], repeats: int = 4) -> float:
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        results = run()
        stop.record()
        torch.cuda.synchronize()
        del results
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def measure(
    case: Case, default: Results | None, clock: Callable[[Callable[[], Results]], float]
) -> tuple[dict, Results]:
    results = case.run()
    row: dict[str, Any] = {}
    if default is not None:
        row["distance"] = float(f"{distance(results, default):.1e}")
        row["ok"] = row["distance"] <= MAX_ERROR
    row["ms"] = round(clock(case.run), 3)
    if case.flops:
        row["tflops"] = round(case.flops / row["ms"] / 1e9, 1)
    return row, results


def sweep(
    world: World,
    parts: tuple[str, ...],
    errors: list[str | None],
    left: Callable[[], float],
    write: Callable[[dict], None],
    clock: Callable[[Callable[[], Results]], float] = milliseconds,
) -> None:
    """One row a case, handed to `write` at once."""
    part, default = "", None
    for case, error in zip(cases(world, parts), errors, strict=True):
        row: dict[str, Any] = {"part": case.part, "config": case.config}
        if case.part != part:
            part, default = case.part, None
        begun = time.monotonic()
        if left() <= 0:
            row["skipped"] = "time"
        elif error:
            row["error"] = error
        else:
            try:
                found, results = measure(case, default, clock)
                row |= found
                default = results if default is None else default
                del results
            except Exception as failed:  # noqa: BLE001  (a row of the result)
                row["error"] = f"{type(failed).__name__}: {failed}"[:300]
        row["took_s"] = round(time.monotonic() - begun, 2)
        write(row)


def main(seconds: float = 150.0, parts: tuple[str, ...] = tuple(PARTS)) -> None:
    begun = time.monotonic()
    errors = compile_all(parts, seconds / 2)  # before this process touches the GPU: its children are forks
    if not torch.cuda.is_available():
        sys.exit(
            "bench/gpu_sweep.py measures Triton kernels on a GPU and this machine has none: run it on one with CUDA"
        )
    compiled = round(time.monotonic() - begun, 1)
    target = Path(os.environ.get("OUT") or RESULTS) / "gpu_sweep.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    about = {
        "name": "gpu_sweep",
        **provenance(),
        "triton": importlib.metadata.version("triton"),
        "length": LENGTH,
        "compiled_s": compiled,
    }

    def write(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        target.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")

    with torch.no_grad():
        sweep(World("cuda"), parts, errors, lambda: seconds - (time.monotonic() - begun), write)


if __name__ == "__main__":
    given = sys.argv[1:]
    chosen = tuple(given[1].split(",")) if len(given) > 1 else tuple(PARTS)
    main(float(given[0]) if given else 150.0, chosen)
