"""Which elements go: exact counts, ties in order, without sorting."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import Pattern

# Before every importance: what is zero already costs nothing.
FIRST = -1


def keys(importance: jax.Array, zero: jax.Array) -> jax.Array:
    """Returns int32 that order as importances do.

    Args:
      importance: float32, not negative, no NaN.
      zero: bool of the same shape: elements that go before all others.
    """
    bits = lax.bitcast_convert_type(jnp.abs(importance), jnp.int32)
    return jnp.where(zero, FIRST, bits)


def smallest(keys: jax.Array, count: jax.Array | int, axis: int) -> jax.Array:
    """Returns a mask of the `count` smallest keys along an axis.

    Args:
      keys: int32, at least FIRST.
      count: () int32, from 0 to the length of the axis.
      axis: what to select along.

    Returns:
      bool of the shape of keys; True `count` times. Of equal keys the first go first.
    """
    length = keys.shape[axis]

    def number(mask: jax.Array) -> jax.Array:
        return mask.sum(axis, keepdims=True, dtype=jnp.int32)

    # The threshold, bit by bit, from above: counting passes need no memory.
    def halve_keys(_: int, bounds: tuple[Any, ...]) -> tuple[Any, ...]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = number(keys <= middle) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.full_like(number(keys == 0), FIRST)
    high = jnp.full_like(low, jnp.iinfo(jnp.int32).max - 1)
    _, threshold = lax.fori_loop(0, 32, halve_keys, (low, high))
    below = keys < threshold
    ties = keys == threshold
    need = count - number(below)
    index = lax.broadcasted_iota(jnp.int32, keys.shape, axis)

    def halve_indices(_: int, bounds: tuple[Any, ...]) -> tuple[Any, ...]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = number(ties & (index < middle)) >= need
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    steps = jnp.where((number(ties) == need).all(), 0, length.bit_length())
    bounds = jnp.zeros_like(low), jnp.full_like(low, length)
    _, end = lax.fori_loop(0, steps, halve_indices, bounds)
    return below | (ties & (index < end))


def smallest_of_groups(keys: jax.Array, pattern: Pattern) -> jax.Array:
    """Returns the mask of an n:m pattern over (K, M) keys.

    The last group, where K is no multiple of m, is taken as filled up with zeros.
    """
    K, M = keys.shape
    padded = jnp.pad(keys, ((0, -K % pattern.group), (0, 0)), constant_values=FIRST)
    groups = padded.reshape(-1, pattern.group, M)
    mask = smallest(groups, pattern.group - pattern.keep, axis=1)
    return mask.reshape(-1, M)[:K]
