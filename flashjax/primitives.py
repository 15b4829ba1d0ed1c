"""What the primitives of products have in common.

They take leaves of operands that are named tuples with an `x` (..., K) and a `bias`
(M,) or None. `multiply`, below, is a primitive bound to operands: it is called with the
`Call` and the operands and gives ``x @ w + bias``, or the activation of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from flashjax.matmul_impl import Call, activate


def define(primitive: Primitive, compute: Callable[..., Any]) -> None:
    """Lowers a primitive to a function of its leaves; eager calls are compiled too."""
    lowering = mlir.lower_fun(compute, multiple_results=False)
    mlir.register_lowering(primitive, lowering)

    @primitive.def_impl
    def eager(*leaves, **params):
        # Under jax.disable_jit() _bind would bind, and so call this, without end.
        with jax.disable_jit(False):
            return _bind(*leaves, primitive=primitive, params=tuple(params.items()))


@functools.partial(jax.jit, static_argnames=("primitive", "params"))
def _bind(*leaves, primitive, params):
    return primitive.bind(*leaves, **dict(params))


# --- Derivatives ------------------------------------------------------------------


def given(tangent: Any) -> Any:
    """A tangent, or None for a zero one."""
    return None if type(tangent) is ad.Zero else tangent


def total(tangents: Sequence[Any], like: jax.Array) -> Any:
    """The sum of those tangents of `like` that are not None."""
    terms = [tangent for tangent in tangents if tangent is not None]
    if not terms:
        return ad.Zero(jax.typeof(like).to_tangent_aval())
    return functools.reduce(jnp.add, terms)


def without_activation(call: Call) -> Call:
    """The linear part of a call, whose tangents are products."""
    return dataclasses.replace(call, activation=None)


def through_activation(call: Call, tangent: Any, y: jax.Array) -> Any:
    """The tangent of y from that of the call's linear part; jax.nn.relu's at 0 is 0."""
    if call.activation is None or type(tangent) is ad.Zero:
        return tangent
    return jnp.where(y > 0, tangent, jnp.zeros_like(tangent))


def check_linear(call: Call) -> None:
    """Before a product is transposed.

    Raises:
      NotImplementedError: it has an activation.
    """
    if call.activation is not None:
        raise NotImplementedError(
            "sparse_matmul: expected a product without activation to transpose, got "
            f"activation={call.activation!r}, which is not linear"
        )


def product_tangent(
    multiply: Callable[..., Any], call: Call, operands: Any, tangents: Any, y: jax.Array
) -> Any:
    """What the tangents of x and the bias add to that of y, or None for nothing."""
    dx, dbias = given(tangents.x), given(tangents.bias)
    if dx is not None:
        if dbias is None:
            call = dataclasses.replace(call, bias_dtype=None)
        return multiply(call, operands._replace(x=dx, bias=dbias))
    if dbias is None:
        return None
    dbias = dbias.astype(call.out_dtype)
    return dbias.reshape((1,) * (y.ndim - 1) + dbias.shape) + jnp.zeros_like(y)


def transpose_call(call: Call, dy_dtype: Any, dx_dtype: Any) -> Call:
    """The call of ``dy @ w.T``, of the linear part."""
    return dataclasses.replace(
        call,
        shape=call.shape[::-1],
        x_dtype=np.dtype(dy_dtype),
        bias_dtype=None,
        out_dtype=np.dtype(dx_dtype),
        activation=None,
        layouts=call.layouts[::-1],
    )


def bias_cotangent(dy: jax.Array, dtype: Any) -> jax.Array:
    """The sum over the rows, in float32 before it is rounded."""
    rows = tuple(range(dy.ndim - 1))
    return jnp.sum(dy, axis=rows, dtype=jnp.float32).astype(dtype)


# --- Batching ---------------------------------------------------------------------


def to_front(leaves: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """Moves the batch of every batched leaf into its first dimension."""
    return [
        leaf if dim is None else jnp.moveaxis(leaf, dim, 0)
        for leaf, dim in zip(leaves, dims, strict=True)
    ]


def batch_rows(multiply: Callable[..., Any], call: Call, operands: Any, batched: Any):
    """One product for a batch of x, of the bias or of both, in their first dimension.

    A batch of x becomes rows; every batch element then gets a bias of its own.
    """
    if not batched.bias:
        return multiply(call, operands)
    plain = dataclasses.replace(
        without_activation(call), bias_dtype=None, out_dtype=np.dtype(jnp.float32)
    )
    y = multiply(plain, operands._replace(bias=None))
    if not batched.x:
        y = y[None]
    bias = operands.bias.astype(jnp.float32)
    bias = bias.reshape(bias.shape[:1] + (1,) * (y.ndim - 2) + bias.shape[1:])
    return activate(call, (y + bias).astype(call.out_dtype))


def one_by_one(
    function: Callable[..., Any], leaves: Sequence[Any], dims: Sequence[int | None]
):
    """Calls a function with the leaves of one batch element after the other."""
    leaves = to_front(leaves, dims)
    mapped = [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]

    def one(mapped):
        rest = iter(mapped)
        picked = [
            leaf if dim is None else next(rest)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        return function(*picked)

    return jax.lax.map(one, mapped)
