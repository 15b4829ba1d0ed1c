"""The product of a dense and a sparse matrix.

* `sparse_matmul`, here, checks the operands (`matmul_checks`);
* `matmul_rules.product` is a JAX primitive, which has the derivatives and batching;
* `matmul_impl.compute` picks the implementation when the computation is lowered.
"""

from typing import Any, Literal

import jax
import numpy as np

from flashjax import layouts, packing
from flashjax.matmul_checks import IMPLEMENTATIONS as IMPLEMENTATIONS
from flashjax.matmul_checks import check_layer, make_call
from flashjax.matmul_impl import KERNEL_ROWS as KERNEL_ROWS
from flashjax.matmul_rules import product
from flashjax.matrix import PackedMatrix
from flashjax.partitioning import vary_alike
from flashjax.sparse_matrix import SparseMatrix

Implementation = Literal["cuda", "cpu", "xla"]
Activation = Literal["relu"]


def sparse_matmul(
    x: jax.Array | np.ndarray,
    w: PackedMatrix,
    *,
    bias: jax.Array | np.ndarray | None = None,
    activation: Activation | None = None,
    implementation: Implementation | None = None,
    preferred_element_type: Any = None,
    layer: int | jax.Array | None = None,
) -> jax.Array:
    """Computes ``x @ w + bias`` for a sparse matrix w, accumulating in float32.

    With an activation, that of it: ``max(x @ w + bias, 0)``.

    Works under every transformation of JAX, on every implementation: jit, vmap (over x,
    the bias and the weights), derivatives of any order with respect to x and bias in
    forward and reverse mode, scan, remat, shard_map, export. The packed weights are
    integers to JAX and have no derivative.

    NaN and infinities give what they give in the dense product: times a zero of x or of
    w, stored or not, they are NaN. But with weights packed for few tokens
    (`SparseMatrix.from_dense`) on a GPU, those of x reach the outputs alone whose
    weight there is not zero, and some others. The same call gives the same bits again;
    what else does is in docs/how-it-works.md.

    Args:
      x: (..., K), float16, bfloat16 or float32.
      w: (K, M) in float16 or bfloat16; also an `nnx.Variable` that holds one, or
        another container of packed weights, whose type has `__sparse_matmul__`.
      bias: (M,) of any float dtype, added in float32 before the result is rounded;
        also an `nnx.Variable` that holds one. With `layer` also (layers, M), a bias for
        each matrix of the stack, which the CUDA kernel reads where it lies.
      activation: "relu" or None. The CUDA kernels apply it before they store the
        result, which otherwise is read and written once more. Derivatives are those of
        `jax.nn.relu`.
      implementation: `None` takes the best for the platform the computation is lowered
        for, and never fails on supported operands. "cuda" and "cpu" are the kernels;
        "xla" is plain JAX, for any platform, and materializes the dense matrix for the
        duration of the call. The kernels do so too above `KERNEL_ROWS` rows of x (the
        CUDA one above 96 on GPUs that are no Hopper; where `autotune` found another
        number, that counts; both above 8 for weights packed for few tokens, which no
        CPU kernel takes); the CUDA one also when the dtypes of x and w differ.
      preferred_element_type: dtype of the result: float16, bfloat16 or float32.
        `None` takes the promoted dtype of x and w.
      layer: which matrix of a stack (`SparseMatrix.stack`) to multiply by: an integer,
        or an array of JAX, such as the step of a loop, which if it is out of range
        means the nearest, as for JAX's dynamic slices. The kernels read the layer where
        it lies; plain JAX copies its packed arrays first.

    Returns:
      (..., M).

    Raises:
      ValueError: shapes or dtypes do not fit, or a layer is out of range.
      TypeError: w is no SparseMatrix, x or bias no array, or layer no integer.
      NotImplementedError: the named implementation cannot run here.
    """
    if not isinstance(w, SparseMatrix) and hasattr(w, "get_value"):
        w = w.get_value()  # a Flax variable, which stands for its value elsewhere too
    if bias is not None and hasattr(bias, "get_value"):
        bias = bias.get_value()
    multiply = getattr(type(w), "__sparse_matmul__", None)
    if multiply is not None:  # a container of its own around packed weights
        return multiply(
            w,
            x,
            bias=bias,
            implementation=implementation,
            preferred_element_type=preferred_element_type,
            **({} if activation is None else {"activation": activation}),
            **({} if layer is None else {"layer": layer}),
        )
    if not isinstance(w, SparseMatrix):
        raise TypeError(
            f"sparse_matmul: expected w to be a SparseMatrix, got {type(w).__name__}"
        )
    w.check_leaves("sparse_matmul", stacked=layer is not None)
    index = None if layer is None else check_layer(layer, w)
    layers = None if layer is None else w.bitmap.shape[0]
    transposed, other = None, layouts.DEFAULT
    if w.transposed is not None:
        transposed, other = w.transposed.packed, w.transposed.layout
    call = make_call(
        x,
        w,
        bias,
        implementation,
        preferred_element_type,
        layers,
        layouts=(w.layout, other),
        activation=activation,
    )
    return _jitted(call, x, w.packed, bias, transposed, index)


def _sparse_matmul(call, x, *operands):
    x = packing.gather(x, keep=x.ndim - 1)
    operands = jax.tree.map(packing.gather, operands)
    return product(call, *vary_alike((x, *operands)))


# One name in jaxprs and profiles; eager calls are compiled once per shape.
_jitted = jax.jit(_sparse_matmul, static_argnums=0)
