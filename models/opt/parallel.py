"""OPT over several devices: tensor parallelism after Megatron-LM (arXiv:1909.08053).

Heads and feed-forward units are split: q, k, v and fc1 by output features, out_proj and
fc2 by input features. A layer then needs two all-reduces, after out_proj and after fc2.
Where q, k and v are one layer, its outputs are ordered by head (`fused_qkv.py`), so a
device's slice of them holds all three of its heads.

The vocabulary is split too, where it divides: the table of OPT-175B is 1.2 GB in half
precision and is read in every step for the logits. Split over 8 devices that saves
0.2 ms a step on an H200; the all-reduce of the looked-up rows and the all-gather of
the logits, 200 KB for one sequence, cost a tenth of it. Everything else is small and
whole on every device.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flashjax.partitioning import without_types
from flashjax.sharding import Dim, ShardedSparseMatrix
from flashjax.sparse_matrix import SparseMatrix

from .config import OPTConfig
from .host_memory import put_without_copy

# The linear layers of the decoder, and what is split: output or input features.
DECODER_LINEARS: dict[str, Dim] = {
    "q_proj": "out",
    "k_proj": "out",
    "v_proj": "out",
    "qkv_proj": "out",
    "fc1": "out",
    "out_proj": "in",
    "fc2": "in",
}


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """Where the arrays of a model are; hashable, so that a model's graph can hold it.

    Attributes:
      mesh: the devices, all axes of type Auto.
      axis: the mesh axis over which heads, units and vocabulary are split.
    """

    mesh: Mesh
    axis: str

    @classmethod
    def create(cls, config: OPTConfig, mesh: Mesh, axis: str) -> "TensorParallel":
        """Checks that a model can be split.

        Raises:
          ValueError: mesh is no Mesh or has no such axis, or heads or feed-forward
            units are not divisible by its size.
        """
        if not isinstance(mesh, Mesh):
            raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r:.80}")
        if axis not in mesh.axis_names:
            raise ValueError(
                f"mesh must have an axis {axis!r}, got axes {mesh.axis_names}"
            )
        count = mesh.shape[axis]
        for name in ("num_heads", "ffn_size"):
            size = getattr(config, name)
            if size % count:
                raise ValueError(
                    f"{name} must be divisible by the {count} devices of mesh axis "
                    f"{axis!r}, got {size}"
                )
        return cls(without_types(mesh), axis)

    def by_heads(self, array: jax.Array) -> jax.Array:
        """Splits (batch, num_heads, ...) by heads."""
        return self._constrain(array, P(None, self.axis))

    def whole_logits(self, logits: jax.Array) -> jax.Array:
        """Gives every device the logits (..., vocab_size) of all."""
        if logits.shape[-1] % self.mesh.shape[self.axis] == 0:
            # First as they are computed: XLA would gather the table instead.
            rows = [None] * (logits.ndim - 1)
            logits = self._constrain(logits, P(*rows, self.axis))
        return self._constrain(logits, P())

    def put(self, module: str, attribute: str, array: np.ndarray) -> jax.Array:
        """Puts a bias, norm or embedding on the devices, to each its part."""
        return self._put(array, self._spec(module, attribute, array.shape))

    def put_kernel(self, module: str, weight: np.ndarray) -> jax.Array:
        """Puts a weight (out, in) on the devices as a kernel (in, out)."""
        shape = weight.shape[::-1]
        sharding = NamedSharding(self.mesh, self._spec(module, "kernel", shape))
        places = sharding.addressable_devices_indices_map(shape)
        parts = [
            jax.device_put(to_kernel(weight[where[::-1]], device), device)
            for device, where in places.items()
            if where is not None
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    def put_sparse(
        self, module: str, weight: np.ndarray
    ) -> ShardedSparseMatrix | SparseMatrix:
        """Packs a weight (out, in) slice by slice, each on its device."""
        name = module.split(".")[-1]
        shape = (weight.shape[1], weight.shape[0])
        if name not in DECODER_LINEARS:
            matrix = SparseMatrix.from_dense(to_kernel(weight, self._first_device()))
            return jax.tree.map(lambda leaf: self._put(leaf, P()), matrix)
        dim = DECODER_LINEARS[name]
        size = weight.shape[0 if dim == "out" else 1] // self.mesh.shape[self.axis]

        def shard(index: int, device: jax.Device) -> SparseMatrix:
            part = slice(index * size, (index + 1) * size)
            rows = weight[part] if dim == "out" else weight[:, part]
            return SparseMatrix.from_dense(to_kernel(rows, device))

        return ShardedSparseMatrix.from_shards(
            shard, shape, weight.dtype, self.mesh, self.axis, dim=dim
        )

    def _spec(self, module: str, attribute: str, shape: tuple[int, ...]) -> P:
        name, count = module.split(".")[-1], self.mesh.shape[self.axis]
        rows, columns = P(self.axis), P(None, self.axis)
        if name == "embed_tokens":
            return rows if shape[0] % count == 0 else P()
        if name == "lm_head":
            return columns if shape[1] % count == 0 else P()
        if DECODER_LINEARS.get(name) == "out":
            return columns if attribute == "kernel" else rows
        return rows if name in DECODER_LINEARS and attribute == "kernel" else P()

    def _put(self, array: np.ndarray | jax.Array, spec: P) -> jax.Array:
        sharding = NamedSharding(self.mesh, spec)
        return jax.make_array_from_callback(
            array.shape, sharding, lambda where: array[where]
        )

    def _constrain(self, array, spec):
        sharding = NamedSharding(self.mesh, spec)
        return jax.lax.with_sharding_constraint(array, sharding)

    def _first_device(self) -> jax.Device:
        mine = [
            d for d in self.mesh.devices.flat if d.process_index == jax.process_index()
        ]
        return mine[0]


_BLOCK_ROWS = 32


def to_kernel(weight: np.ndarray, device: jax.Device) -> np.ndarray | jax.Array:
    """Transposes (out, in) to (in, out) where that is fast.

    That is a GPU, which then packs too, or else blocks that fit the host's caches.
    """
    if device.platform != "cpu":
        return jax.device_put(weight, device).T
    return transpose(weight)


def transpose(matrix: np.ndarray) -> np.ndarray:
    """The transpose, contiguous; several times as fast as numpy's own copy."""
    transposed = np.empty(matrix.shape[::-1], matrix.dtype)
    # numpy copies its own dtypes faster than ml_dtypes' bfloat16.
    bits = f"u{matrix.dtype.itemsize}"
    source, result = matrix.view(bits), transposed.view(bits)
    for i in range(0, len(matrix), _BLOCK_ROWS):
        rows = slice(i, i + _BLOCK_ROWS)
        result[:, rows] = source[rows].T
    return transposed


def transpose_anywhere(matrix: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The same by JAX's default device, unless that is the CPU."""
    if jax.default_backend() == "cpu":
        return transpose(np.asarray(matrix))
    if isinstance(matrix, np.ndarray):
        matrix = put_without_copy(matrix)
    return matrix.T
