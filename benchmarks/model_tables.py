"""Figures of models on one device: requests, pruning and the demo."""

import json
import pathlib
import textwrap
from collections.abc import Iterable

from result_tables import captioned, gigabytes, load, newest, origin, zeros


def load_requests(paths: Iterable[pathlib.Path]) -> tuple[dict, list[dict]]:
    """One table from several runs of `flashjax bench generate` with one model.

    Steps are set beside dense ones of the same batch and dtype of the cache, those of
    another run included.
    """

    def timed(run: dict, r: dict) -> tuple[tuple, dict] | None:
        cache = r.get("cache_dtype", r["dtype"])
        key = r["sparsity"], r["batch"], cache
        return (key, r | {"cache_dtype": cache}) if "step_ms" in r else None

    facts, results = newest(paths, timed)
    dense = {
        (r["batch"], r["cache_dtype"]): r["step_ms"]
        for r in results
        if not r["sparsity"]
    }
    for r in results:
        r.pop("speedup", None)
        if beside := dense.get((r["batch"], r["cache_dtype"])):
            r["speedup"] = beside / r["step_ms"]
    return facts, results


def generate_table(facts: dict, results: list[dict]) -> str:
    first = results[0]
    text = (
        f"{first['layers']} layers of {first['model']} with synthetic weights, "
        f"{first['dtype']}, {first['prompt']} tokens of prompt and {first['new']} new "
        f"ones, on one {facts['device']} ({origin(facts)}). Prefill is the prompts, a "
        "step is one new token for each; tokens a second are from both. Memory is the "
        "weights and what a request adds, measured and predicted; held is what was in "
        "use before it."
    )
    columns = ["zeros", "batch", "cache", "weights, GB", "held"]
    columns += ["memory, GB", "predicted"]
    columns += ["prefill, ms", "step, ms", "x dense", "tokens/s"]
    rows = [
        [
            zeros(r["sparsity"]),
            str(r["batch"]),
            r["cache_dtype"],
            gigabytes(r["weight_bytes"]),
            gigabytes(r.get("held_bytes")),
            gigabytes(request_bytes(r)),
            gigabytes(r["predicted_bytes"]),
            f"{r['prefill_ms']:.0f}",
            f"{r['step_ms']:.2f}",
            f"{r['speedup']:.2f}" if "speedup" in r else "",
            f"{tokens_per_second(r):.0f}",
        ]
        for r in results
    ]
    return captioned(text, columns, rows)


def request_bytes(r: dict) -> int | None:
    """The weights' bytes and those that a request adds to what is in use."""
    if "held_bytes" not in r:
        return None
    return r["weight_bytes"] + r["request_peak_bytes"] - r["held_bytes"]


def load_prompts(paths: Iterable[pathlib.Path]) -> tuple[dict, list[dict]]:
    """Prefills of several runs of `flashjax bench generate`, by prompts and zeros."""

    def timed(run: dict, r: dict) -> tuple[tuple, dict] | None:
        key = r["prompt"], r["batch"], r["layers"], r["sparsity"]
        return (key, r) if "prefill_ms" in r else None

    return newest(paths, timed)


def prefill_table(facts: dict, results: list[dict]) -> str:
    """Prompts of several lengths."""
    first = results[0]
    text = (
        f"Milliseconds for the prompts alone: some or all layers of {first['model']} "
        f"with synthetic weights, {first['dtype']}, on one {facts['device']} "
        f"({origin(facts)}). Empty: not measured."
    )
    sparsities = sorted({r["sparsity"] for r in results})
    prompts = sorted({(r["prompt"], r["batch"], r["layers"]) for r in results})
    times = {
        (r["prompt"], r["batch"], r["layers"], r["sparsity"]): f"{r['prefill_ms']:.1f}"
        for r in results
    }
    rows = [
        [f"{batch} x {prompt}", str(layers)]
        + [times.get((prompt, batch, layers, s), "") for s in sparsities]
        for prompt, batch, layers in prompts
    ]
    columns = ["prompts x tokens", "layers", *map(zeros, sparsities)]
    return captioned(text, columns, rows)


