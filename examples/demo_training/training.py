"""The three phases: dense, rising sparsity, recovery with fixed masks."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from . import pruning
from .model import ModelFunctions, Params, negative_log_likelihood, windows

# Longest way, in tokens, that the start of a sequence moves to the start of a line.
_MAX_SNAP = 256


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of the training and the validation text.

    Attributes:
      train: (tokens,) int32.
      validation: (tokens,) int32.
      line_start: (tokens,) int32, the last index at or before each training token at
        which a line starts.
    """

    train: np.ndarray
    validation: np.ndarray
    line_start: np.ndarray

    @classmethod
    def create(cls, train: np.ndarray, validation: np.ndarray, newline: int):
        """Prepares ids; `newline` is the id of a line break."""
        starts = np.concatenate([[True], train[:-1] == newline])
        index = np.where(starts, np.arange(len(train), dtype=np.int32), 0)
        return cls(train, validation, np.maximum.accumulate(index).astype(np.int32))

    def epoch(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Returns starts of sequences that cover the text once, in random order.

        Half of them move back to the start of a line, where prompts start as well.
        """
        shift = int(rng.integers(length))
        starts = np.arange(shift, len(self.train) - length + 1, length, dtype=np.int32)
        starts = rng.permutation(starts)
        line = self.line_start[starts]
        near = starts - line <= min(_MAX_SNAP, length // 2)
        return np.where(near & (rng.random(len(starts)) < 0.5), line, starts)


@dataclasses.dataclass(frozen=True)
class Phase:
    """How one stretch of training runs.

    Attributes:
      name: for people.
      epochs: passes over the text, of which in the first `prune_epochs` sparsity
        rises to `sparsity`.
      learning_rate: its peak; it warms up and falls along a cosine.
      weight_decay: of matrices.
      dropout: rate.
      distill: weight of the teacher's distribution in the loss.
    """

    name: str
    epochs: int
    learning_rate: float
    weight_decay: float
    dropout: float
    prune_epochs: int = 0
    sparsity: float = 0.0
    distill: float = 0.0


class Record(NamedTuple):
    """What is known after an epoch; the losses are nats per token."""

    phase: str
    epoch: int
    train_loss: float
    validation_loss: float
    sparsity: float


class Result(NamedTuple):
    """The best parameters of a phase by validation loss, and how it went."""

    params: Params
    validation_loss: float
    records: list[Record]


class _State(NamedTuple):
    params: Params
    masks: dict[str, jax.Array]
    optimizer: Any
    key: jax.Array


def dispatches(corpus: Corpus, length: int, batch: int, chunk: int) -> tuple[int, int]:
    """Splits an epoch into dispatches of about `chunk` optimizer steps each.

    Returns:
      Number of dispatches and steps of each.

    Raises:
      ValueError: the training text is too short for one step.
    """
    # An epoch's random shift may cost one sequence.
    steps = (len(corpus.train) // length - 1) // batch
    if steps < 1:
        raise ValueError(
            f"expected at least {length * (batch + 1):,} tokens of training text "
            f"(positions x batch size), got {len(corpus.train):,}"
        )
    count = max(1, round(steps / chunk))
    return count, steps // count


def run_phase(
    functions: ModelFunctions,
    corpus: Corpus,
    phase: Phase,
    params: Params,
    *,
    batch_size: int,
    chunk: int,
    dtype: DTypeLike,
    seed: int,
    teacher: Params | None = None,
    report: Callable[[Record], None] = lambda record: None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Result:
    """Trains and returns the best parameters.

    Args:
      functions: the model.
      corpus: the text.
      phase: what to do.
      params: start; not changed.
      batch_size: sequences of a step.
      chunk: about how many steps of one dispatch.
      dtype: of the computation; parameters and optimizer are float32.
      seed: of order and dropout.
      teacher: parameters to distill from, needed if `phase.distill` is not 0.
      report: called with the record of every epoch.
      advance: called with the steps done after every dispatch.

    Raises:
      FloatingPointError: the loss became infinite or NaN.
    """
    length = functions.config.max_positions
    count, chunk = dispatches(corpus, length, batch_size, chunk)
    steps = count * chunk
    total = steps * phase.epochs
    rates = learning_rates(phase.learning_rate, total)
    names = functions.prunable() if phase.sparsity else []
    optimizer, train_chunk, validate = _compiled(
        functions, length, jnp.dtype(dtype), phase.weight_decay, phase.distill
    )

    train_ids = jnp.asarray(corpus.train)
    validation_ids = jnp.asarray(corpus.validation)
    # Donation would otherwise invalidate the caller's arrays.
    params = jax.tree.map(jnp.copy, params)
    state = _State(
        params=params,
        masks={n: jnp.ones(params[n].shape, jnp.bool_) for n in names},
        optimizer=optimizer.init(params),
        # The fast generator: its numbers are the same on one kind of device.
        key=jax.random.key(seed, impl="rbg"),
    )
    teacher = teacher if phase.distill else None
    rng = np.random.default_rng(seed)
    best, best_loss, records = None, math.inf, []
    done, pruned = 0, 0.0
    for epoch in range(phase.epochs):
        starts = corpus.epoch(length, rng)[: steps * batch_size]
        losses = []
        for at in range(0, steps, chunk):
            sparsity = pruning.cubic_sparsity(
                (done + chunk) / max(1, steps * phase.prune_epochs), phase.sparsity
            )
            if sparsity > pruned:
                masks = pruning.magnitude_masks(state.params, names, sparsity)
                state, pruned = state._replace(masks=masks), sparsity
            part = starts[at * batch_size : (at + chunk) * batch_size]
            state, loss = train_chunk(
                state,
                train_ids,
                part.reshape(chunk, batch_size),
                rates[done : done + chunk],
                teacher,
                np.float32(phase.dropout),
            )
            done += chunk
            losses.append(loss)
            advance(chunk)
        record = Record(
            phase=phase.name,
            epoch=epoch + 1,
            train_loss=float(jnp.mean(jnp.stack(losses))),
            validation_loss=float(validate(state.params, validation_ids)),
            sparsity=sparsity,
        )
        if not math.isfinite(record.train_loss + record.validation_loss):
            raise FloatingPointError(
                f"expected a finite loss, got {record}: lower the learning rate"
            )
        records.append(record)
        report(record)
        if epoch >= phase.prune_epochs and record.validation_loss < best_loss:
            best_loss = record.validation_loss
            best = jax.tree.map(jnp.copy, state.params)
    return Result(best, best_loss, records)


def learning_rates(peak: float, total: int) -> np.ndarray:
    """Returns the rate of each of `total` steps: linear warm-up, cosine to 2%."""
    warmup = max(1, min(400, total // 10))
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total, peak / 50)
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(jax.vmap(schedule)(jnp.arange(total)), np.float32)


@functools.lru_cache(maxsize=8)
def _compiled(functions, length, dtype, weight_decay, distill):
    """Optimizer, training chunk and validation, shared by phases that differ little."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        # The schedule multiplies the updates afterwards.
        optax.adamw(
            1.0,
            b1=0.9,
            b2=0.98,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
        ),
    )

    def loss_fn(params, inputs, targets, teacher, dropout, key):
        logits = functions.training_logits(params, inputs, dtype, dropout, key)
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hard = jnp.mean(hard)
        if not distill:
            return hard, hard
        expected = jax.nn.softmax(functions.build(teacher, dtype)(inputs))
        soft = jnp.mean(optax.softmax_cross_entropy(logits, expected))
        return (1 - distill) * hard + distill * soft, hard

    def train_chunk(state, train_ids, starts, rates, teacher, dropout):
        def step(state, inputs):
            starts, rate = inputs
            tokens, targets = windows(train_ids, starts, length)
            key, used = jax.random.split(state.key)
            gradients, loss = jax.grad(loss_fn, has_aux=True)(
                state.params, tokens, targets, teacher, dropout, used
            )
            gradients = pruning.apply_masks(gradients, state.masks)
            # optax promotes types implicitly.
            with jax.numpy_dtype_promotion("standard"):
                updates, optimizer_state = optimizer.update(
                    gradients, state.optimizer, state.params
                )
            updates = jax.tree.map(lambda u: rate * u, updates)
            params = optax.apply_updates(state.params, updates)
            params = pruning.apply_masks(params, state.masks)
            return _State(params, state.masks, optimizer_state, key), loss

        params = pruning.apply_masks(state.params, state.masks)
        state, losses = jax.lax.scan(
            step, state._replace(params=params), (starts, rates)
        )
        return state, jnp.mean(losses)

    def validate(params, token_ids):
        return negative_log_likelihood(functions, params, token_ids, dtype)

    return optimizer, jax.jit(train_chunk, donate_argnums=0), jax.jit(validate)
