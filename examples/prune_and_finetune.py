"""Prunes a small model and trains the weights that are left.

    python examples/prune_and_finetune.py

Pruning in one shot spoils what the network has learnt; training the nonzero weights,
which stay packed, repairs it. Needs optax.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import flashjax as fj

INPUTS, HIDDEN, ROWS = 16, 256, 256
SPARSITY = 0.8


class Network(nnx.Module):
    """A multilayer perceptron in float32."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(INPUTS, HIDDEN, rngs=rngs)
        self.hidden = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(x))
        return self.last(nnx.relu(self.hidden(x)))


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points, and the function to learn."""
    x = jax.random.uniform(key, (ROWS, INPUTS), minval=-1, maxval=1)
    return x, jnp.sin(3 * x).sum(axis=-1, keepdims=True)


def loss_fn(model: Network, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def step(model: Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array):
    loss, gradients = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, gradients)
    return loss


def train(model: Network, steps: int, seed: int) -> None:
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for key in jax.random.split(jax.random.key(seed), steps):
        step(model, optimizer, *batch(key))


def main(steps: int = 300) -> None:
    model = Network(nnx.Rngs(0))
    test = batch(jax.random.key(99))
    train(model, steps, seed=1)
    print(f"dense: loss {loss_fn(model, *test):.4f}")

    kernel = model.hidden.kernel
    kernel.set_value(fj.prune.magnitude(kernel.get_value(), SPARSITY))
    # The packed values are float16; the rest of the model stays float32.
    model = fj.sparsify(model, lambda path, layer: path == "hidden", jnp.float16)
    print(
        f"{SPARSITY:.0%} of the middle layer pruned: loss {loss_fn(model, *test):.4f}"
    )

    model = fj.trainable(model)  # before the optimizer is made
    train(model, steps, seed=2)
    model = fj.freeze(model)
    print(f"fine-tuned: loss {loss_fn(model, *test):.4f}")
    print(model.hidden.kernel[...])


if __name__ == "__main__":
    main()
