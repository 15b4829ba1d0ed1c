"""The packed layouts, and which of them a matrix gets.

* `DEFAULT`, "lscd16/1" (`cpu/lscd_layout.h`): a bitmap and the values in the order of
  tensor-core fragments. For every number of tokens, on every platform.
* `GATHER`, "gather16/1" (`cpu/gather_layout.h`): each nonzero with its distance to the
  one before. Its kernel takes time by the number of nonzeros, but multiplies up to 8
  tokens and no more, and only on Hopper GPUs. With more tokens, and on CPUs, the matrix
  is expanded first; other GPUs refuse it.
"""

import math
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import _native, gather, reference
from flashjax.packed_size import packed_bytes

DEFAULT = "lscd16/1"
GATHER = "gather16/1"
LAYOUTS = (DEFAULT, GATHER)

# Zeros from which GATHER is faster: kernel log, section 12.
GATHER_SPARSITY = {np.dtype(np.float16): 0.82, np.dtype(jnp.bfloat16): 0.73}
# Zeros from which few tokens pay for more explicit zeros in DEFAULT, with which kernels
# start sooner: kernel log, section 15.
CLOSE_SPARSITY = 0.75
# Stored values a nonzero, explicit zeros included, up to which it surely is.
_GATHER_STORED = 1.25


def is_for_few_tokens(
    shape: tuple[int, ...], device: jax.Device, tokens: int | None
) -> bool:
    """Whether a (K, M) matrix may be packed in another way for so many tokens."""
    if tokens is None or tokens > gather.KERNEL_ROWS or not math.prod(shape):
        return False
    return has_gather_kernel(device)


def may_gather(shape: tuple[int, ...], nnz: int, dtype: np.dtype) -> bool:
    """Whether GATHER is the faster one if its padding is small."""
    if shape[0] > gather.MAX_COLUMNS:
        return False
    return 1 - nnz / math.prod(shape) >= GATHER_SPARSITY[dtype]


def gather_pays(
    packed: tuple[np.ndarray, ...], nnz: int, shape: tuple[int, int]
) -> bool:
    """Whether its padding is small: not so in small matrices, or beside a dense row."""
    _, _, values, _ = packed
    if 2 * values.size <= _GATHER_STORED * nnz:
        return True
    default = packed_bytes(shape, 1 - nnz / math.prod(shape))
    return sum(leaf.nbytes for leaf in packed) <= default


def has_gather_kernel(device: jax.Device) -> bool:
    """Whether the kernel of GATHER runs on a device."""
    return has_hopper_kernels(device) and _native.cuda_available()


def has_hopper_kernels(device: jax.Device) -> bool:
    """Whether a device is a Hopper GPU, and flashjax was built for it."""
    capability = str(getattr(device, "compute_capability", None) or "0")
    is_hopper = device.platform == "gpu" and int(capability.split(".")[0]) == 9
    return is_hopper and "90a" in _native.build_info()["cuda_architectures"]


def plain(layout: str) -> ModuleType:
    """The layout in plain JAX: a module with its `leaf_shapes` and `unpack`."""
    return {DEFAULT: reference, GATHER: gather}[layout]


def check(op: str, layout: str, allowed: tuple[str, ...] = LAYOUTS) -> None:
    """Raises ValueError unless a layout is one of those allowed."""
    if layout not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise ValueError(f"{op}: expected packed layout {expected}, got {layout!r}")
