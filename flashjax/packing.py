"""Packing dense matrices and expanding packed ones, on the host or on a GPU.

Works on the bare arrays; `SparseMatrix` is the container around them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import _native, layouts, reference
from flashjax import gather as gather_layout

# The FFI attribute `weight_dtype`: what the 16-bit values are.
WEIGHT_DTYPES = {np.dtype(np.float16): 0, np.dtype(jnp.bfloat16): 1}

# What the kernels read: bitmap, entries, values.
Packed = tuple[Any, Any, Any]


def pack(dense: np.ndarray | jax.Array, threads: int = 0) -> tuple[Any, ...]:
    """Packs a (K, M) array where it lives: host arrays on the host, GPU arrays there.

    Args:
      dense: float16 or bfloat16 (K, M), numpy or a concrete JAX array.
      threads: host threads, 0 for all cores.

    Returns:
      (bitmap, entries, values, counts), uint32 JAX arrays: on the device of a JAX
      array that lives on a single one, otherwise on the default device.
    """
    if isinstance(dense, jax.Array):
        if not dense.is_fully_addressable:
            raise ValueError(
                "SparseMatrix.from_dense: expected an array whose shards all live in "
                f"this process, got {dense.sharding}"
            )
        device, *others = dense.devices()
        if not others and device.platform == "gpu" and _native.cuda_available():
            return _pack_on_gpu(dense)
    return _place(_pack_on_host(np.asarray(dense), threads), dense)


def pack_for(
    tokens: int | None, dense: np.ndarray | jax.Array, threads: int = 0
) -> tuple[tuple[Any, ...], str]:
    """The arrays of a (K, M) matrix, as `pack`, in the layout for so many tokens.

    Returns:
      The arrays and the name of their layout.
    """
    dtype = np.dtype(dense.dtype).newbyteorder("=")
    if layouts.is_for_few_tokens(dense.shape, _device_for(dense), tokens):
        host = np.ascontiguousarray(np.asarray(dense), dtype)
        nnz = count_nonzeros(host)
        if layouts.may_gather(host.shape, nnz, dtype):
            packed = gather_layout.pack(host, threads)
            if packed is not None and layouts.gather_pays(packed, nnz, host.shape):
                return _place(packed, dense), layouts.GATHER
        if 1 - nnz / host.size >= layouts.CLOSE_SPARSITY:
            packed = _pack_on_host(host, threads, for_few_tokens=True)
            return _place(packed, dense), layouts.DEFAULT
    return pack(dense, threads), layouts.DEFAULT


def count_nonzeros(dense: np.ndarray) -> int:
    """Elements of a float16 or bfloat16 array that are neither 0.0 nor -0.0."""
    # By the bits: no dtype's own comparison, and no sign.
    return int(np.count_nonzero(dense.view(np.uint16) << np.uint16(1)))


def _device_for(dense: np.ndarray | jax.Array) -> jax.Device:
    """Where `pack` puts what it makes of an array."""
    if isinstance(dense, jax.Array) and len(dense.devices()) == 1:
        return next(iter(dense.devices()))
    return default_device()


def default_device() -> jax.Device:
    """Where JAX puts an array that nothing commits to a device."""
    default = getattr(jax.config, "jax_default_device", None)
    if isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return jax.local_devices()[0] if default is None else default


def _place(packed: tuple[np.ndarray, ...], dense: Any) -> tuple[jax.Array, ...]:
    """Puts arrays where a dense one was, committed to the device if that was."""
    if not isinstance(dense, jax.Array) or len(dense.devices()) > 1:
        return put(packed)
    (device,) = dense.devices()
    if dense.committed:
        return tuple(jax.device_put(packed, device))
    with jax.default_device(device):
        return put(packed)


def put(arrays: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
    """Puts arrays where JAX puts them: on all devices of a mesh that is set."""
    if not jax.sharding.get_abstract_mesh().empty:
        return tuple(map(jnp.asarray, arrays))
    # jnp.asarray would compile a program for every shape.
    return tuple(jax.device_put(arrays))


def _pack_on_host(
    dense: np.ndarray, threads: int, for_few_tokens: bool = False
) -> tuple[Any, ...]:
    dense = np.ascontiguousarray(dense, dense.dtype.newbyteorder("="))
    return _native.cpu.pack(dense.view(np.uint16), threads, for_few_tokens)


def _pack_on_gpu(dense: jax.Array) -> tuple[Any, ...]:
    """Two steps, because the number of segments depends on the data."""
    k, m = dense.shape
    shapes = reference.leaf_shapes((k, m))
    chains = reference.chain_count((k, m))
    sizes = jax.ffi.ffi_call(
        "flashjax_lscd_pack_sizes_cuda", jax.ShapeDtypeStruct((chains,), jnp.uint32)
    )(dense)
    shapes["values"] = (int(np.asarray(sizes).sum()), *shapes["values"][1:])
    results = [jax.ShapeDtypeStruct(shape, jnp.uint32) for shape in shapes.values()]
    return tuple(jax.ffi.ffi_call("flashjax_lscd_pack_cuda", results)(dense, sizes))


@functools.cache
def can_lower_for_cuda() -> bool:
    """Whether lowerings for CUDA may contain our kernels; needs no GPU."""
    if _native.cuda is None:
        return False
    try:
        jax.devices("cuda")
    except RuntimeError:
        return True
    return _native.cuda_available()


def gather(array: jax.Array, keep: int = 0) -> jax.Array:
    """Undoes explicit sharding, but of the first `keep` dimensions.

    The kernels work on whole matrices. Without explicit axes XLA does this by itself.
    """
    sharding = jax.typeof(array).sharding
    spec = jax.P(*sharding.spec[:keep], *[None] * (array.ndim - keep))
    if spec == sharding.spec:
        return array
    return jax.reshard(array, jax.NamedSharding(sharding.mesh, spec))


def unpack(
    packed: Packed,
    shape: tuple[int, int],
    dtype: np.dtype,
    layout: str = layouts.DEFAULT,
) -> jax.Array:
    """Expands (bitmap, entries, values) to a dense (K, M) array of `dtype`, exactly.

    Can be called inside `jax.jit`; uses the native code of the platform it is lowered
    for and plain JAX on the others.
    """

    def plain(packed):
        return layouts.plain(layout).unpack(packed, shape, dtype)

    branches = {}
    if layout == layouts.DEFAULT:
        branches["cpu"] = lambda packed: unpack_cpu(packed, shape, dtype, dtype)
    if can_lower_for_cuda():
        branches["cuda"] = lambda packed: unpack_cuda(
            packed, shape, dtype, layout=layout
        )
    return jax.lax.platform_dependent(packed, **branches, default=plain)


def unpack_cpu(
    packed: Packed,
    shape: tuple[int, int],
    dtype: np.dtype,
    out_dtype: np.dtype,
    layer: jax.Array | None = None,
) -> jax.Array:
    """`unpack` for CPU lowerings; `out_dtype` is `dtype` or float32.

    With a `layer` (int32), the packed arrays are stacks and it is the index.
    """
    index = () if layer is None else (layer,)
    return jax.ffi.ffi_call(
        "flashjax_lscd_unpack_cpu",
        _dense_type(packed, shape, out_dtype),
        vmap_method="sequential",
    )(*packed, *index, weight_dtype=WEIGHT_DTYPES[dtype])


def unpack_cuda(
    packed: Packed,
    shape: tuple[int, int],
    dtype: np.dtype,
    layer: jax.Array | None = None,
    for_dot: bool = False,
    layout: str = layouts.DEFAULT,
) -> jax.Array:
    """`unpack` for CUDA lowerings; for `layer` see `unpack_cpu`.

    With `for_dot` it is the transpose of a (M, K) array: the order that the kernel
    writes fastest and cuBLAS prefers. XLA folds the transposition into a dot.
    """
    dense = _dense_type(packed, shape[::-1] if for_dot else shape, dtype)
    stem = "gather" if layout == layouts.GATHER else "lscd"
    out = jax.ffi.ffi_call(
        f"flashjax_{stem}_unpack_cuda", dense, vmap_method="sequential"
    )(*packed, *(() if layer is None else (layer,)), transposed=not for_dot)
    return out.T if for_dot else out


def _dense_type(packed: Packed, shape, dtype) -> Any:
    """Type of the dense matrix, with the mesh and manual axes of the operands.

    A bare ShapeDtypeStruct would drop these inside shard_map.
    """
    operand = jax.typeof(packed[0])
    sharding = operand.sharding.update(spec=jax.P(None, None))
    return operand.update(shape=shape, dtype=dtype, sharding=sharding)
