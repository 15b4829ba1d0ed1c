"""Layers with sparse weights for Flax Linen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .nn import LINEN_COLLECTION
from .nn import LinenSparseDense as SparseDense
from .nn_trainable import frozen_matrix, trained_bias_dtype, warn_of_float16
from .sparse_matrix import SparseMatrix
from .trainable_matrix import SparsePositions, TrainableMatrix

__all__ = ["SparseDense", "freeze", "trainable"]

_KERNEL = "kernel"


def trainable(
    variables: Mapping[str, Any], dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Makes the nonzero weights of sparse layers parameters; their positions stay.

    Their values move from the collection "sparse" to "params", as arrays "kernel"
    (segments, 16, 32, 2), see TrainableMatrix; the positions remain where they were.
    Biases of these layers become of that dtype, if it is the wider one. Warns of other
    parameters that are float16, as `flashjax.trainable` does.

    Args:
      variables: of a model with SparseDense layers; not modified.
      dtype: of the values: float32, float16 or bfloat16.

    Raises:
      ValueError: there is no SparseMatrix in the collection "sparse", or a wrong dtype.
    """
    found = False

    def split(sparse, params):
        nonlocal found
        sparse, params = dict(sparse), dict(params)
        for name, child in sparse.items():
            if name == _KERNEL and isinstance(child, SparseMatrix):
                matrix = TrainableMatrix.from_sparse(child, dtype)
                sparse[name], params[name] = matrix.positions, matrix.values
                bias = params.get("bias")
                if bias is not None:
                    params["bias"] = bias.astype(
                        trained_bias_dtype(bias, matrix.values)
                    )
                found = True
            elif isinstance(child, Mapping):
                sparse[name], params[name] = split(child, params.get(name, {}))
        return sparse, params

    result = _map(variables, split)
    if not found:
        raise ValueError(
            "linen.trainable: expected variables with SparseMatrix kernels in the "
            f"collection {LINEN_COLLECTION!r}, got none in {sorted(variables)}"
        )
    params = jax.tree_util.tree_leaves_with_path(result["params"])
    warn_of_float16(
        "linen.trainable",
        {jax.tree_util.keystr(path): leaf.dtype for path, leaf in params},
    )
    return result


def freeze(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Turns trainable() back: values are rounded and packed. Not for use in jax.jit.

    Args:
      variables: what trainable() returned, with other values perhaps; not modified.

    Raises:
      ValueError: values are NaN, or too large for the matrix' half precision.
    """

    def join(sparse, params):
        sparse, params = dict(sparse), dict(params)
        for name, child in sparse.items():
            if name == _KERNEL and isinstance(child, SparsePositions):
                matrix = TrainableMatrix(child, params.pop(name))
                sparse[name] = frozen_matrix(matrix)
            elif isinstance(child, Mapping):
                sparse[name], params[name] = join(child, params.get(name, {}))
        return sparse, params

    return _map(variables, join)


def _map(variables, function):
    sparse, params = function(
        variables.get(LINEN_COLLECTION, {}), variables.get("params", {})
    )
    return {**variables, LINEN_COLLECTION: sparse, "params": params}
