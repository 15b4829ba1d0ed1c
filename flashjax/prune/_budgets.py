"""How many zeros each matrix of a model gets."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import (
    check_array,
    check_mapping,
    check_number,
    check_sparsity,
    check_weight,
    native,
)
from ._magnitude import magnitude_bits
from ._placement import automatic
from ._statistics import InputStatistics, check_statistics
from ._wanda import wanda_importance

_CHUNK = 1 << 24


def magnitude_global(matrices: Mapping[str, Any], sparsity: float) -> dict[str, float]:
    """Returns the sparsity of each matrix under one threshold of magnitude for all.

    Args:
      matrices: named arrays in float16, bfloat16 or float32, of any shape. They are
        looked up one at a time, twice each, and only one is held: a mapping that reads
        from disk makes models possible that are larger than memory.
      sparsity: share of zeros over all matrices, from 0 to 1.

    Returns:
      For each name the share of zeros with which `magnitude` removes what is below the
      threshold: exactly ``round(sparsity * size)`` elements of all; of equal magnitudes
      those of the first matrices.

    Raises:
      ValueError: sparsity is out of range; a dtype is another; there is NaN.
      TypeError: matrices are no mapping; a value is no array; sparsity is no number.
    """
    where = "prune.magnitude_global"
    check_mapping(where, "matrices", matrices)
    sparsity = check_sparsity(where, sparsity)
    # The upper half of the bits finds the bin of the threshold, the lower half the
    # threshold within the bin.
    upper = {name: _histogram(where, matrices, name) for name in matrices}
    sizes = {name: int(bins.sum()) for name, bins in upper.items()}
    left = round(sparsity * sum(sizes.values()))
    below, at, left = _threshold(upper, left)
    lower = {
        name: _histogram(where, matrices, name, at) for name in upper if upper[name][at]
    }
    below_in_bin, exact, left = _threshold(lower, left)
    sparsities = {}
    for name, size in sizes.items():
        zeros = below[name] + below_in_bin.get(name, 0)
        ties = min(left, int(lower[name][exact]) if name in lower else 0)
        left -= ties
        sparsities[name] = (zeros + ties) / size if size else 0.0
    return sparsities


def _threshold(
    histograms: dict[str, np.ndarray], count: int
) -> tuple[dict[str, int], int, int]:
    """Returns elements below the bin of the count-th, the bin, and what is left."""
    total = np.zeros(1 << 16, np.int64)
    for bins in histograms.values():
        total += bins
    at = int(np.searchsorted(np.cumsum(total), count)) if count else 0
    below = {name: int(bins[:at].sum()) for name, bins in histograms.items()}
    return below, at, count - sum(below.values())


def _histogram(
    where: str, matrices: Mapping[str, Any], name: str, upper: int | None = None
) -> np.ndarray:
    """Counts magnitudes by the upper 16 bits of float32, or the lower of one bin."""
    where = f"{where}: {name}"
    dense = matrices[name]
    check_array(where, dense)
    if dense.dtype.itemsize == 8:
        raise ValueError(
            f"{where}: expected dtype float16, bfloat16 or float32, got {dense.dtype}"
        )
    flat = native(np.asarray(dense)).reshape(-1)
    bins = np.zeros(1 << 16, np.int64)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(np.float32)
        bits = magnitude_bits(where, chunk)
        high, low = bits >> 16, bits & 0xFFFF
        found = high if upper is None else low[high == upper]
        bins += np.bincount(found, minlength=len(bins))
    return bins


def outlier_ratio(dense: Any, stats: InputStatistics, multiple: float = 5.0) -> float:
    """Returns the share of weights whose importance is far above the mean.

    The layerwise outlier distribution of Yin et al., "Outlier Weighed Layerwise
    Sparsity (OWL)" (2023), with Wanda's importance ``|W| * ||X||_2``.

    Args:
      dense: (K, M), numpy or JAX; float16, bfloat16 or float32.
      stats: of the layer's inputs.
      multiple: of the mean importance, above which a weight is an outlier.

    Returns:
      From 0 to 1.

    Raises:
      ValueError: shapes or dtypes do not fit; weights or statistics are not finite, or
        on different devices; multiple is not positive.
      TypeError: an argument is of the wrong type, or traced.
    """
    where = "prune.outlier_ratio"
    check_weight(where, dense)
    check_statistics(where, dense, stats)
    multiple = check_number(where, "multiple to be a number", multiple)
    if not 0 < multiple < float("inf"):
        raise ValueError(f"{where}: expected a positive multiple, got {multiple}")
    if not dense.size:
        return 0.0
    outliers = _outliers(automatic(native(dense)), automatic(stats.gram), multiple)
    return int(outliers) / dense.size


@jax.jit
def _outliers(dense: jax.Array, gram: jax.Array, multiple: Any) -> jax.Array:
    importance = wanda_importance(dense, gram)
    return (importance > multiple * importance.mean()).sum(dtype=jnp.int32)


def owl(
    ratios: Mapping[str, float],
    sparsity: float,
    spread: float = 0.08,
    *,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Returns the sparsity of each matrix: the more outliers, the lower.

    Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for
    Pruning LLMs to High Sparsity" (2023): linear in the outlier ratio, over a range of
    ``2 * spread``. (The paper gives all matrices of a transformer layer one sparsity.)

    Args:
      ratios: of outliers, as outlier_ratio() returns, by name.
      sparsity: the mean that the result has, weighted by sizes; from 0 to 1.
      spread: half the difference between the highest and the lowest sparsity, from 0 to
        0.5.
      sizes: numbers of elements, by name; None: all are of one size.

    Returns:
      Sparsities by name, within 0 to 1. All are equal where all ratios are. Where the
      range reaches beyond 0 or 1 it is cut off, and the others move to keep the mean.

    Raises:
      ValueError: a number is out of range, or the names of ratios and sizes differ.
      TypeError: ratios or sizes are no mapping; a number is none.
    """
    where = "prune.owl"
    check_mapping(where, "ratios", ratios)
    if sizes is not None:
        check_mapping(where, "sizes", sizes)
    sparsity = check_sparsity(where, sparsity)
    spread = check_number(where, "spread to be a number from 0 to 0.5", spread)
    if not 0 <= spread <= 0.5:
        raise ValueError(f"{where}: expected a spread from 0 to 0.5, got {spread}")
    if sizes is not None and set(sizes) != set(ratios):
        names = sorted(map(str, set(sizes) ^ set(ratios)))
        raise ValueError(
            f"{where}: expected ratios and sizes of the same names, got only one of "
            f"them for {', '.join(names[:5])}"
        )
    if not ratios:
        return {}
    outliers = _numbers(where, "ratio", ratios)
    weights = np.ones(len(outliers))
    if sizes is not None:
        weights = _numbers(where, "size", {name: sizes[name] for name in ratios})
    if not np.isfinite(outliers).all():
        raise ValueError(f"{where}: expected finite ratios, got {dict(ratios)}")
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(f"{where}: expected positive sizes, got {dict(sizes or {})}")
    span = np.ptp(outliers)
    share = (outliers - outliers.min()) / span if span else np.zeros_like(outliers)
    levels = _shifted(-2 * spread * share, sparsity, weights / weights.sum())
    return {name: float(level) for name, level in zip(ratios, levels, strict=True)}


def _numbers(where: str, what: str, values: Mapping[str, Any]) -> np.ndarray:
    """Returns numbers, by name, as an array of float64."""
    return np.array(
        [
            check_number(where, f"the {what} of {name} to be a number", values[name])
            for name in values
        ]
    )


def _shifted(levels: np.ndarray, mean: float, weights: np.ndarray) -> np.ndarray:
    """Adds a constant so that the mean is as asked, within 0 to 1."""
    low, high = -levels.max(), 1 - levels.min()
    for _ in range(100):
        middle = (low + high) / 2
        if weights @ np.clip(levels + middle, 0, 1) < mean:
            low = middle
        else:
            high = middle
    return np.clip(levels + high, 0, 1)
