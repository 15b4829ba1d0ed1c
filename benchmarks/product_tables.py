"""Figures of single products, from matmul.py and cpu_matmul.py."""

import statistics
import textwrap

from result_tables import captioned, origin, shape, zeros

# What the README's first screen shows.
LAYER, OTHER_LAYER, ROWS, SPARSITY = "opt-30b.fc1", "opt-30b.attention", 8, 0.6


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


def speed_table(
    facts: dict,
    results: list[dict],
    of: str = "OPT-30B and OPT-66B",
    rows: range | None = None,
) -> str:
    """Means over the layers, of the models `of`, by zeros and rows (None: all)."""
    layers = {r["layer"]: f"{r['m']}x{r['k']}" for r in results}
    sparsities = sorted({r["sparsity"] for r in results})
    speedups = {(r["layer"], r["n"], r["sparsity"]): r["speedup"] for r in results}
    shapes = " / ".join(layers.values())
    tokens = results[0].get("tokens")
    packed = f" by weights packed with `tokens={tokens}`" if tokens else ""
    text = (
        f"Speed-up of `sparse_matmul`{packed} over `jnp.dot` (cuBLAS) on one "
        f"{facts['device']}, "
        f"geometric mean over layers of {of} (out x in) {shapes}, with "
        f"the least and the largest in brackets: {results[0]['dtype']}, random "
        "patterns, weights not in the L2 cache, median device time, both in the same "
        f"process ({origin(facts)})."
    )
    lines = []
    for n in sorted({r["n"] for r in results if rows is None or r["n"] in rows}):
        cells = []
        for s in sparsities:
            of_layers = [speedups[layer, n, s] for layer in layers]
            mean = statistics.geometric_mean(of_layers)
            cells.append(f"**{mean:.2f}** ({min(of_layers):.2f}-{max(of_layers):.2f})")
        lines.append([str(n), *cells])
    columns = ["rows of x", *(f"{s:.0%} zeros" for s in sparsities)]
    return captioned(text, columns, lines)


def layer_table(facts: dict, results: list[dict]) -> str:
    """Times of every layer, by rows of x."""
    text = (
        f"`sparse_matmul` beside `jnp.dot` on one {facts['device']}, as above: "
        f"{results[0]['dtype']}, microseconds of dense / sparse = speed-up "
        f"({origin(facts)})."
    )
    numbers = sorted({r["n"] for r in results})
    layers: dict[tuple[str, str], dict[int, str]] = {}
    for r in sorted(results, key=lambda r: (-r["m"], r["k"], r["sparsity"])):
        cell = f"{r['dense_us']:.1f} / {r['sparse_us']:.1f} = **{r['speedup']:.2f}**"
        layers.setdefault((shape(r), zeros(r["sparsity"])), {})[r["n"]] = cell
    rows = [[*key, *(cells[n] for n in numbers)] for key, cells in layers.items()]
    columns = ["out x in", "zeros", *(f"{n} row{'s'[: n != 1]}" for n in numbers)]
    return captioned(text, columns, rows)


def pattern_table(facts: dict, results: list[dict]) -> str:
    """Means over the layers, by where the zeros are."""
    names = {
        "random": "random",
        "columns": "every twentieth input dense",
        "demo": "the demo model's",
        "rows": "every twentieth output dense",
    }
    shapes = " and ".join(dict.fromkeys(shape(r) for r in results))
    sparsities = sorted({r["sparsity"] for r in results})
    rows = sorted({r["n"] for r in results})
    text = (
        f"Bytes an element and speed-up over `jnp.dot` by where the zeros are, on one "
        f"{facts['device']}: geometric mean over {shapes} (out x in), "
        f"{results[0]['dtype']}, with {', '.join(map(str, rows))} rows of x, measured "
        f"as above ({origin(facts)})."
    )
    columns = ["pattern"]
    for s in sparsities:
        columns += [f"{s:.0%} zeros: bytes", *(f"{n} rows" for n in rows)]
    cells = []
    for pattern, name in names.items():
        row = [name]
        for s in sparsities:
            of = [r for r in results if (r["pattern"], r["sparsity"]) == (pattern, s)]
            row.append(f"{statistics.mean(r['bytes_per_element'] for r in of):.2f}")
            for n in rows:
                speedups = [r["speedup"] for r in of if r["n"] == n]
                row.append(f"**{statistics.geometric_mean(speedups):.2f}**")
        cells.append(row)
    return captioned(text, columns, cells)


