"""Gradual magnitude pruning: which weights stay, and when."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

import flashjax as fj


def cubic_sparsity(progress: float, final: float) -> float:
    """Sparsity at `progress` in [0, 1] of the pruning phase.

    Rises fast while many weights are superfluous, slowly in the end: Zhu and Gupta,
    "To prune, or not to prune" (arXiv:1710.01878), equation 1.
    """
    return final * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)


def magnitude_masks(
    params: Mapping[str, jax.Array], names: Iterable[str], sparsity: float
) -> dict[str, jax.Array]:
    """Masks that keep the largest weights of each matrix.

    Weights that are zero already go first, so no mask grows back as sparsity rises.

    Args:
      params: parameters by name.
      names: the matrices to prune.
      sparsity: share of zeros in each.

    Returns:
      Boolean arrays by name, True where a weight stays.
    """
    return {
        name: jnp.asarray(fj.prune.magnitude(np.asarray(params[name]), sparsity) != 0)
        for name in names
    }


def apply_masks(
    params: Mapping[str, jax.Array], masks: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns `params` with zeros where a mask is False."""
    return {
        name: jnp.where(masks[name], value, 0) if name in masks else value
        for name, value in params.items()
    }


def sparsity(params: Mapping[str, jax.Array], names: Iterable[str]) -> float:
    """Returns the share of zeros in the named matrices taken together."""
    matrices = [np.asarray(params[name]) for name in names]
    zeros = sum(int(np.count_nonzero(matrix == 0)) for matrix in matrices)
    return zeros / sum(matrix.size for matrix in matrices)
