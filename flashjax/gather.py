"""The gather layout in plain JAX, and its packer on the host.

`cpu/gather_layout.h` describes the layout: a lane is a row of the (M, K) matrix, and a
value's column is the sum of the distances up to it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import _native

# Rows of x that the CUDA kernel multiplies.
KERNEL_ROWS = 8
MAX_COLUMNS = 1 << 16

_LANES = 32
_CHUNK_VALUES = 8
_PANEL_UNITS = 16
_PANEL_TARGET = 7168
_MAX_PANELS = 8
_ROWS = slice(1, 1 + _LANES)  # words of an entry


def leaf_shapes(shape: tuple[int, int]) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the packed arrays of a (K, M) matrix; None where data decides."""
    k, m = shape
    strips = -(-m // _LANES)
    panels = 2
    while panels < _MAX_PANELS and panels * _PANEL_TARGET < k:
        panels *= 2
    words = 1 + _LANES + panels * _PANEL_UNITS * _LANES // 2
    return {
        "bitmap": (None, _LANES, 2),
        "entries": (strips + 1, words),
        "values": (None, _LANES, 4),
        "counts": (strips,),
    }


def pack(dense: np.ndarray, threads: int = 0) -> tuple[np.ndarray, ...] | None:
    """Packs a (K, M) array of 16-bit floats on the host.

    Args:
      dense: float16 or bfloat16 (K, M).
      threads: host threads, 0 for all cores.

    Returns:
      (bitmap, entries, values, counts), uint32; None if the layout cannot hold the
      matrix, because it has too many columns or its rows differ too much.
    """
    dense = np.ascontiguousarray(dense, dense.dtype.newbyteorder("="))
    return _native.cpu.gather_pack(dense.view(np.uint16), threads=threads)


def unpack(
    packed: tuple[jax.Array, jax.Array, jax.Array],
    shape: tuple[int, int],
    dtype: np.dtype,
) -> jax.Array:
    """Expands bitmap, entries and values to a dense (K, M) array of `dtype`, exactly.

    Works inside `jax.jit`, on every platform.
    """
    bitmap, entries, values = packed
    k, m = shape
    chunks = values.shape[0]
    if not chunks:
        return jnp.zeros(shape, dtype)
    # (chunks, lanes, values)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint16)
    bits = bits.reshape(chunks, _LANES, _CHUNK_VALUES)
    steps = jax.lax.bitcast_convert_type(bitmap, jnp.int8).astype(jnp.int32)
    steps = steps.reshape(chunks, _LANES, _CHUNK_VALUES)

    first = entries[:, 0].astype(jnp.int32)
    strip = jnp.searchsorted(first[1:], jnp.arange(chunks), side="right")
    strip = jnp.minimum(strip, entries.shape[0] - 2)  # of chunks that pad a stack
    # All distances before a chunk, less those before its strip.
    before = jnp.cumsum(steps.sum(axis=2), axis=0)
    before = jnp.pad(before, ((1, 0), (0, 0)))
    start = before[:-1] - before[first[strip]]
    column = start[..., None] + jnp.cumsum(steps, axis=2)
    row = entries[strip, _ROWS].astype(jnp.int32)[..., None]
    # Zeros may stand at the place of a nonzero.
    row = jnp.where(bits == 0, m, row)
    dense = jnp.zeros((m, k), jnp.uint16)
    dense = dense.at[row, column].set(bits, mode="drop", unique_indices=True)
    return jax.lax.bitcast_convert_type(dense.T, dtype)
