"""Choosing the next token: greedy, temperature, top-k and top-p (nucleus) sampling.

Sampling draws with the Gumbel-max trick: ``argmax(logits / temperature + noise)``
with one Gumbel variate for each row, step and token. The noise belongs to the token,
not to its rank, so narrowing ``top_k`` or ``top_p`` changes a draw only when the drawn
token falls outside the candidates.

Top-k sampling is from Fan et al., "Hierarchical Neural Story Generation" (2018);
top-p from Holtzman et al., "The Curious Case of Neural Text Degeneration" (2019).
"""

import dataclasses
import math
import operator
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

_TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)

_MIN_CANDIDATES = 64

_GREEDY = "greedy"
_FULL = "full"
_FILTERED = "filtered"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampling method as a pytree, made by `Sampler.create`.

    The numbers are leaves, so that a compiled step serves every temperature, ``top_p``
    and ``top_k`` up to the next power of two; the kind of the method is static.

    Attributes:
        temperature: float32 scalar, the logits' divisor.
        top_k: int32 scalar, how many of the highest logits may be drawn.
        top_p: float32 scalar, the probability that the drawn-from set has to reach.
        kind: static; "greedy", "full" (temperature alone) or "filtered".
        candidates: static; the number of highest logits that are sorted by "filtered".
    """

    temperature: Any
    top_k: Any
    top_p: Any
    kind: str = dataclasses.field(metadata={"static": True})
    candidates: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        vocab_size: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Self:
        """Checks the options of `generate` and builds the method.

        Args:
            vocab_size: number of logits a row.
            temperature: divisor of the logits; 0 takes the highest logit (greedy), and
                then ``top_k`` and ``top_p`` have nothing to choose from.
            top_k: draw from exactly this many tokens of highest logit (all of them if
                there are fewer); of equal logits the lower token ids come first.
            top_p: draw from the smallest set of most probable tokens whose probability
                reaches this value, measured after temperature and ``top_k``. The most
                probable token is always in the set.

        Returns:
            The method.

        Raises:
            TypeError: an option is no number of the right kind.
            ValueError: temperature is negative or not finite, ``top_k`` is below 1, or
                ``top_p`` is outside (0, 1].
        """
        temperature, top_k, top_p = check_filters(temperature, top_k, top_p)
        kind = _FULL
        candidates = vocab_size
        k = vocab_size
        if top_k is not None and top_k < vocab_size:
            k = top_k
            kind = _FILTERED
            # A power of two: many values share one compiled step.
            power = 1 << (k - 1).bit_length()
            candidates = min(max(power, _MIN_CANDIDATES), vocab_size)
        p = 1.0 if top_p is None else top_p
        if p < 1:
            kind = _FILTERED
        if temperature < _TINY:
            kind = _GREEDY
        if kind != _FILTERED:
            candidates = vocab_size
        return cls(
            temperature=np.float32(min(temperature, _HUGE)),
            top_k=np.int32(k),
            # A p below the smallest float32 still keeps the most probable token.
            top_p=np.float32(max(p, _TINY)),
            kind=kind,
            candidates=candidates,
        )

    def sample(
        self,
        logits: jax.Array,
        key: jax.Array,
        step: Any,
        streams: jax.Array | None = None,
    ) -> jax.Array:
        """Chooses one token for each row.

        A row's draw depends on its key, its stream and the step alone: not on the other
        rows nor on how many there are.

        Args:
            logits: (batch, vocab_size), any float dtype; computed in float32. A token
                at -inf is never drawn.
            key: a scalar PRNG key, or (batch,) of them.
            step: int32 scalar, the number of tokens generated before this one.
            streams: (batch,) uint32, which of a key's draws a row gets; None is the
                row's index.

        Returns:
            (batch,) int32 token ids.
        """
        logits = logits.astype(jnp.float32)
        if self.kind == _GREEDY:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # Subtracting first keeps tiny temperatures from overflowing to inf - inf.
        top = jnp.max(logits, axis=-1, keepdims=True)
        scaled = (logits - top) / self.temperature
        if streams is None:
            streams = jnp.arange(logits.shape[0], dtype=jnp.uint32)
        noise = _row_noise(key, step, streams, logits.shape[1])
        if self.kind == _FULL:
            return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
        values, ids = jax.lax.top_k(scaled, self.candidates)
        values = filter_sorted(values, self.top_k, self.top_p)
        noise = jnp.take_along_axis(noise, ids, axis=-1)
        choice = jnp.argmax(values + noise, axis=-1, keepdims=True)
        return jnp.take_along_axis(ids, choice, axis=-1)[:, 0].astype(jnp.int32)


def filter_sorted(values: jax.Array, top_k: Any, top_p: Any) -> jax.Array:
    """Sets the logits that top-k and top-p leave out to -inf.

    Args:
        values: (batch, n) float32 logits after temperature, highest first.
        top_k: int32 scalar, at least 1.
        top_p: float32 scalar in (0, 1]; 1 leaves nothing out.

    Returns:
        (batch, n) float32; the first column is always kept.
    """
    rank = jnp.arange(values.shape[-1], dtype=jnp.int32)[None, :]
    values = jnp.where(rank < top_k, values, -jnp.inf)
    probabilities = jax.nn.softmax(values, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The sum may round to 1 before the last token, hence the case of its own.
    keep = (before < top_p) | (top_p >= 1) | (rank == 0)
    return jnp.where(keep, values, -jnp.inf)


def penalize(logits: jax.Array, seen: jax.Array, penalty: Any) -> jax.Array:
    """Makes tokens that were seen less likely (CTRL, arXiv:1909.05858).

    Args:
        logits: (batch, vocab_size) float32.
        seen: (batch, vocab_size) bool.
        penalty: float32 scalar; above 1 discourages.

    Returns:
        (batch, vocab_size): logits of seen tokens divided by the penalty where they are
        positive, multiplied where negative.
    """
    changed = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, changed, logits)


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """(batch,) float32: what the softmax of (batch, vocab_size) logits gives tokens."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def key_data(seed: int) -> np.ndarray:
    """The (2,) uint32 words of a Threefry key for a seed of 0 to 2**64 - 1.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed is out of range.
    """
    seed = as_int("seed", seed)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be at least 0 and below 2**64, got {seed}")
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def make_key(words: jax.Array) -> jax.Array:
    """The PRNG key of `key_data`'s words, whatever JAX's default generator is."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def check_filters(
    temperature: Any, top_k: Any, top_p: Any
) -> tuple[float, int | None, float | None]:
    """The options of sampling as Python numbers.

    Raises:
        TypeError, ValueError: as `Sampler.create`.
    """
    temperature = as_float("temperature", temperature)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature must be finite and at least 0, got {temperature}"
        )
    if top_k is not None:
        top_k = as_int("top_k", top_k)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None:
        top_p = as_float("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1, got {top_p}")
    return temperature, top_k, top_p


def as_int(name: str, value: Any) -> int:
    """``value`` as an int; refuses bools, floats and strings with a TypeError."""
    if not isinstance(value, bool | np.bool_):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an integer, got {value!r}")


def as_float(name: str, value: Any) -> float:
    """``value`` as a float; refuses everything but real scalars with a TypeError."""
    array = np.asarray(value)
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(
        array.dtype, jnp.integer
    )
    if array.ndim or not real:
        raise TypeError(f"{name} must be a real number, got {value!r}")
    return float(value)


def _row_noise(
    key: jax.Array, step: Any, streams: jax.Array, vocab_size: int
) -> jax.Array:
    """(batch, vocab_size) float32 Gumbel variates, each row from a key of its own."""
    keys = jnp.broadcast_to(key, streams.shape)

    def row(key, stream):
        key = jax.random.fold_in(jax.random.fold_in(key, step), stream)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(keys, streams)
