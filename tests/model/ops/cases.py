"""What the op tests share: packed layouts, inputs, comparison, and a meter for the largest tensor an op allocates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Document lengths and padding rows behind them. Odd lengths, documents of one token, a document that spans blocks.
LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "one": ((33,), 0),
    "packed": ((1, 23, 2, 1, 38), 0),
    "padded": ((17, 1, 40), 7),
    "all_padding": ((), 5),
}
BLOCKS = (1, 7, 32, 1000)
# Of the largest entry. fp32: sums of about 100 products of unit size, taken in another order.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
FLOOR = 0.1  # entries that cancel to nothing are held to the size of what cancelled


def make_doc_start(lengths: Sequence[int], padding: int = 0) -> Tensor:
    """int64 [T] with T = sum(lengths) + padding; padding rows carry T."""
    total = sum(lengths) + padding
    starts, position = [], 0
    for length in lengths:
        starts += [position] * length
        position += length
    return torch.tensor(starts + [total] * padding, dtype=torch.int64)


def layout(name: str) -> Tensor:
    return make_doc_start(*LAYOUTS[name])


def randn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Leaf tensors that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def integers(seed: int, *shapes: tuple[int, ...], high: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Whole numbers in [-high, high]: sums of their products are exact, so equal scores are exactly equal."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-high, high + 1, s, generator=generator).to(dtype) for s in shapes]


def assert_close(actual: Tensor, expected: Tensor, message: str = "") -> None:
    """Equal within the narrower dtype's tolerance, relative to the largest expected entry; infinities must agree."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    narrow = min(actual.dtype, expected.dtype, key=lambda dtype: dtype.itemsize)
    finite = expected.isfinite()
    assert torch.equal(finite, actual.isfinite()), message
    assert torch.equal(actual[~finite].double(), expected[~finite].double()), message
    actual, expected = actual.detach().double()[finite], expected.detach().double()[finite]
    if expected.numel() == 0:
        return
    limit = TOLERANCE[narrow] * max(expected.abs().max().item(), FLOOR)
    error = (actual - expected).abs().max().item()
    assert error <= limit, f"{message}: error {error:.3e} above {limit:.3e}"


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], seed: int = 99) -> list[Tensor]:
    """Gradients of sum(function(*inputs) * fixed random numbers): every entry of the output counts differently."""
    output = function(*inputs)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return list(torch.autograd.grad((output * upstream).sum(), inputs))


def assert_same_gradients(actual: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    pairs = zip(gradients(actual, inputs), gradients(expected, inputs), strict=True)
    for position, (mine, reference) in enumerate(pairs):
        assert_close(mine, reference, f"gradient of input {position}")


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest storage that any operation inside it returns; views count their base."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in torch.utils._pytree.tree_leaves(result):
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.untyped_storage().nbytes() // item.element_size())
        return result
