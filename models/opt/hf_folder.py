"""Finding and reading an OPT in the Hugging Face layout, whoever wrote it."""

import contextlib
import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from flashjax.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    CheckpointError,
    CheckpointReader,
    read_json,
)
from flashjax.checkpoint.tensor_file import is_lfs_pointer
from flashjax.sparse_rows import SparseRows

from .config import OPTConfig, sizes_assumed
from .modeling import POSITION_OFFSET
from .torch_reader import TorchReader, has_torch_weights

_LOG = logging.getLogger(__name__)
_EMBED_TOKENS = "model.decoder.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_LISTED = 8
# What comes before a tensor's own name, depending on the class that saved it:
# OPTForCausalLM, OPTModel or OPTDecoder, perhaps wrapped for training.
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)*(?:model\.)*(?:decoder\.)?")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


class Reader(Protocol):
    """What CheckpointReader and TorchReader have in common."""

    def names(self) -> list[str]:
        """The names of all tensors, in the order in which to read them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, (out, in) for a linear layer."""

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor."""

    def load(self, name: str) -> np.ndarray:
        """Reads one tensor."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a tensor of a checkpoint belongs.

    Attributes:
      module: path of the layer, such as "layers.0.fc1".
      attribute: of the layer; kernels are transposed, (in, out) instead of (out, in).
      shape: in the checkpoint.
    """

    module: str
    attribute: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StoredOPT:
    """An open checkpoint whose tensors were checked against its configuration.

    Attributes:
      folder: where it is.
      config: the architecture. Output and token embeddings are tied as they are stored,
        whatever config.json says.
      reader: reads tensors by the name they are stored under.
      targets: where every tensor belongs, by the name OPTForCausalLM gives it.
      names: that name by the stored one, in the order in which to read: file by file.
    """

    folder: Path
    config: OPTConfig
    reader: Reader
    targets: dict[str, Target]
    names: dict[str, str]

    def read(
        self, stored_name: str, dtype: np.dtype, as_rows: bool
    ) -> tuple[np.ndarray | SparseRows, bool]:
        """One tensor in a dtype, and whether all finite values stayed finite.

        With `as_rows` a kernel that is stored sparse is not expanded.
        """
        reader = self.reader
        if not as_rows or not self._is_sparse_kernel(stored_name):
            return convert(reader.load(stored_name), dtype)
        assert isinstance(reader, CheckpointReader), "no other stores sparse weights"
        rows = reader.load_rows(stored_name)
        ((bitmap, values, count),) = rows.parts
        converted, fits = convert(values, dtype)
        part = bitmap, converted, count
        return dataclasses.replace(rows, parts=(part,)), fits

    def read_bytes(self, stored_name: str, as_rows: bool) -> int:
        """About what `read` holds of a tensor."""
        reader = self.reader
        if as_rows and self._is_sparse_kernel(stored_name):
            assert isinstance(reader, CheckpointReader), (
                "no other stores sparse weights"
            )
            return reader.stored_bytes(stored_name)
        return math.prod(reader.shape(stored_name)) * reader.dtype(stored_name).itemsize

    @property
    def reads_side_by_side(self) -> bool:
        """Whether several threads may read at a time: not in pickles."""
        return isinstance(self.reader, CheckpointReader)

    def is_sparse(self, stored_name: str) -> bool:
        """Whether a tensor is stored in flashjax.checkpoint's sparse form."""
        return stored_name in getattr(self.reader, "sparse", {})

    def _is_sparse_kernel(self, stored_name: str) -> bool:
        kernel = self.targets[self.names[stored_name]].attribute == "kernel"
        return kernel and self.is_sparse(stored_name)


@contextlib.contextmanager
def open_opt(
    folder_or_hub_name: str | os.PathLike[str], revision: str | None = None
) -> Iterator[StoredOPT]:
    """Opens a checkpoint and checks all of it but the values.

    Args:
      folder_or_hub_name: a local folder, or the name of a model on the hub.
      revision: branch, tag or commit on the hub.

    Yields:
      The open checkpoint.

    Raises:
      TypeError, CheckpointError: see from_pretrained().
    """
    folder = local_folder(folder_or_hub_name, revision)
    config = _load_config(folder)
    with open_weights(folder) as reader:
        names = _canonical_names(folder, reader)
        config = _settle_tying(config, reader, names)
        if config.num_layers > 10 * len(names):  # to list them would take for ever
            raise CheckpointError(
                f"{folder}: expected the tensors of {config.num_layers} layers, as "
                f"config.json says, got {len(names)} tensors"
            )
        targets = opt_targets(config)
        _check(folder, reader, names, targets)
        canonical = {stored: name for name, stored in names.items()}
        order = reader.names()
        if isinstance(reader, CheckpointReader):
            order = reader.names_as_stored()
        ordered = {n: canonical[n] for n in order if n in canonical}
        yield StoredOPT(folder, config, reader, targets, ordered)


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Reader]:
    """Opens the weights of a model folder, safetensors first, then pickles."""
    if not _has_safetensors(folder) and has_torch_weights(folder):
        for path in sorted(folder.glob("pytorch_model*.bin")):
            _refuse_pointer(path)
        with TorchReader(folder) as torch_reader:
            yield torch_reader
    else:
        with CheckpointReader(folder) as reader:
            yield reader


