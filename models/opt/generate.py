"""Text generation with OPT: one jitted prefill and a decode loop on the device.

Slots and positions: a prompt of P slots may hold padding anywhere. Token i that is
generated goes to slot P + i of the cache and to position n + i, n being the number of
the row's real tokens, so padding never shifts a row's positions.

The shapes that are compiled for are rounded up (`_bucket`), which pads prompts on the
right; everything else that differs between calls is an argument of the compiled
functions. `generate` and `generate_stream` share them: the loop runs up to a step that
is an argument too, the last one or just the next.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from .modeling import OPT, KVCache, positions_from_mask
from .sampling import Sampler, as_int, key_data, make_key

_BUCKET = 64


class _Settings(NamedTuple):
    """What is the same in every step; arguments of the compiled functions."""

    sampler: Sampler
    key_words: Any  # (2,) uint32
    ends: Any  # (vocab_size,) bool, the tokens that finish a row
    min_new_tokens: Any  # int32 scalar
    pad_id: Any  # int32 scalar


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DecodeState:
    """What a step hands to the next; donated, so it is updated in place."""

    cache: KVCache
    output_table: jax.Array | None  # of the model, where it saves conversions
    tokens: jax.Array  # (batch, width) int32, the generated tokens
    last: jax.Array  # (batch,) int32, the newest of them
    finished: jax.Array  # (batch,) bool
    prompt_counts: jax.Array  # (batch,) int32, real tokens of the prompts
    step: jax.Array  # int32 scalar, how many tokens each row has got


class _Request(NamedTuple):
    """A checked call."""

    prompt: np.ndarray  # (batch, length) int32, as given
    padded: np.ndarray  # (batch, prompt bucket) int32
    mask: np.ndarray  # (batch, prompt bucket) bool
    max_new_tokens: int
    width: int
    settings: _Settings


def generate(
    model: OPT,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
) -> jax.Array:
    """Continues a batch of prompts.

    Prefill and decode loop are compiled once for a model structure, batch size and
    lengths; later calls reuse them, also with other values of every option (greedy,
    plain and filtered sampling are compiled apart). The loop ends on the device as
    soon as every row has finished.

    Args:
      model: the model, dense or sparse.
      token_ids: (batch, length) integers, the prompts.
      attention_mask: (batch, length) bool, or integers 0 and 1. False marks padding,
        which may be anywhere as long as every row has a real token; a row's greedy
        continuation does not depend on it. None: every token is real.
      max_new_tokens: number of tokens to generate; 0 returns the prompts.
      min_new_tokens: number of tokens before which no row may finish.
      temperature: divisor of the logits. 0 is greedy: the highest logit wins, of equal
        ones the lowest id.
      top_k: draw from the ``top_k`` highest logits only.
      top_p: draw only from the most probable tokens that together reach this
        probability, after temperature and ``top_k``.
      seed: seed of the draws, 0 to 2**64 - 1. A row's draws depend on the seed and the
        row's index in the batch, not on the other rows.
      eos_token_id: id, or ids, that finish a row. None takes the model's
        (``model.config.eos_token_id``); -1 never stops.

    Returns:
      (batch, length + max_new_tokens) int32: the prompts as given and what follows
      them. After its end token a row is filled with ``model.config.pad_token_id``, or
      with an end token where the configuration has no padding token in the vocabulary.

    Raises:
      TypeError: an option is no number of the right kind.
      ValueError: a shape, dtype or value that does not fit, among them a row without
        a real token, and more tokens than the model has positions.
    """
    request = _check(
        model,
        token_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=eos_token_id,
    )
    # On the host, where joining the parts compiles nothing.
    new_tokens = np.zeros((len(request.prompt), request.max_new_tokens), np.int32)
    if new_tokens.size:
        graphdef, params = nnx.split(model)
        state = _start(graphdef, params, request)
        if request.max_new_tokens > 1:
            limit = np.int32(request.max_new_tokens)
            state, _ = _decode(graphdef, params, request.settings, state, limit)
        new_tokens = np.asarray(state.tokens)[:, : request.max_new_tokens]
    return jax.device_put(np.concatenate([request.prompt, new_tokens], axis=1))


def generate_stream(
    model: OPT,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Continues a batch of prompts and hands out the tokens as they come.

    Takes what `generate` takes, checks it at once, and yields the same tokens with the
    same compiled functions. `TextStream` turns them into text.

    Returns:
      An iterator of (batch,) int32 numpy arrays, one a step, ``max_new_tokens`` at
      most: it ends after the step in which the last row finished. Rows that finished
      earlier get ``model.config.pad_token_id``.

    Raises:
      TypeError, ValueError: as `generate`.
    """
    request = _check(
        model,
        token_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=eos_token_id,
    )
    return _stream(model, request)


