"""SparseGPT."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from ._checks import Array, Pattern, check_whole_number
from ._gram import check_damping, damped_diagonal, dead_inputs, singular, with_diagonal
from ._placement import automatic, jit_products, on_device_of, rounded
from ._selection import keys, smallest
from ._statistics import InputStatistics, check_arguments


def sparsegpt(
    dense: Array,
    stats: InputStatistics,
    sparsity: float | None,
    *,
    pattern: str | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> Array:
    """Zeroes weights input by input, and lets later inputs make up for the loss.

    Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot" (2023): optimal brain surgeon updates in the order of the inputs, masks
    chosen a block of inputs at a time.

    Args:
      dense: (K, M), (in_features, out_features), numpy or JAX; float16, bfloat16 or
        float32. Not modified. Computed in float32, rounded at the end: a new weight
        below the dtype's smallest number becomes zero.
      stats: of the layer's inputs.
      sparsity: share of zeros, from 0 to 1: exactly ``round(sparsity * K * M)``, spread
        evenly over the blocks, the same share in each. Inputs that were always zero go
        first. With a pattern, what the pattern gives, or None.
      pattern: n:m as ``"2:4"``: in each output n of m consecutive inputs are kept. If K
        is no multiple of m, at most n of the last inputs are kept.
      block_size: inputs whose masks are chosen together; with a pattern, rounded up to
        a multiple of m.
      damping: share of the mean of the gram's diagonal that is added to it.

    Returns:
      An array of the same type, shape and dtype. There are more zeros where weights
      were zero before and stay so, or underflow.

    Raises:
      ValueError: an argument is out of range, shapes do not fit, weights or statistics
        are not finite, or on different devices, the gram is singular after damping, or
        a new weight is too large for the dtype.
      TypeError: an argument is of the wrong type, or traced.
    """
    where = "prune.sparsegpt"
    damping = check_damping(where, damping)
    block = check_whole_number(where, "block_size", block_size, 1)
    sparsity, groups = check_arguments(where, dense, stats, sparsity, pattern)
    K, M = dense.shape
    block = min(block, max(K, 1))
    if groups is not None:
        block += -block % groups.group

    gram = automatic(stats.gram)

    def prune(dense: jax.Array) -> jax.Array:
        dead = np.asarray(dead_inputs(gram))
        counts = _zeros_of_blocks(round(sparsity * dense.size), dead, M, block)
        pruned, factorised = _sparsegpt(
            dense.astype(jnp.float32), gram, damping, counts, block, groups
        )
        if not bool(factorised):
            raise singular(where, damping, K, int(stats.count))
        return rounded(where, pruned, dense.dtype)

    return on_device_of(dense, prune)


def _zeros_of_blocks(total: int, dead: np.ndarray, M: int, block: int) -> np.ndarray:
    """Returns (blocks,) int32: zeros in each block, those of padding included."""
    K = len(dead)
    ends = [min(end, K) for end in range(block, K + block, block)]
    dead_at = [int(dead[:end].sum()) * M for end in ends]
    live_at = [end * M - gone for end, gone in zip(ends, dead_at, strict=True)]
    of_dead = min(total, dead_at[-1])
    at = [
        of_dead * gone // max(dead_at[-1], 1)
        + (total - of_dead) * live // max(live_at[-1], 1)
        for gone, live in zip(dead_at, live_at, strict=True)
    ]
    at[-1] += (-K % block) * M
    return np.diff(np.array([0, *at])).astype(np.int32)


@functools.partial(jit_products, static_argnames=("block", "pattern"))
def _sparsegpt(
    dense: jax.Array,
    gram: jax.Array,
    damping: jax.Array | float,
    counts: jax.Array,
    block: int,
    pattern: Pattern | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the pruned weights in float32, and whether the gram was invertible."""
    K = len(dense)
    padding = -K % block
    dead = jnp.pad(dead_inputs(gram), (0, padding))
    factor = _upper_factor(gram, damping, padding)
    weight = jnp.pad(dense, ((0, padding), (0, 0)))

    def prune_block(index: Any, change: jax.Array) -> jax.Array:
        start = index * block
        columns = lax.dynamic_slice_in_dim(factor, start, block, axis=1)
        corner = lax.dynamic_slice_in_dim(columns, start, block)
        before = lax.dynamic_slice_in_dim(weight, start, block)
        carried = jnp.matmul(columns.T, change, precision="highest")
        moved = before + solve_triangular(corner, carried, trans=1)
        after = _prune_within(
            moved,
            solve_triangular(corner, jnp.eye(block, dtype=jnp.float32)),
            lax.dynamic_slice_in_dim(dead, start, block),
            counts[index],
            pattern,
        )
        return lax.dynamic_update_slice_in_dim(change, before - after, start, axis=0)

    change = lax.fori_loop(0, len(counts), prune_block, jnp.zeros_like(weight))
    return (weight - change)[:K], jnp.isfinite(jnp.diagonal(factor)).all()


def _upper_factor(gram: jax.Array, damping: Any, padding: int) -> jax.Array:
    """Returns R, upper triangular, with ``R @ R.T`` the damped gram, padded by 1s.

    The inverse of R is the Cholesky factor of the gram's inverse that the paper uses:
    with R no inverse of the gram is needed. In its terms, with `change` = W - W' of the
    blocks that are done, those of the next one, b, are
    ``W_b + inv(R_bb).T @ R[:, b].T @ change`` when their turn comes.
    """
    damped = with_diagonal(gram, damped_diagonal(gram, damping))
    lower = lax.linalg.cholesky(jnp.flip(damped), symmetrize_input=False)
    upper = jnp.pad(jnp.flip(lower), ((0, padding), (0, padding)))
    padded = jnp.arange(len(upper)) >= len(gram)
    return with_diagonal(upper, jnp.where(padded, 1, jnp.diagonal(upper)))


def _prune_within(
    weight: jax.Array,
    inverse: jax.Array,
    dead: jax.Array,
    count: jax.Array,
    pattern: Pattern | None,
) -> jax.Array:
    """Prunes a block of inputs one by one.

    Args:
      weight: (block, M) float32.
      inverse: (block, block) float32, upper triangular: the inverse of the factor.
      dead: (block,) bool, inputs that were always zero.
      count: () int32, zeros in the block if there is no pattern.
      pattern: whose groups are within the block, or None.

    Returns:
      (block, M) float32.
    """
    block = len(weight)
    diagonal = jnp.diagonal(inverse)
    cost = jnp.where(dead, 0, 1 / diagonal)
    group = pattern.group if pattern else block

    def prune_input(i: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        weight, mask = state
        error = jnp.where(mask[i], weight[i], 0) / diagonal[i]
        return weight - inverse[i][:, None] * error[None, :], mask

    def prune_group(index: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        weight, mask = state
        start = index * group
        rows = lax.dynamic_slice_in_dim(weight, start, group)
        costs = lax.dynamic_slice_in_dim(cost, start, group)
        order = keys(jnp.abs(rows) * costs[:, None], rows == 0)
        if pattern:
            chosen = smallest(order, pattern.group - pattern.keep, axis=0)
        else:
            chosen = smallest(order.reshape(-1), count, axis=0).reshape(order.shape)
        mask = lax.dynamic_update_slice_in_dim(mask, chosen, start, axis=0)
        return lax.fori_loop(start, start + group, prune_input, (weight, mask))

    state = weight, jnp.zeros(weight.shape, bool)
    weight, mask = lax.fori_loop(0, block // group, prune_group, state)
    return jnp.where(mask, 0, weight)
