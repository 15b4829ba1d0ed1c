"""The CUDA kernels on the emulated device: few cases, for they are slow."""

import numpy as np
import op_cases
import pytest
from emulation import emulator
from fuzz import cases
from hypothesis import settings
from hypothesis import strategies as st

from flashjax import _native

SHAPES = st.tuples(st.integers(1, 400), st.integers(1, 60)) | st.sampled_from(
    [shape for shape in cases.SHAPES if 0 not in shape]
)
KERNELS = st.sampled_from(("mma", "wgmma"))
few = settings(max_examples=max(5, settings.default.max_examples // 30))


@pytest.fixture(autouse=True)
def device():
    emulator.set_device(multiprocessors=3)


@few
@cases.given(SHAPES, cases.patterns, st.integers(1, 80), KERNELS, cases.seeds)
@pytest.mark.parametrize("dtype", op_cases.HALVES)
def test_product(dtype, shape, pattern, rows, kernel, seed):
    dense = cases.matrix(pattern, shape, dtype, 1.0, seed)
    packed = _native.cpu.pack(dense.view(np.uint16))[:3]
    x = op_cases.random_x((rows, shape[0]), dtype, seed)
    padded = np.pad(x, ((0, 0), (0, -shape[0] % 8)))
    y = emulator.matmul(padded, packed, shape[1], kernel=kernel)
    op_cases.check_product(y, x, dense)


@few
@cases.given(SHAPES, cases.patterns, st.booleans(), cases.seeds)
def test_packs_like_the_host_and_unpacks(shape, pattern, transposed, seed):
    dense = cases.matrix(pattern, shape, "float16", 1.0, seed)
    dense = cases.put_specials(dense, 3, seed).view(np.uint16)
    emulated = emulator.pack(dense)
    for host_leaf, leaf in zip(_native.cpu.pack(dense), emulated, strict=True):
        np.testing.assert_array_equal(host_leaf, leaf)
    unpacked = emulator.unpack(emulated[:3], shape, transposed)
    wanted = np.where(dense == 0x8000, 0, dense)
    np.testing.assert_array_equal(unpacked if transposed else unpacked.T, wanted)
