"""Products with trainable values as JAX primitives: derivatives and batching.

Two primitives are enough, each being linear in each of its two factors:

* the product ``x @ W(values)``, or with the transposed W;
* the sampled product: x^T dy at the positions of the values.

The cotangents of one are the other, so derivatives of any order exist. Where values are
a tangent, or a cotangent that is differentiated again, they are rounded to the weights'
half precision as the values themselves are; a first derivative is not.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from flashjax import matmul_impl, packing, reference
from flashjax.matmul_impl import Call
from flashjax.partitioning import devices_marker
from flashjax.primitives import (
    batch_rows,
    bias_cotangent,
    check_linear,
    define,
    given,
    one_by_one,
    product_tangent,
    through_activation,
    to_front,
    total,
    transpose_call,
    without_activation,
)
from flashjax.sample import is_live, sample

product_p = Primitive("trainable_product")
sample_p = Primitive("sampled_product")


class Positions(NamedTuple):
    """The arrays of a SparsePositions that products need."""

    bitmap: Any
    entries: Any
    live: Any


class Operands(NamedTuple):
    """Of a product; the matrix is packed as (K, M), or transposed as (M, K)."""

    x: Any  # (..., K)
    values: Any  # (segments, 16, 32, 2)
    bias: Any  # (M,) or None
    positions: Positions


@dataclasses.dataclass(frozen=True)
class SampleCall:
    """What is static in a sampled product, of a (K, M) matrix."""

    shape: tuple[int, int]
    dtype: np.dtype
    implementation: str | None = None


class Factors(NamedTuple):
    """Of a sampled product; without x, dy is the gradient (K, M) itself."""

    x: Any  # (..., K) or None
    dy: Any  # (..., M)
    positions: Positions


def product(call: Call, operands: Operands, transposed: bool = False) -> jax.Array:
    """The product of a call, differentiable in x, values and bias."""
    leaves, tree = jax.tree.flatten(operands)
    devices = devices_marker(operands.x)
    return product_p.bind(
        *leaves, call=call, tree=tree, transposed=transposed, devices=devices
    )


def sampled_product(call: SampleCall, factors: Factors) -> jax.Array:
    """The gradient (K, M) at the positions: (segments, 16, 32, 2) float32."""
    leaves, tree = jax.tree.flatten(factors)
    return sample_p.bind(*leaves, call=call, tree=tree)


def fold(live: jax.Array, values: jax.Array, dtype: np.dtype) -> jax.Array:
    """Float values to packed ones; whatever the padding holds counts as 0."""
    values = jnp.where(is_live(live), values, jnp.zeros((), values.dtype))
    bits = jax.lax.bitcast_convert_type(values.astype(dtype), jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.uint32)


# --- Evaluation -------------------------------------------------------------------


def _compute_product(*leaves, call, tree, transposed, devices):
    del devices  # JAX sees it
    x, values, bias, positions = jax.tree.unflatten(tree, leaves)
    packed: packing.Packed = (
        positions.bitmap,
        positions.entries,
        fold(positions.live, values, call.dtype),
    )
    weights = (None, packed) if transposed else (packed, None)
    return matmul_impl.compute(call, matmul_impl.Operands(x, bias, *weights))


def _compute_sample(*leaves, call, tree):
    x, dy, positions = jax.tree.unflatten(tree, leaves)
    factors = (dy,) if x is None else (x, dy)
    return sample(factors, call.shape, tuple(positions), call.implementation)


define(product_p, _compute_product)
define(sample_p, _compute_sample)


@product_p.def_abstract_eval
def _product_type(x, *others, call, **unused):
    del others, unused
    return matmul_impl.result_type(x, call.shape[1], call.out_dtype)


@sample_p.def_abstract_eval
def _sample_type(*leaves, call, tree):
    del call
    live = jax.tree.unflatten(tree, leaves).positions.live
    return live.update(
        shape=(live.shape[0], reference.SEGMENT_WORDS, reference.LANES, 2),
        dtype=np.dtype(jnp.float32),
        sharding=live.sharding.update(spec=jax.P(None, None, None, None)),
    )


# --- Derivatives ------------------------------------------------------------------


def _product_jvp(primals, tangents, *, call, tree, transposed, devices):
    del devices
    operands = jax.tree.unflatten(tree, primals)
    tangents = jax.tree.unflatten(tree, tangents)
    multiply = functools.partial(product, transposed=transposed)
    y = multiply(call, operands)
    linear = without_activation(call)
    terms = [product_tangent(multiply, linear, operands, tangents, y)]
    dvalues = given(tangents.values)
    if dvalues is not None:
        plain = dataclasses.replace(linear, bias_dtype=None)
        terms.append(multiply(plain, operands._replace(values=dvalues, bias=None)))
    return y, through_activation(call, total(terms, y), y)


def _product_transpose(dy, *primals, call, tree, transposed, devices):
    del devices
    check_linear(call)
    x, values, bias, positions = jax.tree.unflatten(tree, primals)
    cotangents: list[Any] = [None] * len(primals)
    if type(dy) is ad.Zero:
        return cotangents
    if ad.is_undefined_primal(x):
        turned = transpose_call(call, dy.dtype, x.aval.dtype)
        back = Operands(dy, values, None, positions)
        cotangents[0] = product(turned, back, not transposed)
    if ad.is_undefined_primal(values):
        shape = call.shape[::-1] if transposed else call.shape
        factors = (dy, x) if transposed else (x, dy)
        gradient = sampled_product(
            SampleCall(shape, call.dtype, call.implementation),
            Factors(*factors, positions),
        )
        cotangents[1] = gradient.astype(values.aval.dtype)
    if ad.is_undefined_primal(bias):
        cotangents[2] = bias_cotangent(dy, bias.aval.dtype)
    return cotangents


ad.primitive_jvps[product_p] = _product_jvp
ad.primitive_transposes[product_p] = _product_transpose


def _sample_jvp(primals, tangents, *, call, tree):
    slots = sample_p.bind(*primals, call=call, tree=tree)
    factors = jax.tree.unflatten(tree, primals)
    tangents = jax.tree.unflatten(tree, tangents)
    terms = []
    for name in ("x", "dy"):
        tangent = given(getattr(tangents, name))
        if tangent is not None:
            terms.append(sampled_product(call, factors._replace(**{name: tangent})))
    return slots, total(terms, slots)


def _sample_transpose(slots, *primals, call, tree):
    factors = jax.tree.unflatten(tree, primals)
    cotangents: list[Any] = [None] * len(primals)
    if type(slots) is ad.Zero:
        return cotangents
    x, dy, positions = factors
    if x is None:
        words = fold(positions.live, slots, call.dtype)
        packed = positions.bitmap, positions.entries, words
        dense = packing.unpack(packed, call.shape, call.dtype)
        cotangents[0] = dense.astype(dy.aval.dtype)
    elif ad.is_undefined_primal(x):
        cotangents[0] = _factor(call, dy, slots, positions, x.aval.dtype, True)
    else:
        cotangents[1] = _factor(call, x, slots, positions, dy.aval.dtype, False)
    return cotangents


def _factor(call, other, slots, positions, dtype, transposed):
    product_call = Call(
        shape=call.shape[::-1] if transposed else call.shape,
        dtype=call.dtype,
        x_dtype=np.dtype(other.dtype),
        bias_dtype=None,
        out_dtype=np.dtype(dtype),
        implementation=call.implementation,
    )
    return product(product_call, Operands(other, slots, None, positions), transposed)


ad.primitive_jvps[sample_p] = _sample_jvp
ad.primitive_transposes[sample_p] = _sample_transpose


# --- Batching ---------------------------------------------------------------------


def _batch_product(leaves, dims, *, call, tree, transposed, devices):
    del devices
    multiply = functools.partial(product, transposed=transposed)
    batched = jax.tree.unflatten(tree, [dim is not None for dim in dims])
    if batched.values or any(batched.positions):

        def one_product(*leaves):
            return multiply(call, jax.tree.unflatten(tree, leaves))

        return one_by_one(one_product, leaves, dims), 0
    operands = jax.tree.unflatten(tree, to_front(leaves, dims))
    return batch_rows(multiply, call, operands, batched), 0


def _batch_sample(leaves, dims, **params):
    one_sample = functools.partial(sample_p.bind, **params)
    return one_by_one(one_sample, leaves, dims), 0


batching.primitive_batchers[product_p] = _batch_product
batching.primitive_batchers[sample_p] = _batch_sample
