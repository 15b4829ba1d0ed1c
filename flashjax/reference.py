"""Sparse product in plain JAX: the `xla` implementation and the reference.

The packed layout is described in `cpu/lscd_layout.h`. A lane of a warp owns two
streams of values; the bitmap says which of a stream's 16 positions in a step of 64
columns are stored, and the entries say where every stream stands before steps 0, 16,
32, ... of a strip. A value's place therefore follows from an entry, the population
counts of at most 15 earlier steps and the count of earlier positions in its own step.
"""

import jax
import jax.numpy as jnp
import numpy as np

STRIP_ROWS = 16
STEP_K = 64
GROUP_STEPS = 4
LANES = 32
POSITIONS = 16  # of one stream in one step
SEGMENT_WORDS = 16
ENTRY_STEPS = 16
ENTRY_WORDS = 18
CHAIN_STEPS = 2048

# Positions that are expanded at a time; bounds the temporary indices of `unpack`.
_CHUNK_POSITIONS = 1 << 24

# Position i of a stream is bit 8 (i % 2) + i / 2 of its half of a bitmap word.
_BIT = np.array([8 * (i % 2) + i // 2 for i in range(POSITIONS)], np.uint32)
_EARLIER = np.array([sum(1 << int(b) for b in _BIT[:i]) for i in range(16)], np.uint32)
_LOW_HALF = np.uint32(0xFFFF)


def _along(axis: int, ndim: int, vector: np.ndarray) -> np.ndarray:
    """Reshapes a vector to lie along one axis; ranks are never promoted silently."""
    return vector.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def leaf_shapes(shape: tuple[int, int]) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the packed arrays of a (K, M) matrix; None where data decides."""
    k, m = shape
    strips = _ceil_div(m, STRIP_ROWS)
    groups = _ceil_div(k, GROUP_STEPS * STEP_K)
    entries = _ceil_div(step_count(k), ENTRY_STEPS)
    return {
        "bitmap": (strips, groups, LANES, GROUP_STEPS),
        "entries": (strips, entries, ENTRY_WORDS),
        "values": (None, SEGMENT_WORDS, LANES),
        "counts": (strips,),
    }


def step_count(k: int) -> int:
    """Number of steps of a strip, in whole groups."""
    return _ceil_div(k, GROUP_STEPS * STEP_K) * GROUP_STEPS


def chain_strips(shape: tuple[int, int]) -> int:
    """Number of strips that are packed together; the last of such runs may be shorter.

    At least 1.
    """
    k, m = shape
    steps = step_count(k)
    strips = _ceil_div(CHAIN_STEPS, steps) if steps else 1
    return max(1, min(strips, _ceil_div(m, STRIP_ROWS)))


def chain_count(shape: tuple[int, int]) -> int:
    """Number of runs of strips that are packed independently."""
    return _ceil_div(_ceil_div(shape[1], STRIP_ROWS), chain_strips(shape))


def _stream_starts(entries: jax.Array) -> jax.Array:
    """Word, from the start of `values`, of each stream: (strips, E, 2, LANES)."""
    base = entries[..., 0] * np.uint32(SEGMENT_WORDS)
    shifts = _along(3, 4, np.arange(0, 32, 8, dtype=np.uint32))
    offsets = (entries[..., 2:, None] >> shifts) & np.uint32(0xFF)
    offsets = offsets.reshape(*entries.shape[:-1], 2, LANES)
    return base[..., None, None] + offsets


def _places(bitmap: jax.Array, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the positions of strips are stored.

    Returns:
      Whether a position is stored, and in which word of a lane, from the start of
      `values`: (strips, E, 16 steps, 2 streams, lanes, 16 positions).
    """
    strips, groups = bitmap.shape[:2]
    steps, entry_count = groups * GROUP_STEPS, entries.shape[1]
    words = bitmap.transpose(0, 1, 3, 2).reshape(strips, steps, LANES)
    words = jnp.pad(words, ((0, 0), (0, entry_count * ENTRY_STEPS - steps), (0, 0)))
    # (strips, E, 16 steps, 2 streams, lanes)
    halves = jnp.stack([words & _LOW_HALF, words >> np.uint32(16)], axis=2)
    halves = halves.reshape(strips, entry_count, ENTRY_STEPS, 2, LANES)
    in_step = jax.lax.population_count(halves)
    before_step = jnp.cumsum(in_step, axis=2, dtype=jnp.uint32) - in_step
    start = _stream_starts(entries)[:, :, None] + before_step

    # One axis more: the 16 positions.
    halves = halves[..., None]
    stored = (halves >> _along(5, 6, _BIT)) & np.uint32(1)
    rank = jax.lax.population_count(halves & _along(5, 6, _EARLIER))
    return stored == 1, start[..., None] + rank


def _unpack_strips(
    bitmap: jax.Array, entries: jax.Array, values: jax.Array
) -> jax.Array:
    """Bit patterns of strips, uint16 (steps * 64, strips * 16)."""
    strips, groups = bitmap.shape[:2]
    steps, entry_count = groups * GROUP_STEPS, entries.shape[1]
    stored, word = _places(bitmap, entries)
    lane = jnp.broadcast_to(_along(4, 6, np.arange(LANES, dtype=np.uint32)), word.shape)
    pair = values.reshape(-1, LANES).at[word, lane].get(mode="clip")
    bits = (pair >> _along(3, 6, np.array([0, 16], np.uint32))) & _LOW_HALF
    bits = jnp.where(stored, bits, np.uint32(0)).astype(jnp.uint16)

    # Lane 4 g + t, position (a, b, c): row g + 8 stream, column 16 a + 8 b + 2 t + c.
    bits = bits.reshape(strips, entry_count * ENTRY_STEPS, 2, 8, 4, 4, 2, 2)
    bits = bits[:, :steps].transpose(1, 5, 6, 4, 7, 0, 2, 3)
    return bits.reshape(steps * STEP_K, strips * STRIP_ROWS)


def sample(
    block: jax.Array,
    bitmap: jax.Array,
    entries: jax.Array,
    first_strip: jax.Array,
    slots: jax.Array,
) -> jax.Array:
    """Takes a dense block's elements at stored positions into their slots.

    Args:
      block: (16 strips, K) float32, some strips of a dense (M, K) matrix.
      bitmap: (all strips, groups, 32, 4) uint32.
      entries: (all strips, entries, 18) uint32.
      first_strip: int32 scalar, the block's first strip.
      slots: (segments, 16, 32, 2) float32: a place for each half of `values`.

    Returns:
      The slots, with those of the block's strips overwritten.
    """
    strips, k = block.shape[0] // STRIP_ROWS, block.shape[1]
    bitmap = jax.lax.dynamic_slice_in_dim(bitmap, first_strip, strips)
    entries = jax.lax.dynamic_slice_in_dim(entries, first_strip, strips)
    steps = entries.shape[1] * ENTRY_STEPS
    block = jnp.pad(block, ((0, 0), (0, steps * STEP_K - k)))
    # Lane 4 g + t, position (a, b, c): row g + 8 stream, column 16 a + 8 b + 2 t + c.
    block = block.reshape(strips, 2, 8, steps, 4, 2, 4, 2)
    stored, word = _places(bitmap, entries)
    block = block.transpose(0, 3, 1, 2, 6, 4, 5, 7).reshape(stored.shape)
    flat = slots.reshape(-1, LANES, 2)
    word = jnp.where(stored, word, np.uint32(flat.shape[0]))  # out of bounds: dropped
    lane = jnp.broadcast_to(_along(4, 6, np.arange(LANES, dtype=np.uint32)), word.shape)
    stream = jnp.broadcast_to(_along(3, 6, np.arange(2, dtype=np.uint32)), word.shape)
    return flat.at[word, lane, stream].set(block, mode="drop").reshape(slots.shape)


def unpack(
    packed: tuple[jax.Array, jax.Array, jax.Array],
    shape: tuple[int, int],
    dtype: np.dtype,
) -> jax.Array:
    """Expands a packed matrix to a dense one, exactly.

    Args:
      packed: bitmap (strips, groups, 32, 4), entries (strips, entries, 18) and values
        (segments, 16, 32), all uint32.
      shape: (K, M), the logical shape.
      dtype: float16 or bfloat16, the type of the stored bit patterns.

    Returns:
      The dense array, (K, M) of `dtype`.
    """
    bitmap, entries, values = packed
    k, m = shape
    strips, groups = bitmap.shape[:2]
    if k == 0 or m == 0 or values.shape[0] == 0:
        return jnp.zeros(shape, dtype)
    strip_positions = groups * GROUP_STEPS * STEP_K * STRIP_ROWS
    chunk = max(1, _CHUNK_POSITIONS // strip_positions)
    if strips <= chunk:
        bits = _unpack_strips(bitmap, entries, values)
    else:
        columns = jax.lax.map(
            lambda strip: _unpack_strips(strip[0][None], strip[1][None], values),
            (bitmap, entries),
            batch_size=chunk,
        )
        bits = columns.transpose(1, 0, 2).reshape(-1, strips * STRIP_ROWS)
    return jax.lax.bitcast_convert_type(bits[:k, :m], dtype)


def dense_product(
    x: jax.Array,
    dense: jax.Array,
    bias: jax.Array | None,
    out_dtype: np.dtype,
    transposed: bool = False,
) -> jax.Array:
    """`x @ dense + bias` with float32 accumulation; x (..., K), dense (K, M).

    With `transposed`, dense is (M, K) and its transpose the factor.
    """
    if x.dtype != dense.dtype:
        x, dense = x.astype(jnp.float32), dense.astype(jnp.float32)
    y = jax.lax.dot_general(
        x,
        dense,
        (((x.ndim - 1,), (int(transposed),)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + bias.shape)
    return y.astype(out_dtype)


def precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """Keeps float32 operands in float32: the default on a GPU rounds them to TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
