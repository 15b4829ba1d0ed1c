"""Magnitude pruning."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import (
    Array,
    check_array,
    check_matrix,
    check_sparsity,
    native,
    parse_pattern,
)


def magnitude(
    dense: Array,
    sparsity: float | None,
    *,
    scope: Literal["layer", "row"] = "layer",
    pattern: str | None = None,
) -> Array:
    """Zeroes the elements of smallest magnitude.

    The magnitude pruning of Han et al., "Learning both Weights and Connections for
    Efficient Neural Networks" (2015).

    Args:
      dense: a float array, numpy or JAX; float16, bfloat16, float32 or float64. Of any
        shape, or (K, M), (in_features, out_features), with a scope of "row" or a
        pattern. Not modified.
      sparsity: share of the elements to zero, from 0 to 1. Exactly
        ``round(sparsity * dense.size)`` elements are zeroed, those that were zero
        before included; of equal magnitudes the first in row-major order go first.
        With a pattern, what the pattern gives, or None.
      scope: what magnitudes are compared within: the whole array, or each output (a row
        where weights are written as in papers), of which then exactly
        ``round(sparsity * K)`` elements are zeroed.
      pattern: n:m as ``"2:4"``: in each output n of m consecutive inputs are kept. If K
        is no multiple of m, at most n of the last inputs are kept. The scope does not
        matter then.

    Returns:
      An array of the same type, shape and dtype, on the same device; computed on the
      host.

    Raises:
      ValueError: sparsity is not finite or not within 0 to 1; scope or pattern is
        unknown; the shape does not fit; the dtype is no float dtype; the array holds
        NaN, which has no magnitude.
      TypeError: `dense` is no array, or is traced; sparsity is no number.
    """
    where = "prune.magnitude"
    groups = parse_pattern(where, pattern)
    sparsity = check_sparsity(where, sparsity, groups)
    if scope not in ("layer", "row"):
        raise ValueError(f"{where}: expected scope 'layer' or 'row', got {scope!r}")
    check_array(where, dense)
    if scope == "row" or groups is not None:
        check_matrix(where, dense)
    host = native(np.asarray(dense))
    keys = magnitude_bits(where, host)
    if groups is not None:
        smallest = _smallest_of_groups(keys, groups.keep, groups.group)
    elif scope == "row":
        outputs = np.ascontiguousarray(keys.T)  # twice as fast
        smallest = _smallest_along(outputs, round(sparsity * keys.shape[0]), axis=1).T
    else:
        count = round(sparsity * keys.size)
        smallest = _smallest(keys.reshape(-1), count).reshape(keys.shape)
    pruned = np.array(dense, order="C")
    # Zeroing what is zero already changes nothing, but -0.0 is kept as it is.
    np.copyto(pruned, 0, where=smallest & (keys > 0))
    if not isinstance(dense, jax.Array):
        return pruned
    if dense.committed:
        return jax.device_put(pruned, dense.sharding)
    with jax.default_device(next(iter(dense.devices()))):
        return jnp.asarray(pruned)


def magnitude_bits(where: str, dense: np.ndarray) -> np.ndarray:
    """Returns unsigned integers that order as magnitudes do.

    Without its sign bit, a float's bit pattern orders like its magnitude.

    Raises:
      ValueError: there is NaN, which has no magnitude.
    """
    bits = 8 * dense.dtype.itemsize
    unsigned = np.dtype(f"uint{bits}")
    flat = np.ascontiguousarray(dense).reshape(-1)
    keys = flat.view(unsigned) & unsigned.type((1 << (bits - 1)) - 1)
    infinity = np.array(np.inf, dense.dtype).view(unsigned)
    nans = int(np.count_nonzero(keys > infinity))
    if nans:
        raise ValueError(
            f"{where}: expected an array without NaN, got {nans} NaN among "
            f"{dense.size} elements"
        )
    return keys.reshape(dense.shape)


def _smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Returns a mask of the `count` smallest of a row; of equals the first."""
    if not count:
        return np.zeros(keys.shape, bool)
    threshold = np.partition(keys, count - 1)[count - 1]
    smallest = keys < threshold
    ties = np.flatnonzero(keys == threshold)
    smallest[ties[: count - np.count_nonzero(smallest)]] = True
    return smallest


def _smallest_along(keys: np.ndarray, count: int, axis: int) -> np.ndarray:
    """The same along an axis, for each index of the others."""
    if not count:
        return np.zeros(keys.shape, bool)
    threshold = np.take(np.partition(keys, count - 1, axis), [count - 1], axis)
    smallest = keys < threshold
    need = count - np.count_nonzero(smallest, axis, keepdims=True)
    ties = keys == threshold
    return smallest | (ties & (ties.cumsum(axis, np.int32) <= need))


def _smallest_of_groups(keys: np.ndarray, keep: int, group: int) -> np.ndarray:
    K, M = keys.shape
    groups = np.pad(keys, ((0, -K % group), (0, 0))).reshape(-1, group, M)
    return _smallest_along(groups, group - keep, axis=1).reshape(-1, M)[:K]
