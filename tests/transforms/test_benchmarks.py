"""The benchmarks of transformations run, and their programs agree."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module


@pytest.fixture
def scan_layers(load):
    return load("scan_layers")


def test_steps_agree(scan_layers):
    config, layers = scan_layers.MODELS["tiny"], 3
    weights = scan_layers.one_layer(config, 0.7)
    results = {}
    for name in scan_layers.STEPS_BY_NAME:
        arguments = scan_layers.operands(name, config, layers, weights, 2, 8)
        x, start, cache, made = arguments
        x = x * np.linspace(-1, 1, x.size, dtype=np.float16).reshape(x.shape)
        compiled, _ = scan_layers.compile_step(name, config, arguments)
        y, cache = compiled(x, start, cache, made)
        if name == "unrolled":
            cache = jax.tree.map(lambda *leaves: np.stack(leaves), *cache)
        results[name] = [np.asarray(leaf, np.float32) for leaf in (y, *cache)]
        moves = scan_layers.packed_moves(compiled)
        assert (moves > 0) == (name == "sliced")
    expected = results.pop("unrolled")
    assert np.abs(expected[1][:, :, :, 4]).max() > 0
    for got in results.values():
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=0.02, rtol=0.02)


def test_scan_layers_writes_its_results(scan_layers, tmp_path, monkeypatch):
    monkeypatch.setattr(scan_layers, "REPETITIONS", 1)
    monkeypatch.setattr(scan_layers, "STEPS", 2)
    cached = jax.config.jax_enable_compilation_cache
    try:
        scan_layers.main("tiny", 2, "0.8", 2, 8, 3, str(tmp_path / "scan"))
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    (path,) = tmp_path.glob("scan-*.json")
    results = json.loads(path.read_text())["results"]
    assert [r["step"] for r in results] == list(scan_layers.STEPS_BY_NAME)
    assert all(r["step_ms"] > 0 and r["compile_s"] > 0 for r in results)


def test_gradients_agree(load):
    gradient = load("gradient")
    w = gradient.random_sparse_matrix(jax.random.key(0), (48, 32), 0.6)
    dense, both = w.to_dense(), w.with_transpose()
    rng = np.random.default_rng(0)
    dy = jnp.asarray(rng.standard_normal((4, 32)), jnp.float16)
    x = jnp.asarray(rng.standard_normal((4, 48)), jnp.float16)
    bias = jnp.asarray(rng.standard_normal(32), jnp.float16)
    for operand, transform in ((dy, gradient.gradient), (x, gradient.value_and_grad)):
        expected = transform(gradient.dense)(operand, dense, bias)
        for matrix in (w, both):
            got = transform(gradient.sparse)(operand, matrix, bias)
            for a, b in zip(
                jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_allclose(a, b, atol=0.05, rtol=0.02)


def test_gradient_writes_its_results(load, tmp_path, monkeypatch):
    gradient = load("gradient")
    monkeypatch.setattr(gradient.fj, "cuda_unavailable_reason", lambda: "")
    monkeypatch.setattr(gradient.device_time, "microseconds", time_once)
    monkeypatch.setattr(gradient, "SHAPES", {"small": (32, 48)})
    monkeypatch.setattr(gradient, "cold_copies", lambda w, nbytes: [w, w])
    gradient.main("small", "0.8", "1,3", str(tmp_path / "gradient"))
    (path,) = tmp_path.glob("gradient-*.json")
    results = json.loads(path.read_text())["results"]
    assert [r["rows"] for r in results] == [1, 3]
    assert all(r["speedup"] == 1 for r in results)


def time_once(program, *operands):
    jax.block_until_ready(program(*operands))
    return 2.0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_trainable_step_writes_its_results(load, tmp_path, dtype):
    trainable_step = load("trainable_step")
    options = {"size": 64, "rows": 8, "turns": 1, "dtype": dtype}
    trainable_step.main(name=str(tmp_path / "trainable"), **options)
    (path,) = tmp_path.glob("trainable-*.json")
    results = json.loads(path.read_text())["results"]
    assert [r["weights"] for r in results] == ["sparse", "dense", "dense, masked"]
    assert results[0]["adam_bytes"] < results[1]["adam_bytes"]
