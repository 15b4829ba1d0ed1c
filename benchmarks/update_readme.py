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
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
WHEN_SPARSE_PAYS = ROOT / "docs" / "when-sparse-pays.md"
MULTI_GPU = ROOT / "docs" / "multi-gpu.md"

H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"

# What the README's first screen shows.
LAYER, OTHER_LAYER, ROWS, SPARSITY = "opt-30b.fc1", "opt-30b.attention", 8, 0.6


def load(path: pathlib.Path) -> tuple[dict, list[dict]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["environment"], content["results"]


def load_steps(paths: Iterable[pathlib.Path]) -> tuple[dict, list[dict]]:
    """One table from several runs of opt_parallel.py on the same kind of device.

    Steps of whole models, each with its `model`; of a step measured twice the newer.
    """
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    runs.sort(key=lambda run: run["environment"]["date"])
    facts = dict(runs[-1]["environment"])
    commits = [run["environment"].get("commit", "unknown") for run in runs]
    facts["commit"] = " and ".join(dict.fromkeys(commits))
    steps: dict[tuple, dict] = {}
    for run in runs:
        settings = run["settings"]
        for r in run["results"]:
            if "step_ms" in r and r["layers"] == settings["layers_of_the_model"]:
                key = settings["model"], r["sparsity"], r["devices"], r["batch"]
                steps[key] = r | {"model": settings["model"].upper()}
    return facts, [steps[key] for key in sorted(steps)]


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
        f"host: a decode step, tokens a second, tokens a second and GPU, and bytes a "
        f"GPU as predicted ({origin(facts)}). Flash-LLM's paper has 46, 81, 136 and "
        "195 tokens a second and GPU for batch 8, 16, 32 and 64, on four A100 with 80% "
        "zeros, and 23, 43, 79 and 127 for FasterTransformer, dense on eight."
    )
    columns = ["zeros", "GPUs", "batch"]
    columns += ["step, ms", "tokens/s", "tokens/s and GPU", "GB a GPU"]
    rows = [
        [
            zeros(r["sparsity"]),
            str(r["devices"]),
            str(r["batch"]),
            f"{r['step_ms']:.1f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['tokens_per_gpu_second']:.0f}",
            f"{r['predicted_bytes_a_device'] / 1e9:.0f}",
        ]
        for r in results
    ]
    return captioned(text, columns, rows)


def speed_table(facts: dict, results: list[dict]) -> str:
    layers = {r["layer"]: f"{r['m']}x{r['k']}" for r in results}
    sparsities = sorted({r["sparsity"] for r in results})
    speedups = {(r["layer"], r["n"], r["sparsity"]): r["speedup"] for r in results}
    shapes = " / ".join(layers.values())
    text = (
        "Speed-up of `sparse_matmul` over `jnp.dot` (cuBLAS) on one "
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
        "step is one new token for each; tokens a second are from both."
    )
    columns = ["zeros", "batch", "weights, GB"]
    columns += ["prefill, ms", "step, ms", "x dense", "tokens/s"]
    rows = [
        [
            zeros(r["sparsity"]),
            str(r["batch"]),
            f"{r['weight_bytes'] / 1e9:.1f}",
            f"{r['prefill_ms']:.0f}",
            f"{r['step_ms']:.2f}",
            f"{r['speedup']:.2f}" if "speedup" in r else "",
            f"{tokens_per_second(r):.0f}",
        ]
        for r in results
        if "step_ms" in r
    ]
    return captioned(text, columns, rows)


def tokens_per_second(r: dict) -> float:
    """New tokens by the time of the prefill and all steps."""
    seconds = (r["prefill_ms"] + (r["new"] - 1) * r["step_ms"]) / 1e3
    return r["batch"] * r["new"] / seconds


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
    several = [
        load_steps(RESULTS.glob(f"opt-parallel*-{device}.json"))
        for device in (H200, H100)
    ]
    large = load_steps(RESULTS.glob(f"opt-175b-*-{H200}.json"))
    cpu = load(RESULTS / "cpu_matmul-amd-epyc.json")
    models = [load(RESULTS / f"generate-opt-{n}-{H200}.json") for n in ("30b", "175b")]
    training = ROOT / "examples" / "demo-opt" / "training.json"
    replace(README, "matmul", headline(*gpu))
    replace(README, "model", whole_model(*large))
    replace(README, "demo", demo_figures(training))
    replace(WHEN_SPARSE_PAYS, "matmul", speed_table(*gpu))
    replace(WHEN_SPARSE_PAYS, "matmul-h200", speed_table(*other_gpu))
    replace(MULTI_GPU, "parallel", "\n\n".join(parallel_table(*s) for s in several))
    replace(MULTI_GPU, "large", large_table(*large))
    replace(WHEN_SPARSE_PAYS, "cpu", cpu_table(*cpu))
    tables = [generate_table(*model) for model in models]
    replace(WHEN_SPARSE_PAYS, "generate", "\n\n".join(tables))


if __name__ == "__main__":
    main()
