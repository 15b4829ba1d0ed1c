"""Single safetensors files with sparse weights, each written at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flashjax.checkpoint import (
    CheckpointError,
    SparseEntry,
    decode,
    encode,
    parse_metadata,
    save_and_sync,
)
from flashjax.checkpoint.arrays import as_stored
from flashjax.checkpoint.metadata import parse_checksums
from flashjax.checkpoint.reader import PARTS
from flashjax.checkpoint.tensor_file import TensorFile


def write_file(
    path: Path, dense: Mapping[str, np.ndarray], sparse: Mapping[str, np.ndarray]
) -> tuple[int, list[str]]:
    """Writes tensors to a file and waits until they are on the disk.

    Args:
      path: of the file.
      dense: tensors to store as they are.
      sparse: weights, (out, in) float16 or bfloat16, to store in the sparse form.

    Returns:
      Bytes of the tensors as stored, and their names in the file.
    """
    tensors = {name: as_stored(name, array) for name, array in dense.items()}
    entries = {}
    for name, array in sparse.items():
        tensors[f"{name}.bitmap"], tensors[f"{name}.values"] = encode(array)
        entries[name] = SparseEntry(array.shape, array.dtype)
    save_and_sync(path, tensors, entries)
    return sum(array.nbytes for array in tensors.values()), sorted(tensors)


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a file; sparse weights come decoded, (out, in).

    Raises:
      CheckpointError: the file is damaged.
    """
    tensors, entries = _load(path)
    for name, entry in entries.items():
        bitmap, values = (tensors.pop(f"{name}.{part}") for part in PARTS)
        where = f"{path}: {name}"
        tensors[name] = decode(bitmap, values, entry.shape, entry.dtype, where)
    return tensors


def merge_files(paths: Sequence[Path], merged: Path) -> None:
    """Writes the tensors of several files to one, as they are stored.

    Raises:
      CheckpointError: a file is damaged.
    """
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, SparseEntry] = {}
    for path in paths:
        found, found_entries = _load(path)
        tensors |= found
        entries |= found_entries
    save_and_sync(merged, tensors, entries)


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, SparseEntry]]:
    file = TensorFile(path)
    entries = parse_metadata(file.metadata, str(path))
    checksums = parse_checksums(file.metadata, str(path))
    tensors = {name: file.read(name, checksums) for name in file.names()}
    for name in entries:
        for part in PARTS:
            if f"{name}.{part}" not in tensors:
                raise CheckpointError(
                    f"{path}: the tensor {f'{name}.{part}'!r} is missing"
                )
    return tensors, entries
