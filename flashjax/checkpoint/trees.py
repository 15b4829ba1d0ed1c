"""Sparse matrices as arrays, for any store of arrays."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .checks import expect, kind
from .encoding import check_rows, encode
from .metadata import VERSION

if TYPE_CHECKING:
    from flashjax.sparse_matrix import SparseMatrix

TREE_KEY = "flashjax_sparse"


def to_arrays(matrix: "SparseMatrix") -> dict[str, np.ndarray]:
    """Gives the canonical arrays of a SparseMatrix, for any store of arrays.

    Args:
      matrix: (in_features, out_features).

    Returns:
      {"flashjax_sparse": int32 () the version, "shape": int64 (2,) (out, in),
      "bitmap": see encode(), "values": see encode()}.

    Raises:
      TypeError: matrix is no SparseMatrix.
      ValueError: it is a stack, whose matrices unstack() gives.
    """
    from flashjax.sparse_matrix import SparseMatrix
    from flashjax.trainable_matrix import SparsePositions, TrainableMatrix

    if not isinstance(matrix, SparseMatrix):
        hint = ""
        if isinstance(matrix, TrainableMatrix):
            hint = ": freeze() the model, or pass what to_sparse() returns"
        elif isinstance(matrix, SparsePositions):
            hint = ": freeze() the model first"
        raise TypeError(
            f"to_arrays: expected a SparseMatrix, got {type(matrix).__name__}{hint}"
        )
    matrix.check_leaves("to_arrays")
    bitmap, values = encode(np.asarray(matrix.to_dense()).T)
    return {
        TREE_KEY: np.asarray(VERSION, np.int32),
        "shape": np.asarray(matrix.shape[::-1], np.int64),
        "bitmap": bitmap,
        "values": values,
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> "SparseMatrix":
    """Packs what to_arrays() gave.

    Raises:
      CheckpointError: the arrays are incomplete, contradict each other or are of an
        unknown version.
    """
    from flashjax.sparse_matrix import SparseMatrix

    expected = [TREE_KEY, "bitmap", "shape", "values"]
    ok = isinstance(arrays, Mapping) and sorted(arrays) == sorted(expected)
    got = sorted(arrays) if isinstance(arrays, Mapping) else kind(arrays)
    expect(ok, "sparse weight", "arrays", expected, got)
    parts = {name: np.asarray(array) for name, array in arrays.items()}
    version, shape = parts[TREE_KEY].tolist(), parts["shape"].tolist()
    expect(version == VERSION, "sparse weight", "version", VERSION, version)
    ok = isinstance(shape, list) and len(shape) == 2
    ok = ok and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    expect(ok, "sparse weight", "shape", "two sizes below 2**31", shape)
    rows = check_rows(parts["bitmap"], parts["values"], (shape[0], shape[1]))
    return SparseMatrix.from_rows(rows)


def export_tree(tree: Any) -> Any:
    """Replaces every SparseMatrix of a pytree by its canonical arrays.

    What comes out holds arrays alone and can be stored by orbax or any other store; it
    still loads when the packed layout has changed. For an NNX model::

        arrays = export_tree(nnx.to_pure_dict(nnx.state(model)))

    Args:
      tree: any pytree.

    Returns:
      The tree, with the dicts of to_arrays() for SparseMatrix. A second packing and a
      layout for few tokens are not in them: `with_transpose()` and
      `repack(tokens=...)` make them again.

    Raises:
      TypeError: a matrix has no canonical arrays: it is being trained (freeze the
        model first) or is spread over devices.
      ValueError: a matrix is a stack.
    """
    from flashjax.matrix import PackedMatrix
    from flashjax.trainable_matrix import SparsePositions

    def is_packed(node):
        return isinstance(node, PackedMatrix | SparsePositions)

    def export(path, node):
        if not is_packed(node):
            return node
        try:
            return to_arrays(node)
        except (TypeError, ValueError) as error:
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise type(error)(f"export_tree: {where}: {error}") from error

    return jax.tree_util.tree_map_with_path(export, tree, is_leaf=is_packed)


def import_tree(tree: Any) -> Any:
    """Undoes export_tree(); the matrices are packed for this version of FlashJAX.

    Raises:
      CheckpointError: see from_arrays().
    """

    def is_export(node):
        return isinstance(node, Mapping) and TREE_KEY in node

    return jax.tree.map(
        lambda node: from_arrays(node) if is_export(node) else node,
        tree,
        is_leaf=is_export,
    )
