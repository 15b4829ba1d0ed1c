"""Folders whose contents do not fit, and what the errors say."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from opt_folders import DATA, EMBED, FC1, edit_config, edited, leaves

from flashjax.checkpoint import CheckpointError
from flashjax.models import opt


def test_all_tensors_that_do_not_fit_are_named(folder):
    with edited(folder) as tensors:
        del tensors["model.decoder.layers.1.fc2.bias"]
        del tensors["model.decoder.embed_positions.weight"]
        tensors["model.decoder.layers.7.fc2.bias"] = np.ones(3, np.float16)
        tensors[FC1] = np.ones((3, 4), np.float16)
        tensors[EMBED] = np.ones((48, 16), np.int32)
    with pytest.raises(CheckpointError) as error:
        opt.from_pretrained(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "2 missing: model.decoder.embed_positions.weight, model.decoder" in message
    assert "1 unexpected: model.decoder.layers.7.fc2.bias" in message
    assert "fc1.weight expected shape (24, 16), got (3, 4)" in message
    assert "embed_tokens.weight expected a floating dtype, got int32" in message


def test_many_tensors_are_not_all_listed(folder):
    edit_config(folder, num_hidden_layers=40)
    with pytest.raises(CheckpointError, match=r"608 missing: .*, and 600 more$"):
        opt.from_pretrained(folder)


def test_far_too_many_layers(folder):
    edit_config(folder, num_hidden_layers=10**12)
    with pytest.raises(CheckpointError, match=r"tensors of 1000000000000 layers.*got"):
        opt.from_pretrained(folder)


def test_two_names_of_one_weight(folder):
    with edited(folder) as tensors:
        tensors[FC1.removeprefix("model.")] = tensors[FC1]
    with pytest.raises(CheckpointError, match="are the same weight"):
        opt.from_pretrained(folder)


def test_values_too_large_for_float16(folder):
    with edited(folder) as tensors:
        large = tensors[FC1].astype(np.float32)
        large[0, 0], large[0, 1] = 1e5, np.inf
        tensors[FC1] = large
    with pytest.raises(CheckpointError, match=rf"too large for float16 in {FC1}"):
        opt.from_pretrained(folder)
    model, _ = opt.from_pretrained(folder, dtype=jnp.bfloat16)
    assert np.isinf(model.layers[0].fc1.kernel[1, 0])


def test_infinite_values_load(folder):
    with edited(folder) as tensors:
        special = tensors[FC1].astype(np.float32)
        special[0, :3] = np.inf, -np.inf, np.nan
        tensors[FC1] = special
    for sparse in (False, True):
        found = leaves(opt.from_pretrained(folder, sparse=sparse)[0])
        kernel = found["layers.0.fc1.kernel"]
        np.testing.assert_array_equal(kernel[:3, 0], special[0, :3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'opt', got 'gpt2'"),
        ({"hidden_size": -1}, "hidden_size must be a positive integer, got -1"),
        ({"hidden_size": 20}, r"expected shape \(20,"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"enable_bias": False}, "unexpected"),
        ({"do_layer_norm_before": False}, "2 unexpected: model.decoder.final_layer"),
        ({"tie_word_embeddings": False}, "1 missing: lm_head.weight"),
    ],
)
def test_config_that_does_not_fit(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        opt.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opt.from_pretrained(folder)


def test_missing_shard(tmp_path):
    folder = Path(shutil.copytree(DATA / "no_bias", tmp_path / "model"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        opt.from_pretrained(folder)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="expected a model folder with a config"):
        opt.from_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="expected a model folder, got a file"):
        opt.from_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="expected a model folder, got nothing"):
        opt.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="expected a model folder, got nothing"):
        opt.from_pretrained("./nowhere")
    with pytest.raises(CheckpointError, match="on the hub, got an empty string"):
        opt.from_pretrained("")
    with pytest.raises(TypeError, match="its name on the hub, got NoneType"):
        opt.from_pretrained(None)
    shutil.copyfile(DATA / "pre_norm/config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        opt.from_pretrained(tmp_path)
