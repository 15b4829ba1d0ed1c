"""Pruning a stored OPT: Hugging Face folder in, sparse folder out."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flashjax import prune
from flashjax.checkpoint import CheckpointError, CheckpointWriter, atomic_folder
from flashjax.checkpoint import read_json as _read_json

from .hf_folder import Target, convert, open_opt

METHODS = {"magnitude": prune.magnitude}

_PRUNED = re.compile(
    r"layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2)"
)
# What a model folder holds beside its weights and config.json.
_COPIED = (
    "added_tokens.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.md",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_MIN_SHARD_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class PruneResult:
    """What prune_pretrained() wrote.

    Attributes:
      matrices: number of pruned matrices.
      elements: their elements.
      nonzeros: what is left of them.
      dense_bytes: all weights in the new dtype if they were stored dense.
      stored_bytes: all weights as stored.
    """

    matrices: int
    elements: int
    nonzeros: int
    dense_bytes: int
    stored_bytes: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in the pruned matrices."""
        return 1 - self.nonzeros / self.elements if self.elements else 0.0


def prune_pretrained(
    folder_or_hub_name: str | os.PathLike,
    out: str | os.PathLike,
    *,
    sparsity: float,
    method: str = "magnitude",
    dtype: DTypeLike = jnp.float16,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> PruneResult:
    """Prunes the linear layers of a stored OPT's decoder, one matrix at a time.

    Embeddings, projections, norms and biases stay dense. The host holds one matrix
    beside what was not written yet, about one layer.

    Args:
      folder_or_hub_name: a model, as for from_pretrained().
      out: the folder to write; it appears whole or not at all.
      sparsity: share of zeros in each matrix, 0 to 1.
      method: "magnitude".
      dtype: to store, float16 or bfloat16.
      overwrite: replace an existing model folder.
      progress: called with a tensor's name, the number of elements done and of all,
        before each tensor and with an empty name at the end.

    Returns:
      What was written.

    Raises:
      ValueError: an argument is out of range.
      CheckpointError: (a ValueError) folder is no OPT model, or out exists or cannot be
        written.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(f"dtype must be float16 or bfloat16, got {dtype.name}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    METHODS[method](np.zeros(1, np.float16), sparsity)  # checks sparsity
    with contextlib.ExitStack() as stack:
        stored = stack.enter_context(open_opt(folder_or_hub_name))
        folder, targets = stored.folder, stored.targets
        if Path(out).resolve() == folder.resolve():
            raise CheckpointError(
                f"{out}: expected a folder other than the model to prune, got the same"
            )
        temporary = stack.enter_context(atomic_folder(out, overwrite=overwrite))
        _write_config(folder, temporary, stored.config.tie_word_embeddings, dtype)

        layer_bytes = 2 * sum(
            target.shape[0] * target.shape[1]
            for target in targets.values()
            if target.module.startswith("layers.0.") and target.attribute == "kernel"
        )
        writer = CheckpointWriter(temporary, max(layer_bytes, _MIN_SHARD_BYTES))
        result = PruneResult(0, 0, 0, 0, 0)
        sizes = {name: int(np.prod(target.shape)) for name, target in targets.items()}
        total, done = sum(sizes.values()), 0
        for stored_name, name in stored.names.items():
            if progress is not None:
                progress(name, done, total)
            array = stored.reader.load(stored_name)
            pruned = _is_pruned(targets[name])
            if pruned:
                array = _prune(METHODS[method], array, sparsity, stored_name)
            array, fits = convert(array, dtype)
            if not fits:
                raise CheckpointError(
                    f"{folder}: values too large for {dtype.name} in {stored_name}; "
                    "prune to bfloat16"
                )
            if pruned:
                nonzeros = int(np.count_nonzero(array))
                result = dataclasses.replace(
                    result,
                    matrices=result.matrices + 1,
                    elements=result.elements + array.size,
                    nonzeros=result.nonzeros + nonzeros,
                )
                writer.add_sparse(name, array)
            else:
                writer.add(name, array)
            done += sizes[name]
        stored_bytes = writer.close()
        for name in _COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        if progress is not None:
            progress("", total, total)
    return dataclasses.replace(
        result, dense_bytes=total * dtype.itemsize, stored_bytes=stored_bytes
    )


def _is_pruned(target: Target) -> bool:
    return target.attribute == "kernel" and bool(_PRUNED.fullmatch(target.module))


def _prune(method, array: np.ndarray, sparsity: float, name: str) -> np.ndarray:
    try:
        return method(array, sparsity)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _write_config(folder: Path, out: Path, tied: bool, dtype: np.dtype) -> None:
    # The rest of the file stays as it was, for whoever else reads it.
    content = _read_json(folder / "config.json")
    content.pop("dtype", None)  # another name of torch_dtype
    content |= {
        "architectures": ["OPTForCausalLM"],
        "torch_dtype": dtype.name,
        "tie_word_embeddings": tied,
    }
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")
