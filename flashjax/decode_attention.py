"""Attention of a decode step on NVIDIA GPUs: a new token and the cache of those before.

XLA's products and softmax read the cache at half of the memory's bandwidth, and all of
it that might be in use; the kernel reads what is in use at nearly all
(docs/kernel-log.md, section 13).
"""

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from flashjax import packing

HEAD_DIMS = (64, 128)  # that the kernel takes


def is_supported(dtype: DTypeLike, keys: jax.Array) -> bool:
    """Whether a computation that is lowered for CUDA can call the kernel.

    Args:
      dtype: of the queries.
      keys: (batch, heads, slots, head_dim).
    """
    dtype = jnp.dtype(dtype)
    return (
        packing.can_lower_for_cuda()
        and keys.shape[-1] in HEAD_DIMS
        and dtype in (jnp.float16, jnp.bfloat16)
        and keys.dtype in (dtype, jnp.float8_e4m3fn)
        and 0 not in keys.shape
        # Explicitly sharded arrays would have to say how the result is.
        and AxisType.Explicit not in jax.typeof(keys).sharding.mesh.axis_types
    )


def decode_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    used: jax.Array,
) -> jax.Array:
    """Attention by the CUDA kernel, with float32 sums.

    Every device computes its own sequences and heads.

    Args:
      queries: (batch, heads, head_dim), float16 or bfloat16, already scaled.
      keys: (batch, heads, slots, head_dim), the queries' dtype or float8_e4m3fn.
      values: the same as the keys.
      mask: (batch, slots) bool, slots that may be attended to. A sequence without any
        attends to all slots in use alike.
      used: () int32, at least 1: only the first slots are read.

    Returns:
      (batch, heads, head_dim) in the queries' dtype.
    """
    if AxisType.Manual in jax.typeof(keys).sharding.mesh.axis_types:
        return _call(queries, keys, values, mask, used)  # inside shard_map
    return _partitioned(queries, keys, values, mask, used)


def _call(queries, keys, values, mask, used):
    result = jax.typeof(queries)
    return jax.ffi.ffi_call(
        "flashjax_decode_attention_cuda", result, vmap_method="sequential"
    )(queries, keys, values, mask, used)


def _partition(mesh, args, result):
    batch = heads = None
    if mesh.empty:  # no array has a NamedSharding: every device computes all
        mesh = Mesh(list(result.sharding.device_set), ("all",))
    else:
        spec = tuple(result.sharding.spec)
        batch, heads = (*spec, *[None] * (2 - len(spec)))[:2]

    def place(*axes):
        return NamedSharding(mesh, P(*axes))

    by_head = place(batch, heads)
    return (
        mesh,
        _call,
        by_head,
        (by_head, by_head, by_head, place(batch), place()),
    )


_partitioned = custom_partitioning(lambda *args: jax.jit(_call)(*args))
_partitioned.def_partition(
    _partition,
    sharding_rule="b h d, b h s d, b h s d, b s, -> b h d",
    need_replication_factors=("d", "s"),
)
