"""Reads pytorch_model*.bin; needs torch, which is an optional dependency."""

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flashjax.checkpoint import CheckpointError, read_json

WEIGHTS_NAME = "pytorch_model.bin"
INDEX_NAME = "pytorch_model.bin.index.json"

# A mapped file is mapped anew once so much of it was read, or it would stay resident.
_MAX_RESIDENT_BYTES = 64 << 20


def has_torch_weights(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds weights in PyTorch's format."""
    return any((Path(folder) / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME))


class TorchReader:
    """Reads a folder's pickled state dicts, one file at a time.

    Files are opened with ``weights_only``, so that nothing in them is executed, and
    mapped into memory where their format allows it.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Reads the names, shapes and dtypes of all tensors.

        Args:
          folder: holds pytorch_model.bin or pytorch_model.bin.index.json with shards.

        Raises:
          CheckpointError: torch is missing or older than 2.6, or a file is missing,
            damaged or no state dict.
        """
        self._folder = Path(folder)
        self._torch = _import_torch(self._folder)
        self._file_name: str | None = None
        self._tensors: dict[str, Any] = {}
        self._resident_bytes = 0
        self._files: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype] = {}
        for file_name, expected in self._list_files().items():
            self._open(file_name)
            for name, tensor in self._tensors.items():
                if name in self._files:
                    raise CheckpointError(
                        f"{self._folder / file_name}: {name!r} is also in "
                        f"{self._files[name]}"
                    )
                self._files[name] = file_name
                self._shapes[name] = tuple(tensor.shape)
                self._dtypes[name] = self._numpy_dtype(name, tensor)
            for name in expected:
                if name not in self._tensors:
                    raise CheckpointError(
                        f"{self._folder / file_name}: the tensor {name!r}, which "
                        f"{INDEX_NAME} puts there, is missing"
                    )

    def __enter__(self) -> "TorchReader":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def close(self) -> None:
        """Drops the open file."""
        self._file_name, self._tensors, self._resident_bytes = None, {}, 0

    def names(self) -> list[str]:
        """The names of all tensors, file by file."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor."""
        return self._dtypes[name]

    def load(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        self._open(self._files[name])
        tensor = self._tensors[name].detach()
        if tensor.dtype == self._torch.bfloat16:
            bits = tensor.contiguous().view(self._torch.int16).numpy()
            array = bits.view(ml_dtypes.bfloat16).copy()
        else:
            array = tensor.numpy().copy()
        self._resident_bytes += array.nbytes
        if self._resident_bytes > _MAX_RESIDENT_BYTES:
            self.close()
        return array

    def _list_files(self) -> dict[str, list[str]]:
        index_path = self._folder / INDEX_NAME
        if not index_path.is_file():
            return {WEIGHTS_NAME: []}
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{index_path}: expected a 'weight_map' of names to files, got "
                f"{weight_map!r:.80}"
            )
        files: dict[str, list[str]] = {}
        for name, file_name in weight_map.items():
            # Only plain names: an index must not make us read outside its folder.
            if not isinstance(file_name, str) or file_name != Path(file_name).name:
                raise CheckpointError(
                    f"{index_path}: expected a file of the folder for {name!r}, got "
                    f"{file_name!r}"
                )
            if not (self._folder / file_name).is_file():
                raise CheckpointError(f"{index_path}: the file {file_name} is missing")
            files.setdefault(file_name, []).append(name)
        return files

    def _open(self, file_name: str) -> None:
        if file_name == self._file_name:
            return
        self.close()
        path = self._folder / file_name
        try:
            # The format of old torch releases, no zip file, cannot be mapped.
            tensors = self._torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),
            )
        except Exception as error:  # a damaged file makes torch raise any kind
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"{path}: expected a whole state dict saved by torch, got: {reason[0]}"
            ) from error
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, self._torch.Tensor)
            for name, tensor in tensors.items()
        ):
            raise CheckpointError(f"{path}: expected a state dict of tensors")
        for name, tensor in tensors.items():
            if tensor.layout != self._torch.strided:
                raise CheckpointError(
                    f"{path}: {name}: expected a dense tensor, zeros included, got "
                    f"{tensor.layout}"
                )
        self._file_name, self._tensors = file_name, tensors

    def _numpy_dtype(self, name: str, tensor: Any) -> np.dtype:
        if tensor.dtype == self._torch.bfloat16:
            return np.dtype(ml_dtypes.bfloat16)
        try:
            return np.dtype(str(tensor.dtype).removeprefix("torch."))
        except TypeError:
            raise CheckpointError(
                f"{self._folder}: {name}: expected float16, bfloat16 or float32, got "
                f"{tensor.dtype}"
            ) from None


def _import_torch(folder: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{folder}: the weights are in PyTorch's format, which needs torch: "
            "pip install 'flashjax[torch]', or convert them to safetensors"
        ) from error
    version = str(torch.__version__)
    if not _is_safe(version):
        raise CheckpointError(
            f"{folder}: the weights are in PyTorch's format, which needs torch 2.6 or "
            "newer, as older ones can be made to run code of the file "
            f"(CVE-2025-32434), got torch {version}: pip install 'flashjax[torch]', or "
            "convert them to safetensors"
        )
    return torch


def _is_safe(version: str) -> bool:
    """Whether `weights_only` holds what it promises: from 2.6.0 on."""
    found = re.match(r"(\d+)\.(\d+)(\.0(?:a|b|rc|\.dev))?", version)
    if found is None:
        return False
    return (int(found[1]), int(found[2]), found[3] is None) >= (2, 6, True)
