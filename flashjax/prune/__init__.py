"""Pruning: dense arrays with zeros, ready for `SparseMatrix.from_dense`.

Weights are (in_features, out_features), as everywhere here; papers write them
transposed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ._alps import alps
from ._budgets import magnitude_global, outlier_ratio, owl
from ._magnitude import magnitude
from ._sparsegpt import sparsegpt
from ._statistics import InputStatistics, reconstruction_error
from ._wanda import wanda

__all__ = [
    "METHODS",
    "InputStatistics",
    "Method",
    "alps",
    "magnitude",
    "magnitude_global",
    "outlier_ratio",
    "owl",
    "reconstruction_error",
    "sparsegpt",
    "wanda",
]


class Method(NamedTuple):
    """A pruning method.

    Attributes:
      function: ``function(dense, stats, sparsity, pattern=None)`` where statistics are
        needed, else ``function(dense, sparsity, pattern=None)``.
      needs_statistics: whether it needs the statistics of the layer's inputs.
    """

    function: Callable[..., Any]
    needs_statistics: bool


METHODS = {
    "magnitude": Method(magnitude, False),
    "wanda": Method(wanda, True),
    "sparsegpt": Method(sparsegpt, True),
    "alps": Method(alps, True),
}
