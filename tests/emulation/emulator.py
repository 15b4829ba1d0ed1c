"""The CUDA launchers on the emulated device of this folder, for numpy arrays."""

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np

from flashjax import reference

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What `make sanitize` asks for: address,undefined.
SANITIZE = os.environ.get("FLASHJAX_SANITIZE", "")
KERNELS = {"auto": 0, "mma": 1, "wgmma": 2}


class EmulationError(RuntimeError):
    """A kernel that did not come to its end, and why."""


def _sources() -> list[Path]:
    return [*HERE.glob("*.cc"), *(ROOT / "cuda").glob("*.cu")]


def _headers() -> list[Path]:
    folders = [
        (HERE / "include", "**/*"),
        (ROOT / "cuda", "**/*.*h"),
        (ROOT / "cpu", "*.h"),
    ]
    return [
        path for folder, glob in folders for path in folder.glob(glob) if path.is_file()
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    """Compiles the emulation once for a state of the sources."""
    digest = hashlib.sha256(SANITIZE.encode())
    for path in sorted([*_sources(), *_headers()]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"cuda-{digest.hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library)
    return ctypes.CDLL(str(library))


def _compile(library: Path) -> None:
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-fPIC", "-shared"]
    command += ["-Wno-unknown-pragmas", f"-I{HERE / 'include'}", f"-I{ROOT}"]
    command += ["-include", "cuda_runtime.h", "-x", "c++"]
    if SANITIZE:
        # -O2 takes minutes to compile with the checks.
        command += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-g1", "-O1"]
    unfinished = library.with_suffix(".tmp")
    command += [*map(str, _sources()), "-o", str(unfinished)]
    # The sanitizers' libraries are for Python, not for the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run(command, check=True, env=environment)
    unfinished.rename(library)


def _call(name: str, *arguments) -> None:
    def convert(argument):
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            return ctypes.c_void_p(argument.ctypes.data)
        if argument is None:
            return ctypes.c_void_p(None)
        if isinstance(argument, bool):
            return ctypes.c_bool(argument)
        return ctypes.c_int64(argument)

    status = getattr(_library(), name)(*map(convert, arguments))
    if status != 0:
        error = _library().emulated_error
        error.restype = ctypes.c_char_p
        raise EmulationError(f"{name}: error {status}: {error().decode()}")


def set_device(multiprocessors: int, capability: int = 9) -> None:
    """Sizes the emulated GPU."""
    _library().emulated_device(multiprocessors, capability)


def _garbage(shape, dtype) -> np.ndarray:
    """What a fresh buffer on a GPU holds: anything."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).fill(0xCD)
    return array


def workspace_bytes(n: int, m: int, k: int) -> int:
    function = _library().emulated_workspace_bytes
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int64, (n, m, k)))


def column_tiles(n: int, elements: int) -> list[tuple[int, int]]:
    """Columns and width of tiles of each launch of a product with n columns."""
    launches, next_tiles = [], np.empty(2, np.int64)
    while n > 0:
        _call("emulated_next_tiles", n, elements, next_tiles)
        columns, width = map(int, next_tiles)
        launches.append((columns, width))
        n -= columns
    return launches


def places(row_tiles: int, column_tiles: int, most_in_band: int) -> np.ndarray:
    """(tiles, 2): the row and the column of each tile, in their order."""
    found = np.full((row_tiles * column_tiles, 2), -1, np.int32)
    _call("emulated_places", row_tiles, column_tiles, most_in_band, found)
    return found


def shares(tiles: int, groups: int, ranks: int, change_quarters: int) -> np.ndarray:
    """(ranks + 1): the units at which the shares of a plan begin, and the end."""
    found = np.full(ranks + 1, -1, np.int32)
    _call("emulated_shares", tiles, groups, ranks, change_quarters, found)
    return found


def pack(dense: np.ndarray) -> tuple[np.ndarray, ...]:
    """Packs 16-bit patterns (K, M): bitmap, entries, values, counts."""
    k, m = dense.shape
    shapes = reference.leaf_shapes((k, m))
    sizes = _garbage((reference.chain_count((k, m)),), np.uint32)
    _call("emulated_pack_sizes", dense, m, k, sizes)
    segments = int(sizes.sum())
    shapes["values"] = (segments, *shapes["values"][1:])
    leaves = tuple(_garbage(shape, np.uint32) for shape in shapes.values())
    bitmap, entries, values, counts = leaves
    _call(
        "emulated_pack", dense, m, k, sizes, segments, bitmap, entries, values, counts
    )
    return leaves


def _packed_arguments(packed, layer: int | None) -> tuple:
    """(bitmap, entries, values) of one matrix, or of a stack and which one is meant."""
    if layer is None:
        return (*packed, None, 0, 0)
    layers, segments = packed[2].shape[:2]
    return (*packed, np.array(layer, np.int32), layers, segments)


def unpack(packed, shape: tuple[int, int], transposed: bool, layer=None) -> np.ndarray:
    """Expands to 16-bit patterns, (K, M) if `transposed`, else (M, K)."""
    k, m = shape
    dense = _garbage((k, m) if transposed else (m, k), np.uint16)
    arguments = _packed_arguments(packed, layer)
    _call("emulated_unpack", *arguments, m, k, transposed, dense)
    return dense


def matmul(
    x,
    packed,
    m: int,
    bias=None,
    *,
    kernel="auto",
    float_output=False,
    layer=None,
    relu=False,
):
    """x (N, K) times a packed (K, M): (N, M). It and the bias: x's dtype or float32."""
    n, k = x.shape
    size = workspace_bytes(n, m, k)
    workspace = _aligned(_garbage((size + 16,), np.uint8))[:size]
    y = _garbage((n, m), np.float32 if float_output else x.dtype)
    _call(
        "emulated_matmul",
        _aligned(x),
        *_packed_arguments(packed, layer),
        bias,
        y,
        workspace,
        size,
        n,
        m,
        k,
        x.dtype != np.float16,
        float_output,
        bias is not None and bias.dtype == np.float32,
        bias is not None and bias.ndim == 2,
        relu,
        KERNELS[kernel],
    )
    return y


def gather_matmul(
    x, packed, m: int, bias=None, *, float_output=False, layer=None, relu=False
):
    """x (N, K) times a (K, M) in the gather layout; as `matmul`."""
    n, k = x.shape
    y = _garbage((n, m), np.float32 if float_output else x.dtype)
    _call(
        "emulated_gather_matmul",
        _aligned(x),
        *_packed_arguments(packed, layer),
        bias,
        y,
        n,
        m,
        k,
        x.dtype != np.float16,
        float_output,
        bias is not None and bias.dtype == np.float32,
        bias is not None and bias.ndim == 2,
        relu,
    )
    return y


def gather_unpack(packed, shape: tuple[int, int], transposed: bool, layer=None):
    """As `unpack`, of the gather layout."""
    k, m = shape
    dense = _garbage((k, m) if transposed else (m, k), np.uint16)
    arguments = _packed_arguments(packed, layer)
    _call("emulated_gather_unpack", *arguments, m, k, transposed, dense)
    return dense


def decode_attention(queries, keys, values, mask, used: int) -> np.ndarray:
    """One token's queries (batch, heads, head_dim) and a cache; as the queries."""
    outputs = _garbage(queries.shape, queries.dtype)
    _call(
        "emulated_decode_attention",
        *map(_aligned, (queries, keys, values)),
        mask,
        np.array(used, np.int32),
        outputs,
        *keys.shape,
        queries.dtype != np.float16,
        keys.dtype != queries.dtype,
    )
    return outputs


def _aligned(array: np.ndarray) -> np.ndarray:
    """The same array at a multiple of 16 bytes, as on a GPU."""
    if array.ctypes.data % 16 == 0:
        return array
    bytes_ = np.empty(array.nbytes + 16, np.uint8)
    start = -bytes_.ctypes.data % 16
    copy = bytes_[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def sample(block, packed, m: int, first_strip: int, slots: np.ndarray) -> None:
    """Writes a block's elements (16 strips, K) into the slots of its strips."""
    rows, k = block.shape
    _call(
        "emulated_sample",
        np.ascontiguousarray(block),
        *packed[:2],
        np.array([first_strip], np.int32),
        rows // reference.STRIP_ROWS,
        m,
        k,
        len(packed[2]),
        slots,
    )
