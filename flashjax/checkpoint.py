"""The on-disk form of sparse weights, tensor by tensor.

A sparse weight ``NAME`` of shape (out, in), the orientation of Hugging Face, is stored
as two tensors of a safetensors file, independent of the packed layout in memory:

* ``NAME.bitmap``: uint8 (ceil(out * in / 8),), bit ``i % 8`` of byte ``i // 8`` says
  whether element ``i`` (row-major) is stored;
* ``NAME.values``: float16 or bfloat16 (nnz,), the stored elements, row-major.

Shapes and dtypes are JSON under the key ``flashjax`` of the file's metadata::

    {"format": "flashjax-sparse", "version": 1,
     "sparse": {"NAME": {"shape": [out, in], "dtype": "float16"}}}
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flashjax.atomic_folder import CheckpointError, atomic_folder

if TYPE_CHECKING:
    from flashjax.sparse_matrix import SparseMatrix

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "SparseEntry",
    "atomic_folder",
    "decode",
    "encode",
    "export_tree",
    "format_metadata",
    "from_arrays",
    "import_tree",
    "parse_metadata",
    "read_json",
    "to_arrays",
]

FORMAT = "flashjax-sparse"
VERSION = 1
METADATA_KEY = "flashjax"
TREE_KEY = "flashjax_sparse"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Elements that are converted at a time, so that temporaries stay in the cache.
_BLOCK = 1 << 16

_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# safetensors' names of the dtypes that a model folder may hold.
_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": _DTYPES["float16"],
    "BF16": _DTYPES["bfloat16"],
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class SparseEntry:
    """What the metadata says about one sparse weight.

    Attributes:
      shape: (out_features, in_features).
      dtype: float16 or bfloat16.
    """

    shape: tuple[int, int]
    dtype: np.dtype


def encode(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits a matrix into the bitmap and the values of its nonzeros.

    Args:
      dense: (out, in), float16 or bfloat16. Zeros of either sign are not stored; NaN
        and infinities are.

    Returns:
      The bitmap, uint8 (ceil(out * in / 8),), and the values, (nnz,) of dense's dtype.

    Raises:
      ValueError: dense is no matrix of one of these dtypes.
    """
    dense = np.ascontiguousarray(dense)
    if dense.ndim != 2 or dense.dtype not in _DTYPES.values():
        raise ValueError(
            "a sparse weight must be a float16 or bfloat16 matrix, got "
            f"{dense.dtype} of shape {dense.shape}"
        )
    flat = dense.reshape(-1)
    bits = flat.view(np.uint16)
    bitmap = np.empty(-(-flat.size // 8), np.uint8)
    values = []
    for start in range(0, flat.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        # The bit patterns decide, so that no flushing of subnormals can interfere.
        stored = (bits[block] & 0x7FFF) != 0
        packed = np.packbits(stored, bitorder="little")
        bitmap[start // 8 : start // 8 + packed.size] = packed
        values.append(np.compress(stored, flat[block]))
    return bitmap, np.concatenate(values) if values else flat


def decode(
    bitmap: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int],
    dtype: np.dtype | None = None,
    name: str = "sparse weight",
) -> np.ndarray:
    """Rebuilds the matrix that encode() split.

    Args:
      bitmap: uint8 (ceil(out * in / 8),).
      values: float16 or bfloat16 (nnz,).
      shape: (out, in).
      dtype: what the metadata promises of values; None accepts either dtype.
      name: for error messages.

    Returns:
      The dense matrix, (out, in) of values' dtype.

    Raises:
      CheckpointError: the parts contradict each other.
    """
    size = math.prod(shape)
    _expect(bitmap.dtype == np.uint8, name, "bitmap dtype", "uint8", bitmap.dtype)
    expected_shape = (-(-size // 8),)
    _expect(
        bitmap.shape == expected_shape,
        name,
        f"bitmap shape for a weight of shape {tuple(shape)}",
        expected_shape,
        bitmap.shape,
    )
    dtypes = list(_DTYPES.values()) if dtype is None else [np.dtype(dtype)]
    expected_dtypes = " or ".join(d.name for d in dtypes)
    _expect(values.dtype in dtypes, name, "values dtype", expected_dtypes, values.dtype)
    _expect(values.ndim == 1, name, "values rank", 1, values.ndim)
    if size % 8:
        unused = int(bitmap[-1]) >> (size % 8)
        _expect(unused == 0, name, "unused bits of the bitmap", 0, unused)
    stored = int(np.bitwise_count(bitmap).sum(dtype=np.int64))
    _expect(
        stored == values.size,
        name,
        "number of values (bits set in the bitmap)",
        stored,
        values.size,
    )
    dense = np.zeros(size, values.dtype)
    done = 0
    for start in range(0, size, _BLOCK):
        part = bitmap[start // 8 : (start + _BLOCK) // 8]
        mask = np.unpackbits(part, bitorder="little")
        # Several times as fast as assigning through the mask.
        places = np.flatnonzero(mask.view(np.bool_))
        dense[start : start + _BLOCK][places] = values[done : done + places.size]
        done += places.size
    return dense.reshape(shape)


def to_arrays(matrix: "SparseMatrix") -> dict[str, np.ndarray]:
    """Gives the canonical arrays of a SparseMatrix, for any store of arrays.

    Args:
      matrix: (in_features, out_features).

    Returns:
      {"flashjax_sparse": int32 () the version, "shape": int64 (2,) (out, in),
      "bitmap": see encode(), "values": see encode()}.
    """
    bitmap, values = encode(np.asarray(matrix.to_dense()).T)
    return {
        TREE_KEY: np.asarray(VERSION, np.int32),
        "shape": np.asarray(matrix.shape[::-1], np.int64),
        "bitmap": bitmap,
        "values": values,
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> "SparseMatrix":
    """Packs what to_arrays() gave.

    Raises:
      CheckpointError: the arrays are incomplete, contradict each other or are of an
        unknown version.
    """
    from flashjax.sparse_matrix import SparseMatrix

    expected = [TREE_KEY, "bitmap", "shape", "values"]
    ok = isinstance(arrays, Mapping) and sorted(arrays) == sorted(expected)
    got = sorted(arrays) if isinstance(arrays, Mapping) else _kind(arrays)
    _expect(ok, "sparse weight", "arrays", expected, got)
    parts = {name: np.asarray(array) for name, array in arrays.items()}
    version, shape = parts[TREE_KEY].tolist(), parts["shape"].tolist()
    _expect(version == VERSION, "sparse weight", "version", VERSION, version)
    ok = isinstance(shape, list) and len(shape) == 2
    ok = ok and all(type(n) is int and n >= 0 for n in shape)
    _expect(ok, "sparse weight", "shape", "(out, in)", shape)
    return SparseMatrix.from_dense(
        decode(parts["bitmap"], parts["values"], (shape[0], shape[1])).T
    )


def export_tree(tree: Any) -> Any:
    """Replaces every SparseMatrix of a pytree by its canonical arrays.

    What comes out holds arrays alone and can be stored by orbax or any other store; it
    still loads when the packed layout has changed. For an NNX model::

        arrays = export_tree(nnx.to_pure_dict(nnx.state(model)))

    Args:
      tree: any pytree.

    Returns:
      The tree, with the dicts of to_arrays() for SparseMatrix.
    """
    from flashjax.sparse_matrix import SparseMatrix

    def is_matrix(node):
        return isinstance(node, SparseMatrix)

    return jax.tree.map(
        lambda node: to_arrays(node) if is_matrix(node) else node,
        tree,
        is_leaf=is_matrix,
    )


def import_tree(tree: Any) -> Any:
    """Undoes export_tree(); the matrices are packed for this version of FlashJAX.

    Raises:
      CheckpointError: see from_arrays().
    """

    def is_export(node):
        return isinstance(node, Mapping) and TREE_KEY in node

    return jax.tree.map(
        lambda node: from_arrays(node) if is_export(node) else node,
        tree,
        is_leaf=is_export,
    )


def format_metadata(entries: Mapping[str, SparseEntry]) -> dict[str, str]:
    """The safetensors metadata of a file that holds these sparse weights."""
    sparse = {
        name: {"shape": list(entry.shape), "dtype": np.dtype(entry.dtype).name}
        for name, entry in entries.items()
    }
    content = {"format": FORMAT, "version": VERSION, "sparse": sparse}
    # "format": "pt" is what Hugging Face's own readers look for.
    return {"format": "pt", METADATA_KEY: json.dumps(content)}


def parse_metadata(
    metadata: Mapping[str, str] | None, source: str = "checkpoint"
) -> dict[str, SparseEntry]:
    """Reads the sparse weights' shapes and dtypes out of safetensors metadata.

    Args:
      metadata: a file's metadata; a file without our key has no sparse weights.
      source: for error messages.

    Returns:
      The entries by the weight's name.

    Raises:
      CheckpointError: the metadata is malformed, or of an unknown format or version.
    """
    if not metadata or METADATA_KEY not in metadata:
        return {}
    try:
        content = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: metadata {METADATA_KEY!r}: expected JSON, got "
            f"{metadata[METADATA_KEY][:40]!r}"
        ) from error
    what = f"{source}: metadata {METADATA_KEY!r}"
    _expect(isinstance(content, dict), what, "type", "object", _kind(content))
    _expect(
        content.get("format") == FORMAT, what, "format", FORMAT, content.get("format")
    )
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{what}: expected version {VERSION}, got {version!r}; a newer FlashJAX "
            "may be able to read it"
        )
    sparse = content.get("sparse")
    _expect(isinstance(sparse, dict), what, "'sparse'", "object", _kind(sparse))
    return {name: _parse_entry(what, name, entry) for name, entry in sparse.items()}


def _parse_entry(what: str, name: str, entry: Any) -> SparseEntry:
    _expect(isinstance(entry, dict), what, f"entry {name!r}", "object", _kind(entry))
    shape, dtype = entry.get("shape"), entry.get("dtype")
    ok = isinstance(shape, list) and len(shape) == 2
    ok = ok and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    _expect(ok, what, f"shape of {name!r}", "two sizes below 2**31", shape)
    ok = isinstance(dtype, str) and dtype in _DTYPES
    _expect(ok, what, f"dtype of {name!r}", "float16 or bfloat16", dtype)
    return SparseEntry((shape[0], shape[1]), _DTYPES[dtype])


def _expect(ok: bool, where: str, what: str, expected: object, got: object) -> None:
    if not ok:
        raise CheckpointError(f"{where}: {what}: expected {expected}, got {got!s:.80}")


def _kind(value: object) -> str:
    return {dict: "object", list: "array", str: "string", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )


class CheckpointReader:
    """Reads the safetensors of a model folder tensor by tensor.

    Files are memory-mapped; only what load() returns is held. Sharded folders are read
    through their index. A sparse weight appears under its own name, decoded.

    Attributes:
      folder: the folder.
      sparse: the sparse weights' entries by name.
    """

    def __init__(self, folder: str | os.PathLike):
        """Opens the folder and checks every header.

        Args:
          folder: holds model.safetensors, or model.safetensors.index.json with shards.

        Raises:
          CheckpointError: there is no such folder or file, or one is truncated, lies
            about its content or is of an unknown version.
        """
        self.folder = Path(folder)
        self.sparse: dict[str, SparseEntry] = {}
        self._files: dict[str, safe_open] = {}
        self._tensors: dict[str, str] = {}
        expected: dict[str, str] = {}
        for file_name, names in _safetensors_files(self.folder).items():
            path = self.folder / file_name
            try:
                file = safe_open(path, framework="np")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: expected a whole safetensors file, got {error}"
                ) from error
            self._files[file_name] = file
            tensors = set(file.keys())
            entries = parse_metadata(file.metadata(), str(path))
            for name in entries:
                parts = {f"{name}.bitmap", f"{name}.values"}
                for part in sorted(parts - tensors):
                    raise CheckpointError(f"{path}: the tensor {part!r} is missing")
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: {name!r} is stored both sparse and dense"
                    )
                tensors = tensors - parts | {name}
            for name in tensors:
                if name in self._tensors:
                    raise CheckpointError(
                        f"{path}: {name!r} is also in {self._tensors[name]}"
                    )
                self._tensors[name] = file_name
            self.sparse.update(entries)
            expected.update(dict.fromkeys(names, file_name))
        # The index names the tensors as stored or, for sparse ones, their two parts.
        for name, file_name in expected.items():
            if name not in self._files[file_name].keys():  # noqa: SIM118
                raise CheckpointError(
                    f"{self.folder / file_name}: the tensor {name!r}, which "
                    f"{INDEX_NAME} puts there, is missing"
                )

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def close(self) -> None:
        """Drops the mapped files."""
        self._files.clear()

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The dense shape of a tensor."""
        if name in self.sparse:
            return self.sparse[name].shape
        return tuple(self._slice(name, name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor."""
        if name in self.sparse:
            return self.sparse[name].dtype
        dtype = self._slice(name, name).get_dtype()
        expected = ", ".join(_SAFETENSORS_DTYPES)
        _expect(dtype in _SAFETENSORS_DTYPES, name, "dtype", expected, dtype)
        return _SAFETENSORS_DTYPES[dtype]

    def nnz(self, name: str) -> int:
        """The number of stored values of a sparse weight, from the file's header."""
        shape = self._slice(name, f"{name}.values").get_shape()
        _expect(len(shape) == 1, name, "values rank", 1, len(shape))
        return shape[0]

    def stored_bytes(self, name: str) -> int:
        """The bytes a tensor takes on disk, bitmap included."""
        if name in self.sparse:
            size = math.prod(self.shape(name))
            return -(-size // 8) + self.nnz(name) * self.dtype(name).itemsize
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def load(self, name: str) -> np.ndarray:
        """Reads one tensor; a sparse weight comes decoded, (out, in).

        Raises:
          KeyError: there is no such tensor.
          CheckpointError: the stored parts contradict each other.
        """
        self.dtype(name)
        stored = [name]
        if name in self.sparse:
            stored = [f"{name}.bitmap", f"{name}.values"]
        path = self.folder / self._tensors[name]
        try:
            # A mapping of its own, so that the pages read do not stay resident.
            with safe_open(path, framework="np") as file:
                parts = [file.get_tensor(part) for part in stored]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder}: {name}: {error}") from error
        if name not in self.sparse:
            return parts[0]
        entry = self.sparse[name]
        bitmap, values = parts
        return decode(
            bitmap, values, entry.shape, entry.dtype, f"{self.folder}: {name}"
        )

    def _slice(self, name: str, part: str):
        return self._files[self._tensors[name]].get_slice(part)


def _safetensors_files(folder: Path) -> dict[str, list[str]]:
    """The safetensors files of a folder and the tensors its index puts there."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise CheckpointError(f"{folder}: expected a model folder, got {what}")
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        if (folder / WEIGHTS_NAME).is_file():
            return {WEIGHTS_NAME: []}
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{folder}: expected {WEIGHTS_NAME} or {INDEX_NAME}, got {found}"
        )
    weight_map: Any = read_json(index_path).get("weight_map")
    ok = isinstance(weight_map, dict) and len(weight_map) > 0
    _expect(ok, str(index_path), "'weight_map'", "names and files", _kind(weight_map))
    files: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        # Only plain names: an index must not make us read outside its folder.
        plain = isinstance(file_name, str) and file_name == os.path.basename(file_name)
        plain = plain and file_name.endswith(".safetensors") and "\0" not in file_name
        where = f"{index_path}: file of {name!r}"
        _expect(plain, where, "name", "a .safetensors file of the folder", file_name)
        if file_name not in files and not (folder / file_name).is_file():
            raise CheckpointError(f"{index_path}: the file {file_name} is missing")
        files.setdefault(file_name, []).append(name)
    return files


def read_json(path: str | os.PathLike) -> dict:
    """Reads a JSON object.

    Raises:
      CheckpointError: the file cannot be read or holds no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable file: {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    _expect(isinstance(content, dict), str(path), "content", "object", _kind(content))
    return content


class CheckpointWriter:
    """Writes tensors into a folder's safetensors, sharded, holding one shard at most.

    Use it inside atomic_folder(), and call close() once everything was added.
    """

    def __init__(self, folder: str | os.PathLike, shard_bytes: int = 1 << 30):
        """Starts to write.

        Args:
          folder: an existing folder.
          shard_bytes: a shard is written once it has so many bytes.
        """
        self._folder = Path(folder)
        self._shard_bytes = shard_bytes
        self._tensors: dict[str, np.ndarray] = {}
        self._entries: dict[str, SparseEntry] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds a dense tensor."""
        self._add({name: np.ascontiguousarray(array).reshape(np.shape(array))})

    def add_sparse(self, name: str, dense: np.ndarray) -> None:
        """Adds a weight, (out, in) float16 or bfloat16, in its sparse form."""
        bitmap, values = encode(dense)
        self._entries[name] = SparseEntry(dense.shape, dense.dtype)
        self._add({f"{name}.bitmap": bitmap, f"{name}.values": values})

    def close(self) -> int:
        """Writes what is left and the index.

        Returns:
          The number of bytes of all tensors as stored.
        """
        if self._tensors or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self._folder / WEIGHTS_NAME)
            return self._total_bytes
        weight_map = {}
        for i, names in enumerate(self._shards):
            file_name = f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors"
            self._part(i).rename(self._folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        return self._total_bytes

    def _add(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors.update(tensors)
        self._total_bytes += sum(t.nbytes for t in tensors.values())
        if sum(t.nbytes for t in self._tensors.values()) >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        # safetensors would make the file readable for its owner alone.
        path.touch()
        mode = path.stat().st_mode
        save_file(self._tensors, path, metadata=format_metadata(self._entries))
        path.chmod(mode)
        self._shards.append(list(self._tensors))
        self._tensors, self._entries = {}, {}

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index:05}.safetensors"
