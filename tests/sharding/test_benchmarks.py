import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_opt_parallel_runs_on_cpu_devices(tmp_path):
    options = (
        "--model tiny --sparsity 0,0.8 --batch 2 --devices 1,2 --length 8 --steps 4"
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
    assert content["settings"] == {
        "model": "tiny",
        "layers_of_the_model": 2,
        "steps": 4,
        "fuse_qkv": True,
        "NCCL_NVLS_ENABLE": "0",
    }
    results = content["results"]
    assert [(r["sparsity"], r["devices"]) for r in results] == [
        (0.0, 1),
        (0.0, 2),
        (0.8, 1),
        (0.8, 2),
    ]
    assert all(r["step_ms"] > 0 for r in results)
    # CPUs do not count memory.
    assert all(r["peak_bytes_a_device"] is None for r in results)
    for one, two in zip(results[::2], results[1::2], strict=True):
        assert "equal_tokens" not in one
        assert two["equal_tokens"] == two["equal_next_tokens"] == 1


def test_measured_steps_stand_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import scaling_model

    kernels = (ROOT / "benchmarks/results/matmul-nvidia-h200.json").read_text()
    (tmp_path / "matmul-nvidia-h200.json").write_text(kernels)
    step = {"layers": 64, "sparsity": 0.6, "devices": 2, "batch": 8, "length": 64}
    content = {
        "environment": {"device": "NVIDIA H200", "date": "2026-11-26 04:00 UTC"},
        "settings": {"model": "opt-66b", "layers_of_the_model": 64},
        "results": [
            step | {"step_ms": 12.5},
            step | {"batch": 1, "step_ms": 11.0},  # of another batch
            step | {"sparsity": 0.0, "devices": 1},  # did not fit
        ],
    }
    path = tmp_path / "opt-parallel-nvidia-h200.json"
    path.write_text(json.dumps(content))
    # The same step in an older run does not count.
    content["environment"]["date"] = "2026-11-25 04:00 UTC"
    content["results"][0] = content["results"][0] | {"step_ms": 99.0}
    older = tmp_path / "opt-parallel-again-nvidia-h200.json"
    older.write_text(json.dumps(content))
    monkeypatch.setattr(scaling_model, "RESULTS", tmp_path)
    (measured,) = scaling_model.measured_steps()
    assert measured["measured_ms"] == 12.5
    assert 5 < measured["step_ms"] < 20
    *_, line = scaling_model.measured_lines([measured])
    assert "| OPT-66B | NVIDIA H200 | 64 | 60% | 2 | 12.5 |" in line
    scaling_model.plot(scaling_model.run(), tmp_path / "plot.png", [measured])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
