"""Times decode steps of OPT split over GPUs, sparse beside dense.

    python benchmarks/opt_parallel.py --model opt-66b --layers 16 --devices 1,2,4

Weights are random, made and packed slice by slice on the device that holds them; those
of the sparse and of the dense run are not the same. Steps are queued one after the
other and the host waits once, so the time is the devices'; the median of several
repetitions is taken. For each sparsity the greedy tokens of every number of devices are
compared with those of the first: random weights of one layer are the same however the
model is split.

Writes `benchmarks/results/opt-parallel-DEVICE.json`.
"""

import os

# NCCL alone, over NVLink without multicast (NVLS), which shared machines may not offer.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import dataclasses
import statistics
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import report
import typer
from flax import nnx
from jax.sharding import Mesh

from flashjax.models.opt import OPT, OPTConfig
from flashjax.models.opt.parallel import DECODER_LINEARS, TensorParallel
from flashjax.nn import SparseDense
from flashjax.nnx_tree import set_node
from flashjax.sharding import ShardedSparseMatrix, shard_shape
from flashjax.sparse_matrix import SparseMatrix

MODELS = {
    "tiny": OPTConfig(
        vocab_size=64, hidden_size=64, num_layers=2, ffn_size=128, num_heads=4
    ),
    "opt-30b": OPTConfig.opt_30b(),
    "opt-66b": OPTConfig.opt_66b(),
    "opt-175b": OPTConfig.opt_175b(),
}
PARTS = 8  # random numbers are drawn in so many slices, whatever the devices
REPETITIONS = 5


def random_model(
    config: OPTConfig, sparsity: float, mesh: Mesh, fuse_qkv: bool = True
) -> OPT:
    """A float16 model on a mesh; no matrix is ever dense but a slice on its device."""
    small = dataclasses.replace(config, num_layers=1)
    make = nnx.eval_shape(
        lambda: OPT(small, dtype=jnp.float16, fuse_qkv=fuse_qkv, rngs=nnx.Rngs(0))
    )
    parallel = TensorParallel.create(config, mesh, "model")
    make.config, make.parallel = config, parallel
    layer = make.layers[0]
    del make.layers[:]
    fill(make, parallel, 0.0, 0)
    for index in range(config.num_layers):
        new = nnx.clone(layer)
        fill(new, parallel, sparsity, index + 1)
        make.layers.append(new)
    return make


def fill(module: nnx.Module, parallel: TensorParallel, sparsity: float, seed: int):
    generator = np.random.default_rng(seed)
    for number, (path, node) in enumerate(list(nnx.iter_graph(module, graph=True))):
        name = str(path[-1]) if path else ""
        if isinstance(node, nnx.LayerNorm):
            node.scale.set_value(parallel.put(name, "scale", ones(node.scale)))
            node.bias.set_value(parallel.put(name, "bias", 0 * ones(node.bias)))
        elif isinstance(node, nnx.Embed):
            table = generator.standard_normal(node.embedding.shape, np.float32) / 50
            table = parallel.put(name, "embedding", table.astype(np.float16))
            node.embedding.set_value(table)
        elif isinstance(node, nnx.Linear) and name in DECODER_LINEARS:
            key = jax.random.fold_in(jax.random.key(seed), number)
            node.bias.set_value(parallel.put(name, "bias", 0 * ones(node.bias)))
            kernel = random_kernel(key, node.kernel.shape, sparsity, parallel, name)
            if not sparsity:
                node.kernel.set_value(jax.block_until_ready(kernel.to_dense()))
                continue
            sparse = SparseDense.from_matrix(kernel, node.bias, dtype=node.dtype)
            set_node(module, ".".join(map(str, path)), sparse)


def ones(variable) -> np.ndarray:
    return np.ones(variable.shape, variable.dtype)


def random_kernel(key, shape, sparsity, parallel, name) -> ShardedSparseMatrix:
    """Drawn in PARTS slices along the split dimension, so that every split is equal."""
    mesh, dim = parallel.mesh, DECODER_LINEARS[name]
    local = shard_shape(shape, mesh, "model", dim)
    each = PARTS // mesh.shape["model"]
    split = 1 if dim == "out" else 0
    part = list(local)
    part[split] //= each

    def shard(index: int, device: jax.Device) -> SparseMatrix:
        with jax.default_device(device):
            parts = [
                random_part(jax.random.fold_in(key, index * each + i), tuple(part))
                for i in range(each)
            ]
            dense, keep = (jnp.concatenate(p, split) for p in zip(*parts, strict=True))
            scale = (shape[0] * (1 - sparsity)) ** -0.5
            dense = jnp.where(keep >= sparsity, dense * scale, 0).astype(jnp.float16)
            return SparseMatrix.from_dense(dense)

    return ShardedSparseMatrix.from_shards(
        shard, shape, jnp.float16, mesh, "model", dim=dim
    )


