"""More than 2**31 elements: a matrix, a stack, a result. Takes about 7 GB of memory.

`pytest -m "nightly and gpu" tests/test_large.py` has them on a GPU (14 GB).
"""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

import flashjax as fj

pytestmark = pytest.mark.nightly

K, M = 40_000, 70_000


@pytest.fixture(scope="module", autouse=True, params=op_cases.DEFAULTS)
def platform(request):
    with op_cases.on_platform(request.param[1]):
        yield request.param[1]


@pytest.fixture(scope="module")
def nonzeros():
    """Unique coordinates, the corners among them, in order; and values (count,)."""
    rng = np.random.default_rng(0)
    corners = np.array([0, M - 1, (K - 1) * M, K * M - 1])
    flat = np.unique(np.append(rng.integers(0, K * M, 1_000_000), corners))
    values = rng.integers(1, 100, flat.size).astype(np.float16)
    return flat // M, flat % M, values


@pytest.fixture(scope="module")
def packed(nonzeros, platform):
    dense = np.zeros((K, M), np.float16)
    rows, columns, values = nonzeros
    dense[rows, columns] = values
    return fj.SparseMatrix.from_dense(dense)


def test_counts(packed, nonzeros):
    assert packed.size > 2**31
    assert packed.nnz == nonzeros[2].size


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


def test_unpacks(packed, nonzeros):
    dense = np.asarray(packed.to_dense())
    rows, columns, values = nonzeros
    np.testing.assert_array_equal(dense[rows, columns], values)
    assert np.count_nonzero(dense.view(np.uint16)) == values.size


def test_stack():
    """Its values are more than 4 GiB; every layer has its own."""
    size, layers = 16_384, 18
    rng = np.random.default_rng(2)
    x = rng.integers(-3, 4, (2, size)).astype(np.float16)
    dense = rng.integers(-3, 4, (size, size)).astype(np.float16)
    last = np.where(dense > 1, dense, np.float16(0))
    w = fj.SparseMatrix.from_dense(dense)
    stack = fj.SparseMatrix.stack(
        [w] * (layers - 1) + [fj.SparseMatrix.from_dense(last)]
    )
    assert layers * w.size > 2**31
    assert stack.values.nbytes > 2**32

    @jax.jit
    def product(x, stack, layer):
        return fj.sparse_matmul(
            x, stack, layer=layer, preferred_element_type=jnp.float32
        )

    for layer, matrix in ((0, dense), (layers - 2, dense), (layers - 1, last)):
        wanted = x.astype(np.float32) @ matrix.astype(np.float32)
        np.testing.assert_array_equal(product(x, stack, layer), wanted)


# Of a multiple of 8 outputs, stored in boxes, and of another number.
@pytest.mark.parametrize("m", [50_272, 50_273])
def test_result(m, platform):
    """On a GPU alone: what is compared with would take minutes on a CPU."""
    if platform == "cpu":
        pytest.skip("needs a GPU")
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.integers(-1, 2, (65_536, 64)), jnp.float16)
    dense = jnp.asarray(rng.integers(-1, 2, (64, m)), jnp.float16)
    assert x.shape[0] * m > 2**31
    y = jax.jit(fj.sparse_matmul)(x, fj.SparseMatrix.from_dense(dense))
    assert bool((y == x @ dense).all())
