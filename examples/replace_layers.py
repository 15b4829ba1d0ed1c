"""Gives a Flax model of your own sparse layers.

    python examples/replace_layers.py

The feed-forward layers of a small transformer block are pruned with Wanda, on the
inputs that they get, and swapped; attention and norms stay as they are.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import flashjax as fj

WIDTH, HIDDEN = 256, 1024
SPARSITY = 0.6


class Block(nnx.Module):
    """What stands for your model: nothing in it knows of FlashJAX."""

    def __init__(self, rngs: nnx.Rngs):
        options = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16, "rngs": rngs}
        self.norm = nnx.LayerNorm(WIDTH, **options)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, **options)
        self.up = nnx.Linear(WIDTH, HIDDEN, **options)
        self.down = nnx.Linear(HIDDEN, WIDTH, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.relu(self.up(x)))


def prune(block: Block, x: jax.Array) -> None:
    """Sets the least important weights to zero, one layer after the other."""
    inputs = x + block.attention(block.norm(x))
    prune_layer(block.up, inputs)
    prune_layer(block.down, nnx.relu(block.up(inputs)))


def prune_layer(layer: nnx.Linear, inputs: jax.Array) -> None:
    statistics = fj.prune.InputStatistics.zeros(layer.in_features)
    statistics = statistics.update(inputs)
    kernel = fj.prune.wanda(layer.kernel[...], statistics, SPARSITY)
    layer.kernel.set_value(kernel)


def main() -> None:
    block = Block(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (4, 32, WIDTH), jnp.bfloat16)
    prune(block, x)
    expected = block(x)

    block = fj.sparsify(block, lambda path, layer: path in ("up", "down"))
    print(block.up.kernel[...])
    result = nnx.jit(lambda block, x: block(x))(block, x)
    difference = jnp.abs(result - expected).max()
    print(f"largest difference from the dense layers: {difference:.1e}")


if __name__ == "__main__":
    main()
