"""Writing tensors into safetensors files."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flashjax.atomic_folder import sync_file

from .checksums import checksum
from .encoding import encode
from .metadata import SparseEntry, format_metadata
from .reader import INDEX_NAME, WEIGHTS_NAME


class CheckpointWriter:
    """Writes tensors into a folder's safetensors, sharded.

    A shard is written while the next one is added: two are held at most. Use it as a
    context manager inside atomic_folder(), and call close() once everything was added.
    What goes wrong while a shard is written is raised by what is called next. When the
    context has ended, by an error too, nothing is being written any more.
    """

    def __init__(self, folder: str | os.PathLike[str], shard_bytes: int = 1 << 30):
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
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

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
        self._wait()
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
        self._wait()
        path = self._part(len(self._shards))
        # To the disk at once, while nobody waits for it; at the end all would.
        self._writing = self._pool.submit(
            save_and_sync, path, self._tensors, self._entries
        )
        self._shards.append(list(self._tensors))
        self._tensors, self._entries = {}, {}

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index:05}.safetensors"


def save_tensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    entries: Mapping[str, SparseEntry],
) -> None:
    """Writes a safetensors file: equal content gives equal bytes.

    Args:
      path: of the file.
      tensors: what it holds, sparse weights in their two parts.
      entries: shapes and dtypes of the sparse weights.
    """
    # safetensors would make the file readable for its owner alone.
    path.touch()
    mode = path.stat().st_mode
    checksums = {name: checksum(array) for name, array in tensors.items()}
    save_file(dict(tensors), path, metadata=format_metadata(entries, checksums))
    path.chmod(mode)
    _sort_metadata(path)


def save_and_sync(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    entries: Mapping[str, SparseEntry],
) -> None:
    """The same; returns when the file is on the disk."""
    save_tensors(path, tensors, entries)
    sync_file(path)


def _sort_metadata(path: Path) -> None:
    # safetensors writes the metadata's keys in an order that changes from run to run.
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        content = text.encode().ljust(size)
        if len(content) == size:
            file.seek(8)
            file.write(content)