def _stream(model: OPT, request: _Request) -> Iterator[np.ndarray]:
    if not request.max_new_tokens or not len(request.prompt):
        return
    graphdef, params = nnx.split(model)
    state = _start(graphdef, params, request)
    # Copies, because the next step may overwrite the state's buffers.
    last, finished = np.array(state.last), bool(np.all(np.asarray(state.finished)))
    for step in range(1, request.max_new_tokens):
        if finished:
            break
        # The device computes the next token while the caller uses this one.
        limit = np.int32(step + 1)
        state, news = _decode(graphdef, params, request.settings, state, limit)
        yield last
        last, finished = np.array(news[0]), bool(news[1])
    yield last


def _start(graphdef, params, request: _Request) -> _DecodeState:
    return _prefill(
        graphdef,
        params,
        request.settings,
        request.padded,
        request.mask,
        width=request.width,
        on_cpu=_platform(params) == "cpu",
    )


def _platform(params: nnx.State) -> str:
    """The platform of a model's arrays; JAX's default for numpy arrays."""
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.Array):
        return next(iter(leaf.devices())).platform
    return jax.default_backend()


# At module level and with the structure as a static argument, the compiled functions
# outlive a model but hold none of its arrays.
@functools.partial(jax.jit, static_argnames=("graphdef", "width", "on_cpu"))
def _prefill(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    settings: _Settings,
    token_ids: jax.Array,
    mask: jax.Array,
    *,
    width: int,
    on_cpu: bool,
) -> _DecodeState:
    """Fills a new cache with the prompts and chooses the first token of each row."""
    model = nnx.merge(graphdef, params)
    batch, length = token_ids.shape
    counts = jnp.sum(mask, axis=1, dtype=jnp.int32)
    from_end = jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)
    output_table = model.float32_output_table() if on_cpu else None
    logits, cache = model.step(
        token_ids,
        mask,
        positions_from_mask(mask),
        model.init_cache(batch, length + width),
        0,
        logits_index=length - 1 - from_end,
        output_table=output_table,
    )
    state = _DecodeState(
        cache=cache,
        output_table=output_table,
        tokens=jnp.full((batch, width), settings.pad_id, jnp.int32),
        last=jnp.zeros((batch,), jnp.int32),
        finished=jnp.zeros((batch,), jnp.bool_),
        prompt_counts=counts,
        step=jnp.zeros((), jnp.int32),
    )
    return _append(settings, state, logits, cache)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def _decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    settings: _Settings,
    state: _DecodeState,
    limit: jax.Array,
) -> tuple[_DecodeState, tuple[jax.Array, jax.Array]]:
    """Runs steps until every row has ``limit`` tokens or has finished.

    Returns:
      The state, and beside it what a stream reads while the state is donated again:
      the newest tokens and whether every row has finished.
    """
    length = state.cache.max_length - state.tokens.shape[1]

    def go_on(state: _DecodeState) -> jax.Array:
        return (state.step < limit) & ~jnp.all(state.finished)

    def advance(state: _DecodeState) -> _DecodeState:
        model = nnx.merge(graphdef, params)
        logits, cache = model.step(
            state.last[:, None],
            jnp.ones((state.last.shape[0], 1), jnp.bool_),
            (state.prompt_counts + state.step - 1)[:, None],
            state.cache,
            length + state.step - 1,
            logits_index=jnp.zeros_like(state.last),
            output_table=state.output_table,
        )
        return _append(settings, state, logits, cache)

    state = jax.lax.while_loop(go_on, advance, state)
    return state, (state.last, jnp.all(state.finished))


def _append(
    settings: _Settings, state: _DecodeState, logits: jax.Array, cache: KVCache
) -> _DecodeState:
    """Chooses the next token of each row and writes it down."""
    early = state.step < settings.min_new_tokens
    logits = jnp.where((settings.ends & early)[None, :], -jnp.inf, logits)
    key = make_key(settings.key_words)
    chosen = settings.sampler.sample(logits, key, state.step)
    chosen = jnp.where(state.finished, settings.pad_id, chosen)
    tokens = jax.lax.dynamic_update_slice(
        state.tokens, chosen[:, None], (jnp.zeros_like(state.step), state.step)
    )
    return dataclasses.replace(
        state,
        cache=cache,
        tokens=tokens,
        last=chosen,
        finished=state.finished | settings.ends[chosen],
        step=state.step + 1,
    )


