"""The packed layouts, and which of them a matrix gets.

* `DEFAULT`, "lscd16/1" (`cpu/lscd_layout.h`): a bitmap and the values in the order of
  tensor-core fragments. For every number of tokens, on every platform.
* `GATHER`, "gather16/1" (`cpu/gather_layout.h`): each nonzero with its distance to the
  one before. Its kernel takes time by the number of nonzeros, but multiplies up to 8
  tokens and no more; above, and anywhere but on GPUs with clusters (Hopper), the matrix
  is expanded by plain JAX first.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import _native, gather, reference

DEFAULT = "lscd16/1"
GATHER = "gather16/1"
LAYOUTS = (DEFAULT, GATHER)

# Zeros from which GATHER is faster with 8 tokens and fewer: kernel log, section 12.
GATHER_SPARSITY = {np.dtype(np.float16): 0.82, np.dtype(jnp.bfloat16): 0.73}


def choose(
    shape: tuple[int, int],
    sparsity: float,
    dtype: np.dtype,
    device: jax.Device,
    tokens: int | None,
) -> str:
    """The layout for a (K, M) matrix on a device that will mostly multiply `tokens`."""
    if tokens is None or tokens > gather.KERNEL_ROWS or not math.prod(shape):
        return DEFAULT
    fast = sparsity >= GATHER_SPARSITY[dtype] and has_clusters(device)
    return GATHER if fast and shape[0] <= gather.MAX_COLUMNS else DEFAULT


def has_clusters(device: jax.Device) -> bool:
    """Whether the kernel of GATHER runs on a device."""
    capability = getattr(device, "compute_capability", None) or "0"
    return (
        device.platform == "gpu"
        and _native.cuda_available()
        and float(capability) >= 9.0
    )


def leaf_shapes(
    layout: str, shape: tuple[int, int]
) -> dict[str, tuple[int | None, ...]]:
    """Shapes of the packed arrays of a (K, M) matrix; None where data decides."""
    module = gather if layout == GATHER else reference
    return module.leaf_shapes(shape)


def check(op: str, layout: str, allowed: tuple[str, ...] = LAYOUTS) -> None:
    """Raises ValueError unless a layout is one of those allowed."""
    if layout not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise ValueError(f"{op}: expected packed layout {expected}, got {layout!r}")
