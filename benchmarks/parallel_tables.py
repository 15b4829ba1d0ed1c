"""Figures of models on several GPUs, from opt_parallel.py."""

import pathlib
import re
import textwrap
from collections.abc import Iterable

from result_tables import captioned, gigabytes, newest, origin, zeros

# Sequences at once, on the first screen of the README.
ROWS = 8
# Kernels that exchange data between devices: NCCL's, and the all-reduces that XLA
# generates itself, which are named after JAX's sum.
COLLECTIVE = re.compile("nccl|psum|all_?reduce", re.IGNORECASE)


def load_steps(paths: Iterable[pathlib.Path]) -> tuple[dict, list[dict]]:
    """One table from several runs of opt_parallel.py on the same kind of device.

    Steps of whole models, each with its `model`; of a step measured twice the newer.
    """

    def whole(run: dict, r: dict) -> tuple[tuple, dict] | None:
        settings = run["settings"]
        if "step_ms" not in r or r["layers"] != settings["layers_of_the_model"]:
            return None
        key = settings["model"], r["sparsity"], r["devices"], r["batch"]
        return key, r | {"model": settings["model"].upper()}

    return newest(paths, whole)


def whole_model(facts: dict, results: list[dict]) -> str:
    """Steps of a model on one GPU, which dense needs several for."""
    steps = {
        (r["sparsity"], r["devices"]): r["step_ms"]
        for r in results
        if r["batch"] == ROWS
    }
    one, four, dense = steps[0.8, 1], steps[0.8, 4], steps[0.0, 4]
    text = (
        f"All of OPT-175B (synthetic weights, 80% zeros, float16, {ROWS} sequences) "
        f"decodes on **one** {facts['device']} in **{one:.0f}\u00a0ms** a step. Dense "
        f"it would need three; on **four** it takes {dense:.0f}\u00a0ms, sparse "
        f"{four:.0f}\u00a0ms. A GPU makes {ROWS / one * 1e3:.0f} tokens a second "
        f"alone, {ROWS / four / 4 * 1e3:.0f} as one of four, and dense "
        f"{ROWS / dense / 4 * 1e3:.0f} ([several devices](docs/multi-gpu.md), "
        f"{origin(facts)})."
    )
    return textwrap.fill(text, 90, break_long_words=False, break_on_hyphens=False)


def parallel_table(facts: dict, results: list[dict]) -> str:
    text = (
        f"Milliseconds a decode step of OPT-66B with synthetic weights, float16, "
        f"{results[0]['length']} slots of cache, on one and two {facts['device']} of "
        f"one host ({origin(facts)}). Empty: not measured."
    )
    batches = sorted({r["batch"] for r in results})
    steps = {(r["sparsity"], r["batch"], r["devices"]): r["step_ms"] for r in results}
    cases = [(b, d) for b in batches for d in (1, 2)]
    rows = []
    for sparsity in sorted({r["sparsity"] for r in results}):
        found = [steps.get((sparsity, *case)) for case in cases]
        rows.append([zeros(sparsity), *(f"{ms:.1f}" if ms else "" for ms in found)])
    columns = [f"{b}, {d} GPU{'s' * (d > 1)}" for b, d in cases]
    return captioned(text, ["zeros, by batch and GPUs", *columns], rows)


def large_table(facts: dict, results: list[dict]) -> str:
    text = (
        "OPT-175B with synthetic weights, float16, "
        f"{results[0]['length']} slots of cache, split over {facts['device']} of one "
        f"host: a decode step, tokens a second, tokens a second and GPU, bytes a GPU "
        "as predicted for prompts that fill the cache, and the most that was in use "
        f"while steps ran ({origin(facts)}; empty: not measured). Flash-LLM's paper "
        "has 46, 81, 136 and 195 tokens a second and GPU for batch 8, 16, 32 and 64, "
        "on four A100 with 80% zeros, and 23, 43, 79 and 127 for FasterTransformer, "
        "dense on eight; by their data sheets an H200 reads 2.4 times as many bytes a "
        "second as an A100 (4.8 and 2.0 TB/s)."
    )
    columns = ["zeros", "GPUs", "batch", "step, ms", "tokens/s", "tokens/s and GPU"]
    columns += ["GB a GPU, predicted", "in use"]
    rows = [
        [
            zeros(r["sparsity"]),
            str(r["devices"]),
            str(r["batch"]),
            f"{r['step_ms']:.1f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['tokens_per_gpu_second']:.0f}",
            f"{r['predicted_bytes_a_device'] / 1e9:.0f}",
            gigabytes(r.get("peak_bytes_a_device"), digits=0),
        ]
        for r in results
    ]
    return captioned(text, columns, rows)


def load_kernels(paths: Iterable[pathlib.Path]) -> tuple[dict, list[dict]]:
    """Steps of which the kernels were listed, the layers of the model among them."""

    def listed(run: dict, r: dict) -> tuple[tuple, dict] | None:
        settings = run["settings"]
        key = r["sparsity"], r["devices"], r["layers"], r["batch"]
        whole = {"layers_of_the_model": settings["layers_of_the_model"]}
        return (key, r | whole) if "kernels" in r else None

    return newest(paths, listed)


def communication_share(result: dict) -> float:
    """Of a step, the time in collectives, in which a device may wait for others."""
    inside = sum(
        row["us"]
        for row in result["kernels"]
        if COLLECTIVE.search(f"{row['kernel']} {row['operation']}")
    )
    return inside / 1e3 / result["profiled_step_ms"]


def communication_table(facts: dict, results: list[dict]) -> str:
    first = results[0]
    text = (
        "Share of a decode step that a GPU spends in collectives, in which it may "
        "wait for the others: all or some of the "
        f"{first['layers_of_the_model']} layers of OPT-175B, {first['length']} slots "
        f"of cache, split over {facts['device']} of one host ({origin(facts)}). "
        "Empty: not measured."
    )
    batches = sorted({r["batch"] for r in results})
    cases = sorted({(r["sparsity"], r["devices"], r["layers"]) for r in results})
    shares = {
        (r["sparsity"], r["devices"], r["layers"], r["batch"]): communication_share(r)
        for r in results
    }
    rows = []
    for case in cases:
        found = [shares.get((*case, b)) for b in batches]
        cells = ["" if share is None else f"{share:.1%}" for share in found]
        rows.append([zeros(case[0]), *map(str, case[1:]), *cells])
    columns = ["zeros", "GPUs", "layers", *(f"batch {b}" for b in batches)]
    return captioned(text, columns, rows)
