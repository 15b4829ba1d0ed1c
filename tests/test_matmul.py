"""The values of the product, and what it refuses."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashjax as fj
from flashjax import matmul

from . import op_cases
from .op_cases import (
    DEFAULTS,
    HALVES,
    KERNELS,
    PATTERNS,
    ROWS,
    SHAPES,
    check_product,
    every_implementation,
    for_each,
)

FLOATS = (*HALVES, "float32")

by_default = pytest.mark.parametrize("product", DEFAULTS, indirect=True)


# --- Values -----------------------------------------------------------------------


@for_each(
    "case",
    [(shape, dtype) for shape in SHAPES for dtype in HALVES],
    [(SHAPES[0], "bfloat16"), *((shape, "float16") for shape in SHAPES[2:])],
)
def test_shapes(product, case):
    shape, dtype = case
    dense, w, x = op_cases.packed_and_x(shape, 0.7, 5, dtype)
    y = product(x, w)
    assert y.dtype == x.dtype
    check_product(y, x, dense)


@for_each("rows", ROWS, [0, 1, 33, 257])
def test_rows(product, rows):
    dense, w, x = op_cases.packed_and_x((200, 77), 0.8, rows, "float16")
    check_product(product(x, w), x, dense)


@for_each("sparsity", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 1.0], [0.0, 0.5, 1.0])
def test_sparsities(product, sparsity):
    dense, w, x = op_cases.packed_and_x((515, 90), sparsity, 9, "bfloat16")
    check_product(product(x, w), x, dense)


@for_each("pattern", list(PATTERNS), ["one_lane", "corners"])
def test_patterns(product, pattern):
    dense = op_cases.pattern_dense(pattern, 700, 150, "float16")
    x = op_cases.random_x((9, 700), "float16")
    check_product(product(x, fj.SparseMatrix.from_dense(dense)), x, dense)


@pytest.mark.parametrize("product", KERNELS, indirect=True)
def test_random_matrices(product):
    @settings(max_examples=25, deadline=None)
    @given(op_cases.masks(), st.integers(0, 20), st.sampled_from(HALVES))
    def check(mask, rows, dtype):
        dense = op_cases.random_dense(*mask.shape, 0.0, dtype)
        dense = np.where(mask, dense, np.zeros_like(dense))
        x = op_cases.random_x((rows, mask.shape[0]), dtype)
        check_product(product(x, fj.SparseMatrix.from_dense(dense)), x, dense)

    check()


@for_each(
    "dtypes",
    list(itertools.product(HALVES, FLOATS, (None, *FLOATS))),
    [*itertools.product(HALVES, FLOATS, (None,)), ("float16", "float16", "bfloat16")],
)
def test_dtypes(product, dtypes):
    w_dtype, x_dtype, preferred = dtypes
    dense = op_cases.random_dense(70, 33, 0.6, w_dtype)
    x = op_cases.random_x((6, 70), x_dtype)
    bias = op_cases.random_x((33,), "float32", seed=3)
    w = fj.SparseMatrix.from_dense(dense)
    y = product(x, w, bias=bias, preferred_element_type=preferred)
    if preferred is None:
        preferred = w_dtype if w_dtype == x_dtype else "float32"
    assert y.dtype == preferred
    check_product(y, x, dense, bias)


@for_each("case", list(itertools.product((3, 300), FLOATS)), [(3, "bfloat16")])
def test_bias(product, case):
    rows, bias_dtype = case
    dense, w, x = op_cases.packed_and_x((70, 33), 0.6, rows, "float16")
    bias = op_cases.random_x((33,), bias_dtype, seed=3)
    y = product(x, w, bias=bias)
    assert y.dtype == jnp.float16
    check_product(y, x, dense, bias)


@every_implementation
def test_bias_is_added_before_rounding(product):
    w = fj.SparseMatrix.from_dense(np.full((1, 1), 2048, np.float16))
    x = np.ones((1, 1), np.float16)
    bias = np.array([0.5], np.float32)
    y = product(x, w, bias=bias, preferred_element_type=jnp.float32)
    assert y.item() == 2048.5
    # 2048 + 1 is a tie in float16, a little more is not.
    y = product(x, w, bias=np.array([1.0 + 2.0**-10], np.float32))
    assert y.item() == 2050


@for_each(
    "leading",
    [(), (1,), (0,), (3, 2), (2, 0, 3), (2, 1, 2, 2)],
    [(), (2, 0, 3), (2, 1, 2, 2)],
)
def test_leading_dimensions(product, leading):
    dense, w, _ = op_cases.packed_and_x((70, 33), 0.6, 1, "float16")
    x = op_cases.random_x((*leading, 70), "float16")
    bias = op_cases.random_x((33,), "float32", seed=3)
    y = product(x, w, bias=bias)
    assert y.shape == (*leading, 33)
    check_product(y, x, dense, bias)


@every_implementation
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("rows", [0, 2, 300])
def test_empty_matrices(product, shape, rows):
    w = fj.SparseMatrix.from_dense(np.zeros(shape, np.float16))
    x = np.ones((rows, shape[0]), np.float16)
    bias = np.arange(shape[1], dtype=np.float32)
    y = product(x, w, bias=bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, (rows, shape[1])))
    np.testing.assert_array_equal(product(x, w), np.zeros((rows, shape[1])))


@for_each("rows", [4, 300], [4])
def test_special_weights(product, rows):
    dense, _, x = op_cases.packed_and_x((70, 33), 0.6, rows, "float16")
    x = np.abs(x) + np.float16(1)
    dense[3, 4], dense[69, 32], dense[0, 0] = np.inf, -np.inf, np.nan
    dense[1, 6], dense[2, 6] = np.inf, -np.inf
    y = np.asarray(product(x, fj.SparseMatrix.from_dense(dense)))
    assert np.all(np.isposinf(y[:, 4]))
    assert np.all(np.isneginf(y[:, 32]))
    assert np.all(np.isnan(y[:, [0, 6]]))
    assert np.all(np.isfinite(np.delete(y, [0, 4, 6, 32], axis=1)))


@for_each("rows", [4, 300], [4])
def test_special_x_stays_in_its_row(product, rows):
    dense, w, x = op_cases.packed_and_x((70, 33), 0.6, rows, "float16")
    x[1, 5], x[3, 69] = np.nan, np.inf
    y = np.asarray(product(x, w))
    assert np.all(np.isnan(y[1]) | (dense[5] == 0))
    assert np.all(~np.isfinite(y[3]) | (dense[69] == 0))
    finite = np.delete(np.arange(rows), [1, 3])
    check_product(jnp.asarray(y[finite]), x[finite], dense)


@every_implementation
def test_subnormal_weights(product):
    dense = np.full((3, 2), 6e-8, np.float16)  # the smallest
    assert np.all(dense > 0)
    x = np.full((2, 3), 1024, np.float16)
    y = product(x, fj.SparseMatrix.from_dense(dense), preferred_element_type="float32")
    np.testing.assert_array_equal(y, np.full((2, 2), 3 * 2.0**-14, np.float32))


@for_each("rows", [8, 33, 300], [8])
def test_repeats_bit_for_bit(product, rows):
    _, w, x = op_cases.packed_and_x((1031, 97), 0.7, rows, "bfloat16")
    first = product(x, w, preferred_element_type="float32")
    for _ in range(5):
        again = product(x, w, preferred_element_type="float32")
        np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("shape", [(1031, 97), (2048, 1040)])
def test_a_row_depends_on_no_other_row(shape, dtype):
    """On the CPU, as far as its kernel goes; see docs/how-it-works.md."""
    most = matmul.KERNEL_ROWS["cpu"]
    _, w, x = op_cases.packed_and_x(shape, 0.7, most, dtype)
    with op_cases.multiplying("cpu", "cpu") as product:
        whole = np.asarray(product(x, w, preferred_element_type="float32"))
        for rows in (1, 2, 5, 8, 17, 33, 64, most):
            y = product(x[:rows], w, preferred_element_type="float32")
            np.testing.assert_array_equal(y, whole[:rows])
        y = product(x[::-1], w, preferred_element_type="float32")
        np.testing.assert_array_equal(y, whole[::-1])


@by_default
@pytest.mark.parametrize("rows", [0, 4, 300])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_default_implementation(product, x_dtype, rows):
    dense = op_cases.random_dense(70, 33, 0.6, "float16")
    x = op_cases.random_x((rows, 70), x_dtype)
    check_product(product(x, fj.SparseMatrix.from_dense(dense)), x, dense)


@by_default
def test_matmul_operator(product, small):
    del product  # wanted for its platform
    dense, w, x = small
    for array in (x, jnp.asarray(x)):
        check_product(array @ w, x, dense)


# --- Bad input --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (71,), (70, 4), (3, 69)])
def test_wrong_x_shape(small, shape):
    _, w, _ = small
    with pytest.raises(ValueError, match=r"\(\.\.\., 70\).*\(70, 33\).*got") as error:
        fj.sparse_matmul(np.zeros(shape, np.float16), w)
    assert str(error.value).endswith(f"got {shape}")


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64"])
def test_wrong_x_dtype(small, dtype):
    _, w, _ = small
    with pytest.raises(ValueError, match=f"float16, bfloat16 or float32.*got {dtype}"):
        fj.sparse_matmul(np.zeros((2, 70), dtype), w)


@pytest.mark.parametrize("shape", [(), (1,), (32,), (1, 33)])
def test_wrong_bias_shape(small, shape):
    _, w, x = small
    expected = re.escape(f"bias of shape (33,) for w of shape (70, 33), got {shape}")
    with pytest.raises(ValueError, match=expected):
        fj.sparse_matmul(x, w, bias=np.zeros(shape, np.float32))


def test_wrong_bias_dtype(small):
    _, w, x = small
    with pytest.raises(ValueError, match="float dtype, got int32"):
        fj.sparse_matmul(x, w, bias=np.zeros(33, np.int32))


@pytest.mark.parametrize("dtype", ["int8", "float64", "no dtype", object()])
def test_wrong_preferred_element_type(small, dtype):
    _, w, x = small
    with pytest.raises(ValueError, match=r"preferred_element_type.*got"):
        fj.sparse_matmul(x, w, preferred_element_type=dtype)


def test_no_arrays(small):
    dense, w, x = small
    with pytest.raises(TypeError, match=r"SparseMatrix, got ndarray"):
        fj.sparse_matmul(x, dense)
    with pytest.raises(TypeError, match=r"x to be a numpy or JAX array, got list"):
        fj.sparse_matmul([1.0], w)
    with pytest.raises(TypeError, match=r"bias to be a numpy or JAX array, got float"):
        fj.sparse_matmul(x, w, bias=1.0)


def test_errors_are_raised_before_tracing(small):
    _, w, _ = small
    with pytest.raises(ValueError, match=r"got \(3, 69\)"):
        jax.jit(fj.sparse_matmul)(np.zeros((3, 69), np.float16), w)


def test_a_stack_is_refused(small):
    _, w, x = small
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    with pytest.raises(ValueError, match="got a stack"):
        fj.sparse_matmul(x, stack)


def test_unknown_implementation(small):
    _, w, x = small
    with pytest.raises(ValueError, match=r"'cuda', 'cpu', 'xla'.*got 'tpu'"):
        fj.sparse_matmul(x, w, implementation="tpu")


@pytest.mark.skipif(fj.cuda_available(), reason="has a GPU")
def test_cuda_that_cannot_run(small):
    _, w, x = small
    with pytest.raises(NotImplementedError) as error:
        fj.sparse_matmul(x, w, implementation="cuda")
    assert fj.cuda_unavailable_reason() in str(error.value)


@pytest.mark.gpu
def test_implementations_of_the_other_platform(small):
    _, w, x = small
    with pytest.raises(NotImplementedError, match="x lives on gpu"):
        fj.sparse_matmul(jnp.asarray(x), w, implementation="cpu")
    on_cpu = jax.device_put(x, jax.local_devices(backend="cpu")[0])
    with pytest.raises(NotImplementedError, match="x lives on cpu"):
        fj.sparse_matmul(on_cpu, w, implementation="cuda")


def test_thresholds_are_documented():
    assert set(matmul.KERNEL_ROWS) == {"cuda", "cpu"}
