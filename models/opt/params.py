"""Loading and saving OPT in the Hugging Face layout, dense or sparse."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from flashjax.checkpoint import CheckpointWriter, atomic_folder
from flashjax.nn import SparseDense
from flashjax.nn_trainable import TrainableSparseDense, rounded
from flashjax.nnx_tree import node_at
from flashjax.sparse_matrix import check_tokens

from .attention import check_cache_dtype
from .fused_qkv import FUSED, QKV, rows_of
from .hf_folder import open_opt, opt_targets
from .loading import HALVES, load
from .modeling import OPT, check_dtype, check_opt
from .parallel import TensorParallel, transpose_anywhere
from .tokenizer import load_tokenizer, save_tokenizer

# The tensors of two files are held: of one that is written and of the next.
_SHARD_BYTES = 1 << 30


def from_pretrained(
    folder_or_hub_name: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float16,
    sparse: bool | Literal["auto"] = "auto",
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    axis: str = "model",
    fuse_qkv: bool = True,
    cache_dtype: DTypeLike | None = None,
    tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
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
      mesh: devices over which to split the model (docs/multi-gpu.md); heads and
        feed-forward units must be divisible by the size of the axis. Each device gets
        its part of a tensor only. In a multi-process run every process calls this.
      axis: name of the mesh axis.
      fuse_qkv: whether `q_proj`, `k_proj` and `v_proj` of a layer become one layer
        `qkv_proj`, where all of them are sparse or all dense. Text comes faster so;
        load with False to prune or change the three one by one. What is saved is the
        same.
      cache_dtype: of the keys and values that generation keeps: float8_e4m3fn, which
        takes half the memory of half precision and rounds them (docs/generation.md);
        None is `dtype`.
      tokens: how many sequences will mostly be generated at once, if that is known and
        few; see `SparseMatrix.from_dense`. Not with a mesh.
      progress: called with the bytes that were read, and with all.

    Returns:
      The model on the mesh, or else on JAX's default device; and the tokenizer, None
      where the folder has none.

    Raises:
      TypeError: the folder is no path and no name.
      ValueError: an option is none of the above, or the model cannot be split
        over the mesh.
      CheckpointError: (a ValueError) the folder is no OPT model, is truncated, or its
        tensors do not fit its configuration, all of them being named; or the hub
        cannot be reached.
    """
    dtype = check_dtype(dtype)
    cache_dtype = check_cache_dtype(cache_dtype, dtype)
    if not isinstance(sparse, bool) and sparse != "auto":
        raise ValueError(f"sparse must be 'auto', True or False, got {sparse!r}")
    if sparse is True and dtype not in HALVES:
        raise ValueError(
            f"sparse=True needs dtype float16 or bfloat16, got {dtype.name}"
        )
    check_tokens("from_pretrained", tokens)
    if tokens is not None and mesh is not None:
        raise ValueError(f"tokens must be None where there is a mesh, got {tokens}")
    with open_opt(folder_or_hub_name, revision) as stored:
        tokenizer = load_tokenizer(stored.folder)
        parallel = None
        if mesh is not None:
            parallel = TensorParallel.create(stored.config, mesh, axis)
        model = load(stored, dtype, sparse, parallel, fuse_qkv, tokens, progress)
        model.cache_dtype = cache_dtype
        return model, tokenizer


def save_pretrained(
    model: OPT,
    tokenizer: Tokenizer | None,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Saves a model in the Hugging Face layout.

    A model without sparse layers can be loaded by transformers. Sparse layers are
    stored in the form of `flashjax.checkpoint`, which does not depend on the layout in
    memory; a fused `qkv_proj` is stored as the three layers that it is made of. The
    folder appears whole or not at all.

    Args:
      model: the model.
      tokenizer: its tokenizer, or None to save none.
      folder: a new or empty folder.
      overwrite: replace an existing model folder.
      shard_bytes: weights above this many bytes are split over several files.

    Raises:
      CheckpointError: the folder exists, or cannot be written; nothing is left behind.
      TypeError: model or tokenizer is of another type.
      ValueError: shard_bytes is no number of at least 1, or values that were trained
        are NaN or too large for the model's half precision.
    """
    check_opt(model)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            "expected a tokenizers.Tokenizer or None, got "
            f"{type(tokenizer).__module__}.{type(tokenizer).__name__}"
        )
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(nnx.state(model))):
        raise ValueError(
            "expected a model whose arrays all live in this process, got one that is "
            "spread over several processes: load and save it in one"
        )
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        hf = model.config.to_hf() | {"torch_dtype": model.dtype.name}
        (temporary / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        if tokenizer is not None:
            save_tokenizer(tokenizer, model.config, temporary)
        with CheckpointWriter(temporary, shard_bytes=shard_bytes) as writer:
            for name, tensor, sparse in _tensors(model):
                (writer.add_sparse if sparse else writer.add)(name, tensor)
            writer.close()


def _tensors(model: OPT) -> Iterator[tuple[str, np.ndarray, bool]]:
    """The tensors of a checkpoint by name, and whether they are stored sparse."""
    # Those of a fused layer follow each other: it is unpacked once.
    unpacked_layer, unpacked = None, np.empty(0)
    for name, target in opt_targets(model.config).items():
        parent, _, projection = target.module.rpartition(".")
        fused = projection in QKV and node_at(model, parent).qkv_proj is not None
        layer = node_at(model, f"{parent}.{FUSED}" if fused else target.module)
        sparse = False
        if target.attribute != "kernel":
            variable = getattr(layer, target.attribute)[...]
            if isinstance(layer, TrainableSparseDense):
                variable = rounded(name, variable, layer.bias_dtype)
            tensor = np.asarray(variable)
        else:
            sparse = isinstance(layer, SparseDense)
            if layer is not unpacked_layer:
                kernel: Any = layer.kernel.get_value()
                dense = kernel.to_dense() if sparse else kernel
                if isinstance(layer, TrainableSparseDense):
                    dense = rounded(name, dense, dense.dtype)
                unpacked_layer, unpacked = layer, np.asarray(transpose_anywhere(dense))
                del dense
            tensor = unpacked
        if fused:
            tensor = rows_of(tensor, projection, model.config.num_heads)
        yield name, tensor, sparse
