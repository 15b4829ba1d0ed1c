"""Writing tensors into safetensors files."""

import contextlib
import json
import operator
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import save_file

from flashjax.atomic_folder import CheckpointError, sync_file

from .arrays import as_stored, check_name, may_change, native
from .checksums import checksum
from .encoding import encode
from .metadata import SparseEntry, format_metadata
from .reader import INDEX_NAME, PARTS, WEIGHTS_NAME

# The names of all that a writer makes, while it writes and at the end.
_WEIGHTS = re.compile(
    rf"{re.escape(WEIGHTS_NAME)}|{re.escape(INDEX_NAME)}"
    r"|(model-\d+-of-\d+|part-\d+)\.safetensors"
)


class CheckpointWriter:
    """Writes tensors into a folder's safetensors, sharded.

    A shard is written while the next one is added: two are held at most. Use it as a
    context manager inside atomic_folder(), and call close() once everything was added;
    a block that ends without an error closes by itself. What goes wrong while a shard
    is written is raised by what is called next. When the context has ended, by an error
    too, nothing is being written any more; after an error none of the writer's files
    are left.
    """

    def __init__(self, folder: str | os.PathLike[str], shard_bytes: int = 1 << 30):
        """Starts to write.

        Args:
          folder: an existing folder without weights.
          shard_bytes: a shard is written once it has so many bytes.

        Raises:
          CheckpointError: there is no such folder, or it holds weights: a reader could
            take those for what is written here.
          ValueError: shard_bytes is no whole number of at least 1.
        """
        try:
            whole = operator.index(shard_bytes)
        except TypeError:
            whole = 0
        if whole < 1 or isinstance(shard_bytes, bool):
            raise ValueError(
                "CheckpointWriter: expected shard_bytes of at least 1, got "
                f"{shard_bytes!r}"
            )
        self._folder = Path(folder)
        self._shard_bytes = shard_bytes
        self._files: list[Path] = []  # made by this writer
        self._check_folder()
        self._names: set[str] = set()  # sparse weights' own and those of their parts
        self._tensors: dict[str, np.ndarray] = {}
        self._entries: dict[str, SparseEntry] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._ended = ""  # how

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *unused: object) -> None:
        if self._ended:
            return
        if error is None:
            self.close()
        else:
            self._give_up()

    def add(self, name: str, array: ArrayLike) -> None:
        """Adds a dense tensor.

        An array that could be changed before it is written is copied; of JAX's none is.

        Args:
          name: of the tensor.
          array: of a dtype that CheckpointReader reads.

        Raises:
          TypeError: array is no array.
          CheckpointError: the array has another dtype, or the name was added before, or
            the writer was closed.
        """
        self._check_new(name)
        stored = as_stored(name, array)
        fresh = isinstance(array, np.ndarray) and not np.may_share_memory(stored, array)
        if may_change(stored) and not fresh:
            stored = stored.copy()
        self._add(name, {name: stored})

    def add_sparse(self, name: str, dense: ArrayLike) -> None:
        """Adds a weight in its sparse form.

        Args:
          name: of the weight.
          dense: (out, in) float16 or bfloat16; of a SparseMatrix w, w.to_dense().T.

        Raises:
          TypeError: dense is no array.
          ValueError: it is no matrix of one of these dtypes.
          CheckpointError: the name was added before, or the writer was closed.
        """
        self._check_new(name, *(f"{name}.{part}" for part in PARTS))
        dense = native(name, dense)
        bitmap, values = encode(dense)
        out_features, in_features = dense.shape
        self._entries[name] = SparseEntry((out_features, in_features), dense.dtype)
        self._add(name, {f"{name}.bitmap": bitmap, f"{name}.values": values})

    def close(self) -> int:
        """Writes what is left and the index; does nothing when called again.

        Returns:
          The number of bytes of all tensors as stored.

        Raises:
          CheckpointError: the folder has got weights from elsewhere, or the writer has
            failed before.
        """
        if self._ended == "closed":
            return self._total_bytes
        self._check_open()
        try:
            self._finish()
        except BaseException:
            self._give_up()
            raise
        self._ended = "closed"
        self._pool.shutdown()
        return self._total_bytes

    def _finish(self) -> None:
        if self._tensors or not self._shards:
            self._flush()
        self._wait()
        self._check_folder()
        if len(self._shards) == 1:
            self._rename_part(0, WEIGHTS_NAME)
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file_name = f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors"
            self._rename_part(i, file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        self._files.append(self._folder / INDEX_NAME)
        self._files[-1].write_text(json.dumps(index, indent=2) + "\n")

    def _give_up(self) -> None:
        self._ended = "failed"
        self._pool.shutdown()
        for file in self._files:
            # What has failed is what should be raised.
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)

    def _check_folder(self) -> None:
        folder = self._folder
        if not folder.is_dir():
            what = "a file" if folder.exists() else "nothing"
            raise CheckpointError(f"{folder}: expected an existing folder, got {what}")
        own = {file.name for file in self._files}
        names = {file.name for file in folder.iterdir()} - own
        found = sorted(filter(_WEIGHTS.fullmatch, names))
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise CheckpointError(
                f"{folder}: expected a folder without weights, got one that holds "
                f"{', '.join(found[:3])}{more}"
            )

    def _check_open(self) -> None:
        if self._ended:
            raise CheckpointError(
                f"{self._folder}: expected a writer that is open, got one that has "
                f"{self._ended}"
            )

    def _check_new(self, name: str, *parts: str) -> None:
        check_name(name)
        self._check_open()
        for taken in (name, *parts):
            if taken in self._names:
                raise CheckpointError(
                    f"{self._folder}: expected every tensor once, got {taken!r} twice"
                )

    def _add(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        self._names.update([name, *tensors])
        self._tensors.update(tensors)
        self._total_bytes += sum(t.nbytes for t in tensors.values())
        if sum(t.nbytes for t in self._tensors.values()) >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        self._wait()
        self._check_folder()
        path = self._part(len(self._shards))
        self._files.append(path)
        # To the disk at once, while nobody waits for it; at the end all would.
        self._writing = self._pool.submit(
            save_and_sync, path, self._tensors, self._entries
        )
        self._shards.append(list(self._tensors))
        self._tensors, self._entries = {}, {}

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _rename_part(self, index: int, name: str) -> None:
        self._part(index).rename(self._folder / name)
        self._files.append(self._folder / name)

    def _part(self, index: int) -> Path:
        return self._folder / f"part-{index:05}.safetensors"


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike],
    entries: Mapping[str, SparseEntry],
) -> None:
    """Writes a safetensors file: equal content gives equal bytes.

    Args:
      path: of the file.
      tensors: what it holds, sparse weights in their two parts.
      entries: shapes and dtypes of the sparse weights.

    Raises:
      TypeError: a tensor is no array.
      CheckpointError: a tensor has a name or a dtype that a file cannot have; nothing
        was written.
    """
    path = Path(path)
    stored = {name: as_stored(name, array) for name, array in tensors.items()}
    checksums = {name: checksum(array) for name, array in stored.items()}
    # safetensors would make the file readable for its owner alone.
    path.touch()
    mode = path.stat().st_mode
    save_file(stored, path, metadata=format_metadata(entries, checksums))
    path.chmod(mode)
    _sort_metadata(path)


def save_and_sync(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike],
    entries: Mapping[str, SparseEntry],
) -> None:
    """The same; returns when the file is on the disk."""
    save_tensors(path, tensors, entries)
    sync_file(Path(path))


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
