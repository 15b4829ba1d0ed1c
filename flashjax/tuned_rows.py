"""Up to how many rows of x a kernel is used, as `flashjax.autotune` timed it.

One JSON file for all devices, read when a product is lowered::

    {"version": 1, "devices": {"NVIDIA H200": [{"in_features": 7168, ...}]}}

Where it says nothing of a matrix, `matmul_impl` has the number that is usual.
"""

import dataclasses
import functools
import json
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flashjax
from flashjax import _native
from flashjax.devices import cpu_count, device_name
from flashjax.file_lock import locked
from flashjax.user_files import user_cache, write_json

_VERSION = 1
_VARIABLE = "FLASHJAX_TUNING"
# Of the elements, by which a matrix may store more or less than the one that was timed.
_ALIKE = 0.05
# And by which it is the same, so that what is new takes the place of what was known.
_SAME = 0.005
_KINDS: dict[tuple[str, ...], Any] = {
    ("in_features", "out_features", "kernel_rows"): int,
    ("stored",): (int, float),
    ("dtype", "layout", "flashjax"): str,
}


@dataclasses.dataclass(frozen=True)
class TunedRows:
    """What was found for matrices like one.

    Attributes:
      in_features, out_features: of the matrix.
      dtype: "float16" or "bfloat16".
      layout: of its packed arrays.
      stored: values that it stores, explicit zeros included, by its elements.
      kernel_rows: rows of x up to which its kernel is faster than expanding it.
      flashjax: the version whose kernels were timed.
    """

    in_features: int
    out_features: int
    dtype: str
    layout: str
    stored: float
    kernel_rows: int
    flashjax: str

    def __post_init__(self):
        for names, kinds in _KINDS.items():
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kinds) or isinstance(value, bool):
                    raise ValueError(f"{name} {value!r}")
        if not (math.isfinite(self.stored) and self.stored >= 0):
            raise ValueError(f"stored {self.stored!r}")
        if self.kernel_rows < 0:
            raise ValueError(f"kernel_rows {self.kernel_rows!r}")

    def is_for(self, other: "TunedRows", within: float = _ALIKE) -> bool:
        """Whether it counts for a matrix: the same but for the number of values."""
        same = dataclasses.replace(
            other, stored=self.stored, kernel_rows=self.kernel_rows
        )
        return self == same and abs(self.stored - other.stored) <= within


def describe(
    shape: tuple[int, int],
    dtype: np.dtype,
    layout: str,
    stored: float,
    kernel_rows: int = 0,
) -> TunedRows:
    """Of a matrix, and the kernels of this version."""
    k, m = shape
    version = flashjax.__version__
    return TunedRows(k, m, np.dtype(dtype).name, layout, stored, kernel_rows, version)


def find(device: str | None, wanted: TunedRows) -> int | None:
    """The number of rows for a matrix on a device; None if it was not timed."""
    alike = [entry for entry in known(device) if entry.is_for(wanted)]
    if not alike:
        return None
    return min(alike, key=lambda entry: abs(entry.stored - wanted.stored)).kernel_rows


def known(device: str | None) -> list[TunedRows]:
    """All that is known of a device with the kernels of this version."""
    devices, problem = _read(*_place())
    if problem:  # a file that is wrong must not stop a product
        warnings.warn(f"not used: {problem}", stacklevel=2)
    entries = devices.get(device, []) if device else []
    return [entry for entry in entries if entry.flashjax == flashjax.__version__]


@functools.cache
def device_kind(platform: str) -> str | None:
    """What the file calls the first device of a platform; None if there is none."""
    try:
        return kind_of(jax.local_devices(backend=platform)[0])
    except RuntimeError:
        return None


def kind_of(device: jax.Device) -> str:
    """What the file calls a device: what kernels take as long on has one name."""
    if device.platform != "cpu":
        return device.device_kind
    return f"{device_name(device)}, {_native.cpu.simd()}, {cpu_count()} cores"


def file() -> Path | None:
    """`$FLASHJAX_TUNING`, or a file in the user's cache; None if that is empty."""
    path, _ = _place()
    return path


def _place() -> tuple[Path | None, bool]:
    """The file, and whether somebody named it."""
    named = os.environ.get(_VARIABLE)
    if named is not None:
        return (Path(named).expanduser() if named else None), True
    return user_cache() / "tuning.json", False


def add(device: str, found: Iterable[TunedRows]) -> None:
    """Writes what was found, in the place of what was known of the same matrices.

    Of processes that do so at a time each waits for the other. Nothing is written where
    there is to be no file; without anything found it is only tried.

    Raises:
      ValueError: the file is there, but is none of ours.
      OSError: it cannot be written.
    """
    path = file()
    if path is None:
        return
    path = path.resolve()  # what a link stands for is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f"{path.name}.lock")):
        devices = _parse(path) if path.exists() else {}
        for new in found:
            kept = [
                entry
                for entry in devices.get(device, [])
                if not new.is_for(entry, within=_SAME)
            ]
            devices[device] = [*kept, new]
        content = {
            "version": _VERSION,
            "devices": {
                name: [dataclasses.asdict(entry) for entry in entries]
                for name, entries in devices.items()
            },
        }
        write_json(path, content)
    forget()


def forget() -> None:
    """Reads the file again when it is asked for next."""
    _read.cache_clear()


@functools.cache
def _read(path: Path | None, is_named: bool) -> tuple[dict[str, list[TunedRows]], str]:
    """What the file has, and what is wrong with it."""
    try:
        return ({} if path is None else _parse(path)), ""
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except OSError as error:
        # Another user's cache, say, where nobody asked for it.
        return {}, str(error) if is_named else ""
    except ValueError as error:
        return {}, str(error)


def _parse(path: Path) -> dict[str, list[TunedRows]]:
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}")
        return {
            str(device): [TunedRows(**entry) for entry in entries]
            for device, entries in content["devices"].items()
        }
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"{path}: expected what flashjax.autotune writes, version {_VERSION}, got "
            f"{type(error).__name__}: {str(error)[:80]}"
        ) from error
