"""Text generation with OPT: one jitted prefill and a decode loop on the device.

Slots and positions: a prompt of P slots may hold padding anywhere. Token i that is
generated goes to slot P + i of the cache and to position n + i, n being the number of
the row's real tokens, so padding never shifts a row's positions.

The shapes that are compiled for are rounded up (`bucket`), which pads prompts on the
right; everything else that differs between calls is an argument of the compiled
functions. `generate` and `generate_stream` share them: a loop runs up to a step that is
an argument too, the last one or just the next. On GPUs, where no kernel knows which
slots of the cache are in use, there are several, one after the other, which read more
and more of them.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from .attention import KVCache, reads_slots_in_use
from .generation_config import GenerationConfig, GenerationOptions
from .generation_request import (
    Request,
    Settings,
    make_request,
    prefill_sequences,
    read_slots,
)
from .modeling import OPT, check_opt, positions_from_mask
from .sampling import log_probabilities, make_key, penalize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DecodeState:
    """What a step hands to the next; donated, so it is updated in place."""

    cache: KVCache
    output_table: jax.Array | None  # of the model, where it saves conversions
    tokens: jax.Array  # (batch, width) int32, the generated tokens
    logprobs: jax.Array | None  # (batch, width) float32, where they are wanted
    seen: jax.Array | None  # (batch, vocab_size) bool, where repetition is penalized
    last: jax.Array  # (batch,) int32, the newest of them
    finished: jax.Array  # (batch,) bool
    failed: jax.Array  # (batch,) bool, of those: logits gave no probabilities
    prompt_counts: jax.Array  # (batch,) int32, real tokens of the prompts
    step: jax.Array  # int32 scalar, how many tokens each row has got


@overload
def generate(
    model: OPT,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    config: GenerationConfig | None = None,
    return_logprobs: Literal[False] = False,
    **options: Unpack[GenerationOptions],
) -> jax.Array: ...


@overload
def generate(
    model: OPT,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    config: GenerationConfig | None = None,
    return_logprobs: Literal[True],
    **options: Unpack[GenerationOptions],
) -> tuple[jax.Array, jax.Array]: ...


def generate(
    model: OPT,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    config: GenerationConfig | None = None,
    return_logprobs: bool = False,
    **options: Unpack[GenerationOptions],
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Continues a batch of prompts.

    Prefill and decode loops are compiled once for a model structure, batch size and
    lengths; later calls reuse them, also with other values of every option (greedy,
    plain and filtered sampling are compiled apart, and so are calls with a repetition
    penalty and with log-probabilities). The loop ends on the device as soon as every
    row has finished.

    Args:
      model: the model, dense or sparse.
      token_ids: (batch, length) integers, the prompts; `pad_prompts` makes them of
        prompts of different lengths.
      attention_mask: (batch, length) bool, or integers 0 and 1. False marks padding,
        which may be anywhere as long as every row has a real token; a row's greedy
        continuation does not depend on it. None: every token is real.
      config: the options; None is the default `GenerationConfig`.
      return_logprobs: also return the new tokens' log-probabilities.
      options: fields of `GenerationConfig`, which go before `config`.

    Returns:
      (batch, length + max_new_tokens) int32: the prompts as given and what follows
      them. After its end token a row is filled with the padding token. With
      ``return_logprobs`` also (batch, max_new_tokens) float32: the log-probability that
      the model gives each new token, before penalty, temperature and filters; 0 after
      a row's end.

    Raises:
      TypeError: the model is no OPT, an option no number of the right kind, or there is
        none of its name.
      ValueError: a shape, dtype or value that does not fit, among them a row without
        a real token, and more tokens than the model has positions.
      FloatingPointError: a row's logits are NaN, or the largest of them is infinite.
    """
    request = _request(model, token_ids, attention_mask, config, options)
    tokens, logprobs, failed = run_request(model, request, return_logprobs)
    check_logits(failed)
    # On the host, where joining the parts compiles nothing.
    joined = jax.device_put(np.concatenate([request.prompt, tokens], axis=1))
    return (joined, jax.device_put(logprobs)) if return_logprobs else joined


