"""Layers with sparse weights, for Flax NNX and Linen."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.typing import ArrayLike, DTypeLike

from . import checkpoint, prune
from .matmul import Activation, sparse_matmul
from .matmul_checks import check_implementation_name
from .nnx_tree import check_model, layers_of, replace_layers
from .sharding import ShardedSparseMatrix
from .sparse_matrix import SparseMatrix, check_tokens
from .trainable_matrix import SparsePositions, TrainableMatrix

LINEN_COLLECTION = "sparse"

Model = TypeVar("Model")

_HALVES = (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))
_DEFAULT_SPARSITY = 0.8
# Elements from which a packed kernel's size tells of zeros; smaller ones are padded.
_LARGE_ELEMENTS = 1 << 16
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()

nnx.register_data_type(SparseMatrix)
nnx.register_data_type(ShardedSparseMatrix)
# flax.serialization (msgpack) then stores the form that outlives the packed layout.
flax.serialization.register_serialization_state(
    SparseMatrix,
    checkpoint.to_arrays,
    lambda _, state: checkpoint.from_arrays(state),
)


class SparseWeight(nnx.Variable[Any]):
    """The variable that holds a SparseMatrix.

    It is no nnx.Param, because packed weights are integers: nnx.grad and optimizers
    over nnx.Param pass by it.
    """

    def __getitem__(self, key: Any) -> Any:
        """``weight[...]`` is the SparseMatrix."""
        return self.get_value() if key is ... else super().__getitem__(key)


class SparseDense(nnx.Module):
    """A linear layer with an unstructured sparse kernel, the twin of nnx.Linear.

    ``y = x @ kernel + bias``. The kernel is initialised at random and pruned by
    magnitude; layers with trained weights come from from_linear(), from_matrix() or
    sparsify().

    Attributes:
      kernel: SparseWeight that holds a SparseMatrix (in_features, out_features).
      bias: nnx.Param (out_features,) or None.

    Args:
      in_features: the number of input features.
      out_features: the number of output features.
      use_bias: whether to add a bias.
      dtype: inputs are cast to it and outputs have it; None infers it from input,
        kernel and bias as nnx.Linear does. Products are accumulated in float32.
      param_dtype: float16 or bfloat16, of the kernel and the bias; None takes dtype
        if it is one of these, else float16. The CUDA kernel needs inputs of this dtype.
      sparsity: share of zeros in the kernel, 0 to 1.
      kernel_init: initializer of the kernel before it is pruned.
      bias_init: initializer of the bias.
      preferred_element_type: dtype of the output where it shall differ from dtype.
      implementation: see sparse_matmul().
      rngs: keys; ``rngs.params()`` is used as by nnx.Linear.

    Raises:
      ValueError: a dtype or size is out of range, or the layer is created inside
        jax.jit or nnx.eval_shape: the size of a packed kernel depends on its values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        sparsity: float = _DEFAULT_SPARSITY,
        kernel_init: jax.nn.initializers.Initializer = _KERNEL_INIT,
        bias_init: jax.nn.initializers.Initializer = _BIAS_INIT,
        preferred_element_type: DTypeLike | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs | None,
        _packed: tuple[SparseMatrix, nnx.Param[Any] | None] | None = None,
    ):
        check_implementation_name("SparseDense", implementation)
        # Only through __init__ does NNX set up an object, also for from_matrix().
        if _packed is not None:
            matrix, bias = _packed
        elif rngs is None:
            raise ValueError("SparseDense: expected rngs to be nnx.Rngs, got None")
        else:
            param_dtype = _param_dtype(param_dtype, dtype)
            shape = (in_features, out_features)
            matrix = _random_matrix(
                rngs.params(), shape, param_dtype, sparsity, kernel_init
            )
            bias = None
            if use_bias:
                bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
        self.kernel = SparseWeight(matrix)
        self.bias: nnx.Param[jax.Array] | None = nnx.data(bias)
        self.in_features, self.out_features = matrix.shape
        self.use_bias = bias is not None
        self.dtype = dtype
        self.param_dtype = matrix.dtype
        self.preferred_element_type = preferred_element_type
        self.implementation = implementation

    @classmethod
    def from_matrix(
        cls,
        matrix: SparseMatrix,
        bias: ArrayLike | nnx.Variable[Any] | None = None,
        *,
        dtype: DTypeLike | None = None,
        preferred_element_type: DTypeLike | None = None,
        implementation: str | None = None,
    ) -> "SparseDense":
        """Makes a layer of a packed kernel.

        Args:
          matrix: (in_features, out_features).
          bias: (out_features,), of any floating dtype, or an nnx.Param, which the
            layer then shares.
          dtype: see the class.
          preferred_element_type: see the class.
          implementation: see the class.

        Raises:
          TypeError: the kernel is no SparseMatrix or ShardedSparseMatrix.
          ValueError: it is a stack, or the bias has another shape or no floating dtype.
        """
        if not isinstance(matrix, SparseMatrix | ShardedSparseMatrix):
            raise TypeError(
                f"kernel: expected a SparseMatrix, got {type(matrix).__name__}"
            )
        if isinstance(matrix, SparseMatrix):
            matrix.check_leaves("kernel")
        variable: Any = bias
        if bias is not None and not isinstance(bias, nnx.Variable):
            variable = nnx.Param(jnp.asarray(bias))
        if variable is not None:
            _check_bias_shape(variable.shape, matrix)
        if variable is not None and not jnp.issubdtype(variable.dtype, jnp.floating):
            raise ValueError(f"bias: expected a floating dtype, got {variable.dtype}")
        return cls(
            *matrix.shape,
            dtype=dtype,
            preferred_element_type=preferred_element_type,
            implementation=implementation,
            rngs=None,
            _packed=(matrix, variable),
        )

    @classmethod
    def from_linear(
        cls,
        linear: nnx.Linear,
        dtype: DTypeLike | None = None,
        *,
        implementation: str | None = None,
    ) -> "SparseDense":
        """Packs a dense layer; what is zero in its kernel is no longer stored.

        Args:
          linear: the dense layer; its computation dtype and bias are kept as they are.
          dtype: of the packed kernel, float16 or bfloat16; None keeps a kernel of one
            of these and casts others to float16.
          implementation: see the class.

        Raises:
          ValueError: the kernel is traced or does not fit the dtype, or the layer
            computes its product in a way of its own.
        """
        _check_linear(linear, "linear", dtype)
        return _from_linear(cls, linear, dtype, implementation)

    def __call__(
        self, inputs: jax.Array, *, activation: Activation | None = None
    ) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: (..., in_features).
          activation: "relu" applies it to the output; see sparse_matmul().

        Returns:
          (..., out_features).
        """
        bias = None if self.bias is None else self.bias[...]
        return _apply(
            inputs,
            self.kernel.get_value(),
            bias,
            self.dtype,
            self.preferred_element_type,
            self.implementation,
            activation,
        )


class LinenSparseDense(linen.Module):
    """A linear layer with an unstructured sparse kernel, the twin of linen.Dense.

    The bias is in the collection "params". The packed kernel, integers without a
    gradient, is a SparseMatrix (in_features, features) in the collection "sparse".
    init() prunes a random kernel and runs outside of jax.jit and jax.eval_shape alone,
    because the size of a packed kernel depends on its values; apply() runs anywhere.

    Attributes:
      features: the number of output features.
      use_bias: whether to add a bias.
      dtype: inputs are cast to it and outputs have it; None infers it.
      param_dtype: float16 or bfloat16, of the kernel and the bias; None takes dtype
        if it is one of these, else float16. The CUDA kernel needs inputs of this dtype.
      sparsity: share of zeros in the kernel that init() makes, 0 to 1.
      kernel_init: initializer of the kernel before it is pruned.
      bias_init: initializer of the bias.
      implementation: see sparse_matmul().
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike | None = None
    sparsity: float = _DEFAULT_SPARSITY
    kernel_init: jax.nn.initializers.Initializer = _KERNEL_INIT
    bias_init: jax.nn.initializers.Initializer = _BIAS_INIT
    implementation: str | None = None

    @linen.compact
    def __call__(
        self, inputs: jax.Array, *, activation: Activation | None = None
    ) -> jax.Array:
        """Applies the layer, and an activation, to (..., in_features)."""
        param_dtype = _param_dtype(self.param_dtype, self.dtype)
        kernel = self.variable(
            LINEN_COLLECTION,
            "kernel",
            lambda: _random_matrix(
                self.make_rng("params"),
                (jnp.shape(inputs)[-1], self.features),
                param_dtype,
                self.sparsity,
                self.kernel_init,
            ),
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), param_dtype)
        matrix: Any = kernel.value
        if isinstance(matrix, SparsePositions):  # flashjax.linen.trainable()
            matrix = TrainableMatrix(matrix, self.get_variable("params", "kernel"))
        if matrix.shape[-1] != self.features:
            raise ValueError(
                f"{type(self).__name__}: expected a kernel of {self.features} "
                f"features, got one of shape {matrix.shape}"
            )
        return _apply(
            inputs, matrix, bias, self.dtype, None, self.implementation, activation
        )

    @staticmethod
    def params_from_dense(
        kernel: ArrayLike,
        bias: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Packs the parameters of a linen.Dense into variables for apply().

        Args:
          kernel: (in_features, features); zeros are not stored.
          bias: (features,) or None.
          dtype: of the packed kernel; None keeps float16 or bfloat16 and casts others
            to float16.

        Returns:
          {"params": {"bias": ...}, "sparse": {"kernel": SparseMatrix}}.

        Raises:
          ValueError: the kernel is traced, no matrix, or does not fit the dtype, or
            the bias does not fit the kernel.
        """
        matrix = SparseMatrix.from_dense(_cast(kernel, "kernel", dtype))
        if bias is not None:
            _check_bias_shape(jnp.shape(bias), matrix)
        params = {} if bias is None else {"bias": jnp.asarray(bias)}
        return {"params": params, LINEN_COLLECTION: {"kernel": matrix}}


# As flashjax.linen.SparseDense it is documented, pickled and named in variables.
LinenSparseDense.__name__ = LinenSparseDense.__qualname__ = "SparseDense"
LinenSparseDense.__module__ = "flashjax.linen"


def sparsify(
    model: Model,
    predicate: Callable[[str, nnx.Linear], bool] | None = None,
    dtype: DTypeLike | None = None,
    *,
    tokens: int | None = None,
    implementation: str | None = None,
) -> Model:
    """Swaps the dense layers of an NNX model for sparse ones, in place.

    Kernels are packed as they are: prune them first, for example with
    prune.magnitude(). A layer that is used in several places stays shared, and is
    swapped when the predicate takes any of its paths. Only layers whose type is exactly
    nnx.Linear are considered; subclasses may compute something else.

    Warns (UserWarning) when layers take more memory packed than dense, as those do that
    were not pruned.

    Args:
      model: an nnx.Module, or lists, tuples and dicts of them.
      predicate: called with a layer's path, such as "layers.3.fc1", and the layer; says
        whether to swap it. None swaps every nnx.Linear.
      dtype: of the packed kernels, float16 or bfloat16; None keeps kernels of one of
        these and casts others to float16. Biases keep their dtype.
      tokens: see SparseMatrix.from_dense().
      implementation: see sparse_matmul().

    Returns:
      The model; a new layer where the model itself is an nnx.Linear, a new tuple where
      it is a tuple.

    Raises:
      TypeError: the model is none of NNX.
      ValueError: the predicate took no layer, or a kernel cannot be packed; the model
        is then unchanged.
    """
    check_model("sparsify", model)
    check_tokens("sparsify", tokens)
    check_implementation_name("sparsify", implementation)
    found: dict[int, tuple[nnx.Linear, list[str]]] = {}
    for path, layer in layers_of(model, nnx.Linear):
        found.setdefault(id(layer), (layer, []))[1].append(path)
    if not found and predicate is None and not list(layers_of(model, SparseDense)):
        warnings.warn(
            "sparsify: expected a model with nnx.Linear layers, got none: it is as it "
            "was (nnx.LinearGeneral, of which attention is made, is not taken)",
            stacklevel=2,
        )
    taken = {
        key: (layer, paths[0])
        for key, (layer, paths) in found.items()
        if predicate is None or any(predicate(path, layer) for path in paths)
    }
    if predicate is not None and not taken:
        candidates = [paths[0] for _, paths in found.values()]
        listed = ", ".join(candidates[:8]) + (", ..." if len(candidates) > 8 else "")
        raise ValueError(
            "sparsify: expected a predicate that takes at least one nnx.Linear, got "
            f"none of {len(candidates)} ({listed})"
        )
    for layer, path in taken.values():
        _check_linear(layer, path or "the model", dtype)
    swapped: dict[int, Any] = {}

    def swap(layer: nnx.Linear) -> Any:
        if id(layer) not in taken:
            return layer
        if id(layer) not in swapped:
            swapped[id(layer)] = _from_linear(
                SparseDense, layer, dtype, implementation, tokens
            )
        return swapped[id(layer)]

    result = replace_layers(model, nnx.Linear, swap)
    _warn_if_larger({taken[key][1]: layer for key, layer in swapped.items()})
    return result


def _warn_if_larger(layers: dict[str, SparseDense]) -> None:
    """Warns about layers, by path, whose kernels take more memory than dense ones."""
    matrices = {path: layer.kernel[...] for path, layer in layers.items()}
    larger = [
        path
        for path, matrix in matrices.items()
        if matrix.size >= _LARGE_ELEMENTS
        and matrix.nbytes > matrix.size * matrix.dtype.itemsize
    ]
    if not larger:
        return
    first = matrices[larger[0]]
    warnings.warn(
        f"sparsify: expected pruned kernels, got {len(larger)} of {len(matrices)} that "
        f"take more memory packed than dense, first {larger[0]}: {first.sparsity:.0%} "
        f"zeros, {first.nbytes} bytes packed, "
        f"{first.size * first.dtype.itemsize} dense. Prune them first, or leave them "
        "out by the predicate",
        stacklevel=3,
    )


def sparse_layers(model: Any) -> Iterator[tuple[str, SparseDense]]:
    """The sparse layers of an NNX model by path, shared ones once."""
    for path, node in nnx.iter_graph(model, graph=True):
        if isinstance(node, SparseDense):
            yield ".".join(map(str, path)), node


def sparse_matrices(model: Any) -> list[Any] | None:
    """The matrices of an NNX model's sparse layers, of a layer, or in a variable.

    None if it is none of these.
    """
    if isinstance(model, nnx.Variable):
        return [model.get_value()]
    if isinstance(model, nnx.Module):
        return [layer.kernel.get_value() for _, layer in sparse_layers(model)]
    return None


def parameter_bytes(model: Any) -> int:
    """The bytes of all arrays of an NNX model, packed kernels included."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _apply(
    inputs, matrix, bias, dtype, preferred_element_type, implementation, activation
):
    """The layers' call: nnx.Linear's dtypes, without upcasting before the product."""
    inputs = jnp.asarray(inputs)
    result = dtype
    if result is None:
        dtypes = [inputs.dtype, matrix.dtype] + ([] if bias is None else [bias.dtype])
        with jax.numpy_dtype_promotion("standard"):
            result = jnp.result_type(*dtypes)
    if dtype is not None or not jnp.issubdtype(inputs.dtype, jnp.floating):
        inputs = inputs.astype(result)
    result = jnp.dtype(preferred_element_type or result)
    # Products are accumulated in float32, also for those who compute in float64.
    inputs = inputs.astype(_at_most_float32(inputs.dtype))
    return sparse_matmul(
        inputs,
        matrix,
        bias=bias,
        activation=activation,
        implementation=implementation,
        preferred_element_type=_at_most_float32(result),
    ).astype(result)


