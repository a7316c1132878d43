"""What bench/gpu_sweep.py times at DeepSeek-V3.2's geometry: of every kernel the default and other configurations.

A case is a call that returns tensors; the first of a part is the kernel's default, which the others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from model.ops.fp8_linear import kernel as fp8_operands
from model.ops.index_kl_dense import kernel as kl_dense
from model.ops.index_kl_selected import kernel as kl_selected
from model.ops.index_topk import fp8_kernel
from model.ops.index_topk import kernel as topk
from model.ops.mla_dense import kernel as dense
from model.ops.sparse_mla import kernel as sparse
from model.ops.sparse_mla import written_kernel as written

LENGTH = 8192
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    part: str
    config: str
    run: Callable[[], Results]
    flops: int = 0


@dataclass(frozen=True)
class Sizes:
    length: int = LENGTH
    heads: int = 128
    latent: int = 512
    rope: int = 64
    query: int = 192  # of a decompressed head
    value: int = 128
    index_heads: int = 64
    index_dim: int = 128
    topk: int = 2048
    linear: tuple[int, int] = (18432, 7168)  # outputs and inputs of the FP8 linear

    @property
    def width(self) -> int:
        return self.latent + self.rope

    @property
    def visible(self) -> int:
        return self.length * (self.length + 1) // 2

    @property
    def selected(self) -> int:
        k = min(self.topk, self.length)
        return k * (k + 1) // 2 + (self.length - k) * k


class World:
    """Inputs of every part, each made when a part first asks for it; on "meta" they have shapes alone."""

    def __init__(self, device: str, sizes: Sizes = Sizes()) -> None:
        self.device, self.sizes = device, sizes
        self.scale = (sizes.query) ** -0.5

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, gain: float = 1.0) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        found = torch.empty(shape, dtype=dtype, device=self.device)
        for part in found.split(max(1, (1 << 28) // max(1, found[0].numel()))):
            part.copy_(torch.randn(part.shape, generator=generator, device=self.device) * gain)
        return found

    @cached_property
    def q(self) -> Tensor:
        return self.randn(self.sizes.length, self.sizes.heads, self.sizes.width)

    @cached_property
    def kv(self) -> Tensor:
        return self.randn(self.sizes.length, self.sizes.width)

    @cached_property
    def first(self) -> Tensor:
        return torch.zeros(self.sizes.length, dtype=torch.int32, device=self.device)

    @cached_property
    def last(self) -> Tensor:
        return torch.arange(self.sizes.length, dtype=torch.int32, device=self.device)

    @cached_property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        s = self.sizes
        gain = (s.index_heads * s.index_dim) ** -0.5
        return (
            self.randn(s.length, s.index_heads, s.index_dim),
            self.randn(s.length, s.index_dim),
            self.randn(s.length, s.index_heads, dtype=torch.float32, gain=gain),
        )

    @cached_property
    def index_fp8(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, w times q's scales, k's scales."""
        (q, q_scale), (k, k_scale) = (fp8_kernel.rotate_and_quantise(t) for t in self.index[:2])
        return q, k, self.index[2] * q_scale, k_scale

    @cached_property
    def idx(self) -> Tensor:
        if self.device == "meta":
            return torch.empty(self.sizes.length, self.sizes.topk, dtype=torch.int32, device="meta")
        return topk.topk(*self.index, self.first, self.last, self.sizes.topk)

    @cached_property
    def attended(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        s = self.sizes
        if self.device == "meta":
            return self.randn(s.length, s.heads, s.latent), self.randn(s.length, s.heads, dtype=torch.float32)
        return sparse.forward(self.q, self.kv, self.idx, self.scale, s.latent)

    @cached_property
    def d_out(self) -> Tensor:
        return self.randn(self.sizes.length, self.sizes.heads, self.sizes.latent)

    @cached_property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        s = self.sizes
        q, k, v = (self.randn(s.length, s.heads, width) for width in (s.query, s.query, s.value))
        return q, k, v

    @cached_property
    def dense_lse(self) -> Tensor:
        if self.device == "meta":
            return self.randn(self.sizes.length, self.sizes.heads, dtype=torch.float32)
        return dense.forward(*self.heads, self.scale, self.first, self.last)[1]

    @cached_property
    def d_scores(self) -> Tensor:
        found = self.randn(self.sizes.length, self.sizes.length, dtype=torch.float32)
        return found if self.device == "meta" else found.tril_()

    @cached_property
    def d_selected(self) -> Tensor:
        return self.randn(self.sizes.length, self.sizes.topk, dtype=torch.float32)

    @cached_property
    def gradient(self) -> Tensor:
        return self.randn(self.sizes.length, self.sizes.linear[0])

    @cached_property
    def weight(self) -> Tensor:
        return self.randn(1, *self.sizes.linear, dtype=torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)


# Cases: of every part the default first, then what is most likely to gain


def spread(
    part: str, name: str, function: Callable[..., Results], configs: Sequence[tuple[int, ...]], flops: int = 0
) -> Iterator[Case]:
    """`function` at every configuration; `name` has a pair of braces for each of its numbers."""
    for config in configs:
        yield Case(part, name.format(*config), partial(function, *config), flops)


def sparse_forward(w: World) -> Iterator[Case]:
    s, of = w.sizes, "sparse_mla "
    per_column = 2 * s.heads * s.selected
    products, whole = per_column * s.width, per_column * (s.width + s.latent)

    def forward(*config: int) -> Results:
        return sparse.forward(w.q, w.kv, w.idx, w.scale, s.latent, sparse.Config(*config))

    def target(*config: int) -> Results:
        return (sparse.target(w.q, w.kv, w.idx, w.attended[1], w.scale, sparse.Config(*config)),)

    def split(registers: int, keys: int, stages: int, columns: int) -> Results:
        config = written.Config(registers=registers, keys=keys, num_stages=stages, columns=columns)
        return written.forward(w.q, w.kv, w.idx, w.scale, s.latent, config)

    def apart() -> Results:
        out, lse = sparse.forward(w.q, w.kv, w.idx, w.scale, s.latent)
        return out, lse, sparse.target(w.q, w.kv, w.idx, lse, w.scale)

    name, widest = "heads {} keys {} warps {} stages {}", min(256, s.latent)
    yield from spread(of + "forward with target", "registers {} keys {} stages {} columns {}", split,
                      [(3, 64, 3, widest), (3, 64, 2, widest), (3, 32, 4, widest)], whole + products)  # fmt: skip
    yield Case(of + "forward with target", "no P written, scores made twice", apart, whole + products)
    yield from spread(of + "forward", name, forward, [(64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 8, 3)],
                      whole)  # fmt: skip
    yield from spread(of + "target", name, target, [(128, 32, 4, 3), (128, 32, 8, 3)], products)  # fmt: skip


def sparse_backward(w: World) -> Iterator[Case]:
    s, of = w.sizes, "sparse_mla backward"
    flops, widest = 2 * s.heads * s.selected * (3 * s.width + 2 * s.latent), min(256, s.latent)

    def run(backward: Callable[..., Tensor], **options: written.Config) -> Results:
        (out, lse), d_kv = w.attended, w.zeros(s.length, s.width)
        return backward(w.q, w.kv, w.idx, out, lse, w.d_out, w.scale, d_kv, **options), d_kv

    def split(registers: int, keys: int, stages: int, query: int, key: int, key_registers: int) -> Results:
        config = written.Config(keys, registers, widest, query, key, key_registers, num_stages=stages)
        return run(written.backward, config=config)

    name = "registers {} keys {} stages {}, dq columns {}, dkv columns {} registers {}"
    narrow = min(128, s.latent)
    yield from spread(of, name, split,
                      [(3, 64, 3, narrow, widest, 1), (3, 64, 2, narrow, widest, 1), (3, 32, 4, narrow, widest, 1),
                       (3, 64, 3, narrow, narrow, 2)], flops)  # fmt: skip
    yield Case(of, "P and dS, then dq and dkv, in one kernel each", partial(run, sparse.backward), flops)


def index_topk(w: World) -> Iterator[Case]:
    s, name = w.sizes, "block_q {} block_k {} capacity {} warps {} stages {}"
    flops = 2 * s.index_heads * s.index_dim * s.visible
    configs = [
        (4, 64, 4096, 4, 3), (2, 64, 4096, 4, 3), (4, 64, 4096, 4, 2), (4, 64, 4096, 4, 4), (2, 128, 4096, 4, 3),
        (4, 128, 4096, 8, 3),
    ]  # fmt: skip

    def plain(*config: int) -> Results:
        return (topk.topk(*w.index, w.first, w.last, s.topk, None, topk.Config(*config)),)

    def narrow(*config: int) -> Results:
        q, k, weights, k_scale = w.index_fp8
        return (topk.topk(q, k, weights, w.first, w.last, s.topk, k_scale, topk.Config(*config)),)

    yield from spread("index_topk", name, plain, configs, flops)
    yield from spread("index_topk fp8", name, narrow, [(2, 128, 4096, 4, 3), *configs[:4], configs[5]], flops)
    yield Case("index_topk fp8, queries prepared", "default", lambda: fp8_kernel.rotate_and_quantise(w.index[0]))


def warm_up(w: World) -> Iterator[Case]:
    s, of, name = w.sizes, "index_kl_dense ", "rows {} keys {} warps {} stages {}"
    pair = 2 * s.index_heads * s.index_dim * s.visible
    of_rows, of_keys = (1, 128, 4, 3), (2, 64, 4, 3)

    def attention(*config: int) -> Results:
        return dense.forward(*w.heads, w.scale, w.first, w.last, dense.Config(*config))

    def target(*config: int) -> Results:
        q, k, _ = w.heads
        found = kl_dense.target(q, k, w.dense_lse, w.scale, w.first, w.last, 0, s.length, kl_dense.Config(*config))
        return (found,)

    def scores(*config: int) -> Results:
        return (kl_dense.scores(*w.index, w.first, w.last, 0, s.length, kl_dense.Config(*config)),)

    def gradients(by_rows: tuple[int, ...], by_keys: tuple[int, ...]) -> Results:
        d_k = w.zeros(s.length, s.index_dim)
        config = kl_dense.Config(*by_rows), kl_dense.Config(*by_keys)
        return *kl_dense.backward(*w.index, w.d_scores, 0, d_k, config), d_k

    yield from spread("mla_dense", name, attention,
                      [(128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2),
                       (64, 128, 4, 3), (128, 32, 4, 4)], 2 * s.heads * (s.query + s.value) * s.visible)  # fmt: skip
    yield from spread(of + "target", name, target,
                      [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3),
                       (128, 256, 8, 2)], 2 * s.heads * s.query * s.visible)  # fmt: skip
    yield from spread(of + "scores", name, scores,
                      [(4, 64, 4, 3), (4, 128, 8, 3), (2, 128, 4, 3), (2, 64, 4, 3), (4, 64, 4, 4)], pair)  # fmt: skip
    yield from spread(of + "gradients, by rows", name, lambda *c: gradients(c, of_keys),
                      [of_rows, (2, 64, 4, 3), (2, 128, 8, 2)], 4 * pair)  # fmt: skip
    yield from spread(of + "gradients, by keys", name, lambda *c: gradients(of_rows, c),
                      [of_keys, (1, 64, 4, 3), (4, 64, 8, 2), (2, 128, 8, 2)], 4 * pair)  # fmt: skip


