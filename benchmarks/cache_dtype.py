"""Measures what keys and values in float8 cost: perplexity through a cache.

    python benchmarks/cache_dtype.py [--model examples/demo-opt --text FILE]

Every window of the text goes through `OPT.step` into a new cache, so that each token
attends to keys and values as they are kept. `same_tokens` is the share of tokens whose
likeliest successor is that of the model's own dtype.

Writes `benchmarks/results/cache-dtype-DEVICE.json`.
"""

import math
import pathlib
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import report
import typer
from flax import nnx

from flashjax.models import opt
from flashjax.models.opt.attention import check_cache_dtype
from flashjax.models.opt.modeling import positions_from_mask
from flashjax.models.opt.sampling import log_probabilities

DEMO = pathlib.Path(__file__).resolve().parent.parent / "examples" / "demo-opt"


def through_cache(model: opt.OPT, windows: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean negative log-likelihood, and the likeliest successors."""

    @nnx.jit
    def measure(model, ids):
        mask = jnp.ones(ids.shape, jnp.bool_)
        cache = model.init_cache(*ids.shape)
        logits, _ = model.step(ids, mask, positions_from_mask(mask), cache, 0)
        found = jax.vmap(log_probabilities)(logits[:, :-1], ids[:, 1:])
        return -jnp.mean(found), jnp.argmax(logits, axis=-1)

    parts = [measure(model, jnp.asarray(window[None])) for window in windows]
    losses, tokens = zip(*parts, strict=True)
    return float(np.mean(losses)), np.concatenate(tokens)


def main(
    model: Annotated[pathlib.Path, typer.Option(help="Model folder.")] = DEMO,
    text: Annotated[
        pathlib.Path | None, typer.Option(help="UTF-8 text.  [default: held-out text]")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens.")] = 512,
    name: Annotated[str, typer.Option(help="Stem of the result.")] = "cache-dtype",
) -> None:
    """Measures what keys and values in float8 cost."""
    path = text or model / "heldout.txt"
    loaded, tokenizer = opt.from_pretrained(model)
    if tokenizer is None:
        raise SystemExit(f"{model}: expected a tokenizer, got none")
    ids = np.asarray(tokenizer.encode(path.read_text(encoding="utf-8")).ids, np.int32)
    windows = ids[: len(ids) // window * window].reshape(-1, window)
    results: list[dict] = []
    expected = None
    for cache_dtype in (None, "float8_e4m3fn"):
        loaded.cache_dtype = check_cache_dtype(cache_dtype, loaded.dtype)
        loss, tokens = through_cache(loaded, windows)
        expected = tokens if expected is None else expected
        results.append(
            {
                "cache_dtype": loaded.cache_dtype.name,
                "tokens": windows.size,
                "perplexity": round(math.exp(loss), 4),
                "same_tokens": round(float(np.mean(tokens == expected)), 4),
            }
        )
        print(results[-1])
    content = {"model": model.name, "text": path.name, "window": window}
    print(f"written to {report.save(name, content | {'results': results})}")


if __name__ == "__main__":
    typer.run(main)
