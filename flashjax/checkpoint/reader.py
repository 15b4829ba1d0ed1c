"""Reading the safetensors of a model folder."""

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flashjax.atomic_folder import CheckpointError
from flashjax.sparse_rows import SparseRows

from .checks import expect, kind, read_json
from .encoding import check_rows, count_bits
from .metadata import SparseEntry, parse_checksums, parse_metadata
from .tensor_file import TensorFile

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# What a sparse weight NAME is stored as: NAME.bitmap and NAME.values.
PARTS = ("bitmap", "values")


class CheckpointReader:
    """Reads the safetensors of a model folder tensor by tensor.

    Only what load() returns is held. Sharded folders are read through their index. A
    sparse weight appears under its own name, decoded.

    Attributes:
      folder: the folder.
      sparse: the sparse weights' entries by name.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens the folder and checks every header.

        Args:
          folder: holds model.safetensors, or model.safetensors.index.json with shards.

        Raises:
          CheckpointError: there is no such folder or file, or one is truncated, lies
            about its content or is of an unknown version.
        """
        self.folder = Path(folder)
        self.sparse: dict[str, SparseEntry] = {}
        self._files: dict[str, TensorFile] = {}
        self._tensors: dict[str, str] = {}
        self._checksums: dict[str, dict[str, int]] = {}
        # The system takes as long over it as over reading: nobody else should wait.
        self._announcer = ThreadPoolExecutor(1)
        self._announced: set[str] = set()
        self._lock = threading.Lock()
        expected: dict[str, str] = {}
        for file_name, names in _safetensors_files(self.folder).items():
            path = self.folder / file_name
            file = TensorFile(path)
            self._files[file_name] = file
            self._checksums[file_name] = parse_checksums(file.metadata, str(path))
            tensors = set(file.names())
            entries = parse_metadata(file.metadata, str(path))
            for name in entries:
                parts = {f"{name}.{part}" for part in PARTS}
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
            if name not in self._files[file_name]:
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
        """Forgets the files: nothing can be loaded any more."""
        self._announcer.shutdown(wait=False, cancel_futures=True)
        self._files.clear()

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._tensors)

    def names_as_stored(self) -> list[str]:
        """The same in the order of the files: so they are read fastest."""

        def place(name: str) -> tuple[str, int]:
            # Of a sparse weight the values are most of it.
            part = f"{name}.values" if name in self.sparse else name
            return self._tensors[name], self._file(name).begin(part)

        return sorted(self._tensors, key=place)

    def shape(self, name: str) -> tuple[int, ...]:
        """The dense shape of a tensor."""
        if name in self.sparse:
            return self.sparse[name].shape
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor."""
        if name in self.sparse:
            return self.sparse[name].dtype
        return self._file(name).dtype(name)

    def nnz(self, name: str) -> int:
        """The number of stored values of a sparse weight, from the file's header.

        Raises:
          KeyError: there is no such tensor.
          CheckpointError: it is stored dense, or the header lies.
        """
        self._check_sparse(name)
        shape = self._file(name).shape(f"{name}.values")
        where = f"{self.folder}: {name}"
        expect(len(shape) == 1, where, "values rank", 1, len(shape))
        return shape[0]

    def counted_nnz(self, name: str) -> int:
        """The same, but counted in the bitmap.

        Raises:
          KeyError: there is no such tensor.
          CheckpointError: it is stored dense, or bitmap and header contradict each
            other.
        """
        self._check_sparse(name)
        (bitmap,) = self._read(name, "bitmap")
        where = f"{self.folder}: {name}"
        expect(bitmap.dtype == np.uint8, where, "bitmap dtype", "uint8", bitmap.dtype)
        expected = (-(-math.prod(self.shape(name)) // 8),)
        expect(bitmap.shape == expected, where, "bitmap shape", expected, bitmap.shape)
        stored = count_bits(bitmap)
        found = self.nnz(name)
        what = "number of values (bits set in the bitmap)"
        expect(stored == found, where, what, stored, found)
        return stored

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
          CheckpointError: the stored parts contradict each other, or the reader was
            closed.
        """
        if name in self.sparse:
            return self.load_rows(name).to_dense()
        self._announce(name)
        return self._read(name)[0]

    def load_rows(self, name: str) -> SparseRows:
        """Reads one sparse weight as it is stored.

        Raises:
          KeyError: there is no such tensor.
          CheckpointError: it is stored dense, or the stored parts contradict each
            other, or the reader was closed.
        """
        self._check_sparse(name)
        entry = self.sparse[name]
        self._announce(name)
        bitmap, values = self._read(name, *PARTS)
        where = f"{self.folder}: {name}"
        return check_rows(bitmap, values, entry.shape, entry.dtype, where)

    def _file(self, name: str) -> TensorFile:
        file = self._files.get(self._tensors[name])
        if file is None:
            raise CheckpointError(
                f"{self.folder}: {name}: expected a reader that is open, got one that "
                "was closed"
            )
        return file

    def _check_sparse(self, name: str) -> None:
        ok = name in self.sparse or name not in self._tensors
        expect(ok, str(self.folder), repr(name), "a sparse weight", "a dense tensor")

    def _announce(self, name: str) -> None:
        """Has the system read a tensor's file and the next one ahead.

        Whoever reads one tensor is likely to read all.
        """
        self._file(name)  # not after close()
        shards = sorted(self._files)
        first = shards.index(self._tensors[name])
        with self._lock:
            for shard in shards[first : first + 2]:
                if shard not in self._announced:
                    self._announced.add(shard)
                    self._announcer.submit(self._files[shard].announce)

    def _read(self, name: str, *parts: str) -> list[np.ndarray]:
        stored = [f"{name}.{part}" for part in parts] or [name]
        checksums = self._checksums[self._tensors[name]]
        return [self._file(name).read(n, checksums) for n in stored]


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
    expect(ok, str(index_path), "'weight_map'", "names and files", kind(weight_map))
    files: dict[str, list[str]] = {}
    for name, file_name in weight_map.items():
        # Only plain names: an index must not make us read outside its folder.
        plain = isinstance(file_name, str) and file_name == os.path.basename(file_name)
        plain = plain and file_name.endswith(".safetensors") and "\0" not in file_name
        where = f"{index_path}: file of {name!r}"
        expect(plain, where, "name", "a .safetensors file of the folder", file_name)
        if file_name not in files and not (folder / file_name).is_file():
            raise CheckpointError(f"{index_path}: the file {file_name} is missing")
        files.setdefault(file_name, []).append(name)
    return files
