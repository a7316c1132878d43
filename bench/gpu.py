"""The Triton kernels and FP8 linears on a GPU: checked, then timed beside SDPA and bf16, in one run of under 4 minutes.

    bash bench/gpu.sh            (torch, triton, numpy and pytest are all it needs)

Every measurement is a row of the result, written at once: a kernel that fails leaves its error in its row and the rest
goes on; what no longer fits the time is marked as skipped. Sizes are DeepSeek-V3.2's. FLOPs are those of the ops'
READMEs, backward with its recomputation; the share of the roofline is of the device's dense bf16 peak.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_linear import linears
from bench.registry import RESULTS, provenance
from model.ops.index_kl_dense import index_kl_dense
from model.ops.index_kl_selected import index_kl_selected
from model.ops.index_topk import index_topk
from model.ops.mla_dense import mla_dense_lse
from model.ops.settings import OpSettings
from model.ops.sparse_mla import sparse_mla

BUDGET_S = 225.0
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "GH200": 989.0}  # dense bf16, from NVIDIA's data sheets
GIB = 2**30
# Relative to the largest entry. The kernels round absorbed queries, probabilities and their gradients to bf16 (2^-9
# each), and a logit's error is a probability's relative error: logits of size 4 make it four times as large.
MAX_ERROR = 2**-6
WANTED = {  # what a row should show, by name and length (None: every length)
    ("sparse_mla forward", None): "tflops >= 400, aim 600",
    ("sparse_mla backward", None): "tflops >= 250, aim 350",
    ("index_topk", 131072): "ms <= 220",
    ("index_kl_dense", 131072): "ms <= 4300, extra_gib < 4",
    ("attention of a training step", 32768): "dense_over_sparse >= 1.2",
    ("attention of a training step", 131072): "dense_over_sparse >= 3",
}
LONG_S = 3.0  # a measurement that took this long is not repeated


@dataclass(frozen=True)
class Geometry:
    heads: int = 128
    nope: int = 128
    rope: int = 64
    latent: int = 512
    value: int = 128
    index_heads: int = 64
    index_dim: int = 128
    topk: int = 2048

    @property
    def scale(self) -> float:
        return (self.nope + self.rope) ** -0.5


@dataclass(frozen=True)
class Plan:
    """What is run where; the defaults are the GPU's, the test's are tiny."""

    device: str = "cuda"
    geometry: Geometry = Geometry()
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    check_length: int = 1024
    check_topk: int = 256
    workspace: int = 2 << 30
    repeats: int = 5
    check_repeats: int = 20  # of the deterministic mode, equal bit for bit
    kernel_tests: bool = True
    # (tokens, outputs, inputs) of V3.2's q_b_proj, o_proj and a dense layer's MLP; (experts, tokens, outputs, inputs)
    linears: tuple[tuple[int, int, int], ...] = ((8192, 24576, 1536), (8192, 7168, 16384), (8192, 18432, 7168))
    experts: tuple[int, int, int, int] = (32, 65536, 2048, 7168)
    budget_s: float = BUDGET_S


def visible(length: int) -> int:
    return length * (length + 1) // 2


def selected(length: int, topk: int) -> int:
    k = min(topk, length)
    return k * (k + 1) // 2 + (length - k) * k


def flops(g: Geometry, length: int) -> dict[str, int]:
    """By measurement, of one layer and sequence; 2 FLOP a multiply-add."""
    v, s, row = visible(length), selected(length, g.topk), g.latent + g.rope
    index = 2 * g.index_heads * g.index_dim
    return {
        "dense_forward": 2 * g.heads * (g.nope + g.rope + g.value) * v,
        "dense_backward": 2 * g.heads * (3 * (g.nope + g.rope) + 2 * g.value) * v,
        "index_topk": index * v,
        "sparse_forward": 2 * g.heads * (row + g.latent) * s,
        "sparse_backward": 2 * g.heads * (3 * row + 2 * g.latent) * s,
        "sparse_target": 2 * g.heads * row * s,
        "index_kl_selected": 4 * index * s,  # scores twice, dq, dk
        # attention, the target's logits, scores, and the products once more in each of the two gradient kernels
        "warm_up": (2 * g.heads * (2 * (g.nope + g.rope) + g.value) + 5 * index) * v,
    }


class Runner:
    """Takes measurements one by one and keeps the result on disk up to date."""

    def __init__(self, plan: Plan, target: Path) -> None:
        self.plan, self.target, self.start = plan, target, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.failed = False
        self.about = {"name": "gpu", **provenance(), "command": "bash bench/gpu.sh"}
        self.about["triton"] = importlib.metadata.version("triton")
        self.about["plan"] = {"lengths": plan.lengths, "budget_s": plan.budget_s}

    @property
    def cuda(self) -> bool:
        return self.plan.device == "cuda"

    def left(self) -> float:
        return self.plan.budget_s - (time.monotonic() - self.start)

    def row(
        self, name: str, measure: Callable[[], dict[str, Any]], baseline: bool = False, **about: Any
    ) -> dict[str, Any]:
        """One measurement: its dict, or the error, or `skipped`. ok=False or an error is a failure of the whole, unless
        it is a `baseline`, which another library may not offer on this GPU."""
        row: dict[str, Any] = {"name": name, **about}
        wanted = WANTED.get((name, None)) or WANTED.get((name, about.get("T")))
        row |= {"wanted": wanted} if wanted else {}
        if self.left() <= 0:
            row["skipped"] = "time budget"
        else:
            begun = time.monotonic()
            self.write(running=name)  # a crash or a hang of the whole process leaves its name
            try:
                row |= measure()
            except Exception as error:  # noqa: BLE001  (recorded, and the exit status says so)
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
            row["took_s"] = round(time.monotonic() - begun, 2)
            gc.collect()  # what a measurement's closures hold in cycles is gigabytes
            if self.cuda:
                torch.cuda.empty_cache()
        self.failed = self.failed or ("error" in row and not baseline) or row.get("ok") is False
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.write()
        return row

    def write(self, running: str | None = None) -> None:
        state = {"running": running, "rows": self.rows, "passed": not self.failed and running is None}
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text(json.dumps(self.about | state, indent=1) + "\n")

    def timed(self, step: Callable[[], Any], work: int = 0) -> dict[str, Any]:
        """Median milliseconds of `step` after one call that compiles, TFLOP/s, and the memory it needs beside inputs
        and results (what it returns is held while that is read)."""
        times, extra = [], 0
        for turn in range(self.plan.repeats + 1):
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                there = torch.cuda.memory_allocated()
            begun = time.perf_counter()
            results = step()
            if self.cuda:
                torch.cuda.synchronize()
            if turn:
                times.append(1000 * (time.perf_counter() - begun))
            if self.cuda:
                extra = max(extra, torch.cuda.max_memory_allocated() - max(there, torch.cuda.memory_allocated()))
            del results
            if turn and (sum(times) > 1000 * LONG_S or self.left() < 60):
                break
        found: dict[str, Any] = {"ms": round(statistics.median(times), 3), "extra_gib": round(extra / GIB, 3)}
        if work:
            found["tflops"] = round(work / statistics.median(times) / 1e9, 1)
            peak = [value for name, value in PEAK_TFLOPS.items() if self.cuda and name in torch.cuda.get_device_name()]
            found["share_of_peak"] = round(found["tflops"] / peak[0], 3) if peak else None
        return found


def randn(plan: Plan, *shape: int, seed: int, dtype: torch.dtype = torch.bfloat16, gain: float = 1.0) -> Tensor:
    generator = torch.Generator(plan.device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=plan.device, dtype=torch.float32) * gain).to(dtype)


Three = tuple[Tensor, Tensor, Tensor]


def index_inputs(plan: Plan, length: int, leaf: bool = True) -> Three:
    g = plan.geometry
    gain = (g.index_heads * g.index_dim) ** -0.5
    return (
        randn(plan, length, g.index_heads, g.index_dim, seed=1).requires_grad_(leaf),
        randn(plan, length, g.index_dim, seed=2).requires_grad_(leaf),
        randn(plan, length, g.index_heads, seed=3, dtype=torch.float32, gain=gain).requires_grad_(leaf),
    )


def sparse_inputs(plan: Plan, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q_nope, q_rope, w_uk, latent, k_rope: logits of unit size."""
    g = plan.geometry
    return (
        randn(plan, length, g.heads, g.nope, seed=4).requires_grad_(),
        randn(plan, length, g.heads, g.rope, seed=5).requires_grad_(),
        randn(plan, g.heads, g.nope, g.latent, seed=6, gain=g.latent**-0.5).requires_grad_(),
        randn(plan, length, g.latent, seed=7).requires_grad_(),
        randn(plan, length, g.rope, seed=8).requires_grad_(),
    )


