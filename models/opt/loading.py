"""Loading OPT tensor by tensor, on one device or on those of a mesh.

Tensors are put on the device one by one into a model that has no arrays yet
(`nnx.eval_shape`), while the next few are read, so the host holds these beside what is
loaded, and the queries', keys' and values' of a layer that become one. What is stored
sparse and goes to one device is packed without being expanded, a matrix while the one
before it is copied to the device.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
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
from .modeling import OPT, Attention
from .parallel import DECODER_LINEARS, TensorParallel, transpose_anywhere

# "auto" packs a weight from this share of zeros on: below it, sparse is no smaller.
AUTO_SPARSITY = 0.5

HALVES = (jnp.float16, jnp.bfloat16)
# Tensors that are read at a time; checksums take longer than reading.
_READERS = 8
# Matrices that are packed at a time: copying one to the device leaves the cores idle.
_MAKERS = 3


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
    too_large = []

    def read(stored_name):
        return stored.read(stored_name, dtype, as_rows)

    readers = _READERS if stored.reads_side_by_side else 1
    # Several processes must make slices in the same order.
    in_order = parallel is not None
    place = parallel or _OneDevice(tokens)
    with _Loader(model, place, 1 if in_order else _MAKERS) as loader:
        sizes = {name: stored.read_bytes(name, as_rows) for name in stored.names}
        done, total = 0, sum(sizes.values())
        most = total // config.num_layers  # about a layer
        # No name for what this iterates over: an error would keep it, and its threads.
        for stored_name, (array, fits) in read_ahead(
            read, sizes, most, readers, in_order
        ):
            done += sizes[stored_name]
            if progress is not None:
                progress(done, total)
            target = stored.targets[stored.names[stored_name]]
            if not fits:
                too_large.append(stored_name)
                continue
            goes_sparse = target.attribute == "kernel" and _goes_sparse(
                array, target.module, stored.is_sparse(stored_name), sparse
            )
            attention, _, projection = target.module.rpartition(".")
            if not fuse_qkv or projection not in QKV:
                loader.put(target.module, target.attribute, array, goes_sparse)
                continue
            if attention not in waiting:
                waiting[attention] = JoinedQKV(config.num_heads, config.enable_bias)
            waiting[attention].add(projection, target.attribute, array, goes_sparse)
            del array  # else it would be held beside the joined ones
            if waiting[attention].complete:
                loader.put_qkv(attention, waiting.pop(attention))
    if too_large:
        raise CheckpointError(
            f"{stored.folder}: values too large for {dtype.name} in "
            f"{listed(sorted(too_large))}; load as bfloat16 or float32"
        )
    return model


def read_ahead(
    read: Callable[[str], Any],
    sizes: dict[str, int],
    most: int,
    readers: int,
    in_order: bool,
) -> Iterator[tuple[str, Any]]:
    """(name, what was read) while others are being read, as it comes or in order.

    More than two are read at a time as long as their sizes are `most` together.
    """
    following = collections.deque(sizes)
    pending: dict[Future[Any], str] = {}
    with ThreadPoolExecutor(readers) as pool:
        try:
            while pending or following:
                while following and len(pending) < readers:
                    names = [*pending.values(), following[0]]
                    if len(names) > 2 and sum(sizes[name] for name in names) > most:
                        break
                    name = following.popleft()
                    pending[pool.submit(read, name)] = name
                done = next(iter(pending))
                if not in_order:
                    done = next(iter(wait(pending, return_when=FIRST_COMPLETED).done))
                name, finished = pending.pop(done), [done]
                del done
                # Nothing here holds what was read once it is yielded.
                yield name, finished.pop().result()
        finally:
            for future in pending:
                future.cancel()


class _Loader:
    """Puts tensors on the devices and into a model without arrays.

    All are there when its context has ended without an error.
    """

    def __init__(self, model: OPT, place: "TensorParallel | _OneDevice", makers: int):
        self._model, self._place, self._makers = model, place, makers
        self._pool = ThreadPoolExecutor(makers)
        # Modules, and their matrices that are being made.
        self._making: collections.deque[tuple[str, Future[Any]]] = collections.deque()
        self._device: Any = getattr(jax.config, "jax_default_device", None)

    def __enter__(self) -> "_Loader":
        return self

    def __exit__(self, error: object, *unused: object) -> None:
        with self._pool:
            if error is None:
                self._take_made(0)

    def put(self, module: str, attribute: str, array: Any, sparse: bool) -> None:
        """Puts one tensor, as a checkpoint orients it, into its layer."""
        if attribute != "kernel":
            # Nobody waits: its copy may stand behind that of a matrix.
            placed = self._place.put(module, attribute, array)
            getattr(node_at(self._model, module), attribute).set_value(placed)
        elif not sparse:
            # Large, and may be copied: one at a time.
            kernel = jax.block_until_ready(self._place.put_kernel(module, array))
            node_at(self._model, module).kernel.set_value(kernel)
        else:
            made = self._pool.submit(self._make_sparse, module, array)
            self._making.append((module, made))
            self._take_made(self._makers - 1)  # without waiting they would pile up

    def _make_sparse(self, module: str, array: Any) -> Any:
        with jax.default_device(self._device):  # this is another thread's setting
            return jax.block_until_ready(self._place.put_sparse(module, array))

    def _take_made(self, left: int) -> None:
        """Waits until so few matrices are being made."""
        while len(self._making) > left:
            module, made = self._making.popleft()
            layer = node_at(self._model, module)
            sparse_layer = SparseDense.from_matrix(
                made.result(),
                layer.bias,
                dtype=layer.dtype,
                preferred_element_type=layer.preferred_element_type,
            )
            set_node(self._model, module, sparse_layer)

    def put_qkv(self, module: str, joined: JoinedQKV) -> None:
        """Puts queries, keys and values into an attention, fused if they are alike."""
        if joined.alike:
            sparse = joined.is_sparse(QKV[0])
            for attribute, array in joined.tensors.items():
                self.put(f"{module}.{FUSED}", attribute, array, sparse)
            return
        self._take_apart(node_at(self._model, module))
        for name, attribute, array in joined.separate():
            self.put(f"{module}.{name}", attribute, array, joined.is_sparse(name))

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
        return jnp.asarray(array)

    def put_kernel(self, module: str, weight: np.ndarray) -> jax.Array:
        return jnp.asarray(transpose_anywhere(weight))

    def put_sparse(self, module: str, weight: np.ndarray | SparseRows) -> SparseMatrix:
        if isinstance(weight, SparseRows):
            return SparseMatrix.from_rows(weight)
        return SparseMatrix.from_dense(transpose_anywhere(weight), tokens=self._tokens)


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
