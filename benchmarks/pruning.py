"""Times `opt.pruning.prune_pretrained` on a model of random weights.

    python benchmarks/pruning.py --model opt-1.3b --methods sparsegpt

The model is written to a temporary folder first, which is not timed; everything after
that is: reading, calibration on random tokens, choosing the zeros and writing. Times do
not depend on what the weights are. With `--layers` only as many are made and pruned;
`seconds_a_layer` then says what a whole model takes.

Prints when each part of the work began, and a line a method; `seconds_when_done` are
those after which each layer was done, the first with most of the compiling in it.
Writes `benchmarks/results/pruning-DEVICE.json`.
"""

import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import report
import typer

from flashjax.cli.predict import find_config
from flashjax.models import opt
from flashjax.models.opt.calibration import Calibration
from flashjax.models.opt.pruning import prune_pretrained
from flashjax.testing import random_opt


def write_model(config: opt.OPTConfig, folder: pathlib.Path) -> None:
    model = random_opt(config, 0.0, dtype=jnp.float16, fuse_qkv=False)
    opt.save_pretrained(model, None, folder)


def calibration(config: opt.OPTConfig, samples: int, length: int) -> Calibration:
    ids = np.random.default_rng(0).integers(4, config.vocab_size, (samples, length))
    return Calibration(ids.astype(np.int32), np.ones((samples, length), np.bool_))


def measure(
    model: pathlib.Path, out: pathlib.Path, method: str, sparsity: float, tokens
) -> dict:
    began, shown = time.perf_counter(), ""
    layers_done: list[float] = []

    def progress(what: str, done: int, total: int) -> None:
        nonlocal shown
        if what != shown:
            shown = what
            seconds = time.perf_counter() - began
            print(f"{seconds:8.1f} s  {done / total:4.0%}  {what}")
            if re.fullmatch(r"layers\.\d+", what):
                layers_done.append(round(seconds, 2))

    result = prune_pretrained(
        model,
        out,
        sparsity=sparsity,
        method=method,
        calibration=tokens,
        progress=progress,
    )
    matrices = sum(r.seconds for r in result.reports)
    layers = len({r.name.split(".")[1] for r in result.reports})
    return {
        "method": method,
        "sparsity": sparsity,
        "layers": layers,
        "samples": result.samples,
        "length": result.length,
        "seconds": round(result.seconds, 2),
        "seconds_choosing": round(matrices, 2),
        "seconds_a_layer": round(result.seconds / layers, 3),
        "seconds_when_done": layers_done,
        "device_peak_bytes": result.device_peak_bytes,
        "host_peak_bytes": result.host_peak_bytes,
    }


def main(
    model: Annotated[str, typer.Option(help="A size of OPT, or a folder.")],
    methods: Annotated[str, typer.Option()] = "magnitude,wanda,sparsegpt,alps",
    sparsity: Annotated[float, typer.Option()] = 0.6,
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all.")] = 0,
    samples: Annotated[int, typer.Option(help="Windows of calibration.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    name: Annotated[str, typer.Option(help="Stem of the result.")] = "pruning",
) -> None:
    """Times pruning of a model of random weights."""
    config = find_config(model)
    whole = config.num_layers
    config = dataclasses.replace(config, num_layers=layers or whole)
    tokens = calibration(config, samples, length)
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_model(config, folder / "dense")
        jax.clear_caches()  # what made the model is not needed any more
        for method in methods.split(","):
            out = folder / method
            results.append(measure(folder / "dense", out, method, sparsity, tokens))
            print(results[-1], flush=True)
            content = {"model": model, "layers_of_the_model": whole}
            path = report.save(name, content | {"results": results})
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
