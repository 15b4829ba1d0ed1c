"""``flashjax prune``."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cli_support import assert_error
from flax import nnx
from safetensors.numpy import load_file

from flashjax import checkpoint, prune
from flashjax.checkpoint import CheckpointReader
from flashjax.cli.app import Method
from flashjax.models import opt
from flashjax.models.opt import pruning
from flashjax.models.opt.pruning import partial_run

PRUNED = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_prune(cli, dense_folder, tmp_path, dtype):
    out = tmp_path / "out"
    result = cli("prune", dense_folder, out, "--sparsity", 0.6, "--dtype", dtype)
    assert result.code == 0, result.err
    assert "12 matrices pruned to 60.0% zeros" in result.out
    assert result.err == ""
    half = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    with CheckpointReader(dense_folder) as dense, CheckpointReader(out) as sparse:
        assert dense.names() == sparse.names()
        assert len(sparse.sparse) == 12
        for name in dense.names():
            expected = dense.load(name)
            if name.split(".")[-2] in PRUNED and name.endswith("weight"):
                assert name in sparse.sparse
                expected = prune.magnitude(expected, 0.6)
            loaded = sparse.load(name)
            assert loaded.dtype == half
            assert np.array_equal(loaded, expected.astype(half))
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == dtype
    assert sorted(os.listdir(out)) == sorted(os.listdir(dense_folder))
    model, tokenizer = opt.from_pretrained(out, dtype=dtype)
    assert tokenizer.encode("a").ids[0] == 2
    assert model.layers[0].fc1.kernel[...].sparsity == pytest.approx(0.6, abs=0.001)


CALIBRATED = ("--samples", 4, "--length", 32)


def test_methods_are_those_there_are():
    assert [method.value for method in Method] == list(prune.METHODS)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_methods(cli, dense_folder, tmp_path, method):
    report = tmp_path / "report.json"
    args = ("-s", 0.5, "--method", method, *CALIBRATED, "--report", report)
    result = cli("prune", dense_folder, tmp_path / "out", *args)
    assert result.code == 0, result.err
    assert "12 matrices pruned to 50." in result.out.replace("49.9", "50.")
    assert "calibrated on 4 windows of 32 tokens; error of the outputs" in result.out
    assert "peak memory" in result.out
    content = json.loads(report.read_text())
    assert len(content["matrices"]) == 12
    assert content["options"]["method"] == method
    assert all(0 < m["error"] < 1 for m in content["matrices"])
    assert content["host_peak_bytes"] > 0
    opt.from_pretrained(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "report.json"]


def test_json(cli, dense_folder, tmp_path):
    report = tmp_path / "report.json"
    result = cli("prune", dense_folder, tmp_path / "out", "--json", "--report", report)
    assert (result.code, result.err) == (0, "")
    content = json.loads(result.out)
    assert content == json.loads(report.read_text())
    assert content["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert content["options"]["budget"] == "uniform"


def test_the_report_replaces_no_device(cli, dense_folder, tmp_path):
    report = tmp_path / "report"
    os.mkfifo(report)
    result = cli("prune", dense_folder, tmp_path / "out", "--report", report)
    assert_error(result, f"{report}: expected a file, got a folder, device or pipe")
    assert os.listdir(tmp_path) == ["report"]


def test_the_report_is_not_the_folder(cli, dense_folder, tmp_path):
    out = tmp_path / "out"
    result = cli("prune", dense_folder, out, "-s", 0.5, "--report", out)
    assert_error(result, f"{out}: expected another file than the folder to write")
    assert os.listdir(tmp_path) == []


def test_an_existing_report(cli, dense_folder, tmp_path):
    report, out = tmp_path / "report.json", tmp_path / "out"
    report.write_text("mine")
    args = ("prune", dense_folder, out, "-s", 0.5, "--report", report)
    for options in ([], ["--resume"]):
        result = cli(*args, *options)
        message = "expected a new file, got one that exists (--overwrite replaces it)"
        assert_error(result, f"{report}: {message}")
    assert report.read_text() == "mine"
    assert os.listdir(tmp_path) == ["report.json"]
    assert cli(*args, "--overwrite").code == 0
    assert json.loads(report.read_text())["out"] == str(out)


@pytest.mark.parametrize("existing", [False, True])
def test_a_report_of_a_resumed_run(cli, dense_folder, tmp_path, monkeypatch, existing):
    """One may be there where the folder that it was of is gone."""
    report, out = tmp_path / "report.json", tmp_path / "out"
    args = ("prune", dense_folder, out, "-s", 0.5, "--report", report)
    if existing:
        assert cli(*args).code == 0
        report.rename(tmp_path / "kept")
        shutil.rmtree(out)
    with monkeypatch.context() as patch:
        save = partial_run.write_file

        def interrupt(path, *weights):
            if (out.with_name("out.partial") / "layer-00000.json").exists():
                raise KeyboardInterrupt
            return save(path, *weights)

        patch.setattr(partial_run, "write_file", interrupt)
        assert cli(*args).code == 130
    if existing:
        (tmp_path / "kept").rename(report)
        other = cli(*args, "--method", "wanda", "--resume")
        assert_error(other, f"{report}: expected a new file")
    result = cli(*args, "--resume")
    assert result.code == 0, result.err
    assert json.loads(report.read_text())["resumed_layers"] == 1


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
    ],
)
@pytest.mark.parametrize("folder", ["model", "out"])
def test_a_report_with_a_name_of_a_model_file(
    cli, dense_folder, tmp_path, folder, name, overwrite
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(dense_folder, model)
    out.mkdir()
    before = {path: path.read_bytes() for path in model.iterdir()}
    report = tmp_path / folder / name
    result = cli("prune", model, out, "-s", 0.5, "--report", report, *overwrite)
    message = f"expected another name than that of a model's file, got {report}"
    assert_error(result, f"--report: {message}", code=2)
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert os.listdir(out) == []


def test_kill_and_resume(cli, dense_folder, tmp_path):
    args = [dense_folder, tmp_path / "out", "-s", 0.5, "--method", "sparsegpt"]
    args += ["--activations", "float32", *CALIBRATED]
    script = """
