"""The implementations of the product, chosen when a computation is lowered.

A kernel reads the compressed weights and expands them on the chip. With many rows
(prefill), where that takes longer than the dense product, the weights are expanded and
a dense product follows; the dense matrix is a temporary of that call. On a Hopper GPU
there is no such number of rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import (
    _native,
    gather,
    layouts,
    packing,
    partitioning,
    reference,
    tuned_rows,
)

# Rows of x up to which the sparse kernel is used; above, expand and multiply. Where
# `flashjax.autotune` found another number for a matrix, that counts.
#
# Up to 8192 rows the CUDA kernel was no more than 2% slower than expanding and mostly
# faster, and it needs no memory for a dense matrix (docs/kernel-log.md, section 21). It
# counts (tile, columns) units in 32 bits.
KERNEL_ROWS = {"cuda": 1 << 20, "cpu": 128}
# On GPUs without wgmma, whose kernel takes 32 rows at a time (section 19).
_MMA_ROWS = 96

_CUDA_K_MULTIPLE = 8  # 16-byte rows of x

ACTIVATIONS = ("relu",)

_FLOAT32 = np.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in a product (..., K) x (K, M)."""

    shape: tuple[int, int]
    dtype: np.dtype
    x_dtype: np.dtype
    bias_dtype: np.dtype | None
    out_dtype: np.dtype
    implementation: str | None
    activation: str | None = None  # one of ACTIVATIONS, of x @ w + bias
    # Of the packed matrix and of its packed transpose.
    layouts: tuple[str, str] = (layouts.DEFAULT, layouts.DEFAULT)
    # Rows of x up to which the kernel is used, whatever is usual: to time both ways.
    kernel_rows: int | None = None


class Operands(NamedTuple):
    """What is not. The weights come packed, packed as their transpose, or as both."""

    x: Any  # (..., K)
    bias: Any  # (M,) or None; (layers, M) with `layer`: one for each of the stack
    packed: packing.Packed | None  # of the (K, M) matrix
    transposed: packing.Packed | None  # of the (M, K) matrix
    layer: Any = None  # int32: the packed arrays are stacks, and this is the index


def compute(call: Call, operands: Operands) -> jax.Array:
    """(..., K) -> (..., M) in `call.out_dtype`; every device computes its rows of x."""

    def local(*operands):
        return _compute_rows(call, Operands(*operands))

    return partitioning.over_rows(local, *operands)


def _compute_rows(call: Call, operands: Operands) -> jax.Array:
    functions = {"cuda": _cuda, "cpu": _cpu, "xla": _xla}
    return dispatch(call.implementation, functions, call, operands)


def dispatch(
    implementation: str | None,
    functions: dict[str, Callable[..., Any]],
    call: Any,
    *operands: Any,
):
    """Calls the function of an implementation, or of the platform it is lowered for."""
    branches = {
        name: functools.partial(function, call) for name, function in functions.items()
    }
    plain = branches.pop("xla")
    if not packing.can_lower_for_cuda():
        del branches["cuda"]
    if implementation == "xla":
        return plain(*operands)
    if implementation is not None:
        branches = {implementation: branches[implementation]}
        return jax.lax.platform_dependent(*operands, **branches)
    return jax.lax.platform_dependent(*operands, **branches, default=plain)


def own_bias(operands: Operands) -> Operands:
    """The operands with the bias of the layer, where one came for each."""
    if operands.bias is None or operands.bias.ndim == 1:
        return operands
    return operands._replace(bias=of_layer(operands.bias, operands.layer))


def of_layer(biases: jax.Array, layer: jax.Array, axis: int = 0) -> jax.Array:
    """One of a stack of biases; an index out of range means the nearest."""
    index = jnp.clip(layer, 0, biases.shape[axis] - 1)
    return jax.lax.dynamic_index_in_dim(biases, index, axis, keepdims=False)


def _xla(call, operands):
    return _expand_plainly(call, operands, _after)


def _expand_plainly(call, operands, after):
    plain = layouts.plain(_layout(call, operands))

    def unpack(packed, shape, layer):
        return plain.unpack(_take_layer(packed, layer), shape, call.dtype)

    return _expand_and_multiply(call, operands, unpack, after)


