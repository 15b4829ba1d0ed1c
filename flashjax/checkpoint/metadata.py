"""What a safetensors file says about its sparse weights, as JSON."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from flashjax.atomic_folder import CheckpointError

from .arrays import HALF_DTYPES
from .checks import expect, kind, parse_json

FORMAT = "flashjax-sparse"
VERSION = 1
METADATA_KEY = "flashjax"


@dataclasses.dataclass(frozen=True)
class SparseEntry:
    """What the metadata says about one sparse weight.

    Attributes:
      shape: (out_features, in_features).
      dtype: float16 or bfloat16.
    """

    shape: tuple[int, int]
    dtype: np.dtype


def format_metadata(
    entries: Mapping[str, SparseEntry], checksums: Mapping[str, int] | None = None
) -> dict[str, str]:
    """The safetensors metadata of a file.

    Args:
      entries: its sparse weights.
      checksums: of its tensors by the name in the file; None leaves them out.
    """
    sparse = {
        name: {"shape": list(entry.shape), "dtype": np.dtype(entry.dtype).name}
        for name, entry in entries.items()
    }
    content = {"format": FORMAT, "version": VERSION, "sparse": sparse}
    if checksums is not None:
        content["crc32"] = dict(sorted(checksums.items()))
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
    content = _parse_content(metadata, source)
    if content is None:
        return {}
    what = _what(source)
    sparse: Any = content.get("sparse")
    expect(isinstance(sparse, dict), what, "'sparse'", "object", kind(sparse))
    return {name: _parse_entry(what, name, entry) for name, entry in sparse.items()}


def parse_checksums(
    metadata: Mapping[str, str] | None, source: str = "checkpoint"
) -> dict[str, int]:
    """Reads the checksums of a file's tensors by name; there may be none.

    Raises:
      CheckpointError: see parse_metadata().
    """
    content = _parse_content(metadata, source)
    if content is None or "crc32" not in content:
        return {}
    checksums = content["crc32"]
    ok = isinstance(checksums, dict)
    ok = ok and all(type(n) is int for n in checksums.values())
    expect(ok, _what(source), "'crc32'", "integers by name", kind(checksums))
    return checksums


def _what(source: str) -> str:
    return f"{source}: metadata {METADATA_KEY!r}"


def _parse_content(
    metadata: Mapping[str, str] | None, source: str
) -> dict[str, Any] | None:
    if not metadata or METADATA_KEY not in metadata:
        return None
    what = _what(source)
    content = parse_json(metadata[METADATA_KEY], what)
    expect(
        content.get("format") == FORMAT, what, "format", FORMAT, content.get("format")
    )
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{what}: expected version {VERSION}, got {version!r:.80}; a newer "
            "FlashJAX may be able to read it"
        )
    return content


def _parse_entry(what: str, name: str, entry: Any) -> SparseEntry:
    expect(isinstance(entry, dict), what, f"entry {name!r}", "object", kind(entry))
    shape, dtype = entry.get("shape"), entry.get("dtype")
    ok = isinstance(shape, list) and len(shape) == 2
    ok = ok and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    expect(ok, what, f"shape of {name!r}", "two sizes below 2**31", shape)
    ok = isinstance(dtype, str) and dtype in HALF_DTYPES
    expect(ok, what, f"dtype of {name!r}", "float16 or bfloat16", dtype)
    return SparseEntry((shape[0], shape[1]), HALF_DTYPES[dtype])
