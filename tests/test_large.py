"""A matrix of more than 2**31 elements. Takes about 7 GB of memory."""

import jax
import numpy as np
import pytest

import flashjax as fj

K, M = 40_000, 70_000


@pytest.fixture(scope="module")
def nonzeros():
    """Unique coordinates, the corners among them, in order; and values (count,)."""
    rng = np.random.default_rng(0)
    corners = np.array([0, M - 1, (K - 1) * M, K * M - 1])
    flat = np.unique(np.append(rng.integers(0, K * M, 1_000_000), corners))
    values = rng.integers(1, 100, flat.size).astype(np.float16)
    return flat // M, flat % M, values


@pytest.fixture(scope="module")
def packed(nonzeros):
    dense = np.zeros((K, M), np.float16)
    rows, columns, values = nonzeros
    dense[rows, columns] = values
    return fj.SparseMatrix.from_dense(dense)


@pytest.mark.nightly
def test_counts(packed, nonzeros):
    assert packed.size > 2**31
    assert packed.nnz == nonzeros[2].size


@pytest.mark.nightly
def test_products(packed, nonzeros):
    rows, columns, values = nonzeros
    rng = np.random.default_rng(1)
    x = rng.integers(-3, 4, (3, K)).astype(np.float32)
    dy = rng.integers(-3, 4, (3, M)).astype(np.float32)
    y, pull = jax.vjp(lambda x: fj.sparse_matmul(x, packed), x)
    (dx,) = pull(dy)
    # Whole numbers: the sums are exact.
    for i in range(3):
        wanted = np.bincount(columns, x[i, rows] * values.astype(np.float64), M)
        np.testing.assert_array_equal(y[i], wanted)
        wanted = np.bincount(rows, dy[i, columns] * values.astype(np.float64), K)
        np.testing.assert_array_equal(dx[i], wanted)


@pytest.mark.nightly
def test_unpacks(packed, nonzeros):
    dense = np.asarray(packed.to_dense())
    rows, columns, values = nonzeros
    np.testing.assert_array_equal(dense[rows, columns], values)
    assert np.count_nonzero(dense.view(np.uint16)) == values.size
