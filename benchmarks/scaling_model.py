"""Predicts OPT on several GPUs from kernel times measured on one.

    python benchmarks/scaling_model.py

A product's time is a straight line through the times measured on one H200
(`results/matmul-nvidia-h200.json`): a constant and a time per element, by sparsity and
rows of x. The other bytes of a step (cache, vocabulary) pass at BYTES_PER_SECOND, and
an all-reduce takes LATENCY_US and its bytes' time on the links. Norms, attention's
arithmetic and launches are left out.

Steps that `opt_parallel.py` measured are set beside what the same model predicts for
that GPU and cache, from the products that `matmul.py` measured on it.

Writes the tables and the plot of `docs/multi-gpu.md`.
"""

import math
import pathlib

import matplotlib
import numpy as np
from parallel_tables import load_steps
from result_tables import H100, H200, RESULTS, ROOT, load, replace, table, zeros

from flashjax.models.opt import OPTConfig
from flashjax.models.opt.memory import predict

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEASURED = RESULTS / "matmul-nvidia-h200.json"
DOCUMENT = ROOT / "docs/multi-gpu.md"
PLOT = ROOT / "docs/multi-gpu.png"

MODELS = {
    "OPT-30B": OPTConfig.opt_30b(),
    "OPT-66B": OPTConfig.opt_66b(),
    "OPT-175B": OPTConfig.opt_175b(),
}
SPARSITIES = (0.0, 0.6, 0.8)
DEVICES = (1, 2, 4, 8)
BATCH, LENGTH = 8, 1024

# Assumptions, not measured here.
GPU_BYTES = 141e9
BYTES_PER_SECOND = 4.0e12  # of 4.8e12 that an H200's memory has
# Of 4.8e12, and of 3.35e12 on an H100.
MEASURED_BYTES_PER_SECOND = {H200: 4.0e12, H100: 2.8e12}
LINK_BYTES_PER_SECOND = 360e9  # of 450e9 that NVLink 4 has in each direction
LATENCY_US = {1: 0.0, 2: 10.0, 4: 12.0, 8: 15.0}  # of an all-reduce by NCCL


def product_lines(results: list[dict], rows: int) -> dict[float, tuple[float, float]]:
    """Microseconds of a product: (constant, per element) by sparsity; 0 is dense."""
    lines = {}
    points = [r for r in results if r["n"] == rows]
    for sparsity in SPARSITIES:
        chosen = [r for r in points if r["sparsity"] == (sparsity or 0.6)]
        elements = np.array([r["m"] * r["k"] for r in chosen], np.float64)
        times = [r["sparse_us" if sparsity else "dense_us"] for r in chosen]
        slope, constant = np.polyfit(elements, times, 1)
        lines[sparsity] = max(constant, 0.0), slope
    return lines


def all_reduce_us(nbytes: float, devices: int) -> float:
    """Latency and the bytes of a ring, each device sending and receiving them."""
    if devices == 1:
        return 0.0
    sent = 2 * (devices - 1) / devices * nbytes
    return LATENCY_US[devices] + sent / LINK_BYTES_PER_SECOND * 1e6


def predict_step(
    config: OPTConfig,
    sparsity: float,
    devices: int,
    line: tuple[float, float],
    *,
    length: int = LENGTH,
    prompt: int = 1,
    bandwidth: float = BYTES_PER_SECOND,
) -> dict:
    """Memory of a GPU, and bytes and time of one decode step."""
    size, ffn = config.hidden_size, config.ffn_size
    memory = predict(
        config,
        sparsity=sparsity,
        batch=BATCH,
        length=length,
        prompt=prompt,
        devices=devices,
    )
    table = config.vocab_size * (config.word_embed_proj_dim or size) * 2
    constant, per_element = line
    shapes = [3 * size * size, size * size, size * ffn, size * ffn]
    products = config.num_layers * sum(
        constant + per_element * elements / devices for elements in shapes
    )
    others = (memory.kv_cache + table / devices) / bandwidth * 1e6
    # Sums are float32; the logits are gathered once, which costs half a reduction.
    reductions = 2 * config.num_layers + 1
    communication = reductions * all_reduce_us(BATCH * size * 4, devices)
    communication += all_reduce_us(BATCH * config.vocab_size * 2, devices)
    total = memory.total
    return {
        "sparsity": sparsity,
        "devices": devices,
        "gigabytes": total / 1e9,
        "fits": total + (1 << 30) <= GPU_BYTES,
        "read_gigabytes": (memory.linear_weights + memory.kv_cache + table / devices)
        / 1e9,
        "products_ms": products / 1e3,
        "communication_ms": communication / 1e3,
        "step_ms": (products + others + communication) / 1e3,
    }


