"""Wanda."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import Array, Pattern
from ._placement import automatic, on_device_of
from ._selection import keys, smallest, smallest_of_groups
from ._statistics import InputStatistics, check_arguments


def wanda(
    dense: Array,
    stats: InputStatistics,
    sparsity: float | None,
    *,
    pattern: str | None = None,
) -> Array:
    """Zeroes the weights whose inputs and magnitudes are small.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models"
    (2023): importance is ``|W| * ||X||_2``, compared within each output. What is kept
    is not changed.

    Args:
      dense: (K, M), (in_features, out_features), numpy or JAX; float16, bfloat16 or
        float32. Not modified.
      stats: of the layer's inputs.
      sparsity: share of zeros, from 0 to 1: exactly ``round(sparsity * K)`` in each
        output, those that were zero before included; of equal importances the first
        inputs go first. With a pattern, what the pattern gives, or None.
      pattern: n:m as ``"2:4"``: in each output n of m consecutive inputs are kept. If K
        is no multiple of m, at most n of the last inputs are kept.

    Returns:
      An array of the same type, shape and dtype.

    Raises:
      ValueError: an argument is out of range, shapes do not fit, or weights or
        statistics are not finite, or on different devices.
      TypeError: an argument is of the wrong type, or traced.
    """
    where = "prune.wanda"
    sparsity, groups = check_arguments(where, dense, stats, sparsity, pattern)
    count = round(sparsity * dense.shape[0])
    gram = automatic(stats.gram)
    return on_device_of(dense, lambda w: _wanda(w, gram, count, groups))


@functools.partial(jax.jit, static_argnames="pattern")
def _wanda(
    dense: jax.Array, gram: jax.Array, count: Any, pattern: Pattern | None
) -> jax.Array:
    order = keys(wanda_importance(dense, gram), dense == 0)
    if pattern is None:
        mask = smallest(order, count, axis=0)
    else:
        mask = smallest_of_groups(order, pattern)
    return jnp.where(mask, 0, dense)


def wanda_importance(dense: jax.Array, gram: jax.Array) -> jax.Array:
    """Returns ``|W| * ||X||_2``, (K, M) float32."""
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    return jnp.abs(dense.astype(jnp.float32)) * norms[:, None]