def dense_inputs(plan: Plan, length: int) -> Three:
    g = plan.geometry
    width = g.nope + g.rope
    return (
        randn(plan, length, g.heads, width, seed=9),
        randn(plan, length, g.heads, width, seed=10),
        randn(plan, length, g.heads, g.value, seed=11),
    )


def widened(tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
    return (t.detach().float().requires_grad_(t.requires_grad) for t in tensors)


def three(tensors: Three) -> Three:
    """The same in fp32, leaves of their own."""
    a, b, c = widened(tensors)
    return a, b, c


def doc_start(plan: Plan, length: int, documents: int = 1) -> Tensor:
    edges = torch.arange(documents, device=plan.device) * (length // documents)
    rows = torch.arange(length, device=plan.device)
    return edges[torch.searchsorted(edges, rows, right=True) - 1]


# Checks


def errors(mine: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Of each result the larger of two: the largest difference over the largest entry, and |a - b| / |b| of the whole,
    in which small entries cannot hide."""
    found = {}
    for name, value in expected.items():
        a, b = mine[name].double(), value.double()
        assert torch.equal(a.isfinite(), b.isfinite()), f"{name}: not finite in the same places"
        finite = b.isfinite()
        difference, size = (a - b)[finite], b[finite]
        worst = difference.abs().max() / size.abs().max().clamp(min=1e-6)
        whole = difference.norm() / size.norm().clamp(min=1e-6)
        found[name] = float(f"{max(worst.item(), whole.item()):.2e}")
    return {"errors": found, "ok": max(found.values()) <= MAX_ERROR, "bound": MAX_ERROR}


def check_sparse_layer(plan: Plan, deterministic: bool) -> dict[str, Any]:
    """sparse_mla and index_kl_selected on the same selection: every output and gradient."""
    length = plan.check_length
    start = doc_start(plan, length, 3)
    settings = OpSettings("triton", plan.workspace // 64, deterministic)  # several chunks
    with torch.no_grad():
        idx = index_topk(*index_inputs(plan, length, False), start, plan.check_topk)
    upstream = randn(plan, length, plan.geometry.heads, plan.geometry.latent, seed=20)

    def run(settings: OpSettings, wide: bool) -> dict[str, Tensor]:
        tensors, index = sparse_inputs(plan, length), index_inputs(plan, length)
        if wide:
            a, b, c, d, e = widened(tensors)
            tensors, index = (a, b, c, d, e), three(index)
        found = sparse_mla(*tensors, idx, plan.geometry.scale, target=True, settings=settings)
        assert found.target is not None
        kl = index_kl_selected(found.target, idx, *index, settings=settings).kl_sum
        names = ("d_q_nope", "d_q_rope", "d_w_uk", "d_latent", "d_k_rope", "d_q_index", "d_k_index", "d_w")
        gradients = torch.autograd.grad((found.out * upstream).sum() + kl, [*tensors, *index])
        outputs = {"out": found.out.detach(), "lse": found.lse, "target": found.target, "kl": kl.detach()}
        return outputs | dict(zip(names, gradients, strict=True))

    mine = run(settings, False)
    result = errors(mine, run(OpSettings(workspace=plan.workspace), True))
    if deterministic:
        again = (run(settings, False) for _ in range(plan.check_repeats - 1))
        result["repeats_equal"] = all(torch.equal(mine[name], other[name]) for other in again for name in mine)
        result["ok"] = result["ok"] and result["repeats_equal"]
    return result


def check_warm_up(plan: Plan) -> dict[str, Any]:
    length = plan.check_length
    start = doc_start(plan, length, 3)
    q, k, v = dense_inputs(plan, length)

    def run(settings: OpSettings, wide: bool) -> dict[str, Tensor]:
        index, given = index_inputs(plan, length), (q, k, v)
        if wide:
            index, given = three(index), three(given)
        out, found = index_kl_dense(*given, plan.geometry.scale, *index, start, settings=settings)
        assert out is not None
        gradients = torch.autograd.grad(found.kl_sum, index)
        named = dict(zip(("d_q_index", "d_k_index", "d_w"), gradients, strict=True))
        return named | {"out": out, "kl": found.kl_sum.detach(), "kl_uniform": found.stats["kl_uniform"]}

    return errors(
        run(OpSettings("triton", plan.workspace // 64), False), run(OpSettings(workspace=plan.workspace), True)
    )


def check_selection(plan: Plan, fp8: bool) -> dict[str, Any]:
    """Against torch on scores in fp32, whose sums are taken in another order: only keys on the border may differ."""
    length = plan.check_length
    inputs, start = index_inputs(plan, length, False), doc_start(plan, length, 3)
    mine, other = (
        index_topk(*inputs, start, plan.check_topk, settings=OpSettings(backend, plan.workspace, fp8_index=fp8))
        for backend in ("triton", "torch")
    )
    same = (mine == other).all(1).double().mean().item()
    sets = [set(a) ^ set(b) for a, b in zip(mine.tolist(), other.tolist(), strict=True)]
    return {"rows_equal": round(same, 4), "most_differing": max(map(len, sets)), "ok": max(map(len, sets)) <= 4}


def check_ties(plan: Plan) -> dict[str, Any]:
    """Small whole numbers, exact in bf16 and full of ties, with all of k: equal to torch's entry for entry."""
    length, g = plan.lengths[0], plan.geometry
    rows = torch.arange(max(0, length - 256), length, device=plan.device)
    generator = torch.Generator(plan.device).manual_seed(30)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator, device=plan.device).to(torch.bfloat16)

    q, k = whole(len(rows), g.index_heads, g.index_dim), whole(length, g.index_dim)
    w, start = whole(len(rows), g.index_heads).float(), doc_start(plan, length)[rows]
    mine, other = (
        index_topk(q, k, w, start, g.topk, rows, OpSettings(backend, plan.workspace)) for backend in ("triton", "torch")
    )
    return {"ok": torch.equal(mine, other), "T": length, "k": g.topk}


def kernel_tests(runner: Runner) -> dict[str, Any]:
    """The kernels' own tests, compiled instead of interpreted."""
    limit = min(100.0, runner.left())
    root = RESULTS.parents[1]
    files = sorted(str(p) for p in (root / "tests/model/ops").glob("test_kernel_*.py") if "compile" not in p.name)
    files.append(str(root / "tests/model/ops/test_triton_backend.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist"):  # most of their time is compilation
        command += ["-n", str(min(16, os.cpu_count() or 1))]
    environment = os.environ | {"WINNOW_TEST_GPU": "1"}
    environment.pop("TRITON_INTERPRET", None)
    try:
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        return {"ok": False, "output": f"not through in {limit:.0f} s: {str(error.stdout)[-1500:]}"}
    return {"ok": ended.returncode == 0, "output": ended.stdout[-3000:]}


# Timings


def time_sparse(runner: Runner, length: int) -> dict[str, float]:
    """-> milliseconds of the parts of a sparse training step, as far as they were measured."""
    plan, g = runner.plan, runner.plan.geometry
    work, fast = flops(g, length), OpSettings("triton", plan.workspace)
    start, found = doc_start(plan, length), dict[str, float]()
    index = index_inputs(plan, length)

    def note(name: str, measure: Callable[[], dict[str, Any]]) -> None:
        row = runner.row(name, measure, T=length)
        if "ms" in row:
            found[name] = row["ms"]

    with torch.no_grad():
        note("index_topk", lambda: runner.timed(lambda: index_topk(*index, start, g.topk, settings=fast),
                                                work["index_topk"]))  # fmt: skip
        fp8 = OpSettings("triton", plan.workspace, fp8_index=True)
        note("index_topk fp8", lambda: runner.timed(lambda: index_topk(*index, start, g.topk, settings=fp8),
                                                    work["index_topk"]))  # fmt: skip
    idx = index_topk(*index, start, g.topk, settings=fast)
    tensors = sparse_inputs(plan, length)
    kept: dict[str, Any] = {}

    def forward(target: bool, settings: OpSettings = fast) -> None:
        kept["found"] = sparse_mla(*tensors, idx, g.scale, target, settings)

    def backward() -> Any:
        out = kept["found"].out
        return torch.autograd.grad(out, tensors, out.detach(), retain_graph=True)

    note("sparse_mla forward", lambda: runner.timed(lambda: forward(False), work["sparse_forward"]))
    note("sparse_mla forward with target",
         lambda: runner.timed(lambda: forward(True), work["sparse_forward"] + work["sparse_target"]))  # fmt: skip
    note("sparse_mla backward", lambda: runner.timed(backward, work["sparse_backward"]))

    def loss() -> None:
        index_kl_selected(kept["found"].target, idx, *index, settings=fast)

    note("index_kl_selected", lambda: runner.timed(loss, work["index_kl_selected"]))

    def deterministic() -> dict[str, Any]:
        forward(False, OpSettings("triton", plan.workspace, deterministic=True))
        return runner.timed(backward, work["sparse_backward"])

    note("sparse_mla backward, deterministic", deterministic)
    return found


def time_dense(runner: Runner, length: int) -> dict[str, float]:
    """SDPA on decompressed heads, forward and backward, by backend; the least of each."""
    plan, g = runner.plan, runner.plan.geometry
    work, best = flops(g, length), dict[str, float]()
    q, k, v = (t.transpose(0, 1).unsqueeze(0).requires_grad_() for t in dense_inputs(plan, length))
    kinds: dict[str, Any] = {"default": None}
    if runner.cuda:
        from torch.nn.attention import SDPBackend

        kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash, values padded": SDPBackend.FLASH_ATTENTION}
    for name, kind in kinds.items():
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1])).detach().requires_grad_() if "padded" in name else v
        kept: dict[str, Tensor] = {}

        def forward(kind: Any = kind, values: Tensor = padded, kept: dict[str, Tensor] = kept) -> None:
            if kind is None:
                kept["out"] = F.scaled_dot_product_attention(q, k, values, is_causal=True, scale=g.scale)
                return
            from torch.nn.attention import sdpa_kernel

            with sdpa_kernel(kind):
                kept["out"] = F.scaled_dot_product_attention(q, k, values, is_causal=True, scale=g.scale)

        def backward(values: Tensor = padded, kept: dict[str, Tensor] = kept) -> None:
            torch.autograd.grad(kept["out"], [q, k, values], kept["out"].detach(), retain_graph=True)

        for part, step in (("forward", forward), ("backward", backward)):
            about = work[f"dense_{part}"]
            title = f"dense {part}, SDPA {name}"
            row = runner.row(title, partial(runner.timed, step, about), baseline=True, T=length)
            if "ms" in row:
                best[part] = min(best.get(part, row["ms"]), row["ms"])
        kept.clear()
    return best


