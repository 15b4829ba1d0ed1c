"""Times the attention of a decode step: the kernel beside plain JAX.

    python benchmarks/decode_attention.py --models opt-30b,opt-66b --batch 1,8,64

One layer's cache of random numbers, so many copies of it that they do not fit into L2;
the device's time for all of them by their number. `plain` reads as many slots as
`opt.generate` does without the kernel; the bound is the time to read the slots in
use at the bandwidth that was measured.

Prints a table and writes `benchmarks/results/decode-attention-DEVICE.json`.
"""

from typing import Annotated

import device_time
import jax
import jax.numpy as jnp
import report
import typer

from flashjax.cli.bench_generate import read_bandwidth
from flashjax.cli.predict import find_config
from flashjax.decode_attention import decode_attention
from flashjax.models.opt.attention import plain_decode_attention
from flashjax.models.opt.generation_request import read_slots

COLD_BYTES = 300_000_000


def plain(queries, keys, values, mask, used, *, slots):
    one = queries[:, :, None]
    return plain_decode_attention(one, keys, values, mask, used - 1, slots)[:, :, 0]


def measure(shape, used: int, cache_dtype: str, bandwidth: float) -> dict:
    batch, heads, slots, head_dim = shape
    size = 2 * batch * heads * slots * head_dim * jnp.dtype(cache_dtype).itemsize
    copies = -(-COLD_BYTES // size)
    key = jax.random.key(0)
    queries = jax.random.normal(key, (batch, heads, head_dim), jnp.float16)
    mask = jnp.ones((batch, slots), bool)
    caches = [
        [
            jax.random.normal(jax.random.fold_in(key, 2 * i + j), shape, jnp.float16)
            .astype(cache_dtype)
            .block_until_ready()
            for j in range(2)
        ]
        for i in range(copies)
    ]
    read = read_slots(used, slots)

    def program(attend):
        def run(caches, queries, mask, used):
            return [attend(queries, *cache, mask, used) for cache in caches]

        operands = (caches, queries, mask, jnp.int32(used))
        return device_time.microseconds(jax.jit(run), *operands) / copies

    bound = size / slots * used / bandwidth * 1e6
    kernel = program(decode_attention)
    other = program(lambda *operands: plain(*operands, slots=read))
    return {
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
        "slots": slots,
        "used": used,
        "cache_dtype": cache_dtype,
        "kernel_us": round(kernel, 2),
        "plain_us": round(other, 2),
        "bound_us": round(bound, 2),
    }


def main(
    models: Annotated[str, typer.Option(help="List.")] = "opt-30b,opt-66b,opt-175b",
    batch: Annotated[str, typer.Option(help="List.")] = "1,8,64",
    slots: Annotated[int, typer.Option(help="Of the cache.")] = 320,
    used: Annotated[str, typer.Option(help="List: slots in use.")] = "192",
    cache_dtype: Annotated[str, typer.Option()] = "float16,float8_e4m3fn",
    name: Annotated[str, typer.Option(help="Stem of the result.")] = "decode-attention",
) -> None:
    """Times the attention of a decode step."""
    bandwidth = read_bandwidth()
    results: list[dict] = []
    for model in models.split(","):
        config = find_config(model)
        for dtype in cache_dtype.split(","):
            for b in map(int, batch.split(",")):
                for u in map(int, used.split(",")):
                    shape = (b, config.num_heads, slots, config.head_dim)
                    row = {"model": model} | measure(shape, u, dtype, bandwidth)
                    results.append(row)
                    print(row, flush=True)
                    content = {"read_gb_per_s": round(bandwidth / 1e9, 1)}
                    path = report.save(name, content | {"results": results})
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