import os, signal
from flashjax.models.opt.pruning import partial_run
write = partial_run.write_file
def kill(path, dense, sparse):
    write(path, dense, sparse)
    if any("layers.1." in name for name in sparse):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, dense, sparse)
partial_run.write_file = kill
from flashjax.cli import main
main()
"""
    command = [sys.executable, "-c", script, "prune", *map(str, args)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert os.listdir(tmp_path) == ["out.partial"]
    again = cli("prune", *args)
    assert_error(again, "unfinished run (1 of 2 layers done)", "by --resume")
    other = cli("prune", *args, "--resume", "--damping", 0.1)
    assert_error(other, "damping was None, is 0.1")
    result = cli("prune", *args, "--resume")
    assert result.code == 0, result.err
    assert "after 1 layers of an earlier run" in result.out
    args[1] = tmp_path / "whole"
    assert cli("prune", *args).code == 0
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_budget_file(cli, dense_folder, tmp_path):
    budget = tmp_path / "budget.json"
    budget.write_text('{"layers.0.fc1": 0.75}')
    out = tmp_path / "out"
    assert cli("prune", dense_folder, out, "--budget", budget, "-s", 0.5).code == 0
    with CheckpointReader(out) as reader:
        assert reader.nnz("model.decoder.layers.0.fc1.weight") == 64 * 128 // 4
        assert reader.nnz("model.decoder.layers.1.fc1.weight") == 64 * 128 // 2


def test_calibration_folder(cli, dense_folder, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "' + "hello " * 50 + '"}')
    args = ("--calibration", tmp_path / "texts", "--method", "wanda", *CALIBRATED)
    args += ("--format", "hf", "--dtype", "bfloat16", "--pattern", "2:4")
    result = cli("prune", dense_folder, tmp_path / "out", *args)
    assert result.code == 0, result.err
    assert "12 matrices pruned to 50.0% zeros" in result.out


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--budget", "nothing.json"], ["nothing.json", "expected a readable file"]),
        (["--report", "no/such/folder.json"], ["in an existing folder"]),
        (["--method", "wanda", "--length", 65], ["64 positions, got 65"]),
        (["--method", "wanda", "--calibration", "nothing"], ["No such file"]),
    ],
)
def test_bad_options(cli, dense_folder, tmp_path, options, messages):
    assert_error(cli("prune", dense_folder, tmp_path / "out", *options), *messages)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--pattern", "5:4"], ["expected a pattern as '2:4'", "'5:4'"]),
        (["--damping", 1], ["damping: the method magnitude has none"]),
        (["--samples", 0], ["calibration samples", "got 0"]),
        (["--length", 0], ["calibration length", "got 0"]),
        (["--seed", -1], ["calibration seed", "got -1"]),
        (["--dtype", "float32"], ["format 'hf' stores it"]),
        (["--calibration", "nothing"], ["--calibration: the method magnitude needs"]),
        (["--activations", "bfloat16"], ["float16 like the weights, or float32"]),
    ],
)
def test_usage(cli, dense_folder, tmp_path, options, messages):
    result = cli("prune", dense_folder, tmp_path / "out", *options)
    assert_error(result, *messages, code=2)
    assert os.listdir(tmp_path) == []


def test_too_little_calibration_text(cli, dense_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    args = ("--method", "wanda", "--calibration", text)
    result = cli("prune", dense_folder, tmp_path / "out", *args)
    assert_error(result, "at least one window of 64 tokens, got 6 tokens")


def test_quiet(cli, dense_folder, tmp_path):
    result = cli("prune", dense_folder, tmp_path / "out", "-s", 0.5, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_prune_a_sparse_folder_further(cli, sparse_folder, tmp_path):
    out = tmp_path / "out"
    assert cli("prune", sparse_folder, out, "-s", 0.9).code == 0
    with CheckpointReader(out) as reader:
        name = "model.decoder.layers.0.fc1.weight"
        assert reader.nnz(name) == round(0.1 * 64 * 128)


def test_shards(dense_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(partial_run, "_MERGED_BYTES", 1)
    pruning.prune_pretrained(dense_folder, tmp_path / "out", sparsity=0.5)
    assert (tmp_path / "out" / checkpoint.INDEX_NAME).exists()
    opt.from_pretrained(tmp_path / "out")


def test_pytorch_folder(cli, dense_folder, tmp_path):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "torch"
    shutil.copytree(dense_folder, folder)
    weights = folder / "model.safetensors"
    state = {name: torch.tensor(a) for name, a in load_file(weights).items()}
    torch.save(state, folder / "pytorch_model.bin")
    weights.unlink()
    assert cli("prune", folder, tmp_path / "a", "-s", 0.5).code == 0
    assert cli("prune", dense_folder, tmp_path / "b", "-s", 0.5).code == 0
    with CheckpointReader(tmp_path / "a") as a, CheckpointReader(tmp_path / "b") as b:
        assert all(np.array_equal(a.load(n), b.load(n)) for n in b.names())


def test_bad_folders(cli, bad_folder, tmp_path):
    folder, message = bad_folder
    before = sorted(os.listdir(tmp_path))
    assert_error(cli("prune", folder, tmp_path / "out", "-s", 0.5), message)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("sparsity", ["nan", "inf", "-0.1", "1.01"])
def test_bad_sparsity(cli, dense_folder, tmp_path, sparsity):
    result = cli("prune", dense_folder, tmp_path / "out", f"--sparsity={sparsity}")
    assert_error(result, "expected sparsity from 0 to 1, got", code=2)
    assert os.listdir(tmp_path) == []


def test_existing_output(cli, dense_folder, tmp_path):
    out = tmp_path / "out"
    assert cli("prune", dense_folder, out, "-s", 0.5).code == 0
    before = (out / "model.safetensors").read_bytes()
    again = cli("prune", dense_folder, out, "-s", 0.9)
    assert_error(again, "expected a new or empty", "(--overwrite replaces it)")
    assert (out / "model.safetensors").read_bytes() == before
    assert cli("prune", dense_folder, out, "-s", 0.9, "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert os.listdir(tmp_path) == ["out"]


def test_output_is_the_input(cli, dense_folder):
    result = cli("prune", dense_folder, dense_folder, "-s", 0.9, "--overwrite")
    assert_error(result, "expected a folder other than the model")
    opt.from_pretrained(dense_folder)


def test_values_out_of_range(cli, dense_folder, tmp_path):
    folder = tmp_path / "large"
    model, _ = opt.from_pretrained(dense_folder, dtype=jnp.float32)
    kernel = model.layers[1].fc2.kernel
    kernel.set_value(kernel[...].at[0, 0].set(1e5))
    opt.save_pretrained(model, None, folder)
    result = cli("prune", folder, tmp_path / "out", "-s", 0.5)
    assert_error(result, "too large for float16", "layers.1.fc2", "bfloat16")
    assert os.listdir(tmp_path) == ["large"]
    args = ("prune", folder, tmp_path / "out", "-s", 0.5, "--dtype", "bfloat16")
    assert cli(*args).code == 0


def test_nan(cli, dense_folder, tmp_path):
    folder = tmp_path / "nan"
    model, _ = opt.from_pretrained(dense_folder, dtype=jnp.float32)
    kernel = model.layers[1].fc2.kernel
    kernel.set_value(kernel[...].at[0, 0].set(np.nan))
    opt.save_pretrained(model, None, folder)
    result = cli("prune", folder, tmp_path / "out", "-s", 0.5)
    assert_error(result, "layers.1.fc2", "without NaN, got 1 NaN")
    assert os.listdir(tmp_path) == ["nan"]


@pytest.mark.parametrize("existing", [False, True])
def test_disk_full(cli, dense_folder, sparse_folder, tmp_path, monkeypatch, existing):
    out = tmp_path / "out"
    if existing:
        shutil.copytree(sparse_folder, out)
    before = sorted(os.listdir(tmp_path))

    def full(*unused, **unused_too):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.writer, "save_file", full)
    result = cli("prune", dense_folder, out, "-s", 0.5, "--overwrite")
    assert_error(result, "not saved", "No space left on device", "bytes free")
    assert sorted(os.listdir(tmp_path)) == before
    if existing:
        opt.from_pretrained(out)


def test_file_too_large_for_the_system(dense_folder, tmp_path):
    # 20 kB, less than the model's file takes.
    code = 'ulimit -f 20; exec "$@"'
    args = ["prune", dense_folder, tmp_path / "out", "-s", "0.5"]
    command = ["bash", "-c", code, "bash", sys.executable, "-m", "flashjax.cli", *args]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "not saved, nothing was left behind: File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_interrupted(cli, dense_folder, tmp_path, monkeypatch):
    def interrupt(*unused, **unused_too):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.writer, "save_file", interrupt)
    result = cli("prune", dense_folder, tmp_path / "out", "-s", 0.5)
    assert result.code == 130
    assert os.listdir(tmp_path) == []


def test_interrupted_after_a_layer(cli, dense_folder, tmp_path, monkeypatch):
    save, saved = checkpoint.writer.save_file, []

    def interrupt(*args, **kwargs):
        if saved:
            raise KeyboardInterrupt
        saved.append(args)
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoint.writer, "save_file", interrupt)
    result = cli("prune", dense_folder, tmp_path / "out", "-s", 0.5)
    kept, last = result.err.splitlines()
    assert f"are kept in {tmp_path / 'out.partial'}; --resume goes on" in kept
    assert (result.code, last) == (130, "flashjax: interrupted")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_signals_leave_nothing(dense_folder, tmp_path, number, code):
    # A method that stops in the middle of the work until the signal comes.
    # What runs at an orderly exit is left out: XLA's threads may not live through it.
    script = """
import atexit, os, signal, sys, time
from flashjax import prune
atexit.register(os.abort)
# A shell's background jobs, and so these tests in one, ignore the interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait(array, sparsity, pattern):
    print("here", flush=True)
    time.sleep(60)
prune.METHODS["magnitude"] = prune.Method(wait, False)
from flashjax.cli import entry_point
entry_point()
"""
    command = [sys.executable, "-c", script, "prune", dense_folder, tmp_path / "out"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "here\n"
        assert os.listdir(tmp_path) == ["out.partial"]
        time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_memory_stays_near_one_layer(tmp_path, config, monkeypatch):
    import dataclasses

    monkeypatch.setattr(partial_run, "_MERGED_BYTES", 1)
    config = dataclasses.replace(
        config, hidden_size=256, ffn_size=1024, num_layers=12, num_heads=4
    )
    model = opt.OPT(config, rngs=nnx.Rngs(0))
    opt.save_pretrained(model, None, tmp_path / "dense")
    layer_bytes = 4 * 12 * 256 * 256
    tracemalloc.start()
    try:
        pruning.prune_pretrained(tmp_path / "dense", tmp_path / "out", sparsity=0.5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * layer_bytes  # of 12 that the model has