def selected(w: World) -> Iterator[Case]:
    s, of, name = w.sizes, "index_kl_selected ", "keys {} warps {} stages {}"
    pair = 2 * s.index_heads * s.index_dim * s.selected
    configs = [(64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 4, 3)]

    def scores(*config: int) -> Results:
        return (kl_selected.scores(*w.index, w.idx, kl_selected.Config(*config)),)

    def gradients(*config: int) -> Results:
        d_k = w.zeros(s.length, s.index_dim)
        return *kl_selected.backward(*w.index, w.idx, w.d_selected, d_k, config=kl_selected.Config(*config)), d_k

    yield from spread(of + "scores", name, scores, configs, pair)
    yield from spread(of + "gradients", name, gradients, [(64, 4, 3), (64, 4, 2), (32, 4, 3)], 3 * pair)


def fp8_linear(w: World) -> Iterator[Case]:
    """What the operands of an FP8 linear cost (bench/gpu_linear.py times the whole)."""
    (outputs, inputs), tokens = w.sizes.linear, w.sizes.length

    def gradient(by_rows: int, by_columns: int) -> Results:
        sides = fp8_operands.activations(w.gradient, [tokens], True, bool(by_rows), bool(by_columns))
        return tuple(operand.scale for side in sides for operand in side)

    def weight(transposed: int) -> Results:
        return tuple(operand.scale for operand in fp8_operands.weights(w.weight, True, bool(transposed)))

    about = f"{tokens} x {outputs}"
    for by_rows, by_columns in ((1, 0), (0, 1), (1, 1)):  # parts of their own: results differ
        part = f"fp8 operands of a gradient {about}, along outputs {by_rows}, along tokens {by_columns}"
        yield Case(part, "default", partial(gradient, by_rows, by_columns))
    for transposed in (0, 1):
        part = f"fp8 operands of a weight {outputs} x {inputs}, transposed {transposed}"
        yield Case(part, "default", partial(weight, transposed))


PARTS: dict[str, Callable[[World], Iterator[Case]]] = {
    "forward": sparse_forward,
    "backward": sparse_backward,
    "topk": index_topk,
    "fp8": fp8_linear,
    "selected": selected,
    "warm_up": warm_up,
}


def cases(world: World, parts: tuple[str, ...]) -> list[Case]:
    return [case for part in parts for case in PARTS[part](world)]