def time_warm_up(runner: Runner, length: int) -> None:
    plan, g = runner.plan, runner.plan.geometry
    work, settings = flops(g, length), OpSettings("triton", plan.workspace)
    start, index, (q, k, v) = doc_start(plan, length), index_inputs(plan, length), dense_inputs(plan, length)

    def attention() -> Any:
        return mla_dense_lse(q, k, v, start, g.scale, settings=settings)

    def whole() -> Any:
        return index_kl_dense(q, k, v, g.scale, *index, start, settings=settings)

    runner.row("mla_dense forward, Triton", lambda: runner.timed(attention, work["dense_forward"]), T=length)
    runner.row("index_kl_dense", lambda: runner.timed(whole, work["warm_up"]), T=length)


def verdict(sparse: dict[str, float], dense: dict[str, float]) -> dict[str, Any]:
    """A training step's attention, dense over sparse; needs every part."""
    parts = ("index_topk", "sparse_mla forward with target", "sparse_mla backward", "index_kl_selected")
    missing = [name for name in parts if name not in sparse] + [p for p in ("forward", "backward") if p not in dense]
    if missing:
        return {"missing": missing}
    total = sum(sparse[name] for name in parts)
    both = dense["forward"] + dense["backward"]
    return {"dense_ms": round(both, 2), "sparse_ms": round(total, 2), "dense_over_sparse": round(both / total, 2)}


