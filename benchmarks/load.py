"""Times loading a sparse checkpoint beside reading its files.

    python benchmarks/load.py --model opt-1.3b --sparsity 0.8

A model of random weights is made and stored once, in a temporary folder or in
--folder, which is then kept and used again. Reading is `read` into one buffer, file by
file, after asking the system to forget the file (where it does not, both come from
memory). Loading is `opt.from_pretrained` in a process of its own, as making is, so that
the device is free. It lasts until all weights are there; starting Python and JAX is not
in its time.

The host's memory is that of the process that loads: before, the most, and at last.
Before, it has already put one array of the size of a layer's largest tensor on the
device and compiled a program, so that what JAX itself takes is there: pinned memory for
what is on its way to a GPU, and the books of its allocator, 1/32 of the memory that it
has taken on the device, which in this process is what it takes by default. The pinned
memory is also given apart.

Prints and writes `benchmarks/results/load-DEVICE.json`.
"""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import report
import typer
from flax import nnx

from flashjax.cli.predict import find_config
from flashjax.models import opt
from flashjax.testing import random_opt

_BLOCK = 1 << 24


def forget(path: pathlib.Path) -> None:
    """Asks the system to drop a file from its cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(paths: list[pathlib.Path]) -> float:
    buffer = bytearray(_BLOCK)
    began = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def layer_bytes(paths: list[pathlib.Path]) -> tuple[int, int]:
    """As stored: the largest tensor of a decoder's layer, and the largest layer."""
    tensors: list[int] = []
    layers: collections.Counter[str] = collections.Counter()
    for path in paths:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if layer := re.search(r"\.layers\.(\d+)\.", name):
                begin, end = tensor["data_offsets"]
                tensors.append(end - begin)
                layers[layer[1]] += end - begin
    return max(tensors), max(layers.values())


def host_bytes(key: str) -> int:
    """Memory of this process, VmRSS, or the most that it had, VmHWM.

    Of it RssShmem is pinned, where there is a GPU. getrusage counts what made the
    process, too.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", status)[1])


def load(folder: str, largest: int) -> dict[str, float]:
    """Runs in a process of its own; `largest` is the size of an array, in bytes."""
    jax.block_until_ready(jnp.asarray(np.ones(largest, np.uint8)) + 1)
    before = host_bytes("VmRSS")
    pinned_before = host_bytes("RssShmem")
    began = time.perf_counter()
    model, _ = opt.from_pretrained(folder)
    jax.block_until_ready(nnx.state(model))
    return {
        "seconds": time.perf_counter() - began,
        "host_bytes_before": before,
        "pinned_bytes_before": pinned_before,
        "host_bytes_peak": host_bytes("VmHWM"),
        "host_bytes_after": host_bytes("VmRSS"),
        "pinned_bytes_after": host_bytes("RssShmem"),
    }


def store(model: str, sparsity: float, folder: str) -> dict[str, float]:
    """Runs in a process of its own."""
    began = time.perf_counter()
    made = jax.block_until_ready(random_opt(find_config(model), sparsity))
    seconds = time.perf_counter() - began
    opt.save_pretrained(made, None, folder)
    return {"made": seconds, "stored": time.perf_counter() - began - seconds}


def in_process(environment: dict[str, str], *arguments: object) -> dict[str, float]:
    """What this script prints when it is called so."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(
        command, check=True, env=environment, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(
    model: Annotated[str, typer.Option(help="A size of OPT.")] = "opt-1.3b",
    sparsity: Annotated[float, typer.Option()] = 0.8,
    folder: Annotated[pathlib.Path | None, typer.Option(help="Kept.")] = None,
    repetitions: Annotated[int, typer.Option()] = 3,
    name: Annotated[str, typer.Option(help="Stem of the result.")] = "load",
    only: Annotated[str, typer.Option(hidden=True)] = "",
    largest: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Times loading a sparse checkpoint beside reading its files."""
    if only == "store":
        print(json.dumps(store(model, sparsity, str(folder))))
        return
    if only == "load":
        print(json.dumps(load(str(folder), largest)))
        return
    # Of the device, which it shares with those that load, this process needs nothing.
    environment = dict(os.environ)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with tempfile.TemporaryDirectory() as temporary:
        stored = folder or pathlib.Path(temporary, "model")
        making = ("--model", model, "--sparsity", sparsity, "--folder", stored)
        made: dict[str, float] = {}
        if not stored.exists():
            made = in_process(environment, "--only", "store", *making)
            print("made in {made:.1f} s, stored in {stored:.1f} s".format(**made))
        paths = sorted(stored.glob("*.safetensors"))
        largest, layer = layer_bytes(paths)
        content = {
            "model": model,
            "sparsity": sparsity,
            "file_bytes": sum(path.stat().st_size for path in paths),
            "cores": os.cpu_count(),
            "layer_bytes": layer,
        }
        if made:
            content["store_seconds"] = round(made["stored"], 3)
        reads: list[float] = []
        loads: list[dict[str, float]] = []
        for _ in range(repetitions):
            for path in paths:
                forget(path)
            reads.append(read_files(paths))
            for path in paths:
                forget(path)
            loading = ("--only", "load", "--folder", stored, "--largest", largest)
            loads.append(in_process(environment, *loading))
            print(f"read in {reads[-1]:.2f} s, loaded in {loads[-1]['seconds']:.2f} s")
            best = dict(min(loads, key=lambda r: r["seconds"]))
            seconds = best.pop("seconds")
            content |= {
                "repetitions": len(loads),
                "read_seconds": round(min(reads), 3),
                "load_seconds": round(seconds, 3),
                "of_reading": round(min(reads) / seconds, 3),
                **best,
            }
            # Now already: a run takes long, and may be interrupted.
            path = report.save(name, content)
    print(content)
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
