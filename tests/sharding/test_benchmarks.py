import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_opt_parallel_runs_on_cpu_devices(tmp_path):
    options = (
        "--model tiny --sparsity 0,0.8 --batch 2 --devices 1,2 --length 8 --steps 3"
    )
    # The script imports its neighbours; the safe path would hide them.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks/opt_parallel.py",
            *options.split(),
            "--name",
            str(tmp_path / "opt-parallel"),
        ],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("opt-parallel-*.json")
    content = json.loads(path.read_text())
    settings = {"model": "tiny", "fuse_qkv": True, "NCCL_NVLS_ENABLE": "0"}
    assert content["settings"] == settings
    assert [(r["sparsity"], r["devices"]) for r in content["results"]] == [
        (0.0, 1),
        (0.0, 2),
        (0.8, 1),
        (0.8, 2),
    ]
    assert all(r["equal_tokens"] == 1 for r in content["results"])
