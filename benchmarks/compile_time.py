"""Times tracing, lowering and compiling a decode step, by the number of layers.

    python benchmarks/compile_time.py [LAYERS ...]

A tiny width, so that only the number of operations counts. Seconds of processor time,
without the persistent cache. Writes `results/compile_time-DEVICE.json`.
"""

import sys
import time

import jax
import numpy as np
import report
from flax import nnx

from flashjax.models import opt
from flashjax.models.opt.generation_request import make_request
from flashjax.testing import random_opt

# `opt.generate` is the function; this is the module that it comes from.
generate = sys.modules["flashjax.models.opt.generate"]


def measure(layers: int, sparsity: float) -> dict[str, float]:
    config = opt.OPTConfig(
        hidden_size=64, num_layers=layers, ffn_size=128, num_heads=4, vocab_size=100
    )
    model = random_opt(config, sparsity)
    options = opt.GenerationConfig(max_new_tokens=8)
    request = make_request(config, np.full((2, 8), 3), None, options)
    graphdef, params = nnx.split(model)
    state = jax.eval_shape(lambda: generate._start(graphdef, params, request))
    times = [time.process_time()]
    traced = generate._decode.trace(
        graphdef, params, request.settings, state, np.int32(8), slots=16
    )
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    lowered.compile()
    times.append(time.process_time())
    seconds = [round(float(t), 2) for t in np.diff(times)]
    names = ("trace_s", "lower_s", "compile_s")
    return {"layers": layers, "sparsity": sparsity} | dict(
        zip(names, seconds, strict=True)
    )


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    layers = [int(part) for part in sys.argv[1:]] or [24, 48, 96]
    results = []
    for sparsity in (0.0, 0.8):
        for n in layers:
            results.append(measure(n, sparsity))
            print(results[-1], flush=True)
    print(f"written to {report.save('compile_time', {'results': results})}")


if __name__ == "__main__":
    main()