def run(plan: Plan, target: Path) -> bool:
    """The whole plan, dearest knowledge first -> whether every check held and nothing failed."""
    runner = Runner(plan, target)
    for deterministic in (False, True):
        about = {"deterministic": deterministic}
        runner.row("check sparse layer", partial(check_sparse_layer, plan, deterministic), **about)
    runner.row("check warm-up", lambda: check_warm_up(plan))
    for fp8 in (False, True):
        runner.row("check selection", partial(check_selection, plan, fp8), fp8=fp8)
    runner.row("check ties", partial(check_ties, plan))
    if plan.kernel_tests:
        runner.row("kernel tests", partial(kernel_tests, runner))
    for length in plan.lengths:
        ready: list[dict[str, float]] = []
        for part in (time_sparse, time_dense):
            try:
                ready.append(part(runner, length))
            except Exception as error:  # noqa: BLE001  (inputs that do not fit: recorded, and the exit status says so)
                runner.row(part.__name__, partial(dict, error=f"{type(error).__name__}: {error}"), T=length)
                ready.append({})
        runner.row("attention of a training step", partial(verdict, *ready), T=length)
    for length in plan.lengths:
        try:
            time_warm_up(runner, length)
        except Exception as error:  # noqa: BLE001  (as above)
            runner.row("time_warm_up", partial(dict, error=f"{type(error).__name__}: {error}"), T=length)
    try:
        linears(runner)
    except Exception as error:  # noqa: BLE001  (as above)
        runner.row("linears", partial(dict, error=f"{type(error).__name__}: {error}"))
    return not runner.failed


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py measures Triton kernels on a GPU and this machine has none: run it on one with CUDA")
    folder = os.environ.get("OUT")
    passed = run(Plan(), Path(folder) / "gpu.json" if folder else RESULTS / "gpu.json")
    sys.exit(0 if passed else 1)
