"""Sparse layers of Flax NNX whose nonzero weights are trained."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .nn import Model, SparseDense, SparseWeight
from .nnx_tree import check_model, layers_of, replace_layers
from .sparse_matrix import SparseMatrix
from .trainable_matrix import SparsePositions, TrainableMatrix

nnx.register_data_type(SparsePositions)
nnx.register_data_type(TrainableMatrix)


def _to_state(packed: Any) -> dict[str, Any]:
    return {
        field.name: flax.serialization.to_state_dict(getattr(packed, field.name))
        for field in _array_fields(packed)
    }


def _from_state(target: Any, state: Mapping[str, Any]) -> Any:
    names = [f.name for f in _array_fields(target)]
    if sorted(state) != sorted(names):
        raise ValueError(
            f"{type(target).__name__}: expected the arrays {', '.join(sorted(names))}, "
            f"got {', '.join(sorted(state))}"
        )
    restored = {
        name: flax.serialization.from_state_dict(getattr(target, name), state[name])
        for name in names
    }
    return dataclasses.replace(target, **restored)


def _array_fields(packed: Any) -> list[dataclasses.Field[Any]]:
    fields = dataclasses.fields(packed)
    return [field for field in fields if not field.metadata.get("static")]


# For going on with training: unlike a SparseMatrix these follow the packed layout.
for _kind in (SparsePositions, TrainableMatrix):
    flax.serialization.register_serialization_state(_kind, _to_state, _from_state)


class TrainableSparseDense(SparseDense):
    """A SparseDense whose nonzero weights are an nnx.Param; their positions stay.

    Made by trainable(), turned back by freeze(). nnx.grad and optimizers over nnx.Param
    see the values, a few percent more entries than there are nonzeros; products use
    them rounded to the layer's half precision.

    Attributes:
      values: nnx.Param (segments, 16, 32, 2), see TrainableMatrix.
      positions: SparseWeight that holds SparsePositions.
      bias: nnx.Param (out_features,) or None; of a half precision no more, if the
        values are float32.
      bias_dtype: what it was, and becomes again; None if there is none.
      had_transpose: whether the kernel had a second packing, and gets it again.
    """

    def __init__(
        self,
        layer: SparseDense,
        dtype: DTypeLike = jnp.float32,
        biases: dict[int, Any] | None = None,
    ):
        """Takes over a layer, whose bias it shares unless its dtype changes.

        Args:
          layer: the layer.
          dtype: of the values: float32, float16 or bfloat16.
          biases: what has become of biases of other layers, by id(); this layer's is
            added.
        """
        kernel: Any = layer.kernel.get_value()
        matrix = TrainableMatrix.from_sparse(kernel, dtype)
        self.had_transpose = kernel.transposed is not None
        self.values = nnx.Param(matrix.values)
        self.positions = SparseWeight(matrix.positions)
        bias: Any = layer.bias
        self.bias_dtype = None if bias is None else bias.dtype
        if bias is not None:
            wider = trained_bias_dtype(bias, matrix.values)
            bias = _replaced(bias, bias[...].astype(wider), biases)
        self.bias = nnx.data(bias)
        self.in_features, self.out_features = matrix.shape
        self.use_bias = layer.use_bias
        self.dtype = layer.dtype
        self.param_dtype = layer.param_dtype
        self.preferred_element_type = layer.preferred_element_type
        self.implementation = layer.implementation

    @property
    def kernel(self) -> SparseWeight:  # type: ignore[override]
        """A new variable that holds the TrainableMatrix of positions and values."""
        positions, values = self.positions.get_value(), self.values.get_value()
        return SparseWeight(TrainableMatrix(positions, values))


def trained_bias_dtype(bias: Any, values: Any) -> Any:
    """The bias' own dtype, or that of the values if it is wider."""
    return max(bias.dtype, values.dtype, key=lambda dtype: dtype.itemsize)


