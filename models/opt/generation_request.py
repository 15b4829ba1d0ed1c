"""Checking a call of generation and bringing it into the shapes compiled for."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from .config import OPTConfig
from .generation_config import GenerationConfig
from .sampling import Sampler, as_int, key_data

_BUCKET = 64
_LEAST_READ = 128  # slots
_MOST_PREFILLED = 2048  # tokens


class Settings(NamedTuple):
    """What is the same in every step; arguments of the compiled functions."""

    sampler: Sampler
    key_words: Any  # (batch, 2) uint32
    streams: Any  # (batch,) uint32, which of its key's draws a row gets
    limits: Any  # (batch,) int32, the tokens with which a row is finished
    ends: Any  # (vocab_size,) bool, the tokens that finish a row
    min_new_tokens: Any  # int32 scalar
    pad_id: Any  # int32 scalar
    repetition_penalty: Any  # float32 scalar, or None


class Rows(NamedTuple):
    """What may differ from row to row of a batch."""

    max_new_tokens: Sequence[int]
    seeds: Sequence[int]
    streams: Sequence[int]


class Request(NamedTuple):
    """A checked call."""

    prompt: np.ndarray  # (batch, length) int32, as given
    padded: np.ndarray  # (batch, prompt bucket) int32
    mask: np.ndarray  # (batch, prompt bucket) bool
    max_new_tokens: int
    width: int
    settings: Settings


def _check_mesh() -> None:
    axes = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Explicit in axes.axis_types:
        raise ValueError(
            "generate: expected a mesh with axes of AxisType.Auto, got one with "
            f"explicit axes from jax.set_mesh: {axes}"
        )


def make_request(
    config: OPTConfig,
    token_ids: ArrayLike,
    attention_mask: ArrayLike | None,
    options: GenerationConfig,
    rows: Rows | None = None,
) -> Request:
    """Checks what `generate` is given; `rows` goes before `options`.

    Raises:
      TypeError, ValueError: see `generate`.
    """
    _check_mesh()
    prompt, mask = _prompt(config, token_ids, attention_mask)
    batch, length = prompt.shape
    max_new_tokens = options.max_new_tokens
    if rows is None:
        every = range(batch)
        rows = Rows([max_new_tokens] * batch, [options.seed] * batch, every)
    else:
        max_new_tokens = max(rows.max_new_tokens, default=0)
    check_length(config, int(mask.sum(axis=1).max(initial=0)), max_new_tokens)
    ends = _end_tokens(config, options.eos_token_id)
    padding = ((0, 0), (0, bucket(length) - length))
    tokens = np.where(mask, prompt, 0).astype(np.int32)
    penalty = options.repetition_penalty
    return Request(
        prompt=prompt.astype(np.int32),
        padded=np.pad(tokens, padding),
        mask=np.pad(mask, padding),
        max_new_tokens=max_new_tokens,
        width=bucket(max_new_tokens),
        settings=Settings(
            sampler=Sampler.create(
                config.vocab_size,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
            ),
            key_words=np.array([key_data(s) for s in rows.seeds]).reshape(batch, 2),
            streams=np.array(rows.streams, np.uint32).reshape(batch),
            limits=np.array(rows.max_new_tokens, np.int32).reshape(batch),
            ends=ends,
            min_new_tokens=np.int32(options.min_new_tokens),
            pad_id=np.int32(_pad_token(config, options.pad_token_id, ends)),
            repetition_penalty=None if penalty == 1 else np.float32(penalty),
        ),
    )


def check_length(config: OPTConfig, prompt: int, max_new_tokens: int) -> None:
    """Raises ValueError unless prompt and new tokens fit the model's positions."""
    if prompt + max_new_tokens > config.max_positions:
        raise ValueError(
            f"prompt and max_new_tokens must fit the model's {config.max_positions} "
            f"positions, got a prompt of {prompt} tokens and "
            f"max_new_tokens={max_new_tokens}"
        )


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts of different lengths on the left, as `generate` takes them.

    Args:
      prompts: token ids, a sequence for each prompt.
      pad_token_id: what to pad with; generation does not depend on it.

    Returns:
      Token ids (batch, longest) int32 and the mask (batch, longest) bool.

    Raises:
      TypeError: the prompts are no sequences of integers.
      ValueError: a prompt has no token, or one that int32 does not hold.
    """
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        hint = ": pass its input_ids" if isinstance(prompts, Mapping) else ""
        raise TypeError(
            "pad_prompts: expected a sequence of prompts, got "
            f"{type(prompts).__name__}{hint}"
        )
    rows = [_tokens(prompt, i) for i, prompt in enumerate(prompts)]
    longest = max(map(len, rows), default=0)
    token_ids = np.full((len(rows), longest), pad_token_id, np.int32)
    mask = np.zeros(token_ids.shape, np.bool_)
    for i, row in enumerate(rows):
        token_ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = True
    return token_ids, mask


def _tokens(prompt: Any, index: int) -> np.ndarray:
    if isinstance(prompt, str | bytes):
        raise TypeError(
            f"pad_prompts: expected token ids, got text as prompt {index}: encode it "
            "with the model's tokenizer first"
        )
    expected = "pad_prompts: expected a sequence of integers for every prompt, got"
    try:
        tokens = np.asarray(prompt)
    except ValueError as error:  # of a list of lists
        raise TypeError(f"{expected} other sequences as prompt {index}") from error
    if tokens.ndim == 0:
        hint = ": for one prompt pass [prompt]" if tokens.dtype.kind in "iu" else ""
        hint = ": pass its ids" if hasattr(prompt, "ids") else hint
        raise TypeError(f"{expected} {type(prompt).__name__} as prompt {index}{hint}")
    if tokens.ndim == 1 and not tokens.size:
        raise ValueError(
            f"every prompt needs at least one token, got none in prompt {index}"
        )
    # Of very large ones numpy makes objects or floats.
    are_integers = tokens.dtype.kind in "iu" or all(type(t) is int for t in prompt)
    if tokens.ndim != 1 or not are_integers:
        raise TypeError(
            f"{expected} {tokens.dtype} of shape {tokens.shape} as prompt {index}"
        )
    least, most = tokens.min(), tokens.max()
    if least < 0 or most > np.iinfo(np.int32).max:
        raise ValueError(
            "pad_prompts: expected token ids from 0 on that int32 holds, got "
            f"{least} to {most} in prompt {index}"
        )
    return tokens


def bucket(length: int) -> int:
    """The length compiled for: a power of two up to 64, then a multiple of 64."""
    if length <= _BUCKET:
        return 1 << max(length - 1, 0).bit_length()
    return -(-length // _BUCKET) * _BUCKET


def prefill_sequences(batch: int, length: int) -> int:
    """How many sequences of padded prompts are prefilled at once.

    What is computed on the way to the cache takes memory by their tokens, and no less
    time a token for more than a few thousand.
    """
    pieces = (n for n in range(1, batch + 1) if batch % n == 0)
    most = max((n for n in pieces if n * length <= _MOST_PREFILLED), default=batch)
    # Few at once would be slow: their batch is hard to divide, or their prompts long.
    return most if most * length >= _MOST_PREFILLED // 2 else batch


def read_slots(used: int, capacity: int) -> int:
    """How many slots of a cache are read where `used` are: 128, doubled as needed."""
    slots = _LEAST_READ
    while slots < used:
        slots *= 2
    return min(slots, capacity)


def end_ids(config: OPTConfig, eos_token_id: Any) -> set[int]:
    """The tokens that finish a row; the option goes before the model's own."""
    return set(np.flatnonzero(_end_tokens(config, eos_token_id)).tolist())


def _prompt(
    config: OPTConfig, token_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
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
    return prompt, mask


def _pad_token(config: OPTConfig, option: int | None, ends: np.ndarray) -> int:
    if option is not None:
        if not 0 <= option < config.vocab_size:
            raise ValueError(
                f"pad_token_id must be from 0 to {config.vocab_size - 1} "
                f"(vocab_size - 1), got {option}"
            )
        return option
    own = config.pad_token_id
    if own is not None and 0 <= own < config.vocab_size:
        return own
    return int(np.argmax(ends))


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
            f"and pass attention_mask, as pad_prompts() does ({error})"
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
