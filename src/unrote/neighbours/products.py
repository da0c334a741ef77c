"""Exact matrix products of 8-bit integers, on the fastest unit of the machine that is known to be exact.

Two ways give the same integers. The int8 product of the processor (VNNI and its like), where it is right and fast:
without VNNI some libraries add pairs of products in 16 bits and saturate silently, so a product of extreme values is
checked against fp64 once per process before it is trusted. Otherwise float32: a dot product over at most 1,024 numbers
of magnitude ≤ 128 is an integer ≤ 2²⁴, and so is every partial sum in whatever order the BLAS adds them, so float32
holds all of them without rounding (TF32 and bfloat16 products, which round only their inputs, too).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

EXACT_CHUNK = 1024  # 1,024 · 128² = 2²⁴: the longest dot product that float32 always holds exactly
SHORTEST = 32  # torch 2.13 leaves the int8 product of [g, 1] and [1, b] unwritten, as both strides are then 1
INT32_CHUNK = 1 << 16  # 2¹⁶ · 128² = 2³⁰ < 2³¹


@contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """``torch.set_float32_matmul_precision`` for a while, whatever it was before. It holds for the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def squared_dtype(values: int) -> torch.dtype:
    """The integer type that holds every squared distance of ``values`` 8-bit numbers, and what leads to it."""
    return torch.int32 if values * 255**2 < 2**31 else torch.int64


def integer_product(rows: Tensor, columns: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Exact dot products [g, b] in ``dtype`` of int8 [g, D] and [D, b]; in ``out`` where that saves time."""
    fast = int8_is_exact(rows.device.type)
    if fast and out is not None and dtype == out.dtype == torch.int32 and SHORTEST <= len(columns) <= INT32_CHUNK:
        return _int8_product(rows, columns, out)
    span = INT32_CHUNK if fast else EXACT_CHUNK
    total = None
    for start in range(0, len(columns), span):
        chunk = columns[start : start + span]
        product = _int8_product if fast and len(chunk) >= SHORTEST else _float_product
        part = product(rows[:, start : start + span], chunk).to(dtype)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def integer_norms(rows: Tensor) -> Tensor:
    """Squared norms int64 [g] of int8 [g, D]."""
    total = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    # On a processor a piece stays in its cache, which is six times as fast.
    step = 256 if rows.device.type == "cpu" else max(1, len(rows))
    for piece, sums in zip(torch.split(rows, step), torch.split(total, step), strict=True):
        for chunk in torch.split(piece, EXACT_CHUNK, 1):
            sums += chunk.float().square_().sum(1).long()
    return total


def dense_product(rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    """Product in the type of its factors, whatever autocast says.

    Of bfloat16 it is summed in float32 and rounded once, on processors where :func:`bfloat16_pays`.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return torch.mm(rows, columns, out=out)


def _float_product(rows: Tensor, columns: Tensor) -> Tensor:
    return dense_product(rows.float(), columns.float())


def _int8_product(rows: Tensor, columns: Tensor, out: Tensor | None = None) -> Tensor:
    product: Tensor = torch._int_mm(rows, columns) if out is None else torch._int_mm(rows, columns, out=out)
    return product


@cache
def int8_is_exact(device: str) -> bool:
    """Whether the int8 product of this device type is there, exact at the extremes, and faster than float32."""
    # On CUDA it wants sizes in multiples of 8 and has not been tried: float32 (TF32) is exact there, too.
    if device != "cpu" or not hasattr(torch, "_int_mm"):
        return False
    random = torch.Generator().manual_seed(0)
    # First, as it is where there is no such unit that the checks are slow.
    rows, columns = _extremes((256, 1024), random), _extremes((1024, 256), random)
    for part, times in ((64, 4), (256, 1)):  # far slower, as a rule, is told at once
        few, some = rows[:part], columns[:, :part].contiguous()
        if _seconds(_int8_product, few, some) > times * _seconds(_float_product, few, some):
            return False
    for size in ((1, 1024, 1), (1, SHORTEST, 64), (33, 1027, 17), (512, 1024, 512)):
        rows, columns = _extremes(size[:2], random), _extremes(size[1:], random)
        expected = rows.double() @ columns.double()
        for stored in (columns, columns.T.contiguous().T):
            for out in (None, torch.empty(expected.shape, dtype=torch.int32)):
                if not torch.equal(_int8_product(rows, stored, out).double(), expected):
                    return False
    return True


@cache
def bfloat16_pays(device: str) -> bool:
    """Whether bfloat16 products are summed in float32 (as far as a check of long cancelling sums shows) and faster."""
    # On CUDA sums may be split and added in bfloat16.
    if device != "cpu":
        return False
    random = torch.Generator().manual_seed(0)
    rows, columns = (torch.randn(256, 1024, generator=random).bfloat16() for _ in range(2))
    if 1.3 * _seconds(dense_product, rows, columns.T) > _seconds(_float_product, rows.float(), columns.T.float()):
        return False
    for size in ((1, 64, 1), (5, 4096, 33), (40, 1 << 16, 64), (512, 3104, 512)):
        rows = torch.randn(size[:2], generator=random).bfloat16()
        columns = torch.randn(size[:0:-1], generator=random).bfloat16().T
        rows[:, 0], columns[0] = 256.0, 256.0
        rows[:, -1], columns[-1] = -256.0, 256.0  # 2¹⁶ comes and goes: sums in bfloat16 lose all else
        expected = rows.double() @ columns.double()
        allowed = expected.abs() * 2.0**-8 + size[1] * 2.0**-23 * (rows.double().abs() @ columns.double().abs())
        if ((dense_product(rows, columns).double() - expected).abs() > allowed).any():
            return False
    return True


def _extremes(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Mostly -128 and 127 in long runs, where sums of pairs overflow 16 bits."""
    values = torch.where(torch.rand(shape, generator=random) < 0.9, -128, 127).to(torch.int8)
    values[: shape[0] // 2] = 127
    return values


def _seconds(product: Callable[[Tensor, Tensor], Tensor], rows: Tensor, columns: Tensor) -> float:
    """Least of three, so that a busy machine does not decide; it is speed only, never the result."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        product(rows, columns)
        taken.append(time.perf_counter() - start)
    return min(taken)
