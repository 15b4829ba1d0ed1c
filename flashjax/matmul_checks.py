"""What `sparse_matmul` checks before anything is traced; shared by its containers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import _native, packing
from flashjax.matmul_impl import ACTIVATIONS, Call
from flashjax.matrix import PackedMatrix
from flashjax.sparse_matrix import SparseMatrix

IMPLEMENTATIONS = ("cuda", "cpu", "xla")

_DTYPES = tuple(np.dtype(d) for d in (jnp.float16, jnp.bfloat16, jnp.float32))


def make_call(
    x,
    w: PackedMatrix,
    bias,
    implementation,
    preferred_element_type,
    layers: int | None = None,
    layouts: tuple[str, str] = Call.layouts,
    activation: str | None = None,
) -> Call:
    """What is static in a product of checked operands; of a stack, with its `layers`.

    Raises:
      ValueError, TypeError, NotImplementedError: see `sparse_matmul`.
    """
    check_operands(x, bias, w, w.shape, layers)
    if bias is not None:
        bias_dtype = np.dtype(jax.dtypes.canonicalize_dtype(bias.dtype))
    _check_implementation(implementation, x)
    check_activation(activation)
    return Call(
        shape=w.shape,
        dtype=w.dtype,
        x_dtype=np.dtype(x.dtype),
        bias_dtype=None if bias is None else bias_dtype,
        out_dtype=result_dtype(x, w, preferred_element_type),
        implementation=implementation,
        activation=activation,
        layouts=layouts,
    )


def check_activation(activation) -> None:
    """Checks that it is None or one of those that there are.

    Raises:
      ValueError: it is another one.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"sparse_matmul: expected activation to be one of {ACTIVATIONS} or None, "
            f"got {activation!r}"
        )


def check_layer(layer, w: SparseMatrix) -> jax.Array | np.ndarray:
    """The index into a stack, as int32."""
    layers = w.bitmap.shape[0]
    if isinstance(layer, int | np.integer) and not isinstance(layer, bool):
        if not 0 <= layer < layers:
            raise ValueError(
                f"sparse_matmul: expected a layer from 0 to {layers - 1} of a stack of "
                f"{layers}, got {layer}"
            )
        return np.asarray(layer, np.int32)
    if not isinstance(layer, np.ndarray | jax.Array):
        raise TypeError(
            "sparse_matmul: expected layer to be an integer, got "
            f"{type(layer).__name__}"
        )
    if layer.shape != () or not jnp.issubdtype(layer.dtype, jnp.integer):
        raise TypeError(
            "sparse_matmul: expected layer to be one integer, got "
            f"{layer.dtype} {layer.shape}"
        )
    if isinstance(layer, np.ndarray):
        return check_layer(int(layer), w)
    return layer.astype(np.int32)


def result_dtype(x, w: PackedMatrix, preferred) -> np.dtype:
    """Dtype of a product: `preferred`, or the promoted one of x and w."""
    if preferred is None:
        with jax.numpy_dtype_promotion("standard"):
            return np.dtype(jnp.result_type(x.dtype, w.dtype))
    try:
        dtype = np.dtype(preferred)
    except TypeError:
        dtype = None
    if dtype not in _DTYPES:
        raise ValueError(
            "sparse_matmul: expected preferred_element_type float16, bfloat16 or "
            f"float32, got {preferred}"
        )
    return dtype


def check_operands(
    x, bias, w: PackedMatrix, shape: tuple[int, int], layers: int | None = None
) -> None:
    """Checks x and the bias, or None, for a matrix or for the shape of one shard.

    Of a stack of `layers` matrices there may be a bias each.

    Raises:
      ValueError, TypeError: see `sparse_matmul`.
    """
    owner = f"w of shape {w.shape}"
    if shape != w.shape:
        owner += f" in shards of {shape}"
    _check_x(x, shape[0], owner, w.dtype)
    if bias is not None:
        _check_bias(bias, shape[1], owner, layers)


def _check_x(x, k: int, owner: str, dtype: np.dtype) -> None:
    if not isinstance(x, np.ndarray | jax.Array):
        raise TypeError(
            "sparse_matmul: expected x to be a numpy or JAX array, got "
            f"{type(x).__name__}"
        )
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(
            f"sparse_matmul: expected x of shape (..., {k}) for {owner}, got {x.shape}"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(
            "sparse_matmul: expected x of dtype float16, bfloat16 or float32 for w of "
            f"dtype {dtype.name}, got {x.dtype}"
        )


def _check_bias(bias, m: int, owner: str, layers: int | None) -> None:
    if not isinstance(bias, np.ndarray | jax.Array):
        raise TypeError(
            "sparse_matmul: expected bias to be a numpy or JAX array, got "
            f"{type(bias).__name__}"
        )
    if bias.shape != (m,) and (layers is None or bias.shape != (layers, m)):
        stack = "" if layers is None else f" or ({layers}, {m})"
        raise ValueError(
            f"sparse_matmul: expected bias of shape ({m},){stack} for {owner}, got "
            f"{bias.shape}"
        )
    if not jnp.issubdtype(bias.dtype, jnp.floating) or not bias.dtype.isnative:
        raise ValueError(
            f"sparse_matmul: expected bias of a float dtype, got {bias.dtype}"
        )


def check_implementation_name(op: str, implementation: Any) -> None:
    """Raises ValueError unless it is the name of one, or None."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{op}: expected implementation to be one of {IMPLEMENTATIONS} or None, "
            f"got {implementation!r}"
        )


def _check_implementation(implementation, x) -> None:
    check_implementation_name("sparse_matmul", implementation)
    if implementation in (None, "xla"):
        return
    if implementation == "cuda" and not _native.cuda_available():
        raise NotImplementedError(
            "sparse_matmul: implementation 'cuda' cannot run: "
            f"{_native.cuda_unavailable_reason()}"
        )
    # Traced operands show their platform only when they are lowered; JAX then raises
    # NotImplementedError by itself.
    if isinstance(x, jax.core.Tracer):
        return
    expected = {"cuda": "gpu", "cpu": "cpu"}[implementation]
    platform = _platform(x)
    if platform != expected:
        raise NotImplementedError(
            f"sparse_matmul: implementation {implementation!r} cannot run: x lives "
            f"on {platform}, expected {expected}"
        )


def _platform(x) -> str:
    """Where JAX computes with a concrete array."""
    if isinstance(x, jax.Array) and x.committed:
        return next(iter(x.devices())).platform
    return packing.default_device().platform