def _at_most_float32(dtype: np.dtype) -> np.dtype:
    return jnp.dtype(jnp.float32) if dtype == jnp.float64 else dtype


def _check_bias_shape(shape: tuple[int, ...], matrix: Any) -> None:
    if shape != (matrix.shape[1],):
        raise ValueError(
            f"bias: expected shape ({matrix.shape[1]},) for a kernel of shape "
            f"{matrix.shape}, got {shape}"
        )


def _half(dtype: DTypeLike, name: str) -> np.dtype:
    dtype = jnp.dtype(dtype)
    if dtype not in _HALVES:
        raise ValueError(f"{name}: expected float16 or bfloat16, got {dtype.name}")
    return dtype


def _param_dtype(param_dtype: DTypeLike | None, dtype: DTypeLike | None) -> np.dtype:
    if param_dtype is not None:
        return _half(param_dtype, "param_dtype")
    if dtype is not None and jnp.dtype(dtype) in _HALVES:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.float16)


def _random_matrix(key, shape, dtype, sparsity, kernel_init) -> SparseMatrix:
    if min(shape) < 0:
        raise ValueError(f"kernel: expected sizes of at least 0, got shape {shape}")
    # In float32, so that magnitudes are compared before they are rounded.
    dense = kernel_init(key, shape, jnp.float32) if 0 not in shape else np.zeros(shape)
    if _is_abstract(dense):
        raise ValueError(
            "SparseDense cannot be initialised inside jax.jit, jax.eval_shape or "
            "another transformation: the size of a packed kernel depends on its "
            "values. Initialise it outside, or use from_matrix() or params_from_dense()"
            " with weights that exist; applying it may be transformed"
        )
    dense = prune.magnitude(np.asarray(dense, np.float32), sparsity)
    return SparseMatrix.from_dense(jnp.asarray(np.asarray(dense).astype(dtype)))