def peer_table(facts: dict, results: list[dict], others: dict) -> str:
    """Other kernels for any pattern of zeros, in the same run."""
    names = {"flash_llm": "Flash-LLM", "spinfer": "SpInfer"}
    text = (
        f"Microseconds of a product on one {facts['device']}, float16, random "
        "patterns, weights not in the L2 cache, median device time, all in the same "
        "process; in brackets the bytes an element. Of Flash-LLM (1d2828a) and SpInfer "
        "(ee68906), built from their sources for this GPU, it is the best of six "
        f"split-K ({origin(facts)}, `benchmarks/peers/kernels.py`)."
    )
    cells = []
    for r in results:
        row = [shape(r), zeros(r["sparsity"]), str(r["n"]), f"{r['dense_us']:.1f}"]
        row.append(f"**{r['sparse_us']:.1f}** ({r['bytes_per_element']:.2f})")
        for name in names:
            wrong = ", wrong" if r[f"{name}_error"] > 1e-2 else ""
            used = r[f"{name}_bytes_per_element"]
            row.append(f"{r[f'{name}_us']:.1f} ({used:.2f}{wrong})")
        cells.append(row)
    columns = ["out x in", "zeros", "rows of x", "dense", "FlashJAX", *names.values()]
    jax = (
        f"JAX's own sparse arrays take {others['BCOO']:.0f} (BCOO) and "
        f"{others['BCSR']:.0f} (BCSR) microseconds for the first line's product, in "
        "float32, by the host's clock."
    )
    return captioned(text, columns, cells) + "\n\n" + textwrap.fill(jax, 98)


def bfloat16_figures(facts: dict, results: list[dict]) -> str:
    """How long bfloat16 takes beside float16 in the same run."""
    sparse, dense = (
        {(r["layer"], r["n"], r["sparsity"], r["dtype"]): r[us] for r in results}
        for us in ("sparse_us", "dense_us")
    )

    def ratios(times):
        return [
            time / times[*case, "float16"]
            for (*case, dtype), time in times.items()
            if dtype == "bfloat16"
        ]

    shapes = " / ".join(dict.fromkeys(f"{r['m']}x{r['k']}" for r in results))
    sparsities = " and ".join(
        f"{s:.0%}" for s in sorted({r["sparsity"] for r in results})
    )
    rows = sorted({r["n"] for r in results})
    text = (
        f"A product in bfloat16 takes {statistics.geometric_mean(ratios(sparse)):.2f} "
        f"times as long as in float16, {min(ratios(sparse)):.2f} to "
        f"{max(ratios(sparse)):.2f}, and a dense one {min(ratios(dense)):.2f} to "
        f"{max(ratios(dense)):.2f} times: both in one run on one {facts['device']}, "
        f"layers of {shapes}, {sparsities} zeros, {rows[0]} to {rows[-1]} rows "
        f"({origin(facts)}, `benchmarks/matmul.py --dtype float16,bfloat16`)."
    )
    return textwrap.fill(text, 98)


def cpu_table(facts: dict, results: list[dict], cores: int, simd: str) -> str:
    rows = sorted({r["rows"] for r in results})
    layers = {(r["out"], r["in"]) for r in results}
    speedups = {
        (r["out"], r["in"], r["sparsity"], r["rows"]): r["x_dense"] for r in results
    }
    text = (
        f"Speed-up over `jnp.dot` in float32, which is XLA's fastest there, on an "
        f"{facts['device']} with {cores} cores and {simd.upper()} "
        f"({results[0]['dtype']} weights, median wall time, "
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
