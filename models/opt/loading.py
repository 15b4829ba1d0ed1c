"""Loading OPT tensor by tensor, on one device or on those of a mesh.

Tensors are put on the device one by one into a model that has no arrays yet
(`nnx.eval_shape`), while the next few are read. Beside what is loaded the host holds
less than two layers take on the disk, or half a gigabyte where layers are small: what
was read, and packed. What is stored sparse and goes to one device is packed without
being expanded, a matrix while the one before it is copied to the device.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flashjax.checkpoint import CheckpointError
from flashjax.nn import SparseDense
from flashjax.nnx_tree import node_at, set_node
from flashjax.packing import count_nonzeros, put
from flashjax.sparse_matrix import SparseMatrix
from flashjax.sparse_rows import SparseRows

from .config import OPTConfig
from .fused_qkv import FUSED, QKV, JoinedQKV
from .hf_folder import StoredOPT, Target, listed
from .host_memory import put_without_copy, read_ahead
from .modeling import OPT, Attention
from .parallel import DECODER_LINEARS, TensorParallel, transpose_anywhere

# "auto" packs a weight from this share of zeros on: below it, sparse is no smaller.
AUTO_SPARSITY = 0.5

HALVES = (jnp.float16, jnp.bfloat16)
# Tensors that are read at a time, large ones each by several threads.
_READERS = 4
# Matrices that are packed at a time: copying one to the device leaves the cores idle.
_MAKERS = 3
# What the host holds at a time, in layers as they are stored: little more than the 4/3
# that `fc1` and `fc2` need, both in two forms, so that one is made while the other is
# read. On top comes memory that JAX has for a matrix on its way to a GPU, and keeps.
_LAYERS = 1.35
# But never less than this: small layers would wait for each other.
_LEAST_BYTES = 512 << 20
# An array up to this size does not wait until a matrix was copied to the device.
_SMALL_BYTES = 1 << 20


def load(
    stored: StoredOPT,
    dtype: np.dtype,
    sparse: bool | Literal["auto"],
    parallel: TensorParallel | None,
    fuse_qkv: bool,
    tokens: int | None,
    progress: Callable[[int, int], None] | None,
) -> OPT:
    """Reads an open checkpoint into a model.

    The arguments are those of `from_pretrained`; the model is split over the devices of
    `parallel`, or goes to JAX's default device.

    Raises:
      CheckpointError: the stored parts of a tensor contradict each other, or values are
        too large for the dtype.
    """
    config = stored.config
    model = _abstract_model(config, dtype, fuse_qkv)
    model.parallel = parallel
    # Another layout and slices for several devices need the dense weight.
    as_rows = parallel is None and tokens is None and dtype in HALVES
    as_rows = as_rows and sparse is not False
    too_large: list[str] = []

    def read(stored_name):
        return stored.read(stored_name, dtype, as_rows)

    readers = _READERS if stored.reads_side_by_side else 1
    # Several processes must make slices in the same order.
    in_order = parallel is not None
    place = parallel or _OneDevice(tokens)
    sizes = {name: stored.read_bytes(name, as_rows) for name in stored.names}
    done, total = 0, sum(sizes.values())
    # Matrices are taken with their other form, so that making one never has to wait.
    held = {
        name: size * (2 if len(stored.reader.shape(name)) == 2 else 1)
        for name, size in sizes.items()
    }
    most = max(int(_LAYERS * _layer_bytes(stored, sizes)), _LEAST_BYTES)
    makers = 1 if in_order else _MAKERS
    with _Loader(model, place, makers, most, fuse_qkv) as loader:
        # No name for what this iterates over: an error would keep it, and its threads.
        for stored_name, (array, fits) in read_ahead(
            read, held, loader.take, readers, in_order
        ):
            done += sizes[stored_name]
            if progress is not None:
                progress(done, total)
            if not fits:
                too_large.append(stored_name)
            if too_large:  # the others are only looked at
                loader.drop(held[stored_name])
                continue
            target = stored.targets[stored.names[stored_name]]
            goes_sparse = target.attribute == "kernel" and _goes_sparse(
                array, target.module, stored.is_sparse(stored_name), sparse
            )
            loader.add(target, array, goes_sparse, held[stored_name])
            del array  # else it would be held beside what follows
            loader.put_joined()
    if too_large:
        raise CheckpointError(
            f"{stored.folder}: values too large for {dtype.name} in "
            f"{listed(sorted(too_large))}; load as bfloat16 or float32"
        )
    return model


class _Loader:
    """Puts tensors on the devices and into a model without arrays.

    All are there when its context has ended without an error. One thread calls it, and
    it counts what the host holds: what `take` took, until it was put on the devices.
    """

    def __init__(
        self,
        model: OPT,
        place: "TensorParallel | _OneDevice",
        makers: int,
        most: int,
        fuse_qkv: bool,
    ):
        """The host may hold `most` bytes, or else one tensor."""
        self._model, self._place, self._fuse_qkv = model, place, fuse_qkv
        self._most, self._held = most, 0
        self._pool = ThreadPoolExecutor(makers)
        # Modules, their matrices that are being made, and what these hold.
        self._making: collections.deque[tuple[str, Future[Any], int]] = (
            collections.deque()
        )
        # By attention, whose tensors are not all there, and what these hold.
        self._waiting: dict[str, JoinedQKV] = {}
        self._waiting_bytes: collections.Counter[str] = collections.Counter()
        self._device: Any = getattr(jax.config, "jax_default_device", None)

    def __enter__(self) -> "_Loader":
        return self

    def __exit__(self, error: object, *unused: object) -> None:
        with self._pool:
            while error is None and self._making:
                self._take_made()

    def take(self, size: int, must: bool) -> bool:
        """Takes so many bytes more to be held if there is room; says whether.

        If it must it waits for what is being made. What waits for other tensors cannot
        be given back before these are read, so at last it takes them without room.
        """
        while self._making and self._making[0][1].done():
            self._take_made()
        while must and self._making and self._held + size > self._most:
            self._take_made()
        if self._held + size > self._most and not must:
            return False
        self._held += size
        return True

    def drop(self, size: int) -> None:
        """Gives up so many bytes, and what waits for them."""
        self._held -= size + self._waiting_bytes.total()
        self._waiting.clear()
        self._waiting_bytes.clear()

    def add(self, target: Target, array: Any, sparse: bool, size: int) -> None:
        """Puts one tensor, as a checkpoint orients it, into its layer.

        A part of what becomes one matrix waits for the others; see `put_joined`.

        Args:
          target: where it belongs.
          array: the tensor.
          sparse: whether a kernel becomes sparse.
          size: what was taken for it.
        """
        attention, _, projection = target.module.rpartition(".")
        if not self._fuse_qkv or projection not in QKV:
            self._put(target.module, target.attribute, array, sparse, size)
            return
        if attention not in self._waiting:
            config = self._model.config
            joined = JoinedQKV(config.num_heads, config.enable_bias)
            self._waiting[attention] = joined
        self._waiting[attention].add(projection, target.attribute, array, sparse)
        self._waiting_bytes[attention] += size

    def put_joined(self) -> None:
        """Puts queries, keys and values that are all there."""
        for attention in [a for a, joined in self._waiting.items() if joined.complete]:
            joined, size = self._waiting.pop(attention), self._waiting_bytes[attention]
            del self._waiting_bytes[attention]
            self._put_qkv(attention, joined, size)

    def _put(
        self, module: str, attribute: str, array: Any, sparse: bool, size: int
    ) -> None:
        if sparse and attribute == "kernel":
            # In one order, if several processes make their parts: by one thread.
            made = self._pool.submit(self._make_sparse, module, array)
            self._making.append((module, made, size))
            return
        if attribute == "kernel":
            # Large, and may be copied: one at a time.
            placed = jax.block_until_ready(self._place.put_kernel(module, array))
        else:
            placed = self._place.put(module, attribute, array)
        getattr(node_at(self._model, module), attribute).set_value(placed)
        self._held -= size

    def _make_sparse(self, module: str, array: Any) -> Any:
        with jax.default_device(self._device):  # this is another thread's setting
            return jax.block_until_ready(self._place.put_sparse(module, array))

    def _take_made(self) -> None:
        """Waits for the matrix that has been being made longest."""
        module, made, size = self._making.popleft()
        layer = node_at(self._model, module)
        sparse_layer = SparseDense.from_matrix(
            made.result(),
            layer.bias,
            dtype=layer.dtype,
            preferred_element_type=layer.preferred_element_type,
        )
        set_node(self._model, module, sparse_layer)
        self._held -= size

    def _put_qkv(self, module: str, joined: JoinedQKV, size: int) -> None:
        """Puts queries, keys and values into an attention, fused if they are alike."""
        if joined.alike:
            sparse = joined.is_sparse(QKV[0])
            for attribute, array in joined.tensors.items():
                part = size if attribute == "kernel" else 0
                self._put(f"{module}.{FUSED}", attribute, array, sparse, part)
            return
        self._take_apart(node_at(self._model, module))
        self._held -= size % len(QKV)
        for name, attribute, array in joined.separate():
            sparse = joined.is_sparse(name)
            part = size // len(QKV) if attribute == "kernel" else 0
            self._put(f"{module}.{name}", attribute, array, sparse, part)

    def _take_apart(self, attention: Attention) -> None:
        """Gives an attention three layers without arrays in the place of one."""
        config, dtype = self._model.config, self._model.dtype
        separate = nnx.eval_shape(
            lambda: Attention(config, dtype=dtype, rngs=nnx.Rngs(0))
        )
        for name in (*QKV, FUSED):
            setattr(attention, name, nnx.data(getattr(separate, name)))


class _OneDevice:
    """Puts arrays on JAX's default device; the twin of TensorParallel."""

    def __init__(self, tokens: int | None = None):
        self._tokens = tokens
        # JAX keeps pinned memory for all that was on its way to a GPU at a time.
        self._copying = threading.Lock()

    def put(self, module: str, attribute: str, array: np.ndarray) -> jax.Array:
        if array.nbytes <= _SMALL_BYTES:
            return jnp.asarray(array)
        with self._copying:
            return put_without_copy(array)

    def put_kernel(self, module: str, weight: np.ndarray) -> jax.Array:
        return jnp.asarray(transpose_anywhere(weight))

    def put_sparse(self, module: str, weight: np.ndarray | SparseRows) -> SparseMatrix:
        if isinstance(weight, SparseRows):
            packed = weight.pack()
            with self._copying:
                bitmap, entries, values, counts = (
                    jax.block_until_ready(put((part,))[0]) for part in packed
                )
            shape = weight.shape[::-1]
            return SparseMatrix(
                bitmap, entries, values, counts, shape=shape, dtype=weight.dtype
            )
        return SparseMatrix.from_dense(transpose_anywhere(weight), tokens=self._tokens)


