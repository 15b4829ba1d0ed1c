"""Loading OPT tensor by tensor, on one device or on those of a mesh.

Tensors are put on the device one by one into a model that has no arrays yet
(`nnx.eval_shape`), while the next few are read. Beside what is loaded the host holds
about two layers: what was read, packed, and copied again by JAX on its way to the
device. What is stored sparse and goes to one device is packed without being expanded,
a matrix while the one before it is copied.
"""

import collections
import dataclasses
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
from flashjax.packing import count_nonzeros
from flashjax.sparse_matrix import SparseMatrix
from flashjax.sparse_rows import SparseRows

from .config import OPTConfig
from .fused_qkv import FUSED, QKV, JoinedQKV
from .hf_folder import StoredOPT, listed
from .host_memory import HostMemory, put_without_copy, read_ahead
from .modeling import OPT, Attention
from .parallel import DECODER_LINEARS, TensorParallel, transpose_anywhere

# "auto" packs a weight from this share of zeros on: below it, sparse is no smaller.
AUTO_SPARSITY = 0.5

HALVES = (jnp.float16, jnp.bfloat16)
# Tensors that are read at a time; checksums take longer than reading.
_READERS = 8
# Matrices that are packed at a time: copying one to the device leaves the cores idle.
_MAKERS = 3
# What is read and packed on the host at a time, in layers as they are stored. On top
# comes memory in which JAX keeps a matrix on its way to a GPU: two layers in all.
_LAYERS = 1.25
# Of a matrix that is made: as it was read, and packed.
_COPIES = 2


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
    waiting: dict[str, JoinedQKV] = {}
    waiting_bytes: collections.Counter[str] = collections.Counter()
    too_large = []

    def read(stored_name):
        return stored.read(stored_name, dtype, as_rows)

    readers = _READERS if stored.reads_side_by_side else 1
    # Several processes must make slices in the same order.
    in_order = parallel is not None
    place = parallel or _OneDevice(tokens)
    sizes = {name: stored.read_bytes(name, as_rows) for name in stored.names}
    done, total = 0, sum(sizes.values())
    memory = HostMemory(int(_LAYERS * _layer_bytes(stored, sizes)))
    with _Loader(model, place, 1 if in_order else _MAKERS, memory) as loader:
        # No name for what this iterates over: an error would keep it, and its threads.
        for stored_name, (array, fits) in read_ahead(
            read, sizes, loader.take, readers, in_order
        ):
            done += sizes[stored_name]
            if progress is not None:
                progress(done, total)
            target = stored.targets[stored.names[stored_name]]
            size = sizes[stored_name]
            if not fits:
                too_large.append(stored_name)
                memory.give_back(size)
                continue
            goes_sparse = target.attribute == "kernel" and _goes_sparse(
                array, target.module, stored.is_sparse(stored_name), sparse
            )
            attention, _, projection = target.module.rpartition(".")
            if not fuse_qkv or projection not in QKV:
                loader.put(target.module, target.attribute, array, goes_sparse, size)
                continue
            if attention not in waiting:
                waiting[attention] = JoinedQKV(config.num_heads, config.enable_bias)
            waiting[attention].add(projection, target.attribute, array, goes_sparse)
            waiting_bytes[attention] += size
            del array  # else it would be held beside the joined ones
            if waiting[attention].complete:
                joined = waiting.pop(attention)
                loader.put_qkv(attention, joined, waiting_bytes.pop(attention))
    if too_large:
        raise CheckpointError(
            f"{stored.folder}: values too large for {dtype.name} in "
            f"{listed(sorted(too_large))}; load as bfloat16 or float32"
        )
    return model


class _Loader:
    """Puts tensors on the devices and into a model without arrays.

    All are there when its context has ended without an error.
    """

    def __init__(
        self,
        model: OPT,
        place: "TensorParallel | _OneDevice",
        makers: int,
        memory: HostMemory,
    ):
        self._model, self._place, self._memory = model, place, memory
        self._pool = ThreadPoolExecutor(makers)
        # Modules, their matrices that are being made, and what these hold.
        self._making: collections.deque[tuple[str, Future[Any], int]] = (
            collections.deque()
        )
        self._device: Any = getattr(jax.config, "jax_default_device", None)

    def __enter__(self) -> "_Loader":
        return self

    def __exit__(self, error: object, *unused: object) -> None:
        with self._pool:
            while error is None and self._making:
                self._take_made()

    def take(self, size: int, wanted: bool) -> bool:
        """Whether the host may hold so many bytes more.

        What is wanted may at last: no more can be given back than what is being made.
        """
        while self._making and self._making[0][1].done():
            self._take_made()
        while not self._memory.take(size):
            if not wanted:
                return False
            if not self._making:
                self._memory.force(size)
                return True
            self._take_made()
        return True

    def put(
        self, module: str, attribute: str, array: Any, sparse: bool, size: int
    ) -> None:
        """Puts one tensor, as a checkpoint orients it, into its layer.

        The host holds `size` bytes of it until then.
        """
        if sparse and attribute == "kernel":
            more = (_COPIES - 1) * size
            self.take(more, True)
            made = self._pool.submit(self._make_sparse, module, array)
            self._making.append((module, made, size + more))
            return
        if attribute == "kernel":
            # Large, and may be copied: one at a time.
            placed = jax.block_until_ready(self._place.put_kernel(module, array))
        else:
            placed = self._place.put(module, attribute, array)
        getattr(node_at(self._model, module), attribute).set_value(placed)
        self._memory.give_back(size)

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
        self._memory.give_back(size)

    def put_qkv(self, module: str, joined: JoinedQKV, size: int) -> None:
        """Puts queries, keys and values into an attention, fused if they are alike."""
        if joined.alike:
            sparse = joined.is_sparse(QKV[0])
            for attribute, array in joined.tensors.items():
                part = size if attribute == "kernel" else 0
                self.put(f"{module}.{FUSED}", attribute, array, sparse, part)
            return
        self._take_apart(node_at(self._model, module))
        for name, attribute, array in joined.separate():
            sparse, part = joined.is_sparse(name), 0
            self.put(f"{module}.{name}", attribute, array, sparse, part)
        self._memory.give_back(size)

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

    def put(self, module: str, attribute: str, array: np.ndarray) -> jax.Array:
        return put_without_copy(array)

    def put_kernel(self, module: str, weight: np.ndarray) -> jax.Array:
        return jnp.asarray(transpose_anywhere(weight))

    def put_sparse(self, module: str, weight: np.ndarray | SparseRows) -> SparseMatrix:
        if isinstance(weight, SparseRows):
            return SparseMatrix.from_rows(weight)
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
