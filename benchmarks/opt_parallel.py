"""Times decode steps of OPT split over GPUs, sparse beside dense.

    python benchmarks/opt_parallel.py --model opt-66b --devices 1,2

Weights are random, made on the device that holds them and packed there. Their zeros are
at the same positions in every layer, so that packing is compiled once; every layer has
values and memory of its own. One device has the plain model, several have it split.
All steps of a run are one program with a loop, as in `opt.generate`; a step's time is
the program's by their number, the median of several runs.

The greedy tokens of every number of devices are compared with those of the first, which
has the same weights: `equal_tokens` is the share of those generated freely, where a row
goes its own way after the first difference, and `equal_next_tokens` the share if both
are given the tokens of the first. `kernels` (--profile) are those that a device spends
most of a step in, waiting for other devices included; the docs add up the collectives
among them. `peak_bytes_a_device` is the most that was in use in a run on the device
that had most, `held_bytes_a_device` what was in use there before it. What does not fit
into a device's memory is in the results without a time.

Writes `benchmarks/results/opt-parallel-DEVICE.json` after every measurement.
"""

import os

# NCCL alone, over NVLink without multicast (NVLS), which shared machines may not offer.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
# Of a GPU's memory; the rest is for CUDA, cuBLAS and NCCL.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import dataclasses
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple

import device_time
import jax
import jax.numpy as jnp
import numpy as np
import report
import typer
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from flashjax.cli.memory_watch import MemoryWatch
from flashjax.models.opt import OPT, OPTConfig
from flashjax.models.opt.memory import predict
from flashjax.models.opt.parallel import DECODER_LINEARS, TensorParallel
from flashjax.nn import SparseDense
from flashjax.nnx_tree import set_node
from flashjax.sharding import ShardedSparseMatrix
from flashjax.sparse_matrix import SparseMatrix

MODELS = {
    "tiny": OPTConfig(
        vocab_size=64, hidden_size=64, num_layers=2, ffn_size=128, num_heads=4
    ),
    "opt-30b": OPTConfig.opt_30b(),
    "opt-66b": OPTConfig.opt_66b(),
    "opt-175b": OPTConfig.opt_175b(),
}
AXIS = "model"
REPETITIONS = 5
KERNELS = 16  # in the results, of each step
OWN = -1  # in place of a given token: the one that the model has chosen


# --- A model of random weights ----------------------------------------------------


def random_model(
    config: OPTConfig, sparsity: float, count: int, fuse_qkv: bool = True
) -> OPT:
    """A float16 model; no matrix is ever dense but one at a time, or a slice of it."""
    small = dataclasses.replace(config, num_layers=1)
    model = nnx.eval_shape(
        lambda: OPT(small, dtype=jnp.float16, fuse_qkv=fuse_qkv, rngs=nnx.Rngs(0))
    )
    parallel = None
    if count > 1:
        mesh = Mesh(np.array(jax.devices()[:count]), (AXIS,))
        parallel = TensorParallel.create(config, mesh, AXIS)
    model.config, model.parallel = config, parallel
    layer = model.layers[0]
    del model.layers[:]
    key = jax.random.key(0)
    fill(model, parallel, 0.0, key)
    for index in range(config.num_layers):
        new = nnx.clone(layer)
        fill(new, parallel, sparsity, jax.random.fold_in(key, index + 1))
        model.layers.append(new)
    jax.block_until_ready(nnx.state(model))
    return model


def fill(
    module: nnx.Module, parallel: TensorParallel | None, sparsity: float, key: jax.Array
) -> None:
    """Gives an abstract module arrays: norms of 1, biases of 0, the rest drawn."""

    def put(name, attribute, array):
        array = np.asarray(array) if array.ndim == 1 else array
        return parallel.put(name, attribute, array) if parallel else jnp.asarray(array)

    for number, (path, node) in enumerate(list(nnx.iter_graph(module, graph=True))):
        name = str(path[-1]) if path else ""
        drawn = jax.random.fold_in(key, number)
        if isinstance(node, nnx.LayerNorm):
            node.scale.set_value(put(name, "scale", np.ones(node.scale.shape, "f2")))
            node.bias.set_value(put(name, "bias", np.zeros(node.bias.shape, "f2")))
        elif isinstance(node, nnx.Embed):
            table = random_table(drawn, node.embedding.shape)
            node.embedding.set_value(put(name, "embedding", table))
        elif isinstance(node, nnx.Linear) and name in DECODER_LINEARS:
            node.bias.set_value(put(name, "bias", np.zeros(node.bias.shape, "f2")))
            positions = jax.random.fold_in(jax.random.key(1), number)
            shape = node.kernel.shape
            dense = random_dense(
                positions, drawn, shape, sparsity, sharding_of(name, parallel)
            )
            if not sparsity:
                # Without waiting, random numbers of many layers would pile up.
                node.kernel.set_value(jax.block_until_ready(dense))
                continue
            matrix = pack(dense, name, parallel)
            sparse = SparseDense.from_matrix(matrix, node.bias, dtype=node.dtype)
            set_node(module, ".".join(map(str, path)), sparse)