def _cpu(call, operands):
    x, bias, packed, transposed, layer = operands
    rows = math.prod(x.shape[:-1])
    if _is_gather(call, operands):
        return _expand_plainly(call, operands, _after_on_cpu)
    arrays = transposed if packed is None else packed
    if _exceeds(rows, _kernel_rows("cpu", call, arrays)) or _is_empty(call, rows):

        def unpack(packed, shape, layer):
            return packing.unpack_cpu(packed, shape, call.dtype, _FLOAT32, layer)

        return _expand_and_multiply(call, operands, unpack, _after_on_cpu)
    x_rows = x.reshape(rows, call.shape[0])
    # Of a stack, the handler gets all layers and the index: nothing is copied.
    index = () if layer is None else (layer,)
    weight_dtype = packing.WEIGHT_DTYPES[call.dtype]
    result = result_type(jax.typeof(x_rows), call.shape[1], call.out_dtype)
    if packed is not None:
        y = jax.ffi.ffi_call("flashjax_lscd_matmul_cpu", result)(
            x_rows, *packed, _bias_operand(operands), *index, weight_dtype=weight_dtype
        )
    else:
        assert bias is None, "only derivatives lack the packing, and a bias"
        y = jax.ffi.ffi_call("flashjax_lscd_matmul_transposed_cpu", result)(
            x_rows, *transposed, *index, weight_dtype=weight_dtype
        )
    return activate(call, y.reshape(*x.shape[:-1], call.shape[1]))


# Attribute `kernel` of the CUDA target. "mma" runs from sm_80 on, "wgmma" on sm_90a.
_CUDA_KERNELS = {"auto": 0, "mma": 1, "wgmma": 2}


def _cuda(call, operands, kernel="auto"):
    x, bias, packed, _, layer = operands
    rows = math.prod(x.shape[:-1])
    is_gather = _is_gather(call, operands)
    if (
        packed is None
        or _exceeds(
            rows,
            gather.KERNEL_ROWS if is_gather else _kernel_rows("cuda", call, packed),
        )
        # Its kernel takes no more, and how many a symbol stands for is not known.
        or (is_gather and not isinstance(rows, int))
        or x.dtype != call.dtype
        or _is_empty(call, rows)
    ):

        def unpack(packed, shape, layer):
            return packing.unpack_cuda(
                packed,
                shape,
                call.dtype,
                layer=layer,
                for_dot=True,
                layout=_layout(call, operands),
            )

        return _expand_and_multiply(call, operands, unpack, _after)
    k, m = call.shape
    x_rows = x.reshape(rows, k)
    # The kernel writes x's dtype or float32.
    kernel_dtype = x.dtype if call.out_dtype == x.dtype else _FLOAT32
    result = result_type(jax.typeof(x_rows), m, np.dtype(kernel_dtype))
    if k % _CUDA_K_MULTIPLE:
        x_rows = jnp.pad(x_rows, ((0, 0), (0, -k % _CUDA_K_MULTIPLE)))
    index = () if layer is None else (layer,)
    # The kernel reads a bias, also that of a layer, in x's dtype or float32: converting
    # or slicing it costs a launch.
    if bias is None or bias.dtype not in (x.dtype, _FLOAT32):
        bias = _bias_operand(operands)
    relu = call.activation == "relu"
    if is_gather:
        y = jax.ffi.ffi_call("flashjax_gather_matmul_cuda", result)(
            x_rows, *packed, bias, *index, relu=relu
        )
    else:
        padded_k = x_rows.shape[1]
        workspace = _workspace_type(x_rows, _cuda_workspace_bytes(rows, m, padded_k))
        y, _ = jax.ffi.ffi_call("flashjax_lscd_matmul_cuda", (result, workspace))(
            x_rows, *packed, bias, *index, kernel=_CUDA_KERNELS[kernel], relu=relu
        )
    return y.reshape(*x.shape[:-1], m).astype(call.out_dtype)


def cuda_kernel_rows() -> int:
    """Rows of x up to which the CUDA kernel is used.

    On the GPU that there is; else on a Hopper.
    """
    return KERNEL_ROWS["cuda"] if _has_wgmma() else _MMA_ROWS


@functools.cache
def _has_wgmma() -> bool:
    """Whether the kernels for Hopper run on the GPU; True where there is none."""
    try:
        device, *_ = jax.local_devices(backend="cuda")
    except RuntimeError:
        return True
    return layouts.has_hopper_kernels(device)


