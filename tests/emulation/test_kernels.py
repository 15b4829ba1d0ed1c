"""The CUDA kernels on the CPU: what they compute, checked where no GPU is.

The same cases run on a GPU in tests/test_cuda_kernels.py.
"""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import op_cases
import pytest
from emulation import emulator

from flashjax import _native, reference
from flashjax.models.opt import memory

KERNELS = ("mma", "wgmma")


@pytest.fixture(autouse=True)
def device():
    emulator.set_device(multiprocessors=3)


def packed_on_host(dense):
    return _native.cpu.pack(dense.view(np.uint16))


def check_matmul(kernel, x, dense, bias=None, float_output=False):
    """x (N, K), dense (K, M); K is rounded up as the op does."""
    *packed, _ = packed_on_host(dense)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 8)))
    y = emulator.matmul(
        padded,
        packed,
        dense.shape[1],
        bias,
        kernel=kernel,
        float_output=float_output,
    )
    op_cases.check_product(y, x, dense, bias)
    return y


# Odd and even numbers of outputs and multiples of 8 are stored in different ways.
@pytest.mark.parametrize(
    ("dtype", "m"), [("float16", 275), ("bfloat16", 274), ("float16", 264)]
)
@pytest.mark.parametrize("float_output", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 33, 65, 129, 257, 344])
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows(kernel, rows, float_output, dtype, m):
    dense = op_cases.random_dense(520, m, 0.7, dtype)
    x = op_cases.random_x((rows, 520), dtype)
    check_matmul(kernel, x, dense, float_output=float_output)


