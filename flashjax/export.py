"""Exporting functions that use FlashJAX with `jax.export`.

`jax.export` refuses custom calls that it does not know, unless it is told that they
are meant::

    import flashjax as fj
    import jax

    f = jax.jit(fj.sparse_matmul)
    rows = jax.export.symbolic_shape("rows")[0]
    exported = jax.export.export(
        f, platforms=["cpu", "cuda"], disabled_checks=fj.export.disabled_checks()
    )(jax.ShapeDtypeStruct((rows, w.shape[0]), w.dtype), w)
    blob = exported.serialize()

The process that calls the result imports flashjax first, which registers the kernels,
and this module if a SparseMatrix is an argument or a result::

    y = jax.export.deserialize(blob).call(x, w)

A symbolic number of rows always takes the kernels, also for many rows; but weights
packed for few tokens are then expanded. Where there is no GPU it is exported for a
Hopper: an older one, on which many rows are better expanded, runs them slowly.
`serialize` needs `pip install flatbuffers`. An exported function runs only with a
flashjax whose kernels are those that it was exported with.
"""

import json
from typing import Any

import jax.export
import numpy as np

from flashjax import _native
from flashjax.sparse_matrix import SparseMatrix

__all__ = ["disabled_checks"]


def disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """Lets `jax.export.export` pass the custom calls of FlashJAX, and only them.

    Returns:
      The argument `disabled_checks` of `jax.export.export`.
    """
    targets = list(_native.cpu.registrations())
    if _native.cuda is not None:
        targets += _native.cuda.registrations()
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]


def _serialize_static(static: Any) -> bytes:
    shape, dtype, layout = static
    return json.dumps([shape, np.dtype(dtype).name, layout]).encode()


def _deserialize_static(data: bytes | bytearray) -> tuple[Any, ...]:
    shape, dtype, layout = json.loads(bytes(data))
    return tuple(shape), np.dtype(dtype), layout


def _matrix(aux_data: Any, children: Any) -> SparseMatrix:
    names = ("bitmap", "entries", "values", "counts", "transposed")
    shape, dtype, layout = aux_data
    leaves = dict(zip(names, children, strict=True))
    return SparseMatrix(shape=shape, dtype=dtype, layout=layout, **leaves)


# Lets serialized functions take and return matrices. What is built from the children
# is looked at for its structure alone.
jax.export.register_pytree_node_serialization(
    SparseMatrix,
    serialized_name="flashjax.SparseMatrix",
    serialize_auxdata=_serialize_static,
    deserialize_auxdata=_deserialize_static,
    from_children=_matrix,
)
