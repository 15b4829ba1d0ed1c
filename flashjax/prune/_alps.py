"""ALPS."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from ._checks import Array, Pattern, all_finite
from ._gram import check_damping, damped_diagonal, dead_inputs, singular, with_diagonal
from ._placement import automatic, jit_products, on_device_of, rounded
from ._selection import keys, smallest, smallest_of_groups
from ._statistics import InputStatistics, check_arguments

_FIRST_PENALTY = 0.1
_STEPS_PER_PENALTY = 3
_MAX_PENALTIES = 60
# Changes of the support below this share end the search.
_SETTLED = 3e-4
_MAX_GRADIENT_STEPS = 20
_TOLERANCE = 1e-4


def alps(
    dense: Array,
    stats: InputStatistics,
    sparsity: float | None,
    *,
    pattern: str | None = None,
    damping: float = 0.01,
) -> Array:
    """Zeroes weights so that the layer's output changes as little as can be found.

    Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
    Large Language Models" (2024): the alternating direction method of multipliers
    (ADMM) finds which weights stay, preconditioned conjugate gradients their values.
    Here each output has conjugate gradients of its own.

    Args:
      dense: (K, M), (in_features, out_features), numpy or JAX; float16, bfloat16 or
        float32. Not modified. Computed in float32, rounded at the end: a new weight
        below the dtype's smallest number becomes zero.
      stats: of the layer's inputs.
      sparsity: share of zeros, from 0 to 1: exactly ``round(sparsity * K * M)``, placed
        anywhere. Inputs that were always zero go first. With a pattern, what the
        pattern gives, or None.
      pattern: n:m as ``"2:4"``: in each output n of m consecutive inputs are kept. If K
        is no multiple of m, at most n of the last inputs are kept.
      damping: share of the mean of the gram's diagonal that is added to it.

    Returns:
      An array of the same type, shape and dtype. There are more zeros where weights
      underflow, or were zero before and no other value is better.

    Raises:
      ValueError: an argument is out of range, shapes do not fit, weights or statistics
        are not finite, or on different devices, the gram is singular after damping, or
        a new weight is too large for the dtype.
      TypeError: an argument is of the wrong type, or traced.
    """
    where = "prune.alps"
    damping = check_damping(where, damping)
    sparsity, groups = check_arguments(where, dense, stats, sparsity, pattern)
    count = round(sparsity * dense.size)

    gram = automatic(stats.gram)

    def prune(dense: jax.Array) -> jax.Array:
        weight = dense.astype(jnp.float32)
        pruned = _alps(weight, gram, damping, count, groups)
        if not all_finite(pruned):
            raise singular(where, damping, dense.shape[0], int(stats.count))
        return rounded(where, pruned, dense.dtype)

    return on_device_of(dense, prune)


@functools.partial(jit_products, static_argnames="pattern")
def _alps(
    weight: jax.Array,
    gram: jax.Array,
    damping: jax.Array | float,
    count: jax.Array | int,
    pattern: Pattern | None,
) -> jax.Array:
    dead = dead_inputs(gram)[:, None]
    diagonal = damped_diagonal(gram, damping)
    # Inputs of unit norm: the magnitude of a weight is then what it does to the output.
    norms = jnp.sqrt(diagonal)
    unit = gram / (norms[:, None] * norms[None, :])
    unit = with_diagonal(unit, jnp.ones_like(diagonal))
    target = weight * norms[:, None]

    def removed(weight: jax.Array) -> jax.Array:
        order = keys(jnp.where(dead, 0, weight), weight == 0)
        if pattern:
            return smallest_of_groups(order, pattern)
        mask = smallest(order.reshape(-1), count, axis=0)
        return mask.reshape(order.shape)

    support = ~_search(target, unit, removed)
    values = _least_squares(target, unit, support)
    # Where there are not enough live inputs to remove, dead ones stay as they were.
    return jnp.where(support, jnp.where(dead, weight, values / norms[:, None]), 0)


class _Search(NamedTuple):
    """State of ADMM.

    Attributes:
      sparse: (K, M), the weights with zeros.
      dual: (K, M), multipliers divided by the penalty.
      removed: (K, M) bool, the zeros of `sparse`.
      penalty: () float32.
      change: () int32, how many zeros moved in the last steps.
      rounds: () int32.
    """

    sparse: jax.Array
    dual: jax.Array
    removed: jax.Array
    penalty: jax.Array
    change: jax.Array
    rounds: jax.Array


def _search(target: jax.Array, gram: jax.Array, removed: Any) -> jax.Array:
    """Returns which weights ADMM removes, (K, M) bool."""

    def step(_: int, state: tuple[Any, ...]) -> tuple[Any, ...]:
        sparse, dual, mask, lower, penalty = state
        step = cho_solve((lower, True), penalty * (sparse - dual - target))
        free = target + step + dual
        mask = removed(free)
        sparse = jnp.where(mask, 0, free)
        return sparse, free - sparse, mask, lower, penalty

    def search(state: _Search) -> _Search:
        shifted = with_diagonal(gram, jnp.diagonal(gram) + state.penalty)
        lower = lax.linalg.cholesky(shifted, symmetrize_input=False)
        start = state.sparse, state.dual, state.removed, lower, state.penalty
        sparse, dual, mask, *_ = lax.fori_loop(0, _STEPS_PER_PENALTY, step, start)
        change = (mask != state.removed).sum(dtype=jnp.int32)
        kept = jnp.maximum((~mask).sum(dtype=jnp.int32), 1)
        share = change.astype(jnp.float32) / kept.astype(jnp.float32)
        growth = jnp.where(share > 0.1, 1.3, jnp.where(share > 0.005, 1.2, 1.1))
        growth = growth.astype(jnp.float32)
        change = jnp.where(share < _SETTLED, 0, change)
        return _Search(
            sparse,
            dual / growth,
            mask,
            state.penalty * growth,
            change,
            state.rounds + 1,
        )

    def goes_on(state: _Search) -> jax.Array:
        return (state.change > 0) & (state.rounds < _MAX_PENALTIES)

    mask = removed(target)
    state = _Search(
        jnp.where(mask, 0, target),
        jnp.zeros_like(target),
        mask,
        jnp.float32(_FIRST_PENALTY),
        jnp.int32(1),
        jnp.int32(0),
    )
    return lax.while_loop(goes_on, search, state).removed


def _least_squares(target: jax.Array, gram: jax.Array, support: jax.Array) -> jax.Array:
    """Returns the values on a support that come closest to the target's outputs.

    Conjugate gradients, an output at a time, all at once; the gram's diagonal is 1,
    which preconditions.

    Args:
      target: (K, M) float32.
      gram: (K, K) float32, with a diagonal of 1.
      support: (K, M) bool.

    Returns:
      (K, M) float32, zero off the support.
    """

    def product(weight: jax.Array) -> jax.Array:
        return jnp.where(support, jnp.matmul(gram, weight, precision="highest"), 0)

    def square(residual: jax.Array) -> jax.Array:
        return (residual * residual).sum(0)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        values, residual, direction, norm, steps = state
        curved = product(direction)
        length = _ratio(norm, (direction * curved).sum(0))
        values += length[None, :] * direction
        residual -= length[None, :] * curved
        new_norm = square(residual)
        direction = residual + _ratio(new_norm, norm)[None, :] * direction
        return values, residual, direction, new_norm, steps + 1

    def goes_on(state: tuple[Any, ...]) -> jax.Array:
        _, _, _, norm, steps = state
        return (norm > bound).any() & (steps < _MAX_GRADIENT_STEPS)

    values = jnp.where(support, target, 0)
    residual = product(target - values)
    norm = square(residual)
    bound = _TOLERANCE**2 * norm
    state = values, residual, residual, norm, jnp.int32(0)
    return lax.while_loop(goes_on, step, state)[0]


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    return jnp.where(denominator > 0, numerator / denominator, 0)
