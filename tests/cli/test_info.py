"""``flashjax info``."""

import dataclasses
import json
import os
import shutil

import jax
import pytest
from cli_support import assert_error, run_process
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import flashjax as fj
from flashjax import tuned_rows


def test_system(cli):
    result = cli("info")
    assert (result.code, result.err) == (0, "")
    assert fj.__version__ in result.out
    assert jax.__version__ in result.out
    assert "kernel cpu" in result.out
    reason = fj.cuda_unavailable_reason()
    assert (f"no: {reason}" if reason else "cuda available  yes") in result.out


def test_system_json(cli):
    system = json.loads(cli("info", "--json").out)
    assert system["cuda"]["available"] == fj.cuda_available()
    assert len(system["devices"]) == len(jax.devices())
    assert set(system["implementations"]) == {"cpu", "cuda", "xla"}


def test_system_without_a_backend(cli):
    assert describe_backend(cli("info").out) == "cpu"
    result = run_process("info", env=os.environ | {"JAX_PLATFORMS": "nothing"})
    assert (result.returncode, result.stderr) == (0, "")
    row = describe_backend(result.stdout)
    assert row.startswith("none: RuntimeError: ")
    assert "nothing" in row
    assert "cannot run: JAX has no backend" in result.stdout


@pytest.mark.skipif(fj.cuda_available(), reason="there is a GPU")
def test_system_without_the_gpu_that_was_named():
    """JAX raises an AssertionError then."""
    result = run_process("info", env=os.environ | {"JAX_PLATFORMS": "cuda"})
    assert result.returncode == 0, result.stderr
    assert describe_backend(result.stdout).startswith("none: ")


def test_what_was_tuned(cli, tmp_path, monkeypatch):
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("FLASHJAX_TUNING", str(path))
    kind = tuned_rows.device_kind(jax.default_backend())
    for count, words in ((1, "1 matrix"), (2, "2 matrices")):
        entry = tuned_rows.describe((count, 8), "float16", "lscd16/1", 0.3)
        old = dataclasses.replace(entry, flashjax="0.0.1")
        tuned_rows.add(kind, [entry, old])
        out = cli("info").out
        assert f"{words}: " in " ".join(out.split())
    path.write_text("{")
    tuned_rows.forget()
    for _ in range(2):
        assert "expected what flashjax.autotune writes" in cli("info", "--json").out
    tuned_rows.forget()


def describe_backend(out):
    lines = [li for li in out.splitlines() if li.startswith("jax backend")]
    return lines[0].removeprefix("jax backend").strip()


def test_folder(cli, sparse_folder):
    result = cli("info", sparse_folder)
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    layers = [row for row in rows if row[:1] == ["layer"]]
    assert [row[1:5] for row in layers] == [
        ["0", "6", "sparse", "70.0%"],
        ["1", "6", "sparse", "70.0%"],
    ]
    assert rows[-1][:4] == ["total", "12", "sparse", "70.0%"]


@pytest.mark.parametrize("which", ["sparse_folder", "dense_folder"])
def test_folder_json(cli, which, request):
    folder = request.getfixturevalue(which)
    content = json.loads(cli("info", folder, "--json").out)
    tensors = load_file(folder / "model.safetensors")
    stored = sum(array.nbytes for array in tensors.values())
    total = content["total"]
    assert total["stored_bytes"] == stored
    assert total["stored_bytes"] == sum(t["stored_bytes"] for t in content["tensors"])
    sparse = which == "sparse_folder"
    assert total["sparsity"] == pytest.approx(0.7 if sparse else 0, abs=1e-3)
    assert total["stored_sparse"] == (12 if sparse else 0)
    assert (total["dense_bytes"] == stored) != sparse
    assert list(content["groups"]) == ["layer 0", "layer 1", "other tensors"]
    assert content["model_type"] == "opt"


def test_what_is_packed_when_it_is_loaded(cli, dense_folder, sparse_folder, tmp_path):
    folder = tmp_path / "zeros"
    prune = ("prune", dense_folder, folder, "-s", 0.7, "--format", "hf")
    assert cli(*prune).code == 0
    said = "12 matrices are stored dense and have at least 50% zeros: loaded in half"
    assert said in cli("info", folder).out
    for other in (dense_folder, sparse_folder):
        assert "packed" not in cli("info", other).out


def test_every_tensor(cli, sparse_folder):
    result = cli("info", sparse_folder, "--tensors")
    assert "model.decoder.layers.1.self_attn.k_proj.weight" in result.out
    assert "sparse float16" in result.out


def test_foreign_model(cli, dense_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dense_folder, folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    result = cli("info", folder)
    assert "model type llama" in result.out
    (folder / "config.json").unlink()
    assert "model type unknown" in cli("info", folder).out


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "truncated"])
def test_bad_folders(cli, dense_folder, tmp_path, kind):
    folder = tmp_path / "bad"
    if kind == "file":
        folder.write_text("hello")
    elif kind == "empty":
        folder.mkdir()
    elif kind == "truncated":
        shutil.copytree(dense_folder, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    assert_error(cli("info", folder), str(folder), "expected")


def test_prediction(cli):
    args = ("info", "--config", "opt-175b", "-s", 0.8, "-b", 8, "--length", 128)
    result = cli(*args)
    assert (result.code, result.err) == (0, "")
    assert "give --memory" in result.out
    assert "fits, but JAX takes only 75%" in cli(*args, "--memory", 120).out
    assert "does not fit" in cli(*args, "--memory", 80).out
    assert cli(*args, "--memory", 200).out.endswith("\nfits\n")
    assert "on each device" in cli(*args, "--devices", 2).out
    found = json.loads(cli(*args, "--memory", 150, "--json").out)
    assert found["fits"]
    assert found["weights"] == found["linear_weights"] + found["other_weights"]
    cache = ("--cache-dtype", "float8_e4m3fn")
    half = json.loads(cli(*args, "--memory", 150, "--json", *cache).out)
    assert half["kv_cache"] < 0.51 * found["kv_cache"]


def test_prediction_of_a_folder(cli, sparse_folder):
    found = json.loads(cli("info", "--config", sparse_folder, "--json").out)
    assert found["length"] == 64
    assert found["fits"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "opt-7b"], "expected a model folder or one of opt-125m"),
        (["--config", "opt-125m", "--length", "3000"], "2048 positions, got 3000"),
    ],
)
def test_bad_predictions(cli, args, message):
    assert_error(cli("info", *args), message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory", "0"], "more than 0 GB"),
        (["--dtype", "float32", "-s", "0.5"], "float16 or bfloat16, got float32"),
        (["folder"], "no folder or --tensors"),
    ],
)
def test_usage_of_predictions(cli, args, message):
    result = cli("info", "--config", "opt-125m", *args)
    assert_error(result, message, code=2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model", "-s", "0"], "--sparsity: expected --config beside it"),
        (["--cache-dtype", "float8_e4m3fn"], "--cache-dtype: expected --config"),
        (["--memory", "80"], "--memory: expected --config beside it"),
        (["--tensors"], "--tensors: expected a folder beside it"),
    ],
)
def test_options_without_effect(cli, args, message):
    assert_error(cli("info", *args), message, code=2)


def test_header_that_lies_about_the_values(cli, sparse_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sparse_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.decoder.layers.0.fc1.weight"
    tensors[f"{name}.values"] = tensors[f"{name}.values"][:-3]
    with safe_open(folder / "model.safetensors", framework="np") as file:
        metadata = file.metadata()
    save_file(tensors, folder / "model.safetensors", metadata)
    assert_error(cli("info", folder), name, "bits set in the bitmap")
