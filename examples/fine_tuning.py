"""Fine-tuning an OPT model with optax, sparse or dense with a mask."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from demo_training.model import windows
from flax import nnx

from flashjax.models import opt

DECODER = re.compile(r"layers\.\d+\.(self_attn\.\w+_proj|fc1|fc2)")


def decoder_kernels(model: opt.OPT) -> dict[str, nnx.Param]:
    """The matrices that are pruned, by the layer's path."""
    return {
        ".".join(map(str, path)): node.kernel
        for path, node in nnx.iter_graph(model, graph=True)
        if isinstance(node, nnx.Linear) and DECODER.fullmatch(".".join(map(str, path)))
    }


def masked_step(masks: dict[str, jax.Array]) -> Callable[[opt.OPT], None]:
    """Sets the pruned weights of a dense model to 0."""

    def apply(model: opt.OPT) -> None:
        for name, kernel in decoder_kernels(model).items():
            kernel.set_value(jnp.where(masks[name], kernel.get_value(), 0))

    return apply


def loss_fn(model: opt.OPT, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of -log p(target), in nats."""
    logits = model(inputs)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def make_optimizer(model: opt.OPT, learning_rate: float, steps: int) -> nnx.Optimizer:
    """AdamW with warm-up and a cosine."""
    warmup = max(1, min(50, steps // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=0.01),
    )
    return nnx.Optimizer(model, chain, wrt=nnx.Param)


def state_bytes(optimizer: nnx.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    leaves = jax.tree.leaves(nnx.state(optimizer.opt_state))
    return sum(leaf.nbytes for leaf in leaves)


def train(
    model: opt.OPT,
    batches: Iterator[tuple[jax.Array, jax.Array]],
    measure: Callable[[int, opt.OPT], None],
    *,
    steps: int,
    learning_rate: float,
    after: Callable[[opt.OPT], None] = lambda model: None,
) -> dict[str, Any]:
    """Trains a model in place.

    Args:
      model: float32.
      batches: inputs and targets of each step.
      measure: called with the steps done and the model now and then.
      steps: of the optimizer.
      learning_rate: its peak.
      after: changes the model after each step.

    Returns:
      Losses, seconds a step, bytes of the optimizer's state.
    """
    optimizer = make_optimizer(model, learning_rate, steps)

    @nnx.jit
    def step(model, optimizer, inputs, targets):
        loss, gradients = nnx.value_and_grad(loss_fn)(model, inputs, targets)
        optimizer.update(model, gradients)
        after(model)
        return loss

    losses, seconds = [], []
    measure(0, model)
    for done in range(1, steps + 1):
        inputs, targets = next(batches)
        begin = time.perf_counter()
        losses.append(float(step(model, optimizer, inputs, targets)))
        seconds.append(time.perf_counter() - begin)
        if done % max(1, steps // 5) == 0 or done == steps:
            measure(done, model)
    return {
        "train_loss": [round(loss, 4) for loss in losses],
        "seconds_a_step": round(float(np.median(seconds)), 3),
        "optimizer_bytes": state_bytes(optimizer),
    }


def random_batches(ids: np.ndarray, batch: int, length: int, seed: int):
    """Inputs and targets (batch, length) without end."""
    if len(ids) <= length:
        raise ValueError(
            f"expected texts of more than {length} tokens to train on, got {len(ids)}"
        )
    rng, on_device = np.random.default_rng(seed), jnp.asarray(ids)
    while True:
        starts = rng.integers(0, len(ids) - length, batch, dtype=np.int32)
        yield windows(on_device, jnp.asarray(starts), length)
