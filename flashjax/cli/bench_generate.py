"""``flashjax bench generate``: speed and memory of generation.

A request is what `opt.generate` does, from token ids on the host to new ones there. The
prefill is one program on the device and ends with the first token; the time of all
later steps by their number is that of a step. Times are medians after calls that
compile. Memory is the most that was in use during a request. What was in use before it
may be more than the weights: of a hole between arrays, the allocator leaves up to 128
MB to the array that it puts there.

A step cannot be faster than reading the weights and the keys and values of the tokens
so far (half of the new ones on average); the bandwidth for this bound is measured.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from flashjax.cli.environment import save_results
from flashjax.cli.errors import UsageError
from flashjax.cli.memory_watch import MemoryWatch, memory_bytes
from flashjax.cli.predict import check_sparse_dtype, find_config
from flashjax.cli.progress import progress_bar
from flashjax.models import opt
from flashjax.models.opt.generate import compile_request, time_request
from flashjax.models.opt.generation_request import make_request
from flashjax.models.opt.memory import MemoryPrediction, predict
from flashjax.nn import parameter_bytes
from flashjax.testing import random_opt

_BANDWIDTH_BYTES = {"cpu": 1 << 28, "gpu": 1 << 31}


def run(
    model: str,
    *,
    layers: int,
    sparsities: list[float],
    batches: list[int],
    prompt: int,
    new: int,
    dtype: str,
    cache_dtype: str | None,
    repetitions: int,
    out: Path,
    name: str,
    as_json: bool,
) -> None:
    """Measures every sparsity with every batch; prints a table and writes files.

    Raises:
      ValueError: an option does not fit.
    """
    check_sparse_dtype(dtype, sparsities)
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            raise UsageError(f"--sparsity: expected 0 to 1, got {sparsity}")
    for batch in batches:
        if batch < 1:
            raise UsageError(f"--batch: expected a batch of at least 1, got {batch}")
    if os.path.basename(name) != name:
        raise UsageError(f"--name: expected no folder in it (--out), got {name!r}")
    config = find_config(model)
    if layers > config.num_layers:
        raise ValueError(
            f"--layers: expected up to {config.num_layers} for {model}, got {layers}"
        )
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    # All are checked, and those that fit found, before the first is made.
    plan = {
        (s, b): predict(
            config,
            sparsity=s,
            batch=b,
            length=prompt + new,
            prompt=prompt,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )
        for s in sparsities
        for b in batches
    }
    _check_out(out)
    bandwidth = read_bandwidth()
    results: list[dict[str, Any]] = []
    content = {
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "device_bytes": next(iter(plan.values())).device_bytes,
        "results": results,
    }
    for s in sorted(sparsities, reverse=True):
        fitting = [b for b in sorted(batches) if _fits(plan[s, b])]
        built = _build(config, s, dtype, cache_dtype) if fitting else None
        for b in sorted(batches):
            result = {
                "model": model,
                "layers": config.num_layers,
                "sparsity": s,
                "dtype": dtype,
                "cache_dtype": cache_dtype or dtype,
                "batch": b,
                "prompt": prompt,
                "new": new,
                "predicted_bytes": plan[s, b].total,
            }
            if built is not None and b in fitting:
                result |= _measure(built, b, prompt, new, repetitions, bandwidth)
            results.append(result)
            _add_speedups(results)
            results.sort(key=lambda r: (r["sparsity"], r["batch"]))
            # Now already: a run takes long, and may be interrupted.
            path = save_results(out, name, content)
        del built
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        _print_table(model, config, content)
    written = [str(path)]
    try:
        from flashjax.cli.bench_plot import plot
    except ImportError:
        typer.echo("flashjax: no plot: matplotlib is not installed", err=True)
    else:
        plot(path)
        written.append(str(path.with_suffix(".png")))
    typer.echo(f"written to {' and '.join(written)}", err=as_json)


def _check_out(out: Path) -> None:
    """Finds before anything is measured that results could not be written."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out: expected a folder that can be written to, got {out}")


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The values of an option that is a list.

    Raises:
      UsageError: one of them is no number.
    """
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(
            f"{option}: expected numbers with commas between them, got {text!r}"
        ) from None


class RequestTimes(NamedTuple):
    """Median seconds of a request's prefill, of one of its steps, and of all of it.

    `compiling` is that of the first one, which is compiled unless a cache has it.
    """

    prefill: float
    step: float
    whole: float
    compiling: float


def time_requests(
    model: opt.OPT, ids: np.ndarray, new: int, repetitions: int
) -> tuple[RequestTimes, MemoryWatch]:
    """Times of requests that are alike, and the memory of one."""
    options = opt.GenerationConfig(max_new_tokens=new, eos_token_id=-1)
    request = make_request(model.config, ids, None, options)
    began = time.perf_counter()
    compile_request(model, request)
    compiling = time.perf_counter() - began
    with MemoryWatch() as memory:
        compile_request(model, request)
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        request = make_request(model.config, ids, None, options)
        prefilled, steps = time_request(model, request)
        times.append((prefilled, steps / (new - 1), time.perf_counter() - began))
    prefill, step, whole = map(statistics.median, zip(*times, strict=True))
    return RequestTimes(prefill, step, whole, compiling), memory


def measure(
    model: opt.OPT,
    batch: int,
    prompt: int,
    new: int,
    repetitions: int,
    bandwidth: float,
) -> dict[str, Any]:
    """Times of one model and batch, with the bytes that bound a step."""
    config = model.config
    ids = np.random.default_rng(0).integers(4, config.vocab_size, (batch, prompt))
    times, memory = time_requests(model, ids, new, repetitions)
    weights, itemsize = parameter_bytes(model), model.dtype.itemsize
    row = 2 * config.num_layers * config.hidden_size * model.cache_dtype.itemsize
    # The position table, and an embedding that is not the output layer too, are only
    # looked up.
    looked_up = config.max_positions * config.hidden_size
    if not config.tie_word_embeddings:
        looked_up += config.vocab_size * (config.word_embed_proj_dim or 0)
    read = weights - looked_up * itemsize + row * batch * (prompt + new // 2)
    return {
        "weight_bytes": weights,
        "held_bytes": memory.before,
        "request_peak_bytes": memory.peak,
        "prefill_ms": round(times.prefill * 1e3, 3),
        "step_ms": round(times.step * 1e3, 4),
        "request_ms": round(times.whole * 1e3, 3),
        "compile_seconds": round(times.compiling, 2),
        "prefill_tokens_per_s": round(batch * prompt / times.prefill, 1),
        "decode_tokens_per_s": round(batch / times.step, 1),
        "tokens_per_s": round(batch * new / times.whole, 1),
        "step_bytes": read,
        "bound_ms": round(read / bandwidth * 1e3, 4),
        "share_of_bound": round(read / bandwidth / times.step, 4),
    }


def _measure(*args: Any) -> dict[str, Any]:
    """measure(), empty where memory ran out: what was measured before is kept."""
    try:
        return measure(*args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {}


def _fits(prediction: MemoryPrediction) -> bool:
    """Whether JAX may take so much here."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return prediction.fits is not False and (limit is None or prediction.total <= limit)


