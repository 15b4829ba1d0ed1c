"""The on-disk form of sparse weights, tensor by tensor.

A sparse weight ``NAME`` of shape (out, in), the orientation of Hugging Face, is stored
as two tensors of a safetensors file, independent of the packed layout in memory:

* ``NAME.bitmap``: uint8 (ceil(out * in / 8),), bit ``i % 8`` of byte ``i // 8`` says
  whether element ``i`` (row-major) is stored;
* ``NAME.values``: float16 or bfloat16 (nnz,), the stored elements, row-major.

Shapes and dtypes are JSON under the key ``flashjax`` of the file's metadata::

    {"format": "flashjax-sparse", "version": 1,
     "sparse": {"NAME": {"shape": [out, in], "dtype": "float16"}},
     "crc32": {"NAME.bitmap": 123, "NAME.values": 456, "OTHER": 789}}

"crc32" has the checksum of every tensor of the file, dense ones too; files of version
1 from before 2026-11-23 lack it. What is read is checked against it.
"""

from flashjax.atomic_folder import CheckpointError, atomic_folder

from .checks import read_json
from .encoding import decode, encode
from .metadata import SparseEntry, format_metadata, parse_metadata
from .reader import INDEX_NAME, WEIGHTS_NAME, CheckpointReader
from .trees import export_tree, from_arrays, import_tree, to_arrays
from .writer import CheckpointWriter, save_and_sync, save_tensors

__all__ = [
    "INDEX_NAME",
    "WEIGHTS_NAME",
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
    "save_and_sync",
    "save_tensors",
    "to_arrays",
]
