"""Loading and saving OPT in the Hugging Face layout, dense or sparse.

Tensors are read, converted and put on the device one by one into a model that has no
arrays yet (`nnx.eval_shape`), so the host holds one tensor beside what is loaded.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from flashjax.checkpoint import (
    CheckpointError,
    CheckpointReader,
    CheckpointWriter,
    atomic_folder,
    read_json,
)
from flashjax.nn import SparseDense
from flashjax.sparse_matrix import SparseMatrix

from .config import OPTConfig
from .modeling import OPT, POSITION_OFFSET
from .tokenizer import load_tokenizer, save_tokenizer
from .torch_reader import TorchReader, has_torch_weights

# "auto" packs a weight from this share of zeros on: below it, sparse is no smaller.
AUTO_SPARSITY = 0.5

_LOG = logging.getLogger(__name__)
_EMBED_TOKENS = "model.decoder.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_DECODER_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_HALVES = (jnp.float16, jnp.bfloat16)
_SHARD_BYTES = 5 << 30
_LISTED = 8
# What comes before a tensor's own name, depending on the class that saved it:
# OPTForCausalLM, OPTModel or OPTDecoder, perhaps wrapped for training.
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)*(?:model\.)*(?:decoder\.)?")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


class _Reader(Protocol):
    """What CheckpointReader and TorchReader have in common."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> np.dtype: ...
    def load(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a tensor of a checkpoint belongs.

    Attributes:
      module: path of the layer, such as "layers.0.fc1".
      attribute: of the layer; kernels are transposed, (in, out) instead of (out, in).
      shape: in the checkpoint.
    """

    module: str
    attribute: str
    shape: tuple[int, ...]


def from_pretrained(
    folder_or_hub_name: str | os.PathLike,
    dtype: DTypeLike = jnp.float16,
    sparse: bool | Literal["auto"] = "auto",
    *,
    revision: str | None = None,
) -> tuple[OPT, Tokenizer | None]:
    """Loads an OPT model and its tokenizer.

    Args:
      folder_or_hub_name: a folder in the Hugging Face layout (config.json and either
        model.safetensors or pytorch_model.bin, sharded or not; the latter needs
        torch), or the name of a model on the Hugging Face hub.
      dtype: of the model: float16, bfloat16 or float32. Weights are converted.
      sparse: "auto" loads as SparseDense the linear layers of the decoder that the
        checkpoint stores sparse or that are at least half zeros, if dtype is a half
        precision; True all linear layers of the decoder; False none.
      revision: branch, tag or commit on the hub.

    Returns:
      The model on JAX's default device, and the tokenizer, None where the folder has
      none.

    Raises:
      ValueError: dtype or sparse is none of the above.
      CheckpointError: (a ValueError) the folder is no OPT model, is truncated, or its
        tensors do not fit its configuration, all of them being named; or the hub
        cannot be reached.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, *_HALVES):
        raise ValueError(
            f"dtype must be float16, bfloat16 or float32, got {dtype.name}"
        )
    if sparse not in ("auto", True, False):
        raise ValueError(f"sparse must be 'auto', True or False, got {sparse!r}")
    if sparse is True and dtype not in _HALVES:
        raise ValueError(
            f"sparse=True needs dtype float16 or bfloat16, got {dtype.name}"
        )
    folder = _local_folder(folder_or_hub_name, revision)
    config = _load_config(folder)
    with _open(folder) as reader:
        names = _canonical_names(folder, reader)
        config = _settle_tying(config, reader, names)
        targets = _targets(config)
        _check(folder, reader, names, targets)
        model = _load(folder, reader, names, targets, config, dtype, sparse)
    return model, load_tokenizer(folder)


