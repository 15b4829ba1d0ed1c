"""Each CUDA kernel by name, whichever the launcher would choose, and the GPU packer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashjax as fj
from flashjax import _native

from . import op_cases

pytestmark = pytest.mark.gpu

KERNELS = ("mma", "wgmma")
ROWS = (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 344)


@pytest.fixture(params=KERNELS)
def kernel(request):
    op_cases.skip_without(request.param)
    return request.param


def check_random(kernel, shape, sparsity, rows, dtype):
    dense, w, x = op_cases.packed_and_x(shape, sparsity, rows, dtype)
    op_cases.check_product(op_cases.kernel_product(kernel, x, w), x, dense)


# Odd and even numbers of outputs and multiples of 8 are stored in different ways.
@pytest.mark.parametrize("m", [523, 522, 520])
@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(kernel, rows, dtype, m):
    check_random(kernel, (1096, m), 0.7, rows, dtype)


# Tiles of 344 and 256 columns; more than the GPU has multiprocessors. Multiples of 8
# outputs are stored in boxes.
@pytest.mark.parametrize("m", [3210, 3208])
@pytest.mark.parametrize("rows", [520, 700, 2048, 4096])
@pytest.mark.parametrize("dtype", op_cases.HALVES)
def test_tiles_of_columns(kernel, rows, dtype, m):
    check_random(kernel, (1096, m), 0.7, rows, dtype)


# 96 tiles of 344 columns or 128 of 256, of one group, for an H200's 66 clusters: many
# store twice.
@pytest.mark.parametrize(("rows", "m"), [(2048, 4096), (512, 16_384)])
def test_boxes_one_after_the_other(rows, m):
    op_cases.skip_without("wgmma")
    check_random("wgmma", (72, m), 0.5, rows, "float16")


# More tiles than an H200 has blocks of 128 rows, or clusters of 256.
@pytest.mark.parametrize("rows", [100, 256])
def test_changes_of_tile(rows):
    op_cases.skip_without("wgmma")
    check_random("wgmma", (1032, 17_400), 0.7, rows, "bfloat16")


def test_launches_of_several_widths():
    op_cases.skip_without("wgmma")
    check_random("wgmma", (4096, 8192), 0.7, 1040, "float16")  # 1032 by 344, and 8


# More tiles than multiprocessors, fewer; K that many blocks share.
@pytest.mark.parametrize("shape", [(768, 40_000), (16_384, 256), (520, 16), (8, 8)])
def test_shares_of_blocks(kernel, shape):
    dense = op_cases.random_dense(*shape, 0.6, "float16")
    bias = jnp.linspace(-1, 1, shape[1], dtype=jnp.float32)
    x = op_cases.random_x((5, shape[0]), "float16")
    y = op_cases.kernel_product(kernel, x, fj.SparseMatrix.from_dense(dense), bias)
    op_cases.check_product(y, x, dense, bias)


@pytest.mark.parametrize("bias_dtype", ["float32", *op_cases.HALVES])
@pytest.mark.parametrize("dtype", op_cases.HALVES)
def test_bias(kernel, dtype, bias_dtype):
    dense = op_cases.random_dense(300, 75, 0.7, dtype)
    bias = jnp.asarray(op_cases.random_x((75,), bias_dtype, seed=3))
    x = op_cases.random_x((3, 300), dtype)
    y = op_cases.kernel_product(kernel, x, fj.SparseMatrix.from_dense(dense), bias)
    op_cases.check_product(y, x, dense, bias)


@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
def test_patterns(kernel, pattern):
    dense = op_cases.pattern_dense(pattern, 1100, 300, "bfloat16")
    x = op_cases.random_x((9, 1100), "bfloat16")
    y = op_cases.kernel_product(kernel, x, fj.SparseMatrix.from_dense(dense))
    op_cases.check_product(y, x, dense)


@pytest.mark.parametrize("rows", [1, 20, 64, 128, 300])
def test_one_of_a_stack(rows):
    denses = [op_cases.random_dense(1096, 523, 0.0, "float16", s) for s in range(3)]
    for dense, sparsity in zip(denses, (0.8, 0.4, 0.6), strict=True):
        dense[np.random.default_rng(7).random(dense.shape) < sparsity] = 0
    stack = fj.SparseMatrix.stack([fj.SparseMatrix.from_dense(d) for d in denses])
    x = op_cases.random_x((rows, 1096), "float16")
    product = jax.jit(lambda x, w, i: fj.sparse_matmul(x, w, layer=i))
    for index, layer in [(0, 0), (1, 1), (2, 2), (9, 2), (-3, 0)]:
        op_cases.check_product(product(x, stack, index), x, denses[layer])
    for dtype in ("float32", "float16", "bfloat16"):
        biases = jnp.asarray(op_cases.random_x((3, 523), dtype, seed=3))
        y = jax.jit(lambda b: fj.sparse_matmul(x, stack, bias=b, layer=1))(biases)
        op_cases.check_product(y, x, denses[1], biases[1])


@pytest.mark.parametrize("rows", [3, 40, 128, 300])
def test_repeats_bit_for_bit(kernel, rows):
    dense = op_cases.random_dense(7168, 2048, 0.6, "float16")
    w = fj.SparseMatrix.from_dense(dense)
    x = op_cases.random_x((rows, 7168), "float16")
    first = np.asarray(op_cases.kernel_product(kernel, x, w))
    for _ in range(5):
        np.testing.assert_array_equal(
            first, np.asarray(op_cases.kernel_product(kernel, x, w))
        )


@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
def test_packs_like_the_host(pattern, dtype):
    dense = op_cases.pattern_dense(pattern, 1031, 275, dtype)
    dense[3, :40] *= -0.0  # negative zeros
    on_host = _native.cpu.pack(dense.view(np.uint16))
    w = fj.SparseMatrix.from_dense(jnp.asarray(dense))
    leaves = (*w.packed, w.counts)
    for host_leaf, gpu_leaf in zip(on_host, leaves, strict=True):
        np.testing.assert_array_equal(host_leaf, np.asarray(gpu_leaf))
    np.testing.assert_array_equal(np.asarray(w.to_dense()), dense)


@pytest.mark.parametrize("shape", [(2048, 4099), (4100, 1)])
def test_packs_many_chains_like_the_host(shape):
    dense = op_cases.random_dense(*shape, 0.5, "float16")
    on_host = _native.cpu.pack(dense.view(np.uint16))
    w = fj.SparseMatrix.from_dense(jnp.asarray(dense))
    for host_leaf, gpu_leaf in zip(on_host, (*w.packed, w.counts), strict=True):
        np.testing.assert_array_equal(host_leaf, np.asarray(gpu_leaf))