def _layer_bytes(stored: StoredOPT, sizes: dict[str, int]) -> int:
    """Of the decoder's largest layer, as it is stored."""
    layers: collections.Counter[str] = collections.Counter()
    for stored_name, size in sizes.items():
        module = stored.targets[stored.names[stored_name]].module
        if module.startswith("layers."):
            layers[module.split(".")[1]] += size
    return max(layers.values())


def _abstract_model(config: OPTConfig, dtype: np.dtype, fuse_qkv: bool) -> OPT:
    """A model without arrays."""
    # Tracing many layers takes long, and all layers are alike.
    one_layer = dataclasses.replace(config, num_layers=1)
    model = nnx.eval_shape(
        lambda: OPT(one_layer, dtype=dtype, fuse_qkv=fuse_qkv, rngs=nnx.Rngs(0))
    )
    for _ in range(config.num_layers - 1):
        model.layers.append(nnx.clone(model.layers[0]))
    model.config = config
    return model


def _goes_sparse(
    array: np.ndarray | SparseRows,
    module: str,
    stored_sparse: bool,
    sparse: bool | Literal["auto"],
) -> bool:
    if array.dtype not in HALVES or sparse is False:
        return False
    if stored_sparse or isinstance(array, SparseRows):
        return True
    if module.split(".")[-1] not in DECODER_LINEARS:
        return False
    zeros = array.size - count_nonzeros(array)
    return sparse is True or zeros >= AUTO_SPARSITY * array.size
