"""The product as a JAX primitive: how it is differentiated and batched.

The product is linear in x and the bias together. That is all that JAX needs for every
derivative: the tangent is the same product of the tangents, the cotangent of x the
product with the transposed weights, which is this primitive again with the roles of
the two packings exchanged. Weights are integers to JAX and have no derivative. Where
the call has an activation, the tangents are those of its linear part, then masked.

A batch of x becomes rows of one kernel call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from flashjax import packing
from flashjax.matmul_impl import (
    Call,
    Operands,
    compute,
    of_layer,
    own_bias,
    result_type,
)
from flashjax.partitioning import devices_marker
from flashjax.primitives import (
    batch_rows,
    bias_cotangent,
    check_linear,
    define,
    one_by_one,
    product_tangent,
    through_activation,
    to_front,
    total,
    transpose_call,
    without_activation,
)

product_p = Primitive("sparse_product")


def product(
    call: Call,
    x: jax.Array,
    packed: packing.Packed | None,
    bias: jax.Array | None = None,
    transposed: packing.Packed | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """The product of a call, differentiable in x and bias; of w one packing is enough.

    With a `layer` (int32), the packed arrays are stacks and it is the index; then bias
    may be (layers, M), a stack too.
    """
    return _bind(call, Operands(x, bias, packed, transposed, layer))


def backward(
    call: Call,
    dy: jax.Array,
    packed: packing.Packed | None,
    transposed: packing.Packed | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """``dy @ w.T`` in float32 for the product of `call`: (..., M) -> (..., K)."""
    turned = transpose_call(call, dy.dtype, np.dtype(jnp.float32))
    return _bind(turned, Operands(dy, None, transposed, packed, layer))


def _bind(call: Call, operands: Operands) -> jax.Array:
    leaves, tree = jax.tree.flatten(operands)
    devices = devices_marker(operands.x)
    return product_p.bind(*leaves, call=call, tree=tree, devices=devices)


def _compute(*leaves, call, tree, devices):
    del devices  # JAX sees it
    return compute(call, jax.tree.unflatten(tree, leaves))


define(product_p, _compute)


@product_p.def_abstract_eval
def _abstract_eval(x, *others, call, tree, devices):
    del others, tree, devices
    return result_type(x, call.shape[1], call.out_dtype)


# --- Derivatives ------------------------------------------------------------------


def _jvp(primals, tangents, *, call, tree, devices):
    del devices
    operands = jax.tree.unflatten(tree, primals)
    tangents = jax.tree.unflatten(tree, tangents)
    y = _bind(call, operands)
    if type(tangents.bias) is not ad.Zero:
        dbias = own_bias(operands._replace(bias=tangents.bias)).bias
        tangents = tangents._replace(bias=dbias)
    linear = without_activation(call)
    tangent = total([product_tangent(_bind, linear, operands, tangents, y)], y)
    return y, through_activation(call, tangent, y)


ad.primitive_jvps[product_p] = _jvp


def _transpose(dy, *primals, call, tree, devices):
    del devices
    check_linear(call)
    operands = jax.tree.unflatten(tree, primals)
    cotangents: list[Any] = [None] * len(primals)
    if type(dy) is ad.Zero:
        return cotangents
    if ad.is_undefined_primal(operands.x):
        turned = transpose_call(call, dy.dtype, operands.x.aval.dtype)
        swapped = Operands(
            dy, None, operands.transposed, operands.packed, operands.layer
        )
        cotangents[0] = _bind(turned, swapped)
    if ad.is_undefined_primal(operands.bias):
        bias = operands.bias.aval
        dbias = bias_cotangent(dy, bias.dtype)
        if bias.ndim == 2:
            own = functools.partial(of_layer, layer=operands.layer)
            (dbias,) = jax.linear_transpose(own, bias)(dbias)
        cotangents[1] = dbias
    return cotangents


ad.primitive_transposes[product_p] = _transpose


# --- Batching ---------------------------------------------------------------------


def _batch(leaves, dims, *, call, tree, devices):
    del devices
    batched = jax.tree.unflatten(tree, [dim is not None for dim in dims])
    if any(jax.tree.leaves(batched._replace(x=None, bias=None))):

        def one_product(*leaves):
            return _bind(call, jax.tree.unflatten(tree, leaves))

        # Each has weights of its own.
        return one_by_one(one_product, leaves, dims), 0
    operands = jax.tree.unflatten(tree, to_front(leaves, dims))
    if batched.bias and operands.bias.ndim == 3:
        biases = of_layer(operands.bias, operands.layer, axis=1)
        operands = operands._replace(bias=biases)
    return batch_rows(_bind, call, operands, batched), 0


batching.primitive_batchers[product_p] = _batch
