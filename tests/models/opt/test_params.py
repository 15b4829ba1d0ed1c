"""Loading and saving models in the Hugging Face layout."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from opt_folders import (
    DATA,
    EMBED,
    FC1,
    LM_HEAD,
    TOKENS,
    assert_same,
    edited,
    leaves,
    prune,
    sparse_layers,
    write_pickles,
)
from safetensors.numpy import load_file

from flashjax.checkpoint import CheckpointError, CheckpointReader
from flashjax.models import opt
from flashjax.models.opt import OPT, OPTConfig
from flashjax.models.opt.tokenizer import load_tokenizer
from flashjax.nn import SparseDense

VARIANTS = sorted(path.parent.name for path in DATA.glob("*/config.json"))


# Loading.


def test_parameters_are_the_stored_ones():
    model, tokenizer = opt.from_pretrained(DATA / "pre_norm", dtype=jnp.float16)
    stored = load_file(DATA / "pre_norm/model.safetensors")
    layer = model.layers[0]
    np.testing.assert_array_equal(layer.fc1.kernel[...], stored[FC1].T)
    np.testing.assert_array_equal(model.embed_tokens.embedding[...], stored[EMBED])
    assert tokenizer is None
    assert model.dtype == jnp.float16
    # Of each layer q, k and v are one weight and one bias.
    assert len(leaves(model)) == len(stored) - 2 * 2 * 2
    apart, _ = opt.from_pretrained(DATA / "pre_norm", fuse_qkv=False)
    assert len(leaves(apart)) == len(stored)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dtype(dtype):
    model, _ = opt.from_pretrained(DATA / "pre_norm", dtype=dtype, sparse=False)
    stored = load_file(DATA / "pre_norm/model.safetensors")
    kernel = model.layers[0].fc1.kernel[...]
    assert kernel.dtype == dtype
    np.testing.assert_array_equal(kernel, stored[FC1].T.astype(dtype))


def test_default_dtype_is_float16():
    model, _ = opt.from_pretrained(str(DATA / "pre_norm"))
    assert model.dtype == jnp.float16


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: name.removeprefix("model.decoder."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.model.{name}",
    ],
)
def test_names_of_other_classes(folder, rename):
    with edited(folder) as tensors:
        renamed = {rename(name): array for name, array in tensors.items()}
        tensors.clear()
        tensors.update(renamed)
    expected, _ = opt.from_pretrained(DATA / "pre_norm")
    assert_same(opt.from_pretrained(folder)[0], expected)


def test_tied_output_layer_may_be_stored_twice(folder):
    with edited(folder) as tensors:
        tensors[LM_HEAD] = tensors[EMBED].copy()
        tensors["model.decoder.version"] = np.ones(1, np.float32)
    model, _ = opt.from_pretrained(folder)
    assert model.lm_head is None
    assert_same(model, opt.from_pretrained(DATA / "pre_norm")[0])


def test_tied_output_layer_may_be_the_only_one(folder):
    with edited(folder) as tensors:
        tensors[LM_HEAD] = tensors.pop(EMBED)
    assert_same(
        opt.from_pretrained(folder)[0], opt.from_pretrained(DATA / "pre_norm")[0]
    )


def test_output_layer_that_differs_is_not_tied(folder, caplog):
    with edited(folder) as tensors:
        head = tensors[LM_HEAD] = tensors[EMBED] + np.float16(1)
    with caplog.at_level(logging.WARNING):
        model, _ = opt.from_pretrained(folder)
    assert "lm_head.weight differ" in caplog.text
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.lm_head.kernel[...], head.T)


def test_tokenizer_is_loaded(folder):
    shutil.copytree(DATA / "tokenizer", folder, dirs_exist_ok=True)
    _, tokenizer = opt.from_pretrained(folder)
    assert tokenizer.encode("the cat").ids[0] == 2


# Sparse layers.


def test_sizes_that_a_configuration_lacks_are_named(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["num_hidden_layers"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"missing: .*: num_hidden_layers 12$"):
        opt.from_pretrained(folder)


def test_pickles_that_git_lfs_did_not_download(folder):
    (folder / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "pytorch_model.bin").write_text(pointer)
    with pytest.raises(CheckpointError, match="got a Git LFS pointer"):
        opt.from_pretrained(folder)


def test_auto_packs_layers_that_are_half_zeros(folder):
    prune(folder, 0.8)
    with edited(folder) as tensors:
        tensors[FC1][...] = 1
        tensors[FC1][::2] = -0.0  # exactly half, and zeros of the other sign
        tensors[FC1.replace("fc1", "fc2")][...] = 1
    model, _ = opt.from_pretrained(folder)
    assert len(sparse_layers(model)) == 2 * 4 - 1
    layer = model.layers[0]
    assert isinstance(layer.fc1, SparseDense)
    assert isinstance(layer.fc2, nnx.Linear)
    bias = load_file(folder / "model.safetensors")[FC1.replace("weight", "bias")]
    np.testing.assert_array_equal(layer.fc1.bias[...], bias)
    dense, _ = opt.from_pretrained(folder, sparse=False)
    assert not sparse_layers(dense)
    expected = dense(TOKENS)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(model(TOKENS), expected, atol=0.01 * scale)


def test_sparse_argument(folder):
    assert not sparse_layers(opt.from_pretrained(folder)[0])
    assert len(sparse_layers(opt.from_pretrained(folder, sparse=True)[0])) == 2 * 4
    apart, _ = opt.from_pretrained(folder, sparse=True, fuse_qkv=False)
    assert len(sparse_layers(apart)) == 2 * 6
    prune(folder)
    assert not sparse_layers(opt.from_pretrained(folder, sparse=False)[0])
    assert not sparse_layers(opt.from_pretrained(folder, dtype=jnp.float32)[0])


def test_sparse_without_bias():
    model, _ = opt.from_pretrained(DATA / "no_bias", sparse=True)
    dense, _ = opt.from_pretrained(DATA / "no_bias")
    assert model.layers[0].fc1.bias is None
    expected = dense(TOKENS)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(model(TOKENS), expected, atol=0.01 * scale)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dtype": jnp.int32}, "dtype must be float32, float16 or bfloat16"),
        ({"dtype": "half a float"}, "got 'half a float'"),
        ({"sparse": "yes"}, "'auto', True or False, got 'yes'"),
        ({"sparse": 1}, "'auto', True or False, got 1"),
        ({"sparse": True, "dtype": jnp.float32}, "got float32"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        opt.from_pretrained(DATA / "pre_norm", **kwargs)


# Saving.


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_round_trip(name, tmp_path):
    model, _ = opt.from_pretrained(DATA / name)
    opt.save_pretrained(model, None, tmp_path / "out")
    loaded, tokenizer = opt.from_pretrained(tmp_path / "out")
    assert tokenizer is None
    assert loaded.config == model.config == OPTConfig.from_hf(DATA / name)
    assert_same(loaded, model)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_of_other_dtypes(dtype, tmp_path):
    model, _ = opt.from_pretrained(DATA / "pre_norm", dtype=dtype)
    opt.save_pretrained(model, None, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == jnp.dtype(dtype).name
    assert_same(opt.from_pretrained(tmp_path / "out", dtype=dtype)[0], model)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 2000])
def test_sparse_round_trip(folder, tmp_path, dtype, shard_bytes):
    prune(folder)
    model, _ = opt.from_pretrained(folder, dtype=dtype)
    out = tmp_path / "out"
    opt.save_pretrained(model, None, out, shard_bytes=shard_bytes)
    assert (out / "model.safetensors").exists() == (shard_bytes > 2000)
    with CheckpointReader(out) as reader:
        assert len(reader.sparse) == 12
        assert reader.sparse[FC1].shape == (24, 16)
    loaded, _ = opt.from_pretrained(out, dtype=dtype)
    assert sparse_layers(loaded) == sparse_layers(model)
    assert_same(loaded, model)


def test_sparse_folder_as_dense_model(folder, tmp_path):
    prune(folder)
    opt.save_pretrained(opt.from_pretrained(folder)[0], None, tmp_path / "out")
    for kwargs in ({"sparse": False}, {"dtype": jnp.float32}):
        model, _ = opt.from_pretrained(tmp_path / "out", **kwargs)
        assert not sparse_layers(model)
        assert_same(model, opt.from_pretrained(folder, **kwargs)[0])


def test_stored_sparse_layer_stays_sparse_whatever_its_sparsity(tmp_path):
    model, _ = opt.from_pretrained(DATA / "no_bias", sparse=True)
    opt.save_pretrained(model, None, tmp_path / "out")
    loaded, _ = opt.from_pretrained(tmp_path / "out")
    assert len(sparse_layers(loaded)) == 2 * 4
    apart, _ = opt.from_pretrained(tmp_path / "out", fuse_qkv=False)
    assert len(sparse_layers(apart)) == 2 * 6


def test_transformers_loads_a_saved_model(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install torch transformers")
    transformers = pytest.importorskip("transformers")
    for name in ("post_norm_projected", "no_final_norm_untied"):
        model, _ = opt.from_pretrained(DATA / name, dtype=jnp.float32)
        tokenizer = load_tokenizer(DATA / "tokenizer")
        opt.save_pretrained(model, tokenizer, tmp_path / name)
        theirs, report = transformers.OPTForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        with torch.no_grad():
            logits = theirs(torch.from_numpy(TOKENS).long()).logits
        np.testing.assert_allclose(model(TOKENS), logits, atol=1e-4)
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded("the cat").input_ids == tokenizer.encode("the cat").ids
        assert loaded.eos_token == "</s>"


def test_existing_folder_is_kept(folder, tmp_path):
    model, _ = opt.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        opt.save_pretrained(model, None, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    opt.save_pretrained(model, None, folder, overwrite=True)
    assert_same(opt.from_pretrained(folder)[0], model)


def test_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model, _ = opt.from_pretrained(DATA / "pre_norm")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flashjax.checkpoint.writer.save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        opt.save_pretrained(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_full_disk_while_saving(tmp_path):
    """Files of this process may not grow beyond a limit, wherever it is hit."""
    resource = pytest.importorskip("resource", reason="needs Unix")

    model, _ = opt.from_pretrained(DATA / "pre_norm")
    tokenizer = load_tokenizer(DATA / "tokenizer")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100, 2000, 10_000):  # config.json, tokenizer.json, weights
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(CheckpointError, match=r"out: not saved, nothing was"):
                opt.save_pretrained(model, tokenizer, tmp_path / "out")
            assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        (nnx.Dict(), None, "expected an OPT as the model, got Dict"),
        (None, "gpt2", r"expected a tokenizers\.Tokenizer or None, got builtins\.str"),
    ],
)
def test_wrong_things_to_save(tmp_path, model, tokenizer, message):
    if model is None:
        model, _ = opt.from_pretrained(DATA / "pre_norm")
    with pytest.raises(TypeError, match=message):
        opt.save_pretrained(model, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# The hub.


def test_hub_name_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no local folder"):
        opt.from_pretrained("nobody/nothing")


def test_a_name_that_may_be_mistyped_is_named_before_the_hub_is_asked(
    monkeypatch, caplog
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'opt-1\.3b-06' is no local folder"):
        opt.from_pretrained("opt-1.3b-06")
    assert caplog.messages == [
        "opt-1.3b-06 is no folder here; asking the Hugging Face hub for it"
    ]


@pytest.mark.parametrize("safetensors", [True, False])
def test_hub_download(monkeypatch, folder, safetensors):
    if not safetensors:
        write_pickles(folder, 1)
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns[-1]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model, _ = opt.from_pretrained("facebook/opt-125m", revision="main")
    assert model.config.hidden_size == 16
    first = ("facebook/opt-125m", "main", "*.safetensors")
    second = ("facebook/opt-125m", "main", "pytorch_model*.bin")
    assert calls == ([first] if safetensors else [first, second])


# Memory.


def save_ones(folder, num_layers):
    config = OPTConfig(
        vocab_size=1000, hidden_size=768, num_layers=num_layers, max_positions=64
    )
    model = nnx.eval_shape(lambda: OPT(config, dtype=jnp.float16, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state)
    opt.save_pretrained(nnx.merge(graph, ones), None, folder)
    return 12 * config.hidden_size**2 * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_peak_memory_is_near_what_is_loaded(tmp_path):
    """Loads 115 MB in a process of its own; two copies would take 230 MB."""
    save_ones(tmp_path / "small", 1)
    layer_bytes = save_ones(tmp_path / "large", 8)
    script = """
        import sys
        import jax, jax.numpy as jnp
        from flax import nnx
        from flashjax.models import opt

        def status(key):
            with open("/proc/self/status") as file:
                return next(int(l.split()[1]) << 10 for l in file if l.startswith(key))

        # Compiled code is no part of the measure: another model goes first.
        opt.from_pretrained(sys.argv[1])
        before = status("VmRSS")
        model, _ = opt.from_pretrained(sys.argv[2], sparse=False)
        loaded = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
        print(loaded, status("VmHWM") - before)
    """
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(script),
            str(tmp_path / "small"),
            str(tmp_path / "large"),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    loaded, peak = map(int, out.split())
    assert loaded > 8 * layer_bytes
    assert peak < loaded + 2 * layer_bytes


def test_progress(folder):
    calls = []
    opt.from_pretrained(folder, progress=lambda *call: calls.append(call))
    done, totals = zip(*calls, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[-1] == totals[0] > 0


@pytest.mark.parametrize("fuse_qkv", [True, False])
def test_loaded_model_has_the_structure_of_a_new_one(fuse_qkv):
    config = OPTConfig.from_hf(DATA / "pre_norm")
    loaded, _ = opt.from_pretrained(
        DATA / "pre_norm", dtype=jnp.float32, fuse_qkv=fuse_qkv
    )
    fresh = OPT(config, fuse_qkv=fuse_qkv, rngs=nnx.Rngs(0))
    assert nnx.graphdef(fresh) == nnx.graphdef(loaded)
