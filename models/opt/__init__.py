"""OPT (Open Pre-trained Transformer, arXiv:2205.01068) in Flax NNX."""

from .config import OPTConfig
from .generate import generate, generate_stream
from .modeling import OPT, KVCache
from .params import from_pretrained, save_pretrained
from .text_stream import TextStream, stream_text

__all__ = [
    "OPT",
    "KVCache",
    "OPTConfig",
    "TextStream",
    "from_pretrained",
    "generate",
    "generate_stream",
    "save_pretrained",
    "stream_text",
]
