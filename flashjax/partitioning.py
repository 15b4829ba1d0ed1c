"""Products with replicated weights, computed where the rows of x are.

To XLA a kernel is a black box: it would gather a sharded x first, and then compute all
rows on every device.
"""

import functools
import string
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def over_rows(function: Callable[..., Any], x: jax.Array, *others: Any) -> jax.Array:
    """Calls the function on each device with its own rows of x.

    Args:
      function: (x (..., K), *others) -> (..., M), rows being independent of each other.
      x: (..., K); all dimensions but the last may be sharded. A sharded last one is
        gathered.
      *others: pytrees of arrays, which every device gets whole.

    Returns:
      (..., M), its rows sharded as those of x.
    """
    axes = _axes_by_type(jax.typeof(x).sharding.mesh)
    if axes[AxisType.Explicit]:
        return _over_known_rows(function, axes[AxisType.Explicit], x, *others)
    if axes[AxisType.Manual]:  # inside shard_map
        return function(x, *others)
    if _axes_by_type(jax.sharding.get_abstract_mesh())[AxisType.Explicit]:
        return function(x, *others)  # with Explicit axes, x would show how it is split
    return _over_propagated_rows(function, x, *others)


def without_types(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes, over which no type says how an array is split."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def _axes_by_type(mesh) -> dict[AxisType, set[str]]:
    axes = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {kind: {a for a in axes if axes[a] == kind} for kind in AxisType}


def _over_known_rows(function, axes, x, *others):
    rows = P(*jax.typeof(x).sharding.spec[:-1], None)

    def local(x, *others):
        return function(x, *vary_like(x, others))

    return jax.shard_map(
        local,
        mesh=jax.typeof(x).sharding.mesh,
        in_specs=(rows, *[P()] * len(others)),
        out_specs=rows,
        axis_names=axes,
    )(x, *others)


def _over_propagated_rows(function, x, *others):
    """Where XLA alone knows how x is sharded: axes of type Auto."""

    def partition(mesh, args, result):
        rows = P()
        if mesh.empty:  # no array has a NamedSharding: every device computes all rows
            mesh = Mesh(list(result.sharding.device_set), ("all",))
        else:
            rows = P(*result.sharding.spec[:-1], None)
        by_row, whole = NamedSharding(mesh, rows), NamedSharding(mesh, P())
        _, *wholes = jax.tree.map(lambda _: whole, args)
        return mesh, function, by_row, (by_row, *wholes)

    # A function of its own keeps its constants; custom_partitioning takes none.
    partitioned = custom_partitioning(lambda *args: jax.jit(function)(*args))
    rule, whole = _sharding_rule(x, others)
    partitioned.def_partition(
        partition, sharding_rule=rule, need_replication_factors=whole
    )
    return partitioned(x, *others)


def devices_marker(x: jax.Array) -> Any:
    """A parameter for a primitive whose lowering calls `over_rows`.

    JAX hands the devices to a lowering only if it finds a computation in the jaxpr that
    needs them. This is one, or None where `over_rows` does without.
    """
    axes = _axes_by_type(jax.typeof(x).sharding.mesh)
    if axes[AxisType.Explicit] or axes[AxisType.Manual]:
        return None
    return _marker()


@functools.cache
def _marker():
    row = jax.ShapeDtypeStruct((1,), np.float32)
    return jax.make_jaxpr(functools.partial(_over_propagated_rows, lambda x: x))(row)


def _sharding_rule(x, others) -> tuple[str, tuple[str, ...]]:
    """Shardy's notation: rows pass through, all other dimensions are needed whole."""
    names = (a + b for a in string.ascii_lowercase for b in string.ascii_lowercase)
    rows = [next(names) for _ in range(x.ndim - 1)]
    whole: list[str] = []

    def factors(count):
        new = [next(names) for _ in range(count)]
        whole.extend(new)
        return new

    operands = [[*rows, *factors(1)]]
    operands += [factors(leaf.ndim) for leaf in jax.tree.leaves(others)]
    result = [*rows, *factors(1)]
    rule = f"{', '.join(map(' '.join, operands))} -> {' '.join(result)}"
    return rule, tuple(whole)


def vary_like(x: jax.Array, tree: Any) -> Any:
    """Inside shard_map, makes arrays vary over the mesh axes over which x varies."""
    return _vary_over(_varying_axes(x), tree)


def vary_alike(operands):
    """Inside shard_map, makes all operands vary over the union of their mesh axes.

    The transpose of this sums the cotangents of operands that vary over fewer axes.
    """
    axes = [_varying_axes(leaf) for leaf in jax.tree.leaves(operands)]
    return _vary_over(frozenset().union(*axes), operands)


def _vary_over(axes: frozenset[str], tree: Any) -> Any:
    def vary(leaf):
        missing = tuple(axes - _varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def _varying_axes(leaf) -> frozenset[str]:
    return frozenset(jax.typeof(leaf).manual_axis_type.varying)
