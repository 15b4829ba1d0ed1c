"""Synthetic weights: matrices and models of any size, made on the device.

One matrix at a time is dense, on the device; a model of hundreds of gigabytes is never
held dense, neither there nor on the host.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from flashjax.nn import SparseDense
from flashjax.nnx_tree import set_node
from flashjax.sparse_matrix import SparseMatrix

if TYPE_CHECKING:
    from flashjax.models.opt import OPT, OPTConfig


def random_sparse_matrix(
    key: jax.Array,
    shape: tuple[int, int],
    sparsity: float,
    dtype: DTypeLike = jnp.float16,
    scale: float | None = None,
) -> SparseMatrix:
    """A packed matrix whose every element is zero with the same probability.

    Args:
      key: a PRNG key.
      shape: (in_features, out_features).
      sparsity: probability of a zero, 0 to 1.
      dtype: float16 or bfloat16.
      scale: magnitudes are uniform between half and one and a half times this. None
        keeps the size of activations: 1 / sqrt(in_features * (1 - sparsity)).

    Returns:
      The matrix, on JAX's default device, where it was also packed if that is a GPU.

    Raises:
      ValueError: shape, sparsity or dtype does not fit.
    """
    zeros_key, values_key = jax.random.split(key)
    dense = _random(zeros_key, values_key, shape, sparsity, dtype, scale)
    return SparseMatrix.from_dense(dense)


def random_opt(
    config: "OPTConfig",
    sparsity: float,
    *,
    dtype: DTypeLike = jnp.float16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    fuse_qkv: bool = True,
    cache_dtype: DTypeLike | None = None,
) -> "OPT":
    """An OPT of random weights, every matrix with a memory of its own.

    It has the form in which `opt.from_pretrained` loads: queries, keys and values of a
    layer come from one matrix. Zeros are at the same positions in every layer: packed
    matrices that are alike have one size, and what packs them is compiled once.

    Args:
      config: the architecture.
      sparsity: share of zeros in the linear layers of the decoder, which are then
        sparse; 0 leaves them dense.
      dtype: of the model; float16 or bfloat16 unless sparsity is 0.
      seed: of the weights.
      progress: called with the layers that are done, and with all.
      fuse_qkv: False gives queries, keys and values a matrix each.
      cache_dtype: of the keys and values that generation keeps; None is the model's.

    Returns:
      The model on JAX's default device.

    Raises:
      ValueError: sparsity or dtype does not fit.
    """
    from flashjax.models.opt import OPT

    dtype = jnp.dtype(dtype)
    _check("random_opt", (1, 1), sparsity, dtype, halves=bool(sparsity))
    # Embeddings, norms and biases are made as a model of one layer has them.
    small = dataclasses.replace(config, num_layers=1)
    make = functools.partial(
        OPT, small, dtype=dtype, fuse_qkv=fuse_qkv, cache_dtype=cache_dtype
    )
    model = make(rngs=nnx.Rngs(seed))
    model.config = config
    template = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    layer = template.layers[0]
    del model.layers[:]
    key = jax.random.key(seed)
    for index in range(config.num_layers):
        new = nnx.clone(layer)
        _fill(new, jax.random.fold_in(key, index), sparsity)
        model.layers.append(new)
        if progress is not None:
            progress(index + 1, config.num_layers)
    return model


def _fill(layer: nnx.Module, key: jax.Array, sparsity: float) -> None:
    """Gives an abstract layer arrays: random kernels, zero biases, norms of one."""
    for index, (path, node) in enumerate(list(nnx.iter_graph(layer, graph=True))):
        if isinstance(node, nnx.LayerNorm):
            _set(node.scale, jnp.ones)
            _set(node.bias, jnp.zeros)
        if not isinstance(node, nnx.Linear):
            continue
        _set(node.bias, jnp.zeros)
        kernel = node.kernel
        dense = _random(
            jax.random.key(index),
            jax.random.fold_in(key, index),
            kernel.shape,
            sparsity,
            kernel.dtype,
            None,
        )
        if not sparsity:
            # Without waiting, random numbers of many layers would pile up.
            kernel.set_value(jax.block_until_ready(dense))
            continue
        sparse = SparseDense.from_matrix(
            SparseMatrix.from_dense(dense),
            node.bias,
            dtype=node.dtype,
            preferred_element_type=node.preferred_element_type,
        )
        set_node(layer, ".".join(map(str, path)), sparse)


def _set(variable: nnx.Variable[Any] | None, make: Callable[..., Any]) -> None:
    if variable is not None:
        variable.set_value(make(variable.shape, variable.dtype))


def _random(zeros_key, values_key, shape, sparsity, dtype, scale) -> jax.Array:
    shape, dtype = tuple(shape), jnp.dtype(dtype)
    _check("random_sparse_matrix", shape, sparsity, dtype, halves=bool(sparsity))
    if scale is None:
        scale = max(shape[0] * (1 - sparsity), 1.0) ** -0.5
    # The threshold is compared with 32 random bits; the highest means every one.
    threshold = min(round(sparsity * 2**32), 2**32 - 1)
    threshold, scale = np.uint32(threshold), np.float32(scale)
    dense = _random_dense(zeros_key, values_key, threshold, scale, shape, dtype)
    return dense if sparsity < 1 else jnp.zeros(shape, dtype)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _random_dense(zeros_key, values_key, threshold, scale, shape, dtype):
    keep = jax.random.bits(zeros_key, shape, jnp.uint32) >= threshold
    bits = jax.random.bits(values_key, shape, jnp.uint16)
    magnitude = (bits >> jnp.uint16(1)).astype(jnp.float32) / 2**15 + 0.5
    signed = jnp.where(bits & jnp.uint16(1), -magnitude, magnitude)
    return jnp.where(keep, scale * signed, 0.0).astype(dtype)


def _check(op, shape, sparsity, dtype, *, halves: bool) -> None:
    if len(shape) != 2 or not all(isinstance(d, int) and d >= 0 for d in shape):
        raise ValueError(
            f"{op}: expected a shape (in_features, out_features), got {shape}"
        )
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{op}: expected sparsity from 0 to 1, got {sparsity}")
    if halves and dtype not in (jnp.float16, jnp.bfloat16):
        raise ValueError(
            f"{op}: expected dtype float16 or bfloat16 for sparse weights, got "
            f"{dtype.name}"
        )
