"""Perplexity of a causal language model over windows of a long text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from .modeling import OPT, check_opt, check_tokens

_MAX_WINDOW = 2048
# Logits of so many tokens are held at once, in float32.
_BATCH_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What perplexity() measured.

    Attributes:
      perplexity: exp of nll; infinite where that overflows.
      nll: mean negative log-likelihood of the predicted tokens, in nats.
      tokens: of the text.
      predicted: tokens that were predicted, each once.
      windows: number of windows.
      window: tokens of a window.
      stride: tokens from a window's start to the next one's.
    """

    perplexity: float
    nll: float
    tokens: int
    predicted: int
    windows: int
    window: int
    stride: int


@dataclasses.dataclass(frozen=True)
class _Window:
    start: int
    end: int
    # The first token of the window whose prediction counts.
    first: int


def perplexity(
    model: OPT,
    token_ids: ArrayLike,
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measures the perplexity of a text.

    The text is cut into windows that start every `stride` tokens. In each, the tokens
    that no earlier window had are predicted from those before them in the window; a
    token without any before it is not. With stride = window the windows are disjoint;
    a smaller stride gives tokens more context and takes longer. The last window may be
    shorter; it counts too.

    Args:
      model: the model.
      token_ids: (tokens,) integers, the whole text.
      window: tokens of a window; None takes the model's positions, at most 2048.
      stride: from 1 to window; None is window.
      progress: called with the windows done and all, before each batch and at the end.

    Returns:
      The measurement. Log-probabilities are float32, their sums float64.

    Raises:
      TypeError: the model is no OPT.
      ValueError: an argument is out of range, or the text has less than two tokens.
      FloatingPointError: the model gave NaN.
    """
    check_opt(model)
    config = model.config
    window = min(config.max_positions, _MAX_WINDOW) if window is None else window
    stride = window if stride is None else stride
    ids = np.asarray(token_ids)
    _check(ids, window, stride, config.max_positions)
    check_tokens(config, ids[None, :1])  # the dtype
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"token_ids must be in [0, {config.vocab_size}), got values from "
            f"{ids.min()} to {ids.max()}"
        )
    width = min(window, len(ids))
    windows = list(_windows(len(ids), width, stride))
    batch = max(1, min(_BATCH_TOKENS // width, len(windows)))
    graphdef, state = nnx.split(model)
    nll, predicted = 0.0, 0
    for start in range(0, len(windows), batch):
        if progress is not None:
            progress(start, len(windows))
        arrays = _batch(ids, windows[start : start + batch], batch, width)
        nll += float(np.asarray(_nll(graphdef, state, *arrays), np.float64).sum())
        predicted += int(arrays[-1].sum())
        if math.isnan(nll):
            raise FloatingPointError(
                f"the model's logits are NaN in windows {start} to "
                f"{min(start + batch, len(windows)) - 1}; try dtype float32 or bfloat16"
            )
    if progress is not None:
        progress(len(windows), len(windows))
    mean = nll / predicted
    return Perplexity(
        perplexity=math.exp(mean) if mean < 709 else math.inf,
        nll=mean,
        tokens=len(ids),
        predicted=predicted,
        windows=len(windows),
        window=window,
        stride=stride,
    )


def _check(ids: np.ndarray, window: int, stride: int, positions: int) -> None:
    if type(window) is not int or not 2 <= window <= positions:
        raise ValueError(
            f"window: expected 2 to the model's {positions} positions, got {window!r}"
        )
    if type(stride) is not int or not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to the window's {window}, got {stride!r}")
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(
            "expected a text of at least two tokens as an array of rank 1, got shape "
            f"{ids.shape}"
        )


def _windows(tokens: int, width: int, stride: int) -> Iterator[_Window]:
    done = 0
    for start in range(0, tokens, stride):
        end = min(start + width, tokens)
        first = max(done, start + 1)  # the first token has nothing before it
        if first < end:
            yield _Window(start, end, first)
        done = end
        if end == tokens:
            return


def _batch(
    ids: np.ndarray, windows: list[_Window], batch: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, mask of real tokens, mask of predicted ones; each (batch, width)."""
    tokens = np.zeros((batch, width), np.int32)
    mask = np.zeros((batch, width), np.bool_)
    predicted = np.zeros((batch, width), np.bool_)
    for row, window in enumerate(windows):
        size = window.end - window.start
        tokens[row, :size] = ids[window.start : window.end]
        mask[row, :size] = True
        predicted[row, window.first - window.start : size] = True
    return tokens, mask, predicted


@functools.partial(jax.jit, static_argnames="graphdef")
def _nll(
    graphdef: nnx.GraphDef[Any],
    state: nnx.State[Any, Any],
    tokens: jax.Array,
    mask: jax.Array,
    predicted: jax.Array,
) -> jax.Array:
    """Sums the negative log-likelihoods of each row's predicted tokens, (batch,)."""
    logits = nnx.merge(graphdef, state)(tokens, mask)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(predicted[:, 1:], nll, 0), axis=1)
