"""A sparse weight as a bitmap and its values."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike

from flashjax.sparse_rows import SparseRows

from .arrays import HALF_DTYPES, native
from .checks import expect

# Elements that a thread converts at a time, so that temporaries stay in the cache; of
# fewer it would mostly wait for the interpreter.
_BLOCK = 1 << 18


def encode(dense: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Splits a matrix into the bitmap and the values of its nonzeros.

    Args:
      dense: (out, in), float16 or bfloat16. Zeros of either sign are not stored; NaN
        and infinities are.

    Returns:
      The bitmap, uint8 (ceil(out * in / 8),), and the values, (nnz,) of dense's dtype.

    Raises:
      TypeError: dense is no array.
      ValueError: dense is no matrix of one of these dtypes.
    """
    dense = native("sparse weight", dense)
    if dense.ndim != 2 or dense.dtype not in HALF_DTYPES.values():
        raise ValueError(
            "a sparse weight must be a float16 or bfloat16 matrix, got "
            f"{dense.dtype} of shape {dense.shape}"
        )
    flat = dense.reshape(-1)
    bits = flat.view(np.uint16)
    bitmap = np.empty(-(-flat.size // 8), np.uint8)

    def encode_block(start: int) -> np.ndarray:
        block = slice(start, start + _BLOCK)
        # The bit patterns decide, so that no flushing of subnormals can interfere.
        stored = (bits[block] & 0x7FFF) != 0
        packed = np.packbits(stored, bitorder="little")
        bitmap[start // 8 : start // 8 + packed.size] = packed
        return np.compress(stored, flat[block])

    starts = range(0, flat.size, _BLOCK)
    with ThreadPoolExecutor() as pool:
        values = list(pool.map(encode_block, starts))
    return bitmap, np.concatenate(values) if values else flat


def decode(
    bitmap: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int],
    dtype: np.dtype | None = None,
    name: str = "sparse weight",
) -> np.ndarray:
    """Rebuilds the matrix that encode() split.

    Args and errors are those of `check_rows`.

    Returns:
      The dense matrix, (out, in) of values' dtype.
    """
    return check_rows(bitmap, values, shape, dtype, name).to_dense()


def check_rows(
    bitmap: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int],
    dtype: np.dtype | None = None,
    name: str = "sparse weight",
) -> SparseRows:
    """What encode() gave, after checking that it belongs together.

    Args:
      bitmap: uint8 (ceil(out * in / 8),).
      values: float16 or bfloat16 (nnz,).
      shape: (out, in).
      dtype: what the metadata promises of values; None accepts either dtype.
      name: for error messages.

    Raises:
      CheckpointError: the parts contradict each other.
    """
    size = math.prod(shape)
    expect(bitmap.dtype == np.uint8, name, "bitmap dtype", "uint8", bitmap.dtype)
    expected_shape = (-(-size // 8),)
    expect(
        bitmap.shape == expected_shape,
        name,
        f"bitmap shape for a weight of shape {tuple(shape)}",
        expected_shape,
        bitmap.shape,
    )
    dtypes = list(HALF_DTYPES.values()) if dtype is None else [np.dtype(dtype)]
    expected_dtypes = " or ".join(d.name for d in dtypes)
    expect(values.dtype in dtypes, name, "values dtype", expected_dtypes, values.dtype)
    expect(values.ndim == 1, name, "values rank", 1, values.ndim)
    if size % 8:
        unused = int(bitmap[-1]) >> (size % 8)
        expect(unused == 0, name, "unused bits of the bitmap", 0, unused)
    stored = count_bits(bitmap)
    expect(
        stored == values.size,
        name,
        "number of values (bits set in the bitmap)",
        stored,
        values.size,
    )
    out_features, in_features = shape
    return SparseRows(((bitmap, values, out_features),), in_features)


def count_bits(bitmap: np.ndarray) -> int:
    """The bits that are set in a uint8 array."""
    whole = bitmap.size // 8 * 8  # several times as fast by 8 bytes
    words = np.ascontiguousarray(bitmap[:whole]).view(np.uint64)
    blocks = [words[i : i + _BLOCK] for i in range(0, words.size, _BLOCK)]
    blocks.append(bitmap[whole:])
    return sum(int(np.bitwise_count(b).sum(dtype=np.int64)) for b in blocks)
