"""Generates text with a pruned OPT: several prompts at once, then one as it comes.

    python examples/generate_text.py [FOLDER OR HUB NAME]

Without an argument it is the demo model beside this file.
"""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flashjax.models import opt

DEMO = Path(__file__).resolve().parent / "demo-opt"
PROMPTS = ("It is a truth universally acknowledged, that", "ROMEO.\n")


def main(folder: str | Path = DEMO, new_tokens: int = 24) -> None:
    model, tokenizer = opt.from_pretrained(folder, dtype=jnp.float16)
    config = opt.GenerationConfig(
        max_new_tokens=new_tokens, temperature=0.8, top_k=40, repetition_penalty=1.1
    )

    # A batch: prompts of different lengths are padded, the mask says where.
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    ids, mask = opt.pad_prompts(prompts)
    out = opt.generate(model, ids, attention_mask=mask, config=config, seed=1)
    for prompt, row in zip(PROMPTS, out, strict=True):
        new = row[ids.shape[1] :].tolist()
        print(f"--- {prompt}{tokenizer.decode(new)}\n")

    # A stream: the same function, token by token.
    tokens = opt.generate_stream(model, np.array(prompts[:1]), config=config, seed=2)
    print(f"--- {PROMPTS[0]}", end="")
    for piece in opt.stream_text((t[0] for t in tokens), tokenizer, prompts[0]):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
