"""The product of a dense and a sparse matrix.

Every call goes through the same layers, from the outside in:

* `sparse_matmul` checks the operands;
* `_product` is a `custom_vjp`: differentiable in x and bias, not in the weights;
* `_batched` is a `custom_vmap`: a batch of x becomes rows of one kernel call;
* `_forward` picks the implementation when the computation is lowered;
* `_cuda`, `_cpu` and `_xla` are the implementations. A kernel reads the compressed
  weights once for all rows, which pays off for few rows (decoding). With many rows
  (prefill) the weights are expanded and a dense product follows; the dense matrix is a
  temporary of that call.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from flashjax import _native, packing, reference
from flashjax.sparse_matrix import SparseMatrix

Implementation = Literal["cuda", "cpu", "xla"]

IMPLEMENTATIONS = ("cuda", "cpu", "xla")

# Rows of x up to which the sparse kernel is used; above, expand and multiply.
KERNEL_ROWS = {"cuda": 256, "cpu": 128}

_CUDA_K_MULTIPLE = 8  # 16-byte rows of x

_DTYPES = tuple(np.dtype(d) for d in (jnp.float16, jnp.bfloat16, jnp.float32))


def sparse_matmul(
    x: jax.Array | np.ndarray,
    w: SparseMatrix,
    *,
    bias: jax.Array | np.ndarray | None = None,
    implementation: Implementation | None = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Computes ``x @ w + bias`` for a sparse matrix w, accumulating in float32.

    Works under jit, vmap (over x, the bias and the weights), grad with respect to x and
    bias (reverse mode), scan, remat and shard_map, on every implementation.

    Args:
      x: (..., K), float16, bfloat16 or float32.
      w: (K, M) in float16 or bfloat16; also an `nnx.Variable` that holds one.
      bias: (M,) of any float dtype, added in float32 before the result is rounded;
        also an `nnx.Variable` that holds one.
      implementation: `None` takes the best for the platform the computation is lowered
        for, and never fails on supported operands. "cuda" and "cpu" are the kernels;
        "xla" is plain JAX, for any platform, and materializes the dense matrix for the
        duration of the call. The kernels do so too above `KERNEL_ROWS` rows of x; the
        CUDA one also when the dtypes of x and w differ.
      preferred_element_type: dtype of the result: float16, bfloat16 or float32.
        `None` takes the promoted dtype of x and w.

    Returns:
      (..., M).

    Raises:
      ValueError: shapes or dtypes do not fit.
      TypeError: w is no SparseMatrix, or x or bias no array.
      NotImplementedError: the named implementation cannot run here.
    """
    if not isinstance(w, SparseMatrix) and hasattr(w, "get_value"):
        w = w.get_value()  # a Flax variable, which stands for its value elsewhere too
    if not isinstance(w, SparseMatrix):
        raise TypeError(
            f"sparse_matmul: expected w to be a SparseMatrix, got {type(w).__name__}"
        )
    w.check_leaves("sparse_matmul")
    _check_x(x, w)
    if bias is not None:
        if not isinstance(bias, jax.Array) and hasattr(bias, "get_value"):
            bias = bias.get_value()
        _check_bias(bias, w)
    _check_implementation(implementation, x)
    call = _Call(
        shape=w.shape,
        dtype=w.dtype,
        x_dtype=np.dtype(x.dtype),
        bias_dtype=None if bias is None else _canonical(bias.dtype),
        out_dtype=_result_dtype(x, w, preferred_element_type),
        implementation=implementation,
    )
    return _jitted(call, x, w.packed, bias)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in a call."""

    shape: tuple[int, int]
    dtype: np.dtype
    x_dtype: np.dtype
    bias_dtype: np.dtype | None
    out_dtype: np.dtype
    implementation: str | None


# --- Derivatives and batching -----------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(call: _Call, x: jax.Array, packed: packing.Packed, bias: jax.Array | None):
    return _batched(call)(x, packed, bias)


def _product_fwd(call, x, packed, bias):
    return _product(call, x, packed, bias), packed


def _product_bwd(call, packed, dy):
    dx = _backward(call, dy, packed).astype(call.x_dtype)
    if call.bias_dtype is None:
        return dx, None, None
    rows = tuple(range(dy.ndim - 1))
    dbias = jnp.sum(dy, axis=rows, dtype=jnp.float32).astype(call.bias_dtype)
    return dx, None, dbias


_product.defvjp(_product_fwd, _product_bwd)


def _sparse_matmul(call, x, packed, bias):
    # Rows are folded into one dimension, which only the first one may be split over.
    x = packing.gather(x, keep=min(x.ndim - 1, 1))
    packed, bias = jax.tree.map(packing.gather, (packed, bias))
    return _product(call, *_vary_alike((x, packed, bias)))


# One name in jaxprs and profiles; eager calls are compiled once per shape.
_jitted = jax.jit(_sparse_matmul, static_argnums=0)


@functools.lru_cache(maxsize=1024)
def _batched(call: _Call):
    @custom_vmap
    def product(x, packed, bias):
        return _forward(call, x, packed, bias)

    @product.def_vmap
    def rule(axis_size, in_batched, x, packed, bias):
        del axis_size
        x_batched, packed_batched, bias_batched = in_batched
        if any(packed_batched):
            return _map_batch(product, in_batched, (x, packed, bias)), True
        if not bias_batched:
            return product(x, packed, bias), x_batched
        # One call for all rows; every batch element then gets a bias of its own.
        plain = dataclasses.replace(
            call, bias_dtype=None, out_dtype=np.dtype(jnp.float32)
        )
        y = _batched(plain)(x, packed, None)
        if not x_batched:
            y = y[None]
        bias = bias.astype(jnp.float32)
        bias = bias.reshape(bias.shape[:1] + (1,) * (y.ndim - 2) + bias.shape[1:])
        return (y + bias).astype(call.out_dtype), True

    return product


def _map_batch(function, in_batched, args):
    """Calls the function for one batch element after the other."""
    leaves, tree = jax.tree.flatten(args)
    batched = jax.tree.leaves(in_batched)
    mapped = [leaf for leaf, b in zip(leaves, batched, strict=True) if b]

    def one(mapped):
        mapped = iter(mapped)
        picked = [
            next(mapped) if b else leaf for leaf, b in zip(leaves, batched, strict=True)
        ]
        return function(*jax.tree.unflatten(tree, picked))

    return jax.lax.map(one, mapped)


# --- Implementations --------------------------------------------------------------


def _forward(call: _Call, x: jax.Array, packed: packing.Packed, bias: jax.Array | None):
    """(..., K) -> (..., M); the implementation is chosen when this is lowered."""
    return _dispatch(call, _FORWARD, x, packed, bias)


def _backward(call: _Call, dy: jax.Array, packed: packing.Packed):
    """(..., M) -> (..., K) in float32: the product with the transposed weights."""
    return _dispatch(call, _BACKWARD, dy, packed)


def _dispatch(call, functions, *args):
    branches = {
        name: functools.partial(function, call) for name, function in functions.items()
    }
    plain = branches.pop("xla")
    if not packing.can_lower_for_cuda():
        del branches["cuda"]
    if call.implementation == "xla":
        return plain(*args)
    if call.implementation is not None:
        branches = {call.implementation: branches[call.implementation]}
        return jax.lax.platform_dependent(*args, **branches)
    return jax.lax.platform_dependent(*args, **branches, default=plain)


def _xla(call, x, packed, bias):
    packed = _after(x, packed)
    dense = reference.unpack(packed, call.shape, call.dtype)
    return reference.dense_product(x, dense, bias, call.out_dtype)


def _cpu(call, x, packed, bias):
    rows = math.prod(x.shape[:-1])
    if _exceeds(rows, KERNEL_ROWS["cpu"]) or _is_empty(call, rows):
        packed = _after_on_cpu(x, packed)
        dense = packing.unpack_cpu(packed, call.shape, call.dtype, _FLOAT32)
        return reference.dense_product(x, dense, bias, call.out_dtype)
    x_rows = x.reshape(rows, call.shape[0])
    y = jax.ffi.ffi_call(
        "flashjax_lscd_matmul_cpu",
        _result_type(x_rows, call.shape, call.out_dtype),
    )(
        x_rows,
        *packed,
        _bias_operand(bias),
        weight_dtype=packing.WEIGHT_DTYPES[call.dtype],
    )
    return y.reshape(*x.shape[:-1], call.shape[1])


# Attribute `kernel` of the CUDA target. "mma" runs from sm_80 on, "wgmma" on sm_90a.
_CUDA_KERNELS = {"auto": 0, "mma": 1, "wgmma": 2}


def _cuda(call, x, packed, bias, kernel="auto"):
    k, m = call.shape
    rows = math.prod(x.shape[:-1])
    if (
        _exceeds(rows, KERNEL_ROWS["cuda"])
        or call.x_dtype != call.dtype
        or _is_empty(call, rows)
    ):
        packed = _after(x, packed)
        dense = packing.unpack_cuda(packed, call.shape, call.dtype, for_dot=True)
        return reference.dense_product(x, dense, bias, call.out_dtype)
    x_rows = x.reshape(rows, k)
    # The kernel writes x's dtype or float32.
    kernel_dtype = call.x_dtype if call.out_dtype == call.x_dtype else _FLOAT32
    result = _result_type(x_rows, call.shape, kernel_dtype)
    workspace = _workspace_type(x_rows, _cuda_workspace_bytes(rows, m, k))
    if k % _CUDA_K_MULTIPLE:
        x_rows = jnp.pad(x_rows, ((0, 0), (0, -k % _CUDA_K_MULTIPLE)))
    y, _ = jax.ffi.ffi_call("flashjax_lscd_matmul_cuda", (result, workspace))(
        x_rows, *packed, _bias_operand(bias), kernel=_CUDA_KERNELS[kernel]
    )
    return y.reshape(*x.shape[:-1], m).astype(call.out_dtype)


def _cuda_workspace_bytes(n: Any, m: int, k: int) -> int:
    """Bytes for the partial sums of tiles that several blocks share."""
    assert _native.cuda is not None, "only lowered with the module"
    n = n if isinstance(n, int) else KERNEL_ROWS["cuda"]
    return _native.cuda.workspace_bytes(n, m, k)


def _xla_transposed(call, dy, packed):
    packed = _after(dy, packed)
    return _dense_transposed(dy, reference.unpack(packed, call.shape, call.dtype))


def _cpu_transposed(call, dy, packed):
    packed = _after_on_cpu(dy, packed)
    dense = packing.unpack_cpu(packed, call.shape, call.dtype, _FLOAT32)
    return _dense_transposed(dy, dense)


def _cuda_transposed(call, dy, packed):
    packed = _after(dy, packed)
    dense = packing.unpack_cuda(packed, call.shape, call.dtype, for_dot=True)
    return _dense_transposed(dy, dense)


def _after(x, packed):
    """Makes weights that are going to be expanded wait for x.

    They depend on nothing that is computed: XLA could expand those of all layers first,
    or before a loop, and hold all dense matrices at once.
    """
    # Without tangents: weights have none.
    return jax.lax.optimization_barrier((packed, jax.lax.stop_gradient(x)))[0]


def _after_on_cpu(x, packed):
    """`_after` for CPUs, where jax 0.10 drops the barrier before it schedules.

    Adds a zero that XLA cannot prove to be one.
    """
    bitmap, *others = _after(x, packed)
    x = jax.lax.stop_gradient(x).astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    zero = jnp.sum(bits.astype(jnp.uint32) >> np.uint32(16), dtype=jnp.uint32)
    return bitmap + zero, *others


def _dense_transposed(dy, dense):
    """(..., M), (K, M) -> (..., K) in float32."""
    if dy.dtype != dense.dtype:
        dy, dense = dy.astype(jnp.float32), dense.astype(jnp.float32)
    dimensions = (((dy.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        dy,
        dense,
        dimensions,
        precision=reference.precision(dy.dtype),
        preferred_element_type=jnp.float32,
    )


_FORWARD = {"cuda": _cuda, "cpu": _cpu, "xla": _xla}
_BACKWARD = {
    "cuda": _cuda_transposed,
    "cpu": _cpu_transposed,
    "xla": _xla_transposed,
}

_FLOAT32 = np.dtype(jnp.float32)


def _exceeds(rows: Any, limit: int) -> bool:
    # A symbolic number of rows (jax.export) cannot be compared: use the kernel.
    return isinstance(rows, int) and rows > limit


def _is_empty(call: _Call, rows: Any) -> bool:
    return 0 in call.shape or (isinstance(rows, int) and rows == 0)


def _bias_operand(bias):
    if bias is None:
        return jnp.zeros((0,), jnp.float32)
    return bias.astype(jnp.float32)


def _result_type(x, shape, dtype):
    """Type of ``x @ dense``, with the mesh and manual axes that x has."""

    def product(x):
        return jnp.dot(x, jnp.zeros(shape, x.dtype), preferred_element_type=dtype)

    return jax.eval_shape(product, x)


def _workspace_type(x, size):
    x_type = jax.typeof(x)
    replicated = x_type.sharding.update(spec=jax.P(None))
    return x_type.update(shape=(size,), dtype=np.dtype(jnp.uint8), sharding=replicated)


def _vary_alike(operands):
    """Inside shard_map, makes all operands vary over the union of their mesh axes.

    The transpose of this sums the cotangents of operands that vary over fewer axes.
    """
    axes = [_varying_axes(leaf) for leaf in jax.tree.leaves(operands)]
    union = frozenset().union(*axes)
    if not union:
        return operands

    def vary(leaf):
        missing = tuple(union - _varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, operands)


def _varying_axes(leaf) -> frozenset:
    return frozenset(jax.typeof(leaf).manual_axis_type.varying)


# --- Checks -----------------------------------------------------------------------


def _canonical(dtype) -> np.dtype:
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def _check_x(x, w: SparseMatrix) -> None:
    if not isinstance(x, np.ndarray | jax.Array):
        raise TypeError(
            "sparse_matmul: expected x to be a numpy or JAX array, got "
            f"{type(x).__name__}"
        )
    if x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"sparse_matmul: expected x of shape (..., {w.shape[0]}) for w of shape "
            f"{w.shape}, got {x.shape}"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(
            "sparse_matmul: expected x of dtype float16, bfloat16 or float32 for w of "
            f"dtype {w.dtype.name}, got {x.dtype}"
        )


def _check_bias(bias, w: SparseMatrix) -> None:
    if not isinstance(bias, np.ndarray | jax.Array):
        raise TypeError(
            "sparse_matmul: expected bias to be a numpy or JAX array, got "
            f"{type(bias).__name__}"
        )
    if bias.shape != (w.shape[1],):
        raise ValueError(
            f"sparse_matmul: expected bias of shape ({w.shape[1]},) for w of shape "
            f"{w.shape}, got {bias.shape}"
        )
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(
            f"sparse_matmul: expected bias of a float dtype, got {bias.dtype}"
        )


def _check_implementation(implementation, x) -> None:
    if implementation is None:
        return
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"sparse_matmul: expected implementation to be one of {IMPLEMENTATIONS} or "
            f"None, got {implementation!r}"
        )
    if implementation == "xla":
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
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return (jax.devices(device)[0] if isinstance(device, str) else device).platform


def _result_dtype(x, w: SparseMatrix, preferred) -> np.dtype:
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
