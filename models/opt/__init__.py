"""OPT (Open Pre-trained Transformer, arXiv:2205.01068) in Flax NNX."""

from .config import OPTConfig
from .generate import generate, generate_stream
from .modeling import OPT, KVCache
from .text_stream import TextStream, stream_text

__all__ = [
    "KVCache",
    "OPT",
    "OPTConfig",
    "TextStream",
    "generate",
    "generate_stream",
    "stream_text",
]
