"""Configuration of OPT, with one constructor per published size."""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashjax.checkpoint import CheckpointError, read_json

# Activations of transformers' ACT2FN that have no parameters of their own.
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)

# Field of OPTConfig -> key in a Hugging Face config.json.
_HF_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "ffn_size": "ffn_dim",
    "num_heads": "num_attention_heads",
    "max_positions": "max_position_embeddings",
    "word_embed_proj_dim": "word_embed_proj_dim",
    "do_layer_norm_before": "do_layer_norm_before",
    "remove_final_layer_norm": "_remove_final_layer_norm",
    "enable_bias": "enable_bias",
    "layer_norm_elementwise_affine": "layer_norm_elementwise_affine",
    "activation": "activation_function",
    "tie_word_embeddings": "tie_word_embeddings",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "init_std": "init_std",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "ffn_size",
    "num_heads",
    "max_positions",
)


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """Architecture of an OPT model (arXiv:2205.01068). Defaults are OPT-125M's.

    Attributes:
      vocab_size: number of token ids.
      hidden_size: width of the residual stream, a multiple of ``num_heads``.
      num_layers: number of decoder layers.
      ffn_size: width of the feed-forward layer.
      num_heads: number of attention heads.
      max_positions: most tokens of a sequence, prompt and continuation together.
      word_embed_proj_dim: width of the token embedding; where it differs from
        ``hidden_size`` the model has ``project_in`` and ``project_out`` (350M).
        None means ``hidden_size``.
      do_layer_norm_before: pre-norm (True) or post-norm (False, 350M).
      remove_final_layer_norm: leave out the norm after the last layer of a pre-norm
        model, as checkpoints fine-tuned by old transformers releases need it.
      enable_bias: linear layers have a bias.
      layer_norm_elementwise_affine: layer norms have a scale and a bias.
      activation: name of the feed-forward activation, as transformers spells it.
      tie_word_embeddings: the output layer is the token embedding.
      pad_token_id, bos_token_id: special token ids or None.
      eos_token_id: id, or tuple of ids, that ends a text, or None.
      init_std: standard deviation of randomly initialised weights.

    Raises:
      ValueError: a field has a wrong type or value; the message names all of them.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_layers: int = 12
    ffn_size: int = 3072
    num_heads: int = 12
    max_positions: int = 2048
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    activation: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2
    init_std: float = 0.02

    def __post_init__(self):
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        problems = self._problems()
        if problems:
            raise ValueError("invalid OPTConfig: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        for name in (*_SIZES, "word_embed_proj_dim"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                problems.append(f"{name} must be a positive integer, got {value!r}")
        for name in (
            "do_layer_norm_before",
            "remove_final_layer_norm",
            "enable_bias",
            "layer_norm_elementwise_affine",
            "tie_word_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                problems.append(f"{name} must be True or False, got {value!r}")
        if self.activation not in ACTIVATIONS:
            problems.append(
                f"activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.activation!r}"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and _is_tuple(value) else (value,)
            if not all(i is None or _is_int(i) for i in ids):
                problems.append(f"{name} must be an integer or None, got {value!r}")
        std = self.init_std
        is_number = isinstance(std, int | float) and not isinstance(std, bool)
        if not is_number or not 0 <= std <= sys.float_info.max:
            problems.append(f"init_std must be a finite number >= 0, got {std!r}")
        if not problems and self.hidden_size % self.num_heads:
            problems.append(
                f"hidden_size must be a multiple of num_heads, got "
                f"hidden_size={self.hidden_size}, num_heads={self.num_heads}"
            )
        return problems

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def has_projections(self) -> bool:
        """Whether the model has ``project_in`` and ``project_out``."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a layer norm follows the last layer."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> "OPTConfig":
        """Reads a Hugging Face configuration.

        Args:
          source: folder with a ``config.json``, or the parsed content of one.

        Returns:
          The configuration. Keys that do not change inference are ignored.

        Raises:
          CheckpointError: (a ValueError) the folder has no ``config.json``, or that is
            no OPT configuration or has wrong values.
        """
        if isinstance(source, Mapping):
            hf, where = source, "configuration"
        else:
            path = Path(source) / "config.json"
            where = str(path)
            if not path.is_file():
                raise CheckpointError(
                    f"{source}: expected a model folder with a config.json, found none"
                )
            hf = read_json(path)
        model_type = hf.get("model_type")
        if model_type != "opt":
            raise CheckpointError(
                f"{where}: expected model_type 'opt', got {model_type!r}"
            )
        fields = {name: hf[key] for name, key in _HF_KEYS.items() if key in hf}
        try:
            return cls(**fields)
        except ValueError as error:
            text = _with_hf_keys(str(error))
            raise CheckpointError(f"{where}: {text}") from error

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a Hugging Face ``config.json``."""
        hf: dict[str, Any] = {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
        }
        for name, key in _HF_KEYS.items():
            value = getattr(self, name)
            hf[key] = list(value) if _is_tuple(value) else value
        return hf

    @classmethod
    def opt_125m(cls) -> "OPTConfig":
        """OPT-125M: 12 layers of 768."""
        return cls()

    @classmethod
    def opt_350m(cls) -> "OPTConfig":
        """OPT-350M: 24 layers of 1024, post-norm, token embedding of 512."""
        return cls(
            hidden_size=1024,
            num_layers=24,
            ffn_size=4096,
            num_heads=16,
            word_embed_proj_dim=512,
            do_layer_norm_before=False,
        )

    @classmethod
    def opt_1_3b(cls) -> "OPTConfig":
        """OPT-1.3B: 24 layers of 2048."""
        return cls(hidden_size=2048, num_layers=24, ffn_size=8192, num_heads=32)

    @classmethod
    def opt_2_7b(cls) -> "OPTConfig":
        """OPT-2.7B: 32 layers of 2560."""
        return cls(hidden_size=2560, num_layers=32, ffn_size=10240, num_heads=32)

    @classmethod
    def opt_6_7b(cls) -> "OPTConfig":
        """OPT-6.7B: 32 layers of 4096."""
        return cls(hidden_size=4096, num_layers=32, ffn_size=16384, num_heads=32)

    @classmethod
    def opt_13b(cls) -> "OPTConfig":
        """OPT-13B: 40 layers of 5120."""
        return cls(hidden_size=5120, num_layers=40, ffn_size=20480, num_heads=40)

    @classmethod
    def opt_30b(cls) -> "OPTConfig":
        """OPT-30B: 48 layers of 7168."""
        return cls(hidden_size=7168, num_layers=48, ffn_size=28672, num_heads=56)

    @classmethod
    def opt_66b(cls) -> "OPTConfig":
        """OPT-66B: 64 layers of 9216."""
        return cls(hidden_size=9216, num_layers=64, ffn_size=36864, num_heads=72)

    @classmethod
    def opt_175b(cls) -> "OPTConfig":
        """OPT-175B: 96 layers of 12288."""
        return cls(hidden_size=12288, num_layers=96, ffn_size=49152, num_heads=96)


def sizes_assumed(hf: Mapping[str, Any]) -> dict[str, int]:
    """What is assumed for the sizes that a Hugging Face configuration lacks."""
    read = OPTConfig.from_hf(hf)
    return {
        _HF_KEYS[name]: getattr(read, name)
        for name in _SIZES
        if _HF_KEYS[name] not in hf
    }


def _with_hf_keys(message: str) -> str:
    """A message of OPTConfig with the names that its fields have in config.json."""
    names = "|".join(map(re.escape, _HF_KEYS))
    return re.sub(
        rf"\b(?:{names})(?= must|=|,)",
        lambda found: _HF_KEYS[found.group()],
        message,
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)