def generate_stream(
    model: OPT,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    config: GenerationConfig | None = None,
    **options: Unpack[GenerationOptions],
) -> Iterator[np.ndarray]:
    """Continues a batch of prompts and hands out the tokens as they come.

    Takes what `generate` takes, checks it at once, and yields the same tokens with the
    same compiled functions. `TextStream` turns them into text.

    Returns:
      An iterator of (batch,) int32 numpy arrays, one a step, ``max_new_tokens`` at
      most: it ends after the step in which the last row finished. Rows that finished
      earlier get the padding token.

    Raises:
      TypeError, ValueError: as `generate`.
      FloatingPointError: as `generate`, from the iterator.
    """
    return _stream(model, _request(model, token_ids, attention_mask, config, options))


def run_request(
    model: OPT, request: Request, logprobs: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs a request whose rows may fail, each on its own.

    Returns:
      New tokens (int32) and log-probabilities (float32), (batch, max_new_tokens), and
      whether a row's logits gave no probabilities, (batch,) bool: then it has ended.
    """
    shape = len(request.prompt), request.max_new_tokens
    scores, failed = np.zeros(shape, np.float32), np.zeros(shape[:1], np.bool_)
    if not shape[0] or not shape[1]:
        return np.zeros(shape, np.int32), scores, failed
    graphdef, params = nnx.split(model)
    state = _start(graphdef, params, request, logprobs)
    state, _ = _go_on(graphdef, params, request, state, 1, request.max_new_tokens)
    tokens = np.asarray(state.tokens)[:, : request.max_new_tokens]
    if state.logprobs is not None:
        scores = np.asarray(state.logprobs)[:, : request.max_new_tokens]
    return tokens, scores, np.asarray(state.failed)


def time_request(model: OPT, request: Request) -> tuple[float, float]:
    """Runs a request; seconds of the prefill and of the loop over the later tokens."""
    graphdef, params = nnx.split(model)
    times = [time.perf_counter()]
    state = jax.block_until_ready(_start(graphdef, params, request))
    times.append(time.perf_counter())
    state, _ = _go_on(graphdef, params, request, state, 1, request.max_new_tokens)
    np.asarray(state.tokens)  # on the host, as what `generate` returns
    times.append(time.perf_counter())
    check_logits(state.failed)  # it ends early
    return times[1] - times[0], times[2] - times[1]


def check_logits(failed: jax.Array | np.ndarray | list[bool]) -> None:
    """Raises FloatingPointError if a row failed."""
    if np.any(np.asarray(failed)):
        raise FloatingPointError(
            "the model's logits are NaN or infinite; try dtype float32 or bfloat16"
        )


def _request(model, token_ids, attention_mask, config, options) -> Request:
    check_opt(model)
    if config is None:
        config = GenerationConfig()
    elif not isinstance(config, GenerationConfig):
        raise TypeError(
            f"config must be a GenerationConfig, got {type(config).__name__}"
        )
    config = config.with_options(**options)
    return make_request(model.config, token_ids, attention_mask, config)


def _stream(model: OPT, request: Request) -> Iterator[np.ndarray]:
    if not request.max_new_tokens or not len(request.prompt):
        return
    graphdef, params = nnx.split(model)
    state = _start(graphdef, params, request)
    check_logits(state.failed)
    # Copies, because the next step may overwrite the state's buffers.
    last, finished = np.array(state.last), bool(np.all(np.asarray(state.finished)))
    for step in range(1, request.max_new_tokens):
        if finished:
            break
        # The device computes the next token while the caller uses this one.
        state, news = _go_on(graphdef, params, request, state, step, step + 1)
        yield last
        check_logits(news[2])
        last, finished = np.array(news[0]), bool(news[1])
    yield last


def _start(graphdef, params, request: Request, logprobs: bool = False) -> _DecodeState:
    return _prefill(
        graphdef,
        params,
        request.settings,
        request.padded,
        request.mask,
        width=request.width,
        logprobs=logprobs,
        on_cpu=_platform(params) == "cpu",
    )


def _go_on(graphdef, params, request: Request, state, done: int, limit: int):
    """Runs steps from ``done`` to ``limit`` tokens, as `_decode` does.

    Without a kernel that reads the slots in use alone, a step on a GPU reads them
    rounded up: a loop for each number.
    """
    news = None
    for slots, end in _loops(params, request, state, done, limit):
        if news is not None and bool(news[1]):
            break  # before a loop is compiled that nobody needs
        end = np.int32(end)
        state, news = _decode(
            graphdef, params, request.settings, state, end, slots=slots
        )
    return state, news


def _loops(params, request: Request, state: _DecodeState, done: int, limit: int):
    """The loops from ``done`` to ``limit`` tokens: slots that are read, and ends."""
    length, capacity = request.padded.shape[1], state.cache.max_length
    # One array and not all weights, because a stream asks for every token.
    platform = _platform(state.last)
    # A CPU would copy a part of the cache to read it.
    everything = platform == "cpu" or reads_slots_in_use(
        state.cache, params["embed_tokens"]["embedding"].dtype, platform
    )
    while done < limit:
        slots = capacity if everything else read_slots(length + done, capacity)
        done = min(limit, slots - length + 1)
        yield slots, done


def compile_request(model: OPT, request: Request, logprobs: bool = False) -> None:
    """Compiles all that a request may need, by running its prefill and short loops."""
    if not len(request.prompt) or not request.max_new_tokens:
        return
    graphdef, params = nnx.split(model)
    state = _start(graphdef, params, request, logprobs)
    loops = _loops(params, request, state, 1, request.max_new_tokens)
    for count, (slots, _) in enumerate(loops, start=2):
        # One step, because a GPU loads kernels and makes graphs when they first run.
        limit = np.int32(count)
        state, _ = _decode(
            graphdef, params, request.settings, state, limit, slots=slots
        )
    jax.block_until_ready(state.tokens)


def _platform(arrays: nnx.State[Any, Any] | jax.Array) -> str:
    """The platform of arrays; JAX's default for numpy arrays."""
    leaf = jax.tree.leaves(arrays)[0]
    if isinstance(leaf, jax.Array):
        return next(iter(leaf.devices())).platform
    return jax.default_backend()


# At module level and with the structure as a static argument, the compiled functions
# outlive a model but hold none of its arrays.
@functools.partial(jax.jit, static_argnames=("graphdef", "width", "logprobs", "on_cpu"))
def _prefill(
    graphdef: nnx.GraphDef[Any],
    params: nnx.State[Any, Any],
    settings: Settings,
    token_ids: jax.Array,
    mask: jax.Array,
    *,
    width: int,
    logprobs: bool,
    on_cpu: bool,
) -> _DecodeState:
    """Fills a new cache with the prompts and chooses the first token of each row."""
    model = nnx.merge(graphdef, params)
    batch, length = token_ids.shape
    counts = jnp.sum(mask, axis=1, dtype=jnp.int32)
    from_end = jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32)
    output_table = model.float32_output_table() if on_cpu else None
    prompts = (token_ids, mask, positions_from_mask(mask), length - 1 - from_end)

    def step(prompts, cache, first=None):
        *prompts, logits_index = prompts
        return model.step(
            *prompts,
            cache,
            0,
            first_sequence=first,
            logits_index=logits_index,
            output_table=output_table,
        )

    def add_piece(index, carry):
        logits, cache = carry
        first = index * size
        piece = [jax.lax.dynamic_slice_in_dim(a, first, size) for a in prompts]
        new, cache = step(piece, cache, first)
        return jax.lax.dynamic_update_slice_in_dim(logits, new, first, 0), cache

    cache = model.init_cache(batch, length + width)
    size = prefill_sequences(batch, length)
    if size == batch:
        logits, cache = step(prompts, cache)
    else:
        logits = jnp.zeros((batch, model.config.vocab_size), jnp.float32)
        logits, cache = jax.lax.fori_loop(0, batch // size, add_piece, (logits, cache))
    seen = None
    if settings.repetition_penalty is not None:
        rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
        seen = jnp.zeros((batch, model.config.vocab_size), jnp.bool_)
        seen = seen.at[rows, token_ids].max(mask)
    state = _DecodeState(
        cache=cache,
        output_table=output_table,
        tokens=jnp.full((batch, width), settings.pad_id, jnp.int32),
        logprobs=jnp.zeros((batch, width), jnp.float32) if logprobs else None,
        seen=seen,
        last=jnp.zeros((batch,), jnp.int32),
        finished=jnp.zeros((batch,), jnp.bool_),
        failed=jnp.zeros((batch,), jnp.bool_),
        prompt_counts=counts,
        step=jnp.zeros((), jnp.int32),
    )
    return _append(settings, state, logits, cache)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "slots"), donate_argnames="state"
)
def _decode(
    graphdef: nnx.GraphDef[Any],
    params: nnx.State[Any, Any],
    settings: Settings,
    state: _DecodeState,
    limit: jax.Array,
    *,
    slots: int,
) -> tuple[_DecodeState, tuple[jax.Array, jax.Array, jax.Array]]:
    """Runs steps until every row has ``limit`` tokens or has finished.

    The first ``slots`` slots of the cache hold all that these steps read and write.

    Returns:
      The state, and beside it what a stream reads while the state is donated again:
      the newest tokens, whether every row has finished, and whether one failed.
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
            slots=slots,
            logits_index=jnp.zeros_like(state.last),
            output_table=state.output_table,
        )
        return _append(settings, state, logits, cache)

    state = jax.lax.while_loop(go_on, advance, state)
    return state, (state.last, jnp.all(state.finished), jnp.any(state.failed))


def _append(
    settings: Settings, state: _DecodeState, logits: jax.Array, cache: KVCache
) -> _DecodeState:
    """Chooses the next token of each row and writes it down."""
    scores = logits
    if state.seen is not None:
        scores = penalize(scores, state.seen, settings.repetition_penalty)
    early = state.step < settings.min_new_tokens
    scores = jnp.where((settings.ends & early)[None, :], -jnp.inf, scores)
    keys = make_key(settings.key_words)
    chosen = settings.sampler.sample(scores, keys, state.step, settings.streams)
    # NaN if any is: no token is then likelier than others.
    largest = jnp.max(logits, axis=-1)
    failed = state.failed | (~jnp.isfinite(largest) & ~state.finished)
    chosen = jnp.where(state.finished, settings.pad_id, chosen)
    seen, logprobs = state.seen, state.logprobs
    if seen is not None:
        rows = jnp.arange(chosen.shape[0], dtype=jnp.int32)
        seen = seen.at[rows, chosen].set(True)
    if logprobs is not None:
        new = jnp.where(state.finished, 0.0, log_probabilities(logits, chosen))
        logprobs = _write_column(logprobs, new, state.step)
    count = state.step + 1
    ended = settings.ends[chosen] | (count >= settings.limits)
    return dataclasses.replace(
        state,
        cache=cache,
        tokens=_write_column(state.tokens, chosen, state.step),
        logprobs=logprobs,
        seen=seen,
        last=chosen,
        finished=state.finished | ended | failed,
        failed=failed,
        step=count,
    )


def _write_column(table: jax.Array, column: jax.Array, index: jax.Array) -> jax.Array:
    at = (jnp.zeros_like(index), index)
    return jax.lax.dynamic_update_slice(table, column[:, None], at)
