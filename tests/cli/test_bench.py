"""``flashjax bench``."""

import json
import sys

import pytest
from cli_support import assert_error

ARGS = ("--layers", 1, "--prompt", 4, "--new", 4, "--repetitions", 1)


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    from flashjax.cli import bench_generate

    monkeypatch.setattr(bench_generate, "_BANDWIDTH_BYTES", {"cpu": 1 << 24})


def test_generate(cli, sparse_folder, tmp_path):
    out = tmp_path / "results"
    args = ("--model", sparse_folder, "--sparsity", "0,0.8", "--batch", "1,3")
    result = cli("bench", "generate", *args, *ARGS, "--out", out)
    assert (result.code, result.err) == (0, "")
    assert "reached" in result.out
    (path,) = out.glob("generate-*.json")
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads(path.read_text())
    rows = content["results"]
    pairs = [(r["sparsity"], r["batch"]) for r in rows]
    assert pairs == [(0, 1), (0, 3), (0.8, 1), (0.8, 3)]
    assert all(r["layers"] == 1 and r["speedup"] > 0 for r in rows)
    assert rows[2]["weight_bytes"] < rows[0]["weight_bytes"]
    for r in rows:
        bound = r["step_bytes"] / content["read_gb_per_s"] / 1e6
        assert r["bound_ms"] == pytest.approx(bound, rel=0.05, abs=1e-3)
        assert r["request_ms"] > 0
        assert r["compile_seconds"] > 0
        assert r["request_peak_bytes"] is None  # CPUs do not count
    assert content["environment"]["platform"] == "cpu"


def test_memory_is_shown_as_measured_or_predicted():
    from flashjax.cli.bench_generate import memory_bytes

    assert memory_bytes({"predicted_bytes": 7, "request_peak_bytes": 5}) == 5
    assert memory_bytes({"predicted_bytes": 7, "request_peak_bytes": None}) == 7


def test_variables_of_xla_are_in_the_environment(monkeypatch):
    from flashjax.cli.environment import environment

    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    assert "XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async" in environment()["variables"]


def test_the_plugin_for_cuda_is_in_the_environment(monkeypatch):
    from flashjax.cli import environment

    def version(name):
        if name != "jax-cuda13-plugin":
            raise environment.importlib.metadata.PackageNotFoundError
        return "0.11.2"

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    assert environment._plugins() == "jax-cuda13-plugin 0.11.2"
    assert "plugin" not in environment.environment()  # of a CPU


def test_cache_dtype(cli, sparse_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashjax.cli.bench_plot", None)
    args = ("--model", sparse_folder, "--sparsity", "0.8", "--batch", 1, "--json")
    cache = ("--cache-dtype", "float8_e4m3fn", "--out", tmp_path)
    (row,) = json.loads(cli("bench", "generate", *args, *ARGS, *cache).out)["results"]
    assert row["cache_dtype"] == "float8_e4m3fn"
    assert row["step_ms"] > 0


def test_what_does_not_fit_is_said(cli, sparse_folder, tmp_path, monkeypatch):
    from flashjax.models.opt import memory

    monkeypatch.setattr(memory, "detect_device_bytes", lambda: 1000)
    monkeypatch.setitem(sys.modules, "flashjax.cli.bench_plot", None)
    args = ("--model", sparse_folder, "--sparsity", "0", "--out", tmp_path, "--json")
    result = cli("bench", "generate", *args, *ARGS)
    assert result.code == 0
    assert "matplotlib is not installed" in result.err
    (row, _) = json.loads(result.out)["results"]
    assert "step_ms" not in row


def test_memory_that_runs_out(cli, sparse_folder, tmp_path, monkeypatch):
    import jax

    from flashjax.cli import bench_generate

    def full(*unused, **unused_too):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(bench_generate, "measure", full)
    args = ("--model", sparse_folder, "--sparsity", "0", "--out", tmp_path)
    result = cli("bench", "generate", *args, *ARGS)
    assert result.code == 0
    assert result.out.count("does not fit") == 2


def test_a_folder_that_cannot_be_made(cli, sparse_folder, tmp_path, monkeypatch):
    from flashjax.cli import bench_generate

    monkeypatch.setattr(bench_generate, "read_bandwidth", None)  # not reached
    out = tmp_path / "file"
    out.write_text("text")
    for folder in (out, out / "results"):
        args = ("--model", sparse_folder, *ARGS, "--out", folder)
        message = f"--out: expected a folder that can be written to, got {folder}"
        assert_error(cli("bench", "generate", *args), message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "opt-7b"], "expected a model folder or one of"),
        (["--layers", "13"], "--layers: expected up to 12"),
        (["--prompt", "2000", "--new", "100"], "2048 positions, got 2100"),
    ],
)
def test_bad_options(cli, args, message, tmp_path):
    assert_error(cli("bench", "generate", *args, "--out", tmp_path), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sparsity", "0,x"], "--sparsity: expected numbers"),
        (["--sparsity", "0,2"], "--sparsity: expected 0 to 1, got 2.0"),
        (["--sparsity", "nan"], "--sparsity: expected 0 to 1, got nan"),
        (["--batch", "1,0"], "batch of at least 1, got 0"),
        (["--dtype", "float32"], "float16 or bfloat16, got float32"),
        (["--name", "a/b"], "--name: expected no folder in it (--out), got 'a/b'"),
    ],
)
def test_usage(cli, args, message):
    assert_error(cli("bench", "generate", *args), message, code=2)