@pytest.mark.parametrize("float_output", [False, True])
@pytest.mark.parametrize(("rows", "m"), [(2, 275), (8, 275), (33, 275), (257, 272)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_relu(kernel, rows, m, float_output):
    dense = op_cases.random_dense(520, m, 0.7, "float16")
    x = op_cases.random_x((rows, 520), "float16")
    *packed, _ = packed_on_host(dense)
    bias = np.linspace(-9, 9, m, dtype=np.float32)
    without, with_relu = (
        emulator.matmul(
            x, packed, m, bias, kernel=kernel, float_output=float_output, relu=relu
        )
        for relu in (False, True)
    )
    np.testing.assert_array_equal(with_relu, np.maximum(without, 0))
    assert with_relu.any()


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 16, 132])
@pytest.mark.parametrize("shape", [(2300, 40), (300, 1040), (8, 8), (1, 300)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_shares_of_blocks(kernel, shape, multiprocessors):
    emulator.set_device(multiprocessors)
    dense = op_cases.random_dense(*shape, 0.6, "float16")
    bias = np.linspace(-1, 1, shape[1], dtype=np.float32)
    x = op_cases.random_x((3, shape[0]), "float16")
    check_matmul(kernel, x, dense, bias, float_output=True)


# Two or three tiles of 344 columns, three of 256. Multiples of 8 outputs are stored in
# boxes.
@pytest.mark.parametrize("multiprocessors", [1, 3, 7, 132])
@pytest.mark.parametrize(
    ("rows", "m"), [(520, 261), (688, 264), (700, 264), (800, 520)]
)
@pytest.mark.parametrize("float_output", [False, True])
def test_tiles_of_columns(rows, m, float_output, multiprocessors):
    emulator.set_device(multiprocessors)
    dense = op_cases.random_dense(520, m, 0.7, "float16")
    bias = np.linspace(-1, 1, m, dtype=np.float32)
    x = op_cases.random_x((rows, 520), "float16")
    check_matmul("wgmma", x, dense, bias, float_output=float_output)


# Nine tiles of 344 columns, of which two or four clusters cut one; three of 256, of
# which two cut all.
@pytest.mark.parametrize("multiprocessors", [4, 8])
@pytest.mark.parametrize("rows", [256, 1032])
def test_whole_tiles(rows, multiprocessors):
    emulator.set_device(multiprocessors)
    dense = op_cases.random_dense(520, 600, 0.7, "bfloat16")
    x = op_cases.random_x((rows, 520), "bfloat16")
    check_matmul("wgmma", x, dense)


# Six tiles of 128 rows or three of 256, of ten groups: on fewer ranks a change of tile
# counts.
@pytest.mark.parametrize("multiprocessors", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("rows", [100, 200])
def test_changes_of_tile(rows, multiprocessors):
    emulator.set_device(multiprocessors)
    dense = op_cases.random_dense(2500, 700, 0.7, "float16")
    bias = np.linspace(-1, 1, 700, dtype=np.float32)
    x = op_cases.random_x((rows, 2500), "float16")
    check_matmul("wgmma", x, dense, bias)


SMALL, LARGE = 1 << 20, 1 << 28  # elements


@pytest.mark.parametrize(
    ("rows", "elements", "launches"),
    [
        (9, LARGE, [(9, 16)]),
        (129, LARGE, [(129, 256)]),
        (257, LARGE, [(257, 344)]),
        (350, LARGE, [(344, 344), (6, 8)]),
        (350, SMALL, [(350, 256)]),
        (384, LARGE, [(256, 256), (128, 128)]),
        (768, LARGE, [(768, 256)]),
        (1024, LARGE, [(1024, 344)]),
        (1040, LARGE, [(1032, 344), (8, 8)]),
        (1040, SMALL, [(1040, 344)]),
        (1100, LARGE, [(344, 344), (756, 256)]),
        (1 << 20, LARGE, [((1 << 20) - 64, 344), (64, 64)]),
    ],
)
def test_launches(rows, elements, launches):
    assert emulator.column_tiles(rows, elements) == launches


def test_launches_take_all_rows():
    for rows in range(1, 3000):
        launches = emulator.column_tiles(rows, LARGE)
        assert sum(columns for columns, _ in launches) == rows
        assert len(launches) <= 3


@pytest.mark.parametrize("m", [16, 300, 4096, 28_672])
@pytest.mark.parametrize("rows", [1, 9, 40, 130, 257, 513, 1040, 100_000])
def test_workspace_is_enough_for_all_launches(rows, m):
    k = 4096
    most = emulator.workspace_bytes(1 << 20, m, k)  # for any number of rows
    size = emulator.workspace_bytes(rows, m, k)
    assert size <= most <= memory._WORKSPACE
    for columns, width in emulator.column_tiles(rows, m * k):
        ctas, warps = (2 if width >= 256 else 1), (8 if width >= 128 else 16)
        strips = ctas * warps
        units = -(-m // (16 * strips)) * -(-columns // width) * (k // 256)
        slot = strips * (8 + width // 8 * 32 * 16)
        assert size >= min(units, 160 // ctas) * slot


def test_memory_is_predicted_with_the_largest_workspace():
    largest = emulator.workspace_bytes(1 << 20, 28_672, 4096)
    assert largest == memory._WORKSPACE


@pytest.mark.parametrize(
    ("columns", "most", "bands"),
    [(1, 6, [1]), (6, 6, [6]), (7, 6, [4, 3]), (13, 6, [5, 5, 3]), (4, 1, [1] * 4)],
)
@pytest.mark.parametrize("rows", [1, 5, 112])
def test_bands_of_tiles(rows, columns, most, bands):
    expected, first = [], 0
    for width in bands:
        expected += [(r, first + c) for r in range(rows) for c in range(width)]
        first += width
    np.testing.assert_array_equal(emulator.places(rows, columns, most), expected)


@hypothesis.given(
    st.integers(1, 300),
    st.integers(1, 200),
    st.integers(1, 160),
    st.sampled_from([0, 4, 8]),
)
def test_shares_are_even_and_not_empty(tiles, groups, ranks, change):
    ranks = min(ranks, tiles * groups)
    begins = emulator.shares(tiles, groups, ranks, change)
    units = np.diff(begins)
    assert begins[0] == 0
    assert begins[-1] == tiles * groups
    assert units.min() > 0
    if change == 0 or tiles < ranks:
        assert units.max() - units.min() <= 1
        return
    begun = np.diff(-(-begins // groups))  # tiles whose first unit a rank has
    quarters = 4 * units + change * begun
    assert quarters.sum() == tiles * (4 * groups + change)
    # A cut falls on a whole unit, and not between a tile's change and its first unit.
    assert quarters.max() <= -(-quarters.sum() // ranks) + 3 + change


@pytest.mark.parametrize("float_output", [False, True])
@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_bias_of_the_weights_dtype(kernel, dtype, float_output):
    dense = op_cases.random_dense(300, 75, 0.7, dtype)
    bias = op_cases.random_x((75,), dtype, seed=3)
    check_matmul(kernel, op_cases.random_x((3, 300), dtype), dense, bias, float_output)


@pytest.mark.parametrize("multiprocessors", [1, 2])
@pytest.mark.parametrize(("kernel", "strips"), [("mma", 5), ("wgmma", 17)])
def test_walks_from_chain_to_chain(kernel, strips, multiprocessors):
    # A chain is 3 strips here, and a warp walks over 2: the second one over 2 and 3.
    shape = (43_800, 16 * strips)
    assert reference.chain_strips(shape) == 3
    emulator.set_device(multiprocessors)
    dense = op_cases.random_dense(*shape, 0.97, "float16")
    check_matmul(kernel, op_cases.random_x((3, shape[0]), "float16"), dense)


# The first group of a block or of a piece needs none, one or several segments.
@pytest.mark.parametrize("sparsity", [0.9, 0.97, 0.99, 0.998])
@pytest.mark.parametrize("kernel", KERNELS)
def test_few_values(kernel, sparsity):
    emulator.set_device(multiprocessors=5)
    dense = op_cases.random_dense(9000, 40, sparsity, "float16")
    check_matmul(kernel, op_cases.random_x((3, 9000), "float16"), dense)
    *packed, _ = packed_on_host(dense)
    unpacked = emulator.unpack(packed, dense.shape, False)
    np.testing.assert_array_equal(unpacked, dense.view(np.uint16).T)


@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_patterns(kernel, pattern):
    dense = op_cases.pattern_dense(pattern, 1100, 150, "bfloat16")
    check_matmul(kernel, op_cases.random_x((9, 1100), "bfloat16"), dense)


def test_before_hopper():
    emulator.set_device(multiprocessors=4, capability=8)
    dense = op_cases.random_dense(260, 70, 0.5, "float16")
    check_matmul("auto", op_cases.random_x((2, 260), "float16"), dense)


@hypothesis.given(op_cases.masks(), st.integers(1, 40), st.sampled_from(KERNELS))
@hypothesis.settings(max_examples=15, deadline=None)
def test_any_mask(mask, rows, kernel):
    hypothesis.assume(mask.size > 0)
    dense = op_cases.random_dense(*mask.shape, 0.0, "float16")
    dense[~mask] = 0
    x = op_cases.random_x((rows, mask.shape[0]), "float16")
    check_matmul(kernel, x, dense)


@pytest.mark.parametrize("dtype", op_cases.HALVES)
@pytest.mark.parametrize("pattern", op_cases.PATTERNS)
def test_packs_like_the_host(pattern, dtype):
    dense = op_cases.pattern_dense(pattern, 531, 75, dtype)
    dense[3, :40] *= -0.0  # negative zeros
    emulated = emulator.pack(dense.view(np.uint16))
    for host_leaf, leaf in zip(packed_on_host(dense), emulated, strict=True):
        np.testing.assert_array_equal(host_leaf, leaf)


# Several chains of strips; sizes that allow no wide loads.
@pytest.mark.parametrize("shape", [(700, 4099 // 8), (4100, 33), (5, 3)])
def test_packs_many_chains_like_the_host(shape):
    dense = op_cases.random_dense(*shape, 0.5, "float16")
    emulated = emulator.pack(dense.view(np.uint16))
    for host_leaf, leaf in zip(packed_on_host(dense), emulated, strict=True):
        np.testing.assert_array_equal(host_leaf, leaf)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (64, 16), (520, 24), (2311, 37)])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
def test_unpacks(shape, sparsity, transposed):
    dense = op_cases.random_dense(*shape, sparsity, "bfloat16").view(np.uint16)
    *packed, _ = packed_on_host(dense)
    unpacked = emulator.unpack(packed, shape, transposed)
    np.testing.assert_array_equal(unpacked if transposed else unpacked.T, dense)


def packed_stack(matrices):
    """(bitmap, entries, values) with the layers in front."""
    leaves = list(zip(*map(packed_on_host, matrices), strict=True))
    segments = max(len(values) for values in leaves[2])
    values = [np.pad(v, ((0, segments - len(v)), (0, 0), (0, 0))) for v in leaves[2]]
    return np.stack(leaves[0]), np.stack(leaves[1]), np.stack(values)


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_of_a_stack(kernel, rows):
    matrices = [
        op_cases.random_dense(700, 290, sparsity, "float16", seed)
        for seed, sparsity in enumerate([0.8, 0.4, 0.6])
    ]
    stack = packed_stack(matrices)
    x = op_cases.random_x((rows, 704), "float16")
    x[:, 700:] = 0
    for index, layer in [(0, 0), (1, 1), (2, 2), (7, 2), (-1, 0)]:
        y = emulator.matmul(x, stack, 290, kernel=kernel, layer=index)
        op_cases.check_product(y, x[:, :700], matrices[layer])
    for dtype in ("float32", "float16"):
        biases = op_cases.random_x((3, 290), dtype, seed=3)
        y = emulator.matmul(x, stack, 290, biases, kernel=kernel, layer=1)
        op_cases.check_product(y, x[:, :700], matrices[1], biases[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_unpacks_one_of_a_stack(transposed):
    matrices = [op_cases.random_dense(300, 40, s, "bfloat16") for s in (0.9, 0.5)]
    stack = packed_stack(matrices)
    for layer, dense in enumerate(matrices):
        unpacked = emulator.unpack(stack, (300, 40), transposed, layer)
        dense = dense.view(np.uint16)
        np.testing.assert_array_equal(unpacked if transposed else unpacked.T, dense)


def test_repeats_bit_for_bit():
    emulator.set_device(multiprocessors=7)
    dense = op_cases.random_dense(1500, 300, 0.6, "float16")
    x = op_cases.random_x((12, 1500), "float16")
    first = check_matmul("wgmma", x, dense)
    np.testing.assert_array_equal(first, check_matmul("wgmma", x, dense))


@pytest.mark.parametrize("shape", [(1, 1), (64, 16), (520, 120), (2311, 37)])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
def test_samples(shape, sparsity):
    k, m = shape
    dense = op_cases.random_dense(k, m, sparsity, "bfloat16")
    *packed, _ = packed_on_host(dense)
    strips = len(packed[0])
    rows = np.zeros((16 * strips, k), np.float32)
    rows[:m] = dense.T
    slots = np.full((*packed[2].shape, 2), 7, np.float32)
    # Two blocks; the last one begins too late and moves forward.
    size = 16 * -(-strips // 2)
    emulator.sample(rows[:size], packed, m, 0, slots)
    emulator.sample(rows[-size:], packed, m, strips, slots)
    words = packed[2]
    expected = np.stack([words << np.uint32(16), words & np.uint32(0xFFFF0000)], -1)
    # What no position is stored in stays.
    untouched = slots == 7
    assert not np.any(expected[untouched])
    np.testing.assert_array_equal(
        slots[~untouched], expected.view(np.float32)[~untouched]
    )
