"""Layers with sparse weights for Flax Linen."""

from .nn import LinenSparseDense as SparseDense

__all__ = ["SparseDense"]
