"""Two processes with two CPU devices each, as two hosts would run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from flashjax.models import opt

FOLDER = Path(__file__).parents[1] / "models/opt/data/pre_norm"

WORKER = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from flashjax.models import opt

port, index, folder = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
mesh = jax.make_mesh((jax.device_count(),), ("model",))
for dtype, sparse in (("float32", "auto"), ("float16", True)):
    model, _ = opt.from_pretrained(folder, dtype=dtype, sparse=sparse, mesh=mesh)
    assert not model.embed_tokens.embedding[...].is_fully_addressable
    out = opt.generate(model, np.array([[2, 5, 9, 11, 4]]), max_new_tokens=8)
    print(dtype, *np.asarray(out)[0].tolist(), flush=True)
    try:
        opt.save_pretrained(model, None, folder + "-copy")
    except ValueError as error:
        print(dtype, "error", error, flush=True)
jax.distributed.shutdown()
"""


def run():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(i), str(FOLDER)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, results, strict=True):
        assert process.returncode == 0, error[-2000:]
    return [out.splitlines() for out, _ in results]


def test_two_processes_generate_what_one_does():
    outputs = run()
    for dtype, sparse in (("float32", "auto"), ("float16", True)):
        model, _ = opt.from_pretrained(FOLDER, dtype=dtype, sparse=sparse)
        expected = opt.generate(model, np.array([[2, 5, 9, 11, 4]]), max_new_tokens=8)
        line = " ".join([dtype, *map(str, np.asarray(expected)[0].tolist())])
        for lines in outputs:
            assert line in lines
            (error,) = (other for other in lines if f"{dtype} error" in other)
            assert "spread over several processes" in error
