"""Reading one safetensors file."""

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from flashjax import _native
from flashjax.atomic_folder import CheckpointError

from .arrays import DTYPES
from .checks import expect
from .checksums import in_parts

# How a text of Git LFS begins.
_LFS_POINTER = b"version https://git-lfs"
# Bytes that are read at a time: the checksum then finds them in the cache.
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class _Stored:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # in the file


class TensorFile:
    """A safetensors file: its header, which the library checks, and its tensors.

    Tensors are read, not mapped: the library copies from a mapping and holds the
    interpreter meanwhile, so that a disk would keep all threads waiting.

    Attributes:
      path: of the file.
      metadata: of the header, texts by name.
    """

    def __init__(self, path: Path):
        """Reads the header.

        Raises:
          CheckpointError: the file cannot be read, or its header lies.
        """
        self.path = path
        try:
            # Opened first: of one that may not be read the library says that it is not
            # there.
            if is_lfs_pointer(path):
                raise ValueError("a Git LFS pointer to one (git lfs pull downloads it)")
            # It checks that names, shapes and places fit the file and each other.
            with safe_open(path, framework="np") as checked:
                self.metadata: Mapping[str, str] = checked.metadata() or {}
                names = set(checked.keys())
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{path}: expected a whole safetensors file, got {reason}"
            ) from error
        self._stored = {
            name: _Stored(
                entry["dtype"],
                tuple(entry["shape"]),
                8 + size + entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name in names
        }

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> list[str]:
        """The names of all tensors, as stored."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._stored[name].shape

    def begin(self, name: str) -> int:
        """Where in the file a tensor begins."""
        return self._stored[name].begin

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
          CheckpointError: it is none that a model's tensors have.
        """
        dtype = self._stored[name].dtype
        expected = ", ".join(DTYPES)
        expect(dtype in DTYPES, f"{self.path}: {name}", "dtype", expected, dtype)
        return DTYPES[dtype]

    def read(self, name: str, checksums: Mapping[str, int]) -> np.ndarray:
        """Reads a tensor.

        Args:
          name: of the tensor in the file.
          checksums: those that tensors of the file were written with, by name.

        Raises:
          CheckpointError: it has another dtype than a model's tensors, or another
            checksum than it was written with, or the file has become shorter.
        """
        where = f"{self.path}: {name}"
        stored = self._stored[name]
        dtype = self.dtype(name)
        content = _native.cpu.empty_bytes(math.prod(stored.shape) * dtype.itemsize)
        data = content.data

        def read_part(start: int, stop: int) -> int:
            found = 0
            with open(self.path, "rb", buffering=0) as file:
                file.seek(stored.begin + start)
                while start < stop:
                    block = data[start : min(start + _BLOCK, stop)]
                    count = file.readinto(block)
                    expect(bool(count), where, "bytes", len(data), "fewer")
                    if name in checksums:
                        found = zlib.crc32(block[:count], found)
                    start += count
            return found

        try:
            found = in_parts(read_part, len(data))
        except OSError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if name in checksums:
            what, expected = "checksum of the content", checksums[name]
            expect(found == expected, where, what, expected, found)
        return content.view(dtype).reshape(stored.shape)

    def announce(self) -> None:
        """Has the system read the file ahead; takes as long as it takes to ask for."""
        if not hasattr(os, "posix_fadvise"):
            return
        try:
            with open(self.path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # reading will say what is wrong


def is_lfs_pointer(path: Path) -> bool:
    """Whether git has a text in the place of a file, which was not downloaded."""
    with open(path, "rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER
