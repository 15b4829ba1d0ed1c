"""Loading and saving OPT in the Hugging Face layout, dense or sparse.

Tensors are put on the device one by one into a model that has no arrays yet
(`nnx.eval_shape`), while the next few are read, so the host holds these beside what is
loaded, and the queries', keys' and values' of a layer that become one. What is stored
sparse and goes to one device is packed without being expanded, a matrix while the one
before it is copied to the device.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from flashjax.checkpoint import CheckpointError, CheckpointWriter, atomic_folder
from flashjax.nn import SparseDense
from flashjax.nnx_tree import node_at, set_node
from flashjax.packing import count_nonzeros
from flashjax.sparse_matrix import SparseMatrix, check_tokens
from flashjax.sparse_rows import SparseRows

from .attention import check_cache_dtype
from .config import OPTConfig
from .fused_qkv import FUSED, QKV, JoinedQKV, rows_of
from .hf_folder import StoredOPT, listed, open_opt, opt_targets
from .modeling import OPT, Attention, check_dtype
from .parallel import DECODER_LINEARS, TensorParallel, transpose
from .tokenizer import load_tokenizer, save_tokenizer

# "auto" packs a weight from this share of zeros on: below it, sparse is no smaller.
AUTO_SPARSITY = 0.5

_HALVES = (jnp.float16, jnp.bfloat16)
# Tensors that are read at a time; checksums take longer than reading.
_READERS = 8
_AHEAD = 1 / 32  # of all bytes: about a layer
# Matrices that are packed at a time: copying one to the device leaves the cores idle.
_MAKERS = 3
# A file's tensors are held until it is written.
_SHARD_BYTES = 1 << 30


def from_pretrained(
    folder_or_hub_name: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float16,
    sparse: bool | Literal["auto"] = "auto",
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    axis: str = "model",
    fuse_qkv: bool = True,
    cache_dtype: DTypeLike | None = None,
    tokens: int | None = None,
) -> tuple[OPT, Tokenizer | None]:
    """Loads an OPT model and its tokenizer.

    Args:
      folder_or_hub_name: a folder in the Hugging Face layout (config.json and either
        model.safetensors or pytorch_model.bin, sharded or not; the latter needs
        torch), or the name of a model on the Hugging Face hub.
      dtype: of the model: float16, bfloat16 or float32. Weights are converted.
      sparse: "auto" loads as SparseDense the linear layers of the decoder that the
        checkpoint stores sparse or that are at least half zeros, if dtype is a half
        precision; True all linear layers of the decoder; False none.
      revision: branch, tag or commit on the hub.
      mesh: devices over which to split the model (docs/multi-gpu.md); heads and
        feed-forward units must be divisible by the size of the axis. Each device gets
        its part of a tensor only. In a multi-process run every process calls this.
      axis: name of the mesh axis.
      fuse_qkv: whether `q_proj`, `k_proj` and `v_proj` of a layer become one layer
        `qkv_proj`, where all of them are sparse or all dense. Text comes faster so;
        load with False to prune or change the three one by one. What is saved is the
        same.
      cache_dtype: of the keys and values that generation keeps: float8_e4m3fn, which
        takes half the memory of half precision and rounds them (docs/generation.md);
        None is `dtype`.
      tokens: how many sequences will mostly be generated at once, if that is known and
        few; see `SparseMatrix.from_dense`. Not with a mesh.

    Returns:
      The model on the mesh, or else on JAX's default device; and the tokenizer, None
      where the folder has none.

    Raises:
      ValueError: an option is none of the above, or the model cannot be split
        over the mesh.
      CheckpointError: (a ValueError) the folder is no OPT model, is truncated, or its
        tensors do not fit its configuration, all of them being named; or the hub
        cannot be reached.
    """
    dtype = check_dtype(dtype)
    cache_dtype = check_cache_dtype(cache_dtype, dtype)
    if not isinstance(sparse, bool) and sparse != "auto":
        raise ValueError(f"sparse must be 'auto', True or False, got {sparse!r}")
    if sparse is True and dtype not in _HALVES:
        raise ValueError(
            f"sparse=True needs dtype float16 or bfloat16, got {dtype.name}"
        )
    check_tokens("from_pretrained", tokens)
    if tokens is not None and mesh is not None:
        raise ValueError(f"tokens must be None where there is a mesh, got {tokens}")
    with open_opt(folder_or_hub_name, revision) as stored:
        tokenizer = load_tokenizer(stored.folder)
        parallel = None
        if mesh is not None:
            parallel = TensorParallel.create(stored.config, mesh, axis)
        model = _load(stored, dtype, sparse, parallel, fuse_qkv, tokens)
        model.cache_dtype = cache_dtype
        return model, tokenizer


def save_pretrained(
    model: OPT,
    tokenizer: Tokenizer | None,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Saves a model in the Hugging Face layout.

    A model without sparse layers can be loaded by transformers. Sparse layers are
    stored in the form of `flashjax.checkpoint`, which does not depend on the layout in
    memory; a fused `qkv_proj` is stored as the three layers that it is made of. The
    folder appears whole or not at all.

    Args:
      model: the model.
      tokenizer: its tokenizer, or None to save none.
      folder: a new or empty folder.
      overwrite: replace an existing model folder.
      shard_bytes: weights above this many bytes are split over several files.

    Raises:
      CheckpointError: the folder exists, or cannot be written; nothing is left behind.
      ValueError: model or tokenizer is of another type.
    """
    if not isinstance(model, OPT):
        raise ValueError(f"expected an OPT model, got {type(model).__name__}")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            "expected a tokenizers.Tokenizer or None, got "
            f"{type(tokenizer).__module__}.{type(tokenizer).__name__}"
        )
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(nnx.state(model))):
        raise ValueError(
            "expected a model whose arrays all live in this process, got one that is "
            "spread over several processes: load and save it in one"
        )
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        hf = model.config.to_hf() | {"torch_dtype": model.dtype.name}
        (temporary / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        if tokenizer is not None:
            save_tokenizer(tokenizer, model.config, temporary)
        writer = CheckpointWriter(temporary, shard_bytes=shard_bytes)
        for name, tensor, sparse in _tensors(model):
            (writer.add_sparse if sparse else writer.add)(name, tensor)
        writer.close()


def _tensors(model: OPT) -> Iterator[tuple[str, np.ndarray, bool]]:
    """The tensors of a checkpoint by name, and whether they are stored sparse."""
    # Those of a fused layer follow each other: it is unpacked once.
    unpacked_layer, unpacked = None, np.empty(0)
    for name, target in opt_targets(model.config).items():
        parent, _, projection = target.module.rpartition(".")
        fused = projection in QKV and node_at(model, parent).qkv_proj is not None
        layer = node_at(model, f"{parent}.{FUSED}" if fused else target.module)
        sparse = False
        if target.attribute != "kernel":
            tensor = np.asarray(getattr(layer, target.attribute)[...])
        else:
            sparse = isinstance(layer, SparseDense)
            if layer is not unpacked_layer:
                kernel: Any = layer.kernel.get_value()
                dense = kernel.to_dense() if sparse else kernel
                unpacked_layer, unpacked = layer, np.asarray(_transposed(dense))
                del dense
            tensor = unpacked
        if fused:
            tensor = rows_of(tensor, projection, model.config.num_heads)
        yield name, tensor, sparse


def _transposed(matrix: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """By JAX's default device, unless that is the CPU."""
    if jax.default_backend() == "cpu":
        return transpose(np.asarray(matrix))
    return jnp.asarray(matrix).T


def _load(
    stored: StoredOPT,
    dtype: np.dtype,
    sparse: bool | Literal["auto"],
    parallel: TensorParallel | None,
    fuse_qkv: bool,
    tokens: int | None,
) -> OPT:
    config = stored.config
    model = _abstract_model(config, dtype, fuse_qkv)
    model.parallel = parallel
    # Another layout and slices for several devices need the dense weight.
    as_rows = parallel is None and tokens is None and dtype in _HALVES
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
        tensors = _read_ahead(read, sizes, readers, in_order)
        for stored_name, (array, fits) in tensors:
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


def _read_ahead(
    read: Callable[[str], Any], sizes: dict[str, int], readers: int, in_order: bool
) -> Iterator[tuple[str, Any]]:
    """(name, what was read) while others are being read, as it comes or in order.

    More than two are read at a time as long as their sizes are `_AHEAD` of all.
    """
    most = _AHEAD * sum(sizes.values())
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
        return jnp.asarray(_transposed(weight))

    def put_sparse(self, module: str, weight: np.ndarray | SparseRows) -> SparseMatrix:
        if isinstance(weight, SparseRows):
            return SparseMatrix.from_rows(weight)
        return SparseMatrix.from_dense(_transposed(weight), tokens=self._tokens)


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
    if array.dtype not in _HALVES or sparse is False:
        return False
    if stored_sparse or isinstance(array, SparseRows):
        return True
    if module.split(".")[-1] not in DECODER_LINEARS:
        return False
    zeros = array.size - count_nonzeros(array)
    return sparse is True or zeros >= AUTO_SPARSITY * array.size
