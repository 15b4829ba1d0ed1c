"""Times a decode step that scans stacked layers beside the unrolled one.

    python benchmarks/scan_layers.py [--model opt-30b] [--layers 48] ...

The step has the layers of OPT: norms, six sparse products with biases, attention to a
cache. "unrolled" has a matrix and a cache for every layer, "scanned" a `lax.scan` over
the index into stacks (`layer=i`), "scanned by 4" and "by 8" the same with `unroll`,
which goes through the loop less often, "sliced" a `lax.scan` over the stacks, which
copies the packed weights of a layer in every step. Attention is that of OPT for
"unrolled" and "scanned, dots"; a dot may copy a layer's keys and values out of their
stack, so the others have it as sums of products, which read them where they lie. The
layers have copies of the same random weights, at addresses of their own. Programs take
turns; a run queues several steps and waits once, and the median of several runs is
taken.

Compile times (seconds on the clock, without the persistent cache) are of --compile
layers, from shapes alone. `packed_moves` counts, in the compiled step, instructions
that make packed arrays out of others.

Writes `benchmarks/results/scan-layers-DEVICE.json`.
"""

import functools
import os
import re
import statistics
import time
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import report
import typer

import flashjax as fj
from flashjax.models.opt import OPTConfig
from flashjax.models.opt.attention import attention, row_major
from flashjax.testing import random_sparse_matrix

MODELS = {
    "tiny": OPTConfig(
        vocab_size=64, hidden_size=64, num_layers=2, ffn_size=128, num_heads=4
    ),
    "opt-30b": OPTConfig.opt_30b(),
    "opt-66b": OPTConfig.opt_66b(),
}
REPETITIONS = 7
STEPS = 16  # queued in a run


class Weights(NamedTuple):
    """Of one layer, or stacks of all."""

    matrices: dict[str, fj.SparseMatrix]
    biases: dict[str, jax.Array]
    scales: dict[str, jax.Array]  # of the norms


def one_layer(config: OPTConfig, sparsity: float) -> Weights:
    size, ffn = config.hidden_size, config.ffn_size
    shapes = dict.fromkeys(["q", "k", "v", "out"], (size, size))
    shapes |= {"fc1": (size, ffn), "fc2": (ffn, size)}
    matrices = {
        name: random_sparse_matrix(jax.random.key(i), shape, sparsity)
        for i, (name, shape) in enumerate(shapes.items())
    }
    biases = {n: jnp.zeros(shape[1], jnp.float16) for n, shape in shapes.items()}
    scales = {n: jnp.ones(size, jnp.float16) for n in ("attention", "feed_forward")}
    return Weights(matrices, biases, scales)


def attention_by_sums(queries, keys, values, *, mask, query_slots):
    """`attention` of one query without a dot; `mask` says what it attends to."""
    del query_slots
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    scores = jnp.sum(queries.astype(jnp.float32) * keys, axis=-1)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.sum(weights[..., None] * values, axis=2, keepdims=True)
    return out.astype(queries.dtype)


def apply(config, x, cache, start, multiply, scales, attend=attention_by_sums):
    """One layer for (batch, 1, hidden): the result and the updated cache."""
    batch, heads = x.shape[0], config.num_heads

    def norm(name, x):
        y = x.astype(jnp.float32)
        y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True))
        return y.astype(x.dtype) * jnp.broadcast_to(scales[name], x.shape)

    def by_head(y):
        return y.reshape(batch, heads, 1, config.head_dim)

    normed = norm("attention", x)
    queries = by_head(multiply("q", normed)) * config.head_dim**-0.5
    keys, values = cache.update(
        by_head(multiply("k", normed)), by_head(multiply("v", normed)), start
    )
    slots = keys.shape[2]
    mask = jnp.broadcast_to(jnp.arange(slots) <= start, (batch, slots))
    attended = attend(queries, keys, values, mask=mask, query_slots=start[None])
    x = x + multiply("out", attended.reshape(batch, 1, -1))
    hidden = jax.nn.relu(multiply("fc1", norm("feed_forward", x)))
    return x + multiply("fc2", hidden), cache


class Cache:
    """Keys and values; of one layer, or those of layer `index` of a stack."""

    def __init__(self, keys, values, index=None):
        self.arrays, self.index = (keys, values), index

    def update(self, keys, values, start):
        """Writes slot `start` and returns the layer's keys and values."""
        zero = jnp.zeros((), jnp.int32)
        layer = () if self.index is None else (self.index,)
        at = (*layer, zero, zero, start, zero)
        news = (n[None] if layer else n for n in (keys, values))
        updated = jax.lax.optimization_barrier(
            tuple(
                jax.lax.dynamic_update_slice(array, new, at)
                for array, new in zip(self.arrays, news, strict=True)
            )
        )
        self.arrays = tuple(map(row_major, updated))
        if not layer:
            return self.arrays
        take = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        return tuple(take(array, self.index) for array in self.arrays)


def unrolled(config, x, start, cache, layers):
    updated = []
    for weights, (keys, values) in zip(layers, cache, strict=True):

        def multiply(name, x, weights=weights):
            bias = weights.biases[name]
            return fj.sparse_matmul(x, weights.matrices[name], bias=bias)

        x, new = apply(
            config,
            x,
            Cache(keys, values),
            start,
            multiply,
            weights.scales,
            attention,
        )
        updated.append(new.arrays)
    return x, updated


