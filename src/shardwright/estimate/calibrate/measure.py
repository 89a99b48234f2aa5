"""How fast one device is: matrix products by shape, attention, copies, and the launch of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from shardwright.timing import timed

_MOVED_BY_COPY = 2  # a copy reads and writes
_LAUNCHES = 200
_PRODUCTS_FORWARD, _PRODUCTS_BACKWARD = 2, 5  # of queries x keys, as a trace counts them
GB = 1e9


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        products: ``(m, n, k)`` of matrix products.
        attention: ``(batch, heads, length, head size)``, under a causal mask.
        copied: bytes of a tensor that is copied.
        repeats: how often each is timed; the median counts.
        dtypes: that products are measured in; attention in the first.
    """

    products: tuple[tuple[int, int, int], ...]
    attention: tuple[int, int, int, int]
    copied: int
    repeats: int
    dtypes: tuple[str, ...]


GPU = Sizes(
    products=(
        (256, 4096, 4096), (1024, 4096, 4096), (2048, 8192, 1024), (8192, 1024, 8192), (8192, 4096, 4096),
        (8192, 14336, 4096), (8192, 4096, 14336), (16384, 8192, 8192),
    ),
    attention=(1, 32, 8192, 128),
    copied=2**30,
    repeats=20,
    dtypes=("bfloat16", "float16", "tf32", "float32"),
)  # fmt: skip
CPU = Sizes(
    products=((64, 256, 256), (128, 512, 512), (256, 1024, 512), (512, 1024, 1024)),
    attention=(1, 8, 512, 64),
    copied=2**26,
    repeats=5,
    dtypes=("float32", "bfloat16"),
)


@dataclass(frozen=True)
class Product:
    """A matrix product that was timed."""

    dtype: str
    shape: tuple[int, int, int]
    seconds: float

    @property
    def flops(self) -> int:
        m, n, k = self.shape
        return 2 * m * n * k

    @property
    def teraflops(self) -> float:
        return self.flops / self.seconds / 1e12


@dataclass(frozen=True)
class Measured:
    """What one device reached.

    Attributes:
        products: every one that was timed.
        attention, attention_backward: teraflops in the first dtype.
        memory_gb_per_s: of a copy, read and written.
        launch_us: microseconds of the host for a kernel that has next to nothing to do.
    """

    products: tuple[Product, ...]
    attention: float
    attention_backward: float
    memory_gb_per_s: float
    launch_us: float
    sizes: Sizes = field(repr=False)

    def best(self, dtype: str) -> float:
        """The most teraflops of a product in ``dtype``."""
        return max(each.teraflops for each in self.products if each.dtype == dtype)


def measure(device: torch.device, sizes: Sizes) -> Measured:
    """Time everything in ``sizes`` on ``device``. Takes seconds on a CPU, about a minute on a GPU."""
    dtypes = [dtype for dtype in sizes.dtypes if dtype != "tf32" or device.type == "cuda"]
    products = tuple(_product(device, dtype, shape, sizes.repeats) for dtype in dtypes for shape in sizes.products)
    forward, backward = _attention(device, sizes)
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    copied = _seconds(lambda: target.copy_(source), device, sizes.repeats)
    return Measured(products, forward, backward, _MOVED_BY_COPY * sizes.copied / copied / GB, _launch_us(device), sizes)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    return median(timed(run, device, repeats, uncounted=2))


def _product(device: torch.device, dtype: str, shape: tuple[int, int, int], repeats: int) -> Product:
    m, n, k = shape
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    left, right = torch.randn(m, k, device=device, dtype=kind), torch.randn(n, k, device=device, dtype=kind)
    out = torch.empty(m, n, device=device, dtype=kind)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        return Product(dtype, shape, _seconds(lambda: torch.mm(left, right.t(), out=out), device, repeats))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _attention(device: torch.device, sizes: Sizes) -> tuple[float, float]:
    """Teraflops forward and backward, under a causal mask, whose half counts as nothing."""
    batch, heads, length, size = sizes.attention
    dtype = getattr(torch, sizes.dtypes[0])
    query, key, value = (
        torch.randn(batch, heads, length, size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )

    def forward() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True)

    result = forward()
    handed_back = torch.ones_like(result)

    def backward() -> None:
        torch.autograd.grad(result, (query, key, value), handed_back, retain_graph=True)

    seen = length * length - length * length // 2
    one = 2 * batch * heads * seen * size / 1e12
    with torch.no_grad():
        ahead = _seconds(forward, device, sizes.repeats)
    back = _seconds(backward, device, sizes.repeats)
    return _PRODUCTS_FORWARD * one / ahead, _PRODUCTS_BACKWARD * one / back


def _launch_us(device: torch.device) -> float:
    """Many kernels in a row on one element, waited for once."""
    one = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            one.add_(1)

    return _seconds(many, device, 5) / _LAUNCHES * 1e6
