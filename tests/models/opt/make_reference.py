"""Writes data/: tiny OPT checkpoints of every variant and what PyTorch computes.

Needs torch and transformers, which the tests do not:

    python tests/models/opt/make_reference.py
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers.activations import ACT2FN

DATA = Path(__file__).parent / "data"
VOCAB = 48
LENGTH = 7
NEW_TOKENS = 12

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 16,
}
VARIANTS = {
    "pre_norm": {},
    "post_norm_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "pre_norm_projected_untied": {
        "word_embed_proj_dim": 8,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
    },
    "no_bias": {"enable_bias": False},
    "no_affine": {"layer_norm_elementwise_affine": False},
    "no_final_norm_untied": {
        "_remove_final_layer_norm": True,
        "tie_word_embeddings": False,
    },
    "post_norm_no_bias_no_affine": {
        "do_layer_norm_before": False,
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
    },
}
# Saved in several files.
SHARDED = "no_bias"
ACTIVATIONS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)
TEXTS = (
    "the cat sat on the mat",
    " leading space, and 123 numbers\n\n\ttabs",
    "unseen: \u00e9\u4e16 </s> special <pad> tokens",
    "",
)


def make_model(changes: dict, seed: int) -> transformers.OPTForCausalLM:
    """A model whose weights, biases and norms are random half-precision numbers."""
    torch.manual_seed(seed)
    config = transformers.OPTConfig(**(BASE | changes))
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "norm" in name and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            else:
                noise = noise * 2 / weight.shape[-1] ** 0.5
            weight.copy_(noise.half().float())
    return model


def make_inputs(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Token ids, (3, length), and masks: no padding, on the left, and elsewhere."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (3, LENGTH)).astype(np.int32)
    masks = {name: np.ones_like(tokens) for name in ("none", "left", "mixed")}
    masks["left"][1, :4] = masks["left"][2, :1] = 0
    masks["mixed"][0, 5:] = masks["mixed"][1, :2] = masks["mixed"][2, 3:5] = 0
    return tokens, masks


def save_variant(name: str, changes: dict, seed: int) -> None:
    model = make_model(changes, seed)
    tokens, masks = make_inputs(seed)
    outputs = {"tokens": tokens}
    with torch.no_grad():
        for kind, mask in masks.items():
            logits = model(
                torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask)
            ).logits
            outputs[f"mask_{kind}"] = mask
            outputs[f"logits_{kind}"] = logits.numpy()
            if kind in ("none", "left"):
                generated = model.generate(
                    torch.from_numpy(tokens).long(),
                    attention_mask=torch.from_numpy(mask),
                    do_sample=False,
                    max_new_tokens=NEW_TOKENS,
                ).numpy()
                padding = np.full((3, LENGTH + NEW_TOKENS - generated.shape[1]), 1)
                generated = np.concatenate([generated, padding], axis=1)
                outputs[f"generated_{kind}"] = generated.astype(np.int32)
    size = "6KB" if name == SHARDED else "1GB"
    model.half().save_pretrained(DATA / name, max_shard_size=size)
    (DATA / name / "generation_config.json").unlink()
    np.savez_compressed(DATA / f"{name}.npz", **outputs)
    ordered = np.sort(outputs["logits_none"], axis=-1)
    gap = (ordered[..., -1] - ordered[..., -2]).min()
    print(f"{name}: least gap between the best two logits {gap:.4f}")


def save_activations() -> None:
    x = torch.linspace(-12, 12, 97)
    y = {name: ACT2FN[name](x).numpy() for name in ACTIVATIONS}
    np.savez_compressed(DATA / "activations.npz", x=x.numpy(), **y)


def save_tokenizer() -> None:
    """A tokenizer in OPT's original files, and the ids transformers makes."""
    folder = DATA / "tokenizer"
    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["the cat sat on the mat and the numbers 123 in the space"] * 3,
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        show_progress=False,
    )
    bpe.save_model(str(folder))
    special = {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
    }
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(
        folder, add_bos_token=True, **special
    )
    ids = {f"ids_{i}": np.array(tokenizer(t).input_ids) for i, t in enumerate(TEXTS)}
    np.savez_compressed(DATA / "tokenizer.npz", texts=np.array(TEXTS), **ids)


def main() -> None:
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    for seed, (name, changes) in enumerate(VARIANTS.items()):
        save_variant(name, changes, seed)
    save_activations()
    save_tokenizer()


if __name__ == "__main__":
    main()
