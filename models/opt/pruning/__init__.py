"""Pruning a stored OPT: Hugging Face folder in, sparse folder out."""

from .pipeline import prune_pretrained
from .result import MatrixReport, PruneResult

__all__ = ["MatrixReport", "PruneResult", "prune_pretrained"]