def read_bandwidth() -> float:
    """Bytes a second at which the first device reads a large array."""
    size = _BANDWIDTH_BYTES.get(jax.default_backend(), 1 << 28)
    array = jnp.ones((size // 4,), jnp.int32)
    total = jax.jit(jnp.sum)
    queued = 8  # so that the device does not wait for the host
    times = []
    for _ in range(6):
        began = time.perf_counter()
        jax.block_until_ready([total(array) for _ in range(queued)])
        times.append((time.perf_counter() - began) / queued)
    return size / min(times)


def _build(
    config: opt.OPTConfig, sparsity: float, dtype: str, cache_dtype: str | None
) -> opt.OPT:
    with progress_bar(disable=False) as advance:
        return random_opt(
            config,
            sparsity,
            dtype=dtype,
            cache_dtype=cache_dtype,
            progress=lambda done, total: advance(
                f"layers of sparsity {sparsity:.0%}", done, total
            ),
        )


def _add_speedups(results: list[dict[str, Any]]) -> None:
    dense = {
        r["batch"]: r["step_ms"]
        for r in results
        if not r["sparsity"] and "step_ms" in r
    }
    for r in results:
        if "step_ms" in r and r["batch"] in dense:
            r["speedup"] = round(dense[r["batch"]] / r["step_ms"], 3)


def _print_table(model: str, config: opt.OPTConfig, content: dict[str, Any]) -> None:
    results = content["results"]
    first = results[0]
    table = Table(
        title=f"{model}, {config.num_layers} layers, {first['dtype']}: prompts of "
        f"{first['prompt']}, {first['new']} new tokens"
    )
    for column in (
        "zeros",
        "batch",
        "weights GB",
        "memory GB",
        "prefill ms",
        "step ms",
        "bound ms",
        "reached",
        "tokens/s",
        "x dense",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        start = f"{r['sparsity']:.0%}" if r["sparsity"] else "dense", str(r["batch"])
        memory = f"{memory_bytes(r) / 1e9:.2f}"
        if "step_ms" not in r:
            table.add_row(*start, "", memory, "does not fit")
            continue
        table.add_row(
            *start,
            f"{r['weight_bytes'] / 1e9:.2f}",
            memory,
            f"{r['prefill_ms']:.1f}",
            f"{r['step_ms']:.2f}",
            f"{r['bound_ms']:.2f}",
            f"{r['share_of_bound']:.0%}",
            f"{r['tokens_per_s']:.1f}",
            f"{r['speedup']:.2f}" if "speedup" in r else "",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"bound: weights, keys and values at the {content['read_gb_per_s']:.0f} GB/s "
        "that this device was measured to read"
    )
    is_gpu = jax.devices()[0].platform == "gpu"
    if is_gpu and any(r.get("speedup", 1) < 1 for r in results):
        console.print(
            "slower than dense: on a GPU small layers often are, where starting a "
            "kernel takes longer than reading; larger models gain (--model opt-6.7b)"
        )
