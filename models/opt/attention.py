"""Attention of OPT, and the cache of keys and values that it reads."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from flashjax import decode_attention as decode_kernel

# Largest number of attention scores held at once; longer prompts go in blocks.
_MAX_SCORES = 1 << 28


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, in preallocated slots.

    A pytree; donate it to the jitted step so that it is updated in place. Keys and
    values are one array per layer: a slice of a stacked array would be copied in
    every step.

    Attributes:
      keys, values: per layer (batch, num_heads, max_length, head_dim), of the model's
        `cache_dtype`.
      mask: (batch, max_length) bool, the slots that hold real tokens.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.mask.shape[0]

    @property
    def max_length(self) -> int:
        """Number of slots of each sequence."""
        return self.mask.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and mask."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    mask: jax.Array,
    query_slots: jax.Array,
) -> jax.Array:
    """Causal attention with float32 softmax; queries are already scaled.

    Args:
      queries: (batch, num_heads, length, head_dim).
      keys: (batch, num_heads, slots, head_dim).
      values: (batch, num_heads, slots, head_dim).
      mask: (batch, slots) bool, slots that may be attended to.
      query_slots: (length,) int32, each query's own slot.

    Returns:
      (batch, num_heads, length, head_dim) in the queries' dtype.
    """
    batch, heads, length, _ = queries.shape
    slots = keys.shape[2]
    block = max(1, _MAX_SCORES // (batch * heads * slots))
    outputs = [
        _attention_block(
            queries[:, :, i : i + block], keys, values, mask, query_slots[i : i + block]
        )
        for i in range(0, length, block)
    ]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def plain_decode_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    slot: jax.Array,
    slots: int,
) -> jax.Array:
    """`decode_attention` in plain JAX."""
    dtype = queries.dtype
    return attention(
        queries,
        keys[:, :, :slots].astype(dtype),
        values[:, :, :slots].astype(dtype),
        mask=mask[:, :slots],
        query_slots=slot[None],
    )


def decode_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    mask: jax.Array,
    slot: jax.Array,
    slots: int,
) -> jax.Array:
    """`attention` of one token of every sequence to a whole cache.

    Args:
      queries: (batch, num_heads, 1, head_dim).
      keys: (batch, num_heads, max_length, head_dim), the cache's dtype.
      values: the same.
      mask: (batch, max_length) bool, slots that may be attended to.
      slot: () int32, that of the token.
      slots: where no kernel knows how many are in use, so many are read.

    Returns:
      (batch, num_heads, 1, head_dim) in the queries' dtype.
    """
    plain = functools.partial(plain_decode_attention, slots=slots)

    def kernel(queries, keys, values, mask, slot):
        one = decode_kernel.decode_attention(
            queries[:, :, 0], keys, values, mask, slot + 1
        )
        return one[:, :, None]

    operands = queries, keys, values, mask, slot
    if not decode_kernel.is_supported(queries.dtype, keys):
        return plain(*operands)

    # The kernel has no rules: what differentiates or maps it gets plain JAX.
    @jax.custom_batching.custom_vmap
    def on_platform(*operands):
        return jax.lax.platform_dependent(*operands, cuda=kernel, default=plain)

    @on_platform.def_vmap
    def _(size, is_mapped, *operands):
        axes = [0 if mapped else None for mapped in is_mapped]
        return jax.vmap(plain, axes, axis_size=size)(*operands), True

    differentiable = jax.custom_jvp(on_platform)
    differentiable.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return differentiable(*operands)


def reads_slots_in_use(cache: KVCache, dtype: DTypeLike, platform: str) -> bool:
    """Whether `decode_attention` reads no more slots of a cache than are in use.

    Args:
      cache: the cache.
      dtype: the model's.
      platform: where it runs.
    """
    return platform == "gpu" and decode_kernel.is_supported(dtype, cache.keys[0])


def _attention_block(queries, keys, values, mask, query_slots):
    precision = product_precision(queries.dtype)
    scores = jnp.einsum(
        "bhtd,bhsd->bhts",
        queries,
        keys,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    key_slots = jnp.arange(keys.shape[2], dtype=jnp.int32)
    causal = key_slots[None] <= query_slots[:, None]
    allowed = mask[:, None, None, :] & causal[None, None]
    # A finite minimum: a padded query may attend to nothing and must not become NaN.
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, values, precision=precision)


def check_cache_dtype(cache_dtype: DTypeLike | None, dtype: DTypeLike) -> np.dtype:
    """The dtype of a cache as numpy's; None is the model's.

    Raises:
      ValueError: it is neither the model's nor float8_e4m3fn.
    """
    allowed = [np.dtype(dtype), np.dtype(jnp.float8_e4m3fn)]
    if cache_dtype is None:
        return allowed[0]
    with contextlib.suppress(TypeError):  # no dtype at all
        if (found := jnp.dtype(cache_dtype)) in allowed:
            return found
    names = " or ".join(d.name for d in allowed)
    raise ValueError(f"cache_dtype must be {names}, got {cache_dtype!r}")


def to_cache(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Converts keys or values; what is too large becomes the largest, not NaN."""
    if jnp.finfo(dtype).max < jnp.finfo(x.dtype).max:
        limit = jnp.finfo(dtype).max.astype(x.dtype)
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def row_major(slots: jax.Array) -> jax.Array:
    """Keeps the layout of a cache on GPUs.

    XLA may choose another one in a loop, and copy the cache before and after it.
    """
    layout = Layout(tuple(range(slots.ndim)))
    return jax.lax.platform_dependent(
        slots,
        cuda=lambda slots: with_layout_constraint(slots, layout),
        default=lambda slots: slots,
    )


def product_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """The precision of products of a dtype."""
    # GPUs would otherwise compute float32 products in TF32, with 1e-3 of error.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
