"""Exactness of the integer products, at the extremes and on both ways to compute them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrote.neighbours import products
from unrote.neighbours.products import EXACT_CHUNK, INT32_CHUNK, integer_norms, integer_product, squared_dtype


@pytest.fixture(params=["as chosen", "float32"])
def way(request, monkeypatch):
    if request.param == "float32":
        monkeypatch.setattr(products, "int8_is_exact", lambda device: False)
    return request.param


def numbers(seed: int, *shape: int, extreme: float = 0.5) -> torch.Tensor:
    random = np.random.default_rng(seed)
    values = random.integers(-128, 128, shape)
    extremes = np.where(random.random(shape) < 0.8, -128, 127)
    return torch.from_numpy(np.where(random.random(shape) < extreme, extremes, values).astype(np.int8))


def expected(rows: torch.Tensor, columns: torch.Tensor) -> np.ndarray:
    return rows.numpy().astype(np.int64) @ columns.numpy().astype(np.int64)


@pytest.mark.parametrize("values", [1, 2, 31, 32, 33, 1023, 1024, 1025, 3072, INT32_CHUNK + 1])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_products_are_exact(way, values, layout):
    rows, columns = numbers(1, 5, values), numbers(2, values, 67)
    if layout == "columns":
        columns = columns.T.contiguous().T
    product = integer_product(rows, columns, torch.int64)
    np.testing.assert_array_equal(product.numpy(), expected(rows, columns))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 70), st.booleans(), st.integers(0, 2**31))
def test_products_are_exact_for_all_small_shapes(count, values, total, transposed, seed):
    rows, columns = numbers(seed, count, values), numbers(seed + 1, values, total)
    columns = columns.T.contiguous().T if transposed else columns
    junk = torch.full((count, total), 12345, dtype=torch.int32)  # what an unwritten result would likely show
    del junk
    product = integer_product(rows, columns, squared_dtype(values))
    np.testing.assert_array_equal(product.numpy(), expected(rows, columns))


@pytest.mark.parametrize("fill", [-128, 127])
def test_the_largest_sums(way, fill):
    rows = torch.full((2, INT32_CHUNK), fill, dtype=torch.int8)
    product = integer_product(rows, rows.T, torch.int64)
    assert product.unique().tolist() == [INT32_CHUNK * fill**2]
    assert integer_norms(rows).tolist() == [INT32_CHUNK * fill**2] * 2


def test_the_types_hold_what_they_must():
    assert EXACT_CHUNK * 128**2 <= 2**24
    assert INT32_CHUNK * 128**2 < 2**31
    assert squared_dtype(33_025) == torch.int32 and 33_025 * 255**2 < 2**31
    assert squared_dtype(33_026) == torch.int64