def save_pretrained(
    model: OPT,
    tokenizer: Tokenizer | None,
    folder: str | os.PathLike,
    overwrite: bool = False,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Saves a model in the Hugging Face layout.

    A model without sparse layers can be loaded by transformers. Sparse layers are
    stored in the form of `flashjax.checkpoint`, which does not depend on the layout in
    memory. The folder appears whole or not at all.

    Args:
      model: the model.
      tokenizer: its tokenizer, or None to save none.
      folder: a new or empty folder.
      overwrite: replace an existing model folder.
      shard_bytes: weights above this many bytes are split over several files.

    Raises:
      CheckpointError: the folder exists, or cannot be written; nothing is left behind.
      ValueError: model or tokenizer is of another type.
    """
    if not isinstance(model, OPT):
        raise ValueError(f"expected an OPT model, got {type(model).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            "expected a tokenizers.Tokenizer or None, got "
            f"{type(tokenizer).__module__}.{type(tokenizer).__name__}"
        )
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        hf = model.config.to_hf() | {"torch_dtype": model.dtype.name}
        (temporary / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        if tokenizer is not None:
            save_tokenizer(tokenizer, model.config, temporary)
        writer = CheckpointWriter(temporary, shard_bytes=shard_bytes)
        for name, target in _targets(model.config).items():
            layer = _module(model, target.module)
            if target.attribute == "kernel" and isinstance(layer, SparseDense):
                dense = np.asarray(layer.kernel.get_value().to_dense())
                writer.add_sparse(name, dense.T)
            else:
                array = np.asarray(getattr(layer, target.attribute)[...])
                writer.add(name, array.T if target.attribute == "kernel" else array)
        writer.close()


def _targets(config: OPTConfig) -> dict[str, _Target]:
    """Every tensor that a checkpoint of this architecture has."""
    hidden, ffn, proj = config.hidden_size, config.ffn_size, config.word_embed_proj_dim
    bias = config.enable_bias
    positions = config.max_positions + POSITION_OFFSET
    targets: dict[str, _Target] = {}

    def add(prefix, module, tensor, attribute, shape):
        targets[f"{prefix}{module}.{tensor}"] = _Target(module, attribute, shape)

    def linear(module, inputs, outputs, *, bias, prefix="model.decoder."):
        add(prefix, module, "weight", "kernel", (outputs, inputs))
        if bias:
            add(prefix, module, "bias", "bias", (outputs,))

    def norm(module):
        if config.layer_norm_elementwise_affine:
            add("model.decoder.", module, "weight", "scale", (hidden,))
            add("model.decoder.", module, "bias", "bias", (hidden,))

    def embed(module, shape):
        add("model.decoder.", module, "weight", "embedding", shape)

    embed("embed_tokens", (config.vocab_size, proj))
    embed("embed_positions", (positions, hidden))
    if config.has_projections:
        linear("project_in", proj, hidden, bias=False)
        linear("project_out", hidden, proj, bias=False)
    for i in range(config.num_layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(
                f"layers.{i}.self_attn.{name}", hidden, hidden, bias=config.enable_bias
            )
        norm(f"layers.{i}.self_attn_layer_norm")
        linear(f"layers.{i}.fc1", hidden, ffn, bias=bias)
        linear(f"layers.{i}.fc2", ffn, hidden, bias=bias)
        norm(f"layers.{i}.final_layer_norm")
    if config.has_final_layer_norm:
        norm("final_layer_norm")
    if not config.tie_word_embeddings:
        linear("lm_head", proj, config.vocab_size, bias=False, prefix="")
    return targets


def _local_folder(folder_or_hub_name: str | os.PathLike, revision) -> Path:
    path = Path(folder_or_hub_name)
    name = os.fspath(folder_or_hub_name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: expected a model folder, got a file")
    if not isinstance(folder_or_hub_name, str) or not _HUB_NAME.match(name):
        raise CheckpointError(f"{path}: expected a model folder, got nothing")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    # Importing the client takes a while, and local folders do not need it.
    from huggingface_hub import snapshot_download

    def fetch(*patterns):
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
        return Path(folder)

    try:
        # Many repositories hold the same weights in several formats: take one.
        folder = fetch("*.json", "*.txt", "*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = fetch("*.json", "*.txt", "pytorch_model*.bin")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{name!r} is no local folder and could not be had from the Hugging Face "
            f"hub: {reason[0]}"
        ) from error
    return folder


def _load_config(folder: Path) -> OPTConfig:
    config = OPTConfig.from_hf(folder)
    if read_json(folder / "config.json").get("quantization_config"):
        raise CheckpointError(
            f"{folder}: expected float16, bfloat16 or float32 weights, got a quantized "
            "checkpoint (config.json has a quantization_config)"
        )
    return config


@contextlib.contextmanager
def _open(folder: Path) -> Iterator[_Reader]:
    safetensors = any(folder.glob("*.safetensors*"))
    reader_type = CheckpointReader
    if not safetensors and has_torch_weights(folder):
        reader_type = TorchReader
    with reader_type(folder) as reader:
        yield reader


def _canonical_names(folder: Path, reader: _Reader) -> dict[str, str]:
    """The checkpoint's own names by the names that OPTForCausalLM gives."""
    names: dict[str, str] = {}
    for stored in reader.names():
        name = _PREFIX.sub("", stored, count=1)
        if name == "version":  # left over by fairseq
            continue
        if name != _LM_HEAD:
            name = f"model.decoder.{name}"
        if name in names:
            raise CheckpointError(
                f"{folder}: {names[name]!r} and {stored!r} are the same weight"
            )
        names[name] = stored
    return names


def _settle_tying(
    config: OPTConfig, reader: _Reader, names: dict[str, str]
) -> OPTConfig:
    """Follows PyTorch where a checkpoint holds an output layer that should be tied."""
    if not config.tie_word_embeddings or _LM_HEAD not in names:
        return config
    if _EMBED_TOKENS not in names:
        names[_EMBED_TOKENS] = names.pop(_LM_HEAD)
        return config
    pair = names[_EMBED_TOKENS], names[_LM_HEAD]
    same = reader.shape(pair[0]) == reader.shape(pair[1]) and np.array_equal(
        *(reader.load(name).astype(np.float32) for name in pair), equal_nan=True
    )
    if same:
        del names[_LM_HEAD]
        return config
    _LOG.warning(
        "tie_word_embeddings is set, but %s and %s differ; they are not tied", *pair
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def _check(
    folder: Path,
    reader: _Reader,
    names: dict[str, str],
    targets: dict[str, _Target],
) -> None:
    """Reports every tensor that does not fit, before anything large is read."""
    wrong = []
    for name in sorted(names.keys() & targets.keys()):
        stored, expected = names[name], targets[name].shape
        shape, dtype = reader.shape(stored), reader.dtype(stored)
        if shape != expected:
            wrong.append(f"{stored} expected shape {expected}, got {shape}")
        elif not jnp.issubdtype(dtype, jnp.floating):
            wrong.append(f"{stored} expected a floating dtype, got {dtype}")
    problems = {
        "missing": sorted(targets.keys() - names.keys()),
        "unexpected": sorted(names[n] for n in names.keys() - targets.keys()),
        "wrong": wrong,
    }
    lines = [
        f"{len(found)} {kind}: {_listed(found)}"
        for kind, found in problems.items()
        if found
    ]
    if lines:
        raise CheckpointError(
            f"{folder}: the tensors are not those of the OPT that config.json "
            "describes: " + "; ".join(lines)
        )


def _listed(found: list[str]) -> str:
    more = f", and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def _load(
    folder: Path,
    reader: _Reader,
    names: dict[str, str],
    targets: dict[str, _Target],
    config: OPTConfig,
    dtype: np.dtype,
    sparse: bool | Literal["auto"],
) -> OPT:
    model = nnx.eval_shape(lambda: OPT(config, dtype=dtype, rngs=nnx.Rngs(0)))
    stored_sparse = getattr(reader, "sparse", {})
    by_stored = {stored: name for name, stored in names.items()}
    overflows = []
    # In the order of the files: sharded pickles are read one file at a time.
    for stored in reader.names():
        if stored not in by_stored:
            continue
        target = targets[by_stored[stored]]
        array, fits = _convert(reader.load(stored), dtype)
        if not fits:
            overflows.append(stored)
            continue
        layer = _module(model, target.module)
        if target.attribute == "kernel" and _goes_sparse(
            array, target.module, stored in stored_sparse, sparse, dtype
        ):
            matrix = SparseMatrix.from_dense(array.T)
            _set_module(
                model,
                target.module,
                SparseDense.from_matrix(
                    matrix,
                    layer.bias,
                    dtype=layer.dtype,
                    preferred_element_type=layer.preferred_element_type,
                ),
            )
            continue
        value = jnp.asarray(array)
        if target.attribute == "kernel":
            value = value.T
        # Without waiting, reading would run ahead of copying and pile up tensors.
        getattr(layer, target.attribute).set_value(jax.block_until_ready(value))
    if overflows:
        raise CheckpointError(
            f"{folder}: values too large for {dtype.name} in {_listed(overflows)}; "
            "load as bfloat16 or float32"
        )
    return model


def _convert(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """The array in this dtype, and whether all finite values stayed finite."""
    if array.dtype == dtype:
        return array, True
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        converted = array.astype(dtype)
    if jnp.finfo(dtype).max >= jnp.finfo(array.dtype).max:
        return converted, True
    infinite = np.isinf(converted)
    return converted, not infinite.any() or bool(np.isinf(array[infinite]).all())


def _goes_sparse(
    array: np.ndarray,
    module: str,
    stored_sparse: bool,
    sparse: bool | Literal["auto"],
    dtype: np.dtype,
) -> bool:
    if dtype not in _HALVES or sparse is False:
        return False
    if stored_sparse:
        return True
    if module.split(".")[-1] not in _DECODER_LINEARS:
        return False
    # Shifting the sign out counts -0.0 as zero.
    zeros = array.size - np.count_nonzero(array.view(np.uint16) << np.uint16(1))
    return sparse is True or zeros >= AUTO_SPARSITY * array.size


def _module(model: OPT, path: str) -> Any:
    node: Any = model
    for part in path.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


def _set_module(model: OPT, path: str, layer: Any) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(_module(model, parent) if parent else model, attribute, nnx.data(layer))
