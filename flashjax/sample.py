"""Sampled dense-dense products: x^T dy at the positions that a packed matrix stores.

Called SDDMM by Gale et al., "Sparse GPU Kernels for Deep Learning" (2020). The dense
product is computed a block of columns at a time, by XLA; the kernels (`lscd_sample`)
take a block's elements into their slots. A slot is a half of a word of the packed
`values`; arrays of slots are (segments, 16 words, 32 lanes, 2 streams).
"""

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import reference
from flashjax.matmul_impl import dispatch
from flashjax.packing import gather

# A block has at most so many strips of 16 columns, and (unless one strip has more)
# elements; it is all of the dense product that exists at a time.
BLOCK_STRIPS = 64
BLOCK_ELEMENTS = 1 << 23

# Bit of a slot in the lane's word of `live`: (16 words, 1 lane, 2 streams).
LIVE_BIT = np.add.outer(np.arange(16), [[0, 16]]).astype(np.uint32)


def is_live(live: jax.Array) -> jax.Array:
    """Which slots are no padding: (segments, 32) uint32 to (segments, 16, 32, 2)."""
    return (live[:, None, :, None] >> LIVE_BIT[None]) & np.uint32(1) == 1


def sample(
    factors: tuple[jax.Array, ...],
    shape: tuple[int, int],
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    implementation: str | None = None,
) -> jax.Array:
    """A dense gradient (K, M) at the stored positions of a packed matrix.

    Args:
      factors: x (..., K) and dy (..., M), whose product x^T dy the gradient is, or
        only the gradient (K, M) itself.
      shape: (K, M).
      arrays: bitmap, entries, and live (segments, 32), which says what is no padding.
      implementation: as of `sparse_matmul`.

    Returns:
      (segments, 16, 32, 2) float32, 0 in the padding.
    """
    functions = {"cuda": _cuda, "cpu": _cpu, "xla": _xla}
    return dispatch(implementation, functions, shape, factors, arrays)


def _xla(shape, factors, arrays):
    return _sample_blocks(shape, factors, arrays, reference.sample)


def _cpu(shape, factors, arrays):
    # CPUs multiply no half precision; once, not in every block.
    factors = tuple(factor.astype(jnp.float32) for factor in factors)
    return _sample_blocks(shape, factors, arrays, _kernel("flashjax_lscd_sample_cpu"))


def _cuda(shape, factors, arrays):
    return _sample_blocks(shape, factors, arrays, _kernel("flashjax_lscd_sample_cuda"))


def _kernel(target):
    def sample(block, bitmap, entries, first_strip, slots):
        return jax.ffi.ffi_call(target, jax.typeof(slots), input_output_aliases={4: 0})(
            block, bitmap, entries, first_strip, slots
        )

    return sample


def _sample_blocks(shape, factors, arrays, sample):
    """Computes the dense gradient a block at a time, and keeps what is stored."""
    k, m = shape
    bitmap, entries, live = arrays
    live = is_live(live)
    # Not plain zeros: they lack the mesh and the manual axes of the operands.
    slots = live.astype(jnp.float32) * np.float32(0)
    strips = bitmap.shape[0]
    if 0 in shape or 0 in live.shape:
        return slots
    strips_a_block = min(
        strips, BLOCK_STRIPS, max(1, BLOCK_ELEMENTS // (k * reference.STRIP_ROWS))
    )
    *x, dy = map(_as_rows, factors)
    dy = jnp.pad(dy, ((0, 0), (0, strips * reference.STRIP_ROWS - m)))

    def one_block(i, slots):
        # The last block may overlap the one before: its values are the same.
        first = jnp.minimum(i * strips_a_block, strips - strips_a_block)
        columns = jax.lax.dynamic_slice_in_dim(
            dy,
            first * reference.STRIP_ROWS,
            strips_a_block * reference.STRIP_ROWS,
            axis=1,
        )
        block = _transposed_product(columns, *x)
        # Under jax_enable_x64 it would be an int64.
        return sample(block, bitmap, entries, first.astype(jnp.int32), slots)

    blocks = -(-strips // strips_a_block)
    slots = jax.lax.fori_loop(np.int32(0), np.int32(blocks), one_block, slots)
    return jnp.where(live, slots, np.float32(0))


def _as_rows(factor):
    """(..., K) -> (N, K); only the first dimension stays sharded."""
    factor = gather(factor, keep=min(factor.ndim - 1, 1))
    return factor.reshape(-1, factor.shape[-1])


def _transposed_product(dy, x=None):
    """(N, M), (N, K) -> (M, K) in float32; without x, the transpose of dy."""
    if x is None:
        return dy.astype(jnp.float32).T
    if dy.dtype != x.dtype:
        dy, x = dy.astype(jnp.float32), x.astype(jnp.float32)
    # Rows that are split over devices are summed over them.
    sharding = jax.typeof(dy).sharding
    whole = sharding.update(spec=jax.P(None, None)) if any(sharding.spec) else None
    return jax.lax.dot_general(
        dy,
        x,
        (((0,), (0,)), ((), ())),
        precision=reference.precision(dy.dtype),
        preferred_element_type=jnp.float32,
        out_sharding=whole,
    )
