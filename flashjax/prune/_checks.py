"""What the pruning methods expect of their arguments."""

import math
import numbers
import operator
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)

_LARGEST_GROUP = 1024


class Pattern(NamedTuple):
    """An n:m pattern: of `group` consecutive inputs of an output `keep` are kept."""

    keep: int
    group: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in whole groups."""
        return 1 - self.keep / self.group


def parse_pattern(where: str, text: str | None) -> Pattern | None:
    """Returns the pattern that a text as ``"2:4"`` stands for."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(
            f"{where}: expected a pattern as text, as '2:4', got {type(text).__name__}"
        )
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", text)
    keep, group = map(int, match.groups()) if match else (0, 0)
    if not 1 <= keep <= group <= _LARGEST_GROUP:
        raise ValueError(
            f"{where}: expected a pattern as '2:4' (keep n of m consecutive inputs, "
            f"1 <= n <= m <= {_LARGEST_GROUP}), got {text!r}"
        )
    return Pattern(keep, group)


def check_number(where: str, expected: str, number: Any) -> float:
    """Returns a number as a float; those too large for one as infinity."""
    found = type(number).__name__
    is_array = isinstance(number, np.ndarray | jax.Array)
    if is_array and not isinstance(number, jax.core.Tracer) and number.ndim == 0:
        number = number.item()
    if not isinstance(number, numbers.Real) or isinstance(number, bool | np.bool):
        raise TypeError(f"{where}: expected {expected}, got {found}")
    try:
        return float(number)
    except OverflowError:  # a whole number
        return -math.inf if number < 0 else math.inf


def check_whole_number(where: str, name: str, number: Any, least: int) -> int:
    """Returns a whole number, of any of the types of integers, as an int."""
    try:
        whole = operator.index(number)
    except TypeError:
        whole = None
    if whole is None or isinstance(number, bool):
        raise TypeError(
            f"{where}: expected {name} to be an int, got {type(number).__name__}"
        )
    if whole < least:
        raise ValueError(f"{where}: expected {name} of at least {least}, got {whole}")
    return whole


def check_mapping(where: str, name: str, mapping: Any) -> None:
    """Raises if something is no mapping."""
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"{where}: expected {name} to be a mapping by name, got "
            f"{type(mapping).__name__}"
        )


def check_not_masked(where: str, array: Any) -> None:
    """Raises for a masked array of numpy, whose mask JAX would drop."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{where}: expected an array without a mask, got {type(array).__name__}; "
            "fill it first"
        )


def check_sparsity(
    where: str, sparsity: float | None, pattern: Pattern | None = None
) -> float:
    """Returns the share of zeros as a float; a pattern has its own."""
    if pattern is not None and sparsity is None:
        return pattern.sparsity
    sparsity = check_number(where, "sparsity to be a number from 0 to 1", sparsity)
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"{where}: expected sparsity from 0 to 1, got {sparsity}")
    if pattern is not None and abs(sparsity - pattern.sparsity) > 1e-6:
        raise ValueError(
            f"{where}: expected sparsity {pattern.sparsity:g}, which is what the "
            f"pattern {pattern.keep}:{pattern.group} gives (or None), got {sparsity}"
        )
    return sparsity


def check_array(where: str, dense: Any) -> None:
    """Raises if `dense` is no concrete array of floats."""
    if isinstance(dense, jax.core.Tracer):
        raise TypeError(
            f"{where}: expected a concrete array, got a traced one "
            f"({jax.typeof(dense)}); prune outside of jit, vmap and grad"
        )
    if not isinstance(dense, np.ndarray | jax.Array):
        raise TypeError(
            f"{where}: expected a numpy or JAX array, got {type(dense).__name__}"
        )
    check_not_masked(where, dense)
    is_float = jnp.issubdtype(dense.dtype, jnp.floating)
    if not is_float or dense.dtype.itemsize not in (2, 4, 8):
        raise ValueError(
            f"{where}: expected dtype float16, bfloat16, float32 or float64, "
            f"got {dense.dtype}"
        )


def check_matrix(where: str, dense: Any) -> None:
    """Raises if `dense` is no matrix."""
    if dense.ndim != 2:
        raise ValueError(
            f"{where}: expected a matrix (in_features, out_features), got shape "
            f"{dense.shape}"
        )


def check_weight(where: str, dense: Any) -> None:
    """Raises if `dense` is no finite matrix that float32 holds exactly."""
    check_array(where, dense)
    check_matrix(where, dense)
    if dense.dtype.itemsize == 8:
        raise ValueError(
            f"{where}: expected dtype float16, bfloat16 or float32, got {dense.dtype}"
        )
    if dense.size >= 2**31:
        raise ValueError(
            f"{where}: expected less than 2**31 elements, got shape {dense.shape}"
        )
    if not all_finite(dense):
        raise ValueError(f"{where}: expected finite weights, got NaN or infinity")


def all_finite(array: Array) -> bool:
    """Returns whether there is no NaN and no infinity."""
    if isinstance(array, np.ndarray):
        return bool(np.isfinite(array).all())
    return bool(_all_finite(array))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def native(dense: Array) -> Array:
    """Returns the array in this machine's byte order."""
    if isinstance(dense, np.ndarray):
        return dense.astype(dense.dtype.newbyteorder("="), copy=False)
    return dense