def scanned(config, x, start, cache, stack, attend=attention_by_sums, unroll=1):
    def step(carry, i):
        x, cache = carry

        def multiply(name, x):
            matrices, biases = stack.matrices[name], stack.biases[name]
            return fj.sparse_matmul(x, matrices, bias=biases, layer=i)

        scales = {name: scale[i] for name, scale in stack.scales.items()}
        x, new = apply(config, x, Cache(*cache, i), start, multiply, scales, attend)
        return (x, new.arrays), None

    indices = jnp.arange(cache[0].shape[0], dtype=jnp.int32)
    return jax.lax.scan(step, (x, cache), indices, unroll=unroll)[0]


def sliced(config, x, start, cache, stack):
    def step(carry, inputs):
        x, cache = carry
        i, weights = inputs

        def multiply(name, x):
            bias = weights.biases[name]
            return fj.sparse_matmul(x, weights.matrices[name], bias=bias)

        x, new = apply(config, x, Cache(*cache, i), start, multiply, weights.scales)
        return (x, new.arrays), None

    indices = jnp.arange(cache[0].shape[0], dtype=jnp.int32)
    return jax.lax.scan(step, (x, cache), (indices, stack))[0]


STEPS_BY_NAME = {
    "unrolled": unrolled,
    "scanned": scanned,
    "scanned, dots": functools.partial(scanned, attend=attention),
    "scanned by 4": functools.partial(scanned, unroll=4),
    "scanned by 8": functools.partial(scanned, unroll=8),
    "sliced": sliced,
}


def operands(name: str, config, layers: int, weights: Weights, batch: int, slots: int):
    """(x, start, cache, weights) of a step; shapes alone where the weights are."""
    shape = (batch, config.num_heads, slots, config.head_dim)

    def copies(tree):
        return [jax.tree.map(jnp.copy, tree) for _ in range(layers)]

    def stacks(tree):
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), tree
        )

    def empty():
        return tuple(jnp.zeros(shape, jnp.float16) for _ in "kv")

    repeat = copies if name == "unrolled" else stacks
    abstract = isinstance(jax.tree.leaves(weights)[0], jax.ShapeDtypeStruct)
    call: Any = jax.eval_shape if abstract else (lambda f, *args: f(*args))
    x = call(lambda: jnp.ones((batch, 1, config.hidden_size), jnp.float16))
    start = call(lambda: jnp.int32(slots // 2))
    return x, start, call(lambda: repeat(empty())), call(repeat, weights)


def compile_step(name: str, config, arguments):
    step = functools.partial(STEPS_BY_NAME[name], config)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=2).lower(*arguments).compile()
    return compiled, time.perf_counter() - began


def packed_moves(compiled) -> int:
    makes = re.findall(r"= u32\[\d+(?:,\d+){2,}\]\S* ([\w-]+)\(", compiled.as_text())
    return len([op for op in makes if op not in ("parameter", "get-tuple-element")])


def measure(config, layers, sparsity, batch, slots, compile_layers) -> list[dict]:
    weights = one_layer(config, sparsity)
    shapes = jax.eval_shape(lambda w: w, weights)
    results, programs = {}, {}
    for name in STEPS_BY_NAME:
        abstract = operands(name, config, compile_layers, shapes, batch, slots)
        _, seconds = compile_step(name, config, abstract)
        result = {"step": name, "layers": layers, "sparsity": sparsity, "batch": batch}
        result |= {"slots": slots, "compiled_layers": compile_layers}
        results[name] = result | {"compile_s": round(seconds, 2)}
    stacks = operands("scanned", config, layers, weights, batch, slots)
    for name in STEPS_BY_NAME:
        made = stacks
        if name == "unrolled":
            made = operands(name, config, layers, weights, batch, slots)
        compiled, _ = compile_step(name, config, made)
        results[name]["packed_moves"] = packed_moves(compiled)
        programs[name] = functools.partial(run, compiled, made)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(REPETITIONS + 1):
        for name, program in programs.items():
            ms = program()
            if turn:
                times[name].append(ms)
    base = statistics.median(times["unrolled"])
    for name, result in results.items():
        ms = statistics.median(times[name])
        result |= {"step_ms": round(ms, 4), "x_unrolled": round(ms / base, 4)}
        print(result, flush=True)
    return list(results.values())


def run(compiled, arguments) -> float:
    """Milliseconds of a step, of several in a row."""
    x, start, cache, weights = arguments
    cache = jax.block_until_ready(jax.tree.map(jnp.copy, cache))
    began = time.perf_counter()
    for _ in range(STEPS):
        y, cache = compiled(x, start, cache, weights)
    jax.block_until_ready(y)
    return (time.perf_counter() - began) / STEPS * 1e3


def main(
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "opt-30b",
    layers: Annotated[int, typer.Option()] = 48,
    sparsity: Annotated[str, typer.Option()] = "0.6,0.8",
    batch: Annotated[int, typer.Option()] = 8,
    slots: Annotated[int, typer.Option(help="Of the cache.")] = 128,
    compile_layers: Annotated[int, typer.Option("--compile")] = 96,
    name: Annotated[str, typer.Option(help="Stem of the result.")] = "scan-layers",
) -> None:
    """Times a decode step that scans stacked layers beside the unrolled one."""
    if model not in MODELS:
        raise SystemExit(f"expected a model from {list(MODELS)}, got {model!r}")
    jax.config.update("jax_enable_compilation_cache", False)
    results = []
    for s in map(float, sparsity.split(",")):
        config = MODELS[model]
        results += measure(config, layers, s, batch, slots, compile_layers)
        path = report.save(name, {"model": model, "results": results})
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
