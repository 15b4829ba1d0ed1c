"""Layers with sparse weights for Flax Linen."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .nn import LINEN_COLLECTION
from .nn import LinenSparseDense as SparseDense
from .nn_trainable import (
    frozen_matrix,
    rounded,
    trained_bias_dtype,
    warn_of_float16,
)
from .sparse_matrix import SparseMatrix
from .trainable_matrix import SparsePositions, TrainableMatrix

__all__ = ["SparseDense", "freeze", "trainable"]

_KERNEL = "kernel"
_BIAS = "bias"
# In the collection "sparse" of a trainable layer: a 0 of the dtype that its bias had.
_BIAS_DTYPE = "bias_dtype"


def trainable(
    variables: Mapping[str, Any], dtype: DTypeLike = jnp.float32
) -> dict[str, Any]:
    """Makes the nonzero weights of sparse layers parameters; their positions stay.

    Their values move from the collection "sparse" to "params", as arrays "kernel"
    (segments, 16, 32, 2), see TrainableMatrix; the positions remain where they were.
    Biases of these layers become of that dtype, if it is the wider one, and beside the
    positions comes a "bias_dtype", a 0 of the dtype that they had. Warns of other
    parameters that are float16, as `flashjax.trainable` does.

    Args:
      variables: of a model with SparseDense layers; not modified.
      dtype: of the values: float32, float16 or bfloat16.

    Raises:
      TypeError: these are no variables.
      ValueError: there is no SparseMatrix in the collection "sparse", or a wrong dtype.
    """
    found = False

    def split(sparse, params):
        nonlocal found
        sparse, params = dict(sparse), dict(params)
        for name, child in list(sparse.items()):
            if name == _KERNEL and isinstance(child, SparseMatrix):
                matrix = TrainableMatrix.from_sparse(child, dtype)
                sparse[name], params[name] = matrix.positions, matrix.values
                bias = params.get(_BIAS)
                if bias is not None:
                    trained = trained_bias_dtype(bias, matrix.values)
                    if trained != bias.dtype:
                        sparse[_BIAS_DTYPE] = jnp.zeros((), bias.dtype)
                        params[_BIAS] = bias.astype(trained)
                found = True
            elif isinstance(child, Mapping):
                sparse[name], params[name] = split(child, params.get(name, {}))
        return sparse, params

    result = _map("linen.trainable", variables, split)
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
      TypeError: these are no variables.
      ValueError: values or biases are NaN, or too large for their half precision.
    """

    def join(sparse, params, path="linen.freeze: "):
        sparse, params = dict(sparse), dict(params)
        for name, child in list(sparse.items()):
            if name == _KERNEL and isinstance(child, SparsePositions):
                matrix = TrainableMatrix(child, params.pop(name))
                sparse[name] = frozen_matrix(path + name, matrix)
                bias = params.get(_BIAS)
                if bias is not None:
                    like = sparse.pop(_BIAS_DTYPE, bias)
                    params[_BIAS] = rounded(path + _BIAS, bias, like.dtype)
            elif isinstance(child, Mapping):
                below = join(child, params.get(name, {}), f"{path}{name}.")
                sparse[name], params[name] = below
        return sparse, params

    return _map("linen.freeze", variables, join)


def _map(op, variables, function):
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"{op}: expected the variables of a model, got {type(variables).__name__}"
        )
    sparse, params = function(
        variables.get(LINEN_COLLECTION, {}), variables.get("params", {})
    )
    return {**variables, LINEN_COLLECTION: sparse, "params": params}
