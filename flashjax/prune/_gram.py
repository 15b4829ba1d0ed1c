"""The gram of a layer's inputs, made ready to be factorised."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import check_number


def check_damping(where: str, damping: Any) -> float:
    """Returns the damping as a float."""
    damping = check_number(where, "damping to be a number", damping)
    if not math.isfinite(damping) or damping < 0:
        raise ValueError(
            f"{where}: expected a finite damping of at least 0, got {damping}"
        )
    return damping


def dead_inputs(gram: jax.Array) -> jax.Array:
    """Returns (K,) bool: which inputs were always zero."""
    return jnp.diagonal(gram) <= 0


def damped_diagonal(gram: jax.Array, damping: jax.Array | float) -> jax.Array:
    """Returns (K,) float32, the gram's diagonal plus `damping` times its mean.

    The mean is that of live inputs; it is also the entry of dead ones, which leaves
    them as they are and the gram invertible.
    """
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    total = jnp.where(dead, 0, diagonal).sum()
    mean = total / jnp.maximum((~dead).sum(), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, 1)
    return jnp.where(dead, mean, diagonal + damping * mean)


def with_diagonal(matrix: jax.Array, diagonal: jax.Array) -> jax.Array:
    """Returns a square matrix with another diagonal."""
    index = jnp.arange(len(diagonal))
    on_diagonal = index[:, None] == index[None, :]
    return jnp.where(on_diagonal, diagonal[:, None], matrix)


def singular(where: str, damping: float, K: int, count: int) -> ValueError:
    """Returns the error for a gram that could not be factorised."""
    return ValueError(
        f"{where}: expected a gram ({K}, {K}) that is positive definite after damping "
        f"by {damping:g} of its mean diagonal, got one that is not, from {count} "
        "inputs; raise damping, or use more calibration text"
    )
