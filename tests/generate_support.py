"""A tiny model, and what it generates by plain definitions."""

import contextlib
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flashjax.models import opt

# `opt.generate` is the function; this is the module that it comes from.
generate_module = sys.modules["flashjax.models.opt.generate"]

CONFIG = opt.OPTConfig(
    vocab_size=61,
    hidden_size=16,
    num_layers=1,
    ffn_size=32,
    num_heads=2,
    max_positions=24,
    pad_token_id=1,
    eos_token_id=2,
    init_std=0.4,
)
NEW = 8
PROMPTS = [[5, 9, 31], [7, 8, 9, 10, 11, 12], [50]]


def make_model(dtype=jnp.float32, seed=0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return opt.OPT(config, dtype=dtype, rngs=nnx.Rngs(seed))


@nnx.jit
def logits_of(model, token_ids):
    return model(token_ids)


def naive(model, prompts, new):
    """Greedy continuations without cache, mask and end token: (rows, new)."""
    # One shape for all, so that a model is compiled once.
    ids = np.zeros((len(PROMPTS), CONFIG.max_positions), np.int32)
    ends = np.array([len(p) for p in prompts])
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    rows = np.arange(len(prompts))
    for _ in range(new):
        # Causal attention: what comes after a row's end does not change its logits.
        logits = np.asarray(logits_of(model, jnp.asarray(ids)))[rows, ends - 1]
        ids[rows, ends] = logits.argmax(axis=-1)
        ends = ends + 1
    return np.stack([ids[r, ends[r] - new : ends[r]] for r in rows])


def left(length):
    """Places of a prompt after padding to this length."""
    return lambda n: slice(length - n, None)


def batch(prompts=PROMPTS, length=8, places=None):
    """Token ids and mask, each prompt at the slots ``places(len(prompt))``."""
    places = places or left(length)
    ids = np.full((len(prompts), length), CONFIG.pad_token_id, np.int32)
    mask = np.zeros((len(prompts), length), np.bool_)
    for row, prompt in enumerate(prompts):
        slots = places(len(prompt))
        ids[row, slots] = prompt
        mask[row, slots] = True
    return ids, mask


@contextlib.contextmanager
def count_compilations():
    """The names of what JAX traces and compiles meanwhile."""
    events = []

    def listen(event, duration, **kwargs):
        if event.startswith("/jax/core/compile"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
