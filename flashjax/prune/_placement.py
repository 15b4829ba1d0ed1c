"""Arrays in, arrays of the same kind out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import Array, all_finite, native


def on_device_of(dense: Array, prune: Callable[[jax.Array], jax.Array]) -> Array:
    """Applies a function of JAX arrays to an array of any kind.

    A JAX array is pruned on its device and stays there, a numpy array on JAX's default
    device, or where the statistics are, and comes back.
    """
    if dense.size == 0:
        return dense.copy()
    if isinstance(dense, jax.Array):
        return prune(dense)
    pruned = np.array(prune(jnp.asarray(native(dense))))
    return pruned.astype(dense.dtype, copy=False)


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
