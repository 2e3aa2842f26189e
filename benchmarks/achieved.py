"""What share of the machine's rate a piece of work achieves: its products timed alone, over the time that it takes."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

REPEATS = 9
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


class Products(TorchDispatchMode):
    """Counts every matrix product by shape, and the FLOPs of attention."""

    def __init__(self):
        super().__init__()
        self.shapes: Counter[tuple] = Counter()
        self.attention_flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in PRODUCTS:
            # In inference mode `linear` and `matmul` come whole.
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func in PRODUCTS:
            left, right = args[-2:]
            layout = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in (left, right)]
            self.shapes[tuple(layout)] += 1
        elif "scaled_dot_product" in func.__name__:
            backward = "backward" in func.__name__
            *heads, length, width = args[1 if backward else 0].shape
            # Two products forward, five backward, of which a causal mask leaves half.
            self.attention_flops += (5 if backward else 2) * heads[0] * heads[1] * length * length * width
        return func(*args, **(kwargs or {}))

    def flops(self) -> float:
        """Of all products and of attention."""
        return self.attention_flops + sum(count * _flops(layout) for layout, count in self.shapes.items())

    def rate(self) -> float:
        """FLOP/s of the products alone, each shape timed on its own, the best of its repeats: what the machine can."""
        seconds = sum(count * _seconds(layout) for layout, count in self.shapes.items())
        return sum(count * _flops(layout) for layout, count in self.shapes.items()) / seconds


def _flops(layout: tuple) -> float:
    (left, *_), (right, *_) = layout
    return 2.0 * torch.Size(left).numel() * right[-1]


def _seconds(layout: tuple) -> float:
    left, right = (
        torch.randn(1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
        .to(device, dtype)
        .as_strided(shape, stride)
        for shape, stride, dtype, device in layout
    )
    return min(_times({"product": lambda: torch.matmul(left, right)}, 2 * REPEATS)["product"])


def median_seconds(works: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Wall time of each piece of work, median of interleaved repeats after one that does not count."""
    return {name: statistics.median(values) for name, values in _times(works, repeats).items()}


def synchronise() -> None:
    """Wait for a GPU's work, where there is a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _times(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            synchronise()
            start = time.perf_counter()
            work()
            synchronise()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


@dataclass(frozen=True)
class Achieved:
    """A piece of work beside its products."""

    seconds: float
    flops: float
    matmul_flops_per_second: float
    """Of its products alone."""

    @property
    def fraction(self) -> float:
        """FLOP/s achieved over those of the products alone."""
        return self.flops / self.seconds / self.matmul_flops_per_second


def achieved(work: Callable[[], object], repeats: int = REPEATS) -> Achieved:
    """Measure `work`, which must do the same products each time."""
    with Products() as products:
        work()
    rate = products.rate()
    return Achieved(median_seconds({"work": work}, repeats)["work"], products.flops(), rate)
