"""Writes perplexity_reference.json: what PyTorch's OPT makes of the tests' models.

Needs torch and transformers, which the tests do not:

    python tests/models/opt/make_perplexity_reference.py

The windows are those of transformers' guide on the perplexity of fixed-length models:
targets that an earlier window had are -100, and the mean is over predicted tokens.
"""

import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from flashjax.models import opt

HERE = Path(__file__).parent
DEMO = HERE.parents[2] / "examples" / "demo-opt"
VARIANTS = ("pre_norm", "post_norm_projected", "pre_norm_projected_untied")
TOKENS = 75
CASES = ((32, 32), (32, 8), (20, 7))
DEMO_CASES = ((512, 512), (512, 100))
DEMO_CHARACTERS = 6_000


def perplexity(model, ids: np.ndarray, window: int, stride: int) -> float:
    """exp of the mean negative log-likelihood, all in float32 on the CPU."""
    total, count, done = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        tokens = torch.from_numpy(ids[start:end]).long()[None]
        labels = tokens.clone()
        labels[:, : -(end - done)] = -100
        if start == 0:
            labels = tokens.clone()
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].float()
        labels = labels[0, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=-100, reduction="none"
        )
        total += losses.double().sum().item()
        count += int((labels != -100).sum())
        done = end
        if end == len(ids):
            break
    return float(np.exp(total / count))


def load(folder: Path) -> transformers.OPTForCausalLM:
    return transformers.OPTForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def main() -> None:
    rng = np.random.default_rng(0)
    reference: dict = {"torch": torch.__version__, "models": {}}
    for name in VARIANTS:
        model = load(HERE / "data" / name)
        ids = rng.integers(3, model.config.vocab_size, TOKENS)
        reference["models"][name] = {
            "token_ids": ids.tolist(),
            "cases": [[*case, perplexity(model, ids, *case)] for case in CASES],
        }
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:DEMO_CHARACTERS]
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    ids = np.asarray(tokenizer(text).input_ids)
    demo = load_demo()
    reference["demo"] = {
        "characters": DEMO_CHARACTERS,
        "tokens": len(ids),
        "cases": [[*case, perplexity(demo, ids, *case)] for case in DEMO_CASES],
    }
    path = HERE / "perplexity_reference.json"
    path.write_text(json.dumps(reference, indent=1) + "\n")


def load_demo() -> transformers.OPTForCausalLM:
    """The demo model, whose weights transformers cannot read as they are stored."""
    model, _ = opt.from_pretrained(DEMO, dtype=jnp.float16, sparse=False)
    with tempfile.TemporaryDirectory() as folder:
        opt.save_pretrained(model, None, Path(folder) / "dense")
        return load(Path(folder) / "dense")


if __name__ == "__main__":
    main()
