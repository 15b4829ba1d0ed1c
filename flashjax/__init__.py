"""Unstructured-sparse weights for JAX: load compressed, compute dense."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashjax import checkpoint, export, linen, nn, prune
    from flashjax._native import cuda_available, cuda_unavailable_reason
    from flashjax.checkpoint import CheckpointError
    from flashjax.matmul import sparse_matmul
    from flashjax.nn import SparseDense, sparsify
    from flashjax.nn_trainable import freeze, trainable
    from flashjax.sharding import ShardedSparseMatrix
    from flashjax.sparse_matrix import SparseMatrix
    from flashjax.trainable_matrix import TrainableMatrix
    from flashjax.tuning import autotune

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ShardedSparseMatrix",
    "SparseDense",
    "SparseMatrix",
    "TrainableMatrix",
    "__version__",
    "autotune",
    "checkpoint",
    "cuda_available",
    "cuda_unavailable_reason",
    "export",
    "freeze",
    "linen",
    "nn",
    "prune",
    "sparse_matmul",
    "sparsify",
    "trainable",
]

# Loaded on first use: JAX and Flax take seconds, which `flashjax --help` should not.
_MODULES = ("checkpoint", "export", "linen", "nn", "prune")
_HOMES = {
    "CheckpointError": "checkpoint",
    "ShardedSparseMatrix": "nn",
    "SparseDense": "nn",
    "SparseMatrix": "nn",  # which makes it known to Flax
    "TrainableMatrix": "nn_trainable",
    "autotune": "tuning",
    "cuda_available": "_native",
    "cuda_unavailable_reason": "_native",
    "freeze": "nn_trainable",
    "sparse_matmul": "matmul",
    "sparsify": "nn",
    "trainable": "nn_trainable",
}

if importlib.util.find_spec("flashjax._cpu") is None:
    from flashjax import _native  # noqa: F401  raises, and says how to build


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"flashjax.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"flashjax.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'flashjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
