"""Writes measured figures into the README, from the files that hold them.

    python benchmarks/update_readme.py

The speed table comes from `results/matmul-nvidia-h200.json`, the demo model's figures
from `examples/demo-opt/training.json`.
"""

import json
import pathlib
import re
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def speed_table(path: pathlib.Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    facts, results = content["environment"], content["results"]
    layers = {r["layer"]: f"{r['m']}x{r['k']}" for r in results}
    sparsities = sorted({r["sparsity"] for r in results})
    speedups = {(r["layer"], r["n"], r["sparsity"]): r["speedup"] for r in results}
    shapes = " / ".join(layers.values())
    text = (
        "Speed-up of `sparse_matmul` over `jnp.dot` (cuBLAS) on one "
        f"{facts['device']}, "
        f"for layers of OPT-30B (out x in) {shapes}: {results[0]['dtype']}, random "
        "patterns, weights not in the L2 cache, median device time, both in the same "
        f"process (jax {facts['jax']}, driver {facts['driver']}, "
        f"{facts['date'].split()[0]})."
    )
    lines = [
        textwrap.fill(text, 90),
        "",
        "| rows of x | " + " | ".join(f"{s:.0%} zeros" for s in sparsities) + " |",
        "|---" * (len(sparsities) + 1) + "|",
    ]
    for n in sorted({r["n"] for r in results}):
        cells = [
            " / ".join(f"{speedups[layer, n, s]:.2f}" for layer in layers)
            for s in sparsities
        ]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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


def replace(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)"
    new, count = re.subn(pattern, rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"expected one {name} section in README.md, found {count}")
    return new


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = replace(text, "matmul", speed_table(RESULTS / "matmul-nvidia-h200.json"))
    training = ROOT / "examples" / "demo-opt" / "training.json"
    text = replace(text, "demo", demo_figures(training))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