def trainable(
    model: Model,
    predicate: Callable[[str, SparseDense], bool] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Model:
    """Makes the nonzero weights of a model's sparse layers trainable, in place.

    Layers that are shared stay shared. The optimizer comes afterwards::

        model = fj.trainable(model)
        optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)

    Biases of these layers are float32 meanwhile, too. Warns of other parameters that
    are float16: what keeps Adam from dividing by zero, 1e-8, is 0 there, and the first
    step makes them NaN.

    Args:
      model: an nnx.Module, or lists, tuples and dicts of them.
      predicate: called with a layer's path and the layer; says whether to swap it.
        None swaps every SparseDense.
      dtype: of the values: float32, float16 or bfloat16.

    Returns:
      The model; a new layer where the model itself is a SparseDense, a new tuple where
      it is a tuple.

    Raises:
      TypeError: the model is none of NNX.
      ValueError: there is no sparse layer to take, a layer's weights are traced or
        sharded over devices, or a wrong dtype; the model is then unchanged.
    """
    check_model("trainable", model)
    found = dict(_taken(model, predicate))
    if not found:
        raise ValueError(
            "trainable: expected a model with SparseDense layers"
            + (" that the predicate takes" if predicate else "")
            + ", got none: swap its layers first, with fj.sparsify"
        )
    for path, layer in found.values():
        kernel = layer.kernel.get_value()
        if not isinstance(kernel, SparseMatrix):
            raise ValueError(
                f"trainable: {path}: expected a layer that holds a SparseMatrix, got "
                f"{type(kernel).__name__}"
            )
    biases: dict[int, Any] = {}
    new = {
        key: TrainableSparseDense(layer, dtype, biases)
        for key, (_, layer) in found.items()
    }
    model = replace_layers(model, SparseDense, lambda old: new.get(id(old), old))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    warn_of_float16(
        "trainable",
        {".".join(map(str, path)): param.dtype for path, param in params},
    )
    return model


def warn_of_float16(function: str, dtypes: Mapping[str, Any]) -> None:
    """Warns if there are parameters that an optimizer's epsilon is 0 beside."""
    names = [name for name, dtype in dtypes.items() if dtype == jnp.float16]
    if names:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        warnings.warn(
            f"{function}: {len(names)} parameters are float16 ({some}): an optimizer "
            "such as Adam makes them NaN, unless its eps is 1e-4 or so; cast them to "
            "float32",
            stacklevel=3,
        )


def _taken(model, predicate):
    for path, layer in layers_of(model, SparseDense):
        if predicate is None or predicate(path, layer):
            yield id(layer), (path, layer)


def freeze(model: Model) -> Model:
    """Turns trainable() back, in place: values are rounded and packed.

    What was trained to 0 is no longer stored. Call it outside of jax.jit. The packed
    weights of all layers are made beside the trained ones, which are given up at last.

    Args:
      model: an nnx.Module, or lists, tuples and dicts of them.

    Returns:
      The model; a new layer or tuple where the model itself is one.

    Raises:
      TypeError: the model is none of NNX.
      ValueError: values or biases are NaN, or too large for the layer's half precision;
        the model is then unchanged.
    """
    check_model("freeze", model)
    biases: dict[int, Any] = {}
    frozen: dict[int, SparseDense] = {}
    for path, layer in layers_of(model, TrainableSparseDense):
        if id(layer) not in frozen:
            frozen[id(layer)] = _frozen_layer(layer, biases, path)
    return replace_layers(model, TrainableSparseDense, lambda layer: frozen[id(layer)])


def _frozen_layer(
    layer: TrainableSparseDense, biases: dict[int, Any], path: str
) -> SparseDense:
    where = f"freeze: {path}." if path else "freeze: "
    bias: Any = layer.bias
    if bias is not None:
        kept = rounded(f"{where}bias", bias[...], layer.bias_dtype)
        bias = _replaced(bias, kept, biases)
    matrix = frozen_matrix(f"{where}values", layer.kernel.get_value())
    return SparseDense.from_matrix(
        matrix.with_transpose() if layer.had_transpose else matrix,
        bias,
        dtype=layer.dtype,
        preferred_element_type=layer.preferred_element_type,
        implementation=layer.implementation,
    )


def _replaced(bias: Any, value: jax.Array, biases: dict[int, Any] | None) -> Any:
    """The variable, or one of its kind for all that share it if the dtype changes."""
    if bias.dtype == value.dtype:
        return bias
    new = bias.replace(value)
    return new if biases is None else biases.setdefault(id(bias), new)


def frozen_matrix(where: str, matrix: TrainableMatrix) -> SparseMatrix:
    """Rounds and packs trained values.

    Raises:
      ValueError: some are NaN, or too large for the matrix' half precision.
    """
    return SparseMatrix.from_dense(rounded(where, matrix.to_dense(), matrix.dtype))


def rounded(where: str, trained: Any, dtype: Any) -> jax.Array:
    """What was trained, in the dtype that it is kept in.

    Raises:
      ValueError: some of it is NaN, or too large for the dtype.
    """
    result = jnp.asarray(trained).astype(dtype)
    wrong = int(jnp.sum(~jnp.isfinite(result)))
    if wrong:
        most = float(jnp.finfo(result.dtype).max)
        raise ValueError(
            f"{where}: expected finite values, up to {most:g} for {result.dtype.name}, "
            f"got {wrong} others"
        )
    return result
