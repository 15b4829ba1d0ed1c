"""Splits sparse layers over devices; on a machine without them, over pretended ones.

    python examples/tensor_parallel.py

The first matrix is split by its outputs, the second by its inputs, so that the two
products need one sum over the devices.
"""

import os

if "XLA_FLAGS" not in os.environ:  # before JAX starts; for GPUs leave it out
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp

import flashjax as fj

WIDTH, HIDDEN = 256, 1024
SPARSITY = 0.8


def random_weight(seed: int, shape: tuple[int, int]) -> jax.Array:
    dense = jax.random.normal(jax.random.key(seed), shape, jnp.float16)
    return fj.prune.magnitude(dense * shape[0] ** -0.5, SPARSITY)


@jax.jit
def feed_forward(
    x: jax.Array, up: fj.ShardedSparseMatrix, down: fj.ShardedSparseMatrix
) -> jax.Array:
    return fj.sparse_matmul(jax.nn.relu(fj.sparse_matmul(x, up)), down)


def main() -> None:
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((len(devices),), ("model",), devices=devices)
    up, down = random_weight(0, (WIDTH, HIDDEN)), random_weight(1, (HIDDEN, WIDTH))
    sharded_up = fj.ShardedSparseMatrix.from_dense(up, mesh, "model", dim="out")
    sharded_down = fj.ShardedSparseMatrix.from_dense(down, mesh, "model", dim="in")
    print(sharded_up)

    x = jax.random.normal(jax.random.key(2), (8, WIDTH), jnp.float16)
    with jax.set_mesh(mesh):
        y = feed_forward(x, sharded_up, sharded_down)
        program = feed_forward.lower(x, sharded_up, sharded_down).compile().as_text()
    wide = [a.astype(jnp.float32) for a in (x, up, down)]
    expected = jax.nn.relu(wide[0] @ wide[1]) @ wide[2]
    difference = jnp.abs(y.astype(jnp.float32) - expected).max()
    print(f"{len(devices)} devices, {program.count(' all-reduce(')} all-reduce")
    print(f"largest difference from float32: {difference:.1e}")


if __name__ == "__main__":
    main()
