"""Up to how many rows of x a kernel is used, as `flashjax.autotune` timed it.

One JSON file for all devices, read when a product is lowered::

    {"version": 1, "devices": {"NVIDIA H200": [{"in_features": 7168, ...}]}}

Where it says nothing of a matrix, `matmul_impl` has the number that is usual.
"""

import dataclasses
import functools
import json
import os
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flashjax

_VERSION = 1
_VARIABLE = "FLASHJAX_TUNING"
# Of the elements, by which a matrix may store more or less than the one that was timed.
_ALIKE = 0.05
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

    def is_for(self, other: "TunedRows") -> bool:
        """Whether it counts for a matrix: the same but for the number of values."""
        same = dataclasses.replace(
            other, stored=self.stored, kernel_rows=self.kernel_rows
        )
        return self == same and abs(self.stored - other.stored) <= _ALIKE


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
    """All that is known of a device."""
    return _read_file(file()).get(device, []) if device else []


@functools.cache
def device_kind(platform: str) -> str | None:
    """What the file calls the devices of a platform; None if there are none."""
    if platform == "cpu":
        return f"CPU with {os.cpu_count()} cores"
    try:
        return jax.local_devices(backend=platform)[0].device_kind
    except RuntimeError:
        return None


def file() -> Path | None:
    """`$FLASHJAX_TUNING`, or a file in the user's cache; None if that is empty."""
    named = os.environ.get(_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "flashjax", "tuning.json")


def add(device: str, found: Iterable[TunedRows]) -> Path | None:
    """Writes what was found, in the place of what was known of such matrices.

    Returns:
      The file; None if there is to be none.

    Raises:
      ValueError: the file is there, but is none of ours.
      OSError: it cannot be written.
    """
    path = file()
    if path is None:
        return None
    devices = _parse(path) if path.exists() else {}
    kept = devices.get(device, [])
    for new in found:
        kept = [old for old in kept if not new.is_for(old)] + [new]
    devices[device] = kept
    content = {
        "version": _VERSION,
        "devices": {
            name: [dataclasses.asdict(entry) for entry in entries]
            for name, entries in devices.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _read_file.cache_clear()
    return path


@functools.cache
def _read_file(path: Path | None) -> dict[str, list[TunedRows]]:
    """Nothing if there is no such file; one that is wrong must not stop a product."""
    if path is None or not path.exists():
        return {}
    try:
        return _parse(path)
    except (OSError, ValueError) as error:
        warnings.warn(f"not used: {error}", stacklevel=2)
        return {}


def _parse(path: Path) -> dict[str, list[TunedRows]]:
    def fail(what: Any) -> ValueError:
        return ValueError(
            f"{path}: expected what flashjax.autotune writes, version {_VERSION}, "
            f"got {str(what)[:80]}"
        )

    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _VERSION:
            raise fail(f"version {content['version']}")
        return {
            str(device): [TunedRows(**entry) for entry in entries]
            for device, entries in content["devices"].items()
        }
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise fail(f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise fail(error) from error
