"""Unstructured-sparse weights for JAX: load compressed, compute dense."""

from flashjax import prune
from flashjax._native import cuda_available, cuda_unavailable_reason
from flashjax.matmul import sparse_matmul
from flashjax.sparse_matrix import SparseMatrix

__version__ = "0.1.0"

__all__ = [
    "SparseMatrix",
    "__version__",
    "cuda_available",
    "cuda_unavailable_reason",
    "prune",
    "sparse_matmul",
]
