"""The CUDA kernels of the gather layout on the CPU.

tests/test_gather.py runs them on a GPU.
"""

import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from emulation import emulator

from flashjax import gather


@pytest.fixture(autouse=True)
def device():
    emulator.set_device(multiprocessors=8)


def check_matmul(x, dense, bias=None, float_output=False):
    """x (N, K), dense (K, M); K is rounded up as the op does."""
    *packed, _ = gather.pack(dense)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 8)))
    y = emulator.gather_matmul(
        padded, packed, dense.shape[1], bias, float_output=float_output
    )
    op_cases.check_product(y, x, dense, bias)


@pytest.mark.parametrize("float_output", [False, True])
@pytest.mark.parametrize(("dtype", "m"), [("float16", 275), ("bfloat16", 274)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows(rows, dtype, m, float_output):
    dense = op_cases.random_dense(520, m, 0.8, dtype)
    x = op_cases.random_x((rows, 520), dtype)
    check_matmul(x, dense, float_output=float_output)


@pytest.mark.parametrize("float_output", [False, True])
def test_relu(float_output):
    dense = op_cases.random_dense(520, 275, 0.8, "float16")
    x = op_cases.random_x((3, 520), "float16")
    *packed, _ = gather.pack(dense)
    bias = np.linspace(-9, 9, 275, dtype=np.float32)
    without, with_relu = (
        emulator.gather_matmul(
            x, packed, 275, bias, float_output=float_output, relu=relu
        )
        for relu in (False, True)
    )
    np.testing.assert_array_equal(with_relu, np.maximum(without, 0))
    assert with_relu.any()


# Clusters of 2, 4 and 8 with one strip and several, the last with fewer.
@pytest.mark.parametrize("multiprocessors", [8, 16, 132])
@pytest.mark.parametrize("shape", [(300, 1000), (20_000, 100), (40_000, 70), (1, 33)])
def test_clusters(shape, multiprocessors):
    emulator.set_device(multiprocessors)
    dense = op_cases.random_dense(*shape, 0.9, "float16")
    bias = np.linspace(-1, 1, shape[1], dtype=np.float32)
    x = op_cases.random_x((5, shape[0]), "float16")
    check_matmul(x, dense, bias, float_output=True)


def test_more_strips_than_a_cluster_holds():
    """Several launches of clusters' worth; so many strips that warps have few units."""
    emulator.set_device(multiprocessors=2)
    dense = op_cases.random_dense(64, 32 * 40 + 5, 0.8, "float16")
    check_matmul(op_cases.random_x((8, 64), "float16"), dense)


@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
def test_patterns(pattern):
    dense = op_cases.pattern_dense(pattern, 700, 290, "float16")
    check_matmul(op_cases.random_x((4, 700), "float16"), dense)


@pytest.mark.parametrize("sparsity", [0.0, 0.999, 1.0])
def test_zeros(sparsity):
    dense = op_cases.random_dense(260, 70, sparsity, "float16")
    check_matmul(op_cases.random_x((2, 260), "float16"), dense)


def test_infinities_reach_nonzeros_and_few_others():
    dense = op_cases.random_dense(300, 64, 0.8, "float16")
    x = op_cases.random_x((1, 304), "float16")
    x[0, 17] = np.inf
    *packed, _ = gather.pack(dense)
    y = emulator.gather_matmul(x, packed, 64)[0]
    assert np.isinf(y[dense[17] != 0]).all()
    assert np.isfinite(y[dense[17] == 0]).mean() > 0.9


def test_rows_that_do_not_exist_are_not_written():
    """What comes from elsewhere may say anything: no lane has a row then."""
    dense = op_cases.random_dense(300, 40, 0.8, "float16")
    bitmap, entries, values, _ = gather.pack(dense)
    entries[:-1, 1:33] |= np.uint32(1 << 31)
    x = op_cases.random_x((1, 304), "float16")
    y = emulator.gather_matmul(x, (bitmap, entries, values), 40)
    assert (y.view(np.uint16) == 0xCDCD).all()
    expanded = emulator.gather_unpack((bitmap, entries, values), (300, 40), False)
    assert (expanded == 0xCDCD).all()
    expanded = emulator.gather_unpack((bitmap, entries, values), (300, 40), True)
    assert not expanded.any()


def check_unpack(dense, transposed):
    *packed, _ = gather.pack(dense)
    bits = emulator.gather_unpack(packed, dense.shape, transposed).view(np.float16)
    np.testing.assert_array_equal(bits if transposed else bits.T, dense)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (520, 275), (2048, 512), (20_000, 40)])
def test_unpack(shape, sparsity, transposed):
    check_unpack(op_cases.random_dense(*shape, sparsity, "float16"), transposed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
def test_unpack_patterns(pattern, transposed):
    """Rows that advance unevenly: what a tile needs is far from its share of units."""
    check_unpack(op_cases.pattern_dense(pattern, 2500, 290, "float16"), transposed)


@pytest.mark.parametrize("layer", [-1, 0, 1, 5])
def test_stack(layer):
    layers = [op_cases.random_dense(300, 70, s, "bfloat16") for s in (0.8, 0.95)]
    parts = [gather.pack(dense)[:3] for dense in layers]
    sizes = [max(len(leaf) for leaf in leaves) for leaves in zip(*parts, strict=True)]
    packed = [
        np.stack([np.resize(part[i], (size, *part[i].shape[1:])) for part in parts])
        for i, size in enumerate(sizes)
    ]
    biases = op_cases.random_x((2, 70), "bfloat16", seed=4)
    x = np.pad(op_cases.random_x((3, 300), "bfloat16"), ((0, 0), (0, 4)))
    y = emulator.gather_matmul(x, packed, 70, biases, layer=layer)
    meant = min(max(layer, 0), 1)
    op_cases.check_product(y, x[:, :300], layers[meant], biases[meant])
    dense = emulator.gather_unpack(packed, (300, 70), True, layer=layer)
    expected = layers[meant].view(np.uint16)
    np.testing.assert_array_equal(dense, expected)
    assert y.dtype == jnp.bfloat16
