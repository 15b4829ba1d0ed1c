"""Writes measured figures into the README and docs, from the files that hold them.

    python benchmarks/update_readme.py

Speeds come from `results/`, the demo model's figures from
`examples/demo-opt/training.json`.
"""

import json
import pathlib
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
WHEN_SPARSE_PAYS = ROOT / "docs" / "when-sparse-pays.md"
MULTI_GPU = ROOT / "docs" / "multi-gpu.md"
PRUNING = ROOT / "docs" / "pruning.md"

H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"

# What the README's first screen shows.
LAYER, OTHER_LAYER, ROWS, SPARSITY = "opt-30b.fc1", "opt-30b.attention", 8, 0.6

# Kernels that exchange data between devices: NCCL's, and the all-reduces that XLA
# generates itself, which are named after JAX's sum.
COLLECTIVE = re.compile("nccl|psum|all_?reduce", re.IGNORECASE)


def load(path: pathlib.Path) -> tuple[dict, list[dict]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["environment"], content["results"]


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


def newest(
    paths: Iterable[pathlib.Path],
    select: Callable[[dict, dict], tuple[tuple, dict] | None],
) -> tuple[dict, list[dict]]:
    """Results of several runs, by key; of those with one key the newest."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    runs.sort(key=lambda run: run["environment"]["date"])
    chosen: dict[tuple, tuple[dict, dict]] = {}
    for run in runs:
        for result in run["results"]:
            if found := select(run, result):
                chosen[found[0]] = found[1], run["environment"]
    used = sorted((facts for _, facts in chosen.values()), key=lambda f: f["date"])
    commits = dict.fromkeys(facts.get("commit", "unknown") for facts in used)
    facts = used[-1] | {"commit": " and ".join(commits)}
    return facts, [chosen[key][0] for key in sorted(chosen)]


def zeros(sparsity: float) -> str:
    return f"{sparsity:.0%}" if sparsity else "dense"


def table(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def captioned(caption: str, columns: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join([textwrap.fill(caption, 98), "", *table(columns, rows)])


def shape(result: dict) -> str:
    return f"{result['m']} x {result['k']}"


def origin(facts: dict) -> str:
    driver = f", driver {facts['driver']}" if "driver" in facts else ""
    date = facts["date"].split()[0]
    return f"jax {facts['jax']}{driver}, commit {facts['commit']}, {date}"


def headline(facts: dict, results: list[dict]) -> str:
    chosen = {
        r["layer"]: r for r in results if (r["n"], r["sparsity"]) == (ROWS, SPARSITY)
    }
    large, small = chosen[LAYER], chosen[OTHER_LAYER]
    text = (
        f"On one {facts['device']}, {ROWS} rows times a {shape(large)} layer of "
        f"OPT-30B with {SPARSITY:.0%} zeros take **{large['sparse_us']:.0f}\u00a0µs**, "
        "the same in dense float16 (`jnp.dot`, which is cuBLAS) "
        f"{large['dense_us']:.0f}\u00a0µs: **{large['speedup']:.2f} times as fast in "
        f"{large['bytes_per_element'] / 2:.0%} of the memory**. Smaller layers gain "
        f"less: {shape(small)} runs at {small['speedup']:.2f} times the speed of "
        "dense. [When sparse pays](docs/when-sparse-pays.md) has all figures (median "
        f"device time, {origin(facts)})."
    )
    return textwrap.fill(text, 90, break_long_words=False, break_on_hyphens=False)


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
        f"it fills three; on **four** it takes {dense:.0f}\u00a0ms, sparse "
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
        "dense on eight."
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
        key = r["sparsity"], r["devices"], r["batch"]
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
        f"wait for the others: {first['layers']} of the {first['layers_of_the_model']} "
        f"layers of OPT-175B, {first['length']} slots of cache, split over "
        f"{facts['device']} of one host ({origin(facts)}). Empty: not measured."
    )
    batches = sorted({r["batch"] for r in results})
    cases = sorted({(r["sparsity"], r["devices"]) for r in results})
    shares = {
        (r["sparsity"], r["devices"], r["batch"]): f"{communication_share(r):.1%}"
        for r in results
    }
    rows = [
        [zeros(s), str(d), *(shares.get((s, d, b), "") for b in batches)]
        for s, d in cases
    ]
    return captioned(text, ["zeros", "GPUs", *(f"batch {b}" for b in batches)], rows)


def gigabytes(count: int | None, digits: int = 1) -> str:
    return "" if count is None else f"{count / 1e9:.{digits}f}"


def speed_table(facts: dict, results: list[dict]) -> str:
    layers = {r["layer"]: f"{r['m']}x{r['k']}" for r in results}
    sparsities = sorted({r["sparsity"] for r in results})
    speedups = {(r["layer"], r["n"], r["sparsity"]): r["speedup"] for r in results}
    shapes = " / ".join(layers.values())
    tokens = results[0].get("tokens")
    packed = f" by weights packed with `tokens={tokens}`" if tokens else ""
    text = (
        f"Speed-up of `sparse_matmul`{packed} over `jnp.dot` (cuBLAS) on one "
        f"{facts['device']}, "
        f"geometric mean over layers of OPT-30B and OPT-66B (out x in) {shapes}, with "
        f"the least and the largest in brackets: {results[0]['dtype']}, random "
        "patterns, weights not in the L2 cache, median device time, both in the same "
        f"process ({origin(facts)})."
    )
    rows = []
    for n in sorted({r["n"] for r in results}):
        cells = []
        for s in sparsities:
            of_layers = [speedups[layer, n, s] for layer in layers]
            mean = statistics.geometric_mean(of_layers)
            cells.append(f"**{mean:.2f}** ({min(of_layers):.2f}-{max(of_layers):.2f})")
        rows.append([str(n), *cells])
    return captioned(text, ["rows of x", *(f"{s:.0%} zeros" for s in sparsities)], rows)


def layer_table(facts: dict, results: list[dict]) -> str:
    text = (
        f"`sparse_matmul` beside `jnp.dot` on one {facts['device']}, as above: "
        f"{results[0]['dtype']}, microseconds ({origin(facts)})."
    )
    rows = [
        [
            shape(r),
            zeros(r["sparsity"]),
            str(r["n"]),
            f"{r['sparse_us']:.1f}",
            f"{r['dense_us']:.1f}",
            f"{r['speedup']:.2f}",
        ]
        for r in sorted(results, key=lambda r: (-r["m"], r["k"], r["sparsity"], r["n"]))
    ]
    columns = ["out x in", "zeros", "rows of x", "sparse", "dense", "x dense"]
    return captioned(text, columns, rows)


def cpu_table(facts: dict, results: list[dict]) -> str:
    rows = sorted({r["rows"] for r in results})
    layers = {(r["out"], r["in"]) for r in results}
    speedups = {
        (r["out"], r["in"], r["sparsity"], r["rows"]): r["x_dense"] for r in results
    }
    text = (
        f"Speed-up over `jnp.dot` in float32, which is XLA's fastest there, on an "
        f"{facts['device']} ({results[0]['dtype']} weights, median wall time, "
        f"{origin(facts)}). The columns are rows of x."
    )
    cells = [
        [
            f"{out} x {inputs}",
            zeros(sparsity),
            *(f"{speedups[out, inputs, sparsity, n]:.1f}" for n in rows),
        ]
        for out, inputs in sorted(layers)
        for sparsity in sorted({r["sparsity"] for r in results})
    ]
    return captioned(text, ["layer (out x in)", "zeros", *map(str, rows)], cells)


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


def prefill_table(runs: list[tuple[dict, list[dict]]]) -> str:
    """Prompts of several lengths, each with a run."""
    facts, results = runs[0]
    first = results[0]
    text = (
        f"Milliseconds for the prompts alone: {first['layers']} layers of "
        f"{first['model']} with synthetic weights, {first['dtype']}, on one "
        f"{facts['device']} ({origin(facts)}). Empty: not measured."
    )
    sparsities = sorted({r["sparsity"] for _, results in runs for r in results})
    rows = []
    for _, results in runs:
        times = {r["sparsity"]: f"{r['prefill_ms']:.1f}" for r in results}
        prompts = f"{results[0]['batch']} x {results[0]['prompt']}"
        rows.append([prompts, *(times.get(s, "") for s in sparsities)])
    return captioned(text, ["prompts x tokens", *map(zeros, sparsities)], rows)


def tokens_per_second(r: dict) -> float:
    """New tokens by the time of the prefill and all steps."""
    seconds = (r["prefill_ms"] + (r["new"] - 1) * r["step_ms"]) / 1e3
    return r["batch"] * r["new"] / seconds


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


def replace(document: pathlib.Path, name: str, content: str) -> None:
    """Writes a section, which lies between two comments."""
    text = document.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)"
    new, count = re.subn(
        pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(
            f"expected one section {name!r} in {document.name}, found {count}"
        )
    document.write_text(new, encoding="utf-8")


def main() -> None:
    gpu = load(RESULTS / f"matmul-{H100}.json")
    other_gpu = load(RESULTS / f"matmul-{H200}.json")
    few_tokens = load(RESULTS / f"matmul-tokens-8-{H200}.json")
    few_bfloat16 = load(RESULTS / f"matmul-tokens-8-bfloat16-{H200}.json")
    llama = load(RESULTS / f"matmul-llama-{H200}.json")
    several = [
        load_steps(RESULTS.glob(f"opt-parallel*-{device}.json"))
        for device in (H200, H100)
    ]
    large = load_steps(RESULTS.glob(f"opt-175b-*-{H200}.json"))
    cpu = load(RESULTS / "cpu_matmul-amd-epyc.json")
    kernels = load_kernels(RESULTS.glob(f"opt-175b-kernels-*-{H200}.json"))
    models = [
        load_requests(RESULTS.glob(f"generate-opt-{size}-*{H200}.json"))
        for size in ("30b", "66b", "175b")
    ]
    prompts = [
        load_requests([RESULTS / f"generate-prefill-{name}-{H200}.json"])
        for name in ("batch", "long")
    ]
    pruned = [
        RESULTS / f"{name}-{H200}.json" for name in ("pruning", "pruning-opt-30b")
    ]
    training = ROOT / "examples" / "demo-opt" / "training.json"
    replace(README, "matmul", headline(*gpu))
    replace(README, "model", whole_model(*large))
    replace(README, "demo", demo_figures(training))
    replace(WHEN_SPARSE_PAYS, "matmul", speed_table(*gpu))
    replace(WHEN_SPARSE_PAYS, "matmul-h200", speed_table(*other_gpu))
    replace(WHEN_SPARSE_PAYS, "tokens", speed_table(*few_tokens))
    replace(WHEN_SPARSE_PAYS, "tokens-bfloat16", layer_table(*few_bfloat16))
    replace(WHEN_SPARSE_PAYS, "llama", layer_table(*llama))
    replace(MULTI_GPU, "parallel", "\n\n".join(parallel_table(*s) for s in several))
    replace(MULTI_GPU, "large", large_table(*large))
    replace(MULTI_GPU, "communication", communication_table(*kernels))
    replace(PRUNING, "pruning", pruning_figures(*pruned))
    replace(WHEN_SPARSE_PAYS, "cpu", cpu_table(*cpu))
    tables = [generate_table(*model) for model in models]
    replace(WHEN_SPARSE_PAYS, "generate", "\n\n".join(tables))
    replace(WHEN_SPARSE_PAYS, "prompts", prefill_table(prompts))


if __name__ == "__main__":
    main()