def table_lines(results: dict[str, list[dict]]) -> list[str]:
    columns = ["model", "zeros", "GPUs", "GB a GPU", "GB read a step", "products ms"]
    columns += ["communication ms", "step ms"]
    rows = []
    for model, steps in results.items():
        for s in steps:
            fits = "" if s["fits"] else " (too much)"
            mark = " *" if model == "OPT-30B" and s["devices"] == 1 else ""
            rows.append(
                [
                    model,
                    zeros(s["sparsity"]),
                    str(s["devices"]),
                    f"{s['gigabytes']:.0f}{fits}",
                    f"{s['read_gigabytes']:.1f}",
                    f"{s['products_ms']:.1f}{mark}",
                    f"{s['communication_ms']:.1f}",
                    f"{s['step_ms']:.1f}",
                ]
            )
    return table(columns, rows)


def measured_steps() -> list[dict]:
    """Steps of whole models that were measured, with what the model predicts."""
    steps = []
    for device, bandwidth in MEASURED_BYTES_PER_SECOND.items():
        paths = [
            path
            for stem in ("opt-parallel*", "opt-175b-*")
            for path in RESULTS.glob(f"{stem}-{device}.json")
        ]
        if not paths:
            continue
        facts, results = load_steps(paths)
        lines = product_lines(load(RESULTS / f"matmul-{device}.json")[1], BATCH)
        for r in results:
            if r["batch"] != BATCH:
                continue
            predicted = predict_step(
                MODELS[r["model"]],
                r["sparsity"],
                r["devices"],
                lines[r["sparsity"]],
                length=r["length"],
                prompt=r["length"],
                bandwidth=bandwidth,
            )
            measured = {"device": facts["device"], "measured_ms": r["step_ms"]}
            steps.append(predicted | {k: r[k] for k in ("model", "length")} | measured)
    return sorted(steps, key=lambda step: (step["model"], step["device"]))


def measured_lines(steps: list[dict]) -> list[str]:
    if not steps:
        return ["No step has been measured on several GPUs yet."]
    columns = ["model", "GPU", "slots", "zeros", "GPUs", "measured ms", "model ms"]
    rows = [
        [
            s["model"],
            s["device"],
            str(s["length"]),
            zeros(s["sparsity"]),
            str(s["devices"]),
            f"{s['measured_ms']:.1f}",
            f"{s['step_ms']:.1f}",
        ]
        for s in steps
    ]
    return table(columns, rows)


def plot(results: dict[str, list[dict]], path: pathlib.Path, measured=()) -> None:
    panels = dict(results)
    for s in measured:
        title = f"{s['model']}, {s['length']} slots\n{s['device']}"
        panels.setdefault(title, []).append(s)
    columns = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(2, columns, figsize=(10 / 3 * columns, 6.8))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (model, steps) in zip(axes.flat, panels.items(), strict=False):
        for color, sparsity in enumerate(SPARSITIES):
            chosen = [s for s in steps if s["sparsity"] == sparsity]
            counts = [s["devices"] for s in chosen]
            label = f"{sparsity:.0%} zeros" if sparsity else "dense"
            style = {"color": f"C{color}"}
            axis.plot(counts, [s["step_ms"] for s in chosen], label=label, **style)
            for s in chosen:
                mark = "o" if s["fits"] or "measured_ms" in s else "x"
                axis.plot(s["devices"], s["step_ms"], mark, **style)
                if "measured_ms" in s:
                    point = s["devices"], s["measured_ms"]
                    axis.plot(*point, "*", markersize=11, **style)
        axis.set(xlabel="GPUs", xscale="log", xlim=(0.9, 9), ylim=(0, None))
        axis.set_ylim(top=1.05 * axis.get_ylim()[1])  # a star at the top is whole
        axis.set_title(model, fontsize="medium")
        axis.set_xticks(DEVICES, [str(n) for n in DEVICES])
        axis.minorticks_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("ms a decode step")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run() -> dict[str, list[dict]]:
    _, measured = load(MEASURED)
    lines = product_lines(measured, BATCH)
    return {
        name: [
            predict_step(config, sparsity, devices, lines[sparsity])
            for sparsity in SPARSITIES
            for devices in DEVICES
        ]
        for name, config in MODELS.items()
    }


def main() -> None:
    results = run()
    measured = measured_steps()
    plot(results, PLOT, measured)
    replace(DOCUMENT, "scaling", "\n".join(table_lines(results)))
    replace(DOCUMENT, "measured", "\n".join(measured_lines(measured)))


if __name__ == "__main__":
    main()