def random_part(key, shape):
    value, keep = jax.random.split(key)
    return jax.random.normal(value, shape), jax.random.uniform(keep, shape)


def time_steps(model: OPT, batch: int, length: int, steps: int):
    """Median microseconds of a greedy decode step, and the tokens of the last run."""
    graph, state = nnx.split(model)

    def step(state, cache, token, start):
        model = nnx.merge(graph, state)
        mask = jnp.ones((batch, 1), bool)
        positions = jnp.broadcast_to(start, (batch, 1))
        logits, cache = model.step(token, mask, positions, cache, start, last_only=True)
        return cache, jnp.argmax(logits, -1).astype(jnp.int32)[:, None]

    step = jax.jit(step, donate_argnums=1)

    def run():
        cache = jax.jit(lambda: model.init_cache(batch, length))()
        token = jnp.full((batch, 1), 2, jnp.int32)
        tokens = []
        jax.block_until_ready(cache)
        start = time.perf_counter()
        for i in range(steps):
            cache, token = step(state, cache, token, jnp.int32(i))
            tokens.append(token)
        jax.block_until_ready(tokens)
        seconds = time.perf_counter() - start
        return seconds / steps, np.concatenate(tokens, axis=1)

    run()
    runs = [run() for _ in range(REPETITIONS)]
    return statistics.median(seconds for seconds, _ in runs) * 1e6, runs[-1][1]


def measure(
    config, sparsities, batches, devices, length, steps, fuse_qkv
) -> list[dict]:
    results = []
    for sparsity in sparsities:
        first: dict[int, np.ndarray] = {}
        for count in devices:
            mesh = Mesh(np.array(jax.devices()[:count]), ("model",))
            model = random_model(config, sparsity, mesh, fuse_qkv)
            for batch in batches:
                us, tokens = time_steps(model, batch, length, steps)
                expected = first.setdefault(batch, tokens)
                results.append(
                    {
                        "layers": config.num_layers,
                        "sparsity": sparsity,
                        "devices": count,
                        "batch": batch,
                        "length": length,
                        "step_us": round(us, 1),
                        "equal_tokens": round(float((tokens == expected).mean()), 4),
                    }
                )
                print(results[-1], flush=True)
            del model
    return results


def numbers(text: str, kind=int) -> list:
    return [kind(part) for part in text.split(",")]


def main(
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "opt-66b",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all.")] = 0,
    sparsity: Annotated[str, typer.Option(help="0 is dense.")] = "0,0.6,0.8",
    batch: Annotated[str, typer.Option()] = "1,8,64",
    devices: Annotated[str, typer.Option(help="1, 2, 4 or 8 each.")] = "1,2,4",
    length: Annotated[int, typer.Option(help="Slots of the cache.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 32,
    fuse_qkv: Annotated[
        bool, typer.Option(help="Queries, keys and values from one matrix.")
    ] = True,
    name: Annotated[str, typer.Option(help="Stem of the result.")] = "opt-parallel",
) -> None:
    """Times decode steps of OPT split over devices."""
    if model not in MODELS:
        raise SystemExit(f"expected a model from {list(MODELS)}, got {model!r}")
    counts = numbers(devices)
    if not all(PARTS % n == 0 and n <= jax.device_count() for n in counts):
        raise SystemExit(
            f"expected 1, 2, 4 or 8 devices of {jax.device_count()}, got {devices}"
        )
    config = MODELS[model]
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    sparsities, batches = numbers(sparsity, float), numbers(batch)
    results = measure(config, sparsities, batches, counts, length, steps, fuse_qkv)
    settings = {
        "model": model,
        "fuse_qkv": fuse_qkv,
        "NCCL_NVLS_ENABLE": os.environ["NCCL_NVLS_ENABLE"],
    }
    print(f"written to {report.save(name, {'settings': settings, 'results': results})}")


if __name__ == "__main__":
    typer.run(main)
