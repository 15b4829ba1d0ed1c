"""CRC-32 of tensors, of parts of which several threads take care."""

import functools
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# Bytes of a part.
_PART = 1 << 24
_THREADS = 4
# The polynomial of zlib's CRC-32, bits reflected: the highest one is that of x**0.
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_X = 1 << 30


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in row-major order."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return in_parts(lambda start, stop: zlib.crc32(data[start:stop]), len(data))


def in_parts(part: Callable[[int, int], int], size: int) -> int:
    """Lets several threads take care of `size` bytes, which may mean to read them.

    Args:
      part: takes care of those from a start to a stop, and gives their CRC-32.
      size: how many there are.

    Returns:
      The CRC-32 of all.
    """
    starts = range(0, size, _PART)
    stops = [min(start + _PART, size) for start in starts]
    if len(starts) < 2:
        return part(0, size)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(part, starts, stops))
    return joined([*zip(sums, map(int.__sub__, stops, starts), strict=True)])


def joined(parts: Sequence[tuple[int, int]]) -> int:
    """CRC-32 of bytes of which parts were summed separately.

    As in zlib's crc32_combine: bytes that follow shift the polynomial of those before
    them, by a factor x**8 each.

    Args:
      parts: (checksum, number of bytes) of every part, in order.
    """
    total = 0
    for part, size in parts:
        total = _multiply(_power(8 * size), total) ^ part
    return total


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(64)  # parts are of few sizes
def _power(exponent: int) -> int:
    """The polynomial x**exponent."""
    power, square = _ONE, _X
    while exponent:
        if exponent & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        exponent >>= 1
    return power