def _refuse_pointer(path: Path) -> None:
    with contextlib.suppress(OSError):  # reading will say what is wrong
        if is_lfs_pointer(path):
            raise CheckpointError(
                f"{path}: expected a whole state dict saved by torch, got a Git LFS "
                "pointer to one (git lfs pull downloads it)"
            )


def _has_safetensors(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME))


def opt_targets(config: OPTConfig) -> dict[str, Target]:
    """Every tensor that a checkpoint of this architecture has."""
    hidden, ffn, proj = config.hidden_size, config.ffn_size, config.word_embed_proj_dim
    bias = config.enable_bias
    positions = config.max_positions + POSITION_OFFSET
    targets: dict[str, Target] = {}

    def add(prefix, module, tensor, attribute, shape):
        targets[f"{prefix}{module}.{tensor}"] = Target(module, attribute, shape)

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
            linear(f"layers.{i}.self_attn.{name}", hidden, hidden, bias=bias)
        norm(f"layers.{i}.self_attn_layer_norm")
        linear(f"layers.{i}.fc1", hidden, ffn, bias=bias)
        linear(f"layers.{i}.fc2", ffn, hidden, bias=bias)
        norm(f"layers.{i}.final_layer_norm")
    if config.has_final_layer_norm:
        norm("final_layer_norm")
    if not config.tie_word_embeddings:
        linear("lm_head", proj, config.vocab_size, bias=False, prefix="")
    return targets


def local_folder(
    folder_or_hub_name: str | os.PathLike[str], revision: str | None = None
) -> Path:
    """The folder itself, or that of the hub's copy, downloaded where necessary.

    Raises:
      CheckpointError: there is no such folder, and the hub has no such model or cannot
        be reached.
      TypeError: that is no path and no name.
    """
    if not isinstance(folder_or_hub_name, str | os.PathLike):
        raise TypeError(
            "expected a model's folder or its name on the hub, got "
            f"{type(folder_or_hub_name).__name__}"
        )
    path = Path(folder_or_hub_name)
    name = os.fspath(folder_or_hub_name)
    if not name:
        raise CheckpointError(
            "expected a model's folder or its name on the hub, got an empty string"
        )
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

    if "/" not in name:  # a folder's name mistyped, perhaps
        _LOG.warning("%s is no folder here; asking the Hugging Face hub for it", name)

    def fetch(*patterns):
        folder = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns)
        )
        return Path(folder)

    try:
        # Many repositories hold the same weights in several formats: take one.
        folder = fetch("*.json", "*.txt", "*.safetensors")
        if not _has_safetensors(folder):
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


def _canonical_names(folder: Path, reader: Reader) -> dict[str, str]:
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
    config: OPTConfig, reader: Reader, names: dict[str, str]
) -> OPTConfig:
    """Follows PyTorch where a checkpoint holds an output layer that should be tied."""
    if not config.tie_word_embeddings or _LM_HEAD not in names:
        return config
    if _EMBED_TOKENS not in names:
        names[_EMBED_TOKENS] = names.pop(_LM_HEAD)
        return config
    pair = names[_EMBED_TOKENS], names[_LM_HEAD]
    same_shape = reader.shape(pair[0]) == reader.shape(pair[1])
    if same_shape and np.array_equal(_bytes(reader, pair[0]), _bytes(reader, pair[1])):
        del names[_LM_HEAD]
        return config
    _LOG.warning(
        "tie_word_embeddings is set, but %s and %s differ; they are not tied", *pair
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def _bytes(reader: Reader, name: str) -> np.ndarray:
    return reader.load(name).view(np.uint8)


def _check(
    folder: Path,
    reader: Reader,
    names: dict[str, str],
    targets: dict[str, Target],
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
        f"{len(found)} {kind}: {listed(found)}"
        for kind, found in problems.items()
        if found
    ]
    if lines:
        raise CheckpointError(
            f"{folder}: the tensors are not those of the OPT that config.json "
            "describes: " + "; ".join(lines) + _assumed(folder)
        )


def _assumed(folder: Path) -> str:
    """For a message: the sizes that config.json lacks."""
    assumed = sizes_assumed(read_json(folder / "config.json"))
    if not assumed:
        return ""
    sizes = ", ".join(f"{key} {size}" for key, size in assumed.items())
    return f". It lacks sizes, for which OPT-125M's were assumed: {sizes}"


def listed(found: list[str]) -> str:
    """Names for a message, the first few of them."""
    more = f", and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def convert(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """The array in this dtype, and whether all finite values stayed finite."""
    if array.dtype == dtype:
        return array, True
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        converted = array.astype(dtype)
    if jnp.finfo(dtype).max >= jnp.finfo(array.dtype).max:
        return converted, True
    infinite = np.isinf(converted)
    return converted, not infinite.any() or bool(np.isinf(array[infinite]).all())