def sharding_of(name: str, parallel: TensorParallel | None):
    if parallel is None:
        return SingleDeviceSharding(jax.devices()[0])
    spec = P(None, AXIS) if DECODER_LINEARS[name] == "out" else P(AXIS, None)
    return NamedSharding(parallel.mesh, spec)


def random_dense(positions, key, shape, sparsity, sharding) -> jax.Array:
    """The same numbers whatever the sharding; every device draws its own."""

    def draw(positions, key):
        values = jax.random.normal(key, shape) * (shape[0] * (1 - sparsity)) ** -0.5
        if not sparsity:
            return values.astype(jnp.float16)
        keep = jax.random.bits(positions, shape) >= np.uint32(sparsity * 2**32)
        return jnp.where(keep, values, 0).astype(jnp.float16)

    return _jit(draw, shape, sparsity, sharding)(positions, key)


_programs: dict = {}


def _jit(draw, shape, sparsity, sharding):
    """One program for all matrices that are alike."""
    return _programs.setdefault(
        (shape, sparsity, sharding), jax.jit(draw, out_shardings=sharding)
    )


@functools.partial(jax.jit, static_argnums=1)
def random_table(key, shape) -> jax.Array:
    return (jax.random.normal(key, shape) / 50).astype(jnp.float16)


def pack(dense: jax.Array, name: str, parallel: TensorParallel | None):
    if parallel is None:
        return SparseMatrix.from_dense(dense)
    slices = {shard.device: shard.data for shard in dense.addressable_shards}
    return ShardedSparseMatrix.from_shards(
        lambda index, device: SparseMatrix.from_dense(slices[device]),
        dense.shape,
        dense.dtype,
        parallel.mesh,
        AXIS,
        dim=DECODER_LINEARS[name],
    )


# --- Measuring --------------------------------------------------------------------


def make_program(model: OPT, batch: int, length: int):
    """A function of the state and given tokens (steps, batch): the tokens chosen."""
    graph, _ = nnx.split(model)

    def run(state, given):
        model = nnx.merge(graph, state)
        mask = jnp.ones((batch, 1), bool)

        def step(carry, inputs):
            cache, last = carry
            index, given = inputs
            token = jnp.where(given == OWN, last, given)[:, None]
            positions = jnp.broadcast_to(index, (batch, 1))
            logits, cache = model.step(
                token, mask, positions, cache, index, last_only=True
            )
            chosen = jnp.argmax(logits, -1).astype(jnp.int32)
            return (cache, chosen), chosen

        start = model.init_cache(batch, length), jnp.zeros(batch, jnp.int32)
        indices = jnp.arange(len(given), dtype=jnp.int32)
        return jax.lax.scan(step, start, (indices, given))[1]

    return jax.jit(run)


def compile_programs(model: OPT, batches: list[int], length: int, steps: int) -> dict:
    """Compiled programs by batch, with the seconds that each took."""
    _, state = nnx.split(model)

    def compile_one(lowered):
        began = time.perf_counter()
        return lowered.compile(), time.perf_counter() - began

    lowered = [
        make_program(model, b, length).lower(state, first_tokens(model, b, steps))
        for b in batches
    ]
    # Side by side, because much of it runs on one core; not where kernels of dense
    # weights are chosen by their times.
    sparse = any(
        isinstance(node, SparseDense) for _, node in nnx.iter_graph(model, graph=True)
    )
    with ThreadPoolExecutor(len(batches) if sparse else 1) as pool:
        compiled = list(pool.map(compile_one, lowered))
    return dict(zip(batches, compiled, strict=True))


def first_tokens(model: OPT, batch: int, steps: int) -> np.ndarray:
    """Another first token for each row, and none that are given later."""
    given = np.full((steps, batch), OWN, np.int32)
    given[0] = np.arange(batch) % (model.config.vocab_size - 2) + 2
    return given


def time_program(program, state, given) -> tuple[float, np.ndarray]:
    """Median milliseconds of a step, and the tokens chosen."""
    tokens = np.asarray(program(state, given))
    times = []
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        jax.block_until_ready(program(state, given))
        times.append(time.perf_counter() - began)
    return statistics.median(times) / len(given) * 1e3, tokens


def equality(program, state, given, tokens, expected) -> dict[str, float]:
    """How many tokens are those of another number of devices."""
    forced = np.concatenate([given[:1], expected[:-1]])
    following = np.asarray(program(state, forced))
    return {
        "equal_tokens": round(float((tokens == expected).mean()), 4),
        "equal_next_tokens": round(float((following == expected).mean()), 4),
    }


