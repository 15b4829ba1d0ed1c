"""Shows which kernels a decode step of OPT spends its time in.

    python benchmarks/step_profile.py --model opt-30b --layers 8 --sparsity 0,0.6

Random weights. The kernels are those of `opt.generate_stream` in the middle of a
request, from JAX's profiler; the time of a step is the mean of the request's in the
loops that `opt.generate` runs, without the profiler. `share_in_kernels` is the time in
kernels by that of a step.

Prints a table each and writes `benchmarks/results/step-profile-DEVICE.json`.
"""

import dataclasses
import time
from typing import Annotated

import device_time
import jax
import numpy as np
import report
import typer

from flashjax.cli.bench_generate import time_requests
from flashjax.cli.predict import find_config
from flashjax.models import opt
from flashjax.testing import random_opt

STEPS = 8  # in the profile


def kernels(model: opt.OPT, ids: np.ndarray, new: int) -> list[dict]:
    """Every kernel's calls and microseconds in a step, the longest first."""
    stream = opt.generate_stream(model, ids, max_new_tokens=new, eos_token_id=-1)

    def step():
        next(stream)
        time.sleep(0.05)  # the stream is a step ahead

    for _ in range(new // 2):
        step()
    with device_time.profile() as found:
        for _ in range(STEPS):
            step()
    return device_time.by_name(found, STEPS)


def measure(
    config, sparsity: float, batch: int, prompt: int, new: int, cache_dtype: str | None
) -> dict:
    model = random_opt(config, sparsity, dtype="float16", cache_dtype=cache_dtype)
    ids = np.random.default_rng(0).integers(4, config.vocab_size, (batch, prompt))
    rows = kernels(model, ids, new)
    times, _ = time_requests(model, ids, new, repetitions=3)
    step = times.step * 1e3
    busy = sum(row["us"] for row in rows) / 1e3
    return {
        "sparsity": sparsity,
        "batch": batch,
        "step_ms": round(step, 4),
        "kernels_ms": round(busy, 4),
        "share_in_kernels": round(busy / step, 4),
        "kernels": rows,
    }


def main(
    model: Annotated[str, typer.Option(help="A size of OPT, or a folder.")] = "opt-30b",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all.")] = 0,
    sparsity: Annotated[str, typer.Option(help="List; 0 is dense.")] = "0,0.6,0.8",
    batch: Annotated[str, typer.Option(help="List.")] = "8",
    prompt: Annotated[int, typer.Option()] = 64,
    new: Annotated[int, typer.Option(help="Tokens to generate.")] = 256,
    cache_dtype: Annotated[str | None, typer.Option(help="float8_e4m3fn.")] = None,
    name: Annotated[str, typer.Option(help="Stem of the result.")] = "step-profile",
) -> None:
    """Shows which kernels a decode step of OPT spends its time in."""
    if new < 2 * STEPS:
        raise SystemExit(f"expected --new of at least {2 * STEPS}, got {new}")
    config = find_config(model)
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    results: list[dict] = []
    for s in map(float, sparsity.split(",")):
        for b in map(int, batch.split(",")):
            result = measure(config, s, b, prompt, new, cache_dtype)
            results.append(result)
            jax.clear_caches()
            print({k: v for k, v in result.items() if k != "kernels"})
            for row in result["kernels"][:20]:
                print(f"  {row['us']:9.2f} us {row['calls']:7.2f} x {row['kernel']}")
            content = {"model": model, "layers": config.num_layers, "prompt": prompt}
            content |= {"cache_dtype": cache_dtype or "float16", "new": new}
            content["results"] = results
            path = report.save(name, content)
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
