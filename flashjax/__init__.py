"""Unstructured-sparse weights for JAX: load compressed, compute dense."""

from flashjax._native import cuda_available, cuda_unavailable_reason

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "cuda_available",
    "cuda_unavailable_reason",
]
