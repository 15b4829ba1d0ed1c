"""Writes measured figures into the README and docs, from the files that hold them.

    python benchmarks/update_readme.py

Speeds come from `results/`, the demo model's figures from
`examples/demo-opt/training.json`; the tables are made in `*_tables.py`.
"""

from model_tables import (
    demo_figures,
    generate_table,
    load_prompts,
    load_requests,
    prefill_table,
    pruning_figures,
    starting_figures,
)
from parallel_tables import (
    communication_table,
    large_table,
    load_kernels,
    load_steps,
    parallel_table,
    whole_model,
)
from product_tables import (
    bfloat16_figures,
    cpu_table,
    headline,
    layer_table,
    pattern_table,
    peer_table,
    speed_table,
)
from result_tables import (
    H100,
    H200,
    RESULTS,
    ROOT,
    load,
    load_part,
    replace,
)

README = ROOT / "README.md"
WHEN_SPARSE_PAYS = ROOT / "docs" / "when-sparse-pays.md"
MULTI_GPU = ROOT / "docs" / "multi-gpu.md"
GENERATION = ROOT / "docs" / "generation.md"
PRUNING = ROOT / "docs" / "pruning.md"


def main() -> None:
    older_gpu = load(RESULTS / f"matmul-{H100}.json")
    gpu = load(RESULTS / f"matmul-{H200}.json")
    few_tokens = load(RESULTS / f"matmul-tokens-8-{H200}.json")
    few_bfloat16 = load(RESULTS / f"matmul-tokens-8-bfloat16-{H200}.json")
    both_halves = load(RESULTS / f"matmul-bfloat16-{H200}.json")
    rows_128, many_rows, rounds, zeros, large_layers, patterns, llama, expanded = (
        load(RESULTS / f"matmul-{name}-{H200}.json")
        for name in (
            "six-layers",
            "many-rows",
            "rounds",
            "few-and-many-zeros",
            "opt-175b",
            "patterns",
            "llama",
            "tokens-8-expanded",
        )
    )
    peers = RESULTS / f"peers-{H200}.json"
    several = [
        load_steps(RESULTS.glob(f"opt-parallel*-{device}.json"))
        for device in (H200, H100)
    ]
    large = load_steps(RESULTS.glob(f"opt-175b-*-{H200}.json"))
    cpu_file = RESULTS / "cpu_matmul-amd-epyc.json"
    cpu = load(cpu_file)
    cores, simd = (load_part(cpu_file, name) for name in ("cores", "simd"))
    kernels = load_kernels(RESULTS.glob(f"opt-175b-*-{H200}.json"))
    models = [
        load_requests(RESULTS.glob(f"generate-opt-{size}-*{H200}.json"))
        for size in ("30b", "66b", "175b")
    ]
    prompts = load_prompts(RESULTS.glob(f"generate-prefill-*-{H200}.json"))
    pruned = [
        RESULTS / f"{name}-{H200}.json" for name in ("pruning", "pruning-opt-30b")
    ]
    training = ROOT / "examples" / "demo-opt" / "training.json"
    replace(README, "matmul", headline(*gpu))
    replace(README, "model", whole_model(*large))
    replace(README, "demo", demo_figures(training))
    replace(WHEN_SPARSE_PAYS, "matmul", speed_table(*gpu, rows=range(65)))
    replace(WHEN_SPARSE_PAYS, "matmul-h100", speed_table(*older_gpu))
    replace(WHEN_SPARSE_PAYS, "tokens", speed_table(*few_tokens, rows=range(9)))
    replace(
        WHEN_SPARSE_PAYS, "tokens-expanded", speed_table(*expanded, rows=range(9, 513))
    )
    replace(WHEN_SPARSE_PAYS, "tokens-bfloat16", layer_table(*few_bfloat16))
    replace(WHEN_SPARSE_PAYS, "bfloat16", bfloat16_figures(*both_halves))
    replace(WHEN_SPARSE_PAYS, "many-rows", speed_table(*many_rows))
    replace(WHEN_SPARSE_PAYS, "rows-128", speed_table(*rows_128, rows=range(128, 129)))
    replace(WHEN_SPARSE_PAYS, "rounds", speed_table(*rounds))
    replace(WHEN_SPARSE_PAYS, "zeros", speed_table(*zeros))
    replace(WHEN_SPARSE_PAYS, "opt-175b", speed_table(*large_layers, of="OPT-175B"))
    replace(WHEN_SPARSE_PAYS, "patterns", pattern_table(*patterns))
    replace(WHEN_SPARSE_PAYS, "llama", layer_table(*llama))
    replace(
        WHEN_SPARSE_PAYS, "peers", peer_table(*load(peers), load_part(peers, "jax"))
    )
    replace(MULTI_GPU, "parallel", "\n\n".join(parallel_table(*s) for s in several))
    replace(MULTI_GPU, "large", large_table(*large))
    replace(MULTI_GPU, "communication", communication_table(*kernels))
    compiled = RESULTS.glob(f"compile-opt-*-{H200}.json")
    loaded = RESULTS / f"load-opt-66b-{H200}.json"
    replace(GENERATION, "starting", starting_figures(compiled, loaded))
    replace(PRUNING, "pruning", pruning_figures(*pruned))
    replace(WHEN_SPARSE_PAYS, "cpu", cpu_table(*cpu, cores, simd))
    tables = [generate_table(*model) for model in models]
    replace(WHEN_SPARSE_PAYS, "generate", "\n\n".join(tables))
    replace(WHEN_SPARSE_PAYS, "prompts", prefill_table(*prompts))


if __name__ == "__main__":
    main()
