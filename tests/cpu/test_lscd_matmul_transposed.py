"""The CPU kernel for the product with the transposed weights, through its target."""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest

from flashjax import packing

TARGET = "flashjax_lscd_matmul_transposed_cpu"


def call(dy, dense, dtype="float32"):
    result = jax.ShapeDtypeStruct((dy.shape[0], dense.shape[0]), jnp.dtype(dtype))
    kind = packing.WEIGHT_DTYPES[np.dtype(dense.dtype)]

    @jax.jit
    def run(dy, packed):
        return jax.ffi.ffi_call(TARGET, result)(dy, *packed, weight_dtype=kind)

    return run(dy, packing.pack(dense)[:3])


# More strips than a block of sums, more steps than an entry, neither a multiple.
@pytest.mark.parametrize("shape", [*op_cases.SHAPES, (1100, 1300)], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 8, 19])
def test_shapes_and_rows(simd, shape, rows):
    del simd
    dense = op_cases.random_dense(*shape, 0.7, "float16")
    dy = op_cases.random_x((rows, shape[1]), "float32")
    op_cases.check_product(call(dy, dense), dy, dense.T)


@pytest.mark.parametrize("w_dtype", op_cases.HALVES)
@pytest.mark.parametrize("dtype", [*op_cases.HALVES, "float32"])
def test_dtypes(simd, w_dtype, dtype):
    del simd
    dense = op_cases.random_dense(300, 90, 0.5, w_dtype)
    dy = op_cases.random_x((6, 90), dtype)
    dx = call(dy, dense, dtype)
    assert dx.dtype == dtype
    op_cases.check_product(dx, dy, dense.T)


@pytest.mark.parametrize("pattern", list(op_cases.PATTERNS))
def test_patterns(pattern):
    dense = op_cases.pattern_dense(pattern, 700, 150, "bfloat16")
    dy = op_cases.random_x((9, 150), "bfloat16")
    op_cases.check_product(call(dy, dense), dy, dense.T)


def test_special_values():
    dense = op_cases.random_dense(70, 33, 0.6, "float16")
    dense[3, 4], dense[69, 32] = np.inf, np.nan
    dy = np.abs(op_cases.random_x((3, 33), "float32")) + 1
    dy[1, 5] = np.nan
    dx = np.asarray(call(dy, dense))
    assert np.all(np.isnan(dx[1]))  # as in a dense product, also where w is zero
    assert np.all(np.isposinf(dx[[0, 2], 3]))
    assert np.all(np.isnan(dx[:, 69]))
    assert np.all(np.isfinite(np.delete(dx[[0, 2]], [3, 69], axis=1)))


def test_wrong_shapes_are_named():
    dense = op_cases.random_dense(70, 33, 0.6, "float16")
    dy = op_cases.random_x((3, 49), "float32")  # four strips, the weights have three
    expected = rf"{TARGET}: bitmap: expected shape \(4, 1, 32, 4\), got \(3,"
    with pytest.raises(jax.errors.JaxRuntimeError, match=expected):
        call(dy, dense)
