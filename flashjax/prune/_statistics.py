"""Statistics of a layer's inputs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ._checks import (
    Pattern,
    all_finite,
    check_not_masked,
    check_sparsity,
    check_weight,
    check_whole_number,
    native,
    parse_pattern,
)
from ._placement import automatic, check_devices, is_explicit, jit_products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class InputStatistics:
    """What the methods need to know of a layer's inputs, summed over calibration text.

    A pytree of two arrays; `update` may be called under jit, with `self` donated.

    Attributes:
      gram: (K, K) float32, the sum of ``x[:, None] * x[None, :]`` over all inputs x.
      count: () uint32, how many inputs were seen (up to 2**32 - 1).
    """

    gram: jax.Array
    count: jax.Array

    @classmethod
    def zeros(cls, K: int) -> "InputStatistics":
        """Returns the statistics of no inputs, for a layer of `K` input features.

        Raises:
          ValueError: K is negative.
          TypeError: K is no whole number.
        """
        K = check_whole_number("InputStatistics.zeros", "K", K, 0)
        return cls(jnp.zeros((K, K), jnp.float32), jnp.zeros((), jnp.uint32))

    @property
    def in_features(self) -> int:
        """The number of input features, K."""
        return self.gram.shape[0]

    def update(self, x: Any, mask: Any = None) -> "InputStatistics":
        """Adds inputs.

        Args:
          x: (..., K), any float dtype. Half-precision inputs are multiplied exactly and
            summed in float32, others are multiplied in float32. Rows may be split over
            devices; over explicit axes, every device gets the whole result.
          mask: (...), bool; inputs where it is False (padding, say) do not count, even
            if they hold NaN. None: all count.

        Returns:
          New statistics.

        Raises:
          ValueError: the shape or dtype of x or mask does not fit.
          TypeError: x or mask is a masked array.
        """
        for array in (x, mask):
            check_not_masked("InputStatistics.update", array)
        x = jnp.asarray(x)
        K = self.in_features
        if x.ndim < 1 or x.shape[-1] != K:
            raise ValueError(
                f"InputStatistics.update: expected x of shape (..., {K}), got {x.shape}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"InputStatistics.update: expected x in a float dtype, got {x.dtype}"
            )
        if x.dtype not in (jnp.float16, jnp.bfloat16):
            x = x.astype(jnp.float32)
        count = jnp.uint32(math.prod(x.shape[:-1]))
        if mask is not None:
            mask = jnp.asarray(mask)
            if mask.shape != x.shape[:-1] or mask.dtype != jnp.bool_:
                raise ValueError(
                    f"InputStatistics.update: expected a bool mask of shape "
                    f"{x.shape[:-1]}, got {mask.dtype} of shape {mask.shape}"
                )
            x = _zero_unless(mask, x)
            count = mask.sum(dtype=jnp.uint32)
        return InputStatistics(self.gram + _gram(x), self.count + count)


def _gram(x: jax.Array) -> jax.Array:
    """Returns the sum of ``x[:, None] * x[None, :]`` over all rows, (K, K) float32."""
    whole = None
    if is_explicit(x):
        sharding = jax.typeof(x).sharding
        rows = P(*sharding.spec[:-1], None)
        x = jax.reshard(x, NamedSharding(sharding.mesh, rows))
        whole = NamedSharding(sharding.mesh, P(None, None))
    else:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    dims = tuple(range(x.ndim - 1))
    return lax.dot_general(
        x,
        x,
        ((dims, dims), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
        out_sharding=whole,
    )


# Under jit, a mask that is on no mesh yet goes where x is.
@jax.jit
def _zero_unless(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x with zeros in the rows where the mask is False."""
    if is_explicit(x):
        sharding = jax.typeof(x).sharding
        rows = P(*sharding.spec[:-1])
        mask = jax.reshard(mask, NamedSharding(sharding.mesh, rows))
    return jnp.where(mask[..., None], x, jnp.zeros_like(x))


def check_statistics(where: str, dense: Any, stats: Any) -> None:
    """Raises if `stats` are not those of the inputs of `dense`."""
    if not isinstance(stats, InputStatistics):
        raise TypeError(
            f"{where}: expected InputStatistics, got {type(stats).__name__}"
        )
    if isinstance(stats.gram, jax.core.Tracer):
        raise TypeError(
            f"{where}: expected concrete statistics, got traced ones; prune outside of "
            "jit, vmap and grad"
        )
    K = dense.shape[0]
    if stats.gram.shape != (K, K):
        raise ValueError(
            f"{where}: expected statistics of {K} input features, as the weight of "
            f"shape {dense.shape} has, got a gram of shape {stats.gram.shape}"
        )
    check_devices(where, weight=dense, statistics=stats.gram)
    if not all_finite(stats.gram):
        raise ValueError(
            f"{where}: expected finite statistics, got NaN or infinity in the gram: "
            "the layer's inputs hold such values, or are too large for float32"
        )
    if not int(stats.count):
        raise ValueError(
            f"{where}: expected statistics of at least one input, got none: update "
            "them with the layer's inputs first"
        )


def check_arguments(
    where: str,
    dense: Any,
    stats: InputStatistics,
    sparsity: float | None,
    pattern: str | None,
) -> tuple[float, Pattern | None]:
    """Returns the share of zeros and the pattern, if a method can prune with these."""
    groups = parse_pattern(where, pattern)
    sparsity = check_sparsity(where, sparsity, groups)
    check_weight(where, dense)
    check_statistics(where, dense, stats)
    return sparsity, groups


def reconstruction_error(dense: Any, pruned: Any, stats: InputStatistics) -> float:
    """Returns how much of a layer's output pruning changes.

    Args:
      dense: (K, M), the weight before.
      pruned: (K, M), the weight after.
      stats: of the layer's inputs X.

    Returns:
      ``||X (dense - pruned)||_F^2 / ||X dense||_F^2``, from the gram alone, in float32.
      0 where nothing changes, infinity where an output of zeros does.

    Raises:
      ValueError: shapes or dtypes do not fit; weights or statistics are not finite, or
        on different devices.
      TypeError: an argument is of the wrong type, or traced.
    """
    where = "prune.reconstruction_error"
    for weight in (dense, pruned):
        check_weight(where, weight)
        check_statistics(where, weight, stats)
    if dense.shape != pruned.shape:
        raise ValueError(
            f"{where}: expected weights of one shape, got {dense.shape} and "
            f"{pruned.shape}"
        )
    check_devices(where, dense=dense, pruned=pruned)
    dense, pruned = automatic(native(dense)), automatic(native(pruned))
    change, output = _energies(dense, pruned, automatic(stats.gram))
    change, output = max(float(change), 0.0), max(float(output), 0.0)
    if not change:
        return 0.0
    return change / output if output else float(np.inf)


@jit_products
def _energies(
    dense: jax.Array, pruned: jax.Array, gram: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dense = dense.astype(jnp.float32)
    change = dense - pruned.astype(jnp.float32)
    return _energy(change, gram), _energy(dense, gram)


def _energy(weight: jax.Array, gram: jax.Array) -> jax.Array:
    return (weight * jnp.matmul(gram, weight, precision="highest")).sum()
