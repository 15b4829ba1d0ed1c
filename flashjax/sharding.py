"""Sparse matrices split over devices, for tensor parallelism.

Each device holds a packed matrix of its own: a slice of the output features
(column-parallel, ``dim="out"``) or of the input features (row-parallel, ``dim="in"``),
after Megatron-LM (arXiv:1909.08053). A column-parallel product needs no communication;
a row-parallel one ends in one all-reduce.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flashjax import layouts, packing, reference
from flashjax.matmul import sparse_matmul
from flashjax.matmul_checks import check_activation, check_operands, result_dtype
from flashjax.matrix import PackedMatrix, is_readable
from flashjax.sparse_matrix import SparseMatrix

Dim = Literal["out", "in"]

_LEAVES = ("bitmap", "entries", "values", "counts")


@contextlib.contextmanager
def without_mesh() -> Iterator[None]:
    """For work on one device, which JAX refuses inside of `jax.set_mesh`."""
    with jax.set_mesh(Mesh(np.empty((), dtype=object), ())):
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ShardedSparseMatrix(PackedMatrix):
    """A sparse matrix whose slices are packed one by one, each on a device.

    ``fj.sparse_matmul(x, w)`` equals ``x @ w.to_dense()``. In plain jit it takes and
    gives whole arrays: x is expected whole for ``dim="out"``, and the result is sharded
    over the axis in its last dimension; for ``dim="in"`` x is sharded in its last
    dimension and the result is whole. Inside a shard_map over the axis (the matrix
    being passed with ``P(axis)``) the same holds for what each device has: for "out"
    the result and the bias are the device's slices, for "in" x is, and the bias is
    whole.

    A pytree of the packed arrays of all shards, stacked in a leading dimension that is
    sharded over the mesh axis; `values` are padded to the longest shard.

    Attributes:
      shape: (in_features, out_features) of the whole matrix.
      dtype: float16 or bfloat16.
      mesh: the mesh over which it is sharded.
      axis: name of the mesh axis.
      dim: "out" (column-parallel) or "in" (row-parallel).
    """

    bitmap: Any
    entries: Any
    values: Any
    counts: Any
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    mesh: Mesh = dataclasses.field(metadata={"static": True})
    axis: str = dataclasses.field(metadata={"static": True})
    dim: Dim = dataclasses.field(metadata={"static": True})
    layout: str = dataclasses.field(default=layouts.DEFAULT, metadata={"static": True})

    def __post_init__(self):
        layouts.check("ShardedSparseMatrix", self.layout, (layouts.DEFAULT,))
        shard_shape(self.shape, self.mesh, self.axis, self.dim)

    @classmethod
    def from_dense(
        cls, dense: np.ndarray | jax.Array, mesh: Mesh, axis: str, *, dim: Dim
    ) -> "ShardedSparseMatrix":
        """Compresses a dense matrix slice by slice, each on its device.

        Args:
          dense: (in_features, out_features), float16 or bfloat16. Of a numpy array each
            device gets its slice only.
          mesh: the devices; over other axes than `axis` the slices are repeated.
          axis: name of the mesh axis.
          dim: "out" splits output features (column-parallel), "in" input features
            (row-parallel).

        Raises:
          ValueError: `dense` is no half-precision matrix, the mesh has no such axis, or
            its size does not divide the features.
          TypeError: `dense` is no concrete array.
        """
        if isinstance(dense, jax.core.Tracer) or not isinstance(
            dense, np.ndarray | jax.Array
        ):
            raise TypeError(
                "ShardedSparseMatrix.from_dense: expected a concrete numpy or JAX "
                f"array, got {type(dense).__name__}"
            )
        if dense.ndim != 2:
            raise ValueError(
                "ShardedSparseMatrix.from_dense: expected a matrix of shape "
                f"(in_features, out_features), got shape {dense.shape}"
            )
        k, m = shard_shape(dense.shape, mesh, axis, dim)
        if isinstance(dense, jax.Array) and len(dense.devices()) > 1:
            dense = np.asarray(dense)

        def shard(index: int, device: jax.Device) -> SparseMatrix:
            if dim == "out":
                part = dense[:, index * m : (index + 1) * m]
            else:
                part = dense[index * k : (index + 1) * k]
            if device.platform != "cpu":
                part = jax.device_put(part, device)  # to be packed there
            return SparseMatrix.from_dense(part)

        shape = (dense.shape[0], dense.shape[1])
        return cls.from_shards(shard, shape, dense.dtype, mesh, axis, dim=dim)

    @classmethod
    @without_mesh()
    def from_shards(
        cls,
        shard: Callable[[int, jax.Device], SparseMatrix],
        shape: tuple[int, int],
        dtype: Any,
        mesh: Mesh,
        axis: str,
        *,
        dim: Dim,
    ) -> "ShardedSparseMatrix":
        """Joins shards that are made one by one.

        Args:
          shard: called with the index of a shard and the device that is going to hold
            it, for the shards of this process; returns the slice.
          shape: (in_features, out_features) of the whole matrix.
          dtype: float16 or bfloat16.
          mesh: see from_dense(). Where it spans several processes, all of them have to
            call this, in the same order.
          axis: see from_dense().
          dim: see from_dense().

        Raises:
          ValueError: as from_dense(), or a shard has another shape or dtype.
        """
        expected = shard_shape(shape, mesh, axis, dim)
        sharding = NamedSharding(mesh, P(axis))
        count = mesh.shape[axis]
        places = sharding.addressable_devices_indices_map((count,))
        devices = {d: where[0].start or 0 for d, where in places.items() if where}
        made: dict[int, SparseMatrix] = {}
        for device, index in devices.items():
            if index not in made:
                made[index] = shard(index, device)
                _check_shard(made[index], expected, dtype, index)
        longest = max(matrix.values.shape[0] for matrix in made.values())
        longest = _largest_of_all_processes(longest, mesh)

        parts = []
        for device, index in devices.items():
            arrays = {name: getattr(made[index], name) for name in _LEAVES}
            parts.append(_part(jax.device_put(arrays, device), longest))

        def leaf(name):
            arrays = [part[name] for part in parts]
            shape = (count, *arrays[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

        leaves = {name: leaf(name) for name in _LEAVES}
        return cls(
            **leaves, shape=shape, dtype=np.dtype(dtype), mesh=mesh, axis=axis, dim=dim
        )

    def to_dense(self) -> jax.Array:
        """The dense (in_features, out_features) array, sharded as the matrix is."""
        return _to_dense(self)

    @property
    def count(self) -> int:
        """Number of shards."""
        return self.mesh.shape[self.axis]

    @property
    def _layers(self) -> int:
        return int(np.prod(np.shape(self.counts)[:-2]))

    def __copy__(self) -> "ShardedSparseMatrix":
        return dataclasses.replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedSparseMatrix":
        leaves = {name: copy.deepcopy(getattr(self, name), memo) for name in _LEAVES}
        return dataclasses.replace(self, **leaves)

    def __reduce__(self):
        raise TypeError(
            "ShardedSparseMatrix: expected something with a stored form, got a matrix "
            "that is spread over devices: store SparseMatrix.from_dense(w.to_dense())"
        )

    def __repr__(self) -> str:
        details = (
            f"shape={self.shape}, dtype={self.dtype.name}, dim={self.dim!r}, "
            f"axis={self.axis!r}, count={self.count}"
        )
        # Anything may stand in a leaf's place: a gradient's float0, what was donated.
        if all(is_readable(getattr(self, name)) for name in _LEAVES):
            whole = getattr(self.counts, "is_fully_addressable", True)
            if whole and np.ndim(self.counts) == 2:
                details += f", nnz={self.nnz}, sparsity={self.sparsity:.3f}"
            details += f", nbytes={self.nbytes}"
        return f"ShardedSparseMatrix({details}, layout={self.layout!r})"

    def __sparse_matmul__(
        self,
        x,
        *,
        bias=None,
        activation=None,
        implementation=None,
        preferred_element_type=None,
        layer=None,
    ) -> jax.Array:
        """What `sparse_matmul` calls."""
        if layer is not None:
            raise NotImplementedError(
                "sparse_matmul: expected no layer for a ShardedSparseMatrix, got "
                f"{layer!r}: stacks of sharded matrices are scanned over"
            )
        inside = self._is_inside_shard_map()
        self._check_mesh(inside)
        self._check_operands(x, bias, inside)
        check_activation(activation)
        static = {
            "activation": activation,
            "implementation": implementation,
            "dtype": result_dtype(x, self, preferred_element_type),
        }
        if inside:
            return self._multiply(x, self, bias, **static)
        return _product(x, self, bias, **static)

    def _multiply(self, x, shard, bias, *, activation, implementation, dtype):
        """The product of one device, which has one shard."""
        matrix = SparseMatrix(
            **{name: getattr(shard, name)[0] for name in _LEAVES},
            shape=self._local_shape,
            dtype=self.dtype,
        )
        if self.dim == "out":
            return sparse_matmul(
                x,
                matrix,
                bias=bias,
                activation=activation,
                implementation=implementation,
                preferred_element_type=dtype,
            )
        # Summed in float32, as on one device; then comes what follows the sum.
        y = sparse_matmul(
            x,
            matrix,
            implementation=implementation,
            preferred_element_type=jnp.float32,
        )
        y = jax.lax.psum(y, self.axis)
        if bias is not None:
            y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + bias.shape)
        return (jax.nn.relu(y) if activation else y).astype(dtype)

    @property
    def _local_shape(self) -> tuple[int, int]:
        return shard_shape(self.shape, self.mesh, self.axis, self.dim)

    def _map(self, function, in_specs, out_specs, other_axes=frozenset()):
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={self.axis, *other_axes},
        )

    def _is_inside_shard_map(self) -> bool:
        mesh = jax.sharding.get_abstract_mesh()
        axes = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        return axes.get(self.axis) == AxisType.Manual

    def _check_mesh(self, inside: bool) -> None:
        """In shard_map the axis must be the same, under jax.set_mesh all of them."""
        current, mine = jax.sharding.get_abstract_mesh(), self.mesh
        if inside:
            same = current.shape[self.axis] == mine.shape[self.axis]
        else:
            same = current.empty or current.shape_tuple == mine.shape_tuple
        if not same:
            raise ValueError(
                "sparse_matmul: expected a matrix that is sharded for the mesh in use, "
                f"{dict(current.shape)}, got one for the mesh {dict(mine.shape)}"
            )

    def _check_operands(self, x, bias, inside: bool) -> None:
        expected = reference.leaf_shapes(self._local_shape)["bitmap"]
        shards = 1 if inside else self.count
        if tuple(np.shape(self.bitmap)) != (shards, *expected):
            raise ValueError(
                "sparse_matmul: expected the packed array 'bitmap' of a "
                f"ShardedSparseMatrix of shape {self.shape} in {self.count} shards as "
                f"{(shards, *expected)}, got {np.shape(self.bitmap)}"
                + (f"; pass it to shard_map with P({self.axis!r})" if inside else "")
            )
        check_operands(x, bias, self, self._local_shape if inside else self.shape)


@functools.partial(jax.jit, static_argnames=("activation", "implementation", "dtype"))
def _product(x, w, bias, **static):
    def local(x, shard, bias):
        return w._multiply(x, shard, bias, **static)

    column = w.dim == "out"
    rows = _rows_spec(x, w.axis)
    x_spec = P(*rows, None if column else w.axis)
    y_spec = P(*rows, w.axis if column else None)
    bias_spec = P(w.axis) if column else P()
    if AxisType.Explicit in w.mesh.axis_types:
        x = jax.reshard(x, NamedSharding(w.mesh, x_spec))
        if bias is not None:
            bias = jax.reshard(bias, NamedSharding(w.mesh, bias_spec))
    in_specs = (x_spec, P(w.axis), bias_spec)
    return w._map(local, in_specs, y_spec, _axes_in(rows))(x, w, bias)


@jax.jit
def _to_dense(w):
    def local(shard):
        packed = shard.bitmap[0], shard.entries[0], shard.values[0]
        return packing.unpack(packed, w._local_shape, w.dtype)

    spec = P(None, w.axis) if w.dim == "out" else P(w.axis, None)
    return w._map(local, (P(w.axis),), spec)(w)


def shard_shape(
    shape: tuple[int, ...], mesh: Mesh, axis: str, dim: Dim
) -> tuple[int, int]:
    """(in_features, out_features) of one shard.

    Raises:
      ValueError: the mesh has no such axis, or its size does not divide the features.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh: expected a jax.sharding.Mesh, got {mesh!r:.80}")
    if axis not in mesh.axis_names:
        raise ValueError(
            f"axis: expected one of the mesh's axes {mesh.axis_names}, got {axis!r}"
        )
    if dim not in ("out", "in"):
        raise ValueError(f"dim: expected 'out' or 'in', got {dim!r}")
    count = mesh.shape[axis]
    k, m = shape
    features = m if dim == "out" else k
    # Of no input features there is no product on a device.
    if features % count or (dim == "in" and not features):
        raise ValueError(
            f"expected {dim}_features that mesh axis {axis!r} divides into {count} "
            f"equal shards, got {features} (shape {tuple(shape)})"
        )
    return (k, m // count) if dim == "out" else (k // count, m)


def _check_shard(matrix, expected, dtype, index) -> None:
    if matrix.shape != expected or matrix.dtype != np.dtype(dtype):
        raise ValueError(
            f"shard {index}: expected {np.dtype(dtype).name} of shape {expected}, got "
            f"{matrix.dtype.name} of shape {matrix.shape}"
        )


@functools.partial(jax.jit, static_argnums=1)
def _part(arrays: dict[str, jax.Array], segments: int) -> dict[str, jax.Array]:
    """A shard's arrays as a part of those of all shards, with so many segments."""
    missing = segments - len(arrays["values"])
    values = jnp.pad(arrays["values"], ((0, missing), (0, 0), (0, 0)))
    return {name: array[None] for name, array in (arrays | {"values": values}).items()}


def _largest_of_all_processes(number: int, mesh: Mesh) -> int:
    processes = {device.process_index for device in mesh.devices.flat}
    if len(processes) == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def _rows_spec(x, axis: str) -> tuple[str | None, ...]:
    """How explicit axes split the rows of x; over `axis` every device has them all."""
    spec = [*jax.typeof(x).sharding.spec, *[None] * x.ndim][: x.ndim - 1]
    return tuple(None if axis in _axes_in([part]) else part for part in spec)


def _axes_in(spec) -> set[str]:
    axes: set[str] = set()
    for part in spec:
        axes.update(part if isinstance(part, tuple) else {part} - {None})
    return axes
