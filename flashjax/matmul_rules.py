"""The product as a JAX primitive: how it is differentiated and batched.

The product is linear in x and the bias together. That is all that JAX needs for every
derivative: the tangent is the same product of the tangents, the cotangent of x the
product with the transposed weights, which is this primitive again with the roles of
the two packings exchanged. Weights are integers to JAX and have no derivative.

A batch of x becomes rows of one kernel call.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flashjax import packing
from flashjax.matmul_impl import Call, Operands, compute, result_type
from flashjax.partitioning import devices_marker

product_p = Primitive("sparse_product")


def product(
    call: Call,
    x: jax.Array,
    packed: packing.Packed | None,
    bias: jax.Array | None = None,
    transposed: packing.Packed | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """``x @ w + bias``, differentiable in x and bias; of w one packing is enough.

    With a `layer` (int32), the packed arrays are stacks and it is the index.
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
    turned = _transpose_call(call, dy.dtype, np.dtype(jnp.float32))
    return _bind(turned, Operands(dy, None, transposed, packed, layer))


def _bind(call: Call, operands: Operands) -> jax.Array:
    leaves, tree = jax.tree.flatten(operands)
    devices = devices_marker(operands.x)
    return product_p.bind(*leaves, call=call, tree=tree, devices=devices)


def _transpose_call(call: Call, dy_dtype, dx_dtype) -> Call:
    return dataclasses.replace(
        call,
        shape=call.shape[::-1],
        x_dtype=np.dtype(dy_dtype),
        bias_dtype=None,
        out_dtype=np.dtype(dx_dtype),
    )


def _compute(*leaves, call, tree, devices):
    del devices  # JAX sees it
    return compute(call, jax.tree.unflatten(tree, leaves))


@product_p.def_impl
@functools.partial(jax.jit, static_argnames=("call", "tree", "devices"))
def _eager(*leaves, call, tree, devices):
    del devices
    return _bind(call, jax.tree.unflatten(tree, leaves))


mlir.register_lowering(product_p, mlir.lower_fun(_compute, multiple_results=False))


@product_p.def_abstract_eval
def _abstract_eval(x, *others, call, tree, devices):
    del others, tree, devices
    return result_type(x, call.shape[1], call.out_dtype)


# --- Derivatives ------------------------------------------------------------------


def _jvp(primals, tangents, *, call, tree, devices):
    del devices
    operands = jax.tree.unflatten(tree, primals)
    y = _bind(call, operands)
    dx = tangents[0]
    dbias = tangents[1] if operands.bias is not None else None
    if type(dbias) is ad.Zero:
        dbias = None
    if type(dx) is not ad.Zero:
        if dbias is None:
            call = dataclasses.replace(call, bias_dtype=None)
        return y, _bind(call, operands._replace(x=dx, bias=dbias))
    if dbias is None:
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    dbias = dbias.astype(call.out_dtype)
    return y, dbias.reshape((1,) * (y.ndim - 1) + dbias.shape) + jnp.zeros_like(y)


ad.primitive_jvps[product_p] = _jvp


def _transpose(dy, *primals, call, tree, devices):
    del devices
    operands = jax.tree.unflatten(tree, primals)
    cotangents: list[Any] = [None] * len(primals)
    if type(dy) is ad.Zero:
        return cotangents
    if ad.is_undefined_primal(operands.x):
        turned = _transpose_call(call, dy.dtype, operands.x.aval.dtype)
        swapped = Operands(
            dy, None, operands.transposed, operands.packed, operands.layer
        )
        cotangents[0] = _bind(turned, swapped)
    if ad.is_undefined_primal(operands.bias):
        rows = tuple(range(dy.ndim - 1))
        dbias = jnp.sum(dy, axis=rows, dtype=jnp.float32)
        cotangents[1] = dbias.astype(operands.bias.aval.dtype)
    return cotangents


ad.primitive_transposes[product_p] = _transpose


# --- Batching ---------------------------------------------------------------------


def _batch(leaves, dims, *, call, tree, devices):
    del devices
    leaves = [
        leaf if dim is None else jnp.moveaxis(leaf, dim, 0)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]
    batched = [dim is not None for dim in dims]
    operands = jax.tree.unflatten(tree, leaves)
    x_batched, bias_batched, *weights_batched = jax.tree.unflatten(tree, batched)
    if any(jax.tree.leaves(weights_batched)):
        return _map_batch(call, tree, leaves, batched), 0
    if not bias_batched:
        return _bind(call, operands), 0
    # One call for all rows; every batch element then gets a bias of its own.
    plain = dataclasses.replace(call, bias_dtype=None, out_dtype=np.dtype(jnp.float32))
    y = _bind(plain, operands._replace(bias=None))
    if not x_batched:
        y = y[None]
    bias = operands.bias.astype(jnp.float32)
    bias = bias.reshape(bias.shape[:1] + (1,) * (y.ndim - 2) + bias.shape[1:])
    return (y + bias).astype(call.out_dtype), 0


def _map_batch(call: Call, tree: Any, leaves: list, batched: list[bool]):
    """One product after the other: each has weights of its own."""
    mapped = [leaf for leaf, b in zip(leaves, batched, strict=True) if b]

    def one(mapped):
        mapped = iter(mapped)
        picked = [
            next(mapped) if b else leaf for leaf, b in zip(leaves, batched, strict=True)
        ]
        return _bind(call, jax.tree.unflatten(tree, picked))

    return jax.lax.map(one, mapped)


batching.primitive_batchers[product_p] = _batch