def profile_step(program, state, given, devices: int) -> dict:
    """A step's milliseconds in the profiler, and its kernels on one device."""
    with device_time.profile() as kernels:
        jax.block_until_ready(program(state, given))
    steps = len(given)
    rows = device_time.by_name(kernels, devices * steps)
    return {
        "profiled_step_ms": round(device_time.span(kernels) / steps / 1e6, 3),
        "kernels": rows[:KERNELS],
    }


def fits(config, sparsity, batch, length, count) -> tuple[bool, int]:
    """Whether a device may hold its part, and the bytes predicted for it."""
    total = predict(
        config, sparsity=sparsity, batch=batch, length=length, devices=count
    ).total
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit is None or total <= limit, total


class Run(NamedTuple):
    """What all measurements have in common; `main` says what it is."""

    length: int
    steps: int
    fuse_qkv: bool
    profile: bool


def measure(config, sparsities, batches, devices, run: Run, save) -> None:
    results: list[dict] = []
    for sparsity in sparsities:
        first: dict[int, dict] = {}
        for count in devices:
            plan = {b: fits(config, sparsity, b, run.length, count) for b in batches}
            fitting = [b for b in batches if plan[b][0]]
            model, programs = None, {}
            if fitting:
                began = time.perf_counter()
                model = random_model(config, sparsity, count, run.fuse_qkv)
                print(f"made in {time.perf_counter() - began:.1f} s", flush=True)
                programs = compile_programs(model, fitting, run.length, run.steps)
            for batch in batches:
                result = {
                    "layers": config.num_layers,
                    "sparsity": sparsity,
                    "devices": count,
                    "batch": batch,
                    "length": run.length,
                    "predicted_bytes_a_device": plan[batch][1],
                }
                if batch in programs:
                    compiled = programs.pop(batch)
                    result |= measure_one(model, *compiled, batch, count, run, first)
                results.append(result)
                print(result, flush=True)
                save(results)
            del model


def measure_one(model, program, compile_s, batch, devices, run: Run, first) -> dict:
    """Empty where memory ran out after all: what was measured before is kept."""
    _, state = nnx.split(model)
    given = first_tokens(model, batch, run.steps)
    try:
        ms, tokens = time_program(program, state, given)
        rate = batch / ms * 1e3
        result = {"step_ms": round(ms, 3), "tokens_per_s": round(rate, 1)}
        result["tokens_per_gpu_second"] = round(rate / devices, 1)
        with MemoryWatch(jax.devices()[:devices]) as memory:
            jax.block_until_ready(program(state, given))
        result["held_bytes_a_device"] = memory.before
        result["peak_bytes_a_device"] = memory.peak
        temporary = program.memory_analysis().temp_size_in_bytes
        result |= {"compile_s": round(compile_s, 1), "temporary_bytes": temporary}
        if run.profile and devices > 1:
            result |= profile_step(program, state, given, devices)
        if batch in first:
            result["speedup"] = round(first[batch]["ms"] / ms, 3)
            expected = first[batch]["tokens"]
            result |= equality(program, state, given, tokens, expected)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {}
    first.setdefault(batch, {"ms": ms, "tokens": tokens})
    return result


def numbers(text: str, kind=int) -> list:
    return [kind(part) for part in text.split(",")]


def main(
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "opt-66b",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all.")] = 0,
    sparsity: Annotated[str, typer.Option(help="0 is dense.")] = "0.6,0.8,0",
    batch: Annotated[str, typer.Option()] = "1,8,64",
    devices: Annotated[str, typer.Option(help="Numbers of devices.")] = "1,2",
    length: Annotated[int, typer.Option(help="Slots of the cache.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps in a run.")] = 32,
    fuse_qkv: Annotated[
        bool, typer.Option(help="Queries, keys and values from one matrix.")
    ] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Kernels of a step; needs GPUs.")
    ] = False,
    name: Annotated[str, typer.Option(help="Stem of the result.")] = "opt-parallel",
) -> None:
    """Times decode steps of OPT split over devices."""
    if model not in MODELS:
        raise SystemExit(f"expected a model from {list(MODELS)}, got {model!r}")
    counts = numbers(devices)
    if not all(1 <= n <= jax.device_count() for n in counts):
        raise SystemExit(f"expected 1 to {jax.device_count()} devices, got {devices}")
    if not 1 <= steps <= length:
        raise SystemExit(f"expected 1 to {length} steps, got {steps}")
    config = MODELS[model]
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    settings = {
        "model": model,
        "layers_of_the_model": MODELS[model].num_layers,
        "steps": steps,
        "fuse_qkv": fuse_qkv,
        "NCCL_NVLS_ENABLE": os.environ["NCCL_NVLS_ENABLE"],
    }

    def save(results):
        return report.save(name, {"settings": settings, "results": results})

    sparsities, batches = numbers(sparsity, float), numbers(batch)
    run = Run(length, steps, fuse_qkv, profile)
    measure(config, sparsities, batches, counts, run, save)


if __name__ == "__main__":
    typer.run(main)
