"""A multilayer perceptron of sparse matrices, compiled by jax.jit.

python examples/sparse_mlp.py
"""

import itertools

import jax
import jax.numpy as jnp

import flashjax as fj

SIZES = (512, 2048, 2048, 128)
SPARSITY = 0.8


def make_weights(key: jax.Array) -> list[fj.SparseMatrix]:
    """Random matrices, pruned and packed. Packing happens outside of jit."""
    weights = []
    for size, next_size in itertools.pairwise(SIZES):
        key, layer_key = jax.random.split(key)
        dense = jax.random.normal(layer_key, (size, next_size), jnp.float16)
        pruned = fj.prune.magnitude(dense * size**-0.5, SPARSITY)
        weights.append(fj.SparseMatrix.from_dense(pruned))
    return weights


@jax.jit
def mlp(x: jax.Array, weights: list[fj.SparseMatrix]) -> jax.Array:
    """The weights are an argument: a SparseMatrix is a pytree."""
    *hidden, last = weights
    for w in hidden:
        x = fj.sparse_matmul(x, w, activation="relu")
    return fj.sparse_matmul(x, last)


def dense_mlp(x: jax.Array, weights: list[fj.SparseMatrix]) -> jax.Array:
    """The same in float32 with dense matrices."""
    *hidden, last = [w.to_dense().astype(jnp.float32) for w in weights]
    x = x.astype(jnp.float32)
    for w in hidden:
        x = jax.nn.relu(x @ w)
    return x @ last


def main() -> None:
    weights = make_weights(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, SIZES[0]), jnp.float16)
    for w in weights:
        print(w)
    difference = jnp.abs(mlp(x, weights) - dense_mlp(x, weights)).max()
    print(f"largest difference from float32: {difference:.1e}")

    # Derivatives with respect to x, with plain jax.grad.
    gradient = jax.grad(lambda x: mlp(x, weights).astype(jnp.float32).sum())(x)
    print(f"gradient with respect to x: {gradient.shape}, {gradient.dtype}")


if __name__ == "__main__":
    main()