def _bucket(length: int) -> int:
    """The length compiled for: a power of two up to 64, then a multiple of 64."""
    if length <= _BUCKET:
        return 1 << max(length - 1, 0).bit_length()
    return -(-length // _BUCKET) * _BUCKET


def _check(
    model: OPT,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    eos_token_id: int | Sequence[int] | None,
) -> _Request:
    config = model.config
    max_new_tokens = as_int("max_new_tokens", max_new_tokens)
    min_new_tokens = as_int("min_new_tokens", min_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"min_new_tokens must be from 0 to max_new_tokens={max_new_tokens}, "
            f"got {min_new_tokens}"
        )
    sampler = Sampler.create(
        config.vocab_size, temperature=temperature, top_k=top_k, top_p=top_p
    )
    key_words = key_data(seed)
    ends = _end_tokens(config, eos_token_id)
    pad_id = config.pad_token_id
    if pad_id is None or not 0 <= pad_id < config.vocab_size:
        pad_id = int(np.argmax(ends))

    prompt = _array("token_ids", token_ids)
    if not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(f"token_ids must be integers, got dtype {prompt.dtype}")
    if prompt.ndim != 2:
        hint = "; for one prompt use token_ids[None]" if prompt.ndim == 1 else ""
        raise ValueError(
            f"token_ids must be (batch, length), got shape {prompt.shape}{hint}"
        )
    mask = _mask(attention_mask, prompt.shape)
    counts = mask.sum(axis=1)
    if not counts.all():
        rows = np.flatnonzero(counts == 0).tolist()
        raise ValueError(
            f"every prompt needs at least one real token, got none in row(s) {rows} "
            f"of token_ids of shape {prompt.shape}"
        )
    wrong = mask & ((prompt < 0) | (prompt >= config.vocab_size))
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise ValueError(
            f"token_ids must be from 0 to {config.vocab_size - 1} (vocab_size - 1), "
            f"got {prompt[row, column]} in row {row}, column {column}"
        )
    longest = int(counts.max(initial=0))
    if longest + max_new_tokens > config.max_positions:
        raise ValueError(
            f"prompt and max_new_tokens must fit the model's {config.max_positions} "
            f"positions, got a prompt of {longest} tokens and "
            f"max_new_tokens={max_new_tokens}"
        )

    length = prompt.shape[1]
    padding = ((0, 0), (0, _bucket(length) - length))
    tokens = np.where(mask, prompt, 0).astype(np.int32)
    return _Request(
        prompt=prompt.astype(np.int32),
        padded=np.pad(tokens, padding),
        mask=np.pad(mask, padding),
        max_new_tokens=max_new_tokens,
        width=_bucket(max_new_tokens),
        settings=_Settings(
            sampler=sampler,
            key_words=key_words,
            ends=ends,
            min_new_tokens=np.int32(min_new_tokens),
            pad_id=np.int32(pad_id),
        ),
    )


def _array(name: str, values: ArrayLike) -> np.ndarray:
    if isinstance(values, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a concrete array, got a tracer: generate compiles its own "
            "steps and cannot be called under jit, vmap or grad"
        )
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a rectangular (batch, length) array; pad shorter prompts "
            f"and pass attention_mask ({error})"
        ) from error


def _mask(attention_mask: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray:
    if attention_mask is None:
        return np.ones(shape, np.bool_)
    mask = _array("attention_mask", attention_mask)
    if mask.dtype != np.bool_ and not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(
            f"attention_mask must be bool or integers, got dtype {mask.dtype}"
        )
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the shape of token_ids, {shape}, "
            f"got {mask.shape}"
        )
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        raise ValueError(
            f"attention_mask must hold only 0 and 1, got {mask[wrong].flat[0]}"
        )
    return mask.astype(np.bool_)


def _end_tokens(config: Any, eos_token_id: int | Sequence[int] | None) -> np.ndarray:
    """(vocab_size,) bool: the tokens that finish a row."""
    ends = np.zeros((config.vocab_size,), np.bool_)
    own = eos_token_id is None
    ids = config.eos_token_id if own else eos_token_id
    if ids is None:
        return ends
    listed: Any = (ids,) if np.ndim(ids) == 0 else ids
    ids = [as_int("eos_token_id", i) for i in listed]
    if not own and ids == [-1]:
        return ends
    for i in ids:
        if 0 <= i < config.vocab_size:
            ends[i] = True
        elif not own:
            raise ValueError(
                f"eos_token_id must be from 0 to {config.vocab_size - 1} "
                f"(vocab_size - 1), or -1 to never stop, got {i}"
            )
    return ends