def _kernel_rows(platform, call, packed):
    """Rows of x up to which the kernel is used for a matrix."""
    if call.kernel_rows is not None:
        return call.kernel_rows
    stored = stored_share(call.shape, packed)
    matrix = tuned_rows.describe(call.shape, call.dtype, layouts.DEFAULT, stored)
    tuned = tuned_rows.find(tuned_rows.device_kind(platform), matrix)
    return usual_kernel_rows(platform) if tuned is None else tuned


def usual_kernel_rows(platform: str) -> int:
    """The same for a matrix that `flashjax.autotune` did not time."""
    return cuda_kernel_rows() if platform == "cuda" else KERNEL_ROWS["cpu"]


def stored_share(shape: tuple[int, int], packed: packing.Packed) -> float:
    """Values that a matrix stores, explicit zeros included, by its elements."""
    *_, values = packed
    # Two to a word; without the layers of a stack.
    return 2 * math.prod(values.shape[-3:]) / max(1, math.prod(shape))


def _layout(call: Call, operands: Operands) -> str:
    """Of the packing that the operands have, or of the first of two."""
    return call.layouts[0 if operands.packed is not None else 1]


def _is_gather(call: Call, operands: Operands) -> bool:
    return _layout(call, operands) == layouts.GATHER


def _take_layer(packed, layer):
    """One layer's arrays, copied out of a stack: the kernels read it where it lies."""
    if layer is None:
        return packed
    take = jax.lax.dynamic_index_in_dim
    return tuple(take(leaf, layer, keepdims=False) for leaf in packed)


def _cuda_workspace_bytes(n: Any, m: int, k: int) -> int:
    """Bytes for the partial sums of tiles that several blocks share."""
    assert _native.cuda is not None, "only lowered with the module"
    n = n if isinstance(n, int) else KERNEL_ROWS["cuda"]
    return _native.cuda.workspace_bytes(n, m, k)


def _expand_and_multiply(call, operands, unpack, after):
    """Multiplies by a dense matrix that `unpack` makes of one of the packings."""
    x, bias, packed, transposed, layer = own_bias(operands)
    arrays = transposed if packed is None else packed
    if layer is None:
        arrays = after(x, arrays)
    else:
        (layer,) = after(x, (layer,))  # and not the arrays of all layers
    turned = packed is None
    dense = unpack(arrays, call.shape[::-1] if turned else call.shape, layer)
    y = reference.dense_product(x, dense, bias, call.out_dtype, transposed=turned)
    return activate(call, y)


def activate(call: Call, y: jax.Array) -> jax.Array:
    """Applies the call's activation, if it has one, to what lacks it."""
    return jax.nn.relu(y) if call.activation == "relu" else y


def _after(x, arrays):
    """Makes weights that are going to be expanded, or their index, wait for x.

    They depend on nothing that is computed: XLA could expand those of all layers first,
    or before a loop, and hold all dense matrices at once.
    """
    return jax.lax.optimization_barrier((arrays, x))[0]


def _after_on_cpu(x, arrays):
    """`_after` for CPUs, where jax 0.10 drops the barrier before it schedules.

    Adds a zero that XLA cannot prove to be one.
    """
    first, *others = _after(x, arrays)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    zero = jnp.sum(bits.astype(jnp.uint32) >> np.uint32(16), dtype=jnp.uint32)
    return first + zero.astype(first.dtype), *others


def _exceeds(rows: Any, limit: int) -> bool:
    # A symbolic number of rows (jax.export) cannot be compared: use the kernel.
    return isinstance(rows, int) and rows > limit


def _is_empty(call: Call, rows: Any) -> bool:
    return 0 in call.shape or (isinstance(rows, int) and rows == 0)


def _bias_operand(operands: Operands) -> jax.Array:
    """The bias of this product in float32, or an empty one."""
    bias = own_bias(operands).bias
    if bias is None:
        return jnp.zeros((0,), jnp.float32)
    return bias.astype(jnp.float32)


def result_type(x_type: Any, m: int, dtype: np.dtype) -> Any:
    """Type of the product for x of a type: it keeps x's mesh and manual axes."""
    sharding = x_type.sharding.update(spec=jax.P(*x_type.sharding.spec[:-1], None))
    shape = (*x_type.shape[:-1], m)
    return x_type.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _workspace_type(x, size):
    x_type = jax.typeof(x)
    replicated = x_type.sharding.update(spec=jax.P(None))
    return x_type.update(shape=(size,), dtype=np.dtype(jnp.uint8), sharding=replicated)