def _is_abstract(array: Any) -> bool:
    return isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct)


def _cast(kernel: Any, name: str, dtype: DTypeLike | None) -> Any:
    """The kernel as a float16 or bfloat16 array where it was."""
    if _is_abstract(kernel):
        raise ValueError(
            f"{name}: expected a kernel with values, got {kernel}: weights can only be "
            "packed outside of jax.jit and other transformations"
        )
    if not isinstance(kernel, jax.Array):
        kernel = np.asarray(kernel)
    if kernel.ndim != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected a floating kernel (in_features, out_features), got "
            f"{kernel.dtype} of shape {kernel.shape}"
        )
    if dtype is None:
        dtype = kernel.dtype if kernel.dtype in _HALVES else jnp.float16
    dtype = _half(dtype, "dtype")
    if kernel.dtype == dtype:
        return kernel
    xp: Any = jnp if isinstance(kernel, jax.Array) else np
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        cast = kernel.astype(dtype)
    too_large = xp.isinf(cast) & xp.isfinite(kernel)
    if too_large.any():
        largest = float(abs(kernel[too_large].astype(np.float32)).max())
        raise ValueError(
            f"{name}: expected magnitudes up to {float(jnp.finfo(dtype).max):g} for "
            f"{dtype.name}, got {largest:g}"
        )
    return cast


def _check_linear(linear: nnx.Linear, path: str, dtype: DTypeLike | None) -> None:
    if not isinstance(linear, nnx.Linear):
        raise ValueError(f"{path}: expected an nnx.Linear, got {type(linear).__name__}")
    default = nnx.Linear.__init__.__kwdefaults__ or {}
    for name in ("dot_general", "promote_dtype"):
        if getattr(linear, name) is not default[name]:
            raise ValueError(
                f"{path}: expected an nnx.Linear with the default {name}, got "
                f"{getattr(linear, name)}"
            )
    _cast(linear.kernel.get_value(), path, dtype)


def _from_linear(cls, linear, dtype, implementation, tokens=None) -> SparseDense:
    kernel = _cast(linear.kernel.get_value(), "kernel", dtype)
    return cls.from_matrix(
        SparseMatrix.from_dense(kernel, tokens=tokens),
        None if linear.bias is None else linear.bias.copy(),
        dtype=linear.dtype,
        preferred_element_type=linear.preferred_element_type,
        implementation=implementation,
    )
