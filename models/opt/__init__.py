"""OPT (Open Pre-trained Transformer, arXiv:2205.01068) in Flax NNX."""

from .attention import KVCache
from .batch_file import generate_file
from .config import OPTConfig
from .generate import generate, generate_stream
from .generation_config import GenerationConfig
from .generation_request import pad_prompts
from .modeling import OPT
from .params import from_pretrained, save_pretrained
from .text_stream import TextStream, stream_text

__all__ = [
    "OPT",
    "GenerationConfig",
    "KVCache",
    "OPTConfig",
    "TextStream",
    "from_pretrained",
    "generate",
    "generate_file",
    "generate_stream",
    "pad_prompts",
    "save_pretrained",
    "stream_text",
]
