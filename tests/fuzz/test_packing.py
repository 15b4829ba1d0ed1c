"""Packing and unpacking any matrix on the host, with each instruction set."""

import numpy as np
from fuzz import cases
from hypothesis import strategies as st

from flashjax import _native

LEVELS = ("portable", "avx2", "avx512")


def levels() -> list[str]:
    """The instruction sets of this machine."""
    before, found = _native.cpu.simd(), []
    for level in LEVELS:
        try:
            _native.cpu.set_simd(level)
        except ValueError:
            continue
        found.append(level)
    _native.cpu.set_simd(before)
    return found


def any_bits(pattern, k, m, seed):
    """16-bit patterns of all kinds where the mask is set; else zeros of both signs."""
    rng = np.random.default_rng(seed)
    keep = cases.mask(pattern, k, m, rng)
    zeros = rng.choice(np.array([0, 0x8000], np.uint16), (k, m))
    return np.where(keep, rng.integers(0, 1 << 16, (k, m), np.uint16), zeros)


# The last: many chains of strips, and a strip of several chains' length.
shapes = st.tuples(st.integers(0, 600), st.integers(0, 90)) | st.sampled_from(
    [*cases.SHAPES, (700, 611), (2311, 37)]
)


@cases.given(shapes, cases.patterns, st.integers(1, 3), cases.seeds)
def test_round_trip(shape, pattern, threads, seed):
    dense = any_bits(pattern, *shape, seed)
    wanted = np.where(dense == 0x8000, 0, dense)
    before, first = _native.cpu.simd(), None
    try:
        for level in levels():
            _native.cpu.set_simd(level)
            packed = _native.cpu.pack(dense, threads=threads)
            leaves = [leaf.tobytes() for leaf in packed]
            first = first or leaves
            assert leaves == first, level
            again = _native.cpu.unpack(*packed[:3], *shape, threads=threads)
            np.testing.assert_array_equal(again, wanted, err_msg=level)
    finally:
        _native.cpu.set_simd(before)
    assert packed[3].sum() == np.count_nonzero(wanted)
