import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from flashjax.checkpoint import CheckpointError
from flashjax.models.opt import OPT, OPTConfig

# Parameters of the published models, as PyTorch counts them (tied embeddings once).
SIZES = {
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1_3b": 1_315_758_080,
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "opt_30b": 29_974_540_288,
    "opt_66b": 65_719_701_504,
    "opt_175b": 174_604_468_224,
}


def count_parameters(config):
    model = nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in leaves)


@pytest.mark.parametrize("name", SIZES)
def test_published_size(name):
    config = getattr(OPTConfig, name)()
    # Every layer has the same parameters: two sizes give the slope, and fast.
    one, two = (
        count_parameters(dataclasses.replace(config, num_layers=n)) for n in (1, 2)
    )
    assert one + (config.num_layers - 1) * (two - one) == SIZES[name]
    assert config.head_dim == {"opt_2_7b": 80}.get(name, config.head_dim)
    assert config.has_projections == (name == "opt_350m")
    assert config.has_final_layer_norm == (name != "opt_350m")


@pytest.mark.parametrize("name", SIZES)
def test_hf_round_trip(name):
    config = getattr(OPTConfig, name)()
    assert OPTConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_hf_round_trip_of_every_field(tmp_path):
    config = OPTConfig(
        vocab_size=11,
        hidden_size=12,
        num_layers=3,
        ffn_size=14,
        num_heads=2,
        max_positions=15,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        remove_final_layer_norm=True,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        activation="gelu",
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=(3, 4),
        init_std=0.5,
    )
    defaults = OPTConfig()
    assert not any(
        getattr(config, f.name) == getattr(defaults, f.name)
        for f in dataclasses.fields(config)
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert OPTConfig.from_hf(tmp_path) == config
    assert OPTConfig.from_hf(str(tmp_path)) == config
    assert hash(config) == hash(OPTConfig.from_hf(tmp_path))


def test_from_hf_takes_published_config():
    # facebook/opt-350m's config.json, less what it says about training.
    hf = {
        "_remove_final_layer_norm": False,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "bos_token_id": 2,
        "do_layer_norm_before": False,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    }
    assert OPTConfig.from_hf(hf) == OPTConfig.opt_350m()


def test_projection_size_defaults_to_hidden_size():
    assert OPTConfig(hidden_size=24, num_heads=2).word_embed_proj_dim == 24
    hf = OPTConfig(hidden_size=24, num_heads=2).to_hf() | {"word_embed_proj_dim": None}
    assert OPTConfig.from_hf(hf).word_embed_proj_dim == 24


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", "50272"),
        ("hidden_size", 768.0),
        ("num_layers", -1),
        ("ffn_size", True),
        ("num_heads", None),
        ("max_positions", 0),
        ("word_embed_proj_dim", -3),
        ("do_layer_norm_before", 1),
        ("enable_bias", "true"),
        ("activation", "swiglu"),
        ("activation", ["relu"]),
        ("tie_word_embeddings", None),
        ("pad_token_id", 1.5),
        ("bos_token_id", (1,)),
        ("eos_token_id", "2"),
        ("eos_token_id", (2, "3")),
        ("init_std", -0.1),
        ("init_std", float("nan")),
        ("init_std", 10**400),
    ],
)
def test_wrong_value_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be") as error:
        OPTConfig(**{field: value})
    shown = value if field != "activation" else str(value)
    assert str(shown) in str(error.value)


def test_all_wrong_values_are_reported_together():
    with pytest.raises(ValueError, match=r"vocab_size.*num_layers.*activation"):
        OPTConfig(vocab_size=0, num_layers=0, activation="?")


def test_heads_must_divide_hidden_size():
    with pytest.raises(ValueError, match=r"hidden_size=32, num_heads=5"):
        OPTConfig(hidden_size=32, num_heads=5)


def test_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected .* config\.json, found none"):
        OPTConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected object, got array"),
        ("{}", "model_type 'opt', got None"),
        ('{"model_type": "llama"}', "model_type 'opt', got 'llama'"),
        ('{"model_type": "opt", "vocab_size": -1}', "vocab_size must be"),
        ('{"model_type": "opt", "ffn_dim": 0}', "ffn_dim must be"),
        (
            '{"model_type": "opt", "num_attention_heads": 5}',
            "multiple of num_attention_heads, .*, num_attention_heads=5",
        ),
    ],
)
def test_wrong_config_file(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        OPTConfig.from_hf(tmp_path)
    assert "config.json" in str(error.value)