def tokens_per_second(r: dict) -> float:
    """New tokens by the time of the prefill and all steps."""
    seconds = (r["prefill_ms"] + (r["new"] - 1) * r["step_ms"]) / 1e3
    return r["batch"] * r["new"] / seconds


def starting_figures(compiled: Iterable[pathlib.Path], loaded: pathlib.Path) -> str:
    """What passes before the first token: compiling, and loading a checkpoint."""
    facts, results = zip(*map(load, sorted(compiled)), strict=True)
    origins = "; ".join(dict.fromkeys(map(origin, facts)))
    models = sorted((result for (result,) in results), key=lambda r: r["layers"])
    seconds = ", ".join(
        f"{r['compile_seconds']:.0f} s for {r['model']} ({r['layers']} layers)"
        for r in models
    )
    reading = json.loads(loaded.read_text(encoding="utf-8"))
    before = reading["host_bytes_before"]
    grown = reading["host_bytes_peak"] - before
    text = (
        f"On one {facts[0]['device']} both programs of a request of "
        f"{models[0]['prompt']} tokens and {models[0]['new']} new ones were compiled "
        f"in {seconds}, with {models[0]['sparsity']:.0%} zeros and an empty cache "
        f"({origins}; "
        "`flashjax --no-cache bench generate`). A checkpoint of "
        f"{reading['model']}'s size at {reading['sparsity']:.0%}, "
        f"{gigabytes(reading['file_bytes'])} GB, was loaded in "
        f"{reading['load_seconds']:.0f} s, where reading its files alone took "
        f"{reading['read_seconds']:.0f} s, both from the disk, on {reading['cores']} "
        f"cores. To the {gigabytes(before)} GB of the host's memory that the process "
        "had, with what JAX needs to manage the GPU's, loading added at most "
        f"{gigabytes(grown)}, {grown / reading['layer_bytes']:.1f} times what a layer "
        f"takes on the disk; {gigabytes(reading['host_bytes_after'] - before)} stayed "
        f"({origin(reading['environment'])}; `benchmarks/load.py`)."
    )
    return textwrap.fill(text, 98)


def pruning_figures(whole: pathlib.Path, part: pathlib.Path) -> str:
    """A model that was pruned whole, and one of which some layers were."""
    small, large = (json.loads(p.read_text(encoding="utf-8")) for p in (whole, part))
    (done,), (begun,) = small["results"], large["results"]
    hours = large["layers_of_the_model"] * begun["seconds_a_layer"] / 3600
    text = (
        f"On one {small['environment']['device']}, {done['method']} at "
        f"{done['sparsity']:.0%} with {done['samples']} windows of {done['length']} "
        f"tokens takes {done['seconds']:.0f} s for a model of {small['model']}'s size "
        f"and random weights, with {gigabytes(done['device_peak_bytes'])} GB of the "
        f"GPU's memory at the peak and {gigabytes(done['host_peak_bytes'])} GB of the "
        f"host's ({origin(small['environment'])}). Of {large['model']}'s "
        f"{large['layers_of_the_model']} layers {begun['layers']} were pruned, in "
        f"{begun['seconds']:.0f} s, with {gigabytes(begun['device_peak_bytes'])} and "
        f"{gigabytes(begun['host_peak_bytes'])} GB ({origin(large['environment'])}). "
        "Most of the first layer's time is compiling, so the whole model, which was "
        f"not run, should take less than the {hours:.1f} hours that it would at "
        f"{begun['seconds_a_layer']:.0f} s a layer. `benchmarks/pruning.py` measures "
        "it."
    )
    return textwrap.fill(text, 98)


def demo_figures(path: pathlib.Path) -> str:
    facts = json.loads(path.read_text(encoding="utf-8"))
    text = (
        f"An OPT of {facts['parameters'] / 1e6:.1f} million parameters, trained on "
        "public-domain English (Austen, Shakespeare, the King James Bible). Perplexity "
        f"on held-out text: **{facts['dense_perplexity']:.2f}** dense, "
        f"**{facts['pruned_perplexity']:.2f}** with {facts['sparsity']:.0%} of the "
        "weights of its linear layers pruned and fine-tuned."
    )
    return textwrap.fill(text, 90)
