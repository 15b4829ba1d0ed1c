"""Checksums of parts are those of the whole."""

import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashjax.checkpoint import checksums


@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=5))
def test_joined(data, places):
    places = sorted({0, len(data), *(min(place, len(data)) for place in places)})
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    parts = [(zlib.crc32(piece), len(piece)) for piece in pieces]
    assert checksums.joined(parts) == zlib.crc32(data)


@pytest.mark.parametrize("size", [0, 1, 1 << 24, (1 << 24) + 1, 50_000_001])
def test_of_large_arrays(size):
    array = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert checksums.checksum(array) == zlib.crc32(array.data)


def test_of_other_arrays():
    array = np.arange(60_000, dtype=np.float32).reshape(200, 300)[:, ::2]
    assert checksums.checksum(array) == zlib.crc32(array.tobytes())
    assert checksums.checksum(np.float16(3)) == zlib.crc32(b"\0\x42")
