"""OPT (Open Pre-trained Transformer, arXiv:2205.01068) in Flax NNX."""

from .config import OPTConfig
from .modeling import OPT, KVCache

__all__ = ["OPT", "KVCache", "OPTConfig"]
