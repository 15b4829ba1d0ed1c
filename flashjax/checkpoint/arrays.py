"""Arrays as a file stores them: row-major, in the machine's byte order."""

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from flashjax.atomic_folder import CheckpointError

from .checks import expect

HALF_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# safetensors' names of the dtypes that a model folder may hold.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": HALF_DTYPES["float16"],
    "BF16": HALF_DTYPES["bfloat16"],
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def as_stored(name: str, array: ArrayLike) -> np.ndarray:
    """Gives the form in which a tensor is stored; copies only if it has another.

    Args:
      name: of the tensor in the file.
      array: of any layout and byte order.

    Raises:
      TypeError: the name is no string, or the array is no array.
      CheckpointError: a file cannot have such a name, or no reader takes such a dtype.
    """
    check_name(name)
    stored = native(name, array)
    dtypes = DTYPES.values()
    expected = ", ".join(dtype.name for dtype in dtypes)
    expect(stored.dtype in dtypes, name, "dtype", expected, stored.dtype)
    return stored


def check_name(name: str) -> None:
    """Raises TypeError or CheckpointError unless a tensor can have the name."""
    if not isinstance(name, str):
        raise TypeError(
            f"expected a string as a tensor's name, got {type(name).__name__}"
        )
    # The header has its metadata under that key.
    if name == "__metadata__" or not _is_utf8(name):
        raise CheckpointError(
            f"{name!r:.80}: expected a tensor's name in UTF-8 other than '__metadata__'"
        )


def native(what: str, array: ArrayLike) -> np.ndarray:
    """A row-major array in the machine's byte order.

    Raises:
      TypeError: it is made of something else than an array.
    """
    found = np.asarray(array)
    if found.dtype == object and not isinstance(array, np.ndarray):
        raise TypeError(
            f"{what}: expected a numpy or JAX array, got {type(array).__name__}"
        )
    return np.asarray(found, found.dtype.newbyteorder("="), order="C")


def may_change(array: np.ndarray) -> bool:
    """Whether somebody can write into the memory of an array; not so into JAX's."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        if owner.flags.writeable:
            return True
        owner = owner.base
    return False


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
