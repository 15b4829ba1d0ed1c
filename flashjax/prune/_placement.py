"""Arrays in, arrays of the same kind out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from flashjax.partitioning import without_types

from ._checks import Array, all_finite, native


def check_devices(where: str, **arrays: Any) -> None:
    """Raises if JAX arrays, by name, are bound to different devices.

    A computation takes numpy arrays, and JAX arrays that were put on no certain device,
    wherever the others are.
    """
    bound = {
        name: array.sharding.device_set
        for name, array in arrays.items()
        if isinstance(array, jax.Array) and array.committed
    }
    if len({frozenset(devices) for devices in bound.values()}) > 1:
        found = [f"{name} on {_names(devices)}" for name, devices in bound.items()]
        raise ValueError(
            f"{where}: expected {' and '.join(bound)} on the same devices, got "
            f"{' and '.join(found)}; move one of them with jax.device_put"
        )


def _names(devices: set[jax.Device]) -> str:
    return ", ".join(map(str, sorted(devices, key=lambda device: device.id)))


def on_device_of(dense: Array, prune: Callable[[jax.Array], jax.Array]) -> Array:
    """Applies a function of JAX arrays to an array of any kind.

    A JAX array is pruned on its device and stays there, a numpy array on JAX's default
    device, or where the statistics are, and comes back.
    """
    if dense.size == 0:
        return dense.copy()
    if isinstance(dense, jax.Array):
        pruned = prune(automatic(dense))
        return jax.device_put(pruned, dense.sharding) if is_explicit(dense) else pruned
    pruned = np.array(prune(jnp.asarray(native(dense))))
    return pruned.astype(dense.dtype, copy=False)


def is_explicit(array: jax.Array) -> bool:
    """Whether the type of an array says how it is split."""
    return AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types


def automatic(array: jax.Array) -> jax.Array:
    """The array, where the methods compute, split as it is but not by its type."""
    if not is_explicit(array):
        return array
    sharding = array.sharding
    assert isinstance(sharding, NamedSharding), "its type has a mesh"
    assert isinstance(sharding.mesh, Mesh), "of devices"
    mesh = without_types(sharding.mesh)
    return jax.device_put(array, NamedSharding(mesh, sharding.spec))


def rounded(where: str, pruned: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns float32 weights in their dtype; tiny ones may become zero.

    Raises:
      ValueError: a weight is too large for the dtype.
    """
    rounded = pruned.astype(dtype)
    if not all_finite(rounded):
        largest = float(jnp.abs(pruned).max())
        raise ValueError(
            f"{where}: expected new weights that {dtype} holds, got magnitudes up to "
            f"{largest:g}; raise damping, or use more calibration text"
        )
    return rounded


def jit_products(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` for functions with products of matrices in full float32.

    For those XLA compiles dozens of kernels of its own on a GPU, to time them beside
    cuBLAS: 20 s a product on 16 cores (kernel log, section 19), longer than pruning
    takes. So it gets cuBLAS' alone. Such a function cannot be called inside of another
    jit.
    """
    plain = jax.jit(function, **options)
    cublas = {"xla_gpu_enable_triton_gemm": False}
    on_gpu = jax.jit(function, compiler_options=cublas, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        platforms = {
            device.platform
            for leaf in jax.tree.leaves((args, kwargs))
            if isinstance(leaf, jax.Array)
            for device in leaf.devices()
        }
        return (on_gpu if "gpu" in platforms else plain)(*args, **kwargs)

    return call
